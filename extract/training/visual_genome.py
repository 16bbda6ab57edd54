"""Visual Genome as it is published: objects.json, attributes.json and image_data.json, streamed, in Bottom-Up-Attention's words and parts.

What people get wrong: an object's first name alone counts; adjectives before it ("small red car") are its attributes; several spellings
are one class; "black and white" is one attribute and every other "and" separates two. Which images are trained on decides whether the
detector has seen COCO's test images: only the published lists say it.

Source: peteanderson80/bottom-up-attention, `data/genome/setup_vg.py`, `create_splits.py` and `lib/datasets/vg.py`.
"""

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from uniter.datasets.errors import BadInput, WrongUsage, unknown_name
from uniter.datasets.storage.files import sha256_of
from uniter.datasets.storage.streams import json_items
from uniter.extract.training.labelled_images import LabelledImage, LabelledImages, Skipped, Words, image_entry, labelled_image, parts_of

log = logging.getLogger(__name__)

PUBLISHED_VOCABULARY = "1600-400-20"


MOST_ATTRIBUTES = 16
"""Of one object, as in the original."""


_COLOURS = ("white", "black", "blue", "green", "red", "brown", "yellow", "silver", "orange", "gray", "grey", "pink", "dark")
COMMON_ATTRIBUTES = frozenset((*_COLOURS, "small", "large", "wooden", "metal", "tall", "long"))
"""Where all words before the last are among them, they are attributes of it."""


PARTS = ("train.txt", "val.txt")


@dataclass(frozen=True, slots=True, kw_only=True)
class VisualGenomeFiles:
    """What is read of Visual Genome.

    Attributes:
        attributes: attributes.json; None: none are learnt.
        image_data: image_data.json, by which images are found and their sizes checked; None: an image is `ID.jpg` in the folder, or in
            `VG_100K` or `VG_100K_2` in it.
        vocabulary: "1600-400-20", or a folder with objects_vocab.txt and attributes_vocab.txt.
        split: a folder with Bottom-Up-Attention's train.txt and val.txt; None: images are held out by chance.
    """

    attributes: Path | None = None
    image_data: Path | None = None
    vocabulary: str = PUBLISHED_VOCABULARY
    split: Path | None = None

    def all(self) -> list[Path]:
        """The files that are read."""
        named = [self.attributes, self.image_data, *([self.split / part for part in PARTS] if self.split else [])]
        folder = [Path(self.vocabulary) / name for name in VOCABULARY_FILES] if self.vocabulary != PUBLISHED_VOCABULARY else []
        return [path for path in named if path is not None] + folder

    def settings(self) -> dict[str, Any]:
        """What decides the weights, by content."""
        return {"vocabulary": Path(self.vocabulary).name, "visual_genome_sha256": {path.name: sha256_of(path) for path in self.all()}}


