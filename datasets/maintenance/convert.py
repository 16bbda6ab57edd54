"""`uniter-db convert`: from any layout to any other. What a layout lacks is said, never invented."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from uniter.datasets.errors import BadInput, UniterError, unknown_name
from uniter.datasets.image_db.formats.records import ImageSizes, Item, Selection, with_pixels
from uniter.datasets.image_db.formats.table import FORMATS, read_items, recognise
from uniter.datasets.image_db.records import encode_record
from uniter.datasets.image_db.regions import RegionFeatures
from uniter.datasets.image_db.writing.side_files import read_failures
from uniter.datasets.maintenance.copying import Record, box_ids_of, folders_of, refuse_overlap, write_regions
from uniter.datasets.progress import Progress
from uniter.datasets.storage.claims import REPORT, may_replace, note_of, source_names, write_note
from uniter.datasets.storage.files import read_json, read_json_object
from uniter.datasets.storage.index_file import hash_key
from uniter.datasets.storage.lmdb_files import checked_key
from uniter.datasets.vocabulary import visual_genome_attributes, visual_genome_objects


@dataclass
class ConvertReport:
    """What was converted.

    Attributes:
        source, target: formats.
        images, regions: how many were written.
        skipped: {"key", "path", "error"} of images that could not be.
        soft_labels: whether the records written hold the detector's distribution (MRC-KL needs it).
        lacks: what the target lacks because the source or the format has it not, in words.
        already_complete: nothing was done, it was there already, made from the same.
    """

    source: str
    target: str
    images: int
    regions: int
    skipped: list[dict[str, Any]]
    soft_labels: bool
    lacks: str
    already_complete: bool = False


class _Seen:
    """Watches the records on their way: counts and what they hold."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.images = self.regions = self.width = self.label_columns = self.attribute_columns = 0
        self.top_object = self.top_attribute = -1
        self.confidences = False
        self.skipped: list[dict[str, Any]] = []

    def watch(self, items: Iterable[Item]) -> Iterator[Item]:
        for key, regions in items:
            self._progress.update()
            if isinstance(regions, BadInput):
                self.skipped.append({"key": key, "path": key, "error": str(regions)})
            else:
                self.images += 1
                self.regions += len(regions)
                self.width = regions.features.shape[1]
                self.label_columns = 0 if regions.soft_labels is None else regions.soft_labels.shape[1]
                self.attribute_columns = 0 if regions.attributes is None else regions.attributes.shape[1]
                self.confidences = self.confidences or bool((regions.conf > 0).any())
                if regions.object_ids is not None and len(regions):
                    self.top_object = max(self.top_object, int(regions.object_ids.max()))
                if regions.attribute_ids is not None and len(regions):
                    self.top_attribute = max(self.top_attribute, int(regions.attribute_ids.max()))
            yield key, regions

    def skip(self, key: str, regions: RegionFeatures, error: BadInput) -> None:
        """One of the images watched could not be written; there must be others."""
        self.images -= 1
        self.regions -= len(regions)
        self.skipped.append({"key": key, "path": key, "error": str(error)})

    def lacks(self, holds: tuple[str, ...]) -> str:
        labels = self.label_columns > 0 and "soft labels" in holds
        known = {
            "soft labels": labels,
            "classes": labels or ("classes" in holds and (self.label_columns > 0 or self.top_object >= 0)),
            "confidences": self.confidences and "confidences" in holds,
        }
        reasons = {"soft labels": " (MRC and MRC-KL cannot be trained on it)", "classes": "", "confidences": ""}
        return ", ".join(name + reasons[name] for name, there in known.items() if not there) or "nothing"

    def header(self) -> dict[str, Any]:
        objects, attributes = visual_genome_objects(), visual_genome_attributes()
        known = self.label_columns == len(objects) + 1 or 0 <= self.top_object < len(objects)
        known_attributes = self.attribute_columns == len(attributes) + 1 or 0 <= self.top_attribute < len(attributes)
        return {
            "class_names": list(objects) if known else None,
            "attribute_names": list(attributes) if known_attributes else None,
            "class_names_from": "assumed: Visual Genome's 1600, by their number" if known else None,
        }


