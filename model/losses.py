"""Every task's loss as a dict of named terms, un-reduced, and how training turns them into one number.

Each function takes what the head gave and `PackedBatch.targets`. Nothing is averaged here: the log wants each term, the
validation sums, and gradient normalisation over several micro-batches and processes wants sums and counts.

Legend of shape suffixes: B sequences, S predicted places, V words, C classes, D feature width.

Source: github.com/ChenRocks/UNITER, model/pretrain.py; what differs from the paper is marked.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Terms = dict[str, Tensor]


Targets = Mapping[str, Tensor]


# "elements": the mean over everything (MRFR and MRC-KL: over places AND features or classes, as published).
# "rows": the mean over the first dimension of each row's sum (VQA: sum over answers, mean over examples).
# "sum": the plain sum (RefCOCO).
Reduction = Literal["elements", "rows", "sum"]


Normalisation = Literal["global-mean", "published"]


def masked_words(outputs: Targets, targets: Targets) -> Terms:
    """MLM: cross-entropy (S,) of scores (S, V) against the word pieces that were hidden."""
    return {"cross_entropy": F.cross_entropy(outputs["scores"].float(), hidden_words(targets), reduction="none")}


def hidden_words(targets: Targets) -> Tensor:
    """(S,) int64, the word pieces that were hidden."""
    return targets["words"].index_select(0, targets["places"])


def masked_features(outputs: Targets, targets: Targets) -> Terms:
    """MRFR: squared error (S, D) of scores against `features`. Differs from the paper: meant to be averaged over D, not summed."""
    scores_SD = outputs["scores"].float()
    return {"squared_error": F.mse_loss(scores_SD, targets["features"].to(scores_SD.dtype), reduction="none")}


def best_foreground_class(soft_labels_SC: Tensor) -> Tensor:
    """(S,) int64, the detector's best class that is not the background (column 0)."""
    return soft_labels_SC[:, 1:].argmax(dim=1) + 1


def masked_classes(outputs: Targets, targets: Targets) -> Terms:
    """MRC: cross-entropy (S,) of scores (S, C) against the detector's best foreground class."""
    classes_S = best_foreground_class(targets["soft_labels"])
    return {"cross_entropy": F.cross_entropy(outputs["scores"].float(), classes_S, reduction="none")}


def masked_distributions(outputs: Targets, targets: Targets) -> Terms:
    """MRC-KL: the terms (S, C) of KL(detector || model) over all columns, background included; 0 where the detector says 0.

    Meant to be averaged over S * C elements, as published: 1/C of the usual mean over S.
    """
    predicted_SC = F.log_softmax(outputs["scores"].float(), dim=-1)
    return {"kl": F.kl_div(predicted_SC, targets["soft_labels"].to(predicted_SC.dtype), reduction="none")}


def pairs(outputs: Targets, targets: Targets) -> Terms:
    """ITM: cross-entropy (B,) of scores (B, 2) against `matched`; with `distances` also the alignment term.

    `transport` (B,) is the distance of matching pairs and minus the distance of the others, so that its mean is the
    published alignment loss. Differs from the paper: the distance of mismatched pairs is driven up.
    """
    matched_B = targets["matched"]
    terms = {"cross_entropy": F.cross_entropy(outputs["scores"].float(), matched_B, reduction="none")}
    if "distances" in outputs:
        terms["transport"] = torch.where(matched_B == 1, outputs["distances"], -outputs["distances"])
    return terms


def answers(outputs: Targets, targets: Targets) -> Terms:
    """VQA and SNLI-VE: binary cross-entropy (B, A) of each answer by itself; reduce with "rows".

    Differs from the paper: SNLI-VE too is trained with this, not with a softmax over its three labels.
    """
    scores_BA = outputs["scores"].float()
    wanted_BA = targets["answers"].to(scores_BA.dtype)
    return {"binary_cross_entropy": F.binary_cross_entropy_with_logits(scores_BA, wanted_BA, reduction="none")}


def one_label(outputs: Targets, targets: Targets) -> Terms:
    """One's own labels, one of them right: cross-entropy (B,) of scores (B, A) against `answers` (B, A), 1 at the right one."""
    return {"cross_entropy": F.cross_entropy(outputs["scores"].float(), targets["answers"].argmax(dim=1), reduction="none")}


