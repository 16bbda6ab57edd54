"""Arrays inside a database value: msgpack-numpy's layout and npz files, read without executing anything.

What a reader would get wrong: a value is never unpacked as a whole. `find_arrays` walks over the msgpack and says where each
array's bytes lie; the caller makes views of those it needs. (A record is 44 % soft labels, which most tasks never touch.)

One array is a msgpack map {b"nd": true, b"type": "<f2", b"kind": b"", b"shape": [n, d], b"data": raw C-order bytes}.
Object arrays (kind "O", a pickle), structured types and every type outside `ALLOWED_TYPES` are refused.

Source: the layout as msgpack-numpy 0.4 writes it (facts/uniter.md, 1.2).
"""

import math
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


_LONGEST_NAME: Final = 4096


_MAPS: Final = frozenset((*range(0x80, 0x90), 0xDE, 0xDF))
_LISTS: Final = frozenset((*range(0x90, 0xA0), 0xDC, 0xDD))
_EXTENSIONS: Final = frozenset((0xC1, 0xC7, 0xC8, 0xC9, *range(0xD4, 0xD9)))
_HEADS: Final = {0xC4: 2, 0xD9: 2, 0xC5: 3, 0xDA: 3, 0xC6: 5, 0xDB: 5}  # of bytes and strings: type and length, in bytes


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
        """Whether a value is laid out so, but for the numbers in it; then its arrays lie where the layout says."""
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
    except (IndexError, UnicodeDecodeError, ValueError, msgpack.UnpackException) as error:
        raise BadInput(f"the value is cut off or no msgpack{f' ({error})' if str(error) else ''}") from None
    if len(_layouts) >= _MAX_LAYOUTS:
        _layouts.clear()
    layout = _layouts[(len(value), bytes(value[:_HEAD_BYTES]))] = Layout(value, places)
    return layout


class _Walker:
    """msgpack's own reader, asked for places instead of objects. Nothing of a value is made an object but names and numbers.

    Where the reader would believe a length, its limits stand (4,096 bytes of a name, no list or map as a name); what is stepped over costs
    no memory whatever it claims.
    """

    def __init__(self, value: bytes | memoryview) -> None:
        self.value = value
        limits = dict.fromkeys(("max_str_len", "max_bin_len", "max_ext_len"), _LONGEST_NAME)
        self.reader = msgpack.Unpacker(
            raw=True, strict_map_key=False, max_buffer_size=max(1, len(value)), max_array_len=0, max_map_len=0, **limits
        )
        self.reader.feed(value)

    def arrays(self) -> dict[str, ArrayPlace]:
        if self._code() not in _MAPS:
            raise BadInput("the value is no msgpack map of arrays")
        count = self.reader.read_map_header()
        if count > MAX_ARRAYS:
            raise BadInput(f"the value claims {count:,} arrays, expected at most {MAX_ARRAYS}")
        found: dict[str, ArrayPlace] = {}
        for _ in range(count):
            name = self._scalar()
            if not isinstance(name, bytes):
                raise BadInput("the value is no msgpack map from names to arrays")
            if self._code() not in _MAPS:
                self.reader.skip()
                continue
            array = self._array(name.decode())
            if array is not None and array.shape:
                found[name.decode()] = array
        if self.reader.tell() != len(self.value):
            raise BadInput(f"the value has {len(self.value) - self.reader.tell():,} bytes too many")
        return found

    def _code(self) -> int:
        """The type of what comes next."""
        return int(self.value[self.reader.tell()])

    def _scalar(self) -> Any:
        """A short string or bytes (both as bytes), number, bool or nil."""
        code = self._code()
        if code in _MAPS or code in _LISTS or code in _EXTENSIONS:
            raise BadInput(f"the value holds msgpack type 0x{code:02x} where a name or a number was expected")
        return self.reader.unpack()

    def _array(self, name: str) -> ArrayPlace | None:
        fields: dict[bytes, Any] = {}
        data: tuple[int, int] | None = None
        for _ in range(self.reader.read_map_header()):
            key = self._scalar()
            if key == b"data":
                head = 1 if 0xA0 <= self._code() <= 0xBF else _HEADS.get(self._code())
                if head is None:
                    raise BadInput(f"array {name!r}: its data are no bytes")
                begin = self.reader.tell() + head
                self.reader.skip()
                data = begin, self.reader.tell() - begin
            elif key == b"shape":
                extents = self.reader.read_array_header() if self._code() in _LISTS else MAX_DIMENSIONS + 1
                if extents > MAX_DIMENSIONS:
                    raise BadInput(f"array {name!r} has a shape that is no list of at most {MAX_DIMENSIONS} numbers")
                fields[key] = [self._scalar() for _ in range(extents)]
            elif key in (b"nd", b"type", b"kind"):
                if self._code() in _MAPS or self._code() in _LISTS:
                    raise BadInput(f"array {name!r} has a structured type; only plain number types are read")
                fields[key] = self._scalar()
            else:
                self.reader.skip()
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
