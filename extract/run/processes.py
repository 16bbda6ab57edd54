"""The same units on several devices of this machine: a process for each, with a detector of its own.

The first process hands out units and counts; it opens no GPU. A process asks for its next unit while it still works at the last, so that
its device never waits between two. What a dead process had is handed to another one, which goes on after the last commit (the lock died
with it).
"""

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from uniter.datasets.errors import BadInput, UniterError
from uniter.datasets.image_db.writing.units import UnitStore
from uniter.datasets.storage.files import read_json_object
from uniter.extract.detector.protocol import Detector
from uniter.extract.images.items import ImageItem, ImageList
from uniter.extract.run.cluster import DescribedDetector, Task, described
from uniter.extract.run.extraction import Job, extract_listed
from uniter.extract.run.options import Options
from uniter.extract.run.summary import ExtractSummary
from uniter.extract.run.units import Tally, UnitRun, in_words

log = logging.getLogger(__name__)

DEATHS = 4
"""So many processes may die (too little memory, say) and be replaced before the run ends with an error."""


def devices_of(names: str) -> list[str]:
    """ "all" or "cuda:0,cuda:1" as devices that are there.

    Raises:
        BadInput: one is not there, or "all" is asked for where there is no GPU.
    """
    import torch

    from uniter.datasets.devices import usable_device

    if names.strip() == "all":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise BadInput("--devices all: PyTorch sees no GPU here; leave --devices out")
        return [f"cuda:{number}" for number in range(count)]
    return [str(usable_device(name.strip(), local_index=place)) for place, name in enumerate(names.split(","))]


def extract_on_devices(
    listed: ImageList, out: str | os.PathLike[str], options: Options, *, build: Callable[..., Detector], devices: Sequence[str], **more: Any
) -> ExtractSummary:
    """`extract_listed` by a process for each device.

    Args:
        build: makes a detector, `build(device="cuda:1")`; it goes to other processes, so it must be a function of a module.
        devices: as `devices_of` gives them; the same one may stand there twice.
        more: as for `extract_listed`.

    Raises:
        UniterError: processes die again and again; and all that `extract_images` raises.
    """
    crew = Crew(build, devices)
    try:
        return extract_listed(listed, Path(out).resolve(), options, detector=crew.describe(), work_off=crew.work_off, **more)
    finally:
        crew.dismiss()


# --- in the processes ------------------------------------------------------------------------------------------------------------


def _work(build: Callable[..., Detector], device: str, processes: int, line: Connection) -> None:
    """Describe the detector, take the task, then unit after unit; where there are no more, rest, until another process dies or all rest."""
    stop, speaking = threading.Event(), threading.Lock()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the first process tells the others
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    os.environ["LOCAL_WORLD_SIZE"] = str(processes)  # they share the cores

    def say(kind: str, what: Any) -> None:
        with speaking:
            line.send((kind, what))

    def units() -> Iterator[tuple[int, Sequence[ImageItem]]]:
        while not stop.is_set():
            say("next", None)
            unit = line.recv()
            if unit is None:
                return
            yield unit

    try:
        detector, tally = build(device=device), Tally()
        say("described", described(detector))
        task: Task | None = line.recv()
        if task is None:
            return
        store = UnitStore(Path(task.out), settings=task.settings)
        while True:
            run = UnitRun(
                store, detector, task.work, tally, workers=task.workers, samples=lambda: task.samples, stop=stop,
                report=lambda count: say("count", (count, tally)),
            )  # fmt: skip
            run.work_off(units())
            say("rests", tally)
            if line.recv() is None:
                return
    except (EOFError, BrokenPipeError):
        return  # the first process is gone
    except BaseException as error:
        with contextlib.suppress(OSError):
            say("failed", str(error) if isinstance(error, UniterError) else in_words(error))


# --- in the first one ------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Worker:
    """A process: its device, the line to it, the units that it was given, what it has counted.

    `asks`: it waits for a unit, or to hear that there is none. `rests`: it has done what it was given. `leaves`: it was told to.
    """

    device: str
    process: Any
    line: Connection
    units: list[int] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)
    asks: bool = False
    rests: bool = False
    leaves: bool = False


