"""What is said of an update whose numbers are not finite."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from uniter.datasets.batches.collate import PackedBatch
from uniter.datasets.batches.loader import Assembler
from uniter.datasets.batches.plans import Plan
from uniter.datasets.errors import UniterError
from uniter.model.train.distributed import Processes

# Of a micro-batch its plan, the ids of its examples, and the sum of each term; not the batch: it is large.
PerBatch = tuple[Plan, list[str], dict[str, Tensor]]


class NotFinite(UniterError):
    """A loss or gradient became infinite or no number."""


def check_finite(
    means: Mapping[str, float],
    norm: float,
    per_batch: Sequence[PerBatch],
    assembler: Assembler,
    *,
    step: int,
    part: str,
    processes: Processes,
) -> None:
    """Stop the run, on every process, where an update's numbers are not finite (the device has left the weights as they were).

    Args:
        means, norm: of the terms and metrics, and of the gradient.
        per_batch: what this process's micro-batches gave.
        assembler: makes a batch once more.

    Raises:
        NotFinite: with update, part, terms and example ids.
    """
    if all(math.isfinite(value) for value in (*means.values(), norm)):
        return
    here: list[tuple[list[str], list[str], list[str]]] = []
    for plan, ids, sums in per_batch:
        terms = [name for name, total in sums.items() if not bool(torch.isfinite(total))]
        if terms:
            # The batch is a function of its plan: made once more, to look for what is wrong with it.
            here.append((terms, ids, _examples_with_bad_features(assembler[plan].batch)))
    found = [entry for one in processes.gather(here) for entry in one]
    if not found:
        raise NotFinite(
            f"update {step}, {part}: the gradient's norm is {norm} although every loss is finite; lower optimizer.learning_rate, "
            "or train in fp32"
        )
    terms = sorted({name for names, _, _ in found for name in names})
    ids = [name for _, names, _ in found for name in names]
    bad = [name for _, _, names in found for name in names]
    blamed = f"; features that are no finite numbers: {_some(bad)}" if bad else ""
    raise NotFinite(
        f"update {step}, {part}: {', '.join(terms)} is not finite (examples {_some(ids)}{blamed}); nothing was updated. "
        f"{'Check the region databases with uniter-db check' if bad else 'Lower optimizer.learning_rate, or train in fp32'}"
    )


def _examples_with_bad_features(batch: PackedBatch) -> list[str]:
    """The ids of the examples whose features are not finite (of tasks with one sequence an example)."""
    if len(batch.region_counts_B) != len(batch.example_ids):
        return []
    finite_R = torch.isfinite(batch.features_RD).all(dim=1)
    for name in ("features", "soft_labels"):
        if name in batch.targets and batch.masked_regions_R is not None:
            finite_R[batch.masked_regions_R] &= torch.isfinite(batch.targets[name]).all(dim=1)
    parts = torch.split(finite_R, batch.region_counts_B.tolist())
    return [name for name, rows in zip(batch.example_ids, parts, strict=True) if not bool(rows.all())]


def _some(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
