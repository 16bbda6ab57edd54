"""Named arrays in one file that every process maps instead of reading, and the list of keys made of them.

The layout is safetensors' (a length, a JSON header, raw little-endian arrays), so the file can be opened with that library
as well; written here because an index of ten million keys is mapped, never loaded. Nothing in it can execute code.
"""

import bisect
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, overload

import numpy as np
import orjson
from numpy.typing import NDArray

from uniter.datasets.errors import BadInput
from uniter.datasets.storage.files import opened_aside

_CODES = {"U8": "|u1", "I16": "<i2", "I32": "<i4", "U32": "<u4", "I64": "<i8", "U64": "<u8", "F16": "<f2", "F32": "<f4", "F64": "<f8"}


_CODE_OF = {np.dtype(spelling): code for code, spelling in _CODES.items()}


_MAX_HEADER_BYTES = 1 << 20


_JOINED: Final = 1 << 16  # keys that are joined at a time, which bounds the memory


KEY_COLUMNS = ("key_bytes", "key_ends", "hashes", "hash_rows")


def save_arrays(path: Path, arrays: Mapping[str, NDArray[Any]], *, note: Mapping[str, str] | None = None) -> None:
    """Write arrays to `path`, whole or not at all. Wide items first, so that every array stays aligned.

    Args:
        arrays: name -> array of a plain number type.
        note: strings to keep beside them.
    """
    names = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(note or {})}
    offset = 0
    for name in names:
        array = arrays[name]
        header[name] = {
            "dtype": _CODE_OF[array.dtype.newbyteorder("<")],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 64)
    with opened_aside(path) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in names:
            array = np.ascontiguousarray(arrays[name], dtype=arrays[name].dtype.newbyteorder("<"))
            if array.size:
                file.write(array.data.cast("B"))


