"""What a section says: rows, one figure each, handed on as soon as they are known, so that a kill loses none of them."""

import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Row:
    """One line of the report.

    Attributes:
        what: what was measured. value: a number, or words. unit: of the number.
        wanted: what it should be, or is compared with, in words.
        state: "measured"; "left out" (cannot be run here), "failed" and "WRONG" say themselves.
    """

    what: str
    value: Any = None
    unit: str = ""
    wanted: str = ""
    state: str = "measured"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Place:
    """Where and how large everything runs.

    Attributes:
        device: "cpu", "cuda" or "cuda:N".
        small: sizes with which a CPU is done in seconds, to see that everything runs.
        work: a folder for databases and runs, thrown away in the end.
        until: `time.monotonic()` at which the section is to have ended by itself.
        absent: libraries that are not installed here.
    """

    device: torch.device
    small: bool
    work: str
    until: float
    absent: tuple[str, ...] = ()

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def left(self) -> float:
        """Seconds that the section still has."""
        return self.until - time.monotonic()

    def wait(self) -> None:
        """For all that the device was asked to do."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)


def attempted(what: str, work: Callable[[], Iterator[Row]], place: Place, *, needs_seconds: float = 0.0) -> Iterator[Row]:
    """The rows of one measurement; if it fails, a row that says so, and the next measurement can go on.

    Args:
        needs_seconds: it is not begun where the section has less time left.
    """
    if place.left() < needs_seconds:
        yield Row(what, f"{place.left():.0f} s were left of the section's time", state="left out")
        return
    try:
        yield from work()
    except Exception as error:  # whatever an unknown machine provokes costs this measurement alone
        traceback.print_exc()
        yield failure(what, error)
        if place.on_gpu:
            error.__traceback__ = None  # which keeps its tensors
            torch.cuda.empty_cache()


def failure(what: str, error: BaseException) -> Row:
    """The row of a measurement that raised."""
    where = traceback.extract_tb(error.__traceback__)
    at = f" at {where[-1].filename.rsplit('/', 1)[-1]}:{where[-1].lineno}" if where else ""
    words = " ".join(str(error).split())[:300]
    return Row(what, f"{type(error).__name__}: {words}{at}", state="failed")


def seconds_each(work: Callable[[], object], place: Place, *, most: float, least_times: int = 3, most_times: int = 50) -> float:
    """Seconds of one call, averaged over as many as fit into `most` seconds after one that warms up."""
    work()
    place.wait()
    began, times = time.perf_counter(), 0
    while times < least_times or (times < most_times and time.perf_counter() - began < most):
        work()
        times += 1
        if times % 5 == 0:
            place.wait()
    place.wait()
    return (time.perf_counter() - began) / times


def waits_of(work: Callable[[], object], place: Place) -> int | None:
    """How often the host waits for the GPU in a call, as PyTorch's own watch counts it; None on a CPU, where nothing waits."""
    if not place.on_gpu:
        return None
    place.wait()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    place.wait()
    return sum("synchroniz" in str(one.message).lower() for one in caught)
