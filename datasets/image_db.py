"""Region databases for reading: image key -> RegionFeatures. Ours, ours unfinished, the published ones, several as one.

What a reader would get wrong: arrays are views into the mapped file, read-only, and stay valid as long as they live;
bytes that nobody touches (soft labels are 44 % of a record) are never read from the disk.

Published databases (UNITER's) hold more rows than a reader takes: how many are read is decided here (`conf_th, min_bb,
max_bb, num_bb`), by the `nbb_*.json` beside the database where there is one. Ours are read whole.

Source: facts/uniter.md sections 1.2, 1.3 and 8 (rows 16, 17, 18, 20: mended, not copied).
"""

import itertools
import mmap
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

import lmdb
import numpy as np
from numpy.typing import NDArray

from uniter.datasets.array_codec import ArrayPlace, find_arrays, find_layout, guess_layout, npz_rows, pack_arrays, unpack_npz
from uniter.datasets.errors import BadInput, UniterError
from uniter.datasets.index_file import KEY_COLUMNS, KeyList, key_columns, map_arrays
from uniter.datasets.lmdb_pages import Fault, PageFile, check_data_file
from uniter.datasets.lmdb_store import INDEX, read_json, value_places
from uniter.datasets.regions import RegionFeatures

DEFAULT_FIELDS: Final = ("features", "norm_bb")
_VECTORS: Final = ("conf", "object_ids", "object_conf", "attribute_ids", "attribute_conf")
_OPTIONAL: Final = ("boxes", "soft_labels", "attributes", "object_ids", "object_conf", "attribute_ids", "attribute_conf")
ALL_FIELDS: Final = ("features", "norm_bb", "conf", "size", *_OPTIONAL)
_DISK_TYPES: Final = {
    "features": "<f2",
    "norm_bb": "<f2",
    "conf": "<f2",
    "soft_labels": "<f2",
    "boxes": "<f4",
    "size": "<i4",
    "attributes": "<f2",
    "object_ids": "<i4",
    "object_conf": "<f4",
    "attribute_ids": "<i4",
    "attribute_conf": "<f4",
}
_KEYS_ENTRY: Final = b"__keys__"


class MissingImage(UniterError, KeyError):
    """A key that a database does not hold."""

    def __str__(self) -> str:
        return str(self.args[0])


# ------------------------------------------------------------------------------------------------------------------- records


def encode_record(regions: RegionFeatures, *, key: str = "") -> bytes:
    """The value of a region database, types as the contract says; fields that are None are left out.

    Args:
        key: of the image, for messages.

    Raises:
        BadInput: rows or widths that do not fit, or a number that is not finite in its type on disk (float16 ends at 65504).
    """
    regions.check_shapes(key)
    arrays: dict[str, NDArray[Any]] = {}
    for name, spelling in _DISK_TYPES.items():
        value = getattr(regions, name)
        if value is None:
            continue
        with np.errstate(over="ignore"):
            array = np.ascontiguousarray(np.asarray(value), dtype=spelling)
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            was_finite = bool(np.isfinite(np.asarray(value)).all())
            reason = "a number too large for float16" if was_finite else "NaN or infinity"
            raise BadInput(f"image {key!r}: {name} holds {reason}; are these the right weights?")
        arrays[name] = array[:, None] if name == "conf" else array
    return pack_arrays(arrays)


def decode_record(value: bytes | memoryview, *, key: str) -> RegionFeatures:
    """The record behind a value, all fields, arrays as views of `value`. Reads ours and the published ones (npz as well).

    Raises:
        BadInput: the value is damaged or hostile; names `key`.
    """
    try:
        return _decode(value, fields=ALL_FIELDS, rows=None)
    except BadInput as error:
        raise BadInput(f"image {key!r}: {error}") from None


@dataclass(frozen=True, slots=True)
class _Plan:
    """How the wanted fields are taken out of records of one layout.

    Attributes:
        count: rows.
        arrays: (name, shape, type, first byte) of the wanted arrays that are there, in the order asked for; vectors without their
            second dimension.
        size_place: first byte of `size`; None where it is not wanted or not there.
    """

    count: int
    arrays: tuple[tuple[str, tuple[int, ...], "np.dtype[Any]", int], ...]
    size_place: tuple["np.dtype[Any]", int] | None


