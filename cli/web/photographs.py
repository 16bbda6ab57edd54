"""Photographs that somebody brought to the page: their regions, and a picture of them to look at.

What a reader would get wrong: nothing goes to disk. The file is decoded, shown to the detector and forgotten; kept in memory are its
regions and a JPEG of moderate size, of the newest photographs only.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from uniter.datasets.errors import BadInput
from uniter.datasets.image_db.origin import RegionOrigin
from uniter.datasets.image_db.regions import RegionFeatures
from uniter.datasets.view.labels import class_colour, label_regions
from uniter.datasets.view.pictures import jpeg, resized
from uniter.extract.images.decoding import decode_image

SHOWN_LONGEST: Final = 1280  # pixels of the picture that the page shows
KEPT: Final = 200  # photographs; with 36 regions of 2,048 numbers and its picture, one takes half a megabyte


@dataclass(frozen=True, eq=False)
class Photograph:
    """One photograph as `Understanding` and the page take it; a path in name only, so that messages call it as its owner does.

    Attributes:
        key: of its name and its content: nobody finds it who does not have it.
        name: of the file, as it was on the machine that it comes from.
        size: (height, width) of the upright photograph, pixels.
        regions: by decreasing confidence.
        shown: a JPEG.
    """

    key: str
    name: str
    size: tuple[int, int]
    regions: RegionFeatures
    shown: bytes

    def __fspath__(self) -> str:
        return self.name


class Album:
    """The newest photographs, found by their keys; any thread may ask.

    Args:
        detect: from an upright picture, (H, W, 3) uint8 BGR, to its regions.
        most: photographs that are kept; the one that was longest unused goes first.
    """

    def __init__(self, detect: Callable[[NDArray[np.uint8]], RegionFeatures], *, most: int = KEPT) -> None:
        self._detect, self._most = detect, most
        self._kept: OrderedDict[str, Photograph] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, name: str, content: bytes) -> Photograph:
        """Take a file in; one that is known under this name is not shown to the detector again.

        Raises:
            BadInput: it is no image or cannot be used; the sentence names it.
        """
        key = hashlib.sha256(name.encode("utf-8", "surrogatepass") + b"\0" + content).hexdigest()
        try:
            return self.get(key)
        except KeyError:
            pass
        try:
            pixels = decode_image(content)
            regions = self._detect(pixels)
        except BadInput as error:
            raise BadInput(f"{name}: {error}") from error
        shown = resized(pixels, min(SHOWN_LONGEST, max(pixels.shape[:2])))
        photograph = Photograph(key, name, (pixels.shape[0], pixels.shape[1]), regions, jpeg(shown))
        with self._lock:
            self._kept[key] = photograph
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)
        return photograph

    def get(self, key: str) -> Photograph:
        """Raises KeyError where it is not (or no longer) kept."""
        with self._lock:
            self._kept.move_to_end(key)
            return self._kept[key]


class KeptRegions:
    """The regions of photographs of the album, as `Understanding` asks for them.

    Args:
        class_names, origin: the detector's.
    """

    def __init__(self, class_names: Sequence[str], origin: RegionOrigin) -> None:
        self.class_names, self.origin = class_names, origin

    def __call__(self, photographs: Sequence[Photograph]) -> list[RegionFeatures]:
        return [photograph.regions for photograph in photographs]


def described(photograph: Photograph, class_names: Sequence[str], attribute_names: Sequence[str]) -> dict[str, Any]:
    """A photograph as JSON: its size, and of each region its words, confidence, colour (`#rrggbb`) and box (fractions x0 y0 x1 y1)."""
    regions = photograph.regions
    labels = label_regions(regions, class_names=class_names, attribute_names=attribute_names or None)
    boxes = np.clip(np.asarray(regions.norm_bb, dtype=np.float64)[:, :4], 0, 1).round(5).tolist()
    listed = []
    for label, box in zip(labels, boxes, strict=True):
        blue, green, red = class_colour(label.name or "")
        words = label.words or f"region {label.number}"
        colour = f"#{red:02x}{green:02x}{blue:02x}"
        listed.append({"words": words, "confidence": round(label.confidence, 4), "colour": colour, "box": box})
    return {
        "key": photograph.key,
        "name": photograph.name,
        "height": photograph.size[0],
        "width": photograph.size[1],
        "regions": listed,
    }
