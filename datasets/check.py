"""Look through a database: what is damaged, what looks wrong, what is still good. Nothing in here hands a file to LMDB.

A record is good if it can be read, agrees with its checksum, and its numbers can be what they claim to be. `examine` yields the
good ones while it fills the report; `uniter-db check --repair` writes just those.

Works on region databases (ours, unfinished, published) and on text databases.
"""

import itertools
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import orjson
from numpy.typing import NDArray

from uniter.datasets.captions.files import json_pairs
from uniter.datasets.errors import BadInput, UniterError, shown
from uniter.datasets.image_db import ImageDB, decode_record, kind_of
from uniter.datasets.index_file import KeyList, map_arrays
from uniter.datasets.lmdb_pages import Fault, PageFile, Place, check_data_file
from uniter.datasets.lmdb_store import INDEX, read_json
from uniter.datasets.progress import Progress
from uniter.datasets.regions import RegionFeatures
from uniter.datasets.text_db import MissingExample, TextDB, decode_text_record

_SHOWN: Final = 20
_SIDE_FILES: Final = ("id2len.json", "id2len_qa.json", "id2len_qar.json", "txt2img.json", "img2txts.json")


@dataclass
class CheckReport:
    """What `check` found.

    Attributes:
        path, kind: "regions", "published regions", "unfinished regions", "text" or "published text".
        records, good: how many were found, and how many of them are good.
        problems: kind of problem -> how often. Any problem fails the check.
        examples: the first of them as sentences.
        notes: what is unusual but does no harm.
    """

    path: str
    kind: str = ""
    records: int = 0
    good: int = 0
    problems: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def problem(self, kind: str, sentence: str) -> None:
        """Count a problem; the first ones are kept as sentences."""
        self.problems[kind] += 1
        if len(self.examples) < _SHOWN:
            self.examples.append(sentence)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "path": self.path,
            "kind": self.kind,
            "records": self.records,
            "good": self.good,
            "problems": dict(self.problems),
            "examples": self.examples,
            "notes": self.notes,
        }


# ------------------------------------------------------------------------------------------------------------- what a folder is


def database_kind(path: Path) -> str:
    """ "regions", "unfinished regions", "published regions", "folder of regions", "text", "unfinished text" or "published text".

    Raises:
        BadInput: no database.
    """
    if not path.is_dir():
        raise BadInput(f"{path} is no folder; expected a database")
    for name, prefix in (("header.json", ""), ("settings.json", "unfinished ")):
        if (path / name).exists():
            return prefix + ("text" if _says_text(path) else "regions")
    if (path / "data.mdb").exists():
        published_text = (path / "meta.json").exists() or any((path / name).exists() for name in _SIDE_FILES)
        return "published text" if published_text else "published regions"
    if kind_of(path) in ("split", "folder"):
        return "folder of regions"
    raise BadInput(f"{path} is no database (no data.mdb, no settings.json)")


def _says_text(path: Path) -> bool:
    for name in ("header.json", "settings.json"):
        try:
            stated = orjson.loads((path / name).read_bytes())
        except (OSError, orjson.JSONDecodeError):
            continue
        if isinstance(stated, dict) and "kind" in stated:
            return bool(stated["kind"] == "text")
    return (path / "meta.json").exists()


# -------------------------------------------------------------------------------------------------------------------- structure


def _records(
    path: Path, report: CheckReport, table: bytes | None = None, places: Mapping[bytes, int] | None = None
) -> Iterator[tuple[bytes, bytes]]:
    """Every record that the pages still yield, its key and bytes; faults go into the report.

    Args:
        places: where the index says that values begin; a reader goes by it.
    """
    data = path / "data.mdb"
    whole = True
    try:
        check_data_file(data)
    except BadInput as error:
        report.problem("file", str(error))
        whole = False
    try:
        pages = PageFile(data, whole=whole)
    except (UniterError, OSError) as error:
        if whole:
            report.problem("file", f"{data} cannot be read ({error})")
        return
    with pages:
        found = 0
        for item in pages.records(table):
            if isinstance(item, Fault):
                report.problem("pages", f"{data}: {item.words}")
                continue
            value = pages.value(item)
            if value is None:
                report.problem("pages", f"{data}: the value of key {_shown(item.key)} lies beyond the end of the file")
                continue
            found += 1
            if places is not None and places.get(item.key, item.offset) != item.offset:
                report.problem("index", f"{path / INDEX}: {_shown(item.key)} lies elsewhere in data.mdb than the index says")
            yield item.key, value
        if table is None and whole and found < pages.entries:
            report.problem("pages", f"{data}: its header counts {pages.entries:,} records but {found:,} can be reached")


