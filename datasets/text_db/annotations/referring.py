"""RefCOCO, RefCOCO+, RefCOCOg: `refs(unc).p` or `refs(umd).p` with COCO's instances.json, or the same as JSON.

What a reader would get wrong: the target is a row number. The rows of an image are its annotations in the order of the region database:
that of `iid_to_ann_ids` where it is given (UNITER's published features), else that of instances.json, which is also the order that
`uniter-extract --boxes instances.json` keeps. `images.json` beside the text database says which it was (`ann_ids`).
"""

import json
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, NamedTuple

from uniter.datasets.errors import BadInput, WrongUsage, unknown_name
from uniter.datasets.storage.plain_pickle import load_plain_pickle
from uniter.datasets.storage.streams import first_character, object_of, whole_json
from uniter.datasets.text_db.annotations.fields import has_name, list_field, number_field, text_field
from uniter.datasets.text_db.caption import Caption

_IMAGE_FIELDS: Final = ("id", "file_name", "ann_ids", "height", "width")


_ANNOTATION_FIELDS: Final = ("id", "area", "bbox", "image_id", "category_id", "iscrowd")


class _Boxes(NamedTuple):
    """What instances.json says: images and annotations by id in the file's order, categories, each image's annotations in row order."""

    images: dict[int, dict[str, Any]]
    annotations: dict[int, dict[str, Any]]
    categories: list[Any]
    rows: dict[int, list[int]]


def read_referring(path: Path, *, split: str | None, join: Sequence[Path], counts: Counter[str]) -> Iterator[Caption]:
    """One example a sentence: sent_id, sent, ref_id, ann_id, image_id, bbox (x, y, width, height in pixels).

    Args:
        path: the refs; a pickle is read without looking up any name in it.
        split: train, val, test, testA or testB; several with commas; None takes all.
        join: instances.json (unless `path` is a JSON that holds the annotations too) and, if there is one, the order of annotations.

    Raises:
        BadInput: a file is not what it should be, or a ref names an annotation or image that is not there.
    """
    refs = _refs(path)
    boxes = _boxes(path, join)
    for where, ref in _of_split(path, refs, split, counts):
        image, number = number_field(ref, "image_id", where), number_field(ref, "ann_id", where)
        annotation = boxes.annotations.get(number)
        if annotation is None or annotation["image_id"] != image or number not in boxes.rows.get(image, ()):
            raise BadInput(
                f"{where} refers to annotation {number} of image {image}, which the instances do not hold; are they of this set?"
            )
        ref_id = number_field(ref, "ref_id", where)
        for sentence in list_field(ref, "sentences", where):
            entry = object_of(sentence, f"a sentence of {where}")
            sent_id, sent = number_field(entry, "sent_id", f"a sentence of {where}"), text_field(entry, "sent", f"a sentence of {where}")
            identity = {"sent_id": sent_id, "sent": sent, "ref_id": ref_id, "ann_id": number, "image_id": image}
            fields = {**identity, "bbox": annotation["bbox"]}
            yield Caption(str(sent_id), str(boxes.images[image]["file_name"]), sent, (("coco", str(image)),), fields)


def side_files(paths: Sequence[Path], *, split: str | None, join: Sequence[Path]) -> dict[str, Any]:
    """refs.json, images.json (with `ann_ids`), annotations.json and categories.json as UNITER keeps them: of the split's images only."""
    refs = [ref for path in paths for _, ref in _of_split(path, _refs(path), split, Counter())]
    boxes = _boxes(paths[0], join)
    wanted = {ref.get("image_id") for ref in refs} & boxes.rows.keys()
    images = [{**image, "ann_ids": boxes.rows[number]} for number, image in boxes.images.items() if number in wanted]
    return {
        "refs.json": refs,
        "images.json": [{name: image.get(name) for name in _IMAGE_FIELDS} for image in images],
        "annotations.json": [
            {name: annotation[name] for name in _ANNOTATION_FIELDS if name in annotation}
            for annotation in boxes.annotations.values()
            if annotation["image_id"] in wanted
        ],
        "categories.json": boxes.categories,
    }


def side_files_of_texts(files: Mapping[str, Any], sentences: Container[str]) -> dict[str, Any]:
    """The same files for UNITER's own reader, which looks up every sentence that `sent_ids` of refs.json names: of these texts only.

    Args:
        files: what `side_files` gives, or whatever a task keeps; files of other names stay as they are.
        sentences: the ids of the texts that there are.
    """
    if not isinstance(files.get("refs.json"), list):
        return dict(files)
    refs = []
    for row, value in enumerate(files["refs.json"]):
        ref = object_of(value, f"entry {row:,} of refs.json")
        listed = ref.get("sent_ids") or [object_of(one, "a sentence").get("sent_id") for one in ref.get("sentences", ())]
        if kept := [number for number in listed if str(number) in sentences]:
            refs.append({**ref, "sent_ids": kept})
    images = {ref.get("image_id") for ref in refs}
    narrowed = {"images.json": "id", "annotations.json": "image_id"}
    return {
        name: refs if name == "refs.json" else [row for row in rows if row.get(narrowed[name]) in images] if name in narrowed else rows
        for name, rows in files.items()
    }


