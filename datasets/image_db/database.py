"""Region databases for reading: image key -> RegionFeatures. Ours, ours unfinished, the published ones, several as one.

What a reader would get wrong: arrays are views into the mapped file, read-only, and stay valid as long as they live;
bytes that nobody touches (soft labels are 44 % of a record) are never read from the disk.

Published databases (UNITER's) hold more rows than a reader takes: how many are read is decided here (`conf_th, min_bb,
max_bb, num_bb`), by the `nbb_*.json` beside the database where there is one. Ours are read whole.

Source: facts/uniter.md sections 1.2, 1.3 and 8 (rows 16, 17, 18, 20: mended, not copied).
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uniter.datasets.errors import BadInput
from uniter.datasets.image_db.ours import Complete, Live, open_complete, open_unfinished
from uniter.datasets.image_db.parts import refuse_misfits
from uniter.datasets.image_db.published import VARIANT, Published, open_published, rule_of_name, variant
from uniter.datasets.image_db.records import ALL_FIELDS, DEFAULT_FIELDS, MissingImage, decode, is_npz, plan_of, present
from uniter.datasets.image_db.regions import RegionFeatures
from uniter.datasets.storage.claims import is_passing
from uniter.datasets.storage.index_file import KeyList, key_columns

_Part = Complete | Live | Published


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

    def __repr__(self) -> str:
        names = ", ".join(str(folder) for folder in self.folders)
        return f"<ImageDB {names}: {len(self):,} images>"

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
        for which in self._order(detected):
            start, part = self._starts[which], self._parts[which]
            row = part.keys.find(key)
            if row >= 0:
                return int(start) + row
        raise MissingImage(f"image {key!r} is not in {self._name()}; was it extracted, and under this key?")

    def rows_of(self, keys: Sequence[str], *, detected: bool = False) -> NDArray[np.int64]:
        """(len(keys),) `index_of` of each key, -1 where it is not there. Millions at once, where `keys` is an index's `KeyList`."""
        wanted = keys if isinstance(keys, KeyList) else KeyList(key_columns([key.encode(errors="surrogatepass") for key in keys]))
        rows = np.full(len(wanted), -1, dtype=np.int64)
        for which in self._order(detected):
            found = self._parts[which].keys.find_all(wanted)
            rows = np.where((rows < 0) & (found >= 0), found + self._starts[which], rows)
        return rows

    def named_in(self, keys: Sequence[str]) -> NDArray[np.bool_]:
        """(len,) whether each of `keys_list` is among some keys."""
        wanted = keys if isinstance(keys, KeyList) else KeyList(key_columns([key.encode(errors="surrogatepass") for key in keys]))
        parts = [part.keys.find_all(wanted) for part in self._parts]
        named = np.zeros(len(self), dtype=np.bool_)
        for start, found in zip(self._starts[:-1], parts, strict=True):
            named[start + found[found >= 0]] = True
        return named

    def _order(self, detected: bool) -> list[int]:
        """The databases in the order in which a key is looked for."""
        order = list(range(len(self._parts)))
        return sorted(order, key=lambda which: not self._detected[which]) if detected else order

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
        for part in (*self._parts, *(part for part in self._parts if isinstance(part, Live))):
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
            return decode(value, fields=tuple(fields), rows=part.rows_of(key), soft_label_rows=soft_label_rows)
        except BadInput as error:
            raise BadInput(f"{part.path}, image {key!r}: {error}; see `uniter-db check`") from None

    def read_row(self, row: int, *, fields: Sequence[str] = DEFAULT_FIELDS) -> RegionFeatures:
        """`read` of the image in that row of `keys_list`, without looking its key up."""
        part, place = self._part_of(row)
        if not isinstance(part, Complete):
            key = self.keys_list[row]
            found = self._read_from(part, key, fields)
            return self.read(key, fields=fields) if found is None else found
        try:
            return decode(part.value_in_row(place), fields=tuple(fields), rows=None)
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
        if isinstance(part, Live):
            return present(self.read(self.keys_list[row], fields=fields), fields)
        try:
            value = part.value_in_row(place)
            count = int(part.region_counts[place]) if isinstance(part, Published) else None
            if count is not None and is_npz(value):
                return present(decode(value, fields=fields, rows=count), fields)
            arrays = [np.ndarray(shape, dtype, value, offset) for _, shape, dtype, offset in plan_of(value, fields).arrays]
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
                return None if isinstance(part, Published) else bytes(value)
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
    if any(VARIANT.fullmatch(child.name) for child in children):
        return "split"
    inner = [child for child in path.iterdir() if kind_of_child(child)] if path.is_dir() else []
    return "folder" if inner else "none"


def children_of(path: Path, *, allow_partial: bool = False) -> list[Path]:
    """The databases of a folder that are read as one.

    Raises:
        BadInput: they are being made, or replaced by others, together, and do not fit together at this moment.
    """
    refuse_misfits(path, allow_partial=allow_partial)
    return sorted(child for child in path.iterdir() if kind_of_child(child))


def kind_of_child(path: Path) -> bool:
    """Whether a folder is itself a database (of ours or published)."""
    # What is being made, or being taken away, beside a database is none of those that the folder holds.
    return path.is_dir() and not is_passing(path) and any((path / name).exists() for name in ("header.json", "settings.json", "data.mdb"))


def _open_parts(path: Path, allow_partial: bool, readahead: bool, selection: dict[str, Any]) -> list[_Part]:
    kind = kind_of(path)
    if kind == "complete":
        return [open_complete(path, readahead=readahead)]
    if kind == "unfinished":
        if not allow_partial:
            raise BadInput(f"{path} is unfinished (no header.json): run its command again to finish it, or pass --allow-partial")
        return list(open_unfinished(path))
    if kind == "published":
        return [open_published(path, readahead, rule_of_name(path.name, selection))]
    if kind == "split":
        chosen = variant(path, selection)
        return [open_published(chosen, readahead, rule_of_name(chosen.name, selection))]
    if kind == "folder":
        parts: list[_Part] = []
        for child in children_of(path, allow_partial=allow_partial):
            parts += _open_parts(child, allow_partial, readahead, selection)
        return parts
    raise BadInput(f"{path} is no region database; expected a folder with data.mdb (from uniter-extract, uniter-db convert or UNITER)")
