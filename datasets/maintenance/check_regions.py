"""Is every record of a region database whole?"""

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from uniter.datasets.errors import BadInput, UniterError, shown
from uniter.datasets.image_db.records import decode_record
from uniter.datasets.image_db.regions import RegionFeatures, has_positions
from uniter.datasets.maintenance.check_report import CheckReport, records_of, salvaged, shown_first
from uniter.datasets.maintenance.kinds import database_kind
from uniter.datasets.storage.files import read_json
from uniter.datasets.storage.index_file import INDEX, KeyList, map_arrays
from uniter.datasets.storage.lmdb_pages import PageFile

# ---------------------------------------------------------------------------------------------------------------------- regions


def examine_regions(path: Path, report: CheckReport) -> Iterator[tuple[str, bytes, RegionFeatures]]:
    """The good records of one region database, with their bytes as stored; `report` is complete when this is exhausted."""
    report.kind = database_kind(path)
    if report.kind == "unfinished regions":
        report.notes.append(f"{path} is unfinished: the command that made it continues it")
        folders: list[tuple[Path, bytes | None]] = [(path, None)] if (path / "data.mdb").exists() else []
        folders += [(unit, b"records") for unit in sorted((path / "units").glob("[0-9]*")) if (unit / "data.mdb").exists()]
        widths = Widths()
        for folder, table in folders:
            for key, value in records_of(folder, report, table):
                yield from _good_record(path, key, value, None, report, widths)
        return
    if report.kind == "regions":
        yield from _examine_ours(path, report)
    else:
        yield from _examine_published(path, report)
    if (path / "lock.mdb").exists():
        report.notes.append(f"{path}/lock.mdb is left over from a writer or reader; harmless, it may be deleted")


def _examine_ours(path: Path, report: CheckReport) -> Iterator[tuple[str, bytes, RegionFeatures]]:
    index, widths = _index(path, report), Widths()
    if index is None:
        for key, value in records_of(path, report):
            yield from _good_record(path, key, value, None, report, widths)
        return
    for key, value in records_of(path, report, place_of=index.place_of):
        index.mark(key)
        yield from _good_record(path, key, value, index, report, widths)
    lost = index.unseen()
    if lost:
        for key, value in salvaged(path, lost):
            report.problem("salvaged", f"{path}: {shown_first(key)} hangs on no page any more, but its record is whole")
            yield from _good_record(path, key, value, index, report, widths)
            del lost[key]
        for key in lost:
            report.problem("lost", f"{path}: {shown_first(key)} is in the index but not in data.mdb")
    _header(path, len(index), report)


def _examine_published(path: Path, report: CheckReport) -> Iterator[tuple[str, bytes, RegionFeatures]]:
    widths = Widths()
    seen: set[bytes] = set()
    listed: list[str] | None = None
    stored_rows: dict[str, int] = {}
    for key, value in records_of(path, report):
        if key == b"__keys__":
            listed = _listed(value, report)
            continue
        seen.add(key)
        for name, content, regions in _good_record(path, key, value, None, report, widths):
            stored_rows[name] = len(regions)
            yield name, content, regions
    _published_side(path, listed, seen, stored_rows, report)


class _Index:
    """What the index of one of ours says of each key, without an object a key: millions are looked up as the pages bring them."""

    def __init__(self, columns: Mapping[str, NDArray[Any]], *, current: bool) -> None:
        self._keys = KeyList(columns)
        self._checksums, self._counts = columns["checksums"], columns["region_counts"]
        if not len(self._keys) == len(self._checksums) == len(self._counts):
            raise BadInput("its columns have different lengths")
        # Where the file was rewritten since, readers look for themselves.
        self._offsets = columns["offsets"] if current and len(columns["offsets"]) == len(self._keys) else None
        self._seen = np.zeros(len(self._keys), dtype=np.bool_)
        self._last = -1

    def __len__(self) -> int:
        return len(self._keys)

    def _row(self, key: bytes) -> int:
        for row in (self._last, self._last + 1):  # pages bring the keys in the index's order
            if 0 <= row < len(self._keys) and self._keys.raw(row) == key:
                self._last = row
                return row
        row = self._keys.find_raw(key)
        self._last = row if row >= 0 else self._last
        return row

    def place_of(self, key: bytes) -> int | None:
        """Where its value begins; None where that is not known."""
        row = self._row(key) if self._offsets is not None else -1
        return None if row < 0 or self._offsets is None else int(self._offsets[row])

    def get(self, key: bytes) -> tuple[int, int] | None:
        """Checksum and number of regions."""
        row = self._row(key)
        return None if row < 0 else (int(self._checksums[row]), int(self._counts[row]))

    def mark(self, key: bytes) -> None:
        """The key is in the file."""
        row = self._row(key)
        if row >= 0:
            self._seen[row] = True

    def unseen(self) -> dict[bytes, int]:
        """The keys that are not in the file, with their checksums."""
        return {self._keys.raw(row): int(self._checksums[row]) for row in np.flatnonzero(~self._seen).tolist()}


