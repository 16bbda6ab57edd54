"""What all layouts of other projects' code share: a row says what one holds and needs; reading and writing go by it.

What a reader would get wrong: a layout whose files hold no boxes, or pixels without the size of the image, still gives records. Their
`norm_bb` is all zeros, which stands for "not known" (`regions.has_positions`), and the summary says so.
"""

import itertools
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from uniter.datasets.errors import BadInput
from uniter.datasets.image_db.formats.records import MAX_REGIONS, MAX_WIDTH, NO_CLASS, Item, Skip
from uniter.datasets.image_db.regions import RegionFeatures, normalised_boxes, without_positions
from uniter.datasets.storage.claims import NOTE, write_note
from uniter.datasets.storage.files import written_aside
from uniter.datasets.vocabulary import visual_genome_objects

NUMBERS: Final = "numbers as ids"
THIRTY_SIX: Final = "36 regions"
CAPTIONS: Final = "captions"
SPLITS: Final = "splits"
PIXELS: Final = "sizes of the images"
BOXES: Final = "pixel boxes"
NAMES: Final = "class names"


class NeedsMore(BadInput):
    """What a layout needs was not given; no fault of one image."""


@dataclass
class Known:
    """What a conversion knows beside the records.

    Attributes:
        class_names: of the source, by number from 0, without background. A reader of a layout that keeps names adds them as they come.
        captions: (key of an image) -> its captions, in order; None where none were given.
        split: the part of the data that the images are of, if it was said.
        renamed: what the images under way are called in the source, by their new keys.
        said: what was done to images, in words, and to how many.
        numbers: of the class names.
        kept: what readers keep of files beside the features.
    """

    class_names: list[str] = field(default_factory=list)
    captions: Callable[[str], Sequence[str]] | None = None
    split: str | None = None
    renamed: dict[str, str] = field(default_factory=dict)
    said: dict[str, int] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)
    kept: dict[Path, Any] = field(default_factory=dict)

    def say(self, what: str) -> None:
        """Note something that the reader is to be told once, with how often it came."""
        self.said[what] = self.said.get(what, 0) + 1

    def numbers_of(self, names: Sequence[str]) -> NDArray[np.int64]:
        """(N,) class numbers from 0: Visual Genome's where the first image's names are all of them, others in the order they come."""
        if not self.class_names and names and set(names) <= set(visual_genome_objects()):
            self.class_names.extend(visual_genome_objects())
        if not self.numbers:  # of equal names the first one counts
            self.numbers = {name: number for number, name in reversed(list(enumerate(self.class_names)))}
        for name in names:
            if name not in self.numbers:
                if len(self.class_names) >= MAX_WIDTH:
                    raise BadInput(f"there are more than {MAX_WIDTH:,} names of classes")
                self.numbers[name] = len(self.class_names)
                self.class_names.append(name)
        return np.array([self.numbers[name] for name in names], dtype=np.int64)

    def names_of(self, regions: RegionFeatures) -> list[str]:
        """The class name of each region.

        Raises:
            NeedsMore: the classes have no names here.
            BadInput: no class of this image is known.
        """
        best = regions.best_objects()
        if best is None:
            raise BadInput("it has no classes, and this layout names the class of every region")
        names: Sequence[str] = self.class_names
        if (not names and regions.soft_labels is None) or (regions.soft_labels is not None and regions.soft_labels.shape[1] == 1601):
            names = names or visual_genome_objects()  # as the header of a converted database assumes
        if not names or int(best[0].max(initial=0)) >= len(names):
            raise NeedsMore("this layout needs the names of the classes, and the source has none for its numbers; pass --class-names FILE")
        return [names[number] if number >= 0 else "" for number in best[0]]


@dataclass(frozen=True)
class Record:
    """An image that a layout can hold.

    Attributes:
        key, number: as it is called; the number is set where the layout needs one.
        split: the part of the data it is of; "" where the layout has none.
        captions: set where the layout needs them.
    """

    key: str
    regions: RegionFeatures
    number: int = -1
    split: str = ""
    captions: tuple[str, ...] = ()


Put = Callable[[Record], None]


