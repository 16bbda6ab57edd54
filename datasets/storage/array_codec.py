"""Arrays inside a database value: msgpack-numpy's layout and npz files, read without executing anything.

What a reader would get wrong: a value is never unpacked as a whole. `find_arrays` walks over the msgpack and says where each
array's bytes lie; the caller makes views of those it needs. (A record is 44 % soft labels, which most tasks never touch.)

One array is a msgpack map {b"nd": true, b"type": "<f2", b"kind": b"", b"shape": [n, d], b"data": raw C-order bytes}.
Object arrays (kind "O", a pickle), structured types and every type outside `ALLOWED_TYPES` are refused.

Source: the layout as msgpack-numpy 0.4 writes it (facts/uniter.md, 1.2).
"""

import math
import struct
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import msgpack
import numpy as np
from numpy.typing import NDArray

from uniter.datasets.errors import BadInput

ALLOWED_TYPES: Final = frozenset({"<f2", "<f4", "<f8", "|b1", "|i1", "|u1", "<i2", "<u2", "<i4", "<u4", "<i8", "<u8"})


MAX_ARRAYS = 64


MAX_DIMENSIONS = 4


MAX_UNPACKED_BYTES = 1 << 30


_MAX_DEPTH = 8


class ArrayPlace(NamedTuple):
    """Where an array lies inside a value: its type, its shape, its first byte."""

    dtype: "np.dtype[Any]"
    shape: tuple[int, ...]
    offset: int


