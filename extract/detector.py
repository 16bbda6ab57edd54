"""The detector protocol: what the extraction run asks of a detector, and what it gets. Needs neither PyTorch nor Detectron2.

The box of a region is always the one its feature was pooled from (the un-regressed proposal), and column 0 of its probabilities is the
background.
"""

import sys
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from uniter.extract.preparation import Preparation, PreparedImage
from uniter.extract.select import RawRegions

__all__ = ["Detector", "PreparedImage", "RawRegions", "build_detector", "is_out_of_memory", "release_memory"]


class Detector(Protocol):
    """What the extraction run needs.

    Attributes:
        name: as the user asked for it.
        feature_width: columns of a feature.
        class_names: without the background, column k + 1 of the probabilities is class k.
        attribute_names: without "no attribute"; empty where the detector knows none or was not asked.
        min_boxes, max_boxes: how many regions this detector's users keep (10 and 100; `butd-36`: 36 and 36).
        preparation: the host work of `prepare` as a small picklable callable, for worker processes.
    """

    name: str
    feature_width: int
    class_names: tuple[str, ...]
    attribute_names: tuple[str, ...]
    min_boxes: int
    max_boxes: int
    preparation: Preparation

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


def build_detector(
    name: str = "butd", *, weights: str | None = None, device: str = "cpu", precision: str = "fp32", attributes: bool = False
) -> Detector:
    """A detector by name: `butd`, `butd-36`, a Detectron2 model-zoo name or YAML, or a folder made by `uniter-train detector`.

    See `Detectron2Detector` for arguments and errors.
    """
    from uniter.extract.detectron import Detectron2Detector

    return Detectron2Detector(name, weights=weights, device=device, precision=precision, attributes=attributes)


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
