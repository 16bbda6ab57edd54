"""The same units of work on a Ray cluster. The only file that imports Ray.

Every actor has its own detector and does one unit after the other; it writes into OUT itself, so OUT and the images must be on a file
system that all machines see. Ray starts a lost actor again elsewhere and gives it its unit again: the unit's lock died with the process
and the new one continues after the last commit, so nothing is lost and nothing is written twice.
"""

import contextlib
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uniter.datasets.errors import UniterError
from uniter.datasets.image_db.writing.units import UnitStore
from uniter.datasets.storage.files import read_json_object
from uniter.extract.detector.protocol import Detector, PreparedImage, RawRegions
from uniter.extract.images.items import ImageItem, ImageList
from uniter.extract.run.extraction import Job, extract_listed
from uniter.extract.run.options import Options, Work
from uniter.extract.run.store import kind_of
from uniter.extract.run.summary import ExtractSummary
from uniter.extract.run.units import Tally, UnitRun, in_words

log = logging.getLogger(__name__)

RESTARTS = 4
"""So often an actor that was lost, and the unit it had, are begun again (too little memory, say) before the run ends with an error."""

LOOK_AGAIN = 1.0
"""Seconds after which it is looked at again whether the cluster has room for more actors."""

LOCK_TRIES = 5
"""So often, a second apart, an actor asks for a unit that another process has: one that was cut off may keep it for a moment."""


@dataclass
class DescribedDetector:
    """A detector that computes elsewhere: all that is asked of it here."""

    name: str
    feature_width: int
    class_names: tuple[str, ...]
    attribute_names: tuple[str, ...]
    min_boxes: int
    max_boxes: int
    device: str
    told: dict[str, Any] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """As the detector's own."""
        return self.told

    def prepare(self, image: NDArray[np.uint8]) -> PreparedImage:
        """Never asked for here."""
        raise NotImplementedError

    def detect(self, images: Sequence[PreparedImage], *, boxes: Sequence[NDArray[np.floating]] | None = None) -> list[RawRegions]:
        """Never asked for here."""
        raise NotImplementedError


def described(one: Detector) -> DescribedDetector:
    """All that is asked of a detector by those who do not compute with it; what it computes on is said by its kind, known only there."""
    return DescribedDetector(
        one.name, one.feature_width, one.class_names, one.attribute_names, one.min_boxes, one.max_boxes, kind_of(one.device), one.settings()
    )


@dataclass(frozen=True)
class Task:
    """What every unit has in common; kept once in the cluster's memory."""

    out: str
    settings: dict[str, Any]
    work: Work
    workers: int | None
    samples: list[ImageItem]


@dataclass(frozen=True)
class UnitReport:
    """What an actor says of a unit: whether it is finished now, what happened to its images, and whether it is an actor's second try."""

    finished: bool
    tally: Tally
    restarted: bool


class UnitWorker:
    """Runs in an actor: one detector, one unit at a time.

    Args:
        folder: where the command was started; the relative paths that it was given hold there.
    """

    def __init__(self, build: Callable[..., Detector], folder: str) -> None:
        self._build, self._folder = build, folder
        self._detector: Detector | None = None

    def _at_hand(self) -> Detector:
        if self._detector is None:  # not in __init__: Ray reports what goes wrong there as a lost worker
            import torch

            with contextlib.suppress(OSError):
                os.chdir(self._folder)
            self._detector = self._build(device="cuda" if torch.cuda.is_available() else "cpu")
        return self._detector

    def describe(self) -> DescribedDetector:
        """What the detector is."""
        return described(self._at_hand())

    def run(self, number: int, items: Sequence[ImageItem], task: Task) -> UnitReport:
        """Do a unit, or what a lost worker left of it."""
        import ray

        detector, tally = self._at_hand(), Tally()
        store = UnitStore(Path(task.out), settings=task.settings)
        for attempt in range(LOCK_TRIES):
            if attempt:
                time.sleep(1)
            run = UnitRun(store, detector, task.work, tally, workers=task.workers, samples=lambda: task.samples)
            run.work_off([(number, items)])
            if store.is_finished(number):
                break
        return UnitReport(store.is_finished(number), tally, ray.get_runtime_context().was_current_actor_reconstructed)


def extract_on_ray(
    listed: ImageList,
    out: str | os.PathLike[str],
    options: Options,
    *,
    build: Callable[..., Detector],
    address: str = "auto",
    needs_gpu: str = "",
    **more: Any,
) -> ExtractSummary:
    """`extract_listed` on a Ray cluster: an actor for each GPU or, where there are none, for each CPU.

    Args:
        build: makes a detector, `build(device="cuda")`; called in the actors only.
        address: of the cluster; "auto" takes the one that this machine belongs to or, if there is none, starts a local one.
        needs_gpu: what asks for GPUs, as in the sentence "--precision fp16 needs a GPU"; empty where CPUs do, too.
        more: as for `extract_listed`.

    Raises:
        UniterError: Ray is not installed, no cluster answers, or it has no GPU and needs one; and all that `extract_images` raises.
    """
    ray = _connected(address, needs_gpu)
    if needs_gpu and ray.cluster_resources().get("GPU", 0) < 1:  # said here, not by an actor that has loaded Detectron2 first
        raise _without_gpu(needs_gpu, "the Ray cluster")
    resource = "GPU" if ray.cluster_resources().get("GPU", 0) >= 1 else "CPU"
    machines = sum(bool(node["Alive"]) for node in ray.nodes())
    log.info("%g %ss on %d machines of the Ray cluster", ray.cluster_resources().get(resource, 0), resource, machines)
    # A unit is tried again as long as its actor may be restarted: while a lost machine is not known to be lost, the tries fail quickly.
    remote = ray.remote(**{f"num_{resource.lower()}s": 1}, max_restarts=RESTARTS, max_task_retries=-1)
    actor, folder = remote(UnitWorker), str(Path.cwd())
    crew = Crew(ray, hire=lambda: actor.remote(build, folder), resource=resource)
    try:
        return extract_listed(listed, Path(out).resolve(), options, detector=crew.describe(), work_off=crew.work_off, **more)
    finally:
        crew.dismiss()


