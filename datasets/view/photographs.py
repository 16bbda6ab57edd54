"""Photographs beside a database: found by key, read, and checked to be the ones extracted from.

What a reader would get wrong: a photograph of the right name may be another one. It is drawn on only where it has the shape (at any scale)
of the image that the regions are of; else the boxes stand on an empty canvas, and the page says why.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from uniter.datasets.errors import BadInput
from uniter.datasets.image_db.database import ImageDB
from uniter.datasets.image_db.photographs import Photographs
from uniter.datasets.image_db.regions import RegionFeatures
from uniter.datasets.image_db.writing.noted_photographs import NotedPhotographs
from uniter.datasets.storage.files import sha256_of
from uniter.datasets.view.pictures import empty_canvas, read_photograph, resized

PICTURE_LONGEST, THUMBNAIL_LONGEST, THUMBNAIL_BOXES = 1200, 560, 12


class Gallery(Photographs):
    """The photographs of a database, which may know by their checksums which files were read."""

    def __init__(self, folder: str | Path, database: ImageDB) -> None:
        super().__init__(folder)
        self._noted = NotedPhotographs(database.folders)

    def remarks(self, key: str) -> list[str]:
        """What is to be said of the photograph of a key: that it is another file than was read, if that is known."""
        path, as_read = self.find(key), self._noted.of(key).sha256
        if path is None or not as_read or sha256_of(path).startswith(as_read.hex()):
            return []
        return [f"{path.name} is not the file that was read: changed, or another size of it? The boxes are of that one"]


def refuse_if_none_is_there(photographs: Photographs, keys: Sequence[str]) -> None:
    """BadInput if not one of these keys has its photograph in the folder: then it is another folder."""
    if not any(photographs.find(key) is not None for key in keys):
        raise BadInput(
            f"{photographs.folder} holds {len(photographs):,} images, but none of the {len(keys):,} pictures to draw (such as {keys[0]!r}) "
            f"has its photograph among them; give --images the folder that the regions were taken from, or leave it out"
        )


def photograph(
    key: str, regions: RegionFeatures, photographs: Photographs | None
) -> tuple[NDArray[np.uint8], tuple[int, int] | None, list[str]]:
    """The picture to draw on, the image's size where it is known, and what is to be said where it is not the photograph."""
    path = photographs.find(key) if photographs is not None else None
    known = regions.size if regions.size is not None and min(regions.size) > 0 else None  # (0, 0) says nothing
    sentence = "no photographs were given" if photographs is None else "no photograph of this name"
    if path is not None:
        try:
            image, size = read_photograph(path, longest=2 * PICTURE_LONGEST)
        except BadInput as error:
            sentence = str(error)
        else:
            if known is None or same_shape(size, known):
                return resized(image, PICTURE_LONGEST), size, []
            sentence = (
                f"the photograph {path.name} is {size[1]} × {size[0]}, the regions are of an image of {known[1]} × {known[0]}: another one?"
            )
    return empty_canvas(known, longest=PICTURE_LONGEST), known, [sentence]


def same_shape(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two sizes are the same picture, perhaps at different scales."""
    return abs(one[0] / one[1] - other[0] / other[1]) < 0.02 * max(one[0] / one[1], 0.02)
