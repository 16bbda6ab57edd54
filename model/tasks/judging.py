"""What a model said of each example beside what is right: for pages to look at, not for official figures.

What a reader would get wrong: `surprise` orders examples from easy to hard and is no loss; where several answers are right it is that of
the likeliest of them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from uniter.datasets.text_db.annotations.vcr import CHOICES
from uniter.model.heads.pretraining import Outputs
from uniter.model.losses import Targets

_LEAST: Final = 1e-9  # of a probability, before its logarithm


@dataclass(frozen=True, slots=True)
class Judged:
    """One example.

    Attributes:
        said, truth: numbers of answers (several of a model of several labels), of regions, or the score; truth empty where none is right.
        right: from 0 to 1; of scores 0.
        confidence: the probability that the model gives what it said; None of scores.
        surprise: minus the logarithm of the probability of what is right; of scores the distance. The more, the harder.
    """

    said: tuple[float, ...]
    truth: tuple[float, ...]
    right: float
    confidence: float | None
    surprise: float


Judge = Callable[[Outputs, Targets], list[Judged]]


def one_of_all(outputs: Outputs, targets: Targets) -> list[Judged]:
    """Scores (B, A) that share out 1, against `answers` (B, A)."""
    return _answers(torch.softmax(outputs["scores"].float(), dim=1), targets["answers"])


def each_by_itself(outputs: Outputs, targets: Targets) -> list[Judged]:
    """Scores (B, A) that are each a probability of its own, of which the best is said, against `answers` (B, A)."""
    return _answers(torch.sigmoid(outputs["scores"].float()), targets["answers"])


def true_or_false(outputs: Outputs, targets: Targets) -> list[Judged]:
    """Scores (P, 2) against `truth` (P,)."""
    return _answers(torch.softmax(outputs["scores"].float(), dim=1), torch.nn.functional.one_hot(targets["truth"], 2))


def first_choice(outputs: Outputs, targets: Targets) -> list[Judged]:
    """VCR's answers without the rationales: column 1 of the first four of each question's sequences, against `correct`."""
    scores = outputs["scores"][:, 1].float().view(-1, 2, CHOICES)[:, 0]
    return _answers(torch.softmax(scores, dim=1), targets["correct"].view(-1, 2, CHOICES)[:, 0])


def best_region(outputs: Outputs, targets: Targets) -> list[Judged]:
    """Scores (B, R) of regions against which of them are `right`, or `overlaps` enough; both of all pictures end to end."""
    right = targets["right"] if "right" in targets else targets["overlaps"] > 0.5
    counts = outputs["region_counts"].tolist()
    found = []
    for scores, of_picture, count in zip(outputs["scores"].float(), torch.split(right.cpu(), counts), counts, strict=True):
        shares = torch.softmax(scores[:count], dim=0).cpu()
        found += _answers(shares.unsqueeze(0), of_picture.unsqueeze(0))
    return found


def several(outputs: Outputs, targets: Targets) -> list[Judged]:
    """Any number of labels: scores (B, A) against `answers` (B, A); what is said is said of all labels together."""
    found = []
    for chances, wanted in zip(torch.sigmoid(outputs["scores"].double()).tolist(), targets["answers"].tolist(), strict=True):
        said = tuple(float(number) for number, chance in enumerate(chances) if chance >= 0.5)
        truth = tuple(float(number) for number, value in enumerate(wanted) if value > 0)
        confidence = math.prod(max(chance, 1 - chance) for chance in chances)
        surprise = sum(-math.log(max(chance if value > 0 else 1 - chance, _LEAST)) for chance, value in zip(chances, wanted, strict=True))
        found.append(Judged(said, truth, float(said == truth), confidence, surprise))
    return found


def number(outputs: Outputs, targets: Targets) -> list[Judged]:
    """Scores (B, 1) against `answers` (B, 1)."""
    pairs = zip(outputs["scores"].squeeze(1).tolist(), targets["answers"].squeeze(1).tolist(), strict=True)
    return [Judged((said,), (truth,), 0.0, None, abs(said - truth)) for said, truth in pairs]


def _answers(shares_BA: Tensor, values_BA: Tensor) -> list[Judged]:
    """Probabilities against how right each answer is (1, or a soft score)."""
    found = []
    for shares, values in zip(shares_BA.tolist(), values_BA.tolist(), strict=True):
        said = max(range(len(shares)), key=shares.__getitem__)
        most = max(values)
        truth = tuple(float(place) for place, value in enumerate(values) if value == most and value > 0)
        best = max((shares[int(place)] for place in truth), default=0.0)
        found.append(Judged((float(said),), truth, float(values[said]), shares[said], -math.log(max(best, _LEAST))))
    return found


def named_answers(judged: Sequence[float], names: Sequence[str] | None) -> str:
    """Answers in words, numbers where nobody knows their names."""
    if not judged:
        return "nothing"
    return ", ".join(names[int(place)] if names is not None and place < len(names) else f"{place:g}" for place in judged)


def calibration(examples: Sequence[Judged], bins: int = 10) -> list[tuple[float, float, int]]:
    """(mean confidence, mean of how right, examples) of each tenth of confidence that any example is in."""
    cells: dict[int, list[Judged]] = {}
    for one in examples:
        if one.confidence is None:
            continue
        cells.setdefault(min(int(one.confidence * bins), bins - 1), []).append(one)
    return [
        (sum(one.confidence or 0.0 for one in cell) / len(cell), sum(one.right for one in cell) / len(cell), len(cell))
        for _, cell in sorted(cells.items())
    ]


def calibration_error(cells: Sequence[tuple[float, float, int]]) -> float:
    """The expected calibration error: how far confidence and right are apart, averaged over examples (Guo et al. 2017)."""
    examples = sum(count for _, _, count in cells)
    return sum(abs(confidence - right) * count for confidence, right, count in cells) / max(examples, 1)