class Crew:
    """As many actors as the cluster has room for, which may grow and shrink meanwhile.

    Args:
        ray: the module, connected.
        hire: starts an actor.
        resource: what an actor takes one of, "CPU" or "GPU".
    """

    def __init__(self, ray: Any, *, hire: Callable[[], Any], resource: str) -> None:
        self._ray, self._hire, self._resource = ray, hire, resource
        self._idle: list[Any] = []
        self._running: dict[Any, tuple[Any, int]] = {}
        self._look_again = 0.0

    def describe(self) -> DescribedDetector:
        """The detector, asked of the first actor: only there is the device that it computes on."""
        self._idle.append(self._hire())
        described: DescribedDetector = self._answer(self._idle[0].describe.remote(), "the detector")
        return described

    def work_off(self, job: Job) -> None:
        """Give every unit to an actor until all are done.

        Raises:
            UniterError: what was raised in an actor, or a unit took its worker down again and again.
        """
        queue = deque(job.pending)
        settings = read_json_object(job.store.path / "settings.json")
        task = self._ray.put(Task(str(job.store.path), settings, job.work, job.workers, list(job.samples())))
        # Where the run is asked to stop, the batches at hand are lost and will be done again.
        while (queue or self._running) and not job.stop.is_set():
            if not queue or time.monotonic() >= self._look_again:  # asking the cluster takes longer than handing out a unit
                self._fit(len(queue))
                self._look_again = time.monotonic() + LOOK_AGAIN
            while queue and self._idle:
                number, worker = queue.popleft(), self._idle.pop()
                self._running[worker.run.remote(number, job.images.unit(number), task)] = (worker, number)
            ready, _ = self._ray.wait(list(self._running), num_returns=1, timeout=1) if self._running else ([], [])
            for future in ready:
                worker, number = self._running.pop(future)
                done: UnitReport = self._answer(future, f"unit {number}")
                self._idle.append(worker)
                job.tally.add(done.tally)
                if done.restarted:
                    log.warning("a worker was lost; unit %d was gone on with by another", number)
                if not done.finished:
                    log.warning("unit %d is left to another process, which has it", number)
                elif job.report is not None:
                    job.report(job.images.count(number))

    def dismiss(self) -> None:
        """End all actors."""
        for worker in [*self._idle, *(worker for worker, _ in self._running.values())]:
            self._ray.kill(worker)

    def _fit(self, waiting: int) -> None:
        """Hire where there is work and room; let go who has nothing to do, lest an actor that waits for a place waits for ever."""
        if not waiting:
            while self._idle:
                self._ray.kill(self._idle.pop())
            return
        room = int(self._ray.available_resources().get(self._resource, 0))
        size = int(self._ray.cluster_resources().get(self._resource, 0))
        wanted = min(room, size - len(self._running), waiting) - len(self._idle)
        if not self._idle and not self._running:
            wanted = max(wanted, 1)
        self._idle += [self._hire() for _ in range(wanted)]

    def _answer(self, future: Any, what: str) -> Any:
        try:
            return self._ray.get(future)
        except self._ray.exceptions.RayTaskError as error:
            # The function itself raised: a full disk, other settings, a detector that fails on everything.
            cause = error.cause
            raise UniterError(str(cause) if isinstance(cause, UniterError) else f"{what}: {in_words(cause)}") from error
        except self._ray.exceptions.RayError as error:
            reason = next(reversed(str(error).strip().splitlines()), type(error).__name__)  # what a worker raised stands there
            raise UniterError(f"{what} took {RESTARTS + 1} workers down, lastly: {reason}") from error


def _without_gpu(needs_gpu: str, where: str) -> UniterError:
    return UniterError(f"{needs_gpu} needs a GPU, and {where} has none; leave it out, or use a cluster with GPUs")


def _connected(address: str, needs_gpu: str) -> Any:
    try:
        import ray
    except ImportError:
        raise UniterError("--ray needs Ray, which is not installed: pip install 'uniter-toolkit[ray]', or leave --ray out") from None
    if ray.is_initialized():
        return ray
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        ray.init(address=address, **options)
    except ConnectionError as error:
        if address != "auto":
            raise UniterError(f"no Ray cluster answers at {address!r} ({error}); is its address right?") from error
        import torch

        if needs_gpu and not torch.cuda.is_available():
            raise _without_gpu(needs_gpu, "this machine, which belongs to no Ray cluster,") from None
        log.info("this machine belongs to no Ray cluster: a local one is started")
        ray.init(**options)
    return ray
