"""What the photographs were that regions were extracted from: how long, and their SHA-256, taken when they were read.

    DB/photographs.safetensors   digests (N,) uint64 of the keys, sorted; bytes (N,) int64; sha256 (N, 32) uint8

What a reader would get wrong: it lies beside what a database holds and is no part of it. A database that does not know its photographs,
because an older version made it or because it was converted from elsewhere, is the same database.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from uniter.datasets.errors import BadInput
from uniter.datasets.storage.index_file import hash_key, load_arrays, map_arrays, save_arrays

PHOTOGRAPHS: Final = "photographs.safetensors"
UNKNOWN: Final = -1
DIGEST_BYTES: Final = 32

_LENGTHS, _SUMS = "photograph_bytes", "photograph_sha256"  # in the index of a unit


@dataclass(frozen=True, slots=True)
class Photograph:
    """What a photograph was when it was read.

    Attributes:
        length: its bytes, or that of the table that held it; -1 where it is not known.
        sha256: the digest of its bytes; empty where it is not known.
    """

    length: int = UNKNOWN
    sha256: bytes = b""

    def __bool__(self) -> bool:
        return self.length != UNKNOWN or bool(self.sha256)


NOT_KNOWN: Final = Photograph()


def columns_of(photographs: Sequence[Photograph]) -> dict[str, NDArray[Any]]:
    """The columns of a unit's index that say it; none where nothing is known of any."""
    if not any(photographs):
        return {}
    sums = b"".join(one.sha256 or bytes(DIGEST_BYTES) for one in photographs)
    lengths = np.array([one.length for one in photographs], dtype=np.int64)
    return {_LENGTHS: lengths, _SUMS: np.frombuffer(sums, dtype=np.uint8).reshape(-1, DIGEST_BYTES)}


def photographs_in(columns: Mapping[str, NDArray[Any]], count: int) -> list[Photograph]:
    """The inverse of `columns_of`, from the index of a unit of so many records."""
    if _LENGTHS not in columns:
        return [NOT_KNOWN] * count
    return [Photograph(length, _sha256(row)) for length, row in zip(columns[_LENGTHS].tolist(), columns[_SUMS], strict=True)]


def _sha256(row: NDArray[Any]) -> bytes:
    return row.tobytes() if row.any() else b""


class NotedPhotographs:
    """What databases know of their photographs, by key; of an image that is in several, the first that knows.

    Args:
        folders: the databases.

    Raises:
        BadInput: a file is damaged.
    """

    def __init__(self, folders: Iterable[Path]) -> None:
        self._files = [_read(folder) for folder in folders]

    def __len__(self) -> int:
        return sum(len(digests) for digests, _, _ in self._files)

    def of(self, key: str) -> Photograph:
        """What is known of the photograph of an image."""
        digest = np.uint64(hash_key(key.encode(errors="surrogatepass")))
        for digests, lengths, sums in self._files:
            row = int(np.searchsorted(digests, digest))
            if row < len(digests) and digests[row] == digest:
                return Photograph(int(lengths[row]), _sha256(sums[row]))
        return NOT_KNOWN

    def lengths_of(self, digests: NDArray[np.uint64]) -> NDArray[np.int64]:
        """(len(digests),) the lengths in bytes of the photographs of some digests of keys, -1 where they are not known."""
        found = np.full(len(digests), UNKNOWN, dtype=np.int64)
        for ordered, lengths, _ in reversed(self._files):
            if len(ordered):
                places = np.minimum(np.searchsorted(ordered, digests), len(ordered) - 1)
                there = ordered[places] == digests
                found[there] = lengths[places[there]]
        return found


_COLUMNS: Final = ("digests", "bytes", "sha256")
_Columns = tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.uint8]]


def _read(folder: Path, *, copied: bool = False) -> _Columns:
    if not (folder / PHOTOGRAPHS).is_file():
        return np.zeros(0, np.uint64), np.zeros(0, np.int64), np.zeros((0, DIGEST_BYTES), np.uint8)
    file, needed = folder / PHOTOGRAPHS, ("digests", "bytes")
    columns = load_arrays(file, needed=needed) if copied else map_arrays(file, needed=needed)
    digests, lengths = columns["digests"], columns["bytes"]
    if len(digests) != len(lengths):
        raise BadInput(f"{folder / PHOTOGRAPHS} has columns of different lengths; remove it if what the photographs were is not needed")
    sums = columns.get("sha256")  # an older version knew the lengths alone
    if sums is None or sums.shape != (len(digests), DIGEST_BYTES):
        sums = np.broadcast_to(np.zeros(DIGEST_BYTES, np.uint8), (len(digests), DIGEST_BYTES))
    return digests, lengths, sums


def note_photographs(
    folder: Path, digests: NDArray[np.uint64], columns: Sequence[Mapping[str, NDArray[Any]]], counts: Sequence[int]
) -> None:
    """Write what units know of their photographs; what was noted of other images stays.

    Args:
        folder: the database.
        digests: of the keys of all units, end to end.
        columns: of the index of each unit.
        counts: how many records each has.
    """
    if not any(_LENGTHS in one for one in columns):
        return
    lengths = [one.get(_LENGTHS, np.full(count, UNKNOWN, np.int64)) for one, count in zip(columns, counts, strict=True)]
    sums = [one.get(_SUMS, np.zeros((count, DIGEST_BYTES), np.uint8)) for one, count in zip(columns, counts, strict=True)]
    news: _Columns = (digests, np.concatenate(lengths), np.concatenate(sums))
    known = (news[1] != UNKNOWN) | news[2].any(axis=1)
    news = (digests[known], news[1][known], news[2][known])
    before = _read(folder, copied=True)
    others = ~np.isin(before[0], news[0])
    pairs: Iterable[tuple[NDArray[Any], NDArray[Any]]] = zip(before, news, strict=True)
    together = [np.concatenate([old[others], new]) for old, new in pairs]
    order = np.argsort(together[0], kind="stable")
    save_arrays(folder / PHOTOGRAPHS, {name: column[order] for name, column in zip(_COLUMNS, together, strict=True)})