def _plan(places: Mapping[str, ArrayPlace], fields: Sequence[str]) -> _Plan:
    """Check that the arrays of a record fit together."""
    if "norm_bb" not in places or "features" not in places:
        raise BadInput(f"a record holds {', '.join(sorted(places)) or 'nothing'}; expected at least features and norm_bb")
    shape = places["norm_bb"].shape
    if len(shape) != 2 or shape[1] not in (4, 6):
        raise BadInput(f"norm_bb has shape {shape}, expected (n, 6)")
    count = shape[0]
    arrays = []
    for name in dict.fromkeys((*fields, "features")):
        place = places.get(name)
        if place is None or name == "size" or name not in _DISK_TYPES:
            continue
        shape = place.shape
        if name in _VECTORS and len(shape) == 2 and shape[1] == 1:
            shape = shape[:1]
        if len(shape) != (1 if name in _VECTORS else 2) or shape[0] != count or (name == "boxes" and shape[1] != 4):
            raise BadInput(f"{name} has shape {place.shape} beside {count} rows of norm_bb; was the record cut off?")
        if name in fields:
            arrays.append((name, shape, place.dtype, place.offset))
    size = places.get("size") if "size" in fields else None
    if size is not None and size.shape != (2,):
        raise BadInput(f"size has shape {size.shape}, expected (2,): height, width")
    return _Plan(count, tuple(arrays), None if size is None else (size.dtype, size.offset))


def _plan_of(value: bytes | memoryview, fields: tuple[str, ...]) -> _Plan:
    """The plan for a msgpack value. Only the headers of the wanted arrays are looked at if a known layout fits them: each lies on
    another page of the file.
    """
    guess = guess_layout(value)
    if guess is not None:
        known: tuple[_Plan, list[tuple[int, int, bytes]]] | None = guess.plans.get(fields)
        if known is not None:
            for begin, end, header in known[1]:
                if bytes(value[begin:end]) != header:  # bytes compare faster than views
                    break
            else:
                return known[0]
    layout = find_layout(value)
    plan = _plan(layout.places, fields)
    wanted = [name for name, *_ in plan.arrays] + (["size"] if plan.size_place is not None else [])
    layout.plans[fields] = plan, [layout.headers[name] for name in wanted]
    return plan


def _decode(
    value: bytes | memoryview,
    *,
    fields: tuple[str, ...],
    rows: int | None,
    soft_label_rows: NDArray[Any] | Sequence[int] | None = None,
) -> RegionFeatures:
    """Views of the wanted fields, `norm_bb` and `conf`; `rows` says how many to take (None: all)."""
    fields = (*fields, "norm_bb", "conf")
    if value[:4] == _NPZ_MAGIC:
        whole = unpack_npz(value)
        plan = _plan({name: ArrayPlace(array.dtype, array.shape, 0) for name, array in whole.items()}, fields)
        kept: dict[str, Any] = {name: whole[name].reshape(shape) for name, shape, _, _ in plan.arrays}
        size = whole["size"] if plan.size_place is not None else None
    else:
        plan = _plan_of(value, fields)
        kept = {name: np.ndarray(shape, dtype, value, offset) for name, shape, dtype, offset in plan.arrays}
        size = None if plan.size_place is None else np.frombuffer(value, plan.size_place[0], 2, plan.size_place[1])
    if rows is not None and rows < plan.count:
        kept = {name: array[:rows] for name, array in kept.items()}
    if soft_label_rows is not None and "soft_labels" in kept:
        kept["soft_labels"] = kept["soft_labels"][np.asarray(soft_label_rows)]
    if size is not None:
        kept["size"] = (int(size[0]), int(size[1]))
    if "features" not in kept:
        kept["features"] = np.empty((len(kept["norm_bb"]), 0), dtype=np.float16)
    if "conf" not in kept:
        kept["conf"] = np.zeros(len(kept["norm_bb"]), dtype=np.float16)
    return RegionFeatures(**kept)


