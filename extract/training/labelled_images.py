"""Photographs with annotated boxes, read from COCO's instances JSON for training a detector.

What people get wrong: COCO writes x, y, width, height and category ids with holes; here boxes are x0 y0 x1 y1 and classes count from 0
in the order of the category ids (Detectron2's). Whatever cannot be used is left out, counted by reason and said, never guessed at.
"""

import logging
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray
from PIL import Image

from uniter.datasets.errors import BadInput
from uniter.datasets.image_db.orientation import is_turned

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class LabelledImage:
    """One photograph and its boxes.

    Attributes:
        id: COCO's image id.
        path: the file.
        size: (height, width) of the upright image in pixels.
        boxes: (N, 4) float32, pixels of the upright image, x0 y0 x1 y1, inside it and not empty.
        classes: (N,) int64, from 0.
        attributes: N tuples of attribute numbers from 0; an empty tuple where a box has none annotated.
        crowd: (N,) bool, COCO's `iscrowd`, or `ignore`: counted in the evaluation as COCO counts crowds; in training left alone, neither
            found nor background.
        soft: (N, C) float32, a distribution over classes in the place of one that is sure (a teacher's), a row of zeros where a box has
            none; None where no box has one.
    """

    id: int
    path: Path
    size: tuple[int, int]
    boxes: NDArray[np.float32]
    classes: NDArray[np.int64]
    attributes: tuple[tuple[int, ...], ...]
    crowd: NDArray[np.bool_]
    soft: NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class LabelledImages:
    """All of one annotation file that can be used.

    Attributes:
        images: in the order of the file.
        class_names: by class number; `category_ids` are COCO's ids of the same classes.
        attribute_names: by attribute number; empty where the file annotates none.
        skipped: reason -> how many images or boxes were left out for it.
        as_visual_genome: they are Visual Genome's, to be learnt and judged as Bottom-Up-Attention did: a box without attributes has none.
    """

    images: list[LabelledImage]
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    attribute_names: tuple[str, ...]
    skipped: dict[str, int] = field(default_factory=dict)
    as_visual_genome: bool = False


class Skipped:
    """Counts what is left out by reason and says the first of each."""

    def __init__(self, path: Path) -> None:
        self.path, self.counts = path, Counter[str]()

    def add(self, reason: str, which: str) -> None:
        """Count something that is left out; the first of each reason is said at once."""
        if not self.counts[reason]:
            log.warning("%s: left out: %s (first: %s)", self.path.name, reason, which)
        self.counts[reason] += 1


def read_labelled_images(folder: str | Path, annotations: str | Path) -> LabelledImages:
    """Read COCO's instances JSON and look at the photographs it names (their headers only).

    Attributes of a box are read from `attributes` (a list of names or ids, or a mapping whose texts are names, as CVAT writes) or
    `attribute_ids` (Visual Genome's ports); ids refer to a list `attributes` of `{"id", "name"}` beside `categories`.
    `class_probabilities` of a box, `{"cat": 0.7, "dog": 0.2}`, is what it is to be taken for where nobody is sure; `ignore: 1` marks a
    region that training leaves alone.

    Args:
        folder: where the `file_name`s of the annotations are found.
        annotations: the JSON.

    Raises:
        BadInput: the file is damaged or of another format, or nothing of it can be used.
    """
    folder, path = Path(folder), Path(annotations)
    content = _read_json(path)
    skipped = Skipped(path)
    category_ids, class_names = _categories(content, path)
    attribute_names, attribute_ids = _attribute_names(content)
    words = Words(
        {category: number for number, category in enumerate(category_ids)},
        {name: number for number, name in enumerate(attribute_names)},
        attribute_ids,
        {name: number for number, name in enumerate(class_names)},
    )
    by_image: dict[Any, list[Mapping[str, Any]]] = {}
    for annotation in content["annotations"]:
        if isinstance(annotation, dict):
            by_image.setdefault(_hashable(annotation.get("image_id")), []).append(annotation)
        else:
            skipped.add("an annotation that is no mapping", repr(annotation)[:60])
    images: dict[int, LabelledImage] = {}
    for entry in content["images"]:
        if (image := image_entry(entry, folder, images, skipped)) is not None:
            image_id, file, size = image
            images[image_id] = labelled_image(image_id, file, size, by_image.get(image_id, ()), words, skipped)
    all_ids = {_hashable(entry.get("id")) for entry in content["images"] if isinstance(entry, dict)}
    for image_id, found in by_image.items():
        if image_id not in all_ids:
            skipped.counts["a box of an image that is not listed"] += len(found)
            log.warning("%s: left out: %d boxes of image %r, which is not listed", path.name, len(found), image_id)
    if not images:
        reasons = "; ".join(f"{reason}: {count}" for reason, count in skipped.counts.items()) or "it lists none"
        raise BadInput(f"{path}: none of its images can be used ({reasons}); do the file names belong to {folder}?")
    return LabelledImages(list(images.values()), class_names, category_ids, tuple(attribute_names), dict(skipped.counts))


