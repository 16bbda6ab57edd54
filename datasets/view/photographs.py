"""Photographs beside a database: found by key, read, and checked to be the ones extracted from.

What a reader would get wrong: a photograph of the right name may be another one. It is drawn on only where it has the shape (at any scale)
of the image that the regions are of; else the boxes stand on an empty canvas, and the page says why.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from uniter.datasets.errors import BadInput
from uniter.datasets.image_db.regions import RegionFeatures
from uniter.datasets.view.pictures import empty_canvas, read_photograph, resized

PICTURE_LONGEST, THUMBNAIL_LONGEST, THUMBNAIL_BOXES = 1200, 560, 12
PHOTOGRAPH_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


class Photographs:
    """The photographs of a folder, found again by the keys of a database.

    A key is looked up as the path below the folder (with and without suffix), the file name and the stem; without `.npz`; in any
    case of letters; and without the prefixes and zeros that UNITER's published keys have (`nlvr2_dev-850-0-img0.npz` is
    `dev-850-0-img0.png`, `flickr30k_000000012345.npz` is `12345.jpg`). A stem that several files bear finds none of them,
    unless it is the path of one.
    """

    def __init__(self, folder: str | Path) -> None:
        """List the folder and all below it. Raises BadInput where there is no such folder, or no image in it."""
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise BadInput(f"{self.folder} is no folder; --images wants the folder of the photographs that the regions were taken from")
        paths = sorted(p for p in self.folder.rglob("*") if p.suffix.lower() in PHOTOGRAPH_SUFFIXES and p.is_file())
        if not paths:
            raise BadInput(f"no image in {self.folder}; --images wants the folder of the photographs that the regions were taken from")
        self._count = len(paths)
        self._paths: dict[str, Path | None] = {}
        self._exact: dict[str, Path | None] = {}
        self._folded: dict[str, Path | None] = {}
        for path in paths:
            relative = path.relative_to(self.folder)
            names = {relative.as_posix(), relative.with_suffix("").as_posix(), path.name, path.stem}
            _enter(self._paths, {relative.as_posix(), relative.with_suffix("").as_posix()}, path)
            _enter(self._exact, names, path)
            folded = {name.casefold() for name in names}
            _enter(self._folded, folded | ({path.stem.lstrip("0") or "0"} if path.stem.isdecimal() else set()), path)

    def __len__(self) -> int:
        return self._count

    def find(self, key: str) -> Path | None:
        """The photograph of a key, None where there is none or where it is not clear which."""
        bare = key.removesuffix(".npz")
        for name in (key, bare):
            if (path := self._paths.get(name) or self._exact.get(name)) is not None:
                return path
        rest = bare.casefold()
        for _ in range(5):
            for name in (rest, rest.lstrip("0") or "0") if rest.isdecimal() else (rest,):
                if (path := self._folded.get(name)) is not None:
                    return path
            _, underscore, rest = rest.partition("_")
            if not underscore:
                break
        return None


def _enter(table: dict[str, Path | None], names: Iterable[str], path: Path) -> None:
    for name in names:
        table[name] = path if table.get(name, path) == path else None


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