class Crew:
    """A process for each device; see `extract_on_devices`."""

    def __init__(self, build: Callable[..., Detector], devices: Sequence[str]) -> None:
        self._build, self._devices = build, list(devices)
        self._context = multiprocessing.get_context("spawn")  # CUDA cannot be forked
        self._workers = [self._hire(device) for device in self._devices]
        self._gone: list[Tally] = []
        self._deaths = 0

    def _hire(self, device: str) -> _Worker:
        here, there = self._context.Pipe()
        process = self._context.Process(target=_work, args=(self._build, device, len(self._devices), there), daemon=True)
        process.start()
        there.close()
        return _Worker(device, process, here)

    def describe(self) -> DescribedDetector:
        """The detector, as the first process that has one says; UniterError where none could be built."""
        try:
            kind, what = self._workers[0].line.recv()
        except EOFError:
            first = self._workers[0]
            first.process.join()
            raise UniterError(f"{first.device}: its process ended before it had a detector {_how(first)}") from None
        if kind == "failed":
            raise UniterError(what)
        found: DescribedDetector = what
        return found

    def work_off(self, job: Job) -> None:
        """Hand out every unit until all are done.

        Raises:
            UniterError: what was raised in a process, or processes died again and again.
        """
        queue = deque(job.pending)
        task = Task(str(job.store.path), read_json_object(job.store.path / "settings.json"), job.work, job.workers, list(job.samples()))
        self._send(self._workers[0], task)
        told = False
        while self._workers:
            if job.stop.is_set() and not told:
                queue.clear()
                told = True
                for worker in self._workers:
                    worker.process.terminate()
            for ready in wait([worker.line for worker in self._workers], timeout=0.5):
                worker = next(worker for worker in self._workers if worker.line is ready)
                try:
                    kind, what = worker.line.recv()
                except (EOFError, OSError):
                    self._lost(worker, queue, job)
                else:
                    self._heard(worker, kind, what, task, job)
            self._hand_out(queue, job)

    def _heard(self, worker: _Worker, kind: str, what: Any, task: Task, job: Job) -> None:
        if kind == "failed":
            raise UniterError(what)
        if kind == "described":
            self._send(worker, task)
        elif kind == "next":
            worker.asks = True
        elif kind == "count":
            count, worker.tally = what
            self._count(job)
            if job.report is not None:
                job.report(count)
        else:
            worker.tally, worker.rests, worker.units = what, True, []
            self._count(job)

    def _hand_out(self, queue: deque[int], job: Job) -> None:
        """Give units to those that ask or rest; when all rest and nothing is left, they may leave."""
        for worker in self._workers:
            if worker.rests and queue:
                worker.rests = False
                self._send(worker, "again")
            elif worker.asks:
                worker.asks = False
                unit = None
                if queue:
                    worker.units = [number for number in worker.units if not job.store.is_finished(number)] + [queue.popleft()]
                    unit = (worker.units[-1], job.images.unit(worker.units[-1]))
                self._send(worker, unit)
        if not queue and all(worker.rests for worker in self._workers):
            for worker in self._workers:
                if not worker.leaves:
                    worker.leaves = True
                    self._send(worker, None)

    def _lost(self, worker: _Worker, queue: deque[int], job: Job) -> None:
        """A process ended: if it was not told to, what it had goes to another, and another takes its device."""
        self._dismissed(worker)
        if worker.leaves or job.stop.is_set():
            return
        self._deaths += 1
        left, how = [number for number in worker.units if not job.store.is_finished(number)], _how(worker)
        if self._deaths > DEATHS:
            raise UniterError(f"{worker.device}: processes died {self._deaths} times, lastly {how}; is there too little memory?")
        log.warning("%s: its process died %s; units that go to another: %d", worker.device, how, len(left))
        queue.extendleft(reversed(left))
        if queue:
            self._workers.append(self._hire(worker.device))

    def _dismissed(self, worker: _Worker) -> None:
        worker.process.join()
        worker.line.close()
        self._workers.remove(worker)
        self._gone.append(worker.tally)

    def _count(self, job: Job) -> None:
        """What all processes did, as one."""
        together = Tally()
        for tally in [*self._gone, *(worker.tally for worker in self._workers)]:
            together.add(tally)
        job.tally.extracted, job.tally.failed = together.extracted, together.failed
        job.tally.regions, job.tally.fillers, job.tally.reasons = together.regions, together.fillers, together.reasons

    def _send(self, worker: _Worker, what: Any) -> None:
        with contextlib.suppress(OSError):  # it has died, which is noticed where it is listened to
            worker.line.send(what)

    def dismiss(self) -> None:
        """End all processes; what they had begun is kept, and gone on with later."""
        for worker in self._workers:
            worker.process.terminate()
            worker.line.close()
        for worker in self._workers:
            worker.process.join(30)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()


def _how(worker: _Worker) -> str:
    code = worker.process.exitcode
    return f"(signal {-code})" if code is not None and code < 0 else f"(exit code {code})"
