"""The only evaluation loop, and the figures of a pre-trained model on held-out pairs.

Everything is a function of the seed: which words are hidden, which other picture is shown, which pairs compete in retrieval.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from uniter.datasets.batches.collate import PackedBatch
from uniter.datasets.batches.example import Masking
from uniter.datasets.batches.loader import Assembler, MicroBatch, load
from uniter.datasets.batches.plans import Part, sequential_plans
from uniter.model import losses
from uniter.model.heads.pretraining import Outputs
from uniter.model.tasks.task import Task
from uniter.model.train.distributed import Processes


@torch.no_grad()
def scored(
    model: nn.Module,
    head: Callable[[Any, PackedBatch], Outputs],
    batches: Iterable[MicroBatch],
    *,
    device: torch.device,
    precision: str = "fp32",
) -> Iterator[tuple[MicroBatch, PackedBatch, Outputs]]:
    """The one loop that runs a model without training it: each micro-batch, its batch on the device, and the head's outputs."""
    was_training = model.training
    model.eval()
    try:
        for made in batches:
            batch = made.batch.to(device, non_blocking=True)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
                outputs = head(model, batch)
            yield made, batch, outputs
    finally:
        model.train(was_training)


@dataclass(slots=True)
class Means:
    """Sums and counts of named values, and their means in the end."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, total: Tensor | float, count: float) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + float(total)
        self.counts[name] = self.counts.get(name, 0.0) + count

    def add_values(self, name: str, values: Tensor) -> None:
        self.add(name, values.double().sum(), len(values))

    def of_all(self, processes: Processes) -> "Means":
        """The sums over all processes; one that got no batch may know fewer names."""
        total = Means()
        for sums, counts in processes.gather((self.sums, self.counts)):
            for name, value in sums.items():
                total.add(name, value, counts[name])
        return total

    def means(self) -> dict[str, float]:
        return {name: self.sums[name] / count for name, count in sorted(self.counts.items()) if count}


def validate(
    model: nn.Module,
    task: Task,
    part: Part,
    *,
    budget: int,
    seed: int,
    masking: Masking,
    processes: Processes,
    precision: str = "fp32",
    workers: int = 0,
    note: Callable[[MicroBatch, Outputs], None] = lambda made, outputs: None,
) -> dict[str, float]:
    """A task's loss, its terms and its metrics over all examples of a part, shared out to the processes.

    Args:
        note: is told what came out of each of this process's batches.

    Returns:
        "loss" (the terms weighted as in training), "loss_TERM" the mean of each term, each metric's mean by its name.
    """
    plans = sequential_plans(part, 0, budget=budget, seed=seed, rank=processes.rank, world=processes.world)
    batches = load(Assembler([part], seed, masking), plans, workers=workers)
    means = Means()
    for made, batch, outputs in scored(model, task.head, batches, device=processes.device, precision=precision):
        note(made, outputs)
        for name, term in task.losses(outputs, batch.targets).items():
            total, count = losses.sum_and_count(term, "elements" if task.reduction == "elements" else "rows")
            means.add(f"loss_{name}", total.double(), count)
        for name, values in task.metric(outputs, batch.targets).items():
            means.add_values(name, values)
    figures = means.of_all(processes).means()
    figures["loss"] = sum(
        value * task.weights.get(name.removeprefix("loss_"), 1.0) for name, value in figures.items() if name.startswith("loss_")
    )
    return figures
