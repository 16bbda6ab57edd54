"""Many short byte strings end to end: a million names at what their letters take, without a Python object each."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Self, overload

import numpy as np
from numpy.typing import NDArray

_AT_ONCE = 1 << 16


class Packed(Sequence[bytes]):
    """Byte strings in order.

    Args:
        parts: the strings.
    """

    def __init__(self, parts: Iterable[bytes] = ()) -> None:
        text, lengths = bytearray(), []
        remaining = iter(parts)
        while chunk := list(islice(remaining, _AT_ONCE)):
            text += b"".join(chunk)
            lengths.append(np.fromiter(map(len, chunk), dtype=np.uint32, count=len(chunk)))
        ends = np.cumsum(np.concatenate([np.zeros(0, np.uint32), *lengths]), dtype=np.int64 if len(text) >> 32 else np.uint32)
        self._text: bytearray = text
        self._ends: NDArray[Any] = ends

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The letters and where each string ends, to be kept in a file."""
        return {"bytes": np.frombuffer(bytes(self._text), dtype=np.uint8), "ends": self._ends.astype(np.int64)}

    @classmethod
    def of_arrays(cls, letters: NDArray[np.uint8], ends: NDArray[np.int64]) -> Self:
        """What `arrays` gave.

        Raises:
            ValueError: they do not fit together.
        """
        made = cls()
        if ends.size and (ends[0] < 0 or (np.diff(ends) < 0).any() or ends[-1] != len(letters)):
            raise ValueError("the ends do not fit the letters")
        made._text, made._ends = bytearray(letters.tobytes()), ends
        return made

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, row: int) -> bytes: ...
    @overload
    def __getitem__(self, row: slice) -> list[bytes]: ...
    def __getitem__(self, row: int | slice) -> bytes | list[bytes]:
        if isinstance(row, slice):
            begin, end, step = row.indices(len(self))
            if step != 1:
                return [self[number] for number in range(begin, end, step)]
            ends = [int(self._ends[begin - 1]) if begin else 0, *self._ends[begin:end].tolist()]
            return [bytes(self._text[start:stop]) for start, stop in itertools.pairwise(ends)]
        if not -len(self) <= row < len(self):
            raise IndexError(row)
        row %= len(self)
        return bytes(self._text[int(self._ends[row - 1]) if row else 0 : int(self._ends[row])])

    def __iter__(self) -> Iterator[bytes]:
        begin = 0
        for start in range(0, len(self), _AT_ONCE):
            for end in self._ends[start : start + _AT_ONCE].tolist():
                yield bytes(self._text[begin:end])
                begin = end


def sorted_names(names: Iterable[bytes]) -> Iterator[bytes]:
    """File names (no byte of theirs is 0) in the order of their bytes, which for UTF-8 is that of their letters."""
    remaining = iter(names)
    blocks: list[NDArray[np.bytes_]] = []
    while chunk := list(islice(remaining, _AT_ONCE)):
        blocks.append(np.array(chunk, dtype=np.bytes_))
    if not blocks:
        return
    widest, count = max(block.dtype.itemsize for block in blocks), sum(map(len, blocks))
    together = np.empty(count, dtype=f"S{widest}")
    begin = 0
    while blocks:
        block = blocks.pop()
        together[begin : begin + len(block)] = block
        begin += len(block)
    together.sort()
    for start in range(0, count, _AT_ONCE):
        yield from together[start : start + _AT_ONCE].tolist()