def pack_arrays(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Arrays as one msgpack map in msgpack-numpy's layout, byte for byte what `msgpack_numpy` packs with `use_bin_type`."""
    packed = {}
    for name, array in arrays.items():
        spelling = array.dtype.str
        if spelling not in ALLOWED_TYPES:
            raise BadInput(f"array {name!r} has type {spelling}, expected one of {', '.join(sorted(ALLOWED_TYPES))}")
        packed[name] = {b"nd": True, b"type": spelling, b"kind": b"", b"shape": list(array.shape), b"data": array.tobytes()}
    return bytes(msgpack.packb(packed, use_bin_type=True))


_DTYPES: Final = {spelling: np.dtype(spelling) for spelling in sorted(ALLOWED_TYPES)}


def find_arrays(value: bytes | memoryview) -> Mapping[str, ArrayPlace]:
    """Where each array of a msgpack value lies. Entries that are no arrays, and arrays without dimensions, are left out.

    Raises:
        BadInput: not msgpack, cut off, object or structured arrays, a type that is not allowed, a length that does not fit.
    """
    return find_layout(value).places


class Layout:
    """Where the arrays of a value lie, kept for further values.

    Records of one writer with the same number of regions have the same layout: all bytes but the arrays' own are equal. So a
    value is compared with those bytes, and walked only if no known layout fits.

    Attributes:
        places: by name, as `find_arrays` says.
        headers: name -> (first byte, last + 1, the bytes) of what stands in front of an array's data and after the array before it:
            its name, type, shape and length. A value with the same bytes there holds that array in that place.
        plans: whatever a reader worked out about this layout.
    """

    __slots__ = ("_rest", "headers", "places", "plans")

    def __init__(self, value: bytes | memoryview, places: Mapping[str, ArrayPlace]) -> None:
        self.places = places
        self.plans: dict[Any, Any] = {}
        self.headers: dict[str, tuple[int, int, bytes]] = {}
        begin = 0
        for name, place in sorted(places.items(), key=lambda item: item[1].offset):
            self.headers[name] = (begin, place.offset, bytes(value[begin : place.offset]))
            begin = place.offset + place.dtype.itemsize * math.prod(place.shape)
        self._rest = (begin, len(value), bytes(value[begin:]))

    def fits(self, value: bytes | memoryview) -> bool:
        return all(value[begin:end] == between for begin, end, between in (*self.headers.values(), self._rest))


_layouts: dict[tuple[int, bytes], Layout] = {}


_MAX_LAYOUTS: Final = 1024


_HEAD_BYTES: Final = 32


def guess_layout(value: bytes | memoryview) -> Layout | None:
    """The layout of an earlier value of the same length and beginning; whether it fits has to be seen from its `headers`."""
    return _layouts.get((len(value), bytes(value[:_HEAD_BYTES])))


def find_layout(value: bytes | memoryview) -> Layout:
    """`find_arrays`, remembered."""
    known = guess_layout(value)
    if known is not None and known.fits(value):
        return known
    try:
        places = _Walker(value).arrays()
    except (IndexError, struct.error, UnicodeDecodeError):
        raise BadInput("the value is cut off or no msgpack") from None
    if len(_layouts) >= _MAX_LAYOUTS:
        _layouts.clear()
    layout = _layouts[(len(value), bytes(value[:_HEAD_BYTES]))] = Layout(value, places)
    return layout


class _Walker:
    def __init__(self, value: bytes | memoryview) -> None:
        self.value = value
        self.place = 0

    def arrays(self) -> dict[str, ArrayPlace]:
        count = self._map_length()
        if count is None:
            raise BadInput("the value is no msgpack map of arrays")
        if count > MAX_ARRAYS:
            raise BadInput(f"the value claims {count:,} arrays, expected at most {MAX_ARRAYS}")
        found: dict[str, ArrayPlace] = {}
        for _ in range(count):
            name = self._scalar()
            if isinstance(name, bytes):
                name = name.decode()
            if not isinstance(name, str):
                raise BadInput("the value is no msgpack map from names to arrays")
            before = self.place
            entries = self._map_length()
            if entries is None:
                self.place = before
                self._skip(0)
                continue
            array = self._array(name, entries)
            if array is not None and array.shape:
                found[name] = array
        if self.place != len(self.value):
            raise BadInput(f"the value has {len(self.value) - self.place:,} bytes too many")
        return found

    def _take(self, count: int) -> int:
        """Step over `count` bytes; where they begin."""
        begin = self.place
        if begin + count > len(self.value):
            raise BadInput(f"the value is cut off: {count:,} bytes are announced but {len(self.value) - begin:,} follow")
        self.place = begin + count
        return begin

    def _number(self, layout: str) -> Any:
        size = struct.calcsize(layout)
        return struct.unpack_from(layout, self.value, self._take(size))[0]

    def _map_length(self) -> int | None:
        code = self.value[self.place]
        if 0x80 <= code <= 0x8F:
            self.place += 1
            return code & 0x0F
        if code in (0xDE, 0xDF):
            self.place += 1
            return int(self._number(">H" if code == 0xDE else ">I"))
        return None

    def _list_length(self) -> int | None:
        code = self.value[self.place]
        if 0x90 <= code <= 0x9F:
            self.place += 1
            return code & 0x0F
        if code in (0xDC, 0xDD):
            self.place += 1
            return int(self._number(">H" if code == 0xDC else ">I"))
        return None

    def _blob_length(self) -> int | None:
        """Length of the bytes or string that begins here, None if something else does."""
        code = self.value[self.place]
        if 0xA0 <= code <= 0xBF:
            self.place += 1
            return code & 0x1F
        layout = {0xC4: ">B", 0xD9: ">B", 0xC5: ">H", 0xDA: ">H", 0xC6: ">I", 0xDB: ">I"}.get(code)
        if layout is None:
            return None
        self.place += 1
        return int(self._number(layout))

    def _scalar(self) -> Any:
        """A short string or bytes (both as bytes), number, bool or nil."""
        length = self._blob_length()
        if length is not None:
            if length > 4096:
                raise BadInput(f"a name of {length:,} bytes; is the value damaged?")
            begin = self._take(length)
            return bytes(self.value[begin : begin + length])
        code = self.value[self.place]
        self.place += 1
        if code <= 0x7F:
            return code
        if code >= 0xE0:
            return code - 0x100
        if code in (0xC0, 0xC2, 0xC3):
            return {0xC0: None, 0xC2: False, 0xC3: True}[code]
        layout = {
            0xCA: ">f",
            0xCB: ">d",
            0xCC: ">B",
            0xCD: ">H",
            0xCE: ">I",
            0xCF: ">Q",
            0xD0: ">b",
            0xD1: ">h",
            0xD2: ">i",
            0xD3: ">q",
        }.get(code)
        if layout is None:
            raise BadInput(f"the value holds msgpack type 0x{code:02x} where a name or a number was expected")
        return self._number(layout)

    def _skip(self, depth: int) -> None:
        """Step over anything that is no extension."""
        if depth > _MAX_DEPTH:
            raise BadInput("the value is nested too deeply")
        length = self._map_length()
        if length is not None:
            for _ in range(self._plausible(2 * length)):
                self._skip(depth + 1)
            return
        length = self._list_length()
        if length is not None:
            for _ in range(self._plausible(length)):
                self._skip(depth + 1)
            return
        length = self._blob_length()
        if length is not None:
            self._take(length)
            return
        self._scalar()

    def _plausible(self, count: int) -> int:
        if count > len(self.value) - self.place:
            raise BadInput(f"the value claims {count:,} entries but has {len(self.value) - self.place:,} bytes left")
        return count

    def _array(self, name: str, entries: int) -> ArrayPlace | None:
        fields: dict[bytes, Any] = {}
        data: tuple[int, int] | None = None
        for _ in range(self._plausible(entries)):
            key = self._scalar()
            if key == b"data":
                length = self._blob_length()
                if length is None:
                    raise BadInput(f"array {name!r}: its data are no bytes")
                data = (self._take(length), length)
            elif key == b"shape":
                extents = self._list_length()
                if extents is None or extents > MAX_DIMENSIONS:
                    raise BadInput(f"array {name!r} has a shape that is no list of at most {MAX_DIMENSIONS} numbers")
                fields[key] = [self._scalar() for _ in range(extents)]
            elif key in (b"nd", b"type", b"kind"):
                if self.value[self.place] in (*range(0x80, 0xA0), 0xDC, 0xDD, 0xDE, 0xDF):
                    raise BadInput(f"array {name!r} has a structured type; only plain number types are read")
                fields[key] = self._scalar()
            else:
                self._skip(0)
        if b"nd" not in fields:
            return None  # some other map
        if fields.get(b"kind", b"") not in (b"", None):
            raise BadInput(f"array {name!r} holds Python objects (a pickle) or a structured type; such values are never read")
        if fields[b"nd"] is not True:
            return None  # a NumPy scalar
        return _checked_place(name, fields.get(b"type"), fields.get(b"shape"), data)


def _checked_place(name: str, spelling: Any, shape: Any, data: tuple[int, int] | None) -> ArrayPlace:
    text = spelling.decode("latin-1") if isinstance(spelling, bytes) else repr(spelling)
    if text not in ALLOWED_TYPES:
        raise BadInput(f"array {name!r} has type {text[:40]!r}, expected one of {', '.join(sorted(ALLOWED_TYPES))}")
    if shape is None or data is None or not all(type(extent) is int and 0 <= extent < 1 << 40 for extent in shape):
        raise BadInput(f"array {name!r} has no shape or no data")
    count = 1
    for extent in shape:
        count *= extent
    dtype = _DTYPES[text]
    if count * dtype.itemsize != data[1]:
        raise BadInput(f"array {name!r} of shape {tuple(shape)} and type {text} needs {count * dtype.itemsize:,} bytes but has {data[1]:,}")
    return ArrayPlace(dtype, tuple(shape), data[0])
