"""From examples on disk to packed batches, by worker processes: which batch comes when is decided beforehand.

The main process plans (cheap: numbers only), the workers read and assemble. A plan says everything that a batch depends on, so
any number of workers gives the same batches, and any process can make any batch.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch.utils.data import DataLoader, Dataset

from uniter.datasets.batches.collate import PackedBatch, collate
from uniter.datasets.batches.example import Example, Masking
from uniter.datasets.batches.plans import Part, Plan
from uniter.datasets.stopping import leave_signals


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """A plan and what became of it."""

    plan: Plan
    batch: PackedBatch

    def pin_memory(self) -> "MicroBatch":
        return replace(self, batch=self.batch.pin_memory())


@dataclass(slots=True)
class Assembler(Dataset[MicroBatch]):
    """Makes the batch that a plan describes; runs in the workers.

    Attributes:
        parts: what the plans' part numbers mean.
        seed, masking: decide the masks.
        by_example: draw each example's mask from a generator of its own, so that it does not depend on its batch (slower).
    """

    parts: Sequence[Part]
    seed: int
    masking: Masking = field(default_factory=Masking)
    by_example: bool = False

    def __getitem__(self, plan: Plan) -> MicroBatch:
        part = self.parts[plan.part]
        # One generator a micro-batch, so that masks do not depend on who makes it or what was made before.
        rng = random.Random(f"{self.seed}/{part.name}/masks/{plan.position}")
        samples = []
        for number, images, matched in zip(plan.examples.tolist(), plan.images.tolist(), plan.matched.tolist(), strict=True):
            if self.by_example:
                rng = random.Random(f"{self.seed}/{part.name}/mask of/{number}")
            samples.append(part.sample(Example(part.corpus, number, tuple(images), matched), rng, self.masking))
        return MicroBatch(plan, collate(samples))


def load(
    assembler: Assembler, plans: Iterator[Plan], *, workers: int = 0, pin_memory: bool = False, prefetch: int = 4
) -> Iterator[MicroBatch]:
    """The batches of `plans`, in their order.

    Args:
        assembler: makes them.
        plans: consumed a little ahead of what is yielded.
        workers: processes; 0 makes the batches in this one.
        pin_memory: into page-locked memory, for copies to a GPU that overlap with computing.
        prefetch: batches that each worker keeps ready.
    """
    options: dict[str, Any] = {"prefetch_factor": prefetch, "worker_init_fn": leave_signals} if workers else {}
    loader: DataLoader[MicroBatch] = DataLoader(
        assembler,
        batch_size=None,
        sampler=_Once(plans),
        num_workers=workers,
        pin_memory=pin_memory,
        collate_fn=_as_it_is,
        **options,
    )
    return iter(loader)


@dataclass(slots=True)
class _Once:
    """An iterator dressed as the data loader's sampler."""

    plans: Iterator[Plan]

    def __iter__(self) -> Iterator[Plan]:
        return self.plans


def _as_it_is(made: Any) -> Any:
    return made
