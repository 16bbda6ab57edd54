"""What is reported: per-example metrics of the down-stream tasks, and the official figures over a whole split.

What a reader would get wrong: a rank counts everything that scores at least as high as the right one, so ties count against the
model - a model that gives every pair the same score must not look good.
"""

from collections import defaultdict
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from uniter.datasets.batches.candidates import IOU_THRESHOLD
from uniter.datasets.errors import BadInput
from uniter.model import losses
from uniter.model.heads.pretraining import Outputs
from uniter.model.losses import Targets

FloatArray = NDArray[np.floating]


IntArray = NDArray[np.integer]


DEPTHS = (1, 5, 10)


# Per example: (outputs of a head, PackedBatch.targets) -> values whose mean is reported.


def answer_score(outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """VQA and SNLI-VE: the soft score of the best-scoring answer, (B,); for one-hot labels that is the accuracy."""
    best_B = outputs["scores"].argmax(dim=1, keepdim=True)
    return {"accuracy": targets["answers"].gather(1, best_B).squeeze(1).float()}


def statement_accuracy(outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """NLVR2: whether the better of the two scores is the true one, (P,)."""
    return {"accuracy": (outputs["scores"].argmax(dim=1) == targets["truth"]).float()}


def referred_accuracy(outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """RefCOCO, annotated or detected boxes: whether the best-scoring region overlaps the annotated one by more than half, (B,)."""
    counts = outputs["region_counts"]
    best_B = counts.cumsum(0) - counts + outputs["scores"].argmax(dim=1)
    return {"accuracy": (targets["overlaps"][best_B] > IOU_THRESHOLD).float()}


def region_recalls(outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Flickr30k Entities: whether a right region is among the 1, 5, 10 best-scoring ones, and among all (`upper_bound`), (B,)."""
    scores_BR = outputs["scores"]
    right_BR = losses.rows_of(targets["right"], outputs["region_counts"], scores_BR.shape[1])
    found_BR = right_BR.gather(1, scores_BR.argsort(dim=1, descending=True, stable=True))
    recalls = {f"r{depth}": found_BR[:, :depth].any(dim=1).float() for depth in DEPTHS}
    return recalls | {"upper_bound": right_BR.any(dim=1).float()}


def choice_accuracy(outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor], *, choices: int = 4) -> dict[str, Tensor]:
    """VCR: whether the best of each question's answers, and the best of its rationales, which follow them, is the right one.

    Returns:
        (questions,) `qa`, `qar` (given the true answer), `q2ar` (both right).
    """
    best = outputs["scores"][:, 1].view(-1, 2, choices).argmax(dim=2, keepdim=True)
    right = targets["correct"].view(-1, 2, choices).gather(2, best).squeeze(2) == 1
    return {"qa": right[:, 0].float(), "qar": right[:, 1].float(), "q2ar": right.all(dim=1).float()}


def rank_accuracy(outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor], *, group_size: int) -> dict[str, Tensor]:
    """Retrieval in training: whether the positive, first in its group, scores higher than all its negatives, (groups,)."""
    scores = outputs["scores"].view(-1, group_size)
    return {"accuracy": (scores[:, 0] > scores[:, 1:].amax(dim=1)).float()}


# Retrieval.


def retrieval_recalls(scores: FloatArray, image_of_text: IntArray) -> dict[str, float]:
    """R@1, 5 and 10 both ways over all pairs.

    Differs from the published code, which counts the first texts twice in image retrieval.

    Args:
        scores: (texts, images), the higher the better.
        image_of_text: (texts,) the column of each text's image; every image needs a text to count in text retrieval.

    Returns:
        `txt_r1`, `txt_r5`, `txt_r10` (text retrieval: per image, the rank of its best caption), `img_r1` ... (image retrieval: per
        text, the rank of its image), `txt_r_mean`, `img_r_mean`, `r_mean`; all from 0 to 1.

    Raises:
        BadInput: the scores are not finite or do not fit the texts.
    """
    texts, images = scores.shape
    if len(image_of_text) != texts or texts == 0 or int(image_of_text.min()) < 0 or int(image_of_text.max()) >= images:
        raise BadInput(
            f"retrieval: scores of shape {scores.shape} do not fit {len(image_of_text)} texts; score every text with every image"
        )
    own = scores[np.arange(texts), image_of_text].astype(np.float32)
    best = np.full(images, -np.inf, dtype=np.float32)
    np.maximum.at(best, image_of_text, own)
    image_ranks = np.empty(texts, dtype=np.int64)
    rivals = np.zeros(images, dtype=np.int64)
    # In slices: the matrix of 25,000 captions and 5,000 pictures has 125 million entries.
    for start in range(0, texts, 1024):
        part = scores[start : start + 1024].astype(np.float32)
        if not np.isfinite(part).all():
            raise BadInput(
                f"retrieval: the scores of texts {start} to {start + len(part) - 1} are not all finite; look at the model's outputs"
            )
        image_ranks[start : start + 1024] = (part >= own[start : start + 1024, None]).sum(axis=1) - 1
        rivals += (part >= best).sum(axis=0)
    captions_at_best = np.bincount(image_of_text[own >= best[image_of_text]], minlength=images)
    text_ranks = (rivals - captions_at_best)[np.isfinite(best)]
    figures = {f"txt_r{depth}": float((text_ranks < depth).mean()) for depth in DEPTHS}
    figures |= {f"img_r{depth}": float((image_ranks < depth).mean()) for depth in DEPTHS}
    for side in ("txt", "img"):
        figures[f"{side}_r_mean"] = float(np.mean([figures[f"{side}_r{depth}"] for depth in DEPTHS]))
    return figures | {"r_mean": (figures["txt_r_mean"] + figures["img_r_mean"]) / 2}


def fold_recalls(scores: FloatArray, image_of_text: IntArray, *, folds: int = 5) -> dict[str, float]:
    """The recalls within equal runs of consecutive images and their texts, averaged (COCO 1k: five folds of the 5,000 images).

    Raises:
        BadInput: the images cannot be cut into that many equal folds.
    """
    images = scores.shape[1]
    if folds < 1 or images % folds:
        raise BadInput(f"retrieval: {images} images cannot be cut into {folds} equal folds; leave images out or choose another number")
    size = images // folds
    parts = []
    for start in range(0, images, size):
        texts = np.flatnonzero((image_of_text >= start) & (image_of_text < start + size))
        parts.append(retrieval_recalls(scores[texts, start : start + size], image_of_text[texts] - start))
    return {name: float(np.mean([part[name] for part in parts])) for name in parts[0]}


# NLVR2.


def nlvr2_figures(predictions: Mapping[str, bool], truths: Mapping[str, bool]) -> dict[str, float]:
    """Accuracy, and consistency: the share of sentences that are judged rightly for all their pairs of pictures.

    Args:
        predictions, truths: by identifier, such as `dev-850-1-0` (split, set, pair, sentence).

    Raises:
        BadInput: an identifier has no prediction or is not of that form.
    """
    by_sentence: dict[tuple[str, ...], list[bool]] = defaultdict(list)
    for identifier, truth in truths.items():
        fields = identifier.split("-")
        if len(fields) != 4:
            raise BadInput(f"NLVR2 identifier {identifier!r} has {len(fields)} fields, expected four such as in 'dev-850-1-0'")
        if identifier not in predictions:
            raise BadInput(f"NLVR2: no prediction for {identifier!r}; predict all {len(truths)} statements")
        by_sentence[(fields[0], fields[1], fields[3])].append(predictions[identifier] == truth)
    right = [verdict for verdicts in by_sentence.values() for verdict in verdicts]
    return {"accuracy": float(np.mean(right)), "consistency": float(np.mean([all(verdicts) for verdicts in by_sentence.values()]))}


# VCR.


def vcr_figures(answer_scores: FloatArray, rationale_scores: FloatArray, answers: IntArray, rationales: IntArray) -> dict[str, float]:
    """Q->A, QA->R (given the true answer) and Q->AR (both right).

    Args:
        answer_scores: (questions, 4).
        rationale_scores: (questions, 4) with the true answer, or (questions, 4, 4) with each answer, first the answer's number.
        answers, rationales: (questions,) the right numbers.
    """
    questions = np.arange(len(answers))
    given_truth = rationale_scores[questions, answers] if rationale_scores.ndim == 3 else rationale_scores
    right_answers = answer_scores.argmax(axis=1) == answers
    right_rationales = given_truth.argmax(axis=1) == rationales
    return {
        "qa": float(right_answers.mean()),
        "qar": float(right_rationales.mean()),
        "q2ar": float((right_answers & right_rationales).mean()),
    }


def word_accuracy(outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
    """`accuracy` (S,) of hidden words: 1 where the best word piece is the hidden one."""
    return {"accuracy": (outputs["scores"].argmax(dim=1) == losses.hidden_words(targets)).float()}


def feature_error(outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
    """`mse` (S,) of hidden regions, the mean over the elements of a feature."""
    return {"mse": losses.masked_features(outputs, targets)["squared_error"].mean(dim=1)}


def class_accuracy(outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
    """`accuracy` (S,) of hidden regions: 1 where the best class is the detector's best foreground class."""
    return {"accuracy": (outputs["scores"].argmax(dim=1) == losses.best_foreground_class(targets["soft_labels"])).float()}


def distribution_distance(outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
    """The divergence of each region summed over classes (nats), and whether the best class, background included, is the same."""
    soft_labels_SC = targets["soft_labels"]
    return {
        "kl": losses.masked_distributions(outputs, targets)["kl"].sum(dim=1),
        "accuracy": (outputs["scores"].argmax(dim=1) == soft_labels_SC.argmax(dim=1)).float(),
    }


def pair_accuracy(outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
    """`accuracy` (B,) of pairs: 1 where it is said right whether text and picture belong together."""
    return {"accuracy": (outputs["scores"].argmax(dim=1) == targets["matched"]).float()}
