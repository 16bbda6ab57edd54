"""`uniter-db convert`: from any layout to any other. What a layout lacks is said, never invented."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from uniter.datasets.errors import BadInput, UniterError, unknown_name
from uniter.datasets.image_db.formats import lmdbs
from uniter.datasets.image_db.formats.records import ImageSizes, Item, Selection, with_pixels
from uniter.datasets.image_db.formats.table import FORMATS, read_items, recognise
from uniter.datasets.image_db.regions import RegionFeatures
from uniter.datasets.image_db.writing.side_files import read_box_ids
from uniter.datasets.progress import Progress
from uniter.datasets.storage.files import read_json
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
    """

    source: str
    target: str
    images: int
    regions: int
    skipped: list[dict[str, Any]]
    soft_labels: bool
    lacks: str


class _Seen:
    """Watches the records on their way: counts and what they hold."""

    def __init__(self) -> None:
        self.images = self.regions = self.width = self.label_columns = self.attribute_columns = 0
        self.top_object = self.top_attribute = -1
        self.confidences = False
        self.skipped: list[dict[str, Any]] = []

    def watch(self, items: Iterable[Item], progress: Progress) -> Iterator[Item]:
        for key, regions in items:
            progress.update()
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
    within = to == "npz" and source.resolve().is_relative_to(target.resolve())
    if target.exists() and (within or target.resolve() == source.resolve()):
        raise BadInput(f"{target} is both source and target")
    sizes = ImageSizes(images) if images is not None else None
    seen = _Seen()
    form = FORMATS[to]
    box_ids: dict[str, list[Any]] = {}
    for folder in (source, *sorted(source.glob("*/"))) if name == "lmdb" else ():  # a database, or a folder of several
        box_ids = {**read_box_ids(folder), **box_ids}
    if form.write is not None and not overwrite and (target.is_file() or (to == "npz" and target.is_dir() and any(target.iterdir()))):
        raise BadInput(f"{target} is there already; choose another name, or --overwrite")
    with Progress(None, unit="images", label=f"{name} to {to}") as progress:
        items: Iterable[Item] = read_items(source, selection=rule, source=name)
        if form.needs_pixels or sizes is not None:
            items = with_pixels(items, sizes, needed=form.needs_pixels)
        watched = _not_in_vain(seen.watch(items, progress), seen, source, name)
        if form.write is None:
            settings: dict[str, Any] = {
                "made_by": "uniter-db convert",
                "source": source.name,
                "source_format": name,
                "selection": asdict(rule),
            }
            settings["images"] = None if images is None else images.name
            origin = _origin(source)

            def header() -> dict[str, Any]:
                return {**seen.header(), **origin, "converted_from": name, "lacks": seen.lacks(form.holds)}

            seen.skipped = lmdbs.write_ours(target, watched, settings=settings, header=header, box_ids=box_ids, overwrite=overwrite)
            written = read_json(target / "header.json")
            return ConvertReport(
                name, to, written["images"], written["regions"], seen.skipped, written["label_classes"] > 0, str(written.get("lacks", ""))
            )
        try:
            form.write(target, _good(watched, seen, target), rule, overwrite, seen.skip)
        except OSError as error:
            raise UniterError(f"writing {target} failed ({error.strerror or error}); make room and run the same command again") from None
    labels = seen.label_columns > 0 and "soft labels" in form.holds
    lacks = seen.lacks(form.holds)
    if box_ids:
        lacks = "the ids of given boxes" if lacks == "nothing" else f"{lacks}, the ids of given boxes"
    return ConvertReport(name, to, seen.images, seen.regions, seen.skipped, labels, lacks)


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