VOCABULARY_FILES = ("objects_vocab.txt", "attributes_vocab.txt")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Names by number, and numbers by every spelling, lower case."""

    names: tuple[str, ...]
    numbers: Mapping[str, int]


def read_vocabulary(name: str) -> tuple[Vocabulary, Vocabulary]:
    """The vocabularies of objects and attributes: a name a line, its other spellings after commas, the last line that has one counting.

    Raises:
        BadInput: there is no such vocabulary.
    """
    if name == PUBLISHED_VOCABULARY:
        package = files("uniter.datasets.vocabulary")
        texts = [(package / f"visual_genome_{kind}.txt").read_text(encoding="utf-8") for kind in ("objects", "attributes")]
    else:
        folder = Path(name)
        if not folder.is_dir():
            hint = unknown_name("vocabulary", name, [PUBLISHED_VOCABULARY])
            raise WrongUsage(f"{hint}; a folder with {' and '.join(VOCABULARY_FILES)} does as well")
        try:
            texts = [(folder / file).read_text(encoding="utf-8") for file in VOCABULARY_FILES]
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"{folder}: {error}; expected {' and '.join(VOCABULARY_FILES)} in it, a name a line") from error
    objects, attributes = (_vocabulary(text) for text in texts)
    if not objects.names:
        raise BadInput(f"{name}: objects_vocab.txt holds no names; expected a name a line")
    return objects, attributes


def _vocabulary(text: str) -> Vocabulary:
    lines = [[spelling.lower().strip() for spelling in line.split(",")] for line in text.splitlines() if line.strip()]
    numbers = {spelling: number for number, spellings in enumerate(lines) for spelling in spellings if spelling}
    return Vocabulary(tuple(spellings[0] for spellings in lines), numbers)


# Words


def object_words(name: str) -> tuple[str, list[str]]:
    """The object and the attributes that its name holds: "Small red car." to "car" and ["small", "red"]."""
    name = clean(name)
    *before, last = name.split() or [""]
    if before and all(word in COMMON_ATTRIBUTES for word in before):
        return last, before
    return name, []


def attribute_words(stated: str) -> list[str]:
    """The attributes that a text holds: "red and shiny" to ["red", "shiny"]."""
    stated = clean(stated)
    return [stated] if stated == "black and white" else [word.strip() for word in stated.split(" and ")]


def clean(text: str) -> str:
    """Lower case, without white space around it, nor one full stop at its end."""
    return text.lower().strip().removesuffix(".").strip()


# Reading


def read_visual_genome(images: Path, objects: Path, chosen: VisualGenomeFiles) -> LabelledImages:
    """Read objects.json and what belongs to it, an image at a time, and look at the photographs (their headers only).

    Objects whose name is not in the vocabulary are left out without being counted: that is what a vocabulary is for. Whatever else cannot
    be used is left out, counted by reason and said.

    Args:
        images: the folder in which `VG_100K` and `VG_100K_2`, or the photographs themselves, lie.
        objects: objects.json.
        chosen: the other files.

    Raises:
        BadInput: a file is damaged or of another layout, or nothing of it can be used.
    """
    names, attribute_names = read_vocabulary(chosen.vocabulary)
    skipped = Skipped(objects)
    entries = _image_entries(images, chosen.image_data)
    stated = _Joined(chosen.attributes, attribute_names, skipped)
    words = Words({number: number for number in range(len(names.names))}, {}, {n: n for n in range(len(attribute_names.names))}, {})
    found: dict[int, LabelledImage] = {}
    listed = 0
    for row in _rows(objects, "objects", skipped):
        listed += 1
        image_id = row["image_id"]
        extra = stated.of(image_id)
        entry = entries.get(image_id) if chosen.image_data is not None else _by_number(images, image_id)
        if entry is None:
            skipped.add(
                "an image that image_data.json does not list" if chosen.image_data else "an image whose file is missing", str(image_id)
            )
            continue
        placed = image_entry(entry, images, found, skipped)
        if placed is None:
            continue
        annotations = [one for thing in row["objects"] if (one := _annotation(thing, extra, names, attribute_names, skipped)) is not None]
        found[image_id] = labelled_image(image_id, placed[1], placed[2], annotations, words, skipped)
    if not any(len(image.boxes) for image in found.values()):
        reasons = (
            "; ".join(f"{reason}: {count}" for reason, count in skipped.counts.items()) or f"{listed} images, none with a known object"
        )
        raise BadInput(
            f"{objects}: nothing of it can be used ({reasons}); is it Visual Genome's objects.json, and are its images in {images}?"
        )
    learnt = attribute_names.names if chosen.attributes is not None else ()
    numbers = tuple(range(1, len(names.names) + 1))
    return LabelledImages(list(found.values()), names.names, numbers, learnt, dict(skipped.counts), as_visual_genome=True)


def visual_genome_parts(
    labelled: LabelledImages, images: Path, chosen: VisualGenomeFiles, *, held_out: float, seed: int
) -> tuple[LabelledImages, LabelledImages, dict[str, int]]:
    """The images to train on, those held out, and what was left out; by the published lists, or, where none are named, by chance.

    Raises:
        BadInput: a list cannot be read, or none of its images is here.
    """
    if chosen.split is None:
        log.warning(
            "images are held out by chance, not as Bottom-Up-Attention did: the detector will have seen images of COCO's validation and "
            "test parts. Its lists (data/genome/train.txt and val.txt of peteanderson80/bottom-up-attention) do better: --split FOLDER"
        )  # fmt: skip
        return parts_of(labelled, images, None, held_out=held_out, seed=seed)
    train_ids, val_ids = (_listed(chosen.split / part) for part in PARTS)
    if both := train_ids & val_ids:
        raise BadInput(f"{chosen.split}: {len(both):,} images are in both lists (first: {min(both)}); expected each in one")
    train = [image for image in labelled.images if image.id in train_ids and len(image.boxes)]
    val = [image for image in labelled.images if image.id in val_ids and len(image.boxes)]
    skipped = dict(labelled.skipped)
    for reason, count in (
        ("an image of neither list (the test part)", sum(image.id not in train_ids | val_ids for image in labelled.images)),
        ("an image without a known object", sum(image.id in train_ids | val_ids and not len(image.boxes) for image in labelled.images)),
    ):
        if count:
            skipped[reason] = count
    for part, members in (("train.txt", train), ("val.txt", val)):
        if not members:
            raise BadInput(f"{chosen.split / part}: none of its images can be used here; do lists and images belong together?")
    return replace(labelled, images=train, skipped={}), replace(labelled, images=val, skipped={}), skipped


def _listed(path: Path) -> set[int]:
    """Image numbers of a list such as "VG_100K_2/2387.jpg xml/2387.xml" a line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: {error}; expected one of Bottom-Up-Attention's lists") from error
    numbers = set()
    for number, line in enumerate(lines, start=1):
        if line.strip():
            match = re.fullmatch(r"(?:\S*/)?(\d{1,9})\.jpg(?:\s+\S+)?", line.strip())
            if match is None:
                raise BadInput(f"{path}, line {number}: {line[:60]!r}; expected an image such as VG_100K_2/2387.jpg")
            numbers.add(int(match[1]))
    return numbers


