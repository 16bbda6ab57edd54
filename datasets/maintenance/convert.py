"""`uniter-db convert`: from any layout to any other. What a layout lacks is said, never invented."""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from uniter.datasets.errors import BadInput, UniterError, WrongUsage
from uniter.datasets.image_db.formats.projects.layout import Known, write_all
from uniter.datasets.image_db.formats.records import ImageSizes, Item, Selection, with_pixels
from uniter.datasets.image_db.formats.table import CAPTIONS, FORMATS, NAMES, SPLITS, Format, format_named, read_items, recognise
from uniter.datasets.image_db.keys import key_maker
from uniter.datasets.image_db.records import encode_record
from uniter.datasets.image_db.regions import RegionFeatures, has_positions
from uniter.datasets.image_db.writing.noted_photographs import NotedPhotographs
from uniter.datasets.image_db.writing.side_files import read_failures
from uniter.datasets.maintenance.copying import Record, box_ids_of, folders_of, refuse_overlap, write_regions
from uniter.datasets.progress import Progress
from uniter.datasets.storage.claims import MADE_BY, NOTE, PROVENANCE, REPORT, may_replace, note_of, source_names, write_note
from uniter.datasets.storage.files import read_json, read_json_object
from uniter.datasets.storage.index_file import hash_key
from uniter.datasets.storage.lmdb_files import checked_key
from uniter.datasets.text_db.captions.by_image import captions_by_image
from uniter.datasets.vocabulary import read_class_names, visual_genome_attributes, visual_genome_objects


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
        said: what was done to images on the way, in words ("cut to their first 36 regions: 12").
    """

    source: str
    target: str
    images: int
    regions: int
    skipped: list[dict[str, Any]]
    soft_labels: bool
    lacks: str
    already_complete: bool = False
    said: list[str] = field(default_factory=list)


class _Seen:
    """Watches the records on their way: counts and what they hold."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.images = self.regions = self.width = self.label_columns = self.attribute_columns = 0
        self.top_object = self.top_attribute = -1
        self.confidences = False
        self.without_boxes = self.without_positions = 0
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
                if not has_positions(regions):
                    self.without_positions += 1
                    self.without_boxes += regions.boxes is None
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
            "boxes": not self.without_boxes and "boxes" in holds,
            "positions": self.without_boxes or not self.without_positions or "boxes" not in holds,
            "soft labels": labels,
            "classes": labels or ("classes" in holds and (self.label_columns > 0 or self.top_object >= 0)),
            "confidences": self.confidences and "confidences" in holds,
        }
        reasons = {
            "soft labels": " (MRC and MRC-KL cannot be trained on it)",
            "boxes": f" (of {self.without_boxes:,} images: the source has none, and a model reads zeros)" if self.without_boxes else "",
            "positions": f" (of {self.without_positions:,} images, whose sizes are not known: pass --images FOLDER)",
        }
        return ", ".join(name + reasons.get(name, "") for name, there in known.items() if not there) or "nothing"

    def header(self, names: Sequence[str] = ()) -> dict[str, Any]:
        """What is known of the classes; `names` are the source's own."""
        if names:
            return {**self.header(), "class_names": list(names), "class_names_from": "the source's own"}
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
    key: str | None = None,
    captions: Path | None = None,
    split: str | None = None,
    class_names: Path | None = None,
    overwrite: bool = False,
) -> ConvertReport:
    """Convert region features from one format to another.

    Args:
        source: a file or folder; its format is recognised unless `source_format` names it.
        target: the file or folder to write.
        to: a name in `FORMATS`, hyphens and underscores alike.
        selection: which rows of sources with candidates are taken (docker's npz, UNITER's `all`).
        images: a folder of pictures; gives sizes to formats that need pixels.
        key: how the images are called in the target, made from their keys (`keys.key_rule`).
        captions: a file of captions or a text database, for layouts that hold captions.
        split: the part of the data that all images are of, for layouts that have parts.
        class_names: a file with the names of the source's classes, one a line, for sources that number them only.
        overwrite: replace what is at `target`.

    Raises:
        BadInput: unknown format, unreadable source, or not one image could be converted.
    """
    to = format_named(to)
    name = format_named(source_format) if source_format else recognise(source)
    rule = selection or Selection()
    if target.exists() and target.resolve() == source.resolve():
        raise BadInput(f"{target} is both source and target")
    _refuse_pointless(to, captions, split, class_names)
    sizes = ImageSizes(images) if images is not None else None
    folders = folders_of(source) if name == "lmdb" else [source]
    beside = {"images": images, "captions": captions, "class_names": class_names}
    sources = source_names(folders) | {what: path for what, path in beside.items() if path is not None}
    settings = _settings(source, name, rule, images) | {what: said for what, said in (("key", key), ("split", split)) if said is not None}
    refuse_overlap(FORMATS[to].place(target, rule), [source, *folders])
    told = None if captions is None else captions_by_image(captions)
    known = Known(class_names=_names_of(source, name, class_names), captions=told, split=split)
    with Progress(None, unit="images", label=f"{name} to {to}") as progress:
        seen = _Seen(progress)
        items: Iterable[Item] = read_items(source, selection=rule, source=name, known=known)
        if class_names is not None:
            items = _as_many_classes(items, class_names, len(known.class_names))
        if FORMATS[to].needs_pixels or sizes is not None:
            items = with_pixels(items, sizes, needed=FORMATS[to].needs_pixels)
        box_ids = box_ids_of(folders) if name == "lmdb" else {}
        if key is not None:
            items = _renamed(items, key_maker(key), known.renamed if _asks_for_old_names(name, FORMATS[to]) else None)
            box_ids = dict(_renamed_ids(box_ids, key_maker(key)))
        watched = _not_in_vain(seen.watch(items), seen, source, name)
        if FORMATS[to].write is None:
            return _to_ours(target, watched, seen, (name, source, folders), settings, sources, box_ids, overwrite, known)
        return _to_others(target, watched, seen, (name, to, source), rule, settings, sources, box_ids, overwrite, known)


