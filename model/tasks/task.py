"""What a task is: a row's type."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from uniter.datasets.batches.collate import PackedBatch
from uniter.datasets.batches.corpus import Corpus
from uniter.datasets.batches.example import SampleFunction
from uniter.model.heads.downstream import DownstreamModel
from uniter.model.heads.pretraining import Outputs
from uniter.model.losses import Reduction, Targets, Terms, divergence_of_scores
from uniter.model.tasks import predictions
from uniter.model.tasks.judging import Judge

Head = Callable[[Any, PackedBatch], Outputs]

NO_SIZES: Final[Mapping[str, Any]] = MappingProxyType({})


class OfData(Protocol):
    """Makes the row for a corpus; `sizes` are those of the model that answers, where the corpus need not know them."""

    def __call__(self, task: "Task", corpus: Corpus, sizes: Mapping[str, Any] = NO_SIZES) -> "Task": ...


def _as_it_is(task: "Task", corpus: Corpus, sizes: Mapping[str, Any] = NO_SIZES) -> "Task":
    return task


SEQUENCE = 55  # word pieces, [CLS], [SEP] and regions of a text with its picture, about


@dataclass(frozen=True, slots=True)
class Taken:
    """What an example of a task takes, about: for the arithmetic of `uniter-train recipes`.

    Attributes:
        tokens: of all its sequences that are trained with.
        budget: of a micro-batch's tokens; under the published ordering as many as the longest of its bucket of 8,192 has.
        scored: tokens that are scored without gradient besides.
    """

    tokens: int
    budget: int
    scored: int = 0


PAIR = Taken(SEQUENCE, 128)  # at most 100 regions and 28 word pieces in a bucket


@dataclass(frozen=True, slots=True)
class Task:
    """A row of the table.

    Attributes:
        sample: what of an example is shown and asked.
        head: the scores of a batch, where the task needs them.
        losses: the named, un-reduced terms.
        metric: named values, one a predicted place or example, whose mean is reported (1 is best where it is an accuracy).
        divergence: how far the outputs of a perturbed pass are from those of the clean one, un-reduced as the losses and with as many
            rows, so that it is one more term of theirs (adversarial training).
        weights: of the terms, 1 where none is given.
        reduction: how a term becomes a number, see losses.py.
        needs_soft_labels: cannot run on databases without the detector's distributions.
        shows_other_pictures: half of the examples are shown another picture.
        ratio: how often the task is drawn, relative to the others of its kind (UNITER's in-domain ratios).
        narrow: the sequences of a batch that are trained with, where the model chooses among them (hard negatives).
        lengths: tokens of each example with the pictures (N, K) it is shown.
        sequences: of an example, each counted in `lengths` with its [CLS] and [SEP], which the published sampler does not count.
        pictures: K, the pictures of an example.
        compiles: its head's sizes follow from the batch's, so that it can be one compiled graph.
        of_data: the row for these corpora, where it depends on them (the number of answers, the pictures to draw from).
        finetuning: what else fine-tuning needs; None for pre-training tasks.
    """

    sample: SampleFunction
    head: Head
    losses: Callable[[Outputs, Targets], Terms]
    metric: Callable[[Outputs, Targets], dict[str, Tensor]]
    divergence: Callable[[Outputs, Outputs, Targets], Tensor] = divergence_of_scores
    weights: Mapping[str, float] = field(default_factory=dict)
    reduction: Reduction = "elements"
    needs_soft_labels: bool = False
    shows_other_pictures: bool = False
    ratio: float = 1.0
    narrow: Callable[[Any, PackedBatch], PackedBatch] | None = None
    lengths: Callable[[Corpus, NDArray[np.int32]], NDArray[np.int64]] = Corpus.lengths_with
    sequences: int = 1
    pictures: int = 1
    compiles: bool = True
    of_data: OfData = _as_it_is
    finetuning: "Finetuning | None" = None

    def narrowed(self, model: Any, batch: PackedBatch) -> PackedBatch:
        """The batch as it is trained with."""
        return batch if self.narrow is None else self.narrow(model, batch)

    def scores(self, model: Any, batch: PackedBatch) -> Outputs:
        """The head's outputs of the batch as it is trained with."""
        return self.head(model, self.narrowed(model, batch))


@dataclass(frozen=True, slots=True)
class Finetuning:
    """What a down-stream row has beside its task; the numbers are the published base configuration's (facts 5.4, 5.6).

    Attributes:
        model: the class with the task's head.
        best_by: the metric by which a run's best checkpoint is chosen, the more the better.
        head: the name prefix of that head, where it learns at a rate of its own.
        sizes: further constructor arguments.
        texts: what `uniter-build-db --task` calls the texts that the task takes.
        known: whether a record tells the right answer; None where every text does (retrieval, RefCOCO).
        answer: what a batch's outputs say, one JSON value an example, in the batch's order.
        write: the file that the official evaluation takes, from the predictions and the names of the answers.
        figures: official figures of a whole corpus beside the metric, where there are any.
        figures_rank: they are computed at each validation too, because the best checkpoint is chosen by one of them.
        judge: what was said of each example of a batch beside what is right, for pages to look at; None where no example has one answer.
        words: the names of the answers by number, where they are the same in all texts.
        points: the answers are regions.
        named: it chooses among answers that have names (`ans2label.json`).
        begin: what of a new model begins at values of the data, told the model and the training corpora.
        pairs: the head that scores single pairs, where all texts are evaluated with all pictures instead of example by example.
        validate_as: the row that training validates with, where its own would be too expensive.
        predicted: what of an example is asked in predictions, where that is more than in training, and `predicted_lengths` its tokens.
        max_text_length: longest text, where the settings leave it open and UNITER's 60 are too few.
        taken: what an example takes, where that is not a pair's.
        regions: which rows are taken from published region databases, where nobody says (as `ImageDB`'s arguments).
        learning_rate, head_rate_multiplier, steps, batch_tokens, accumulation, clip: where the settings leave them open.
    """

    model: type[DownstreamModel]
    answer: Callable[[Outputs], list[Any]]
    texts: tuple[str, ...]
    known: Callable[[Mapping[str, Any]], bool] | None = None
    write: Callable[[Path, Corpus, predictions.Predictions, Sequence[str] | None], None] | None = None
    figures: Callable[[Corpus, predictions.Predictions], dict[str, float]] | None = None
    figures_rank: bool = False
    judge: Judge | None = None
    words: tuple[str, ...] | None = None
    points: bool = False
    named: bool = False
    begin: Callable[[DownstreamModel, Sequence[Corpus]], None] | None = None
    sizes: Mapping[str, Any] = field(default_factory=dict)
    pairs: Callable[[Any, PackedBatch], Outputs] | None = None
    validate_as: str | None = None
    predicted: SampleFunction | None = None
    predicted_lengths: Callable[[Corpus, NDArray[np.int32]], NDArray[np.int64]] | None = None
    max_text_length: int | None = None
    regions: Mapping[str, float] = field(default_factory=dict)
    best_by: str = "accuracy"
    taken: Taken = PAIR
    head: str | None = None
    learning_rate: float = 5e-5
    head_rate_multiplier: float = 1.0
    steps: int = 5000
    batch_tokens: int = 10240
    accumulation: int = 1
    clip: float = 2.0


def extras(task: Task) -> Finetuning:
    """What a down-stream row has beyond a pre-training one; it is a mistake of the program to ask this of another."""
    assert task.finetuning is not None, "a down-stream row has its fine-tuning part"
    return task.finetuning
