"""Regions that training leaves alone: neither found nor background.

COCO's crowds, and what `ignore` marks in an annotation file: things that are there but were not drawn one by one, or a teacher's doubts. An
anchor or a proposal of which more than half lies in such a region is no background; what covers an annotated box stays that.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from detectron2.structures import Boxes, Instances, pairwise_ioa, pairwise_iou
from torch import Tensor, nn

COVERED = 0.5
"""Of an anchor or proposal, the share from which it counts as lying in an ignored region."""


class IgnoredRegions:
    """Has a network of Detectron2's leave regions alone: those that the batch's items bring as `ignored`, (N, 4) in input pixels."""

    def __init__(self, network: Any) -> None:
        self._of_images: list[Tensor] = []
        self._anchors_covered: Iterator[Tensor] = iter(())
        rpn, heads = network.proposal_generator, network.roi_heads
        self._label_anchors, self._sample_anchors = rpn.label_and_sample_anchors, rpn._subsample_labels
        self._label_proposals = heads.label_and_sample_proposals
        rpn.label_and_sample_anchors, rpn._subsample_labels = self.label_anchors, self.sample_anchors
        heads.label_and_sample_proposals = self.label_proposals
        network.register_forward_pre_hook(self._note)

    def _note(self, network: nn.Module, inputs: tuple[list[dict[str, Any]]]) -> None:
        if network.training:
            self._of_images = [item["ignored"] for item in inputs[0]]

    def label_anchors(self, anchors: list[Boxes], instances: list[Instances]) -> Any:
        """As the RPN's own; which anchors are covered is handed on to `sample_anchors`, which it calls once an image."""
        together = Boxes.cat(anchors)
        self._anchors_covered = iter([_covered(together, regions) for regions in self._of_images])
        return self._label_anchors(anchors, instances)

    def sample_anchors(self, labels: Tensor) -> Tensor:
        """As the RPN's own, of those that are not left alone; labels (A,): 1 thing, 0 background, -1 left alone."""
        labels[next(self._anchors_covered) & (labels != 1)] = -1
        sampled: Tensor = self._sample_anchors(labels)
        return sampled

    def label_proposals(self, proposals: Sequence[Instances], targets: Sequence[Instances]) -> Any:
        """As the RoI heads' own, of the proposals that are not left alone."""
        kept = []
        for found, wanted, regions in zip(proposals, targets, self._of_images, strict=True):
            covered = _covered(found.proposal_boxes, regions)
            if len(wanted) and covered.any():
                covered &= pairwise_iou(wanted.gt_boxes, found.proposal_boxes).max(dim=0).values <= 0.5
            kept.append(found[~covered])
        return self._label_proposals(kept, targets)


def _covered(boxes: Boxes, regions: Tensor) -> Tensor:
    """(N,) bool: which boxes lie in a region by more than `COVERED` of their area."""
    if not len(regions) or not len(boxes):
        return torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    covered: Tensor = pairwise_ioa(Boxes(regions.to(boxes.device)), boxes).max(dim=0).values > COVERED
    return covered