def _salvaged(path: Path, checksums: Mapping[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Records that no longer hang on the tree but whose checksum confirms them."""
    try:
        pages = PageFile(path / "data.mdb", whole=False)
    except (UniterError, OSError):
        return
    with pages:
        wanted = dict(checksums)
        for place in pages.stray_leaves():
            checksum = wanted.get(place.key)
            if checksum is None:
                continue
            value = pages.value(Place(place.key, place.offset, place.size))
            if value is not None and zlib.crc32(value) == checksum:
                del wanted[place.key]
                yield place.key, value


def _shown(key: bytes) -> str:
    return repr(key[:80].decode(errors="replace"))


# ---------------------------------------------------------------------------------------------------------------------- regions


def examine_regions(path: Path, report: CheckReport) -> Iterator[tuple[str, bytes, RegionFeatures]]:
    """The good records of one region database, with their bytes as stored; `report` is complete when this is exhausted."""
    report.kind = database_kind(path)
    if report.kind == "unfinished regions":
        report.notes.append(f"{path} is unfinished: the command that made it continues it")
        folders: list[tuple[Path, bytes | None]] = [(path, None)] if (path / "data.mdb").exists() else []
        folders += [(unit, b"records") for unit in sorted((path / "units").glob("[0-9]*")) if (unit / "data.mdb").exists()]
        for folder, table in folders:
            for key, value in _records(folder, report, table):
                yield from _good_record(path, key, value, None, None, report, Widths())
        return
    checksums = _index(path, report) if report.kind == "regions" else None
    widths = Widths()
    seen: set[bytes] = set()
    listed: list[str] | None = None
    stored_rows: dict[str, int] = {}
    for key, value in _records(path, report, places=_places(path) if checksums is not None else None):
        if key == b"__keys__" and report.kind == "published regions":
            listed = _listed(value, report)
            continue
        seen.add(key)
        for name, content, regions in _good_record(path, key, value, checksums, report.kind, report, widths):
            stored_rows[name] = len(regions)
            yield name, content, regions
    if checksums is not None:
        lost = {key: checksum for key, (checksum, _) in checksums.items() if key not in seen}
        if lost:
            for key, value in _salvaged(path, lost):
                report.problem("salvaged", f"{path}: {_shown(key)} hangs on no page any more, but its record is whole")
                yield from _good_record(path, key, value, checksums, report.kind, report, widths)
                del lost[key]
            for key in lost:
                report.problem("lost", f"{path}: {_shown(key)} is in the index but not in data.mdb")
        _header(path, len(checksums), report)
    if report.kind == "published regions":
        _published_side(path, listed, seen, stored_rows, report)
    if (path / "lock.mdb").exists():
        report.notes.append(f"{path}/lock.mdb is left over from a writer or reader; harmless, it may be deleted")


@dataclass
class Widths:
    """The first record's widths, which all others must share."""

    features: int = -1
    labels: int = -1


def _good_record(
    path: Path,
    key: bytes,
    value: bytes,
    checksums: Mapping[bytes, tuple[int, int]] | None,
    kind: str | None,
    report: CheckReport,
    widths: Widths,
) -> Iterator[tuple[str, bytes, RegionFeatures]]:
    report.records += 1
    try:
        name = key.decode()
    except UnicodeDecodeError:
        report.problem("key", f"{path}: key {key[:80]!r} is no UTF-8")
        return
    if checksums is not None:
        known = checksums.get(key)
        if known is None:
            report.problem("index", f"{path}: {name!r} is in data.mdb but not in the index")
            return
        if zlib.crc32(value) != known[0]:
            report.problem("checksum", f"{path}: image {name!r} differs from its checksum; its record is damaged")
            return
    try:
        regions = decode_record(value, key=name)
        faults = faults_of(regions)
        if checksums is not None and len(regions) != checksums[key][1]:
            faults.append(("index", f"has {len(regions)} regions but the index says {checksums[key][1]}"))
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
    box = np.asarray(regions.norm_bb, dtype=np.float32)
    extent = box[:, 2:4] - box[:, :2]
    if (box[:, :4] < -2e-3).any() or (box[:, :4] > 1 + 2e-3).any():
        faults.append(("box", f"has boxes outside the image (fractions from {box[:, :4].min():.3f} to {box[:, :4].max():.3f})"))
    if box.shape[1] == 6 and np.abs(extent - box[:, 4:6]).max() > 4e-3:
        faults.append(("box", "has widths that are not x1 - x0; are its boxes x, y, width, height?"))
    elif (np.maximum(extent, box[:, 4:6] if box.shape[1] == 6 else extent) <= 0).any():
        faults.append(("box", "has boxes with x1 <= x0 or y1 <= y0; are they x, y, width, height?"))
    if regions.boxes is not None and regions.size is not None:
        faults += _pixel_faults(regions.boxes, box, regions.size)
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
    if height < 1 or width < 1:
        return [("box", f"has size {width}x{height}")]
    scale = np.array([width, height, width, height], dtype=np.float32)
    if (boxes < -1).any() or (boxes > scale + 1).any():
        return [("box", f"has boxes outside its {width}x{height} pixels")]
    if np.abs(boxes / scale - fractions[:, :4]).max() > 4e-3:
        return [("box", "has pixel boxes that do not fit norm_bb")]
    return []


def _index(path: Path, report: CheckReport) -> dict[bytes, tuple[int, int]] | None:
    """Key -> (checksum, regions) from the index of one of ours."""
    try:
        columns = map_arrays(path / INDEX)
        keys = KeyList(columns)
        checksums, counts = columns["checksums"].tolist(), columns["region_counts"].tolist()
        if not len(keys) == len(checksums) == len(counts):
            raise BadInput(f"{path / INDEX} has columns of different lengths")
        return {keys.raw(row): (checksums[row], counts[row]) for row in range(len(keys))}
    except (OSError, KeyError) as error:
        report.problem("index", f"{path / INDEX} is missing or has no {error}; records are believed without checksums")
    except BadInput as error:
        report.problem("index", str(error))
    return None


def _places(path: Path) -> dict[bytes, int] | None:
    """Where the index says that each value begins; None if data.mdb was rewritten since (readers then look for themselves)."""
    columns = map_arrays(path / INDEX)
    try:
        with PageFile(path / "data.mdb", whole=False) as pages:
            if not {"offsets", "data_file"} <= columns.keys() or columns["data_file"].tolist() != list(pages.identity):
                return None
    except (UniterError, OSError):
        return None
    keys, offsets = KeyList(columns), columns["offsets"].tolist()
    return {keys.raw(row): offset for row, offset in enumerate(offsets[: len(keys)])}


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


# ------------------------------------------------------------------------------------------------------------------------- text


def examine_text(path: Path, report: CheckReport) -> Iterator[tuple[str, bytes, dict[str, Any]]]:
    """The good records of one text database; `report` is complete when this is exhausted."""
    report.kind = database_kind(path)
    try:
        lengths = _lengths(path)
        whole_vocabulary = _vocabulary_end(path)
    except BadInput as error:
        report.problem("side file", str(error))
        lengths, whole_vocabulary = {}, None
    seen = set()
    for key, value in _records(path, report):
        report.records += 1
        name = key.decode(errors="replace")
        try:
            record = decode_text_record(value, example=name)
        except BadInput as error:
            report.problem("record", f"{path}: {error}")
            continue
        seen.add(name)
        sentence = _text_fault(record, lengths.get(name), whole_vocabulary)
        if sentence is not None:
            report.problem("text", f"{path}: text {name!r} {sentence}")
            continue
        if lengths and name not in lengths:
            report.problem("index", f"{path}: text {name!r} is stored but not in the index or id2len.json")
            continue
        report.good += 1
        yield name, value, record
    for name in lengths.keys() - seen:
        report.problem("lost", f"{path}: text {name!r} is in the index or id2len.json but not readable in data.mdb")
    if report.kind == "text":
        _text_side_files(path, report)


def _lengths(path: Path) -> dict[str, int]:
    """Id -> stated length, from ours or from the JSON side files; what VCR states is not compared."""
    if (path / "header.json").exists() and (path / INDEX).exists():
        database = TextDB(path, lengths=None)
        return dict(zip(database.ids, database.lengths.tolist(), strict=True))
    if (path / "id2len.json").exists():
        stated = read_json(path / "id2len.json")
        if not isinstance(stated, dict) or not all(type(length) is int for length in stated.values()):
            raise BadInput(f"{path / 'id2len.json'} is no object of numbers")
        return stated
    return {}


def _text_side_files(path: Path, report: CheckReport) -> None:
    """Whether the JSON that other people's readers go by says what the index says; both are read as they stand, never as a whole."""
    try:
        database = TextDB(path)
    except UniterError as error:
        report.problem("index", str(error))
        return
    texts_of = database.images()
    wanted: dict[str, Iterable[tuple[str, Any]]] = {
        "id2len.json": zip(database.ids, database.lengths.tolist(), strict=True),
        "txt2img.json": ((example, database.image_key(row)) for row, example in enumerate(database.ids)),
        "img2txts.json": ((key, [database.ids[row] for row in texts_of[key]]) for key in database.image_keys),
    }
    for name, rows in wanted.items():
        if not (path / name).is_file():
            if name != "id2len.json" or not (path / "id2len_qa.json").is_file():  # VCR has two other ones
                report.problem("side file", f"{path / name} is missing")
            continue
        try:
            for stored, expected in itertools.zip_longest(json_pairs(path / name), rows):
                found = stored and (stored[0], tuple(stored[1]) if name == "txt2img.json" and isinstance(stored[1], list) else stored[1])
                if found != expected:
                    report.problem("side file", f"{path / name} says {shown(stored)} where the index says {shown(expected)}")
                    break
        except BadInput as error:
            report.problem("side file", str(error))
        except (MissingExample, IndexError) as error:
            report.problem("index", f"{path / INDEX} is damaged: its columns refer to rows that are not there ({error})")


def _vocabulary_end(path: Path) -> int | None:
    try:
        bounds = read_json(path / "meta.json").get("v_range")
    except (FileNotFoundError, AttributeError):
        return None
    return int(bounds[1]) if isinstance(bounds, list) and len(bounds) == 2 and type(bounds[1]) is int else None


def _text_fault(record: Mapping[str, Any], length: int | None, vocabulary_end: int | None) -> str | None:
    ids = record.get("input_ids")
    if not isinstance(ids, list) or not all(type(number) is int and number >= 0 for number in ids):
        return "has no list of word pieces in input_ids"
    # VCR adds special rows beyond the vocabulary.
    if vocabulary_end is not None and ids and max(ids) >= vocabulary_end + 256:
        return f"has word piece {max(ids)}, beyond the vocabulary's {vocabulary_end}"
    plain = not any(name in record for name in ("input_ids_as", "input_ids_rs"))
    if length is not None and plain and length != len(ids):
        return f"has {len(ids)} word pieces but the index or id2len.json says {length}"
    return None


# --------------------------------------------------------------------------------------------------------------------- together


def check_database(path: Path) -> CheckReport:
    """Read everything of one database (or folder of databases) and say what is wrong with it.

    Raises:
        BadInput: `path` is no database.
    """
    report = CheckReport(str(path))
    kind = database_kind(path)
    with Progress(None, unit="records", label=f"checking {path.name}") as progress:
        if kind == "folder of regions":
            report.kind = kind
            for child in sorted(child for child in path.iterdir() if child.is_dir() and (child / "data.mdb").exists()):
                for _ in examine_regions(child, report):
                    progress.update()
            report.kind = kind
        else:
            examined: Iterable[Any] = examine_text(path, report) if kind.endswith("text") else examine_regions(path, report)
            for _ in examined:
                progress.update()
    if not report.records and not report.problems:
        report.notes.append(f"{path} is empty")
    return report


@dataclass
class Coverage:
    """How far texts and images go together.

    Attributes:
        texts, texts_with_image: examples in all, and those whose images are all there.
        images_named, images_found: different images that the texts name, and those that a region database holds.
        images_without_text: images of the region databases that no text names.
        missing: the first image keys that are in none.
    """

    texts: int
    texts_with_image: int
    images_named: int
    images_found: int
    images_without_text: int
    missing: list[str]


def check_coverage(texts: Sequence[TextDB], images: ImageDB) -> Coverage:
    """Compare the images that texts name with those that region databases hold."""
    total = covered = 0
    named: set[str] = set()
    missing: set[str] = set()
    for database in texts:
        keys = list(database.image_keys)
        found = np.fromiter((key in images for key in keys), dtype=bool, count=len(keys))
        named.update(keys)
        missing.update(key for key, there in zip(keys, found.tolist(), strict=True) if not there)
        total += len(database)
        covered += int(found[database.image_numbers].all(axis=1).sum()) if len(database) else 0
    without = sum(key not in named for key in images.keys_list)
    return Coverage(total, covered, len(named), len(named) - len(missing), without, sorted(missing)[:_SHOWN])
