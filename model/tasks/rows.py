"""What the rows of tasks are made of: lengths, answers, candidates."""

import random
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from uniter.datasets.batches import candidates
from uniter.datasets.batches import downstream as samples
from uniter.datasets.batches.corpus import SPECIAL_TOKENS, Corpus, check_both_kinds, vocabulary_of
from uniter.datasets.batches.example import Example, Masking, Sample
from uniter.datasets.errors import BadInput
from uniter.datasets.text_db.annotations.vcr import CHOICES
from uniter.model import losses, metrics
from uniter.model.heads.pretraining import Outputs
from uniter.model.losses import Targets, Terms
from uniter.model.tasks import predictions
from uniter.model.tasks.task import NO_SIZES, Task


def has_answer(record: Mapping[str, Any]) -> bool:
    """Of a question or hypothesis; a question may have been answered by nothing that the list of answers holds."""
    return isinstance(record.get("target"), dict)


def has_truth(record: Mapping[str, Any]) -> bool:
    """Whether a record says what is right, as most tasks' do."""
    return record.get("target") is not None


def has_choices(record: Mapping[str, Any]) -> bool:
    """Whether a record of VCR says the right answer and the right rationale."""
    return min(int(record.get("qa_target", -1)), int(record.get("qar_target", -1))) >= 0


def with_answers(task: Task, corpus: Corpus, sizes: Mapping[str, Any] = NO_SIZES, *, published: int) -> Task:
    """The row for so many answers as the texts know, else the model; databases that were published without a list have the published
    number."""
    table = predictions.answer_table(corpus)
    answers = int(sizes.get("answers", published)) if table is None else len(table)
    assert task.finetuning is not None
    return replace(
        task,
        sample=partial(samples.answered_question, answers=answers),
        finetuning=replace(task.finetuning, sizes={"answers": answers}),
    )


def best_answer(outputs: Outputs) -> list[Any]:
    """The number of the best-scoring answer."""
    return list(outputs["scores"].argmax(dim=1).tolist())


def holds(outputs: Outputs) -> list[Any]:
    """Whether the statement holds."""
    return [bool(best) for best in outputs["scores"].argmax(dim=1).tolist()]


def match_score(outputs: Outputs) -> list[Any]:
    """Each pair's score by the head of retrieval, B numbers."""
    return list(outputs["scores"].squeeze(1).tolist())


def lengths_of_pair(corpus: Corpus, images_N2: NDArray[np.int32]) -> NDArray[np.int64]:
    """Tokens of NLVR2's two sequences: the text stands in both."""
    return corpus.lengths_with(images_N2) + corpus.text_lengths_N + SPECIAL_TOKENS


NEGATIVES = 1


GROUP = 1 + 2 * NEGATIVES


def lengths_of_group(corpus: Corpus, images_N1: NDArray[np.int32]) -> NDArray[np.int64]:
    """Tokens of a ranked group, the negatives counted as long as their positive."""
    return corpus.lengths_with(images_N1) * GROUP


def pool_of(corpus: Corpus) -> NDArray[np.int32]:
    """The pictures that negatives are drawn from."""
    pictures = np.unique(corpus.image_rows_NK)
    if len(pictures) < 2:
        raise BadInput(f"corpus {corpus.name!r}: ranking needs at least two pictures")
    return pictures


def with_pool(task: Task, corpus: Corpus, sizes: Mapping[str, Any] = NO_SIZES) -> Task:
    """The row with the corpus' pictures, among which wrong ones are drawn for each text."""
    return replace(task, sample=partial(samples.ranked_group, pictures=pool_of(corpus), negatives=NEGATIVES))


# Hard negatives: of so many drawn, the model trains with the best-scoring ones (facts 6.4).
DRAWN, HARD = 399, 31


def with_pool_to_mine(task: Task, corpus: Corpus, sizes: Mapping[str, Any] = NO_SIZES) -> Task:
    """The row with the corpus' pictures, among which the hardest wrong ones are looked for."""
    return replace(task, sample=partial(samples.mined_groups, pictures=pool_of(corpus), drawn=DRAWN))


def lengths_of_mined_groups(corpus: Corpus, images_N1: NDArray[np.int32]) -> NDArray[np.int64]:
    """Tokens of the two groups to mine from, the negatives counted as long as their positive."""
    return corpus.lengths_with(images_N1) * 2 * (1 + DRAWN)


def mined_size(outputs: Targets, targets: Targets) -> int:
    """Sequences that are left of each group."""
    return len(outputs["scores"]) // len(targets["group_sizes"])


def mined_ranking(outputs: Outputs, targets: Targets) -> Terms:
    """The ranking loss of groups of one right pair and the hardest wrong ones that were found."""
    return losses.ranking(outputs, targets, group_size=mined_size(outputs, targets))


def mined_divergence(clean: Targets, outputs: Targets, targets: Targets) -> Tensor:
    """What adversarial training compares of such groups: the divergence of their scores from the `clean` ones."""
    return losses.divergence_in_groups(clean, outputs, targets, group_size=mined_size(outputs, targets))


def mined_rank_accuracy(outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
    """Whether the right pair comes first in such a group, as `metrics.rank_accuracy`."""
    return metrics.rank_accuracy(outputs, targets, group_size=mined_size(outputs, targets))


def with_candidates(task: Task, corpus: Corpus, sizes: Mapping[str, Any] = NO_SIZES) -> Task:
    """The row with the order of each picture's annotations, for annotated or for detected boxes, whichever the corpus has."""
    pictures = [candidates.read_pictures(text) for text in corpus.texts]
    annotated = candidates.are_annotated(corpus, pictures)
    return replace(task, sample=partial(samples.referred_region, pictures=pictures, annotated=annotated))


def no_candidates(example: Example, rng: random.Random, masking: Masking) -> Sample:
    """Stands where a row's pictures are not known yet.

    Raises:
        ValueError: always; `of_data` of the row puts the right function here.
    """
    raise ValueError("a referring row samples only after `of_data` gave it the pictures of its corpus")


def lengths_of_choices(corpus: Corpus, images_N2: NDArray[np.int32], *, sequences: int = 2 * CHOICES) -> NDArray[np.int64]:
    """Tokens of VCR's sequences, each counted with the longest answer and rationale; there are two more [SEP] in it."""
    return (corpus.lengths_with(images_N2) + 2) * sequences


LONGEST_CHOICE = 220  # word pieces of question, answer and rationale, as published


def with_tags(task: Task, corpus: Corpus, sizes: Mapping[str, Any] = NO_SIZES) -> Task:
    """The row for texts with so many word pieces, the object tags counted."""
    check_both_kinds(corpus)
    assert task.finetuning is not None
    return replace(task, finetuning=replace(task.finetuning, sizes={"words": vocabulary_of(corpus)}))


def choice_scores(outputs: Outputs) -> list[Any]:
    """The scores of a question's answers, and of its rationales with each answer."""
    return list(outputs["scores"][:, 1].float().view(-1, CHOICES + CHOICES**2).tolist())
