"""From examples on disk to packed batches, by worker processes: which batch comes when is decided beforehand.

The main process plans (cheap: numbers only), the workers read and assemble. A plan says everything that a batch depends on, so
any number of workers gives the same batches, and any process can make any batch.
"""

import atexit
import random
import traceback
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from uniter.datasets.batches.collate import PackedBatch, collate
from uniter.datasets.batches.example import Example, Masking
from uniter.datasets.batches.filling import Room, fill
from uniter.datasets.batches.masking import Pairing
from uniter.datasets.batches.plans import Mixture, Part, Plan, sequential_plans
from uniter.datasets.errors import UniterError
from uniter.datasets.stopping import leave_signals

PREFETCH = 4  # batches that each worker keeps ready


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """A plan and what became of it."""

    plan: Plan
    batch: PackedBatch

    def pin_memory(self) -> "MicroBatch":
        """The same in page-locked memory, from which a GPU copies while it computes."""
        return replace(self, batch=self.batch.pin_memory())


@dataclass(slots=True)
class Assembler(Dataset[MicroBatch]):
    """Makes the batch that a plan describes; runs in the workers.

    Attributes:
        parts: what the plans' part numbers mean.
        seed, masking: decide the masks.
        by_example: draw each example's mask from a generator of its own, so that it does not depend on its batch (slower).
        rooms: of each part up to which sizes its batches are filled, none where they are not.
    """

    parts: Sequence[Part]
    seed: int
    masking: Masking = field(default_factory=Masking)
    by_example: bool = False
    rooms: Sequence[Room | None] = ()

    def __getitem__(self, plan: Plan) -> MicroBatch:
        part = self.parts[plan.part]
        # One generator a micro-batch, so that masks do not depend on who makes it or what was made before.
        rng = random.Random(f"{self.seed}/{part.name}/masks/{plan.position}")
        samples = []
        for number, images, matched in zip(plan.examples.tolist(), plan.images.tolist(), plan.matched.tolist(), strict=True):
            if self.by_example:
                rng = random.Random(f"{self.seed}/{part.name}/mask of/{number}")
            samples.append(part.sample(Example(part.corpus, number, tuple(images), matched), rng, self.masking))
        batch = collate(samples)
        room = self.rooms[plan.part] if self.rooms else None
        return MicroBatch(plan, batch if room is None else fill(batch, room))


def load(
    mixture: Mixture, masking: Masking, taken: Sequence[int], *, first_step: int, last_step: int, accumulation: int,
    rank: int = 0, world: int = 1, workers: int = 0, pin_memory: bool = False, rooms: Sequence[Room | None] = (),
) -> Iterator[MicroBatch]:  # fmt: skip
    """This process's micro-batches of the updates first_step..last_step, in their order.

    Args:
        taken, first_step, last_step, accumulation, rank, world: as for `Mixture.plans`.
        workers: processes; 0 makes the batches in this one.
        pin_memory: into page-locked memory, for copies to a GPU that overlap with computing.
        rooms: as for `Assembler`.

    Raises:
        BadInput: an example is not usable; as it was raised, whichever process made the batch.
    """
    plans = mixture.plans(taken, first_step=first_step, last_step=last_step, accumulation=accumulation, rank=rank, world=world)
    return _made(Assembler(mixture.parts, mixture.seed, masking, rooms=rooms), plans, workers=workers, pin_memory=pin_memory)


def load_once(
    part: Part, masking: Masking, *, budget: int, seed: int, by_example: bool = False, pairing: Pairing | None = None,
    rank: int = 0, world: int = 1, workers: int = 0, pin_memory: bool = False,
) -> Iterator[MicroBatch]:  # fmt: skip
    """This process's share of all examples of a part, each once, for validation and prediction.

    Args:
        by_example: as for `Assembler`. budget, seed, pairing, rank, world: as for `sequential_plans`. workers, pin_memory: as for `load`.
    """
    plans = sequential_plans(part, 0, budget=budget, seed=seed, rank=rank, world=world, pairing=pairing)
    return _made(Assembler([part], seed, masking, by_example=by_example), plans, workers=workers, pin_memory=pin_memory)


