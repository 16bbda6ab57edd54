"""Regions that are given instead of detected: COCO-style JSON or JSONL, kept in the caller's order.

COCO writes x, y, width, height; the JSONL form writes x0, y0, x1, y1. Both are pixels of the upright image.
"""

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from uniter.datasets.errors import BadInput
from uniter.extract.images.items import ImageItem

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class GivenRegions:
    """The boxes of one image.

    Attributes:
        boxes: (N, 4) float32 pixels of the upright image, x0 y0 x1 y1, in the caller's order.
        ids: what the caller calls them, N values; None where the file gives none.
    """

    boxes: NDArray[np.float32]
    ids: list[Any] | None

    def inside(self, size: tuple[int, int]) -> NDArray[np.float32]:
        """The boxes cut at the border of an image of (height, width); BadInput where one has no part in the image or runs backwards."""
        height, width = size
        limits = np.array([width, height, width, height], dtype=np.float32)
        clipped = np.clip(self.boxes, 0, limits)
        x0, y0, x1, y1 = self.boxes.T
        wrong = (x1 < x0) | (y1 < y0) | (x0 >= width) | (y0 >= height) | (x1 < 0) | (y1 < 0) | ~np.isfinite(self.boxes).all(axis=1)
        if wrong.any():
            first = int(wrong.argmax())
            numbers = ", ".join(f"{number:g}" for number in self.boxes[first])
            raise BadInput(
                f"given box {first} ({numbers}) is no x0, y0, x1, y1 within {width} x {height} pixels; are the numbers x, y, width, "
                "height, or pixels of an image of another size?"
            )
        return clipped


def _plain(name: str) -> str:
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def _ends(path: str) -> Iterator[str]:
    """A path and what is left of it without its first folder, without its first two, and so on."""
    while path:
        yield path
        path = path.partition("/")[2]


def _without_suffix(name: str) -> str:
    folder, slash, last = name.rpartition("/")
    return f"{folder}{slash}{PurePosixPath(last).stem}" if last else name


