"""The detector protocol: what the extraction run asks of a detector, and what it gets. Needs neither PyTorch nor Detectron2.

The box of a region is always the one its feature was pooled from (the un-regressed proposal), and column 0 of its probabilities is the
background.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["Detector", "PreparedImage", "RawRegions", "checked_regions", "is_out_of_memory", "release_memory"]


@dataclass(frozen=True, slots=True, eq=False)
class PreparedImage:
    """One image as a network wants it.

    Attributes:
        pixels: (h, w, 3) float32 or uint8, channels in the network's order; uint8 is normalised on the device.
        scale: (x, y), network pixels per pixel of the upright image.
        size: (height, width) of the upright image in pixels.
    """

    pixels: NDArray[np.float32] | NDArray[np.uint8]
    scale: tuple[float, float]
    size: tuple[int, int]


Float32Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class RawRegions:
    """What a detector says about the P boxes it pooled from, before any is left out; the detector's order.

    Attributes:
        boxes: (P, 4) float32, pixels of the upright image, x0 y0 x1 y1: the region the feature was pooled from.
        features: (P, D) float32, what the box predictor sees.
        probabilities: (P, C + 1) float32, background FIRST.
        attributes: (P, A + 1) float32 with "no attribute" first; None unless asked for.
        confidence: (P,) float32, which of the boxes are to stay, where the detector has a rule of its own: 0 for one that it suppressed.
            None: Bottom-Up-Attention's, see `uniter.extract.select`.
    """

    boxes: Float32Array
    features: Float32Array
    probabilities: Float32Array
    attributes: Float32Array | None = None
    confidence: Float32Array | None = None


class Detector(Protocol):
    """What the extraction run needs.

    Attributes:
        name: as the user asked for it.
        feature_width: columns of a feature.
        class_names: without the background, column k + 1 of the probabilities is class k.
        attribute_names: without "no attribute"; empty where the detector knows none or was not asked.
        min_boxes, max_boxes: how many regions this detector's users keep (10 and 100; `butd-36`: 36 and 36).
        device: where it computes, as PyTorch writes it: "cpu", "cuda:0".
    """

    name: str
    feature_width: int
    class_names: tuple[str, ...]
    attribute_names: tuple[str, ...]
    min_boxes: int
    max_boxes: int
    device: str

    def settings(self) -> dict[str, Any]:
        """All of the detector that changes a value, as JSON."""
        ...

    def prepare(self, image: NDArray[np.uint8]) -> PreparedImage:
        """Host work for one upright (H, W, 3) uint8 BGR image; BadInput where it cannot be used."""
        ...

    def detect(self, images: Sequence[PreparedImage], *, boxes: Sequence[NDArray[np.floating]] | None = None) -> list[RawRegions]:
        """Regions of each image, the same as alone; of the given boxes (pixels of the upright image) in their order, if there are any.

        Where memory does not suffice, an error of which `is_out_of_memory` is true.
        """
        ...


def checked_regions(found: Sequence[RawRegions], detector: Detector, images: int) -> list[RawRegions]:
    """What a detector, of whomever, returned for so many images, once it is known to be what it says of itself.

    Raises:
        ValueError: a shape, a number that is not finite, or probabilities that do not add up to 1; the sentence names what was expected.
    """
    if len(found) != images:
        raise ValueError(f"detector {detector.name!r} returned regions of {len(found)} images for {images}; expected one entry each")
    for raw in found:
        count = len(raw.boxes)
        expected = {
            "boxes": (count, 4),
            "features": (count, detector.feature_width),
            "probabilities": (count, len(detector.class_names) + 1),
            "attributes": (count, len(detector.attribute_names) + 1),
            "confidence": (count,),
        }
        for name, shape in expected.items():
            array = getattr(raw, name)
            if array is None and name in ("attributes", "confidence") and not (name == "attributes" and detector.attribute_names):
                continue
            if not isinstance(array, np.ndarray) or array.dtype != np.float32 or array.shape != shape:
                got = f"{array.shape} {array.dtype}" if isinstance(array, np.ndarray) else f"a {type(array).__name__}"
                raise ValueError(f"detector {detector.name!r}: {name} are {got}; expected a float32 array of {shape}")
        if not np.isfinite(raw.boxes).all():
            raise ValueError(f"detector {detector.name!r}: a box holds a number that is not finite")
        if count and not np.allclose(raw.probabilities.sum(axis=1), 1, atol=0.01):
            raise ValueError(f"detector {detector.name!r}: the probabilities of a region, background first, do not add up to 1")
    return list(found)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that memory did not suffice, on a GPU or on the host; smaller batches may then succeed."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (
            isinstance(error, RuntimeError)
            and any(sign in str(error) for sign in ("can't allocate memory", "not enough memory", "out of memory"))
        )
    )


def release_memory() -> None:
    """Give back what PyTorch holds in reserve on the GPU, after a batch did not fit."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
