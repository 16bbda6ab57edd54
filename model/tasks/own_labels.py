"""What the row of one's own labels is for its data: a label of several, any number of them, or a score.

Predictions are each label's probability, in the labels' order; of scores the score alone.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from uniter.datasets.batches import downstream as samples
from uniter.datasets.batches.corpus import Corpus
from uniter.datasets.errors import BadInput
from uniter.datasets.storage.files import read_json_object
from uniter.datasets.text_db.annotations.own_labels import KIND_FILE, KINDS
from uniter.model import losses
from uniter.model.heads.classification import UniterForClassification
from uniter.model.heads.downstream import DownstreamModel
from uniter.model.heads.pretraining import Outputs
from uniter.model.label_metrics import label_figures, score_figures
from uniter.model.losses import Targets
from uniter.model.metrics import answer_score
from uniter.model.tasks import judging
from uniter.model.tasks.judging import Judge
from uniter.model.tasks.predictions import Predictions, answer_table, named
from uniter.model.tasks.task import NO_SIZES, Task, extras

SCORE: Final = KINDS[2]
THRESHOLD: Final = 0.5  # a label of several is given from this probability on


def with_labels(task: Task, corpus: Corpus, sizes: Mapping[str, Any] = NO_SIZES) -> Task:
    """The row for the labels that the texts know, else the model.

    Raises:
        BadInput: the texts of a corpus are of different kinds.
    """
    told = {str(read_json_object(text.path / KIND_FILE).get("kind")) for text in corpus.texts if (text.path / KIND_FILE).is_file()}
    if len(told) > 1 or not told <= set(KINDS):
        raise BadInput(
            f"corpus {corpus.name!r}: its texts have labels of the kind {' and '.join(sorted(told))}; expected one of {', '.join(KINDS)}"
        )
    kind = told.pop() if told else str(sizes.get("label_kind", KINDS[0]))
    table = answer_table(corpus)
    labels = 1 if kind == "score" else int(sizes.get("labels", 2)) if table is None else len(table)
    of_kind = _OF_KIND[kind]
    two = kind == "one" and labels == 2
    return replace(
        task,
        sample=partial(samples.answered_question, answers=labels),
        losses=of_kind.losses,
        metric=of_kind.metric,
        divergence=of_kind.divergence,
        finetuning=replace(
            extras(task),
            sizes={"labels": labels, "label_kind": kind},
            answer=of_kind.answer,
            judge=of_kind.judge,
            write=partial(write_labels, kind=kind),
            figures=partial(figures, kind=kind, labels=labels),
            best_by="auroc" if two else of_kind.best_by,
        ),
    )


def begin_at_mean(model: DownstreamModel, corpora: Sequence[Corpus]) -> None:
    """Let a head of scores begin at the mean and in the deviation of what it will learn."""
    if not isinstance(model, UniterForClassification) or model.kind != "score":
        return
    scores = [corpus.record(number)["target"]["scores"][0] for corpus in corpora for number in range(len(corpus))]
    model.scale_to(float(np.mean(scores)), float(np.std(scores)) or 1.0)


def figures(corpus: Corpus, predictions: Predictions, *, kind: str, labels: int) -> dict[str, float]:
    """The figures of a part whose labels are known."""
    said = np.array([predictions[corpus.example_id(number)] for number in range(len(corpus))], dtype=np.float64)
    targets = [corpus.record(number)["target"] for number in range(len(corpus))]
    if kind == "score":
        return score_figures(said[:, 0], np.array([target["scores"][0] for target in targets], dtype=np.float64))
    truth = np.zeros((len(corpus), labels), dtype=np.bool_)
    for row, target in enumerate(targets):
        truth[row, target["labels"]] = True
    chosen = np.zeros_like(truth)
    for row, probabilities in enumerate(said):
        chosen[row, given_labels(probabilities.tolist(), kind)] = True
    return label_figures(said, truth, chosen, two_sided=kind == "one")


def given_labels(probabilities: Sequence[float], kind: str) -> list[int]:
    """The numbers of the labels that a prediction gives: the likeliest, or of several all that are likely."""
    if kind == "one":
        return [int(np.argmax(probabilities))]
    return [number for number, probability in enumerate(probabilities) if probability >= THRESHOLD]


def predictions_of(kind: str, outputs: Outputs) -> list[list[float]]:
    """What a head of that kind says of each example of a batch."""
    return list(_OF_KIND[kind].answer(outputs))


def write_labels(path: Path, corpus: Corpus, predictions: Predictions, names: Sequence[str] | None, *, kind: str) -> None:
    """A CSV with a header: `id`, `label` (several between bars) and each label's probability; of scores `id`, `score`."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if kind == "score":
            writer.writerow(["id", "score"])
            writer.writerows((name, repr(float(score))) for name, (score,) in predictions.items())
            return
        first: Sequence[float] = next(iter(predictions.values()), [])
        writer.writerow(["id", "label", *(named(number, names) for number in range(len(first)))])
        for name, probabilities in predictions.items():
            given = "|".join(named(number, names) for number in given_labels(probabilities, kind))
            writer.writerow([name, given, *(f"{probability:.6g}" for probability in probabilities)])


def probabilities_of_one(outputs: Outputs) -> list[Any]:
    """Each example's probabilities of the labels, summing to 1, (B, L) as lists."""
    return list(torch.softmax(outputs["scores"].float(), dim=1).tolist())


def probabilities_of_several(outputs: Outputs) -> list[Any]:
    """Each example's probability of each label by itself, (B, L) as lists."""
    return list(torch.sigmoid(outputs["scores"].float()).tolist())


def scores(outputs: Outputs) -> list[Any]:
    """Each example's number, (B, 1) as lists."""
    return list(outputs["scores"].float().tolist())


def all_right(outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
    """Whether all labels that apply are given and no others, (B,)."""
    return {"accuracy": ((torch.sigmoid(outputs["scores"].float()) >= THRESHOLD) == (targets["answers"] > 0)).all(dim=1).float()}


def squared_error(outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
    """In the scores' own unit, squared, (B,)."""
    return {"squared_error": (outputs["scores"].float() - targets["answers"]).squeeze(1).square()}


@dataclass(frozen=True, slots=True)
class _OfKind:
    """The row's cells that a kind of labels has of its own."""

    losses: Any
    metric: Any
    divergence: Any
    answer: Any
    judge: Judge
    best_by: str


_OF_KIND: Final[dict[str, _OfKind]] = {
    "one": _OfKind(losses.one_label, answer_score, losses.divergence_of_scores, probabilities_of_one, judging.one_of_all, "accuracy"),
    "several": _OfKind(
        losses.answers, all_right, losses.divergence_by_label, probabilities_of_several, judging.several, "average_precision"
    ),
    "score": _OfKind(losses.score, squared_error, losses.distance_of_scores, scores, judging.number, "spearman"),
}
