"""How VinVL's detector chooses classes, boxes and confidences of its proposals, and how attributes follow from that.

Easy to get wrong: a region's class is the best one in whose non-maximum suppression it survives, which may not be its most probable
one, and that class is embedded for the attributes; non-maximum suppression here counts no pixel inclusively (no + 1). What is decided
here does not depend on thresholds: how many regions stay is `uniter.extract.select`'s.

Imports Detectron2: load this module only where a detector is built.

Source: microsoft/scene_graph_benchmark (`roi_heads/box_head/inference.py`, `attribute_head/attribute_head.py`, README).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.ops import nms

from uniter.extract.detector.extents import Size
from uniter.extract.detector.network import PROPOSAL, FeatureMaps, Found, Places, RegionNetwork, probabilities
from uniter.extract.detector.vinvl import clipped, decoded

CLASSES_AT_ONCE = 128
"""On a GPU, where suppression runs for many classes together: (128, 300, 300) float32 are 46 MB."""


@dataclass(frozen=True)
class VinvlMode:
    """One way to choose boxes.

    Attributes:
        nms_filter: the reference's NMS_FILTER: 0 keeps a box for every class, 1 the best class of each proposal that survives its
            class's suppression, 2 the best of all classes, suppressed all together.
        regressed: boxes as the class moves them (the reference's IGNORE_BOX_REGRESSION False).
        nms_threshold: intersection over union above which the weaker box goes.
    """

    nms_filter: int
    regressed: bool
    nms_threshold: float

    @property
    def rule(self) -> str:
        """The name of its rule in `uniter.extract.select`."""
        return f"vinvl-filter-{self.nms_filter}"


VINVL_MODES = {
    "vinvl": VinvlMode(1, regressed=False, nms_threshold=0.3),
    "vinvl-filter-2": VinvlMode(2, regressed=False, nms_threshold=0.5),
    "vinvl-regressed": VinvlMode(1, regressed=True, nms_threshold=0.3),
    "vinvl-filter-0": VinvlMode(0, regressed=True, nms_threshold=0.5),
}
"""By the detector's name: the documented extraction command, the name of the released feature folders, the demo, the configuration."""


class Chosen(NamedTuple):
    """Which boxes are candidates, of P proposals.

    Attributes:
        rows: (K,) int64, the proposal of each.
        labels: (K,) int64, the class of each, from 0 without the background.
        boxes: (K, 4) network pixels.
        confidence: (K,), 0 for one that was suppressed.
    """

    rows: Tensor
    labels: Tensor
    boxes: Tensor
    confidence: Tensor


class VinvlNetwork(RegionNetwork):
    """VinVL's network: regions as one of its modes chooses them."""

    def __init__(self, model: Any, *, device: str = "cpu", precision: str = "fp32", mode: VinvlMode = VINVL_MODES["vinvl"]) -> None:
        super().__init__(model, device=device, precision=precision)
        self.mode = mode
        self.box_kind = "regressed, features of the proposal" if mode.regressed else PROPOSAL

    def described(self, maps: FeatureMaps, places: Places, *, attributes: bool) -> Found:
        """As the base class's; candidates in the order of the proposals, or, box by class, by their scores."""
        features = self.region_features(maps, places.in_network)
        classes = probabilities(self.class_logits(features))
        if places.given:
            found = None
            if attributes:
                # The reference pools attributes' features again, at the box cut at the border.
                inside = clipped(places.in_network, places.size)
                seen = features if torch.equal(inside, places.in_network) else self.region_features(maps, inside)
                found = self.attribute_shares(seen, best_labels(classes))
            return Found(places.in_image, features, classes, found)
        chosen = self.chosen(features, classes[:, 1:], places)
        rows, boxes = chosen.rows, places.in_image
        found, seen = None, features
        if self.mode.regressed:
            features, classes, boxes = features[rows], classes[rows], chosen.boxes / places.factors
            seen = self.region_features(maps, chosen.boxes) if attributes else features
        if attributes:
            found = self.attribute_shares(seen, chosen.labels)
        return Found(boxes, features, classes, found, chosen.confidence)

    def chosen(self, features: Tensor, scores: Tensor, places: Places) -> Chosen:
        """Class, box and confidence of each candidate.

        Args:
            features: (P, D) of the proposals.
            scores: (P, C), class probabilities without the background.
            places: of the proposals.
        """
        boxes = places.in_network
        everyone = torch.arange(len(boxes), device=boxes.device)
        if not scores.numel():
            return Chosen(everyone, everyone, boxes, scores.new_zeros(len(boxes)))
        if self.mode.nms_filter == 2:
            best, labels = scores.max(dim=1)
            stays = torch.zeros_like(best)
            stays[nms(boxes, best, self.mode.nms_threshold)] = 1
            return Chosen(everyone, labels, boxes, best * stays)
        moved = self.class_boxes(features, boxes, places.size) if self.mode.regressed else None
        survives_CP = surviving(boxes[None] if moved is None else moved, scores.T, self.mode.nms_threshold)
        standing_PC = scores * survives_CP.T
        if self.mode.nms_filter == 0:
            assert moved is not None
            # As many as proposals: `select_regions` never keeps more than the best of them.
            confidence, pairs = standing_PC.flatten().topk(min(len(boxes), standing_PC.numel()))
            rows, labels = pairs // scores.shape[1], pairs % scores.shape[1]
            return Chosen(rows, labels, moved[labels, rows], confidence)
        confidence, labels = standing_PC.max(dim=1)
        return Chosen(everyone, labels, boxes if moved is None else moved[labels, everyone], confidence)

    def class_boxes(self, features: Tensor, boxes: Tensor, size: Size) -> Tensor:
        """(C, P, 4) network pixels: where each class moves each proposal (P, 4), clipped."""
        deltas = self.predictor.bbox_pred(features).view(len(boxes), -1, 4).transpose(0, 1)
        return clipped(decoded(boxes[None], deltas, tuple(self.predictor.box2box_transform.weights)), size)

    def attribute_shares(self, features: Tensor, labels: Tensor) -> Tensor:
        """(K, A + 1), "no attribute" first, of features (K, D) and classes (K,) from 0."""
        return probabilities(self.attribute_logits(features, labels))


def best_labels(classes: Tensor) -> Tensor:
    """(P,) the most probable class from 0, of distributions (P, C + 1) with the background first."""
    return classes[:, 1:].argmax(dim=1) if len(classes) else classes.new_zeros((0,), dtype=torch.int64)


def surviving(boxes: Tensor, scores_CP: Tensor, threshold: float) -> Tensor:
    """Which of P boxes survive non-maximum suppression within each of C classes, as torchvision's `nms` decides it.

    Args:
        boxes: (1, P, 4), the same for every class, or (C, P, 4).
        scores_CP: (C, P).

    Returns:
        (C, P) bool.
    """
    if scores_CP.is_cuda:
        parts = torch.split(torch.arange(len(scores_CP), device=scores_CP.device), CLASSES_AT_ONCE)
        return torch.cat([_surviving_together(boxes if len(boxes) == 1 else boxes[part], scores_CP[part], threshold) for part in parts])
    survives = torch.zeros_like(scores_CP, dtype=torch.bool)
    for number, scores in enumerate(scores_CP):
        survives[number, nms(boxes[number if len(boxes) > 1 else 0], scores, threshold)] = True
    return survives


def _surviving_together(boxes: Tensor, scores_CP: Tensor, threshold: float) -> Tensor:
    """As `surviving`, for all classes at once and without the host: a box stands that no standing better box overlaps.

    Asked again and again, beginning with all standing, the answer settles first for the best box, then for the second best, and so on;
    when it no longer changes it is that of going through the boxes in order, the only one that contradicts itself nowhere.
    """
    area = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
    low = torch.maximum(boxes[:, :, None, :2], boxes[:, None, :, :2])
    high = torch.minimum(boxes[:, :, None, 2:], boxes[:, None, :, 2:])
    shared = (high - low).clamp(min=0).prod(dim=-1)
    overlaps = shared / (area[:, :, None] + area[:, None, :] - shared) > threshold
    earlier = torch.arange(scores_CP.shape[1], device=scores_CP.device)
    mine, other = scores_CP[:, :, None], scores_CP[:, None, :]
    overruled_CPP = overlaps & ((other > mine) | ((other == mine) & (earlier[None, :] < earlier[:, None])))
    standing = torch.ones_like(scores_CP, dtype=torch.bool)
    while True:
        after = ~(overruled_CPP & standing[:, None, :]).any(dim=2)
        if torch.equal(after, standing):
            return standing
        standing = after