_NPZ_MAGIC: Final = b"PK\x03\x04"


def _is_npz(value: bytes | memoryview) -> bool:
    return value[:4] == _NPZ_MAGIC


def _present(record: RegionFeatures, fields: Sequence[str]) -> list[NDArray[Any]]:
    return [array for name in fields if (array := getattr(record, name)) is not None]


def count_boxes(conf: NDArray[Any], *, conf_th: float, min_bb: int, max_bb: int) -> int:
    """UNITER's rule of how many regions of an image are read: those with confidence strictly above `conf_th`, 10..100.

    The lower bound comes first and is not cut to the rows that exist.
    """
    # In the array's own type, as NumPy compares: float16 0.2 is not above 0.2.
    return min(max_bb, max(min_bb, int((conf > conf_th).sum())))


# --------------------------------------------------------------------------------------------------------------------- parts


class _DataFile:
    """A `data.mdb` that nobody writes any more, mapped once in each process; what pickles is its path.

    Values are found by their place in the file, which is checked against its size: damage gives an error, never SIGBUS or
    anything else that LMDB, which believes the file, could do. A fork inherits the mapping; views keep it alive.
    """

    def __init__(self, path: Path, *, readahead: bool) -> None:
        self.path, self._readahead = path, readahead
        self._view: memoryview | None = None

    def value(self, offset: int, size: int) -> memoryview:
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
                    if data.stat().st_size < 2 * 4096:  # killed while LMDB wrote its first two pages
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


class _Live:
    """One LMDB of an unfinished database."""

    header = None

    def __init__(self, store: _LiveStore, counts: Mapping[bytes, int]) -> None:
        self.store, self.path = store, store.path
        self.keys = KeyList(key_columns(list(counts)))
        self.region_counts = np.fromiter(counts.values(), dtype=np.int32, count=len(counts))

    def value(self, key: str) -> bytes | None:
        return self.store.value(key.encode(errors="surrogatepass"))

    def rows_of(self, key: str) -> int | None:
        return None


class _Complete:
    """A complete database of ours, by its index."""

    def __init__(self, path: Path, *, readahead: bool, header: dict[str, Any]) -> None:
        self.path, self.header = path, header
        self.file = _DataFile(path, readahead=readahead)
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
        row = self.keys.find(key)
        return None if row < 0 else self.value_in_row(row)

    def value_in_row(self, row: int) -> memoryview:
        return self.file.value(self._offsets[row], self._sizes[row])

    def rows_of(self, key: str) -> int | None:
        """How many rows of a record are read; None: all."""
        return None

    def __getstate__(self) -> dict[str, Any]:  # each process maps the index itself
        return {"path": self.path, "header": self.header, "file": self.file}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._load()