def score(outputs: Targets, targets: Targets) -> Terms:
    """One's own scores: the squared error (B,) of scores (B, 1) against `answers` (B, 1), in squared deviations of what was learnt from."""
    error_B = (outputs["scores"].float() - targets["answers"].float()).squeeze(1) / outputs["deviation"]
    return {"squared_error": error_B.square()}


def matching_regions(outputs: Targets, targets: Targets) -> Terms:
    """Phrases with several right regions: cross-entropy (B,) over the regions of each picture against all that are right, alike.

    Args:
        outputs: `scores` (B, R) and `region_counts` (B,).
        targets: `right` (sum of region_counts,) bool, of all pictures end to end.

    Returns:
        `cross_entropy`; 0 where no region is right.
    """
    logs_BR = F.log_softmax(outputs["scores"].float(), dim=1)
    right_BR = rows_of(targets["right"], outputs["region_counts"], logs_BR.shape[1])
    shares_BR = right_BR.float() / right_BR.sum(dim=1, keepdim=True).clamp(min=1)
    return {"cross_entropy": -(shares_BR * logs_BR).sum(dim=1)}


def rows_of(values: Tensor, counts_B: Tensor, width: int) -> Tensor:
    """(B, width) of values (sum of counts,) that lie end to end; 0 where a row has fewer."""
    there = torch.arange(width, device=values.device) < counts_B.unsqueeze(1)
    return values.new_zeros(there.shape).masked_scatter(there, values)


def statements(outputs: Targets, targets: Targets) -> Terms:
    """NLVR2: cross-entropy (P,) of scores (P, 2) against `truth`."""
    return {"cross_entropy": F.cross_entropy(outputs["scores"].float(), targets["truth"], reduction="none")}


def choices(outputs: Targets, targets: Targets) -> Terms:
    """VCR: cross-entropy (B,) of each choice by itself, scores (B, 2) against `correct`."""
    return {"cross_entropy": F.cross_entropy(outputs["scores"].float(), targets["correct"], reduction="none")}


def ranking(outputs: Targets, targets: Targets, *, group_size: int, margin: float = 0.2) -> Terms:
    """Retrieval: how far each negative of a group comes within the margin of its positive, on sigmoid scores.

    Args:
        outputs: `scores` (G * group_size, 1) of G groups end to end, each positive before its negatives.
        group_size: sequences of a group.

    Returns:
        `margin` (G, group_size - 1).
    """
    scores = torch.sigmoid(outputs["scores"].float()).view(-1, group_size)
    return {"margin": F.relu(margin + scores[:, 1:] - scores[:, :1])}


def referred_regions(outputs: Targets, targets: Targets) -> Terms:
    """RefCOCO: cross-entropy (B,) over the regions of each picture against `region`, 0 where that is -100; reduced with "sum"."""
    return {"cross_entropy": F.cross_entropy(outputs["scores"].float(), targets["region"], reduction="none")}


def ranked_regions(outputs: Targets, targets: Targets, *, margin: float = 0.2) -> Terms:
    """RefCOCO's ranking loss: how far one wrong region comes within the margin of the right one, on sigmoid scores.

    Args:
        outputs: `scores` (B, R) and `region_counts` (B,).
        targets: `region`, and `rival` (B,) int64, the wrong region to compare with, -1 for the wrong one that scores best.

    Returns:
        `margin` (B,); 0 where a picture has no other region, or `region` is -100.
    """
    scores_BR = outputs["scores"].float()
    wanted_B = targets["region"].clamp(min=0)
    best_B = scores_BR.scatter(1, wanted_B.unsqueeze(1), -torch.inf).argmax(dim=1)
    rivals_B = torch.where(targets["rival"] >= 0, targets["rival"], best_B)
    chances_BR = torch.sigmoid(scores_BR)
    wrong, right = (chances_BR.gather(1, picked.unsqueeze(1)).squeeze(1) for picked in (rivals_B, wanted_B))
    return {"margin": F.relu(margin + wrong - right) * ((outputs["region_counts"] > 1) & (targets["region"] >= 0))}


DIVERGENCE = "divergence"  # the name of the term that compares a perturbed pass with the unperturbed one


