"""Being told to stop: Ctrl-C and SIGTERM are noted, so that a long run can keep what it has before it ends."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Self

from uniter.datasets.errors import UniterError


class Stopped(UniterError):
    """A run was told to stop and has kept what it has. `signal_number` is what told it; commands end with 128 + that number."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number

    @classmethod
    def after(cls, step: int, steps: int, signal_number: int) -> Self:
        """Of a training that wrote a checkpoint after update `step` of `steps`."""
        return cls(
            f"stopped by {signal.Signals(signal_number).name} after update {step:,} of {steps:,}; a checkpoint is written and the same "
            "command resumes",
            signal_number,
        )


@contextmanager
def told_to_stop() -> Iterator[list[int]]:
    """Collects SIGTERM and the first SIGINT instead of dying of them; the list says which came. A second SIGINT ends at once."""
    told: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if told and number == signal.SIGINT:
            raise KeyboardInterrupt
        told.append(number)

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread: signals are somebody else's business
        yield told
        return
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_signals(worker: int) -> None:
    """A data loader's `worker_init_fn`: a run that is told to stop needs its workers until its checkpoint is written."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