class _Published:
    """One of UNITER's LMDBs. Keys come from its own pages (`__keys__` may be absent or wrong), counts from JSON and records."""

    header = None

    def __init__(
        self, path: Path, *, readahead: bool, conf_th: float, min_bb: int, max_bb: int, num_bb: int, counts: dict[str, int] | None
    ) -> None:
        self.path = path
        self.file = _DataFile(path, readahead=readahead)
        self._conf_th, self._min_bb, self._max_bb, self._num_bb, self._stated = conf_th, min_bb, max_bb, num_bb, counts
        keys, offsets, sizes = [], [], []
        with PageFile(path / "data.mdb") as pages:
            for found in pages.records(look_at_values=False):
                if isinstance(found, Fault):
                    raise BadInput(f"{path}/data.mdb is damaged: {found.words}; see `uniter-db check`")
                if found.key != _KEYS_ENTRY:
                    keys.append(found.key)
                    offsets.append(found.offset)
                    sizes.append(found.size)
        self.keys = KeyList(key_columns(keys))
        self._offsets, self._sizes = np.array(offsets, dtype=np.int64), np.array(sizes, dtype=np.int64)
        self._counts: NDArray[np.int32] | None = None

    def value(self, key: str) -> memoryview | None:
        row = self.keys.find(key)
        return None if row < 0 else self.value_in_row(row)

    def value_in_row(self, row: int) -> memoryview:
        return self.file.value(int(self._offsets[row]), int(self._sizes[row]))

    @property
    def region_counts(self) -> NDArray[np.int32]:
        """Rows that a read returns, never more than the record has (facts, section 8, row 16)."""
        if self._counts is None:
            self._counts = np.fromiter((self._count(row) for row in range(len(self.keys))), dtype=np.int32, count=len(self.keys))
        return self._counts

    def _count(self, row: int) -> int:
        key = self.keys[row]
        try:
            value = self.value_in_row(row)
            if _is_npz(value):
                stored = npz_rows(value, "norm_bb")
            else:
                place = find_arrays(value).get("norm_bb")
                stored = place.shape[0] if place else None
        except BadInput as error:
            raise BadInput(f"image {key!r} of {self.path}: {error}; see `uniter-db check`") from None
        if stored is None:
            raise BadInput(f"image {key!r} of {self.path} has no norm_bb; is it a region database?")
        return min(self.stated(key), stored)

    def stated(self, key: str) -> int:
        """What UNITER's reader calls the number of boxes of this name: the JSON's, or by the rule, or `num_bb`."""
        if self._conf_th == -1:
            return self._num_bb
        if self._stated is not None and key in self._stated:
            return self._stated[key]
        value = self.value(key)
        if value is None:
            raise MissingImage(f"image {key!r} is not in {self.path}")
        conf = decode_record(value, key=key).conf
        return count_boxes(conf, conf_th=self._conf_th, min_bb=self._min_bb, max_bb=self._max_bb)

    def rows_of(self, key: str) -> int | None:
        """How many rows of a record are read, if it has them."""
        return self.stated(key)


_Part = _Complete | _Live | _Published


# ------------------------------------------------------------------------------------------------------------------- reading