def _symmetric(clean_SC: Tensor, scores_SC: Tensor) -> Tensor:
    """(S, C), the terms of KL(clean || scores) + KL(scores || clean) of the two softmax distributions over the last axis.

    Their sum is (p - q) (log p - log q). The published form multiplies by log of a probability, which is no number where one underflows.
    """
    clean, other = F.log_softmax(clean_SC.float(), dim=-1), F.log_softmax(scores_SC.float(), dim=-1)
    return (clean.exp() - other.exp()) * (clean - other)


def divergence_of_scores(clean: Targets, outputs: Targets, targets: Targets) -> Tensor:
    """(S,), between the distributions over words, classes, answers or boxes of two passes of the same batch; of answers too, although
    each of them is asked by itself (as published)."""
    return _symmetric(clean["scores"], outputs["scores"]).sum(dim=-1)


def divergence_by_class(clean: Targets, outputs: Targets, targets: Targets) -> Tensor:
    """(S, C), the same before it is summed: meant to be averaged over classes, where the task's loss is (MRC-KL) or as published (VCR)."""
    return _symmetric(clean["scores"], outputs["scores"])


def divergence_in_groups(clean: Targets, outputs: Targets, targets: Targets, *, group_size: int) -> Tensor:
    """(G,), between the distributions over the sequences of each group; scores as `ranking` takes them."""
    return _symmetric(clean["scores"].view(-1, group_size), outputs["scores"].view(-1, group_size)).sum(dim=-1)


def divergence_by_label(clean: Targets, outputs: Targets, targets: Targets) -> Tensor:
    """(B, A), between "applies" and "does not" of each label by itself; a softmax over labels would say nothing of a single one."""
    clean_BA, scores_BA = clean["scores"].float(), outputs["scores"].float()
    return (torch.sigmoid(clean_BA) - torch.sigmoid(scores_BA)) * (clean_BA - scores_BA)


def distance_of_scores(clean: Targets, outputs: Targets, targets: Targets) -> Tensor:
    """(B,), the squared distance of one's own scores, in squared deviations as their loss is."""
    return squared_distance(clean, outputs, targets).squeeze(1) / outputs["deviation"].square()


def squared_distance(clean: Targets, outputs: Targets, targets: Targets) -> Tensor:
    """(S, D), of predicted numbers: the two divergences of normal distributions of variance 1 around them, added."""
    return (clean["scores"].float() - outputs["scores"].float()).square()


@dataclass(frozen=True, slots=True)
class Loss:
    """What the terms of a batch come to.

    Attributes:
        number: what training differentiates.
        sums: for the log, of each term the sum, and by what it is divided to be a mean; without gradient.
        rows: predicted places or examples, by which global-mean divides.
    """

    number: Tensor
    sums: dict[str, tuple[Tensor, int]]
    rows: int


def of(
    terms: Mapping[str, Tensor],
    *,
    weights: Mapping[str, float] | None = None,
    reduction: Reduction = "elements",
    normalisation: Normalisation = "published",
) -> Loss:
    """The number that training differentiates, and the sums for the log.

    Args:
        terms: un-reduced, by name.
        weights: of the terms, 1 where none is given.
        reduction: how a term becomes a number as published.
        normalisation: "published", each term's mean (or sum) over this batch; "global-mean", the sum of its rows' shares, to be divided
            by the rows of the whole update.

    Raises:
        ValueError: there is no term, or under global-mean they differ in their number of rows.
    """
    if not terms:
        raise ValueError("a task without loss terms cannot be trained")
    rows = {name: term.shape[0] if term.dim() else 1 for name, term in terms.items()}
    if normalisation == "global-mean" and len(set(rows.values())) != 1:
        raise ValueError(f"the terms of a task must have equally many rows, got {rows}")
    number: Tensor | None = None
    sums: dict[str, tuple[Tensor, int]] = {}
    for name, term in terms.items():
        summed, by_elements = term.sum(), reduction == "elements"
        sums[name] = summed.detach(), term.numel() if by_elements else rows[name]
        if normalisation == "published":
            summed = summed / (1 if reduction == "sum" else sums[name][1])
        elif by_elements and term.dim() > 1:
            summed = term.flatten(1).mean(dim=1).sum()
        part = summed * (weights or {}).get(name, 1.0)
        number = part if number is None else number + part
    assert number is not None
    return Loss(number, sums, next(iter(rows.values())))
