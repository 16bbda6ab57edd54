"""The tasks: one row each. A new task is a new row; nothing else here or in the loop knows its name.

A row says what of an example is shown (`sample`), which scores are computed (`head`), what is minimised (`losses`, un-reduced
terms, with weights beside them) and what is reported (`metric`, values to be averaged). Cells are functions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from uniter.datasets import samples
from uniter.datasets.collate import PackedBatch
from uniter.datasets.errors import BadInput, unknown_name
from uniter.datasets.masking import NOT_PREDICTED
from uniter.datasets.samples import SampleFunction
from uniter.model import losses
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
SYNONYMS = {"mrckl": "mrc-kl"}


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


def default_tasks(*, has_soft_labels: bool) -> dict[str, float]:
    """The tasks that the data allow, with UNITER's ratios: without soft labels there is no MRC-KL."""
    return {name: PRETRAINING[name].ratio for name in DEFAULT_PRETRAINING if has_soft_labels or not PRETRAINING[name].needs_soft_labels}


def check_soft_labels(tasks: Sequence[str], corpus: str, *, has_soft_labels: bool) -> None:
    """Raise BadInput if a task was asked for by name that these databases cannot give."""
    impossible = [name for name in tasks if PRETRAINING[task_name(name)].needs_soft_labels and not has_soft_labels]
    if impossible:
        raise BadInput(
            f"corpus {corpus!r}: task {', '.join(impossible)} needs the detector's soft labels, which its region databases do not hold; "
            "leave it out or extract the regions with uniter-extract"
        )
