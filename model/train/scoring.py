"""The one way to put examples through a model without training it: plan the batches, load them, score them.

Everything is a function of the seed: which words are hidden, which other picture is shown, which pairs compete in retrieval.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from uniter.datasets.batches.collate import PackedBatch
from uniter.datasets.batches.corpus import Corpus
from uniter.datasets.batches.example import Masking
from uniter.datasets.batches.loader import MicroBatch, load_once, on_device
from uniter.datasets.batches.masking import Pairing
from uniter.datasets.batches.plans import Part
from uniter.datasets.devices import computing_in
from uniter.datasets.progress import Progress
from uniter.model import losses
from uniter.model.heads.pretraining import Outputs
from uniter.model.tasks.task import Head, Task
from uniter.model.train.distributed import Processes


@dataclass(frozen=True, slots=True)
class Scoring:
    """How a model is put through examples.

    Attributes:
        model: on the processes' device.
        processes: share the examples of a part.
        budget: tokens of a batch.
        seed: decides masks and pictures, where nothing else does.
        masking: chances of words and regions to be hidden.
        by_example: masks are a function of the example, so that the same words are hidden whichever picture is shown.
        precision: fp32 or bf16.
        workers: processes that make batches.
        progress: counts the examples that were scored, by all processes together; its owner knows of how many.
    """

    model: nn.Module
    processes: Processes
    budget: int
    seed: int
    masking: Masking = field(default_factory=Masking)
    by_example: bool = False
    precision: str = "fp32"
    workers: int = 0
    progress: Progress | None = None

    @contextmanager
    def shown(self, total: int, *, unit: str, label: str, brief: bool = False) -> Iterator["Scoring"]:
        """The same with a `Progress` of so many examples, which the first process alone shows."""
        if not self.processes.writes:
            yield self
            return
        with Progress(total, unit=unit, label=label, brief=brief) as progress:
            yield replace(self, progress=progress)

    @torch.no_grad()
    def scored(
        self, part: Part, head: Head, *, pairing: Pairing | None = None, seed: int | None = None
    ) -> Iterator[tuple[MicroBatch, PackedBatch, Outputs]]:
        """This process's micro-batches of all examples of a part: what was planned, the batch on the device, the head's outputs.

        Args:
            pairing: which pictures the examples are shown; by default as the part says.
            seed: instead of the value's own.
        """
        seed = self.seed if seed is None else seed
        rank, world, device = self.processes.rank, self.processes.world, self.processes.device
        batches = load_once(
            part, self.masking, budget=self.budget, seed=seed, by_example=self.by_example, pairing=pairing,
            rank=rank, world=world, workers=self.workers, pin_memory=device.type == "cuda",
        )  # fmt: skip
        yield from self.put_through(batches, head)

    @torch.no_grad()
    def put_through(self, batches: Iterator[MicroBatch], head: Head) -> Iterator[tuple[MicroBatch, PackedBatch, Outputs]]:
        """What `scored` gives, of batches on the host that are made already."""
        was_training = self.model.training
        self.model.eval()
        try:
            for made in on_device(batches, self.processes.device):
                with computing_in(self.precision, self.processes.device):
                    outputs = head(self.model, made.batch)
                yield made, made.batch, outputs
                if self.progress is not None:
                    # Every process has about as many; the last ones may be fewer.
                    count = len(made.plan.examples) * self.processes.world
                    left = count if self.progress.total is None else self.progress.total - self.progress.done
                    self.progress.update(min(count, left))
        finally:
            self.model.train(was_training)


@dataclass(slots=True)
class Means:
    """Sums and counts of named values, and their means in the end; sums stay on the device until then."""

    sums: dict[str, Tensor | float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, total: Tensor | float, count: float) -> None:
        """Add a sum of `count` values under a name; a tensor stays on its device."""
        self.sums[name] = self.sums.get(name, 0.0) + total
        self.counts[name] = self.counts.get(name, 0.0) + count

    def add_values(self, name: str, values: Tensor) -> None:
        """Add the values of a tensor of one dimension under a name."""
        self.add(name, values.double().sum(), len(values))

    def of_all(self, processes: Processes) -> "Means":
        """The sums over all processes; one that got no batch may know fewer names."""
        total = Means()
        here = {name: float(total) for name, total in self.sums.items()}
        for sums, counts in processes.gather((here, self.counts)):
            for name, value in sums.items():
                total.add(name, value, counts[name])
        return total

    def means(self) -> dict[str, float]:
        """The mean of each name that was counted, in the order of names; waits for the device."""
        return {name: float(self.sums[name]) / count for name, count in sorted(self.counts.items()) if count}


def by_id(corpus: Corpus, found: Mapping[int, Any], processes: Processes) -> dict[str, Any]:
    """What all processes found of the examples, by number, as one: by example id, in corpus order."""
    everything = {number: answer for one in processes.gather(dict(found)) for number, answer in one.items()}
    return {corpus.example_id(number): everything[number] for number in range(len(corpus))}


def validate(scoring: Scoring, task: Task, part: Part, *, official: bool = False) -> dict[str, float]:
    """A task's loss, its terms and its metrics over all examples of a part, shared out to the processes.

    Args:
        official: also the row's official figures, as far as they follow from the same answers; rows whose best checkpoint is chosen by one
            of them give them anyway.

    Returns:
        "loss" (the terms weighted as in training), "loss_TERM" the mean of each term, each metric's mean by its name.
    """
    means, found, row = Means(), dict[int, Any](), task.finetuning
    figures_of = row.figures if row is not None and row.predicted is None and (official or row.figures_rank) else None
    for made, batch, outputs in scoring.scored(part, task.head):
        if row is not None and figures_of is not None:
            found |= dict(zip(made.plan.examples.tolist(), row.answer(outputs), strict=True))
        for name, (total, count) in losses.of(task.losses(outputs, batch.targets), reduction=task.reduction).sums.items():
            means.add(f"loss_{name}", total.double(), count)
        for name, values in task.metric(outputs, batch.targets).items():
            means.add_values(name, values)
    figures = means.of_all(scoring.processes).means()
    figures["loss"] = sum(
        value * task.weights.get(name.removeprefix("loss_"), 1.0) for name, value in figures.items() if name.startswith("loss_")
    )
    return figures if figures_of is None else figures | figures_of(part.corpus, by_id(part.corpus, found, scoring.processes))
