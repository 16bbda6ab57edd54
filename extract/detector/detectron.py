"""The Detectron2 detector: a Faster R-CNN of its model zoo or of one's own, Bottom-Up-Attention's above all.

Detectron2 is imported when a detector is built, not with this module.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from uniter.datasets.errors import BadInput, UniterError, unknown_name
from uniter.extract.detector.protocol import Detector, Preparation, PreparedImage, RawRegions
from uniter.extract.install import require_detectron2

log = logging.getLogger(__name__)

BOX_KIND = "proposal"


"""The region that the feature was pooled from, un-regressed; goes into the header."""


PRECISIONS = ("fp32", "bf16", "fp16")


class Detectron2Detector:
    """A Faster R-CNN on Detectron2.

    Args:
        name: `butd`, `butd-36`, a model-zoo name, a Detectron2 YAML, or a folder made by `uniter-train detector`.
        weights: a file, a URL, a hub id or `random:SEED`; None takes the detector's own or its known sources, in order.
        device: "cpu", "cuda", "cuda:1" ...
        precision: "fp32" reproduces the reference; "bf16" and "fp16" (GPU only) run the RoI head in half precision.
        attributes: also give the attribute distribution.

    Raises:
        UniterError: Detectron2 is missing, the name or device is unknown, or no weights could be had.
        BadInput: configuration or weights cannot be used, or do not fit each other.

    Source: Bottom-Up-Attention (Anderson et al. 2018); Detectron2.
    """

    def __init__(
        self, name: str = "butd", *, weights: str | None = None, device: str = "cpu", precision: str = "fp32", attributes: bool = False
    ) -> None:
        require_detectron2()
        _check_device(device, precision)
        from uniter.extract.detector.recipes import find_recipe

        self._build(find_recipe(name), weights=weights, device=device, precision=precision, attributes=attributes)

    @classmethod
    def from_recipe(
        cls, recipe: Any, *, weights: str | None = None, device: str = "cpu", precision: str = "fp32", attributes: bool = False
    ) -> "Detectron2Detector":
        """A detector of a `recipes.Recipe` of one's own."""
        _check_device(device, precision)
        detector = cls.__new__(cls)
        detector._build(recipe, weights=weights, device=device, precision=precision, attributes=attributes)
        return detector

    def _build(self, recipe: Any, *, weights: str | None, device: str, precision: str, attributes: bool) -> None:
        from uniter.extract.detector.assembly import assemble

        network, loaded, anchors = assemble(recipe, weights, device=device, precision=precision, attributes=attributes)
        self.network = network
        self.name: str = recipe.name
        self.feature_width: int = network.feature_width
        self.class_names: tuple[str, ...] = recipe.class_names
        self.attribute_names: tuple[str, ...] = recipe.attribute_names if attributes else ()
        self.min_boxes: int = recipe.min_boxes
        self.max_boxes: int = recipe.max_boxes
        self.preparation: Preparation = recipe.preparation
        self._settings = {
            "detector": recipe.name,
            "weights": loaded.settings(),
            "anchors": anchors,
            "preparation": recipe.preparation.settings(),
            "precision": precision,
            "attributes": attributes,
            "box_kind": BOX_KIND,
            "feature_width": network.feature_width,
            **recipe.facts,
        }

    def settings(self) -> dict[str, Any]:
        """All of the detector that changes a value, as JSON."""
        return dict(self._settings)

    def prepare(self, image: NDArray[np.uint8]) -> PreparedImage:
        """Host work for one upright (H, W, 3) uint8 BGR image; BadInput where it cannot be used."""
        return self.preparation(image)

    def detect(self, images: Sequence[PreparedImage], *, boxes: Sequence[NDArray[np.floating]] | None = None) -> list[RawRegions]:
        """Regions of each image of a batch, exactly as of the image alone.

        Args:
            images: as `prepare` makes them, of any sizes.
            boxes: (P, 4) pixels of each upright image; their features are taken as they are, in their order, instead of proposals'.

        Raises:
            ValueError: a given box is not finite, or there are not as many lists of boxes as images.
            An error of which `is_out_of_memory` is true, where memory does not suffice; smaller batches may then succeed.
        """
        if boxes is not None and len(boxes) != len(images):
            raise ValueError(f"{len(boxes)} lists of boxes for {len(images)} images; expected one each")
        if not images:
            return []
        network = self.network
        with network.exact():
            inputs = [network.normalised(_pinned(image.pixels, network.device)) for image in images]
            # A copy out of pageable memory would wait for the network.
            scales = _pinned(np.array([image.scale * 2 for image in images], dtype=np.float32), network.device)
            scales = scales.to(network.device, non_blocking=True)
            levels = network.feature_maps(inputs)
            # All proposals first, whose number the host has to know: the heads then run on a GPU one after the other without waiting.
            regions = []
            for index, (image, scale, (maps, answers)) in enumerate(zip(images, scales, levels, strict=True)):
                if boxes is None:
                    network_boxes, _ = network.proposals(maps, answers, (image.pixels.shape[0], image.pixels.shape[1]), image.scale[0])
                    regions.append((network_boxes, network_boxes / scale))
                else:
                    given = _pinned(_checked_boxes(boxes[index]), network.device).to(network.device, non_blocking=True)
                    regions.append((given * scale, given))
            results: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]] = []
            for (maps, _), (network_boxes, image_boxes) in zip(levels, regions, strict=True):
                features = network.region_features(maps, network_boxes)
                results.append((image_boxes, features, *network.scores(features, attributes=bool(self.attribute_names))))
            return _to_host(results)