def convert(
    source: Path,
    target: Path,
    *,
    to: str = "lmdb",
    source_format: str | None = None,
    selection: Selection | None = None,
    images: Path | None = None,
    overwrite: bool = False,
) -> ConvertReport:
    """Convert region features from one format to another.

    Args:
        source: a file or folder; its format is recognised unless `source_format` names it.
        target: the file or folder to write.
        to: a name in `FORMATS`.
        selection: which rows of sources with candidates are taken (docker's npz, UNITER's `all`).
        images: a folder of pictures; gives sizes to formats that need pixels.
        overwrite: replace what is at `target`.

    Raises:
        BadInput: unknown format, unreadable source, or not one image could be converted.
    """
    if to not in FORMATS:
        raise BadInput(unknown_name("format", to, FORMATS))
    name = source_format or recognise(source)
    rule = selection or Selection()
    if target.exists() and target.resolve() == source.resolve():
        raise BadInput(f"{target} is both source and target")
    sizes = ImageSizes(images) if images is not None else None
    folders = folders_of(source) if name == "lmdb" else [source]
    sources = source_names(folders) | ({} if images is None else {"images": images})
    settings = {
        "made_by": "uniter-db convert",
        "source": source.name,
        "source_format": name,
        "selection": asdict(rule),
        "images": None if images is None else images.name,
    }
    refuse_overlap(FORMATS[to].place(target, rule), [source, *folders])
    with Progress(None, unit="images", label=f"{name} to {to}") as progress:
        seen = _Seen(progress)
        items: Iterable[Item] = read_items(source, selection=rule, source=name)
        if FORMATS[to].needs_pixels or sizes is not None:
            items = with_pixels(items, sizes, needed=FORMATS[to].needs_pixels)
        watched = _not_in_vain(seen.watch(items), seen, source, name)
        box_ids = box_ids_of(folders) if name == "lmdb" else {}
        if FORMATS[to].write is None:
            return _to_ours(target, watched, seen, (name, source, folders), settings, sources, box_ids, overwrite)
        return _to_others(target, watched, seen, (name, to), rule, settings, sources, box_ids, overwrite)


def _to_ours(
    target: Path,
    items: Iterator[Item],
    seen: _Seen,
    origin: tuple[str, Path, Sequence[Path]],
    settings: Mapping[str, Any],
    sources: Mapping[str, Path],
    box_ids: Mapping[str, Sequence[Any]],
    overwrite: bool,
) -> ConvertReport:
    name, source, folders = origin
    handed_on = [row for folder in folders for row in read_failures(folder / "failures.jsonl")] if name == "lmdb" else []
    records = Encoded(items)
    written = write_regions(
        target,
        records,
        settings=settings,
        sources=sources,
        header=lambda: {
            **{**records.widths, **seen.header(), **_origin(source)},
            "converted_from": name,
            "lacks": seen.lacks(FORMATS["lmdb"].holds),
        },
        failures=handed_on,
        box_ids=box_ids,
        overwrite=overwrite,
    )
    failed_before = {row["key"] for row in handed_on}
    skipped = [row for row in written.failures if row["key"] not in failed_before]
    labels, lacks = written.header["label_classes"] > 0, str(written.header.get("lacks", ""))
    return ConvertReport(name, "lmdb", written.images, written.regions, skipped, labels, lacks, written.already_complete)


