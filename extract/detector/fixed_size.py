"""Proposals in tensors of one size, so that the host never has to ask a GPU how many there are.

What a reader would get wrong: behind the first `kept` rows stand fillers, copies of the first row, through the whole network; they are
cut away where the results arrive on the host. Non-maximum suppression is asked again and again instead of going through the boxes in
order; that settles after as many rounds as the longest chain of boxes that decide over each other. If a batch needed more than `ROUNDS`,
it says so (`settled`), and is computed again with a suppression that waits.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from uniter.extract.detector.extents import Size

ROUNDS = 32
"""Of the suppression within a block. Random boxes, 2,000 of them heaped on eight places, settle in 11."""


BLOCK = 1024
"""Boxes whose fates are settled together, before they are told to all later ones: each pair of boxes is compared once."""


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


def first_standing(images: Sequence[Candidates]) -> list[FixedBoxes]:
    """The best candidates of each image of a batch by non-maximum suppression, as torchvision's `nms` decides it, without a wait."""
    orders = [one.logits.masked_fill(~one.usable, -torch.inf).argsort(descending=True, stable=True)[: one.before] for one in images]
    width = max(len(order) for order in orders)

    def together(parts: Iterable[Tensor]) -> Tensor:
        return torch.stack([torch.cat([part, part.new_zeros((width - len(part), *part.shape[1:]))]) for part in parts])

    compared_BN4 = together(one.compared[order] for one, order in zip(images, orders, strict=True))
    usable_BN = together(one.usable[order] for one, order in zip(images, orders, strict=True))
    groups = [one.groups[order] for one, order in zip(images, orders, strict=True) if one.groups is not None]
    standing_BN, settled_B = standing_boxes(compared_BN4, usable_BN, images[0].threshold, groups_BN=together(groups) if groups else None)
    found = []
    for number, (one, order) in enumerate(zip(images, orders, strict=True)):
        standing = standing_BN[number, : len(order)]
        first = torch.where(standing, torch.arange(len(order), device=order.device), len(order)).sort().values[: one.after]
        there = first < len(order)
        rows = order[torch.where(there, first, first[:1].clamp(max=len(order) - 1))]
        found.append(FixedBoxes(one.boxes[rows], rows, there.sum(), settled_B[number]))
    return found


def standing_boxes(boxes_BN4: Tensor, usable_BN: Tensor, threshold: float, *, groups_BN: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Which boxes stand, block after block: those that no standing better one overlaps.

    Within a block it is asked again and again, beginning with all standing. The answer settles first for the best box, then for the second
    best, and so on; when it no longer changes it is that of going through the boxes in order, the only one that contradicts itself nowhere.

    Args:
        boxes_BN4: of each image, best first. usable_BN: bool, those that are there.
        groups_BN: only boxes of the same group overrule each other.

    Returns:
        (B, N) bool, and (B,) bool: whether all blocks settled within `ROUNDS`.
    """
    standing_BN, settled_B = usable_BN.clone(), torch.ones_like(usable_BN[:, 0])
    for first in range(0, boxes_BN4.shape[1], BLOCK):
        end = min(first + BLOCK, boxes_BN4.shape[1])
        overlaps = overlapping_pairs(boxes_BN4[:, first:end], boxes_BN4[:, first:], threshold)
        if groups_BN is not None:
            overlaps &= groups_BN[:, first:end, None] == groups_BN[:, None, first:]
        overruled = overlaps[:, :, : end - first].tril(diagonal=-1)  # [b, i, j]: box i falls if j, the better one, stands
        there = before = standing = standing_BN[:, first:end]
        for _ in range(ROUNDS):
            before, standing = standing, there & ~(overruled & standing[:, None, :]).any(dim=2)
        settled_B = settled_B & (before == standing).all(dim=1)
        standing_BN[:, first:end] = standing
        standing_BN[:, end:] &= ~(overlaps[:, :, end - first :] & standing[:, :, None]).any(dim=1)
    return standing_BN, settled_B


def overlapping_pairs(boxes_BN4: Tensor, others_BM4: Tensor, threshold: float) -> Tensor:
    """(B, N, M) bool: whose intersection over union is above the threshold, in torchvision's order of operations."""
    boxes, others = boxes_BN4[:, :, None], others_BM4[:, None, :]
    areas = [(some[..., 2] - some[..., 0]) * (some[..., 3] - some[..., 1]) for some in (boxes, others)]
    width = torch.minimum(boxes[..., 2], others[..., 2]) - torch.maximum(boxes[..., 0], others[..., 0])
    height = torch.minimum(boxes[..., 3], others[..., 3]) - torch.maximum(boxes[..., 1], others[..., 1])
    shared = width.clamp_(min=0).mul_(height.clamp_(min=0))
    return shared / (areas[0] + areas[1] - shared) > threshold


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
