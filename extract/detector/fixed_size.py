"""Proposals in tensors of one size, so that the host never has to ask a GPU how many there are.

What a reader would get wrong: behind the first `kept` rows stand fillers, copies of the first row, through the whole network; they are
cut away where the results arrive on the host. Non-maximum suppression is asked again and again instead of going through the boxes in
order; that settles after as many rounds as the longest chain of boxes that decide over each other. If a batch needed more than `ROUNDS`,
it says so (`settled`), and is computed again with a suppression that waits.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from uniter.extract.detector.extents import Size

ROUNDS = 64
"""Of a suppression. A round reads one byte for each pair of boxes: 36 MB for 6,000 of them, 10 millionths of a second on an H100."""


class Candidates(NamedTuple):
    """Boxes of one image before suppression.

    Attributes:
        boxes: (N, 4) network pixels.
        logits: (N,).
        usable: (N,) bool; the others count as not there.
        compared: (N, 4), the boxes as their overlaps are measured, where that is not as they are.
        groups: (N,), only boxes of the same one suppress each other; None: all do.
        before, after: at most so many go into suppression, and come out of it. threshold: of intersection over union.
    """

    boxes: Tensor
    logits: Tensor
    usable: Tensor
    compared: Tensor
    groups: Tensor | None
    before: int
    after: int
    threshold: float


class FixedBoxes(NamedTuple):
    """What stays, of one size.

    Attributes:
        boxes: (K, 4), best first, then fillers. rows: (K,), which candidates they are.
        kept: () int64, how many are no fillers. settled: () bool.
    """

    boxes: Tensor
    rows: Tensor
    kept: Tensor
    settled: Tensor


def first_standing(candidates: Candidates) -> FixedBoxes:
    """The best candidates by non-maximum suppression, as torchvision's `nms` decides it, without a wait."""
    boxes, logits, usable, compared, groups, before, after, threshold = candidates
    order = logits.masked_fill(~usable, -torch.inf).argsort(descending=True, stable=True)[:before]
    overruled_NN = overlapping_pairs(compared[order], threshold).tril(diagonal=-1)
    if groups is not None:
        overruled_NN &= groups[order][:, None] == groups[order][None, :]
    usable = usable[order]
    standing, settled = settled_standing(overruled_NN & usable[None, :], usable)
    places = torch.arange(len(order), device=order.device)
    most = min(after, len(order))
    first = torch.where(standing, places, len(order)).sort().values[:most]
    kept = (first < len(order)).sum()
    rows = order[torch.where(first < len(order), first, first[:1].clamp(max=len(order) - 1))]
    return FixedBoxes(boxes[rows], rows, kept, settled)


def settled_standing(overruled_NN: Tensor, standing: Tensor) -> tuple[Tensor, Tensor]:
    """Which boxes stand: those that no standing better one overrules.

    Asked again and again, beginning with all standing, the answer settles first for the best box, then for the second best, and so on; when
    it no longer changes it is that of going through the boxes in order, the only one that contradicts itself nowhere.

    Args:
        overruled_NN: (N, N) bool, [i, j]: i falls if j stands; j is better than i.
        standing: (N,) bool, those that are there.

    Returns:
        (N,) bool, and () bool: whether it settled within `ROUNDS`.
    """
    there = before = standing
    for _ in range(ROUNDS):
        before, standing = standing, there & ~(overruled_NN & standing).any(dim=1)
    return standing, (before == standing).all()


def overlapping_pairs(boxes: Tensor, threshold: float) -> Tensor:
    """(N, N) bool: whose intersection over union is above the threshold, in torchvision's order of operations."""
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    width = torch.minimum(boxes[:, None, 2], boxes[None, :, 2]) - torch.maximum(boxes[:, None, 0], boxes[None, :, 0])
    height = torch.minimum(boxes[:, None, 3], boxes[None, :, 3]) - torch.maximum(boxes[:, None, 1], boxes[None, :, 1])
    shared = width.clamp_(min=0).mul_(height.clamp_(min=0))
    return shared / (area[:, None] + area[None, :] - shared) > threshold


def detectron2_candidates(rpn: Any, anchors: list[Any], logits: list[Tensor], deltas: list[Tensor], size: Size) -> Candidates:
    """Of one image, as Detectron2's `find_top_rpn_proposals` finds them: the best of each level, clipped, none empty.

    Args:
        rpn: Detectron2's RPN.
        anchors, logits, deltas: of each level, (A, 4) boxes, (A,) and (A, 4).
        size: (height, width) of the network's input, without padding.
    """
    boxes, scores, levels = [], [], []
    for level, (places, level_logits, level_deltas) in enumerate(zip(anchors, logits, deltas, strict=True)):
        best, rows = level_logits.sort(descending=True)
        rows = rows[: rpn.pre_nms_topk[False]]
        boxes.append(rpn.box2box_transform.apply_deltas(level_deltas, places.tensor)[rows])
        scores.append(best[: len(rows)])
        levels.append(torch.full_like(rows, level))
    found, logits_N = torch.cat(boxes), torch.cat(scores)
    finite = found.isfinite().all(dim=1) & logits_N.isfinite()
    inside = clip(found, size)
    large = ((inside[:, 2:] - inside[:, :2]) > rpn.min_box_size).all(dim=1)
    most = rpn.post_nms_topk[False]
    return Candidates(inside, logits_N, finite & large, inside, torch.cat(levels), len(found), most, rpn.nms_thresh)


def clip(boxes: Tensor, size: Size) -> Tensor:
    """Boxes (N, 4) cut at the border of an image of (height, width); Detectron2's own asks first whether they are finite, and waits."""
    height, width = size
    x = boxes[:, 0::2].clamp(min=0, max=width)
    y = boxes[:, 1::2].clamp(min=0, max=height)
    return torch.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], dim=1)
