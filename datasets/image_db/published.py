"""Region databases published for UNITER: their folders, keys and selection at reading."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from uniter.datasets.errors import BadInput
from uniter.datasets.image_db.ours import DataFile
from uniter.datasets.image_db.records import MissingImage, decode, is_npz
from uniter.datasets.storage.array_codec import find_arrays
from uniter.datasets.storage.claims import is_passing
from uniter.datasets.storage.files import read_json
from uniter.datasets.storage.index_file import KeyList, key_columns
from uniter.datasets.storage.lmdb_pages import Fault, PageFile
from uniter.datasets.storage.npz import npz_rows

_KEYS_ENTRY: Final = b"__keys__"


def count_boxes(conf: NDArray[Any], *, conf_th: float, min_bb: int, max_bb: int) -> int:
    """UNITER's rule of how many regions of an image are read: those with confidence strictly above `conf_th`, 10..100.

    The lower bound comes first and is not cut to the rows that exist.
    """
    # In the array's own type, as NumPy compares: float16 0.2 is not above 0.2.
    return min(max_bb, max(min_bb, int((conf > conf_th).sum())))


class Published:
    """One of UNITER's LMDBs. Keys come from its own pages (`__keys__` may be absent or wrong), counts from JSON and records."""

    header = None

    def __init__(
        self, path: Path, *, readahead: bool, conf_th: float, min_bb: int, max_bb: int, num_bb: int, counts: dict[str, int] | None
    ) -> None:
        self.path = path
        self.file = DataFile(path, readahead=readahead)
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
        self._counts = np.full(len(keys), -1, dtype=np.int32)  # of the records that were counted so far

    def value(self, key: str) -> memoryview | None:
        """The packed record of a key, None where there is none."""
        row = self.keys.find(key)
        return None if row < 0 else self.value_in_row(row)

    def value_in_row(self, row: int) -> memoryview:
        """The packed record of a row of the index."""
        return self.file.value(int(self._offsets[row]), int(self._sizes[row]))

    @property
    def region_counts(self) -> NDArray[np.int32]:
        """Rows that a read returns, never more than the record has (facts, section 8, row 16)."""
        for row in np.flatnonzero(self._counts < 0).tolist():
            self._count(row)
        return self._counts

    def _count(self, row: int) -> int:
        if self._counts[row] < 0:
            key = self.keys[row]
            try:
                self._counts[row] = self._counted(key, self.value_in_row(row))
            except BadInput as error:
                raise BadInput(f"image {key!r} of {self.path}: {error}; see `uniter-db check`") from None
        return int(self._counts[row])

    def _counted(self, key: str, value: memoryview) -> int:
        if self._conf_th == -1 or (self._stated is not None and key in self._stated):
            if is_npz(value):
                stored = npz_rows(value, "norm_bb")
            else:
                place = find_arrays(value).get("norm_bb")
                stored = place.shape[0] if place else None
            if stored is None:
                raise BadInput("it has no norm_bb; is it a region database?")
            return min(self.stated(key), stored)
        record = decode(value, fields=("conf",), rows=None)
        return min(self._by_rule(record.conf), len(record.norm_bb))

    def _by_rule(self, conf: NDArray[Any]) -> int:
        return count_boxes(conf, conf_th=self._conf_th, min_bb=self._min_bb, max_bb=self._max_bb)

    def stated(self, key: str) -> int:
        """What UNITER's reader calls the number of boxes of this name: the JSON's, or by the rule, or `num_bb`."""
        if self._conf_th == -1:
            return self._num_bb
        if self._stated is not None and key in self._stated:
            return self._stated[key]
        value = self.value(key)
        if value is None:
            raise MissingImage(f"image {key!r} is not in {self.path}")
        try:
            return self._by_rule(decode(value, fields=("conf",), rows=None).conf)
        except BadInput as error:
            raise BadInput(f"image {key!r}: {error}") from None

    def rows_of(self, key: str) -> int | None:
        """How many rows of a record are read."""
        row = self.keys.find(key)
        return None if row < 0 else self._count(row)


def refuse_pickles(path: Path) -> None:
    """BadInput if the first value of an LMDB made elsewhere is a Python pickle, as other projects store features."""
    for folder in (path, *sorted(child for child in path.iterdir() if (child / "data.mdb").exists())):
        if (folder / "data.mdb").exists():
            with PageFile(folder / "data.mdb") as pages:
                first = next((found for found in pages.records() if not isinstance(found, Fault) and found.key != _KEYS_ENTRY), None)
                value = None if first is None else pages.value(first)
            if value is not None and value[:1] == b"\x80" and value[1:2] in (b"\2", b"\3", b"\4", b"\5") and value[-1:] == b".":
                raise BadInput(
                    f"{folder} is an LMDB of Python pickles, which are never read, since they can run code; "
                    "write it out with the project that made it, as .npz or .tsv for instance, and convert that"
                )


USUAL_SELECTION: Final = {"conf_th": 0.2, "min_bb": 10, "max_bb": 100, "num_bb": 36}
"""What UNITER reads where nothing else is said."""

VARIANT = re.compile(
    r"(?:feat_th(?P<conf_th>-?[0-9.]+)_max(?P<max_bb>\d+)_min(?P<min_bb>\d+)|feat_numbb(?P<num_bb>\d+)|all)(?P<compressed>_compressed)?"
)


def rule_of_name(name: str, selection: dict[str, Any]) -> dict[str, Any]:
    """The selection that the name of a published LMDB states; its own where the name says nothing."""
    match = VARIANT.fullmatch(name)
    if match is None or (match["conf_th"] is None and match["num_bb"] is None):
        return selection
    if match["num_bb"] is not None:
        return {**selection, "conf_th": -1, "num_bb": int(match["num_bb"])}
    if selection["conf_th"] == -1:
        return selection
    return {**selection, "conf_th": float(match["conf_th"]), "max_bb": int(match["max_bb"]), "min_bb": int(match["min_bb"])}


def _threshold_name(selection: Mapping[str, Any]) -> str:
    return f"th{selection['conf_th']}_max{selection['max_bb']}_min{selection['min_bb']}"


def variant(path: Path, selection: dict[str, Any]) -> Path:
    """Which LMDB inside UNITER's split folder serves this selection."""
    exact = f"feat_numbb{selection['num_bb']}" if selection["conf_th"] == -1 else f"feat_{_threshold_name(selection)}"
    for name in (exact, f"{exact}_compressed", "all", "all_compressed"):
        if (path / name / "data.mdb").exists():
            return path / name
    there = sorted(child for child in path.iterdir() if (child / "data.mdb").exists() and not is_passing(child))
    if len(there) == 1 and selection == USUAL_SELECTION:  # nothing was chosen, and there is nothing to choose from
        return there[0]
    names = ", ".join(child.name for child in there)
    raise BadInput(f"{path} holds {names}, none of which is {exact} or all; name the one that is meant, such as {there[0]}")


def open_published(path: Path, readahead: bool, selection: dict[str, Any]) -> Published:
    """Open one of UNITER's published LMDBs; counts of regions come from the `nbb_*.json` beside it where the selection has one."""
    counts = None
    name = path.name
    if not name.startswith("all") and selection["conf_th"] != -1:
        beside = path.parent / f"nbb_{_threshold_name(selection)}.json"
        if beside.exists():
            counts = read_json(beside)
            if not isinstance(counts, dict) or not all(type(number) is int and number >= 0 for number in counts.values()):
                raise BadInput(f"{beside} is no object of numbers; remove it, the numbers are then counted from the records")
    return Published(path, readahead=readahead, counts=counts, **selection)