@dataclass(frozen=True, slots=True)
class Words:
    """What annotations may refer to: classes by their category ids, attributes by name and by id; to numbers from 0."""

    classes: Mapping[Any, int]
    attributes: Mapping[str, int]
    attribute_ids: Mapping[int, int]
    class_names: Mapping[str, int]


def labelled_image(
    image_id: int, file: Path, size: tuple[int, int], annotations: Sequence[Mapping[str, Any]], words: Words, skipped: Skipped
) -> LabelledImage:
    """One photograph with those of its annotations that can be used."""
    boxes: list[tuple[float, float, float, float]] = []
    classes: list[int] = []
    attributes: list[tuple[int, ...]] = []
    crowd: list[bool] = []
    soft: list[dict[int, float]] = []
    for annotation in annotations:
        which = f"annotation {annotation.get('id')!r}"
        category = _hashable(annotation.get("category_id"))
        if category not in words.classes:
            skipped.add("a box of an unknown category", f"{which}, category {category!r}")
            continue
        box = _box(annotation.get("bbox"), size, which, skipped)
        if box is None:
            continue
        boxes.append(box)
        classes.append(words.classes[category])
        attributes.append(_attributes_of(annotation, words, which, skipped))
        crowd.append(bool(annotation.get("iscrowd", 0) or annotation.get("ignore", 0)))
        soft.append(_probabilities(annotation.get("class_probabilities"), words, which, skipped))
    return LabelledImage(
        id=image_id,
        path=file,
        size=size,
        boxes=np.array(boxes, dtype=np.float32).reshape(-1, 4),
        classes=np.array(classes, dtype=np.int64),
        attributes=tuple(attributes),
        crowd=np.array(crowd, dtype=bool),
        soft=_distributions(soft, len(words.classes)),
    )


def _probabilities(stated: Any, words: Words, which: str, skipped: Skipped) -> dict[int, float]:
    """Class number -> probability; empty where none is stated, or where it cannot be used."""
    if stated is None:
        return {}
    usable = isinstance(stated, dict) and all(isinstance(value, int | float) and 0 <= value <= 1 for value in stated.values())
    if not usable or not set(stated) <= set(words.class_names) or not sum(stated.values()) > 0:
        skipped.add("class probabilities that are no {name of a category: 0 to 1}", f"{which}: {str(stated)[:60]}")
        return {}
    return {words.class_names[name]: float(value) for name, value in stated.items()}


