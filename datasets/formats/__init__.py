"""Other people's feature files: one table, each row with a way in and a way out, so that every pair composes.

`convert` is the whole of `uniter-db convert`. A record keeps what both formats hold; what a format lacks is said, never
invented: Caffe's TSV has no confidences, only UNITER's formats have soft labels (MRC-KL needs them).
"""

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from uniter.datasets.errors import BadInput, UniterError, unknown_name
from uniter.datasets.formats import hdf5, lmdbs, npz, tsv
from uniter.datasets.formats.records import ImageSizes, Item, Selection, Skip, with_pixels
from uniter.datasets.image_db import kind_of
from uniter.datasets.lmdb_store import read_box_ids, read_json
from uniter.datasets.progress import Progress
from uniter.datasets.regions import RegionFeatures
from uniter.datasets.vocabulary import visual_genome_attributes, visual_genome_objects

__all__ = ["FORMATS", "ConvertReport", "Format", "ImageSizes", "Selection", "convert", "read_items", "recognise"]
logger = logging.getLogger(__name__)
_Records = Iterable[tuple[str, RegionFeatures]]


@dataclass(frozen=True)
class Format:
    """One row of the table.

    Attributes:
        means: in words.
        read: (path, selection) -> items; a broken image is an item, a broken file an exception.
        write: (path, records, selection, overwrite, skip); None for our own database, which `convert` writes itself (it alone can be
            resumed).
        needs_pixels: whether writing needs the size of each image.
        holds: which of "soft labels", "classes" (best ones, apart from soft labels), "confidences" the format has room for.
    """

    means: str
    read: Callable[[Path, Selection], Iterator[Item]]
    write: Callable[[Path, _Records, Selection, bool, Skip], None] | None
    needs_pixels: bool
    holds: tuple[str, ...]


def _whole(read: Callable[[Path], Iterator[Item]]) -> Callable[[Path, Selection], Iterator[Item]]:
    """A reader whose source holds the chosen rows only."""
    return lambda path, _: read(path)


class _Write(Protocol):
    def __call__(self, path: Path, items: _Records, *, skip: Skip) -> None: ...


def _plainly(write: _Write) -> Callable[[Path, _Records, Selection, bool, Skip], None]:
    """A writer to which the selection makes no difference, and that replaces what is there."""
    return lambda path, records, _, __, skip: write(path, records, skip=skip)


def _write_uniter(path: Path, records: _Records, selection: Selection, overwrite: bool, skip: Skip) -> None:
    lmdbs.write_uniter(path, records, selection=selection, overwrite=overwrite, skip=skip)


def _write_uniter_compressed(path: Path, records: _Records, selection: Selection, overwrite: bool, skip: Skip) -> None:
    lmdbs.write_uniter(path, records, selection=selection, compressed=True, overwrite=overwrite, skip=skip)


_LABELS: Final = ("soft labels", "classes", "confidences")
_NO_IDS: Final = ("soft labels", "confidences")

FORMATS: Final[dict[str, Format]] = {
    "lmdb": Format("this project's region database", lmdbs.read, None, False, _LABELS),
    "uniter": Format("UNITER's LMDB with its nbb JSON", lmdbs.read, _write_uniter, False, _NO_IDS),
    "uniter-compressed": Format("the same with npz values", lmdbs.read, _write_uniter_compressed, False, _NO_IDS),
    "npz": Format("a folder of .npz files, as UNITER's docker writes them", npz.read, _plainly(npz.write), False, _NO_IDS),
    "butd-tsv": Format("Caffe's TSV", _whole(tsv.read_caffe), _plainly(tsv.write_caffe), True, ()),
    "lxmert-tsv": Format("LXMERT's TSV", _whole(tsv.read_lxmert), _plainly(tsv.write_lxmert), True, _LABELS[1:]),
    "hdf5": Format("adaptive HDF5", _whole(hdf5.read), _plainly(hdf5.write_adaptive), True, ()),
    "hdf5-36": Format("fixed HDF5", _whole(hdf5.read), _plainly(hdf5.write_fixed), True, ()),
    "hdf5-volta": Format("VOLTA's HDF5", _whole(hdf5.read), _plainly(hdf5.write_volta), True, _LABELS[1:]),
}


def recognise(path: Path) -> str:
    """The name in `FORMATS` of what lies at `path`, by its content.

    Raises:
        BadInput: nothing is there, or nothing known.
    """
    if not path.exists():
        raise BadInput(f"{path} does not exist")
    if path.is_dir():
        kind = kind_of(path)
        if kind in ("complete", "unfinished", "folder"):
            return "lmdb"
        if kind in ("published", "split"):
            return "uniter"
        if next(path.rglob("*.npz"), None) is not None:
            return "npz"
        raise BadInput(f"{path} holds neither a database nor .npz files; known formats: {', '.join(FORMATS)}")
    with open(path, "rb") as file:
        lines = [file.readline(1 << 28) for _ in range(4)]
    head = lines[0]
    if head.startswith(b"\x89HDF\r\n"):
        return hdf5.kind_of(path)
    if head.startswith(b"PK\x03\x04"):
        return "npz"
    for line in lines:  # the first one may be broken
        for name, expected in (("butd-tsv", tsv.CAFFE_COLUMNS), ("lxmert-tsv", tsv.LXMERT_COLUMNS)):
            if line.count(b"\t") + 1 == len(expected):
                return name
    columns = head.count(b"\t") + 1
    raise BadInput(f"{path} is of no known format (its first line has {columns} columns; known formats: {', '.join(FORMATS)})")


def read_items(path: Path, *, selection: Selection | None = None, source: str | None = None) -> Iterator[Item]:
    """Every image of a file or folder in any format: (key, regions), or (key, BadInput) where an image is broken."""
    name = source or recognise(path)
    if name not in FORMATS:
        raise BadInput(unknown_name("format", name, FORMATS))
    return FORMATS[name].read(path, selection or Selection())


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
