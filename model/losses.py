"""Every task's loss as a dict of named terms, un-reduced, and how training turns them into one number.

Each function takes what the head gave and `PackedBatch.targets`. Nothing is averaged here: the log wants each term, the
validation sums, and gradient normalisation over several micro-batches and processes wants sums and counts.

Legend of shape suffixes: B sequences, S predicted places, V words, C classes, D feature width.

Source: github.com/ChenRocks/UNITER, model/pretrain.py; what differs from the paper is marked.
"""

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from uniter.datasets.masking import NOT_PREDICTED

Terms = dict[str, Tensor]
Targets = Mapping[str, Tensor]
# "elements": the mean over everything (MRFR and MRC-KL: over places AND features or classes, as published).
# "rows": the mean over the first dimension of each row's sum (VQA: sum over answers, mean over examples).
# "sum": the plain sum (RefCOCO).
Reduction = Literal["elements", "rows", "sum"]


def masked_words(outputs: Targets, targets: Targets) -> Terms:
    """MLM: cross-entropy (S,) of scores (S, V) against those of `words` (T,) that are predicted."""
    words_T = targets["words"]
    return {"cross_entropy": F.cross_entropy(outputs["scores"].float(), words_T[words_T != NOT_PREDICTED], reduction="none")}


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


def sum_and_count(term: Tensor, reduction: Reduction = "elements") -> tuple[Tensor, int]:
    """A term's sum and what it must be divided by for the published mean of this batch (1 for "sum")."""
    counts: dict[Reduction, int] = {"elements": term.numel(), "rows": term.shape[0] if term.dim() else 1, "sum": 1}
    return term.sum(), counts[reduction]


def training_loss(terms: Mapping[str, Tensor], *, weights: Mapping[str, float] | None = None, reduction: Reduction = "elements") -> Tensor:
    """The number that training differentiates: each term's published mean (or sum) times its weight (1 unless given)."""
    total: Tensor | None = None
    for name, term in terms.items():
        summed, count = sum_and_count(term, reduction)
        part = summed / count * (weights or {}).get(name, 1.0)
        total = part if total is None else total + part
    if total is None:
        raise ValueError("a task without loss terms cannot be trained")
    return total