class ImageDB(Mapping[str, RegionFeatures]):
    """Region databases as one mapping from image key to `RegionFeatures`.

    Args:
        path: a region database; a folder of region databases; UNITER's split folder (`…/coco_train2014`, with `feat_th…`
            inside) or one of the LMDBs in it; "gt;det": two paths read as one, the first with all its (ground-truth) rows.
        allow_partial: also read ours that are unfinished: what is committed so far.
        conf_th, min_bb, max_bb, num_bb: which rows of published databases are read; `conf_th=-1` takes the first `num_bb`.
        readahead: False for random reads on a local disk when the database is larger than memory.

    Attributes:
        keys_list: all keys, from the memory-mapped index (no Python object per key).
        region_counts: (len,) int32, the number of regions of each key, same order.
        header: what the database says about itself; None for published ones and for several as one.

    Where several databases hold the same key, the first one answers. Opens lazily in each process: picklable, safe under fork,
    spawn and forkserver.

    Raises:
        BadInput: no database, unfinished, or damaged.
    """

    def __init__(
        self,
        path: str | Path | Sequence[str | Path],
        *,
        allow_partial: bool = False,
        conf_th: float = 0.2,
        min_bb: int = 10,
        max_bb: int = 100,
        num_bb: int = 36,
        readahead: bool = True,
    ) -> None:
        self.path = path
        selection = {"conf_th": conf_th, "min_bb": min_bb, "max_bb": max_bb, "num_bb": num_bb}
        self._parts: list[_Part] = []
        self._detected: list[bool] = []  # of each part, whether it is the second half of a pair
        for one in [path] if isinstance(path, str | Path) else list(path):
            halves = str(one).split(";") if ";" in str(one) and not Path(one).exists() else [str(one)]
            if len(halves) > 2:
                raise BadInput(f"{one!r} names {len(halves)} databases; expected one, or two as 'gt;det'")
            if len(halves) == 2:  # ground truth is read whole, as UNITER does (100 rows at most)
                self._parts += _open_parts(Path(halves[0]), allow_partial, readahead, {**selection, "conf_th": -1, "num_bb": 100})
                self._detected += [False] * (len(self._parts) - len(self._detected))
            self._parts += _open_parts(Path(halves[-1]), allow_partial, readahead, selection)
            self._detected += [len(halves) == 2] * (len(self._parts) - len(self._detected))
        self._finish_opening()

    def _finish_opening(self) -> None:
        self._starts = np.cumsum([0, *(len(part.keys) for part in self._parts)])
        self.header: Mapping[str, Any] | None = self._parts[0].header if len(self._parts) == 1 else None
        self.keys_list: Sequence[str] = self._parts[0].keys if len(self._parts) == 1 else _Chained([part.keys for part in self._parts])
        self._counts: NDArray[np.int32] | None = None
        self._widths: dict[str, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_parts": self._parts, "_detected": self._detected}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._finish_opening()

    # -- what is in it ----------------------------------------------------------------------------------------------------

    @property
    def region_counts(self) -> NDArray[np.int32]:
        """(len,) int32, the number of regions that `read` returns for each of `keys_list`."""
        if len(self._parts) == 1:
            return self._parts[0].region_counts
        if self._counts is None:
            self._counts = np.concatenate([np.zeros(0, np.int32), *(part.region_counts for part in self._parts)])
        return self._counts

    @property
    def headers(self) -> list[Mapping[str, Any] | None]:
        """The header of each of the databases that are read as one."""
        return [part.header for part in self._parts]

    @property
    def folders(self) -> list[Path]:
        """Where each of these databases lies."""
        return [part.path for part in self._parts]

    @property
    def feature_width(self) -> int:
        """Columns of `features`; 0 in an empty database."""
        return self._stated_width("feature_width", lambda first: first.features.shape[1])

    @property
    def label_classes(self) -> int:
        """Columns of `soft_labels`, background included; 0 where there are none."""
        return self._stated_width("label_classes", lambda first: 0 if first.soft_labels is None else first.soft_labels.shape[1])

    def _stated_width(self, name: str, of_record: Any) -> int:
        if len(self._parts) and self._parts[0].header is not None and name in self._parts[0].header:
            return int(self._parts[0].header[name])
        if name not in self._widths and len(self):
            self._widths[name] = int(of_record(self[self.keys_list[0]]))
        return self._widths.get(name, 0)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the detector's classes without background, so label column k + 1 is `class_names[k]`; None where unknown."""
        return self._names("class_names")

    @property
    def attribute_names(self) -> tuple[str, ...] | None:
        """Names of the attributes without "no attribute"; None where unknown."""
        return self._names("attribute_names")

    def _names(self, field: str) -> tuple[str, ...] | None:
        for part in self._parts:
            if part.header is not None and part.header.get(field):
                return tuple(part.header[field])
        return None

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys_list)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and any(part.keys.find(key) >= 0 for part in self._parts)

    @property
    def has_pairs(self) -> bool:
        """Whether it was opened as "gt;det"."""
        return any(self._detected)

    def index_of(self, key: str, *, detected: bool = False) -> int:
        """The place of a key in `keys_list`.

        Args:
            detected: of "gt;det", look in the second half first, where both halves may hold the key.

        Raises:
            MissingImage: it is not there.
        """
        order: Iterable[int] = range(len(self._parts))
        for which in sorted(order, key=lambda which: not self._detected[which]) if detected else order:
            start, part = self._starts[which], self._parts[which]
            row = part.keys.find(key)
            if row >= 0:
                return int(start) + row
        raise MissingImage(f"image {key!r} is not in {self._name()}; was it extracted, and under this key?")

    def nbb_of_name(self, key: str) -> int:
        """The number of boxes that UNITER's own reader states for this name, which can exceed the rows that exist."""
        for part in self._parts:
            row = part.keys.find(key)
            if row >= 0:
                return part.stated(key) if isinstance(part, _Published) else int(part.region_counts[row])
        raise MissingImage(f"image {key!r} is not in {self._name()}")

    def _name(self) -> str:
        return ", ".join(str(part.path) for part in self._parts[:3]) + (" ..." if len(self._parts) > 3 else "")

    # -- records ----------------------------------------------------------------------------------------------------------

    def __getitem__(self, key: str) -> RegionFeatures:
        return self.read(key, fields=ALL_FIELDS)

    def read(
        self,
        key: str,
        *,
        fields: Sequence[str] = DEFAULT_FIELDS,
        soft_label_rows: NDArray[Any] | Sequence[int] | None = None,
    ) -> RegionFeatures:
        """One image's regions with the wanted fields only; arrays are read-only views of the mapped file where possible.

        Args:
            fields: names of `RegionFeatures` fields. `norm_bb` and `conf` always come; `features` not asked for are (N, 0).
            soft_label_rows: which rows of `soft_labels` are wanted, (M,) numbers or (N,) bool; `soft_labels` is then (M, C), a copy.

        Raises:
            MissingImage: no such key.
            BadInput: the record is damaged.
        """
        # A live part a second time: a unit may have moved into data.mdb between our two looks.
        for part in (*self._parts, *(part for part in self._parts if isinstance(part, _Live))):
            found = self._read_from(part, key, fields, soft_label_rows)
            if found is not None:
                return found
        raise MissingImage(f"image {key!r} is not in {self._name()}; was it extracted, and under this key?")

    def _read_from(
        self, part: _Part, key: str, fields: Sequence[str], soft_label_rows: NDArray[Any] | Sequence[int] | None = None
    ) -> RegionFeatures | None:
        try:
            value = part.value(key)
            if value is None:
                return None
            return _decode(value, fields=tuple(fields), rows=part.rows_of(key), soft_label_rows=soft_label_rows)
        except BadInput as error:
            raise BadInput(f"{part.path}, image {key!r}: {error}; see `uniter-db check`") from None

    def read_row(self, row: int, *, fields: Sequence[str] = DEFAULT_FIELDS) -> RegionFeatures:
        """`read` of the image in that row of `keys_list`, without looking its key up."""
        part, place = self._part_of(row)
        if not isinstance(part, _Complete):
            key = self.keys_list[row]
            found = self._read_from(part, key, fields)
            return self.read(key, fields=fields) if found is None else found
        try:
            return _decode(part.value_in_row(place), fields=tuple(fields), rows=None)
        except BadInput as error:
            raise BadInput(f"{part.path}, image {self.keys_list[row]!r}: {error}; see `uniter-db check`") from None

    def read_arrays(self, row: int, fields: tuple[str, ...] = DEFAULT_FIELDS) -> list[NDArray[Any]]:
        """Arrays of the image in that row of `keys_list` and nothing else: what makes batches wants neither confidence nor a record.

        Args:
            fields: names of `RegionFeatures` fields, not `size`.

        Returns:
            One array for each of `fields` that the record has, in their order: read-only views of the mapped file where possible.

        Raises:
            BadInput: the record is damaged.
        """
        part, place = self._part_of(row)
        if isinstance(part, _Live):
            return _present(self.read(self.keys_list[row], fields=fields), fields)
        try:
            value = part.value_in_row(place)
            count = int(part.region_counts[place]) if isinstance(part, _Published) else None
            if count is not None and _is_npz(value):
                return _present(_decode(value, fields=fields, rows=count), fields)
            arrays = [np.ndarray(shape, dtype, value, offset) for _, shape, dtype, offset in _plan_of(value, fields).arrays]
            return arrays if count is None else [array[:count] for array in arrays]
        except BadInput as error:
            raise BadInput(f"{part.path}, image {self.keys_list[row]!r}: {error}; see `uniter-db check`") from None

    def _part_of(self, row: int) -> tuple[_Part, int]:
        """The database that holds the image in that row of `keys_list`, and the row there."""
        if len(self._parts) == 1:
            return self._parts[0], row
        which = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._parts[which], row - int(self._starts[which])

    def raw_record(self, key: str) -> bytes | None:
        """A record's bytes as stored; None where it lies in a published database, whose records are read in part.

        Raises:
            MissingImage: no such key.
        """
        for part in self._parts:
            value = part.value(key)
            if value is not None:
                return None if isinstance(part, _Published) else bytes(value)
        raise MissingImage(f"image {key!r} is not in {self._name()}")