@dataclass
class Widths:
    """The first record's widths, which all others must share."""

    features: int = -1
    labels: int = -1


def _good_record(
    path: Path,
    key: bytes,
    value: bytes,
    index: _Index | None,
    report: CheckReport,
    widths: Widths,
) -> Iterator[tuple[str, bytes, RegionFeatures]]:
    report.records += 1
    try:
        name = key.decode()
    except UnicodeDecodeError:
        report.problem("key", f"{path}: key {key[:80]!r} is no UTF-8")
        return
    known = None
    if index is not None:
        known = index.get(key)
        if known is None:
            report.problem("index", f"{path}: {name!r} is in data.mdb but not in the index")
            return
        if zlib.crc32(value) != known[0]:
            report.problem("checksum", f"{path}: image {name!r} differs from its checksum; its record is damaged")
            return
    try:
        regions = decode_record(value, key=name)
        faults = faults_of(regions)
        if known is not None and len(regions) != known[1]:
            faults.append(("index", f"has {len(regions)} regions but the index says {known[1]}"))
        if widths.features == -1:
            widths.features = regions.features.shape[1]
            widths.labels = 0 if regions.soft_labels is None else regions.soft_labels.shape[1]
        labels = 0 if regions.soft_labels is None else regions.soft_labels.shape[1]
        if (regions.features.shape[1], labels) != (widths.features, widths.labels):
            mine = f"features and labels are {regions.features.shape[1]} and {labels} wide"
            words = f"{mine}, the first image's {widths.features} and {widths.labels}"
            faults.append(("width", words))
    except BadInput as error:
        report.problem("record", f"{path}: {error}")
        return
    for fault, sentence in faults:
        report.problem(fault, f"{path}: image {name!r} {sentence}")
    if not has_positions(regions):
        report.note_once("of some images it is not known where their regions are (their norm_bb is zero): the source did not say")
    if not faults:
        report.good += 1
        yield name, value, regions


def faults_of(regions: RegionFeatures) -> list[tuple[str, str]]:
    """What is wrong with the numbers of a record: (kind, words). Tolerances are float16's."""
    faults: list[tuple[str, str]] = []
    for name in ("features", "norm_bb", "conf", "soft_labels", "boxes", "attributes"):
        value = getattr(regions, name)
        if value is not None and not np.isfinite(value).all():
            faults.append(("not finite", f"has NaN or infinity in {name}"))
    if faults:
        return faults
    if not len(regions):
        return [("no regions", "has no regions")]
    return faults + (_box_faults(regions) if has_positions(regions) else []) + _probability_faults(regions)


def _box_faults(regions: RegionFeatures) -> list[tuple[str, str]]:
    faults: list[tuple[str, str]] = []
    box = np.asarray(regions.norm_bb, dtype=np.float32)
    extent = box[:, 2:4] - box[:, :2]
    if (box[:, :4] < -2e-3).any() or (box[:, :4] > 1 + 2e-3).any():
        faults.append(("box", f"has boxes outside the image (fractions from {box[:, :4].min():.3f} to {box[:, :4].max():.3f})"))
    if np.abs(extent - box[:, 4:6]).max() > 4e-3:
        faults.append(("box", "has widths that are not x1 - x0; are its boxes x, y, width, height?"))
    elif (np.maximum(extent, box[:, 4:6]) <= 0).any():
        faults.append(("box", "has boxes with x1 <= x0 or y1 <= y0; are they x, y, width, height?"))
    if regions.boxes is not None and regions.size is not None:
        faults += _pixel_faults(regions.boxes, box, regions.size)
    return faults


def _probability_faults(regions: RegionFeatures) -> list[tuple[str, str]]:
    faults: list[tuple[str, str]] = []
    if (regions.conf < -1e-3).any() or (regions.conf > 1 + 1e-3).any():
        faults.append(("confidence", f"has confidences from {float(regions.conf.min()):.3g} to {float(regions.conf.max()):.3g}"))
    for name in ("soft_labels", "attributes"):
        labels = getattr(regions, name)
        if labels is None:
            continue
        sums = np.asarray(labels, dtype=np.float32).sum(axis=1)
        if (labels < -1e-3).any() or np.abs(sums - 1).max() > 0.02:
            faults.append(("probabilities", f"has {name} that sum to {sums[np.abs(sums - 1).argmax()]:.3g} instead of 1"))
    return faults