def map_arrays(path: Path, *, needed: Iterable[str] = ()) -> dict[str, NDArray[Any]]:
    """The arrays of a file that `save_arrays` wrote, mapped read-only (pages are shared by all processes).

    Raises:
        BadInput: the file is damaged or of another kind, or one of the needed arrays is not in it.
    """
    if not path.is_file():
        raise _missing(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        start += file.read(min(int.from_bytes(start, "little"), _MAX_HEADER_BYTES))
    whole = np.memmap(path, dtype=np.uint8, mode="r") if size > len(start) else np.zeros(0, dtype=np.uint8)
    return _arrays(path, start, size, whole, needed)


def load_arrays(path: Path | str, *, needed: Iterable[str] = ()) -> dict[str, NDArray[Any]]:
    """`map_arrays` of a small file, read instead of mapped: what a loop over many of them wants."""
    try:
        with open(path, "rb") as file:
            content = file.read()
    except FileNotFoundError:
        raise _missing(path) from None
    return _arrays(path, content, len(content), np.frombuffer(content, dtype=np.uint8), needed)


def _missing(path: Path | str) -> BadInput:
    return BadInput(f"index file {path} is missing; write a whole database with `uniter-db check --repair OUT`")


def _damaged(path: Path | str) -> BadInput:
    return BadInput(f"index file {path} is damaged or no index; remove it and run `uniter-db check --repair OUT` on the database")


def _arrays(path: Path | str, start: bytes, size: int, whole: NDArray[np.uint8], needed: Iterable[str]) -> dict[str, NDArray[Any]]:
    """The arrays that the beginning of a file of `size` bytes names, as views of the whole."""
    length = int.from_bytes(start[:8], "little")
    if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
        raise _damaged(path)
    text = start[8 : 8 + length]
    try:
        header = orjson.loads(text)
        entries = {
            name: (entry["dtype"], entry["shape"], entry["data_offsets"]) for name, entry in header.items() if name != "__metadata__"
        }
    except (ValueError, TypeError, KeyError, AttributeError):
        raise _damaged(path) from None
    data_start = 8 + length
    arrays: dict[str, NDArray[Any]] = {}
    for name, (code, shape, offsets) in entries.items():
        if not (
            isinstance(code, str)
            and code in _CODES
            and isinstance(shape, list)
            and isinstance(offsets, list)
            and len(offsets) == 2
            and all(type(number) is int and 0 <= number < 1 << 56 for number in [*shape, *offsets])
        ):
            raise _damaged(path)
        dtype = np.dtype(_CODES[code])
        count = 1
        for extent in shape:
            count *= extent
        begin, end = offsets
        if end - begin != count * dtype.itemsize or data_start + end > size:
            raise _damaged(path)
        arrays[name] = (
            np.ndarray(tuple(shape), dtype=dtype, buffer=whole, offset=data_start + begin) if count else np.zeros(tuple(shape), dtype=dtype)
        )
    if missing := set(needed) - arrays.keys():
        raise BadInput(f"index file {path} has no column {min(missing)}; write a whole database with `uniter-db check --repair OUT`")
    return arrays


def hash_key(key: bytes) -> int:
    """64 bits of BLAKE2b of a key, the column that look-ups search."""
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")


def key_columns(keys: Sequence[bytes], *, hashes: NDArray[np.uint64] | None = None) -> dict[str, NDArray[Any]]:
    """The arrays that a `KeyList` needs: all keys end to end, where each ends, and their hashes in order with the rows they belong to.

    Args:
        hashes: (len(keys),) of the keys, where they are known.
    """
    if hashes is None:
        hashes = np.fromiter(map(hash_key, keys), dtype=np.uint64, count=len(keys))
    order = np.argsort(hashes, kind="stable")
    return {
        "key_bytes": np.frombuffer(b"".join(keys), dtype=np.uint8),
        "key_ends": np.cumsum(np.fromiter(map(len, keys), dtype=np.int64, count=len(keys)), dtype=np.int64),
        "hashes": hashes[order],
        "hash_rows": order.astype(np.int64),
    }


def _text(key: bytes) -> str:
    try:
        return key.decode()
    except UnicodeDecodeError:
        raise BadInput(f"an index file holds the key {key[:80]!r}, which is no UTF-8; run `uniter-db check --repair OUT` on it") from None


class KeyList(Sequence[str]):
    """Keys as a sequence of str on top of mapped arrays: no Python object per key is kept.

    Args:
        columns: what `key_columns` made, or those arrays mapped from a file.
    """

    def __init__(self, columns: Mapping[str, NDArray[Any]]) -> None:
        self._bytes, self._ends = columns["key_bytes"], columns["key_ends"]
        self._hashes, self._rows = columns["hashes"], columns["hash_rows"]
        # Single items come faster, and as plain ints, out of a memoryview than out of an array.
        self._byte_view, self._end_view = self._bytes.data, self._ends.data
        self._hash_view, self._row_view = self._hashes.data, self._rows.data
        if len(self._hashes) != len(self._ends) or len(self._rows) != len(self._ends):
            raise BadInput("an index file has key columns of different lengths; run `uniter-db check --repair OUT` on the database")

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            return [self[index] for index in range(*row.indices(len(self)))]
        return _text(self.raw(row))

    def raw(self, row: int) -> bytes:
        """The key of a row as it stands in the database."""
        count = len(self._ends)
        if not -count <= row < count:
            raise IndexError(row)
        row %= count
        return bytes(self._byte_view[self._end_view[row - 1] if row else 0 : self._end_view[row]])

    def __iter__(self) -> Iterator[str]:
        begin = 0
        for start in range(0, len(self), 65536):
            for end in self._ends[start : start + 65536].tolist():
                yield _text(self._bytes[begin:end].tobytes())
                begin = end

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self.find(key) >= 0

    def find(self, key: str) -> int:
        """The row of a key, -1 if it is not there."""
        return self.find_raw(key.encode(errors="surrogatepass"))

    def find_raw(self, raw: bytes) -> int:
        """`find` of a key as it stands in the database."""
        wanted = hash_key(raw)
        place = bisect.bisect_left(self._hash_view, wanted)
        while place < len(self._hash_view) and self._hash_view[place] == wanted:
            row = self._row_view[place]
            if 0 <= row < len(self) and self.raw(row) == raw:
                return row
            place += 1
        return -1

    def find_all(self, keys: "KeyList") -> NDArray[np.int64]:
        """(len(keys),) the row of each of some keys, -1 where it is not there: the two lists joined by their sorted hashes."""
        found = np.full(len(keys), -1, dtype=np.int64)
        if not len(self):
            return found
        wanted = np.asarray(keys._hashes)
        for start in range(0, len(keys), _JOINED):
            part = wanted[start : start + _JOINED]
            places = np.searchsorted(self._hashes, part)
            met = np.flatnonzero(self._hashes[np.minimum(places, len(self) - 1)] == part)
            theirs, mine = keys._rows[start + met], self._rows[places[met]]
            inside = (theirs >= 0) & (theirs < len(keys)) & (mine >= 0) & (mine < len(self))
            theirs, mine = theirs[inside], mine[inside]
            equal = self._equal(mine, keys, theirs)
            found[theirs[equal]] = mine[equal]
            for row in theirs[~equal].tolist():  # another key has the same hash
                found[row] = self.find(keys[row])
        return found

    def _spans(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where the keys of some rows begin, and how long they are."""
        begins = np.where(rows > 0, self._ends[np.maximum(rows, 1) - 1], 0)
        return begins, self._ends[rows] - begins

    def _equal(self, rows: NDArray[np.int64], other: "KeyList", others: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether the keys of some rows are, byte for byte, those of rows of another list."""
        begins, lengths = self._spans(rows)
        their_begins, their_lengths = other._spans(others)
        equal: NDArray[np.bool_] = lengths == their_lengths
        for length in np.unique(lengths[equal]).tolist():
            same = np.flatnonzero(equal & (lengths == length))
            places = np.arange(length)
            mine = self._bytes[begins[same, None] + places]
            theirs = other._bytes[their_begins[same, None] + places]
            equal[same] = (mine == theirs).all(axis=1)
        return equal

    def __reduce__(self) -> tuple[Any, ...]:
        return KeyList, ({"key_bytes": self._bytes, "key_ends": self._ends, "hashes": self._hashes, "hash_rows": self._rows},)


INDEX = "index.safetensors"
