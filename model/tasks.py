"""The tasks: one row each. A new task is a new row; nothing else here or in the loop knows its name.

A row says what of an example is shown (`sample`), which scores are computed (`head`), what is minimised (`losses`, un-reduced
terms, with weights beside them) and what is reported (`metric`, values to be averaged). Cells are functions.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from uniter.datasets import candidates, samples
from uniter.datasets.annotations.vcr import CHOICES, TAG_WORDS
from uniter.datasets.collate import PackedBatch
from uniter.datasets.corpus import SPECIAL_TOKENS, Corpus
from uniter.datasets.errors import BadInput, unknown_name
from uniter.datasets.masking import NOT_PREDICTED
from uniter.datasets.samples import SampleFunction
from uniter.datasets.text_db import TextDB
from uniter.model import downstream, losses, metrics, predictions
from uniter.model.downstream import DownstreamModel
from uniter.model.heads import Outputs, UniterForPretraining
from uniter.model.losses import Reduction, Targets, Terms


@dataclass(frozen=True, slots=True)
class Task:
    """A row of the table.

    Attributes:
        sample: what of an example is shown and asked.
        head: the scores of a batch, where the task needs them.
        losses: the named, un-reduced terms.
        metric: named values, one a predicted place or example, whose mean is reported (1 is best where it is an accuracy).
        weights: of the terms, 1 where none is given.
        reduction: how a term becomes a number, see losses.py.
        needs_soft_labels: cannot run on databases without the detector's distributions.
        shows_other_pictures: half of the examples are shown another picture.
        ratio: how often the task is drawn, relative to the others of its kind (UNITER's in-domain ratios).
        lengths: tokens of each example with the pictures (N, K) it is shown.
        sequences: of an example, each counted in `lengths` with its [CLS] and [SEP], which the published sampler does not count.
        pictures: K, the pictures of an example.
        of_data: the row for these corpora, where it depends on them (the number of answers, the pictures to draw from).
        finetuning: what else fine-tuning needs; None for pre-training tasks.
    """

    sample: SampleFunction
    head: Callable[[Any, PackedBatch], Outputs]
    losses: Callable[[Outputs, Targets], Terms]
    metric: Callable[[Outputs, Targets], dict[str, Tensor]]
    weights: Mapping[str, float] = field(default_factory=dict)
    reduction: Reduction = "elements"
    needs_soft_labels: bool = False
    shows_other_pictures: bool = False
    ratio: float = 1.0
    lengths: Callable[[Corpus, NDArray[np.int32]], NDArray[np.int64]] = Corpus.lengths_with
    sequences: int = 1
    pictures: int = 1
    of_data: Callable[["Task", Corpus], "Task"] = lambda task, corpus: task
    finetuning: "Finetuning | None" = None


@dataclass(frozen=True, slots=True)
class Finetuning:
    """What a down-stream row has beside its task; the numbers are the published base configuration's (facts 5.4, 5.6).

    Attributes:
        model: the class with the task's head.
        head: the name prefix of that head, where it learns at a rate of its own.
        sizes: further constructor arguments.
        answer: what a batch's outputs say, one JSON value an example, in the batch's order.
        write: the file that the official evaluation takes, from the predictions and the names of the answers.
        figures: official figures of a whole corpus beside the metric, where there are any.
        pairs: the head that scores single pairs, where all texts are evaluated with all pictures instead of example by example.
        validate_as: the row that training validates with, where its own would be too expensive.
        predicted: what of an example is asked in predictions, where that is more than in training, and `predicted_lengths` its tokens.
        max_text_length: longest text, where the settings leave it open and UNITER's 60 are too few.
        regions: which rows are taken from published region databases, where nobody says (as `ImageDB`'s arguments).
        learning_rate, head_rate_multiplier, steps, batch_tokens, accumulation, clip: where the settings leave them open.
    """

    model: type[DownstreamModel]
    answer: Callable[[Outputs], list[Any]]
    write: Callable[[Path, Corpus, predictions.Predictions, Sequence[str] | None], None] | None = None
    figures: Callable[[Corpus, predictions.Predictions], dict[str, float]] | None = None
    sizes: Mapping[str, Any] = field(default_factory=dict)
    pairs: Callable[[Any, PackedBatch], Outputs] | None = None
    validate_as: str | None = None
    predicted: SampleFunction | None = None
    predicted_lengths: Callable[[Corpus, NDArray[np.int32]], NDArray[np.int64]] | None = None
    max_text_length: int | None = None
    regions: Mapping[str, float] = field(default_factory=dict)
    head: str | None = None
    learning_rate: float = 5e-5
    head_rate_multiplier: float = 1.0
    steps: int = 5000
    batch_tokens: int = 10240
    accumulation: int = 1
    clip: float = 2.0


def word_accuracy(outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
    words_T = targets["words"]
    return {"accuracy": (outputs["scores"].argmax(dim=1) == words_T[words_T != NOT_PREDICTED]).float()}


def feature_error(outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
    return {"mse": losses.masked_features(outputs, targets)["squared_error"].mean(dim=1)}


def class_accuracy(outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
    return {"accuracy": (outputs["scores"].argmax(dim=1) == losses.best_foreground_class(targets["soft_labels"])).float()}


def distribution_distance(outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
    """The divergence of each region summed over classes (nats), and whether the best class, background included, is the same."""
    soft_labels_SC = targets["soft_labels"]
    return {
        "kl": losses.masked_distributions(outputs, targets)["kl"].sum(dim=1),
        "accuracy": (outputs["scores"].argmax(dim=1) == soft_labels_SC.argmax(dim=1)).float(),
    }


def pair_accuracy(outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
    return {"accuracy": (outputs["scores"].argmax(dim=1) == targets["matched"]).float()}


PRETRAINING: dict[str, Task] = {
    "mlm": Task(
        sample=samples.masked_text,
        head=UniterForPretraining.masked_words,
        losses=losses.masked_words,
        metric=word_accuracy,
        ratio=2,
    ),
    "mrfr": Task(
        sample=samples.masked_regions,
        head=UniterForPretraining.masked_features,
        losses=losses.masked_features,
        metric=feature_error,
    ),
    "mrc": Task(
        sample=samples.masked_regions_with_classes,
        head=UniterForPretraining.masked_classes,
        losses=losses.masked_classes,
        metric=class_accuracy,
        needs_soft_labels=True,
    ),
    "mrc-kl": Task(
        sample=samples.masked_regions_with_classes,
        head=UniterForPretraining.masked_classes,
        losses=losses.masked_distributions,
        metric=distribution_distance,
        needs_soft_labels=True,
    ),
    "itm": Task(
        sample=samples.matched_pair,
        head=UniterForPretraining.aligned_pairs,
        losses=losses.pairs,
        metric=pair_accuracy,
        weights={"transport": 0.1},
        shows_other_pictures=True,
        ratio=2,
    ),
}
DEFAULT_PRETRAINING = ("itm", "mlm", "mrfr", "mrc-kl")
SYNONYMS = {"mrckl": "mrc-kl", "itm-rank": "retrieval", "snli-ve": "ve", "refcoco+": "refcoco", "refcocog": "refcoco"}


def with_answers(task: Task, corpus: Corpus, *, published: int) -> Task:
    """The row for so many answers as the texts know; databases that were published without a list have the published number."""
    table = predictions.answer_table(corpus)
    answers = published if table is None else len(table)
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


def with_pool(task: Task, corpus: Corpus) -> Task:
    return replace(task, sample=partial(samples.ranked_group, pictures=pool_of(corpus), negatives=NEGATIVES))


# Hard negatives: of so many drawn, the model trains with the best-scoring ones (facts 6.4).
DRAWN, HARD = 399, 31


def with_pool_to_mine(task: Task, corpus: Corpus) -> Task:
    return replace(task, sample=partial(samples.mined_groups, pictures=pool_of(corpus), drawn=DRAWN))


def lengths_of_mined_groups(corpus: Corpus, images_N1: NDArray[np.int32]) -> NDArray[np.int64]:
    """Tokens of the two groups to mine from, the negatives counted as long as their positive."""
    return corpus.lengths_with(images_N1) * 2 * (1 + DRAWN)


def mined_size(outputs: Outputs, targets: Targets) -> int:
    """Sequences that are left of each group."""
    return len(outputs["scores"]) // len(targets["group_sizes"])


def mined_ranking(outputs: Outputs, targets: Targets) -> Terms:
    return losses.ranking(outputs, targets, group_size=mined_size(outputs, targets))


def mined_rank_accuracy(outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
    return metrics.rank_accuracy(outputs, targets, group_size=mined_size(outputs, targets))


def with_candidates(task: Task, corpus: Corpus) -> Task:
    """The row with the order of each picture's annotations, for annotated or for detected boxes, whichever the corpus has."""
    pictures = [candidates.read_pictures(text) for text in corpus.texts]
    annotated = candidates.are_annotated(corpus, pictures)
    return replace(task, sample=partial(samples.referred_region, pictures=pictures, annotated=annotated))


def no_candidates(example: samples.Example, rng: random.Random, masking: samples.Masking) -> samples.Sample:
    raise ValueError("a referring row samples only after `of_data` gave it the pictures of its corpus")


def ranked_regions(outputs: Outputs, targets: Targets) -> Terms:
    """RefCOCO's ranking loss; its draws are the samples', so that a resumed run makes the same ones."""
    return losses.ranked_regions(outputs, targets, rng=random.Random(int(targets["draw"][0])))


def lengths_of_choices(corpus: Corpus, images_N2: NDArray[np.int32], *, sequences: int = 2 * CHOICES) -> NDArray[np.int64]:
    """Tokens of VCR's sequences, each counted with the longest answer and rationale; there are two more [SEP] in it."""
    return (corpus.lengths_with(images_N2) + 2) * sequences


LONGEST_CHOICE = 220  # word pieces of question, answer and rationale, as published


def tells_choices(text: TextDB) -> bool:
    """Whether these are VCR's texts."""
    return len(text) > 0 and "input_ids_as" in text.record(0)


def special_tokens(corpus: Corpus) -> int:
    """[CLS] and [SEP]s of a text that is read; VCR's question, answer and rationale have a [SEP] each."""
    return 2 * SPECIAL_TOKENS if any(map(tells_choices, corpus.texts)) else SPECIAL_TOKENS


def vocabulary_of(corpus: Corpus) -> int:
    """The word pieces that a model of these texts needs, VCR's object tags counted."""
    # Ours say which words they added; published VCR databases do not, but always have UNITER's 81.
    return max(text.v_range[1] + len(text.meta.get("added_words", TAG_WORDS if tells_choices(text) else ())) for text in corpus.texts)


def check_both_kinds(corpus: Corpus) -> None:
    """Raise BadInput unless the annotated and the detected regions of VCR's pictures are told apart by their keys."""
    same = corpus.image_rows_NK[:, 0] == corpus.image_rows_NK[:, 1]
    if bool(same.any()):
        row = int(corpus.image_rows_NK[same][0, 0])
        raise BadInput(
            f"corpus {corpus.name!r}: {corpus.images.keys_list[row]!r} is both the annotated and the detected regions of a picture; "
            "name the databases as --images 'ANNOTATED;DETECTED'"
        )


def with_tags(task: Task, corpus: Corpus) -> Task:
    """The row for texts with so many word pieces, the object tags counted."""
    check_both_kinds(corpus)
    assert task.finetuning is not None
    return replace(task, finetuning=replace(task.finetuning, sizes={"words": vocabulary_of(corpus)}))


def choice_scores(outputs: Outputs) -> list[Any]:
    """The scores of a question's answers, and of its rationales with each answer."""
    return list(outputs["scores"][:, 1].float().view(-1, CHOICES + CHOICES**2).tolist())


def _answers(*, published: int, write: Any, **numbers: Any) -> Task:
    return Task(
        sample=partial(samples.answered_question, answers=published),
        head=downstream.UniterForVqa.answers,
        losses=losses.answers,
        metric=metrics.answer_score,
        reduction="rows",
        of_data=partial(with_answers, published=published),
        finetuning=Finetuning(model=downstream.UniterForVqa, answer=best_answer, write=write, sizes={"answers": published}, **numbers),
    )


def _statements(model: Any, sample: SampleFunction, lengths: Any = Corpus.lengths_with, sequences: int = 1) -> Task:
    return Task(
        sample=sample,
        head=model.statements,
        losses=losses.statements,
        metric=metrics.statement_accuracy,
        lengths=lengths,
        sequences=sequences,
        pictures=2,
        finetuning=Finetuning(
            model=model,
            answer=holds,
            figures=predictions.nlvr2_figures,
            write=predictions.write_statements,
            learning_rate=3e-5,
            steps=8000,
        ),
    )


def _referring(losses_of: Callable[[Outputs, Targets], Terms], **sizes: Any) -> Task:
    return Task(
        sample=no_candidates,
        head=downstream.UniterForReferring.regions,
        losses=losses_of,
        metric=metrics.referred_accuracy,
        reduction="sum",
        of_data=with_candidates,
        finetuning=Finetuning(
            model=downstream.UniterForReferring,
            answer=best_answer,
            write=predictions.write_regions,
            sizes=sizes,
            # Annotated boxes have no confidence to be chosen by, and the published configurations take detected ones alike.
            regions={"conf_th": -1, "num_bb": 100},
            learning_rate=1e-4,
            steps=24000,
            # Published: 128 phrases, with their regions some twenty tokens each.
            batch_tokens=2560,
        ),
    )


DOWNSTREAM: dict[str, Task] = {
    "vqa": _answers(
        published=3129,
        write=predictions.write_answers,
        head="vqa_output",
        learning_rate=8e-5,
        head_rate_multiplier=10.0,
        steps=6000,
        batch_tokens=5120,
        accumulation=5,
    ),
    "ve": _answers(published=3, write=predictions.write_labels, learning_rate=8e-5, steps=4000, batch_tokens=4096, accumulation=4),
    "nlvr2": _statements(downstream.UniterForNlvr2PairedAttention, samples.statement_about_each, lengths_of_pair, sequences=2),
    "nlvr2-paired": _statements(downstream.UniterForNlvr2Paired, samples.statement_about_each, lengths_of_pair, sequences=2),
    "nlvr2-triplet": _statements(downstream.UniterForNlvr2Triplet, samples.statement_about_both),
    "retrieval": Task(
        sample=samples.matched_pair,
        head=downstream.UniterForRetrieval.ranks,
        losses=partial(losses.ranking, group_size=GROUP),
        metric=partial(metrics.rank_accuracy, group_size=GROUP),
        lengths=lengths_of_group,
        of_data=with_pool,
        finetuning=Finetuning(
            model=downstream.UniterForRetrieval,
            answer=match_score,
            pairs=downstream.UniterForRetrieval.ranks,
            steps=20000,
            batch_tokens=6144,
            accumulation=4,
        ),
    ),
    "retrieval-hard": Task(
        sample=samples.matched_pair,
        head=partial(downstream.UniterForRetrieval.mined_ranks, count=HARD),
        losses=mined_ranking,
        metric=mined_rank_accuracy,
        # Published: the mean over texts' groups plus the mean over pictures' groups.
        weights={"margin": 2.0},
        lengths=lengths_of_mined_groups,
        of_data=with_pool_to_mine,
        finetuning=Finetuning(
            model=downstream.UniterForRetrieval,
            answer=match_score,
            pairs=downstream.UniterForRetrieval.ranks,
            validate_as="retrieval",
            steps=5000,
            # One text and its picture a micro-batch, whatever their tokens; eight of each an update.
            batch_tokens=1,
            accumulation=8,
        ),
    ),
    "refcoco": _referring(losses.referred_regions),
    "refcoco-two-layers": _referring(losses.referred_regions, layers=2),
    "refcoco-rank": _referring(ranked_regions),
    "vcr": Task(
        sample=samples.multiple_choice,
        head=downstream.UniterForVcr.choices,
        losses=losses.choices,
        metric=metrics.choice_accuracy,
        lengths=lengths_of_choices,
        pictures=2,
        of_data=with_tags,
        finetuning=Finetuning(
            model=downstream.UniterForVcr,
            answer=choice_scores,
            figures=predictions.vcr_figures,
            write=predictions.write_choices,
            predicted=partial(samples.multiple_choice, every_answer=True),
            predicted_lengths=partial(lengths_of_choices, sequences=CHOICES + CHOICES**2),
            max_text_length=LONGEST_CHOICE,
            learning_rate=6e-5,
            steps=8000,
            # Published: 4,000 tokens, not counting that each example is four sequences.
            batch_tokens=16000,
            accumulation=5,
        ),
    ),
}


def task_name(name: str, known: Mapping[str, Task] = PRETRAINING) -> str:
    """Our name of a task that a file or a user named.

    Raises:
        BadInput: there is no such task; the sentence names the nearest.
    """
    ours = SYNONYMS.get(name, name)
    if ours not in known:
        raise BadInput(unknown_name("task", name, known))
    return ours


def pretraining_task(name: str, *, alignment_weight: float) -> Task:
    """A row of the table; without alignment (weight 0) image-text matching computes no transport."""
    task = PRETRAINING[task_name(name)]
    if name != "itm":
        return task
    if alignment_weight == 0:
        return replace(task, head=UniterForPretraining.pairs, weights={})
    return replace(task, weights={"transport": alignment_weight})


def default_tasks(*, has_soft_labels: bool, pictures: int = 1) -> dict[str, float]:
    """The tasks that the data allow, with UNITER's ratios: no MRC-KL without soft labels, no matching in VCR's second stage.

    Args:
        pictures: K of an example, 2 in VCR's second stage.
    """
    rows = {name: PRETRAINING[name] for name in DEFAULT_PRETRAINING}
    return {
        name: row.ratio
        for name, row in rows.items()
        if (has_soft_labels or not row.needs_soft_labels) and (pictures == 1 or not row.shows_other_pictures)
    }


def check_soft_labels(tasks: Sequence[str], corpus: str, *, has_soft_labels: bool) -> None:
    """Raise BadInput if a task was asked for by name that these databases cannot give."""
    impossible = [name for name in tasks if PRETRAINING[task_name(name)].needs_soft_labels and not has_soft_labels]
    if impossible:
        raise BadInput(
            f"corpus {corpus!r}: task {', '.join(impossible)} needs the detector's soft labels, which its region databases do not hold; "
            "leave it out or extract the regions with uniter-extract"
        )