def on_device(batches: Iterator[MicroBatch], device: torch.device) -> Iterator[MicroBatch]:
    """The same batches on a device; on a GPU the next one is copied, by a stream of its own, while the last one is computed with."""
    if device.type != "cuda":
        for made in batches:
            yield replace(made, batch=made.batch.to(device))
        return
    copying = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copied(made: MicroBatch) -> tuple[MicroBatch, torch.cuda.Event]:
        with torch.cuda.stream(copying):
            moved = replace(made, batch=made.batch.to(device, non_blocking=True))
            return moved, copying.record_event()

    def arrived(moved: MicroBatch, done: torch.cuda.Event) -> MicroBatch:
        computing = torch.cuda.current_stream(device)
        computing.wait_event(done)  # the stream waits, not the host
        for tensor in moved.batch.tensors():
            if tensor.device.type == "cuda":
                tensor.record_stream(computing)  # its memory is not used again before that is done with it
        return moved

    waiting = None
    for made in batches:
        following = copied(made)
        if waiting is not None:
            yield arrived(*waiting)
        waiting = following
    if waiting is not None:
        yield arrived(*waiting)


def _made(assembler: Assembler, plans: Iterator[Plan], *, workers: int, pin_memory: bool = False) -> Iterator[MicroBatch]:
    """The batches of `plans`, which are consumed a little ahead of what is yielded."""
    options: dict[str, Any] = {"prefetch_factor": PREFETCH, "worker_init_fn": leave_signals} if workers else {}
    loader: DataLoader[MicroBatch | _Failed] = DataLoader(
        _Telling(assembler) if workers else assembler,
        batch_size=None,
        sampler=_Once(plans),
        num_workers=workers,
        pin_memory=pin_memory,
        collate_fn=_as_it_is,
        **options,
    )
    return _unless_failed(iter(loader))


def _unless_failed(batches: Iterator["MicroBatch | _Failed"]) -> Iterator[MicroBatch]:
    _at_work.add(batches)
    try:
        while True:
            try:
                made = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                raise UniterError(
                    f"a process that loads batches has died ({str(error).splitlines()[0]}); most often memory was short: use fewer workers"
                ) from error
            if isinstance(made, _Failed):
                raise made.error from RuntimeError(f"in a process that loads batches:\n{made.where}")
            yield made
    finally:
        _dismiss(batches)


# Workers ignore SIGTERM (`leave_signals`), with which multiprocessing would end them when Python exits: it would wait for them for ever
# where a traceback still holds their iterator. So they are told to go by name, before multiprocessing waits (the last to register is the
# first to be called).
_at_work: "weakref.WeakSet[Iterator[MicroBatch | _Failed]]" = weakref.WeakSet()


def _dismiss(batches: Iterator["MicroBatch | _Failed"]) -> None:
    """Let the workers of a data loader's iterator end; PyTorch has no public way to."""
    shut_down = getattr(batches, "_shutdown_workers", None)
    if shut_down is not None:
        shut_down()


@atexit.register
def _dismiss_all() -> None:
    for batches in list(_at_work):
        _dismiss(batches)


@dataclass(frozen=True, slots=True)
class _Failed:
    """What a worker hands over instead of a batch: its error, and where it came from. PyTorch would make one text of the two."""

    error: Exception
    where: str


@dataclass(slots=True)
class _Telling(Dataset["MicroBatch | _Failed"]):
    """An assembler in a worker."""

    assembler: Assembler

    def __getitem__(self, plan: Plan) -> "MicroBatch | _Failed":
        try:
            return self.assembler[plan]
        except (UniterError, OSError) as error:  # what is no fault of ours; the rest is PyTorch's to show
            return _Failed(error, traceback.format_exc())


@dataclass(slots=True)
class _Once:
    """An iterator dressed as the data loader's sampler."""

    plans: Iterator[Plan]

    def __iter__(self) -> Iterator[Plan]:
        return self.plans


def _as_it_is(made: Any) -> Any:
    return made
