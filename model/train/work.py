"""What a run works on: its data, and what distinguishes pre-training from fine-tuning as one value."""

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from uniter.datasets.batches.corpus import Corpus, open_corpus
from uniter.datasets.batches.plans import Mixture, Part
from uniter.datasets.errors import BadInput
from uniter.model.settings.settings import CorpusSettings, TrainSettings
from uniter.model.tasks.task import Task


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
class Work:
    """What a run learns, and on what: all that is particular to pre-training or to a down-stream task, as values.

    Attributes:
        settings: with every number chosen.
        data: what is trained and validated on.
        model: in training mode, on the CPU.
        tasks: by the number of the mixture's part.
        mixture: which batch comes when.
        validation: what is validated, with its task.
        head: name prefix of a head that learns at a rate of its own.
        about: what the checkpoint's config.json says beside sizes, task and detector.
    """

    settings: TrainSettings
    data: Data
    model: nn.Module
    tasks: list[Task]
    mixture: Mixture
    validation: list[tuple[Task, Part]]
    head: str | None = None
    about: dict[str, Any] = field(default_factory=dict)


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