@dataclass(frozen=True)
class Layout:
    """One row.

    Attributes:
        means: whose it is, in words.
        files: what it consists of, patterns below OUT.
        holds: which of a record's fields it keeps.
        rounds: what becomes less exact.
        needs: what has to be known of every image.
        fits: whether some files that lie at a path look like it; asked in the order of the rows.
        sources: the files of it at a path, each of which `read` takes.
        read: (file, its path below the folder that was named) -> items; a broken file is an exception.
        write: (folder, what is known) -> something to put records into, one after another; at the end of the context all is on disk.
        most: regions that an image may have; others are cut.
        pickled: which of its files are, or hold, pickles, since its own readers take nothing else.
        takes: what of `CAPTIONS` and `SPLITS` it has room for without needing it.
        parts: how the splits that keys name, and COCO's, are called there.
    """

    means: str
    files: tuple[str, ...]
    holds: tuple[str, ...]
    needs: tuple[str, ...]
    fits: Callable[[Sequence[Path]], bool]
    sources: Callable[[Path], list[Path]]
    read: Callable[[Path, str, Known], Iterator[Item]]
    write: Callable[[Path, Known], AbstractContextManager[Put]]
    rounds: str = ""
    most: int = MAX_REGIONS
    parts: Mapping[str, str] = field(default_factory=dict)
    takes: tuple[str, ...] = ()
    pickled: str = ""


# ------------------------------------------------------------------------------------------------------------------- reading


def read_all(layout: Layout, path: Path, known: Known) -> Iterator[Item]:
    """The items of all files of a layout at a path. An image that several files hold alike is given once."""
    sources = layout.sources(path)
    if not sources:
        raise BadInput(f"{path} holds nothing of {layout.means} (expected {', '.join(layout.files)})")
    met: dict[str, int] = {}
    for source in sources:
        for key, regions in layout.read(source, source.name if source == path else source.relative_to(path).as_posix(), known):
            if len(sources) > 1 and not isinstance(regions, BadInput):
                digest = zlib.crc32(np.ascontiguousarray(regions.features, dtype=np.float32).data)
                before = met.setdefault(key, -1)
                met[key] = digest
                if before == digest:
                    continue
            yield key, regions


def files_below(*patterns: str) -> Callable[[Path], list[Path]]:
    """`Layout.sources`: the path itself if it is a file, else all files below it whose paths fit one of the patterns, by name."""

    def find(path: Path) -> list[Path]:
        if path.is_file():
            return [path]
        return sorted(file for file in path.rglob("*") if file.is_file() and fits_one(file.relative_to(path).as_posix(), patterns))

    return find


def fits_one(name: str, patterns: Iterable[str]) -> bool:
    """Whether a path in an archive fits one of the patterns, at its top or in any folder."""
    return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"*/{pattern}") for pattern in patterns)


_LOOKED_AT: Final = 64  # files of a folder


def some_files(path: Path) -> list[Path]:
    """The path itself if it is a file, else some of the files below it: enough to tell of which layout it is, however many there are."""
    if path.is_file():
        return [path]
    found: list[Path] = []
    folders = [path]
    while folders and len(found) < 4 * _LOOKED_AT:
        inside = sorted(itertools.islice(folders.pop(0).iterdir(), 16 * _LOOKED_AT))
        found += [one for one in inside if one.is_file()][:_LOOKED_AT]
        folders += [one for one in inside if one.is_dir()][:_LOOKED_AT]
    return found


def attempt(key: str, path: Path, make: Callable[[], RegionFeatures]) -> Item:
    """One image of a file, or why it cannot be read."""
    try:
        return key, make()
    except BadInput as error:
        return key, BadInput(f"image {key!r} in {path}: {error}")
    except OSError as error:
        return key, BadInput(f"image {key!r} in {path} cannot be read ({error})")