class _Chained(Sequence[str]):
    """Several key lists end to end."""

    def __init__(self, lists: Sequence[KeyList]) -> None:
        self._lists = lists
        self._ends = np.cumsum([len(one) for one in lists])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[index] for index in range(*row.indices(len(self)))]
        if not -len(self) <= row < len(self):
            raise IndexError(row)
        row %= len(self)
        which = int(np.searchsorted(self._ends, row, side="right"))
        return self._lists[which][row - (int(self._ends[which - 1]) if which else 0)]

    def __iter__(self) -> Iterator[str]:
        for one in self._lists:
            yield from one


def open_image_dbs(paths: Sequence[str | Path], **selection: Any) -> ImageDB:
    """Several region databases (each anything that `ImageDB` reads) as one; the arguments are `ImageDB`'s.

    Raises:
        BadInput: none is named, or two say that they were made with different detectors: other widths, or other classes.
    """
    if not paths:
        raise BadInput("no region database was named; pass --images")
    together = ImageDB(list(paths), **selection)
    stated: dict[str, tuple[Any, Path]] = {}
    for header, path in zip(together.headers, together.folders, strict=True):
        for name, what in (
            ("feature_width", "features {} wide"),
            ("label_classes", "{} detector classes"),
            ("class_names", "other classes"),
        ):
            # Empty databases and those without soft labels or names fit any.
            if header is None or not (value := header.get(name)):
                continue
            first, where = stated.setdefault(name, (value, path))
            if value != first:
                mine, theirs = (what.format(number) for number in (value, first))
                raise BadInput(f"{path} has {mine}, {where} has {theirs}: they cannot be read as one; extract all with one detector")
    return together