class GivenBoxes:
    """All given boxes, looked up by an image's key or path: an end of the path, with or without suffix.

    What a reader would get wrong: a name with folders in it is of an image in such folders alone. `VG_100K/7.jpg` gives no boxes to
    `VG_100K_2/7.jpg`. Only where no image at all lies in such folders, names count alone; see `settle`.

    Args:
        path: COCO-style JSON (`images` with `id` and `file_name`, `annotations` with `image_id` and `bbox` = x, y, width, height), or JSONL
            of `{"image": name, "boxes": [[x0, y0, x1, y1], ...], "ids": [...]}`.

    Raises:
        BadInput: it is neither, or a line is malformed (its number is named).
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise BadInput(f"--boxes {self.path}: {error.strerror}") from error
        self.sha256 = hashlib.sha256(content).hexdigest()
        self._by_name: dict[str, GivenRegions] = {}
        self._by_path: dict[str, str] = {}
        self._by_last: dict[str, str | None] = {}
        self._name_alone = False
        self._by_bare: dict[str, str | None] = {}
        try:
            whole = orjson.loads(content)
        except orjson.JSONDecodeError:
            whole = None
        coco = isinstance(whole, dict) and "annotations" in whole
        for name, regions in self._coco(whole) if coco else self._lines(content):
            if name in self._by_name:
                raise BadInput(f"--boxes {self.path} names the image {name!r} twice; put all its boxes into one entry")
            self._by_name[name] = regions
            self._by_path[_plain(name)] = name
            bare = _without_suffix(_plain(name))
            # None: several images bear it, so it says nothing.
            self._by_bare[bare] = None if bare in self._by_bare else name
            last = PurePosixPath(bare).name
            self._by_last[last] = None if last in self._by_last else name
        if not self._by_name:
            raise BadInput(f"--boxes {self.path} holds no boxes")

    def __len__(self) -> int:
        return len(self._by_name)

    def regions_per_image(self) -> float:
        """The mean number of boxes."""
        return sum(len(regions.boxes) for regions in self._by_name.values()) / len(self._by_name)

    def of(self, item: ImageItem) -> GivenRegions | None:
        """The boxes of an image, None where the file has none for it."""
        if item.key in self._by_name:
            return self._by_name[item.key]
        name = self._name_of(item)
        return self._by_name[name] if name is not None else None

    def why_not(self, item: ImageItem) -> str:
        """Why an image has no boxes, in words."""
        last = PurePosixPath(_without_suffix(item.path)).name
        hint = (
            f"; what it calls {self._by_last[last] or last!r} lies in another folder, or is one of several" if last in self._by_last else ""
        )
        return f"{self.path} holds no boxes for it{hint}"

    def settle(self, items: Iterable[ImageItem]) -> None:
        """Look at all images once: do the folders in the names have anything to do with theirs?

        Where not one image lies in the folders that are named, names count alone, as long as they are unique; a warning says so.

        Raises:
            BadInput: two images would get the boxes of one name.
        """
        images = list(items)
        folders = [name for name in self._by_name if "/" in _plain(name)]
        self._name_alone = bool(folders) and not any(
            item.key in self._by_name or "/" in _plain(self._name_of(item) or "") for item in images
        )
        if self._name_alone:
            log.warning("--boxes %s: no image lies in a folder that it names (as %r does); names count alone", self.path, folders[0])
        seen: dict[str, str] = {}
        for item in images:
            name = item.key if item.key in self._by_name else self._name_of(item)
            if name is not None and seen.setdefault(name, item.path) != item.path:
                raise BadInput(f"--boxes {self.path}: {name!r} is {seen[name]} as well as {item.path}; write more of the path, or the key")

    def _name_of(self, item: ImageItem) -> str | None:
        path = _plain(str(Path(item.path).absolute()) if item.size < 0 else item.path)
        for end in _ends(path):
            if end in self._by_path:
                return self._by_path[end]
        for end in _ends(_without_suffix(path)):
            if end in self._by_bare:
                return self._by_bare[end]
        return self._by_last.get(PurePosixPath(_without_suffix(path)).name) if self._name_alone else None

    def _coco(self, document: dict[str, Any]) -> Iterator[tuple[str, GivenRegions]]:
        try:
            names = {image["id"]: str(image["file_name"]) for image in document["images"]}
            boxes: dict[Any, list[list[float]]] = {number: [] for number in names}
            ids: dict[Any, list[Any]] = {number: [] for number in names}
            for annotation in document["annotations"]:
                x, y, width, height = annotation["bbox"]
                boxes[annotation["image_id"]].append([x, y, x + width, y + height])
                ids[annotation["image_id"]].append(annotation.get("id"))
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput(f"--boxes {self.path} is no COCO file: {type(error).__name__} {error}; see --help for the two forms") from error
        for number, name in names.items():
            if boxes[number]:
                known = ids[number] if all(value is not None for value in ids[number]) else None
                yield name, self._regions(boxes[number], known, f"image {name!r}")

    def _lines(self, content: bytes) -> Iterator[tuple[str, GivenRegions]]:
        for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
            if not line.strip():
                continue
            try:
                entry = orjson.loads(line)
                name, boxes, ids = entry["image"], entry["boxes"], entry.get("ids")
                if not isinstance(name, str) or not isinstance(boxes, list) or not (ids is None or isinstance(ids, list)):
                    raise TypeError("image must be a name, boxes and ids lists")
            except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
                raise BadInput(
                    f'--boxes {self.path}, line {number}: expected {{"image": name, "boxes": [[x0, y0, x1, y1]]}}, or a COCO file ({error})'
                ) from error
            if boxes:
                yield name, self._regions(boxes, ids, f"line {number}")

    def _regions(self, boxes: list[list[float]], ids: list[Any] | None, where: str) -> GivenRegions:
        try:
            array = np.asarray(boxes, dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise BadInput(f"--boxes {self.path}, {where}: a box must be four numbers") from error
        if array.ndim != 2 or array.shape[1] != 4:
            raise BadInput(f"--boxes {self.path}, {where}: a box must be four numbers, got an array of {array.shape}")
        if ids is not None and len(ids) != len(array):
            raise BadInput(f"--boxes {self.path}, {where}: {len(array)} boxes but {len(ids)} ids")
        return GivenRegions(array, ids)