def _refs(path: Path) -> list[Any]:
    return _load_refs(path, path.stat().st_size if path.exists() else 0)


@lru_cache(maxsize=2)
def _load_refs(path: Path, size: int) -> list[Any]:
    document = whole_json(path, "RefCOCO's refs") if first_character(path) in ("[", "{") else load_plain_pickle(path)
    refs = document.get("refs") if isinstance(document, Mapping) else document
    if not isinstance(refs, list) or not refs:
        raise BadInput(f"{path} holds no list of referring expressions; expected refs(unc).p, refs(umd).p or the same as JSON")
    try:  # arrays and the like end here: what goes into a database is JSON
        json.dumps(refs, allow_nan=False, default=_plain)
    except (TypeError, ValueError) as error:
        raise BadInput(f"{path} holds more than lists, maps, texts and numbers ({error})") from None
    return refs


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__}")


def _of_split(path: Path, refs: list[Any], split: str | None, counts: Counter[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    wanted = None if split is None else set(split.split(","))
    seen: set[str] = set()
    for row, value in enumerate(refs):
        where = f"entry {row:,} of {path}"
        ref = object_of(value, where)
        part = text_field(ref, "split", where)
        seen.add(part)
        if wanted is not None and part not in wanted:
            counts["refs_of_other_parts"] += 1
            continue
        yield where, ref
    for part in sorted((wanted or set()) - seen):
        raise WrongUsage(f"{path}: {unknown_name('split', part, seen)}")


def _boxes(path: Path, join: Sequence[Path]) -> _Boxes:
    holders = [*join, path] if first_character(path) == "{" else list(join)
    return _load_boxes(path, tuple((holder, holder.stat().st_size if holder.exists() else 0) for holder in holders))


@lru_cache(maxsize=2)
def _load_boxes(path: Path, holders: tuple[tuple[Path, int], ...]) -> _Boxes:
    instances, orders = [], []
    for holder, _ in holders:
        if first_character(holder) == "{" and has_name(holder, "annotations"):
            instances.append(holder)
        elif holder != path:
            orders.append(holder)
    if len(instances) != 1 or len(orders) > 1:
        raise BadInput(
            f"{path} needs one instances.json with --join (and at most one order of annotations); "
            f"{len(instances)} and {len(orders)} were given"
        )
    document = whole_json(instances[0], "COCO's instances.json")
    images = _by_id(document, "images", instances[0])
    annotations = _by_id(document, "annotations", instances[0])
    in_order: dict[int, list[int]] = {number: [] for number in images}
    for number, annotation in annotations.items():
        where = f"annotation {number} of {instances[0]}"
        image, box = number_field(annotation, "image_id", where), list_field(annotation, "bbox", where)
        if len(box) != 4 or not all(isinstance(value, int | float) for value in box):
            raise BadInput(f"{where} has the bbox {box}; expected x, y, width, height in pixels")
        if image not in in_order:
            raise BadInput(f"{where} is of image {image}, which the file does not list")
        in_order[image].append(number)
    for number, image_entry in images.items():
        text_field(image_entry, "file_name", f"image {number} of {instances[0]}")
    rows = _given_order(orders[0], annotations, in_order) if orders else {image: numbers for image, numbers in in_order.items() if numbers}
    categories = document.get("categories")
    return _Boxes(images, annotations, categories if isinstance(categories, list) else [], rows)


def _by_id(document: Any, name: str, path: Path) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for place, value in enumerate(list_field(object_of(document, str(path)), name, str(path))):
        where = f"entry {place:,} of {name} in {path}"
        entry = object_of(value, where)
        found[number_field(entry, "id", where)] = entry
    return found


def _given_order(path: Path, annotations: Mapping[int, Any], in_order: Mapping[int, list[int]]) -> dict[int, list[int]]:
    document = object_of(whole_json(path, "an order of annotations"), str(path))
    table = object_of(document.get("iid_to_ann_ids", document), f"iid_to_ann_ids of {path}")
    rows: dict[int, list[int]] = {}
    for name, numbers in table.items():
        if not (name.isascii() and name.isdecimal() and len(name) <= 18) or not isinstance(numbers, list):
            raise BadInput(f"{path} says {str(numbers)[:40]} of image {name[:40]!r}; expected {{image id: [annotation ids]}}")
        image = int(name)
        if image not in in_order:
            continue  # the order may be of more images than these
        if not all(type(number) is int for number in numbers) or sorted(numbers) != sorted(in_order[image]):
            raise BadInput(
                f"{path} orders {len(numbers)} annotations of image {image}, the instances hold {len(in_order[image])}, or others; "
                "are the files of the same set?"
            )
        rows[image] = numbers
    return rows