def _pixel_faults(boxes: NDArray[Any], fractions: NDArray[np.float32], size: tuple[int, int]) -> list[tuple[str, str]]:
    height, width = size
    scale = np.array([width, height, width, height], dtype=np.float32)
    if (boxes < -1).any() or (boxes > scale + 1).any():
        return [("box", f"has boxes outside its {width}x{height} pixels")]
    if np.abs(boxes / scale - fractions[:, :4]).max() > 4e-3:
        return [("box", "has pixel boxes that do not fit norm_bb")]
    return []


def _index(path: Path, report: CheckReport) -> _Index | None:
    """The index of one of ours; None where it cannot be used."""
    try:
        columns = map_arrays(path / INDEX)
        return _Index(columns, current=_is_current(path, columns))
    except (OSError, KeyError) as error:
        report.problem("index", f"{path / INDEX} is missing or has no {error}; records are believed without checksums")
    except BadInput as error:
        report.problem("index", str(error) if str(path) in str(error) else f"{path / INDEX}: {error}")
    return None


def _is_current(path: Path, columns: Mapping[str, NDArray[Any]]) -> bool:
    """Whether the places in the index are those of `data.mdb` as it is now."""
    try:
        with PageFile(path / "data.mdb", whole=False) as pages:
            return {"offsets", "data_file"} <= columns.keys() and columns["data_file"].tolist() == list(pages.identity)
    except (UniterError, OSError):
        return False


def _header(path: Path, indexed: int, report: CheckReport) -> None:
    for name in ("header.json", "settings.json"):
        try:
            stated = read_json(path / name)
            if not isinstance(stated, dict):
                raise BadInput(f"{path / name} is no JSON object")
        except FileNotFoundError:
            report.problem("side file", f"{path / name} is missing")
            continue
        except BadInput as error:
            report.problem("side file", str(error))
            continue
        if name == "header.json" and stated.get("images") not in (None, indexed):
            report.problem("side file", f"{path / name} counts {shown(stated['images'])} images but the index {indexed:,}")


def _listed(value: bytes, report: CheckReport) -> list[str] | None:
    try:
        listed = orjson.loads(value)
        if isinstance(listed, list) and all(isinstance(key, str) for key in listed):
            return listed
    except orjson.JSONDecodeError:
        pass
    report.problem("side file", "__keys__ is no JSON list of names; the keys are taken from the pages instead")
    return []


def _published_side(path: Path, listed: list[str] | None, seen: set[bytes], rows: Mapping[str, int], report: CheckReport) -> None:
    names = {key.decode(errors="replace") for key in seen}
    if listed is None:
        report.notes.append("__keys__ is absent; the keys are taken from the pages instead")
    elif set(listed) != names:
        missing, more = len(set(listed) - names), len(names - set(listed))
        report.problem(
            "side file", f"__keys__ disagrees with what is stored: {missing:,} listed but absent, {more:,} stored but not listed"
        )
    if not path.name.startswith("feat_th"):
        return
    rule = path.name.removeprefix("feat_").removesuffix("_compressed")
    beside = path.parent / f"nbb_{rule}.json"
    if not beside.exists():
        report.notes.append(f"{beside} is absent; the numbers of boxes are counted from the records instead")
        return
    try:
        counts = read_json(beside)
        if not isinstance(counts, dict) or not all(type(count) is int for count in counts.values()):
            raise BadInput(f"{beside} is no object of numbers")
    except BadInput as error:
        report.problem("side file", str(error))
        return
    unknown, unlisted = len(counts.keys() - names), len(names - counts.keys())
    if unknown or unlisted:
        report.problem("side file", f"{beside} is stale: {unknown:,} of its names are not stored, {unlisted:,} stored ones have no number")
    least = int(rule.rsplit("_min", 1)[-1]) if "_min" in rule and rule.rsplit("_min", 1)[-1].isdigit() else 0
    wrong = [name for name, count in rows.items() if name in counts and counts[name] != count and counts[name] > max(least, count)]
    short = [name for name, count in rows.items() if name in counts and counts[name] < count]
    if wrong:
        report.problem(
            "side file",
            f"{beside} is stale: it says {counts[wrong[0]]} boxes of {wrong[0]!r}, which has {rows[wrong[0]]} ({len(wrong):,} such)",
        )
    if short:
        report.notes.append(f"{beside} says fewer boxes than are stored for {len(short):,} images; the rest is not read")
