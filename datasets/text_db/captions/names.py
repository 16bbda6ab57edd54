"""Many ids, each with a name, in little memory: 3 million images cost some 150 MB, where a dict would take a gigabyte."""

from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uniter.datasets.errors import BadInput, shown
from uniter.datasets.storage.index_file import hash_key


def id_number(value: Any) -> int:
    """A 64-bit number for an id: integers (also as strings of digits) are themselves, other strings their hash."""
    if type(value) is int and -(2**63) <= value < 2**63:  # nearly all are
        return value
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 18:
        value = int(value)
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return int(value)
    return hash_key(str(value).encode("utf-8", "surrogatepass")) - 2**63


class NameTable:
    """Id -> name. Fill it with `add`, then ask with `find`; adding after asking is not possible.

    Ours rather than `pyarrow.compute.index_in`, which hashes all ids anew for each batch that asks: 0.5 s against 8 ms of a million.

    Args:
        what: what the ids are of, for the error ("image").
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._ids, self._ends, self._names = array("q"), array("q"), bytearray()
        self._sorted: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, value: Any, name: str) -> None:
        """Remember that an id (a number, or its digits) goes by a name."""
        self._ids.append(id_number(value))
        self._names += name.encode("utf-8", "replace")
        self._ends.append(len(self._names))

    def find(self, values: Sequence[Any]) -> list[str | None]:
        """The names of these ids, None for those that are not there.

        Raises:
            BadInput: an id was added twice with different names.
        """
        if self._sorted is None:
            self._sort()
        assert self._sorted is not None
        if not len(self._sorted):
            return [None] * len(values)
        wanted = np.fromiter(map(id_number, values), np.int64, len(values))
        places = np.minimum(np.searchsorted(self._sorted, wanted), len(self._sorted) - 1)
        rows = self._order[places]
        there = self._sorted[places] == wanted
        self._asked[rows[there]] = True
        ends = np.frombuffer(self._ends, np.int64)
        starts = np.where(rows > 0, ends[np.maximum(rows, 1) - 1], 0)
        names = self._names
        bounds = zip(starts.tolist(), ends[rows].tolist(), there.tolist(), strict=True)
        return [names[start:end].decode() if known else None for start, end, known in bounds]

    def never_asked(self) -> int:
        """How many of the ids `find` was never asked for."""
        if self._sorted is None:
            self._sort()
        return int(len(self._ids) - self._asked.sum())

    def _name(self, row: int) -> str:
        start = self._ends[row - 1] if row else 0
        return self._names[start : self._ends[row]].decode()

    def _sort(self) -> None:
        ids = np.frombuffer(self._ids, np.int64) if len(self._ids) else np.zeros(0, np.int64)
        order = np.argsort(ids, kind="stable").astype(np.int32)
        ordered = ids[order]
        again = np.flatnonzero(ordered[1:] == ordered[:-1])
        for place in again.tolist():
            first, second = self._name(int(order[place])), self._name(int(order[place + 1]))
            if first != second:
                raise BadInput(
                    f"{self._what} {int(ordered[place])} is listed twice, as {shown(first)} and as {shown(second)}; expected one name"
                )
        keep = np.ones(len(ids), bool)
        keep[again + 1] = False
        self._sorted, self._order = ordered[keep], order[keep]
        self._asked = np.zeros(len(ids), bool)
        self._asked[order[~keep]] = True  # the same line twice is one image
