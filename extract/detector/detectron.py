"""The Detectron2 detector: a Faster R-CNN of its model zoo or of one's own, Bottom-Up-Attention's above all.

Detectron2 is imported when a detector is built, not with this module.
"""

import functools
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from uniter.datasets.devices import usable_device
from uniter.datasets.errors import BadInput, UniterError, WrongUsage, unknown_name
from uniter.extract.detector.protocol import Detector, PreparedImage, RawRegions
from uniter.extract.install import require_detectron2

if TYPE_CHECKING:
    from uniter.extract.detector.network import Found
    from uniter.extract.detector.recipes import Recipe

log = logging.getLogger(__name__)

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
GPU_PRECISIONS = ("tf32", "fp16")


class Detectron2Detector:
    """A Faster R-CNN on Detectron2.

    Args:
        name: `butd`, `butd-36`, `vinvl` or another of its modes, `on-board`, a model-zoo name, a Detectron2 YAML, a folder made by
            `uniter-train detector`, or a recipe of one's own.
        weights: a file, a URL, a hub id or `random:SEED`; None takes the detector's own or its known sources, in order.
        device: "cpu", "cuda", "cuda:1" ...
        precision: "fp32" reproduces the reference; "bf16" and "fp16" (GPU only) run the RoI head alone in half precision; "tf32" (GPU only)
            multiplies everywhere in TF32, which moves proposals.
        attributes: also give the attribute distribution.
        label_map: names of classes and attributes, for `vinvl`; None takes the one beside the weights, or numbers.

    Raises:
        UniterError: Detectron2 is missing, the name or device is unknown, or no weights could be had.
        BadInput: configuration or weights cannot be used, or do not fit each other.

    Source: Bottom-Up-Attention (Anderson et al. 2018); Detectron2.
    """

    def __init__(
        self,
        name: "str | Recipe" = "butd",
        *,
        weights: str | None = None,
        device: str = "cpu",
        precision: str = "fp32",
        attributes: bool = False,
        label_map: str | None = None,
    ) -> None:
        require_detectron2()
        placed = _checked_device(device, precision)
        from uniter.extract.detector.assembly import assemble
        from uniter.extract.detector.network import SECOND_LOOK_NMS
        from uniter.extract.detector.recipes import find_recipe, with_label_map

        recipe = with_label_map(find_recipe(name) if isinstance(name, str) else name, label_map, weights=weights)
        network, loaded, anchors = assemble(recipe, weights, device=str(placed), precision=precision, attributes=attributes)
        self.network = network
        self.name: str = recipe.name
        self.feature_width: int = network.feature_width
        self.class_names: tuple[str, ...] = recipe.class_names
        self.attribute_names: tuple[str, ...] = recipe.attribute_names if attributes else ()
        self.min_boxes: int = recipe.min_boxes
        self.max_boxes: int = recipe.max_boxes
        self.device = str(network.device)
        self._preparation = recipe.preparation
        self._settings = {
            "detector": recipe.name,
            "weights": loaded.settings(),
            "anchors": anchors,
            "preparation": recipe.preparation.settings(),
            "precision": precision,
            "attributes": attributes,
            "box_kind": network.box_kind,
            # Regressed boxes lie where the things are: of two that overlap by a third, both may be people.
            **({"nms_threshold": SECOND_LOOK_NMS} if network.looks_twice else {}),
            "feature_width": network.feature_width,
            **recipe.facts,
        }

    def settings(self) -> dict[str, Any]:
        """All of the detector that changes a value, as JSON."""
        return dict(self._settings)

    def prepare(self, image: NDArray[np.uint8]) -> PreparedImage:
        """Host work for one upright (H, W, 3) uint8 BGR image; BadInput where it cannot be used."""
        return self._preparation(image)

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
        inputs = [_pinned(image.pixels, self.network.device) for image in images]
        with self.network.exact():
            given = None if boxes is None else [self._moved(_checked_boxes(rows)) for rows in boxes]
            scales = [image.scale for image in images]
            regions = functools.partial(self.network.regions, inputs, scales, given, attributes=bool(self.attribute_names))
            found = _to_host(regions(fixed=self.network.fixed and given is None))
            return found if found is not None else _arrived(_to_host(regions(fixed=False)))

    def _moved(self, boxes: NDArray[np.float32]) -> torch.Tensor:
        return _pinned(boxes, self.network.device).to(self.network.device, non_blocking=True)


def _checked_device(name: str, precision: str) -> torch.device:
    """The device, once it is known to be there and to compute in that precision."""
    if precision not in PRECISIONS:
        raise WrongUsage(unknown_name("precision", precision, PRECISIONS))
    device = usable_device(name)
    if device.type not in ("cpu", "cuda"):
        raise UniterError(f"device {name!r}: detectors run on cpu and cuda only")
    if precision in GPU_PRECISIONS and device.type == "cpu":
        raise UniterError(f"precision {precision} needs a GPU; on a CPU use fp32, or bf16 where the processor has it")
    if precision == "bf16" and device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        log.warning("this processor has no bf16 instructions: --precision bf16 will be slower than fp32 here")
    return device


def _checked_boxes(boxes: NDArray[np.floating]) -> NDArray[np.float32]:
    array = np.array(boxes, dtype=np.float32).reshape(-1, 4)
    if not np.isfinite(array).all():
        raise BadInput("a given box holds a number that is not finite; expected x0 y0 x1 y1 in pixels of the upright image")
    return array


def _pinned(pixels: NDArray[Any], device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(pixels))
    return tensor.pin_memory() if device.type == "cuda" else tensor


def _to_host(results: "Sequence[Found]") -> list[RawRegions] | None:
    """All results in host memory, without fillers; from a GPU by asynchronous copies into pinned memory and one wait.

    None where the suppression of an image did not settle.
    """
    copies = [[None if tensor is None else _begin_copy(tensor) for tensor in found] for found in results]
    if results[0].boxes.is_cuda:
        torch.cuda.current_stream(results[0].boxes.device).synchronize()
    raw = []
    for *tensors, kept, settled in copies:
        if settled is not None and not settled:
            return None
        rows = slice(None if kept is None else int(kept))
        raw.append(RawRegions(*(None if tensor is None else tensor[rows].numpy() for tensor in tensors)))  # type: ignore[arg-type]
    return raw


def _arrived(found: list[RawRegions] | None) -> list[RawRegions]:
    assert found is not None  # what was not of one size always settles
    return found


def _begin_copy(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_cuda:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def build_detector(
    name: str = "butd",
    *,
    weights: str | None = None,
    device: str = "cpu",
    precision: str = "fp32",
    attributes: bool = False,
    label_map: str | None = None,
) -> Detector:
    """A detector by name: `butd`, `vinvl`, `on-board`, a Detectron2 model-zoo name or YAML, or a folder of `uniter-train detector`.

    See `Detectron2Detector` for arguments and errors.
    """
    return Detectron2Detector(name, weights=weights, device=device, precision=precision, attributes=attributes, label_map=label_map)