def record(
    key: str,
    features: NDArray[Any],
    *,
    boxes: NDArray[Any] | None = None,
    size: tuple[int, int] | None = None,
    fractions: NDArray[Any] | None = None,
    soft_labels: NDArray[Any] | None = None,
    conf: NDArray[Any] | None = None,
    objects: tuple[NDArray[Any], NDArray[Any] | None] | None = None,
    attributes: tuple[NDArray[Any], NDArray[Any] | None] | None = None,
) -> RegionFeatures:
    """The record of what a layout holds of an image.

    Args:
        features: (n, D) numbers.
        boxes: (n, 4) pixels; without `size` and `fractions` the positions are not known.
        fractions: (n, 6), as `RegionFeatures.norm_bb`.
        soft_labels: (n, C) with the background in column 0.
        objects, attributes: (n,) numbers from 0 without background, `NO_CLASS` where none is known, and their probabilities.

    Raises:
        BadInput: shapes that do not fit, or sizes that no image has.
    """
    if features.ndim != 2 or len(features) > MAX_REGIONS or features.shape[1] > MAX_WIDTH or features.dtype.kind not in "fiu":
        raise BadInput(f"features has type {features.dtype} and shape {features.shape}, expected (n, width) numbers")
    if size is not None and not (0 < size[0] < 1 << 24 and 0 < size[1] < 1 << 24):
        raise BadInput(f"its size is {size[1]}x{size[0]}")
    if boxes is not None and boxes.shape != (len(features), 4):
        raise BadInput(f"{'x'.join(map(str, boxes.shape))} numbers of boxes beside {len(features)} feature rows, expected 4 a row")
    positions = fractions
    if positions is None and boxes is not None and size is not None:
        positions = normalised_boxes(boxes, size)
    known = {
        name: pair for name, pair in (("object", objects), ("attribute", attributes)) if pair is not None and (pair[0] != NO_CLASS).any()
    }
    for name, (ids, _) in known.items():
        if not ((ids >= NO_CLASS) & (ids < 1 << 31)).all():
            raise BadInput(f"{name} ids are no class numbers (from {ids.min()} to {ids.max()})")
    object_ids, object_conf = _best(known.get("object"), len(features))
    attribute_ids, attribute_conf = _best(known.get("attribute"), len(features))
    if conf is None:
        conf = np.zeros(len(features), dtype=np.float32) if object_conf is None else object_conf
    regions = RegionFeatures(
        features=features if features.dtype.str in ("<f2", "<f4") else features.astype(np.float32),
        norm_bb=without_positions(len(features)) if positions is None else np.asarray(positions, dtype=np.float32),
        conf=np.asarray(conf, dtype=np.float32),
        boxes=None if boxes is None else np.asarray(boxes, dtype=np.float32),
        size=size,
        soft_labels=soft_labels,
        object_ids=object_ids,
        object_conf=object_conf,
        attribute_ids=attribute_ids,
        attribute_conf=attribute_conf,
    )
    regions.check_shapes(key)
    return regions


def _best(pair: tuple[NDArray[Any], NDArray[Any] | None] | None, count: int) -> tuple[NDArray[np.int64] | None, NDArray[np.float32] | None]:
    if pair is None:
        return None, None
    ids, probabilities = pair
    return ids.astype(np.int64), np.zeros(count, np.float32) if probabilities is None else np.asarray(probabilities, np.float32)


# ------------------------------------------------------------------------------------------------------------------- writing


def write_all(
    layout: Layout, path: Path, records: Iterable[tuple[str, RegionFeatures]], known: Known, note: Mapping[str, Any], skip: Skip
) -> None:
    """Write a folder of a layout; it appears whole, in place of what was there.

    Raises:
        NeedsMore: what the layout needs is not known.
        BadInput: the folder is there and holds something else.
    """
    others = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else []
    for file in others:
        if not fits_one(file.relative_to(path).as_posix(), (*layout.files, NOTE)):
            raise BadInput(f"{path} holds {file.relative_to(path)}, which is no part of this layout; choose another folder, or remove it")
    met: set[str] = set()
    with written_aside(path, large=True) as folder:
        folder.mkdir(parents=True)
        write_note(folder, note)
        with layout.write(folder, known) as put:
            for key, regions in records:
                try:
                    put(_prepared(layout, key, regions, known, met))
                except NeedsMore:
                    raise
                except BadInput as error:
                    skip(key, regions, BadInput(f"image {key!r}: {error}"))