def _check_device(device: str, precision: str) -> None:
    if precision not in PRECISIONS:
        raise UniterError(unknown_name("precision", precision, PRECISIONS))
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise UniterError(f"device {device!r}: no such device; expected cpu, cuda or cuda:N") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise UniterError(f"device {device!r}: PyTorch sees no GPU here; use --device cpu")
    if kind not in ("cpu", "cuda"):
        raise UniterError(f"device {device!r}: only cpu and cuda are supported")
    if precision == "fp16" and kind == "cpu":
        raise UniterError("precision fp16 needs a GPU; on a CPU use fp32, or bf16 where the processor has it")
    if precision == "bf16" and kind == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        log.warning("this processor has no bf16 instructions: --precision bf16 will be slower than fp32 here")


def _checked_boxes(boxes: NDArray[np.floating]) -> NDArray[np.float32]:
    array = np.array(boxes, dtype=np.float32).reshape(-1, 4)
    if not np.isfinite(array).all():
        raise BadInput("a given box holds a number that is not finite; expected x0 y0 x1 y1 in pixels of the upright image")
    return array


def _pinned(pixels: NDArray[Any], device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(pixels))
    return tensor.pin_memory() if device.type == "cuda" else tensor


def _to_host(results: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]]) -> list[RawRegions]:
    """All results in host memory; from a GPU by asynchronous copies into pinned memory and one wait."""
    copies = [(_begin_copy(b), _begin_copy(f), _begin_copy(c), None if a is None else _begin_copy(a)) for b, f, c, a in results]
    if results[0][0].is_cuda:
        torch.cuda.current_stream(results[0][0].device).synchronize()
    return [
        RawRegions(boxes.numpy(), features.numpy(), classes.numpy(), None if attributes is None else attributes.numpy())
        for boxes, features, classes, attributes in copies
    ]


def _begin_copy(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_cuda:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def build_detector(
    name: str = "butd", *, weights: str | None = None, device: str = "cpu", precision: str = "fp32", attributes: bool = False
) -> Detector:
    """A detector by name: `butd`, `butd-36`, a Detectron2 model-zoo name or YAML, or a folder made by `uniter-train detector`.

    See `Detectron2Detector` for arguments and errors.
    """
    from uniter.extract.detector.detectron import Detectron2Detector

    return Detectron2Detector(name, weights=weights, device=device, precision=precision, attributes=attributes)
