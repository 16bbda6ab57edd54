"""Several processes, one run: who am I, and one sum over all of them per update. The only file that knows torch.distributed.

Gradients are summed once an update, after its last micro-batch, over exactly the parameters that have one: every process
works on the same task, so unused heads and tied weights need no special care.
"""

import datetime
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from uniter.datasets.devices import usable_device
from uniter.datasets.errors import UniterError

T = TypeVar("T")


class ProcessLost(UniterError):
    """Another process of the run ended."""


@dataclass(frozen=True, slots=True)
class Processes:
    """This process among all.

    Attributes:
        rank: its number. world: how many there are. device: what it computes on.
    """

    rank: int
    world: int
    device: torch.device

    @property
    def writes(self) -> bool:
        """Only this one writes files and speaks."""
        return self.rank == 0

    def fitting_workers(self) -> int:
        """How many processes of this one's own should make batches."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        # Without a GPU the cores are busy with the model; one worker hides the reading and costs little.
        return min(max((cores - here) // here, 1), 8) if self.device.type == "cuda" else 0

    def total(self, numbers: Sequence[float], measured: Tensor) -> Tensor:
        """The sums over all processes, float64 and on the device: of `numbers`, which the host knows, then of `measured`, which only the
        device knows. Nothing waits for the device."""
        known = torch.tensor(numbers, dtype=torch.float64)
        if self.device.type == "cuda":
            known = known.pin_memory().to(self.device, non_blocking=True)
        together = torch.cat([known.to(measured.device), measured.double()])
        if self.world > 1:
            with _losses_named():
                dist.all_reduce(together)
        return together

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace each gradient by its sum over all processes: one message, however many parameters."""
        if self.world == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        with _losses_named():
            dist.all_reduce(flat)
        for gradient, summed in zip(gradients, torch.split(flat, [gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))

    def copy_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Give every process the first one's values."""
        if self.world > 1:
            with _losses_named():
                for tensor in tensors:
                    dist.broadcast(tensor, src=0)

    def gather(self, value: T) -> list[T]:
        """What every process says, in the order of their numbers, on every process."""
        if self.world == 1:
            return [value]
        everyone: list[T | None] = [None] * self.world
        with _losses_named():
            dist.all_gather_object(everyone, value)
        return [one for one in everyone if one is not None]

    def wait_for_all(self) -> None:
        """Go on when all processes are here; ProcessLost where one has ended."""
        if self.world > 1:
            with _losses_named():
                dist.barrier()


def choose_device(name: str | None, local_rank: int = 0) -> torch.device:
    """`auto` (or None): this process's GPU if there is one, else the CPU.

    Raises:
        BadInput: a GPU was asked for and there is none.
    """
    device = usable_device(name, local_index=local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


@contextmanager
def processes(device: str | None = None, *, timeout_minutes: float = 30.0) -> Iterator[Processes]:
    """This run's processes, as torchrun's environment says (one process without it); joined on entry, left on exit."""
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    chosen = choose_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if world == 1:
        yield Processes(0, 1, chosen)
        return
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=datetime.timedelta(minutes=timeout_minutes))
    try:
        yield Processes(rank, world, chosen)
    finally:
        dist.destroy_process_group()


@contextmanager
def _losses_named() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ProcessLost(
            f"another process of this run ended or cannot be reached; the same command resumes from the last checkpoint ({error})"
        ) from error
