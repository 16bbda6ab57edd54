"""Photographs beside a database: read, and checked to be the ones extracted from."""

import numpy as np
from numpy.typing import NDArray

from uniter.datasets.errors import BadInput
from uniter.datasets.image_db.photographs import Photographs
from uniter.datasets.image_db.regions import RegionFeatures
from uniter.datasets.view.pictures import empty_canvas, read_photograph, resized

PICTURE_LONGEST, THUMBNAIL_LONGEST, THUMBNAIL_BOXES = 1200, 560, 12


def photograph(
    key: str, regions: RegionFeatures, photographs: Photographs | None
) -> tuple[NDArray[np.uint8], tuple[int, int] | None, list[str]]:
    """The picture to draw on, the image's size where it is known, and what is to be said where it is not the photograph."""
    path = photographs.find(key) if photographs is not None else None
    if path is not None:
        try:
            image, size = read_photograph(path, longest=2 * PICTURE_LONGEST)
        except BadInput as error:
            return empty_canvas(regions.size, longest=PICTURE_LONGEST), regions.size, [str(error)]
        if regions.size is None or _same_shape(size, regions.size):
            return resized(image, PICTURE_LONGEST), size, []
        height, width = regions.size
        sentence = f"the photograph {path.name} is {size[1]} × {size[0]}, the regions are of an image of {width} × {height}: another one?"
        return empty_canvas(regions.size, longest=PICTURE_LONGEST), regions.size, [sentence]
    sentence = "no photographs were given" if photographs is None else "no photograph of this name"
    return empty_canvas(regions.size, longest=PICTURE_LONGEST), regions.size, [sentence]


def _same_shape(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two sizes are the same picture, perhaps at different scales."""
    return abs(one[0] / one[1] - other[0] / other[1]) < 0.02 * max(one[0] / one[1], 0.02)
