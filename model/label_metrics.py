"""The figures of one's own labels and scores over a whole part.

What a reader would get wrong: a figure that the part does not determine (the area under a curve where all examples are of one kind) is not
there, instead of being a number. Ties count half in AUROC, and equal scores are one step of a precision-recall curve.
"""

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.floating]
BoolArray = NDArray[np.bool_]


def label_figures(probabilities: FloatArray, truth: BoolArray, chosen: BoolArray, *, two_sided: bool = False) -> dict[str, float]:
    """Accuracy, macro F1, AUROC and average precision.

    Args:
        probabilities: (N, A) of each label.
        truth: (N, A) which labels apply.
        chosen: (N, A) which labels the model gives.
        two_sided: the two labels exclude each other, and areas are those of the second one ("positive"), as usual.

    Returns:
        `accuracy`, the share of examples whose labels are all right and no others; `macro_f1`, the mean of F1 over the labels that apply or
        are given somewhere; `auroc` and `average_precision`, means over the labels that apply to some examples and not to all.
    """
    figures = {"accuracy": float((truth == chosen).all(axis=1).mean())}
    both, either = (truth & chosen).sum(axis=0), truth.sum(axis=0) + chosen.sum(axis=0)
    if (either > 0).any():
        figures["macro_f1"] = float((2 * both[either > 0] / either[either > 0]).mean())
    columns = [1] if two_sided and truth.shape[1] == 2 else range(truth.shape[1])
    told = [column for column in columns if 0 < truth[:, column].sum() < len(truth)]
    if told:
        figures["auroc"] = float(np.mean([auroc(probabilities[:, column], truth[:, column]) for column in told]))
        figures["average_precision"] = float(np.mean([average_precision(probabilities[:, column], truth[:, column]) for column in told]))
    return figures


def score_figures(scores: FloatArray, truth: FloatArray) -> dict[str, float]:
    """`squared_error`, its mean; `spearman`, the correlation of ranks, where neither side is the same everywhere.

    Args:
        scores, truth: (N,).
    """
    figures = {"squared_error": float(np.mean((scores - truth) ** 2))}
    ours, theirs = mean_ranks(scores), mean_ranks(truth)
    if ours.std() > 0 and theirs.std() > 0:
        figures["spearman"] = float(np.corrcoef(ours, theirs)[0, 1])
    return figures


def auroc(scores: FloatArray, truth: BoolArray) -> float:
    """The chance that one of the true examples scores higher than one of the others, ties half; (N,) and (N,) with both kinds."""
    positives = int(truth.sum())
    rank_sum = mean_ranks(scores)[truth].sum() - positives * (positives + 1) / 2
    return float(rank_sum / (positives * (len(truth) - positives)))


def average_precision(scores: FloatArray, truth: BoolArray) -> float:
    """The precision at each score that a true example has, weighted by how many true ones have it; (N,) and (N,) with a true one."""
    values, places = np.unique(-scores, return_inverse=True)  # the highest score first
    hits = np.bincount(places, weights=truth, minlength=len(values))
    precision = hits.cumsum() / np.bincount(places, minlength=len(values)).cumsum()
    return float((precision * hits).sum() / hits.sum())


def mean_ranks(values: FloatArray) -> NDArray[np.float64]:
    """(N,) the rank of each value from 1 on, equal ones sharing the mean of theirs."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: NDArray[np.float64] = (counts.cumsum() - (counts - 1) / 2)[places]
    return ranks