def _to_others(
    target: Path,
    items: Iterator[Item],
    seen: _Seen,
    formats: tuple[str, str],
    rule: Selection,
    settings: Mapping[str, Any],
    sources: Mapping[str, Path],
    box_ids: Mapping[str, Any],
    overwrite: bool,
) -> ConvertReport:
    name, to = formats
    form = FORMATS[to]
    assert form.write is not None
    place = form.place(target, rule)
    note = may_replace(place, {**settings, "format": to}, sources=sources, overwrite=overwrite)
    if note is None:
        return ConvertReport(**{**read_json_object(note_of(place))[REPORT], "already_complete": True})
    try:
        if not place.exists() and place == target and to not in ("npz", "npy"):
            place.parent.mkdir(parents=True, exist_ok=True)
            write_note(place, note)
        form.write(target, _good(items, seen, target), rule, note, seen.skip)
        lacks = seen.lacks(form.holds)
        if box_ids:
            lacks = "the ids of given boxes" if lacks == "nothing" else f"{lacks}, the ids of given boxes"
        labels = seen.label_columns > 0 and "soft labels" in form.holds
        report = ConvertReport(name, to, seen.images, seen.regions, seen.skipped, labels, lacks)
        write_note(place, note, asdict(report))
        return report
    except UniterError:
        if not place.exists():
            note_of(place).unlink(missing_ok=True)
        raise
    except OSError as error:
        raise UniterError(f"writing {target} failed ({error.strerror or error}); make room and run the same command again") from None


class Encoded:
    """Items as records of our database: an image that comes twice, or is wider than the first, says so instead.

    Attributes:
        widths: of the first image, as the header says them.
    """

    def __init__(self, items: Iterable[Item]) -> None:
        self._items = items
        self.widths: dict[str, int] = {"feature_width": 0, "label_classes": 0}

    def __iter__(self) -> Iterator[Record]:
        seen: set[int] = set()
        for key, regions in self._items:
            digest = hash_key(key.encode(errors="surrogatepass"))
            twice = digest in seen
            seen.add(digest)
            if isinstance(regions, BadInput):
                yield key, regions, 0
                continue
            labels = 0 if regions.soft_labels is None else regions.soft_labels.shape[1]
            found = {"feature_width": regions.features.shape[1], "label_classes": labels}
            if not self.widths["feature_width"]:
                self.widths = found
            try:
                if twice:
                    raise BadInput(f"image {key!r} comes twice; the first one was taken")
                if found != self.widths:
                    raise BadInput(
                        f"image {key!r}: features and soft labels are {found['feature_width']} and {labels} wide, "
                        f"the first image's {self.widths['feature_width']} and {self.widths['label_classes']}"
                    )
                checked_key(key)
                yield key, encode_record(regions, key=key), len(regions)
            except BadInput as error:
                yield key, error, 0


def _not_in_vain(items: Iterator[Item], seen: _Seen, source: Path, name: str) -> Iterator[Item]:
    """The same items; but BadInput, before anything is written, if there is not one good among them."""
    broken = []
    for item in items:
        broken.append(item)
        if not isinstance(item[1], BadInput):
            return itertools.chain(broken, items)
    reason = f": {seen.skipped[0]['error']}" if seen.skipped else ""
    raise BadInput(f"{source} ({name}) holds no image that could be converted{reason}")


def _good(items: Iterable[Item], seen: _Seen, target: Path) -> Iterator[tuple[str, RegionFeatures]]:
    """The images among the items; but BadInput at the end, while nothing of the target has its name yet, if none could be written."""
    yield from ((key, regions) for key, regions in items if not isinstance(regions, BadInput))
    if not seen.images:
        raise BadInput(f"no image could be written to {target}: {seen.skipped[-1]['error']}")


def _origin(source: Path) -> dict[str, Any]:
    """What a database of ours says of its detector, to be kept through a conversion."""
    header_path = source / "header.json"
    if not header_path.exists():
        return {}
    header = read_json(header_path)
    return {name: header[name] for name in _KEPT if name in header} if isinstance(header, dict) else {}


_KEPT: Final = (
    "detector",
    "detector_settings",
    "weights",
    "weights_sha256",
    "box_kind",
    "selection",
    "class_names",
    "attribute_names",
    "class_names_from",
)