def _settings(source: Path, name: str, rule: Selection, images: Path | None) -> dict[str, Any]:
    """What every conversion remembers; what is said beyond that is remembered only where it is, since older databases do not know it."""
    told = {"made_by": MADE_BY, "source": source.name, "source_format": name}
    return {**told, "selection": asdict(rule), "images": None if images is None else images.name}


def _refuse_pointless(to: str, captions: Path | None, split: str | None, class_names: Path | None) -> None:
    options = ((captions, CAPTIONS, "--captions"), (split, SPLITS, "--split"), (class_names, NAMES, "--class-names"))
    for given, what, option in options:
        if given is not None and what not in FORMATS[to].takes:
            raise WrongUsage(f"{option} has no meaning here, since {to} holds no {what}")


def _asks_for_old_names(source: str, target: Format) -> bool:
    """Whether somebody looks up what images were called: a layout's captions and parts, or photographs' checksums, ours to ours."""
    return target.layout is not None or (source == "lmdb" and target.write is None)


def _renamed(items: Iterable[Item], make: Callable[[str], str], renamed: dict[str, str] | None) -> Iterator[Item]:
    """The items under the keys that `--key` makes; `renamed` takes up what they were called."""
    for key, regions in items:
        try:
            called = make(key.removesuffix(".npz"))
        except BadInput as error:
            yield key, regions if isinstance(regions, BadInput) else error
            continue
        if renamed is not None and not isinstance(regions, BadInput):
            renamed.setdefault(called, key)  # of two that would be called so the first is taken
        yield called, regions


def _renamed_ids(box_ids: Mapping[str, list[Any]], make: Callable[[str], str]) -> Iterator[tuple[str, list[Any]]]:
    """The ids of given boxes under the keys that `--key` makes; those of images that get none go with them."""
    for key, ids in box_ids.items():
        with contextlib.suppress(BadInput):
            yield make(key.removesuffix(".npz")), ids


def _names_of(source: Path, name: str, given: Path | None) -> list[str]:
    """The names of the classes that a database of ours knows, or those of the file `given`.

    Raises:
        BadInput: both are there, or the file is no list of names.
    """
    ours = name == "lmdb" and source.is_dir()
    names = provenance_of(source).get("class_names") if ours or given is not None else None
    if given is None:
        return [str(one) for one in names] if ours and isinstance(names, list) else []
    if names:
        raise BadInput(f"--class-names has no meaning here, since {source} names its {len(names):,} classes itself")
    return list(read_class_names(given))


