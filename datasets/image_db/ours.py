"""Our own region database on disk: complete, or unfinished (units still apart)."""

import itertools
import mmap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
from numpy.typing import NDArray

from uniter.datasets.errors import BadInput
from uniter.datasets.storage.array_codec import find_arrays
from uniter.datasets.storage.files import read_json
from uniter.datasets.storage.index_file import INDEX, KEY_COLUMNS, KeyList, key_columns, map_arrays
from uniter.datasets.storage.lmdb_pages import Fault, PageFile, check_data_file, is_empty_file

# --------------------------------------------------------------------------------------------------------------------- parts


class DataFile:
    """A `data.mdb` that nobody writes any more, mapped once in each process; what pickles is its path.

    Values are found by their place in the file, which is checked against its size: damage gives an error, never SIGBUS or
    anything else that LMDB, which believes the file, could do. A fork inherits the mapping; views keep it alive.
    """

    def __init__(self, path: Path, *, readahead: bool) -> None:
        self.path, self._readahead = path, readahead
        self._view: memoryview | None = None

    def value(self, offset: int, size: int) -> memoryview:
        """`size` bytes from `offset` of the file on, mapped and not copied.

        Raises:
            BadInput: they are not within the file.
        """
        view = self._view
        if view is None:
            view = self._open()
        if not 0 < offset <= offset + size <= len(view):
            raise BadInput("its place lies outside the file; the index or the file is damaged")
        return view[offset : offset + size]

    def _open(self) -> memoryview:
        check_data_file(self.path / "data.mdb")
        with open(self.path / "data.mdb", "rb") as file:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if not self._readahead:
            mapping.madvise(mmap.MADV_RANDOM)
        self._view = memoryview(mapping)
        return self._view

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_view": None}


class _LiveStore:
    """An LMDB that another process may be writing: opened with its locks for each read, values copied."""

    def __init__(self, path: Path, *, table: bytes | None) -> None:
        self.path, self._table = path, table

    def _open(self) -> Any:
        for path in (self.path, self.path.with_suffix("")):  # a unit that has been finished lost its ".partial"
            data = path / "data.mdb"
            if data.exists():
                try:
                    if is_empty_file(data):
                        return None
                    check_data_file(data)
                    # Without a lock file nobody is writing there. To make one would take room, of a disk that may be full.
                    locked = (path / "lock.mdb").exists()
                    return lmdb.open(str(path), readonly=True, create=False, lock=locked, max_dbs=3, max_spare_txns=0)
                except (lmdb.Error, BadInput, FileNotFoundError) as error:
                    if data.exists():
                        raise BadInput(f"{path}/data.mdb cannot be opened: {error}") from None
        return None

    def _read(self, work: Any) -> Any:
        while (environment := self._open()) is not None:
            try:
                with environment.begin(buffers=True) as transaction:
                    table = environment.open_db(self._table, txn=transaction, create=False) if self._table else None
                    return work(transaction, table)
            except lmdb.NotFoundError:
                return None  # nothing was committed yet
            except lmdb.MapResizedError:  # the writer's map has just grown
                continue
            finally:
                environment.close()
        return None

    def value(self, key: bytes) -> bytes | None:
        def get(transaction: Any, table: Any) -> bytes | None:
            value = transaction.get(key, db=table) if table is not None else transaction.get(key)
            return None if value is None else bytes(value)

        found: bytes | None = self._read(get)
        return found

    def counts(self) -> dict[bytes, int]:
        """Every key with its number of regions."""

        def scan(transaction: Any, table: Any) -> dict[bytes, int]:
            counts = {}
            for key, value in transaction.cursor(table) if table is not None else transaction.cursor():
                place = find_arrays(value).get("norm_bb")
                counts[bytes(key)] = place.shape[0] if place else 0
            return counts

        return self._read(scan) or {}


class Live:
    """One LMDB of an unfinished database."""

    header = None

    def __init__(self, store: _LiveStore, counts: Mapping[bytes, int]) -> None:
        self.store, self.path = store, store.path
        self.keys = KeyList(key_columns(list(counts)))
        self.region_counts = np.fromiter(counts.values(), dtype=np.int32, count=len(counts))

    def value(self, key: str) -> bytes | None:
        """The packed record of a key, None where there is none yet."""
        return self.store.value(key.encode(errors="surrogatepass"))

    def rows_of(self, key: str) -> int | None:
        """None: an unfinished database has no rows."""
        return None


