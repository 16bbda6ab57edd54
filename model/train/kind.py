"""What distinguishes pre-training from fine-tuning, as one value."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from uniter.datasets.batches.corpus import Corpus, open_corpus
from uniter.datasets.batches.plans import Mixture, Part
from uniter.datasets.errors import BadInput
from uniter.model.settings.settings import CorpusSettings, TrainSettings
from uniter.model.tasks.task import Task
from uniter.model.train.distributed import Processes


@dataclass(frozen=True, slots=True)
class Data:
    """The corpora of a run, opened: training and validation examples and the ratios of the tasks, by corpus name."""

    training: dict[str, Corpus]
    validation: dict[str, Corpus]
    tasks: dict[str, dict[str, float]]

    def size(self) -> tuple[int, float]:
        """Training examples, and the mean of their tokens."""
        examples = sum(len(corpus) for corpus in self.training.values())
        return examples, sum(float(corpus.lengths.sum()) for corpus in self.training.values()) / examples


@dataclass(frozen=True, slots=True)
class Kind:
    """What is particular to pre-training or to a down-stream task.

    Attributes:
        task: what the settings call it.
        open_data: opens the databases.
        complete: chooses the numbers that the settings leave open, for so many examples of so many tokens.
        build_model: in training mode, on the CPU.
        build_mixture: the tasks by part, and which batch comes when.
        validation_parts: what is validated.
        head: name prefix of a head that learns at a rate of its own.
        about: what else the checkpoint's config.json says.
    """

    task: str
    open_data: Callable[[TrainSettings], Data]
    complete: Callable[[TrainSettings, int, float, Processes], TrainSettings]
    build_model: Callable[[TrainSettings, Data], nn.Module]
    build_mixture: Callable[[TrainSettings, Data], tuple[list[Task], Mixture]]
    validation_parts: Callable[[TrainSettings, Data], list[tuple[Task, Part]]]
    head: str | None = None
    about: Callable[[Data], dict[str, Any]] = lambda data: {}


def with_validation(wanted: CorpusSettings, corpus: Corpus, settings: TrainSettings, options: dict[str, Any]) -> tuple[Corpus, Corpus]:
    """The training part of a corpus and what is validated: its validation databases, or pictures that are held out."""
    if wanted.validation_text:
        held_out = open_corpus(
            wanted.name,
            wanted.validation_text,
            wanted.validation_images or wanted.images,
            max_text_length=-1,
            image_options=options,
        )
    else:
        pictures = len(set(corpus.image_rows_NK[:, 0].tolist()))
        if pictures < 3:
            raise BadInput(
                f"corpus {wanted.name!r} has {pictures} pictures, too few to hold one out; give validation_text or more pictures"
            )
        count = settings.validation_pictures or min(max(pictures // 20, 2), 1000)
        corpus, held_out = corpus.hold_out(min(count, pictures - 2), seed=settings.seed)
        if not len(corpus):
            raise BadInput(f"corpus {wanted.name!r}: all texts are about the pictures to hold out; give validation_text or more pictures")
    return corpus, held_out.sample_of(settings.validation_examples, seed=settings.seed)