def _prepared(layout: Layout, key: str, regions: RegionFeatures, known: Known, met: set[str]) -> Record:
    """What the row asks for, or why this image cannot be one of the layout."""
    source = known.renamed.pop(key, key)
    if key in met:
        raise BadInput("it comes twice; the first one was taken")
    number = _number(key, layout) if NUMBERS in layout.needs else -1
    if not len(regions):
        raise BadInput("it has no regions")
    if len(regions) > layout.most:
        known.say(f"images cut to their first {layout.most} regions")
        regions = regions.rows(slice(layout.most))
    if THIRTY_SIX in layout.needs and len(regions) != layout.most:
        raise BadInput(
            f"it has {len(regions)} regions, and this layout holds {layout.most} of every image; extract with --num-boxes {layout.most}"
        )
    if PIXELS in layout.needs and regions.size is None:
        raise BadInput("its size in pixels is not known; pass --images FOLDER")
    if {PIXELS, BOXES} & set(layout.needs) and regions.boxes is None:
        raise BadInput("its boxes in pixels are not known; pass --images FOLDER")
    split = _split_of(layout, source, known.split) if SPLITS in (*layout.needs, *layout.takes) else ""
    captions = _captions(layout, source, known) if CAPTIONS in layout.needs or (CAPTIONS in layout.takes and known.captions) else ()
    met.add(key)
    return Record(key, regions, number, split, captions)


def number_at_end(key: str, layout: str) -> int:
    """What layouts read of a name: its last part between underscores, "COCO_train2014_000000000009" -> 9.

    Raises:
        NeedsMore: that is no number.
    """
    last = key.rpartition("_")[2]
    if not (last.isascii() and last.isdigit() and len(last) <= 18):
        raise NeedsMore(f"{layout} reads a number from the end of every name, and {key!r} has none there: pass --key '{{id}}'")
    return int(last)


def _number(key: str, layout: Layout) -> int:
    if not (key.isascii() and key.isdigit() and len(key) <= 18 and str(int(key)) == key):
        raise NeedsMore(f"{layout.means} calls images by numbers, and {key!r} is none: pass --key '{{id}}'")
    return int(key)


_SPLIT: Final = re.compile(r"(?:^|[_/-])((?:train|val|dev|test|minival|restval)(?:20\d\d)?)(?=[_/-]|$)", re.IGNORECASE)


def split_in(key: str) -> str | None:
    """The part of the data that a key names: "COCO_train2014_000000000009" -> "train2014"; None where it names none."""
    found = _SPLIT.search(key)
    return found[1].lower() if found is not None else None


def _split_of(layout: Layout, key: str, said: str | None) -> str:
    """As the layout calls it. What `--split` says is taken as it is, but for COCO's own names, such as val2014."""
    named = said or split_in(key)
    if named is None and SPLITS not in layout.needs:
        return ""
    if named is None:
        raise NeedsMore(f"{layout.means} has a file for each part of the data, and the key {key!r} does not say which: pass --split NAME")
    return named if said is not None and not said[-1:].isdigit() else layout.parts.get(named, named)


def _captions(layout: Layout, key: str, known: Known) -> tuple[str, ...]:
    if known.captions is None:
        raise NeedsMore(f"{layout.means} holds captions beside the regions: pass --captions FILE or a text database")
    return tuple(known.captions(key))


def file_of(folder: Path, key: str, suffix: str) -> Path:
    """The file of an image.

    Raises:
        BadInput: the key can be no file's name.
    """
    file = folder / f"{key}{suffix}"
    if "\0" in key or len(file.name.encode(errors="replace")) > 255 or key != key.encode(errors="replace").decode() or not key:
        raise BadInput("its key can be no file's name")
    if not file.resolve().is_relative_to(folder.resolve()) or key.startswith("/"):
        raise BadInput(f"its key would be written outside {folder.name}")
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


def floats(array: NDArray[Any]) -> NDArray[np.float32]:
    """As every layout stores them: float32, C order."""
    return np.ascontiguousarray(array, dtype="<f4")


def number(value: int) -> NDArray[np.int64]:
    """An array without dimensions, as the readers of sizes want it."""
    return np.array(value, dtype=np.int64)


def confidences(regions: RegionFeatures) -> NDArray[np.float32]:
    """(N,) of the best class where one is known, else of the region."""
    best = regions.best_objects()
    return floats(regions.conf if best is None else best[1])