def match_image_key(databases: ImageDB | Sequence[ImageDB], name: str) -> tuple[str, str] | None:
    """Find the key under which a database keeps an image that other files call `name`.

    Returns:
        The database's own key and the rule that found it: "exact", "name", "path" (without suffix), "stem" or "npz";
        None if no rule does.
    """
    together = [databases] if isinstance(databases, ImageDB) else databases
    path = PurePosixPath(name)
    candidates = {"exact": [name], "name": [path.name], "path": [str(path.with_suffix("")) if path.suffix else name], "stem": [path.stem]}
    candidates["npz"] = [f"{candidate}.npz" for candidate in (name, candidates["path"][0], path.name, path.stem)]
    for rule, keys in candidates.items():
        for key in keys:
            if any(key in database for database in together):
                return key, rule
    return None


# ------------------------------------------------------------------------------------------------------------------- opening


def kind_of(path: Path) -> str:
    """What a folder is: "complete" or "unfinished" (ours), "published" (an LMDB made elsewhere), "split" (UNITER's folder of
    LMDBs), "folder" (of databases), "none".
    """
    if (path / "header.json").exists():
        return "complete"
    if (path / "settings.json").exists():
        return "unfinished"
    if (path / "data.mdb").exists():
        return "published"
    children = sorted(child for child in path.iterdir() if (child / "data.mdb").exists()) if path.is_dir() else []
    if any(_VARIANT.fullmatch(child.name) for child in children):
        return "split"
    inner = [child for child in path.iterdir() if kind_of_child(child)] if path.is_dir() else []
    return "folder" if inner else "none"


def kind_of_child(path: Path) -> bool:
    """Whether a folder is itself a database (of ours or published)."""
    return path.is_dir() and any((path / name).exists() for name in ("header.json", "settings.json", "data.mdb"))


_VARIANT = re.compile(
    r"(?:feat_th(?P<conf_th>-?[0-9.]+)_max(?P<max_bb>\d+)_min(?P<min_bb>\d+)|feat_numbb(?P<num_bb>\d+)|all)(?P<compressed>_compressed)?"
)


