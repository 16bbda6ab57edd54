"""Visual Genome's region_descriptions.json: every region's phrase is a caption of the whole image (facts 7.2; its box is kept beside it).

`image_data.json`, beside it or by --join, tells which images are COCO's (`coco_id`, null for about half).
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from uniter.datasets.errors import BadInput
from uniter.datasets.storage.streams import id_of, json_items, object_of, text_of
from uniter.datasets.text_db.caption import Caption


def read_visual_genome(
    path: Path, *, split: str | None, join: Sequence[Path], counts: Counter[str], row_prefix: str = ""
) -> Iterator[Caption]:
    """The phrases in the file's order; images are called `<image id>.jpg`.

    `counts` receives `images_without_caption`.
    """
    if split is not None:
        raise BadInput(
            f"{path} is Visual Genome, which has no parts; --split train or val needs --exclude lists made from Karpathy's splits"
        )
    origins_of: dict[str, tuple[tuple[str, str], ...]] = {}
    for table in image_tables(path, join):
        for row, value in enumerate(json_items(table, "item")):
            image = object_of(value, f"image {row} of {table}")
            number = image.get("image_id", image.get("id"))
            # Not the Flickr id: the list of Flickr ids is SBU's rule and holds Karpathy's validation images, which stay (facts 7.2).
            if image.get("coco_id") is not None:
                origins_of[id_of(number, row)] = (("coco", id_of(image["coco_id"], 0)),)
    row = 0
    for place, value in enumerate(json_items(path, "item")):
        where = f"image {place} of {path}"
        image = object_of(value, where)
        regions = image.get("regions")
        if not isinstance(regions, list):
            raise BadInput(f"{where} has no list of regions; expected Visual Genome's region_descriptions.json")
        if not regions:
            counts["images_without_caption"] += 1
        for region in regions:
            item = object_of(region, f"a region of {where}")
            number = id_of(item.get("image_id", image.get("image_id", image.get("id"))), place)
            origins = (("vg", number), *origins_of.get(number, ()))
            box = [item.get(side) for side in ("x", "y", "width", "height")]
            fields: dict[str, Any] | None = {"bbox": box} if all(isinstance(side, int | float) for side in box) else None
            example = id_of(item.get("region_id", item.get("id")), row, row_prefix)
            yield Caption(example, f"{number}.jpg", text_of(item.get("phrase"), f"region {example} of {path}"), origins, fields)
            row += 1


def image_tables(path: Path, join: Sequence[Path]) -> list[Path]:
    """The files of image_data.json that go with a region_descriptions.json: those named, or the one beside it."""
    beside = path.parent / "image_data.json"
    return list(join) or ([beside] if beside.is_file() else [])