def _distributions(stated: Sequence[Mapping[int, float]], classes: int) -> NDArray[np.float32] | None:
    """(N, classes) rows that sum to 1, or to 0 where nothing was stated; None where nothing was at all."""
    if not any(stated):
        return None
    rows = np.zeros((len(stated), classes), dtype=np.float32)
    for row, shares in zip(rows, stated, strict=True):
        for number, value in shares.items():
            row[number] = value / sum(shares.values())
    return rows


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise BadInput(f"{path} is no whole JSON ({error}); was it cut off? Expected COCO's instances") from error
    if isinstance(content, list):
        raise BadInput(
            f"{path} has no list images or annotations or categories, but is one, as Visual Genome's objects.json is; add "
            "--vocabulary 1600-400-20, or pass COCO's instances"
        )
    missing = [
        name for name in ("images", "annotations", "categories") if not isinstance(content, dict) or not isinstance(content.get(name), list)
    ]
    if missing:
        raise BadInput(f"{path} has no list {' or '.join(missing)}; expected COCO's instances with images, annotations and categories")
    return content  # type: ignore[no-any-return]


def _categories(content: Mapping[str, Any], path: Path) -> tuple[tuple[int, ...], tuple[str, ...]]:
    found: dict[int, str] = {}
    for entry in content["categories"]:
        if not isinstance(entry, dict) or type(entry.get("id")) is not int or not isinstance(entry.get("name"), str):
            raise BadInput(f"{path}: category {str(entry)[:80]} is no {{id, name}}; expected a number and a text")
        if entry["id"] in found:
            raise BadInput(f"{path}: two categories have the id {entry['id']}; give each its own")
        found[entry["id"]] = entry["name"]
    if not found:
        raise BadInput(f"{path} lists no categories; expected at least one")
    ids = tuple(sorted(found))
    return ids, tuple(found[category] for category in ids)


def image_entry(entry: Any, folder: Path, known: Collection[int], skipped: Skipped) -> tuple[int, Path, tuple[int, int]] | None:
    """An entry of COCO's `images` as (id, file, (height, width)); None where it cannot be used, which is counted in `skipped`."""
    if not isinstance(entry, dict) or type(entry.get("id")) is not int or not isinstance(entry.get("file_name"), str):
        skipped.add("an image entry without id or file_name", str(entry)[:80])
        return None
    name, image_id = entry["file_name"], entry["id"]
    if image_id in known:
        skipped.add("an image id that was there before", f"{image_id}, {name}")
        return None
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or "\0" in name:
        skipped.add("an image whose file_name leads out of the folder", name)
        return None
    file = folder / name
    try:
        with Image.open(file) as header:
            width, height = header.size
            if is_turned(header):
                width, height = height, width
    except FileNotFoundError:
        skipped.add("an image whose file is missing", name)
        return None
    except Exception:  # Pillow's readers raise many kinds
        skipped.add("an image that cannot be read", name)
        return None
    stated = (entry.get("height", height), entry.get("width", width))
    if stated != (height, width):
        skipped.add("an image of another size than annotated", f"{name}: {width} x {height}, annotated {stated[1]} x {stated[0]}")
        return None
    return image_id, file, (height, width)


def _box(bbox: Any, size: tuple[int, int], which: str, skipped: Skipped) -> tuple[float, float, float, float] | None:
    numeric = isinstance(bbox, list) and len(bbox) == 4 and all(isinstance(v, int | float) and not isinstance(v, bool) for v in bbox)
    if not numeric or not all(math.isfinite(value) and abs(value) < 1e7 for value in bbox):
        skipped.add("a box that is not four numbers", f"{which}: {str(bbox)[:60]}")
        return None
    x, y, width, height = (float(value) for value in bbox)
    if width <= 0 or height <= 0:
        skipped.add("an empty box", f"{which}: {bbox}")
        return None
    x0, y0, x1, y1 = max(x, 0.0), max(y, 0.0), min(x + width, float(size[1])), min(y + height, float(size[0]))
    if x1 - x0 < 1 or y1 - y0 < 1:
        reason = "a box narrower than a pixel" if min(width, height) < 1 else "a box outside its image"
        skipped.add(reason, f"{which}: {bbox} in {size[1]} x {size[0]}")
        return None
    return x0, y0, x1, y1


