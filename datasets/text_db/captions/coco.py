"""COCO captions: {"images": [{"id", "file_name"}], "annotations": [{"id", "image_id", "caption"}]}, in either order."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from uniter.datasets.errors import BadInput, shown
from uniter.datasets.storage.streams import id_of, json_items, object_of, text_of
from uniter.datasets.text_db.caption import Caption
from uniter.datasets.text_db.captions.names import NameTable

BATCH = 4096


def read_coco(path: Path, *, split: str | None, join: Sequence[Path], counts: Counter[str], row_prefix: str = "") -> Iterator[Caption]:
    """The captions in the file's order.

    A caption whose image is not listed has an empty image name (and so counts as without image); where the file lists no images at all,
    the image's id is its name. `counts` receives `images_without_caption`.
    """
    if split is not None:
        raise BadInput(f"{path} is COCO captions, which have no parts; --split needs Karpathy's dataset_*.json, or --exclude lists of it")
    if join:
        raise BadInput(f"{path} is COCO captions, which name their images themselves; leave --join away")
    names = NameTable("image")
    for place, value in enumerate(json_items(path, "images.item")):
        entry = object_of(value, f"entry {place} of images in {path}")
        number = entry.get("id")
        if not isinstance(number, str | int | float):
            raise BadInput(f"entry {place} of images in {path} has the id {shown(number)}; expected a number or a string")
        file_name = entry.get("file_name")
        names.add(number, file_name if isinstance(file_name, str) and file_name else str(number))
    annotations = enumerate(json_items(path, "annotations.item"))
    while batch := list(islice(annotations, BATCH)):
        rows = [value if type(value) is dict else object_of(value, f"annotation {row} of {path}") for row, value in batch]
        if any("caption" not in row for row in rows):
            bad = next(number for number, value in batch if "caption" not in value)
            raise BadInput(f"annotation {bad} of {path} has no caption; expected captions_*.json, is this instances_*.json?")
        images = [row.get("image_id") for row in rows]
        found = names.find([-1 if image is None else image for image in images])
        for (place, _), annotation, image, name in zip(batch, rows, images, found, strict=True):
            if name is None:
                name = "" if len(names) or image is None else id_of(image, 0)
            example = id_of(annotation.get("id"), place, row_prefix)
            origins = (("coco", id_of(image, 0)),) if image is not None else ()
            caption = annotation["caption"]
            text = caption if isinstance(caption, str) else text_of(caption, f"annotation {example} of {path}")
            yield Caption(example, name, text, origins)
    counts["images_without_caption"] = names.never_asked()
