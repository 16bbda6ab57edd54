"""From an upright image to a network's input: the host work of a detector, free of PyTorch and Detectron2.

Caffe subtracts the mean first and gives cv2 the *scale*; Detectron2 resizes the uint8 image to a *size* with Pillow. At scales that
are no integers the two differ by tens of grey levels at edges, so each detector keeps the way it was trained with.
"""

from dataclasses import asdict, dataclass
from typing import Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from uniter.datasets.errors import BadInput
from uniter.extract.detector.protocol import PreparedImage

SMALLEST_SIDE = 8


"""Shorter network inputs leave nothing after the stem; only images some hundred times longer than wide come to this."""


class Preparation(Protocol):
    """Makes a PreparedImage of an upright image: the host work of one kind of detector."""

    def __call__(self, image: NDArray[np.uint8]) -> PreparedImage: ...

    def settings(self) -> dict[str, Any]:
        """All that decides what the network sees, as JSON; `rule` names the kind. Regions made under other settings are others."""


CAFFE_MEAN_BGR = (102.9801, 115.9465, 122.7717)


@dataclass(frozen=True)
class CaffePreparation:
    """float32, mean subtracted, then `cv2.resize` with fx = fy = scale: Bottom-Up-Attention's `_get_image_blob`.

    The shorter side becomes `shortest` pixels unless the longer one would exceed `longest`; no padding, no division by a deviation.
    """

    shortest: int = 600
    longest: int = 1000
    mean_bgr: tuple[float, float, float] = CAFFE_MEAN_BGR

    def __call__(self, image: NDArray[np.uint8]) -> PreparedImage:
        """Prepare an upright (H, W, 3) uint8 BGR image; BadInput where it is too thin for the network."""
        height, width = _checked_size(image)
        scale = self.scale(height, width)
        _check_network_size(height, width, round(height * scale), round(width * scale))
        centred = image.astype(np.float32)
        centred -= np.asarray(self.mean_bgr, dtype=np.float32)  # in place: a photograph of 100 megapixels takes 1.2 GB here
        if scale != 1:
            centred = np.asarray(cv2.resize(centred, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR), dtype=np.float32)
        return PreparedImage(centred, (scale, scale), (height, width))

    def scale(self, height: int, width: int) -> float:
        """Network pixels per image pixel."""
        scale = self.shortest / min(height, width)
        if round(scale * max(height, width)) > self.longest:
            scale = self.longest / max(height, width)
        return scale

    def settings(self) -> dict[str, Any]:
        """As of `Preparation`, with the rule "caffe"."""
        return {"rule": "caffe", **asdict(self)}


@dataclass(frozen=True)
class ShortestEdgePreparation:
    """Detectron2's ResizeShortestEdge: Pillow's bilinear filter on the uint8 image, to whole pixels; normalised later, on the device."""

    shortest: int = 800
    longest: int = 1333
    channels: str = "BGR"

    def __call__(self, image: NDArray[np.uint8]) -> PreparedImage:
        """Prepare an upright (H, W, 3) uint8 BGR image; BadInput where it is too thin for the network."""
        height, width = _checked_size(image)
        new_height, new_width = self.network_size(height, width)
        _check_network_size(height, width, new_height, new_width)
        ordered = image[:, :, ::-1] if self.channels == "RGB" else image
        resized = Image.fromarray(np.ascontiguousarray(ordered)).resize((new_width, new_height), Image.Resampling.BILINEAR)
        return PreparedImage(np.array(resized), (new_width / width, new_height / height), (height, width))

    def network_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the network's input; `shortest` 0 leaves the image as it is."""
        if not self.shortest:
            return height, width
        scale = self.shortest / min(height, width)
        exact_height, exact_width = (self.shortest, scale * width) if height < width else (scale * height, self.shortest)
        if max(exact_height, exact_width) > self.longest:
            shrink = self.longest / max(exact_height, exact_width)
            exact_height, exact_width = exact_height * shrink, exact_width * shrink
        return int(exact_height + 0.5), int(exact_width + 0.5)

    def settings(self) -> dict[str, Any]:
        """As of `Preparation`, with the rule "detectron2"."""
        return {"rule": "detectron2", **asdict(self)}


@dataclass(frozen=True)
class VinvlPreparation(ShortestEdgePreparation):
    """VinVL's Resize: Pillow's bilinear filter too, but the shorter side is chosen in whole pixels and the longer one truncated.

    Source: microsoft/scene_graph_benchmark, `maskrcnn_benchmark/data/transforms/transforms.py`.
    """

    shortest: int = 600
    longest: int = 1000

    def network_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the network's input."""
        short, long = min(height, width), max(height, width)
        size = self.shortest
        if long / short * size > self.longest:
            size = round(self.longest * short / long)
        if short == size:
            return height, width
        size_of_long = int(size * long / short)
        return (size, size_of_long) if height < width else (size_of_long, size)

    def settings(self) -> dict[str, Any]:
        """As of `Preparation`, with the rule "vinvl"."""
        return {"rule": "vinvl", **asdict(self)}


def _checked_size(image: NDArray[np.uint8]) -> tuple[int, int]:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"an upright BGR image of (height, width, 3) uint8 is expected, got {image.shape} {image.dtype}")
    return image.shape[0], image.shape[1]


def _check_network_size(height: int, width: int, new_height: int, new_width: int) -> None:
    if min(new_height, new_width) < SMALLEST_SIDE:
        raise BadInput(
            f"an image of {width} x {height} pixels becomes {new_width} x {new_height} at the detector's scale, and nothing is left of it "
            f"after the first layers; crop it so that it is less elongated"
        )