def _attribute_names(content: Mapping[str, Any]) -> tuple[list[str], dict[int, int]]:
    """Names by number, and numbers by the file's own attribute ids."""
    listed = content.get("attributes")
    if isinstance(listed, list) and listed:
        entries = [
            entry for entry in listed if isinstance(entry, dict) and type(entry.get("id")) is int and isinstance(entry.get("name"), str)
        ]
        if entries:
            entries.sort(key=lambda entry: entry["id"])
            return [entry["name"] for entry in entries], {entry["id"]: number for number, entry in enumerate(entries)}
    names = {
        value
        for annotation in content["annotations"]
        if isinstance(annotation, dict)
        for value in _stated(annotation)
        if isinstance(value, str)
    }
    return sorted(names), {}


def _stated(annotation: Mapping[str, Any]) -> Sequence[Any]:
    found = annotation.get("attributes", annotation.get("attribute_ids"))
    if isinstance(found, dict):
        return [value for value in found.values() if isinstance(value, str)]
    return found if isinstance(found, list) else []


def _attributes_of(annotation: Mapping[str, Any], words: Words, which: str, skipped: Skipped) -> tuple[int, ...]:
    numbers = []
    for value in _stated(annotation):
        if type(value) is int and value in words.attribute_ids:
            numbers.append(words.attribute_ids[value])
        elif isinstance(value, str) and value in words.attributes:
            numbers.append(words.attributes[value])
        elif value != -1:  # Visual Genome's ports fill lists up with -1
            skipped.add("an attribute that is not listed", f"{which}: {value!r}")
    return tuple(dict.fromkeys(numbers))


def _hashable(value: Any) -> Any:
    return value if isinstance(value, int | str) else repr(value)


def coco_ground_truth(labelled: LabelledImages) -> dict[str, Any]:
    """The used images and boxes as COCO's instances again, for COCOeval."""
    annotations: list[dict[str, Any]] = []
    for image in labelled.images:
        for box, number, is_crowd in zip(image.boxes.tolist(), image.classes.tolist(), image.crowd.tolist(), strict=True):
            x0, y0, x1, y1 = box
            annotations.append(
                {
                    **{"id": len(annotations) + 1, "image_id": image.id, "category_id": labelled.category_ids[number]},
                    **{"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0), "iscrowd": int(is_crowd)},
                }
            )
    return {
        "images": [{"id": image.id, "height": image.size[0], "width": image.size[1]} for image in labelled.images],
        "annotations": annotations,
        "categories": [{"id": id_, "name": name} for id_, name in zip(labelled.category_ids, labelled.class_names, strict=True)],
    }


MOST_HELD_OUT = 500


def parts_of(
    labelled: LabelledImages, images: str | Path, val_annotations: str | Path | None, *, held_out: float, seed: int
) -> tuple[LabelledImages, LabelledImages, dict[str, int]]:
    """The images to train on (those with boxes) and those held out; what was skipped in both."""
    skipped = dict(labelled.skipped)
    if val_annotations:
        val = read_labelled_images(images, val_annotations)
        if val.class_names != labelled.class_names or val.category_ids != labelled.category_ids:
            raise BadInput(f"{val_annotations} has other categories than the training annotations; expected the same ids and names")
        for reason, count in val.skipped.items():
            skipped[reason] = skipped.get(reason, 0) + count
        members = labelled.images
    else:
        order = np.random.default_rng([seed, 2]).permutation(len(labelled.images))
        count = min(max(round(held_out * len(labelled.images)), 1), MOST_HELD_OUT)
        val = with_images(labelled, [labelled.images[number] for number in sorted(order[:count])])
        members = [labelled.images[number] for number in sorted(order[count:])]
    with_boxes = [image for image in members if (~image.crowd).any()]
    if len(with_boxes) < len(members):
        skipped["a training image without boxes"] = len(members) - len(with_boxes)
    if not with_boxes:
        raise BadInput("no training image has a box that can be used; expected at least one besides the held-out images")
    return with_images(labelled, with_boxes), val, skipped


def with_images(labelled: LabelledImages, images: list[LabelledImage]) -> LabelledImages:
    """The same annotations about some of the images only; what was skipped was said of the whole."""
    return replace(labelled, images=images, skipped={})