def _as_many_classes(items: Iterable[Item], given: Path, count: int) -> Iterator[Item]:
    """The items, whose classes are as many as the names of `given`.

    Raises:
        BadInput: there are more or, where it shows, fewer; then the names are another detector's.
    """
    for key, regions in items:
        if not isinstance(regions, BadInput):
            labels, best = regions.soft_labels, regions.object_ids
            classes = labels.shape[1] - 1 if labels is not None else 1 + int(best.max(initial=-1)) if best is not None else 0
            if classes > count or (labels is not None and classes != count):
                shown = "" if labels is not None else "at least "
                raise BadInput(f"image {key!r} knows {shown}{classes:,} classes, {given} names {count:,}; take the names of its detector")
        yield key, regions


def _to_ours(
    target: Path,
    items: Iterator[Item],
    seen: _Seen,
    origin: tuple[str, Path, Sequence[Path]],
    settings: Mapping[str, Any],
    sources: Mapping[str, Path],
    box_ids: Mapping[str, Sequence[Any]],
    overwrite: bool,
    known: Known,
) -> ConvertReport:
    name, source, folders = origin
    handed_on = [row for folder in folders for row in read_failures(folder / "failures.jsonl")] if name == "lmdb" else []
    photographs = NotedPhotographs(folders if name == "lmdb" else ())
    records = Encoded(items)
    given = sources.get("class_names")
    named = {"class_names": list(known.class_names), "class_names_from": f"given: {given.name}"} if given is not None else {}
    written = write_regions(
        target,
        records,
        settings=settings,
        sources=sources,
        header=lambda: {
            **{**records.widths, **seen.header(known.class_names), **provenance_of(source), **named},
            "converted_from": name,
            "lacks": seen.lacks(FORMATS["lmdb"].holds),
        },
        failures=handed_on,
        box_ids=box_ids,
        photographs=lambda key: photographs.of(known.renamed.pop(key, key)),
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
    formats: tuple[str, str, Path],
    rule: Selection,
    settings: Mapping[str, Any],
    sources: Mapping[str, Path],
    box_ids: Mapping[str, Any],
    overwrite: bool,
    known: Known,
) -> ConvertReport:
    name, to, source = formats
    form = FORMATS[to]
    assert form.write is not None
    place = form.place(target, rule)
    note = may_replace(place, {**settings, "format": to}, sources=sources, overwrite=overwrite)
    if note is None:
        return ConvertReport(**{**read_json_object(note_of(place))[REPORT], "already_complete": True})
    note |= {PROVENANCE: {**provenance_of(source), "software": f"uniter-toolkit {version('uniter-toolkit')}"}}
    try:
        if not place.exists() and place == target and not _is_folder(form, to):
            place.parent.mkdir(parents=True, exist_ok=True)
            write_note(place, note)
        if form.layout is not None:
            write_all(form.layout, target, _good(items, seen, target), known, note, seen.skip)
        else:
            form.write(target, _good(items, seen, target), rule, note, seen.skip)
        lacks = seen.lacks(form.holds)
        if box_ids:
            lacks = "the ids of given boxes" if lacks == "nothing" else f"{lacks}, the ids of given boxes"
        labels = seen.label_columns > 0 and "soft labels" in form.holds
        said = [f"{what}: {count:,}" for what, count in known.said.items()]
        report = ConvertReport(name, to, seen.images, seen.regions, seen.skipped, labels, lacks, said=said)
        write_note(place, note, asdict(report))
        return report
    except UniterError:
        if not place.exists():
            note_of(place).unlink(missing_ok=True)
        raise
    except OSError as error:
        raise UniterError(f"writing {target} failed ({error.strerror or error}); make room and run the same command again") from None


def _is_folder(form: Format, name: str) -> bool:
    """Whether the note of a layout lies in a folder, which appears with it."""
    return form.layout is not None or name in ("npz", "npy")


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


def provenance_of(source: Path) -> dict[str, Any]:
    """What is known of the detector that made a source, to be kept through a conversion: a database of ours says it in its header, a layout
    that was converted in the note beside it.
    """
    header_path, note = source / "header.json", note_of(source)
    if not header_path.exists() and not note.is_file():
        notes = sorted(source.glob(f"*/{NOTE}")) if source.is_dir() else []  # UNITER's folders have it inside
        if len(notes) != 1:
            return {}
        note = notes[0]
    header = read_json(header_path) if header_path.exists() else read_json_object(note).get(PROVENANCE)
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
