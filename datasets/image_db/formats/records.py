"""What all formats share: an item is a key with its regions, or with the reason why it cannot be read."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from uniter.datasets.errors import BadInput
from uniter.datasets.image_db.orientation import is_turned
from uniter.datasets.image_db.photographs import Photographs
from uniter.datasets.image_db.published import count_boxes
from uniter.datasets.image_db.regions import RegionFeatures, has_positions, normalised_boxes, pixel_boxes

Item = tuple[str, RegionFeatures | BadInput]


Skip = Callable[[str, RegionFeatures, BadInput], None]


"""What a writer does with an image that its format cannot hold."""


MAX_REGIONS: Final = 10_000


MAX_WIDTH: Final = 1 << 16


NO_CLASS: Final = -1


"""Written as class id where a format demands one and none is known."""


@dataclass(frozen=True)
class Selection:
    """Which rows are taken from sources that hold more than are used (docker's npz with 100 candidates, UNITER's `all`).

    `conf_th=-1` takes the first `num_bb` rows; `keep_all` takes every row.
    """

    conf_th: float = 0.2
    min_bb: int = 10
    max_bb: int = 100
    num_bb: int = 36
    keep_all: bool = False

    def cut(self, regions: RegionFeatures) -> RegionFeatures:
        """The rows that UNITER's converter would keep. Where no confidence is known (all zero) all rows stay."""
        if self.keep_all:
            return regions
        if self.conf_th == -1:
            return regions.rows(slice(self.num_bb))
        if not (regions.conf > 0).any():
            return regions
        return regions.rows(slice(count_boxes(regions.conf, conf_th=self.conf_th, min_bb=self.min_bb, max_bb=self.max_bb)))


class ImageSizes:
    """Sizes of images by key, read from a folder of pictures when a format needs pixels and the record does not know them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._photographs = Photographs(folder)

    def find(self, key: str) -> tuple[int, int] | None:
        """(height, width) of the upright image; None if the folder holds no such image, several, or one that cannot be read."""
        path = self._photographs.find(key)
        return _image_size(path) if path is not None else None


def _image_size(path: Path) -> tuple[int, int] | None:
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = is_turned(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return (width, height) if turned else (height, width)


def with_pixels(items: Iterable[Item], sizes: ImageSizes | None, *, needed: bool = True) -> Iterator[Item]:
    """Give every record `size` and `boxes`, from the record itself or from the pictures; else, if they are needed, the item says what is
    missing.
    """
    for key, regions in items:
        if isinstance(regions, BadInput):
            yield key, regions
            continue
        size = regions.size or (sizes.find(key) if sizes is not None else None)
        if size is None and not needed:
            yield key, regions
            continue
        if size is None:
            where = "pass --images FOLDER" if sizes is None else f"{sizes.folder} holds no picture of it, or several of that name"
            yield key, BadInput(f"image {key!r}: this format needs pixels but the size of the image is not known; {where}")
            continue
        if regions.boxes is None and not has_positions(regions):
            fault = BadInput(f"image {key!r}: this format needs pixels but the source does not say where the regions are")
            yield key, fault if needed else replace(regions, size=size)
            continue
        boxes = regions.boxes if regions.boxes is not None else pixel_boxes(regions.norm_bb, size)
        positions = regions.norm_bb if has_positions(regions) else normalised_boxes(boxes, size)
        yield key, replace(regions, size=size, boxes=boxes, norm_bb=positions)


def from_pixels(
    *,
    key: str,
    features: NDArray[Any],
    boxes: NDArray[Any],
    size: tuple[int, int],
    object_ids: NDArray[Any] | None = None,
    object_conf: NDArray[Any] | None = None,
    attribute_ids: NDArray[Any] | None = None,
    attribute_conf: NDArray[Any] | None = None,
) -> RegionFeatures:
    """The record of a source that keeps pixel boxes and best classes; ids of `NO_CLASS` mean that none is known."""
    height, width = size
    if not (0 < height < 1 << 24 and 0 < width < 1 << 24):
        raise BadInput(f"image {key!r}: its size is {width}x{height}")
    known_object = object_ids is not None and bool((object_ids != NO_CLASS).any())
    known_attribute = attribute_ids is not None and bool((attribute_ids != NO_CLASS).any())
    conf = object_conf if known_object and object_conf is not None else np.zeros(len(features), dtype=np.float32)
    regions = RegionFeatures(
        features=features,
        norm_bb=normalised_boxes(boxes, size) if boxes.ndim == 2 and boxes.shape[1] == 4 else boxes,
        conf=conf,
        boxes=np.asarray(boxes, dtype=np.float32),
        size=size,
        object_ids=object_ids if known_object else None,
        object_conf=object_conf if known_object else None,
        attribute_ids=attribute_ids if known_attribute else None,
        attribute_conf=attribute_conf if known_attribute else None,
    )
    regions.check_shapes(key)
    return regions


def size_from(boxes: NDArray[np.float32], spatial: NDArray[np.float32]) -> tuple[int, int] | None:
    """The image's (height, width), from pixels and fractions of the same boxes; None where they do not say."""
    if not len(boxes) or not (np.isfinite(boxes).all() and np.isfinite(spatial).all()):
        return None
    right, bottom = int(boxes[:, 2].argmax()), int(boxes[:, 3].argmax())
    if spatial[right, 2] <= 0 or spatial[bottom, 3] <= 0:
        return None
    width, height = float(boxes[right, 2]) / float(spatial[right, 2]), float(boxes[bottom, 3]) / float(spatial[bottom, 3])
    return (round(height), round(width)) if 1 <= width < 1 << 24 and 1 <= height < 1 << 24 else None


def best_classes(regions: RegionFeatures) -> dict[str, NDArray[Any]]:
    """objects_id, objects_conf, attrs_id, attrs_conf for formats that keep best classes; `NO_CLASS` and 0 where unknown."""
    count = len(regions)
    ids, conf = np.full(count, NO_CLASS, dtype=np.int64), np.zeros(count, dtype=np.float32)
    object_ids, object_conf = regions.best_objects() or (ids, regions.conf)
    attribute_ids, attribute_conf = regions.best_attributes() or (ids, conf)
    return {
        "objects_id": np.asarray(object_ids, dtype=np.int64),
        "objects_conf": np.asarray(object_conf, dtype=np.float32),
        "attrs_id": np.asarray(attribute_ids, dtype=np.int64),
        "attrs_conf": np.asarray(attribute_conf, dtype=np.float32),
    }


def refuse(key: str, regions: RegionFeatures, error: BadInput) -> None:
    """The `Skip` that ends the writing."""
    raise error


def npz_name(key: str) -> str:
    """The key as UNITER names it: with `.npz` at the end."""
    return key if key.endswith(".npz") else f"{key}.npz"