def _rows(path: Path, key: str, skipped: Skipped) -> Iterator[dict[str, Any]]:
    """The images of objects.json or attributes.json, each with `image_id` and a list under `key`."""
    seen = False
    for row in json_items(path, "item"):
        seen = True
        image_id = row.get("image_id", row.get("id")) if isinstance(row, dict) else None
        if type(image_id) is not int or not isinstance(row.get(key), list):
            skipped.add(f"an entry of {path.name} without image_id and {key}", str(row)[:80])
            continue
        yield {"image_id": image_id, key: row[key]}
    if not seen:
        raise BadInput(f"{path}: no list of images; expected Visual Genome's {key}.json, a list of {{image_id, {key}}}")


class _Joined:
    """The attributes of each image's objects: both files name images in the same order, so that what is read ahead stays little."""

    def __init__(self, path: Path | None, vocabulary: Vocabulary, skipped: Skipped) -> None:
        self._rows = iter(()) if path is None else _rows(path, "attributes", skipped)
        self._vocabulary, self._skipped = vocabulary, skipped
        self._ahead: dict[int, dict[int, list[int]]] = {}

    def of(self, image_id: int) -> dict[int, list[int]]:
        """Attribute numbers by object id."""
        while image_id not in self._ahead:
            row = next(self._rows, None)
            if row is None:
                return {}
            by_object = self._ahead.setdefault(row["image_id"], {})
            for thing in row["attributes"]:
                if isinstance(thing, dict) and type(thing.get("object_id")) is int:
                    texts = thing.get("attributes", [])
                    by_object.setdefault(thing["object_id"], []).extend(
                        _numbers(texts if isinstance(texts, list) else [], self._vocabulary)
                    )
                else:
                    self._skipped.add("an attribute entry without object_id", str(thing)[:80])
        return self._ahead.pop(image_id)


def _numbers(texts: list[Any], vocabulary: Vocabulary) -> list[int]:
    words = [word for text in texts if isinstance(text, str) for word in attribute_words(text)]
    return [vocabulary.numbers[word] for word in words if word in vocabulary.numbers]


def _annotation(
    thing: Any, stated: Mapping[int, list[int]], names: Vocabulary, attribute_names: Vocabulary, skipped: Skipped
) -> dict[str, Any] | None:
    """An object as one of COCO's annotations; None where its name is not in the vocabulary."""
    spellings = thing.get("names") if isinstance(thing, dict) else None
    if not isinstance(spellings, list) or not spellings or not isinstance(spellings[0], str):
        skipped.add("an object without names", str(thing)[:80])
        return None
    name, adjectives = object_words(spellings[0])
    if name not in names.numbers:
        return None
    numbers = [*_numbers(adjectives, attribute_names), *stated.get(thing.get("object_id"), ())]
    return {
        "id": thing.get("object_id"), "category_id": names.numbers[name], "bbox": [thing.get(side) for side in ("x", "y", "w", "h")],
        "attributes": list(dict.fromkeys(numbers))[:MOST_ATTRIBUTES],
    }  # fmt: skip


def _image_entries(images: Path, image_data: Path | None) -> dict[int, dict[str, Any]]:
    """COCO's image entries by number; empty without image_data.json."""
    entries: dict[int, dict[str, Any]] = {}
    if image_data is None:
        return entries
    folders = {path.name for path in images.iterdir() if path.is_dir()}
    for row in json_items(image_data, "item"):
        image_id = row.get("image_id", row.get("id")) if isinstance(row, dict) else None
        url = row.get("url") if isinstance(row, dict) else None
        if type(image_id) is not int or not isinstance(url, str):
            raise BadInput(
                f"{image_data}: {str(row)[:80]} is no {{image_id, url, width, height}}; expected Visual Genome's image_data.json"
            )
        folder, name = ["", *url.split("/")][-2:]
        sizes = {side: row[side] for side in ("width", "height") if side in row}
        entries[image_id] = {"id": image_id, "file_name": f"{folder}/{name}" if folder in folders else name, **sizes}
    if not entries:
        raise BadInput(f"{image_data}: no list of images; expected Visual Genome's image_data.json")
    return entries


def _by_number(images: Path, image_id: int) -> dict[str, Any] | None:
    for folder in ("", "VG_100K/", "VG_100K_2/"):
        name = f"{folder}{image_id}.jpg"
        if (images / name).is_file():
            return {"id": image_id, "file_name": name}
    return None