def _open_parts(path: Path, allow_partial: bool, readahead: bool, selection: dict[str, Any]) -> list[_Part]:
    kind = kind_of(path)
    if kind == "complete":
        return [_open_complete(path, readahead=readahead)]
    if kind == "unfinished":
        if not allow_partial:
            raise BadInput(f"{path} is unfinished (no header.json): run its command again to finish it, or pass --allow-partial")
        return list(_open_unfinished(path))
    if kind == "published":
        return [_open_published(path, readahead, _rule_of_name(path.name, selection))]
    if kind == "split":
        return [_open_published(_variant(path, selection), readahead, selection)]
    if kind == "folder":
        parts: list[_Part] = []
        for child in sorted(path.iterdir()):
            if kind_of_child(child):
                parts += _open_parts(child, allow_partial, readahead, selection)
        return parts
    raise BadInput(f"{path} is no region database; expected a folder with data.mdb (from uniter-extract, uniter-db convert or UNITER)")


def _open_complete(path: Path, *, readahead: bool) -> _Complete:
    header = read_json(path / "header.json")
    if not isinstance(header, dict) or header.get("kind", "regions") != "regions":
        raise BadInput(f"{path} is a {header.get('kind') if isinstance(header, dict) else 'damaged'} database, expected a region database")
    if header.get("format_version") != 1:
        raise BadInput(f"{path} has format version {header.get('format_version')}, expected 1; update the toolkit")
    if not (path / INDEX).exists():
        raise BadInput(f"{path} has no {INDEX}; write a whole one with `uniter-db check --repair OUT`")
    return _Complete(path, readahead=readahead, header=header)


def _open_unfinished(path: Path) -> Iterator[_Live]:
    """What is committed so far: `data.mdb`, then the units that are not in it yet, finished or not."""
    units = sorted((path / "units").glob("[0-9]*")) if (path / "units").is_dir() else []
    seen: set[bytes] = set()
    for store in [_LiveStore(path, table=None), *(_LiveStore(unit, table=b"records") for unit in units)]:
        counts = {key: count for key, count in store.counts().items() if key not in seen}
        seen |= counts.keys()
        yield _Live(store, counts)


def _rule_of_name(name: str, selection: dict[str, Any]) -> dict[str, Any]:
    """The selection that the name of a published LMDB states; its own where the name says nothing."""
    match = _VARIANT.fullmatch(name)
    if match is None or (match["conf_th"] is None and match["num_bb"] is None):
        return selection
    if match["num_bb"] is not None:
        return {**selection, "conf_th": -1, "num_bb": int(match["num_bb"])}
    if selection["conf_th"] == -1:
        return selection
    return {**selection, "conf_th": float(match["conf_th"]), "max_bb": int(match["max_bb"]), "min_bb": int(match["min_bb"])}


def _threshold_name(selection: Mapping[str, Any]) -> str:
    return f"th{selection['conf_th']}_max{selection['max_bb']}_min{selection['min_bb']}"


def _variant(path: Path, selection: dict[str, Any]) -> Path:
    """Which LMDB inside UNITER's split folder serves this selection."""
    exact = f"feat_numbb{selection['num_bb']}" if selection["conf_th"] == -1 else f"feat_{_threshold_name(selection)}"
    for name in (exact, f"{exact}_compressed", "all", "all_compressed"):
        if (path / name / "data.mdb").exists():
            return path / name
    there = ", ".join(sorted(child.name for child in path.iterdir() if (child / "data.mdb").exists()))
    raise BadInput(f"{path} holds {there}, none of which is {exact} or all; choose --conf-threshold, --max-boxes and the like to fit")


def _open_published(path: Path, readahead: bool, selection: dict[str, Any]) -> _Published:
    counts = None
    name = path.name
    if not name.startswith("all") and selection["conf_th"] != -1:
        beside = path.parent / f"nbb_{_threshold_name(selection)}.json"
        if beside.exists():
            counts = read_json(beside)
            if not isinstance(counts, dict) or not all(type(number) is int and number >= 0 for number in counts.values()):
                raise BadInput(f"{beside} is no object of numbers; remove it, the numbers are then counted from the records")
    return _Published(path, readahead=readahead, counts=counts, **selection)