class Complete:
    """A complete database of ours, by its index."""

    def __init__(self, path: Path, *, readahead: bool, header: dict[str, Any]) -> None:
        self.path, self.header = path, header
        self.file = DataFile(path, readahead=readahead)
        self._load()

    def _load(self) -> None:
        columns = map_arrays(self.path / INDEX, needed=(*KEY_COLUMNS, "region_counts"))
        with PageFile(self.path / "data.mdb") as pages:
            current = {"data_file", "offsets", "sizes"} <= columns.keys() and columns["data_file"].tolist() == list(pages.identity)
            if current:  # and the first places, too: a copy could have the same identity by chance
                first = list(itertools.islice(pages.records(look_at_values=False), 8))
                stated = columns["offsets"][: len(first)].tolist()
                current = all(isinstance(found, Fault) or found.offset == place for found, place in zip(first, stated, strict=False))
        self.keys = KeyList(columns)
        if not current:  # the file was rewritten since, e.g. by `mdb_copy -c`: the places are looked up anew
            columns = {**columns, **value_places(self.path / "data.mdb", [self.keys.raw(row) for row in range(len(self.keys))])}
        self.region_counts: NDArray[np.int32] = columns["region_counts"]
        self._offsets, self._sizes = columns["offsets"].data, columns["sizes"].data
        if not len(self.keys) == len(self.region_counts) == len(self._offsets) == len(self._sizes):
            raise BadInput(f"{self.path / INDEX} has columns of different lengths; run `uniter-db check --repair OUT` on the database")

    def value(self, key: str) -> memoryview | None:
        """The packed record of a key, None where there is none; valid while the database is open."""
        row = self.keys.find(key)
        return None if row < 0 else self.value_in_row(row)

    def value_in_row(self, row: int) -> memoryview:
        """The packed record of a row of the index."""
        return self.file.value(self._offsets[row], self._sizes[row])

    def rows_of(self, key: str) -> int | None:
        """How many rows of a record are read; None: all."""
        return None

    def __getstate__(self) -> dict[str, Any]:  # each process maps the index itself
        return {"path": self.path, "header": self.header, "file": self.file}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._load()


def open_complete(path: Path, *, readahead: bool) -> Complete:
    """Open a finished database of ours by its index.

    Raises:
        BadInput: it is of another kind or version, or its files do not belong together.
    """
    header = read_json(path / "header.json")
    if not isinstance(header, dict) or header.get("kind", "regions") != "regions":
        raise BadInput(f"{path} is a {header.get('kind') if isinstance(header, dict) else 'damaged'} database, expected a region database")
    if header.get("format_version") != 1:
        raise BadInput(f"{path} has format version {header.get('format_version')}, expected 1; update the toolkit")
    if not (path / INDEX).exists():
        raise BadInput(f"{path} has no {INDEX}; write a whole one with `uniter-db check --repair OUT`")
    return Complete(path, readahead=readahead, header=header)


def open_unfinished(path: Path) -> Iterator[Live]:
    """What is committed so far: `data.mdb`, then the units that are not in it yet, finished or not."""
    units = sorted((path / "units").glob("[0-9]*")) if (path / "units").is_dir() else []
    seen: set[bytes] = set()
    for store in [_LiveStore(path, table=None), *(_LiveStore(unit, table=b"records") for unit in units)]:
        counts = {key: count for key, count in store.counts().items() if key not in seen}
        seen |= counts.keys()
        yield Live(store, counts)


def value_places(data: Path, keys: Sequence[bytes]) -> dict[str, NDArray[Any]]:
    """Where the value of each key lies in a `data.mdb`: the index columns `offsets`, `sizes`, and `data_file`, by which a
    reader sees whether they still hold (`PageFile.identity`).

    Args:
        keys: all of the file, in order.
    """
    with PageFile(data) as pages:
        offsets, sizes = np.zeros(len(keys), dtype=np.int64), np.zeros(len(keys), dtype=np.int64)
        row = -1
        for row, found in enumerate(pages.records()):
            if isinstance(found, Fault):
                raise BadInput(f"{data}: {found.words}; is the disk broken?")
            if row >= len(keys) or found.key != keys[row]:
                raise BadInput(f"{data}: key {found.key[:80]!r} is stored but was not written; was the file replaced?")
            offsets[row], sizes[row] = found.offset, found.size
        if row + 1 != len(keys):
            raise BadInput(f"{data} holds {row + 1} records, expected {len(keys)}; was the file replaced?")
        return {"offsets": offsets, "sizes": sizes, "data_file": np.array(pages.identity, dtype=np.int64)}
