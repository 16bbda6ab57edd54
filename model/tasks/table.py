"""The tasks: one row each. A new task is a new row; nothing else here or in the loop knows its name.

A row says what of an example is shown (`sample`), which scores are computed (`head`), what is minimised (`losses`, un-reduced
terms, with weights beside them) and what is reported (`metric`, values to be averaged). Cells are functions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from uniter.datasets.batches import downstream as samples
from uniter.datasets.batches.corpus import Corpus
from uniter.datasets.batches.example import SampleFunction
from uniter.datasets.batches.pretraining import masked_regions, masked_regions_with_classes, masked_text, matched_pair
from uniter.datasets.errors import BadInput, WrongUsage, unknown_name
from uniter.datasets.text_db.annotations.vcr import CHOICES
from uniter.model import losses, metrics
from uniter.model.heads import downstream
from uniter.model.heads.classification import UniterForClassification
from uniter.model.heads.nlvr2 import UniterForNlvr2Paired, UniterForNlvr2PairedAttention, UniterForNlvr2Triplet
from uniter.model.heads.pretraining import Outputs, UniterForPretraining
from uniter.model.losses import Targets, Terms
from uniter.model.metrics import class_accuracy, distribution_distance, feature_error, pair_accuracy, word_accuracy
from uniter.model.tasks import judging, own_labels, predictions
from uniter.model.tasks.rows import (
    DRAWN,
    GROUP,
    HARD,
    LONGEST_CHOICE,
    best_answer,
    choice_scores,
    has_answer,
    has_choices,
    has_truth,
    holds,
    lengths_of_choices,
    lengths_of_group,
    lengths_of_mined_groups,
    lengths_of_pair,
    match_score,
    mined_divergence,
    mined_rank_accuracy,
    mined_ranking,
    no_candidates,
    with_answers,
    with_candidates,
    with_pool,
    with_pool_to_mine,
    with_tags,
)
from uniter.model.tasks.task import SEQUENCE, Finetuning, Taken, Task

PRETRAINING: dict[str, Task] = {
    "mlm": Task(
        sample=masked_text,
        head=UniterForPretraining.masked_words,
        losses=losses.masked_words,
        metric=word_accuracy,
        ratio=2,
    ),
    "mrfr": Task(
        sample=masked_regions,
        head=UniterForPretraining.masked_features,
        losses=losses.masked_features,
        metric=feature_error,
        divergence=losses.squared_distance,
    ),
    "mrc": Task(
        sample=masked_regions_with_classes,
        head=UniterForPretraining.masked_classes,
        losses=losses.masked_classes,
        metric=class_accuracy,
        needs_soft_labels=True,
    ),
    "mrc-kl": Task(
        sample=masked_regions_with_classes,
        head=UniterForPretraining.masked_classes,
        losses=losses.masked_distributions,
        metric=distribution_distance,
        divergence=losses.divergence_by_class,
        needs_soft_labels=True,
    ),
    "itm": Task(
        sample=matched_pair,
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


def _answers(texts: str, *, published: int, write: Any, **numbers: Any) -> Task:
    return Task(
        sample=partial(samples.answered_question, answers=published),
        head=downstream.UniterForVqa.answers,
        losses=losses.answers,
        metric=metrics.answer_score,
        reduction="rows",
        of_data=partial(with_answers, published=published),
        finetuning=Finetuning(
            model=downstream.UniterForVqa,
            texts=(texts,),
            known=has_answer,
            answer=best_answer,
            write=write,
            judge=judging.each_by_itself,
            sizes={"answers": published},
            named=True,
            **numbers,
        ),
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
            texts=("nlvr2",),
            known=has_truth,
            answer=holds,
            figures=predictions.nlvr2_figures,
            write=predictions.write_statements,
            judge=judging.true_or_false,
            words=("False", "True"),
            learning_rate=3e-5,
            steps=8000,
            taken=Taken(2 * SEQUENCE, 256),
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
            texts=("refcoco",),
            answer=best_answer,
            write=predictions.write_regions,
            judge=judging.best_region,
            points=True,
            sizes=sizes,
            head="re_output",
            # Annotated boxes have no confidence to be chosen by, and the published configurations take detected ones alike.
            regions={"conf_th": -1, "num_bb": 100},
            taken=Taken(20, 20),  # a phrase and its picture's annotated boxes
            learning_rate=1e-4,
            steps=24000,
            # Published: 128 phrases, with their regions some twenty tokens each.
            batch_tokens=2560,
        ),
    )


DOWNSTREAM: dict[str, Task] = {
    "vqa": _answers(
        "vqa",
        published=3129,
        write=predictions.write_answers,
        head="vqa_output",
        learning_rate=8e-5,
        head_rate_multiplier=10.0,
        steps=6000,
        batch_tokens=5120,
        accumulation=5,
    ),
    "ve": _answers("ve", published=3, write=predictions.write_labels, learning_rate=8e-5, steps=4000, batch_tokens=4096, accumulation=4),
    "nlvr2": _statements(UniterForNlvr2PairedAttention, samples.statement_about_each, lengths_of_pair, sequences=2),
    "nlvr2-paired": _statements(UniterForNlvr2Paired, samples.statement_about_each, lengths_of_pair, sequences=2),
    "nlvr2-triplet": _statements(UniterForNlvr2Triplet, samples.statement_about_both),
    "retrieval": Task(
        sample=matched_pair,
        head=downstream.UniterForRetrieval.ranks,
        losses=partial(losses.ranking, group_size=GROUP),
        metric=partial(metrics.rank_accuracy, group_size=GROUP),
        divergence=partial(losses.divergence_in_groups, group_size=GROUP),
        lengths=lengths_of_group,
        of_data=with_pool,
        finetuning=Finetuning(
            model=downstream.UniterForRetrieval,
            texts=("retrieval", "captions"),
            answer=match_score,
            pairs=downstream.UniterForRetrieval.ranks,
            taken=Taken(150, 150),  # a text with its picture, with a wrong one, and a wrong text
            steps=20000,
            batch_tokens=6144,
            accumulation=4,
        ),
    ),
    "retrieval-hard": Task(
        sample=matched_pair,
        narrow=partial(downstream.UniterForRetrieval.mined, count=HARD),
        head=downstream.UniterForRetrieval.ranks,
        losses=mined_ranking,
        metric=mined_rank_accuracy,
        divergence=mined_divergence,
        # Published: the mean over texts' groups plus the mean over pictures' groups.
        weights={"margin": 2.0},
        lengths=lengths_of_mined_groups,
        compiles=False,  # which sequences are trained with, and so how many rows, is found out on the way
        of_data=with_pool_to_mine,
        finetuning=Finetuning(
            model=downstream.UniterForRetrieval,
            texts=("retrieval", "captions"),
            answer=match_score,
            pairs=downstream.UniterForRetrieval.ranks,
            validate_as="retrieval",
            taken=Taken(2 * (1 + HARD) * SEQUENCE, 1, scored=2 * (1 + DRAWN) * SEQUENCE),
            steps=5000,
            # One text and its picture a micro-batch, whatever their tokens; eight of each an update.
            batch_tokens=1,
            accumulation=8,
        ),
    ),
    "refcoco": _referring(losses.referred_regions),
    "refcoco-two-layers": _referring(losses.referred_regions, layers=2),
    "refcoco-rank": _referring(losses.ranked_regions),
    "vcr": Task(
        sample=samples.multiple_choice,
        head=downstream.UniterForVcr.choices,
        losses=losses.choices,
        metric=metrics.choice_accuracy,
        divergence=losses.divergence_by_class,
        lengths=lengths_of_choices,
        pictures=2,
        of_data=with_tags,
        finetuning=Finetuning(
            model=downstream.UniterForVcr,
            texts=("vcr",),
            known=has_choices,
            answer=choice_scores,
            figures=predictions.vcr_figures,
            write=predictions.write_choices,
            judge=judging.first_choice,
            words=tuple(f"answer {number}" for number in range(CHOICES)),
            predicted=partial(samples.multiple_choice, every_answer=True),
            predicted_lengths=partial(lengths_of_choices, sequences=CHOICES + CHOICES**2),
            max_text_length=LONGEST_CHOICE,
            best_by="q2ar",
            head="vcr_output",
            taken=Taken(2 * CHOICES * 90, 2 * CHOICES * 90),  # choices with their question and both kinds of regions
            learning_rate=6e-5,
            steps=8000,
            # Published: 4,000 tokens, not counting that each example is four sequences.
            batch_tokens=16000,
            accumulation=5,
        ),
    ),
    "gqa": _answers(
        "gqa",
        published=1842,
        write=predictions.write_gqa,
        # Not among UNITER's tasks: VQA's numbers, and some four passes over the 943,000 balanced questions, as LXMERT's.
        head="vqa_output",
        learning_rate=8e-5,
        head_rate_multiplier=10.0,
        steps=8000,
        batch_tokens=5120,
        accumulation=5,
    ),
    "flickr30k-entities": Task(
        sample=samples.grounded_phrase,
        head=downstream.UniterForReferring.regions,
        losses=losses.matching_regions,
        metric=metrics.region_recalls,
        finetuning=Finetuning(
            model=downstream.UniterForReferring,
            texts=("flickr30k-entities",),
            answer=best_answer,
            write=predictions.write_groundings,
            judge=judging.best_region,
            points=True,
            best_by="r1",
            learning_rate=5e-5,
            steps=20000,
            batch_tokens=5120,
        ),
    ),
    # One label of several, until the data say otherwise.
    "classify": Task(
        sample=partial(samples.answered_question, answers=2),
        head=UniterForClassification.labels,
        losses=losses.one_label,
        metric=metrics.answer_score,
        of_data=own_labels.with_labels,
        finetuning=Finetuning(
            model=UniterForClassification,
            texts=("classify",),
            known=has_answer,
            answer=own_labels.probabilities_of_one,
            judge=judging.one_of_all,
            figures_rank=True,
            named=True,
            begin=own_labels.begin_at_mean,
            sizes={"labels": 2, "label_kind": "one"},
            learning_rate=3e-5,
            steps=5000,
            batch_tokens=4096,
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
        raise WrongUsage(unknown_name("task", name, known))
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


def row_of(name: str) -> Task:
    """A down-stream row by its name.

    Raises:
        BadInput: there is none of that name.
    """
    return DOWNSTREAM[task_name(name, DOWNSTREAM)]


def made_by(model: type) -> str:
    """The command that trains a model of this class: pre-training, or the first task with such a head."""
    named = (name for name, row in DOWNSTREAM.items() if row.finetuning is not None and row.finetuning.model is model)
    task = next(named, None)
    return "uniter-train pretrain" if task is None else f"uniter-train finetune {task}"
