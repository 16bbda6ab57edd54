"""The same units of work on a Ray cluster. The only file that imports Ray.

Every actor has its own detector and calls `pipeline.extract_units` on one unit after the other; it writes into OUT itself, so OUT and
the images must be on a file system that all machines see. What a lost worker held is given to another: the unit's lock dies with its
process and the new one continues after the last commit, so nothing is lost and nothing is written twice.
"""

import contextlib
import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uniter.datasets.errors import UniterError
from uniter.datasets.image_db.writing.units import UnitStore
from uniter.extract.detector.protocol import Detector
from uniter.extract.images.decoding import MAX_PIXELS
from uniter.extract.images.given_boxes import GivenBoxes
from uniter.extract.images.items import ImageItem, ImageList
from uniter.extract.run.extraction import Stopped, progress_report
from uniter.extract.run.options import Work, begun_with, plan_work
from uniter.extract.run.store import open_store, refuse_full_disk
from uniter.extract.run.summary import ExtractSummary, finish
from uniter.extract.run.units import Tally, extract_units, in_words

log = logging.getLogger(__name__)

TRIES_PER_UNIT = 5


"""So often a unit may take its worker down (too little memory, say) before the run ends with an error."""


BATCH_SIZE_ON_GPUS = 8


@dataclass(frozen=True)
class UnitReport:
    """What an actor says of a unit: whether it is finished now, and what happened to its images."""

    finished: bool
    extracted: int
    failed: int
    regions: int


class UnitWorker:
    """Runs in an actor: one detector, one unit at a time.

    Args:
        folder: where the command was started; the relative paths that it was given hold there.
    """

    def __init__(
        self, build: Callable[..., Detector], work: Work, settings: dict[str, Any], out: str, workers: int | None, folder: str
    ) -> None:
        self.build, self.work, self.workers = build, work, workers
        self.out, self.settings, self.folder = out, settings, folder
        self.detector: Detector | None = None

    def run(self, number: int, items: Sequence[ImageItem]) -> UnitReport:
        """Do a unit, or what a lost worker left of it."""
        if self.detector is None:  # not in __init__: Ray reports what goes wrong there as a lost worker
            import torch

            with contextlib.suppress(OSError):
                os.chdir(self.folder)
            self.detector = self.build(device="cuda" if torch.cuda.is_available() else "cpu")
        store, tally = UnitStore(Path(self.out), settings=self.settings), Tally()
        extract_units([(number, items)], store=store, detector=self.detector, work=self.work, tally=tally, workers=self.workers)
        return UnitReport(number in store.finished_units(), tally.extracted, tally.failed, tally.regions)


def extract_on_ray(
    listed: ImageList,
    out: str | os.PathLike[str],
    *,
    build: Callable[..., Detector],
    address: str = "auto",
    given: GivenBoxes | None = None,
    key: str | None = None,
    min_boxes: int | None = None,
    max_boxes: int | None = None,
    conf_threshold: float = 0.2,
    batch_size: int | None = None,
    workers: int | None = None,
    max_pixels: int = MAX_PIXELS,
    overwrite: bool = False,
    retry_failed: bool = False,
    check_space: bool = True,
    show_progress: bool = False,
    stop: threading.Event | None = None,
) -> ExtractSummary:
    """`pipeline.extract_listed` on a Ray cluster: an actor for each GPU or, where there are none, for each CPU.

    Args:
        build: makes a detector, `build(device="cuda")`; called here (on the CPU) for the settings and in every actor.
        address: of the cluster; "auto" takes the one that this machine belongs to or, if there is none, starts a local one.

    Raises:
        UniterError: Ray is not installed, or no cluster answers; and all that `extract_images` raises.
    """
    ray = _connected(address)
    # Settings must not depend on who computes: the detector's are the same on every device.
    detector = build(device="cpu")
    resource = "GPU" if ray.cluster_resources().get("GPU", 0) >= 1 else "CPU"
    out = str(Path(out).resolve())
    if batch_size is None and resource == "GPU":
        # How much memory the GPUs have is not known here.
        batch_size = (None if overwrite else begun_with(Path(out))) or BATCH_SIZE_ON_GPUS
    work = plan_work(
        out, detector, given=given, min_boxes=min_boxes, max_boxes=max_boxes, conf_threshold=conf_threshold,
        batch_size=batch_size, max_pixels=max_pixels, overwrite=overwrite,
    )  # fmt: skip
    store = open_store(out, listed, detector, work, key=key, overwrite=overwrite, retry_failed=retry_failed)
    finished = store.finished_units()
    pending = [number for number in range(listed.units) if number not in finished]
    to_do = sum(map(listed.count, pending))
    if check_space and pending:
        refuse_full_disk(store.path, images=to_do, detector=detector, work=work)
    tally, start = Tally(), time.monotonic()
    actor = ray.remote(**{f"num_{resource.lower()}s": 1})(UnitWorker)
    shared_work, settings = ray.put(work), json.loads((store.path / "settings.json").read_bytes())
    machines = sum(bool(node["Alive"]) for node in ray.nodes())
    log.info("%g %ss on %d machines of the Ray cluster", ray.cluster_resources().get(resource, 0), resource, machines)
    with progress_report(listed.images, done=listed.images - to_do, tally=tally, shown=show_progress) as report:
        crew = Crew(ray, hire=lambda: actor.remote(build, shared_work, settings, out, workers, str(Path.cwd())), resource=resource)
        crew.work_off(pending, listed=listed, store=store, tally=tally, report=report, stop=stop or threading.Event())
    seconds = time.monotonic() - start
    if stop is not None and stop.is_set():
        raise Stopped(f"stopped after {tally.done:,} images of this run; {out} is kept and the same command continues it")
    return finish(store, listed, detector, work, tally, seconds=seconds)


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

    def work_off(
        self,
        units: Sequence[int],
        *,
        listed: ImageList,
        store: UnitStore,
        tally: Tally,
        report: Callable[[int], None] | None,
        stop: threading.Event,
    ) -> None:
        """Give every unit to an actor until all are done; the units of lost actors go back into the queue.

        Raises:
            UniterError: what the unit function raised in an actor, or a unit took its worker down again and again.
        """
        queue, tries = deque(units), dict.fromkeys(units, 0)
        try:
            while (queue or self._running) and not stop.is_set():
                self._fit(len(queue))
                while queue and self._idle:
                    number, worker = queue.popleft(), self._idle.pop()
                    self._running[worker.run.remote(number, listed.unit(number))] = (worker, number)
                ready, _ = self._ray.wait(list(self._running), num_returns=1, timeout=1) if self._running else ([], [])
                for future in ready:
                    worker, number = self._running.pop(future)
                    tries[number] += 1
                    done = self._answer(future, worker, number, last=tries[number] >= TRIES_PER_UNIT)
                    if done is None:
                        queue.append(number)
                        continue
                    tally.extracted += done.extracted
                    tally.failed += done.failed
                    tally.regions += done.regions
                    if done.finished:
                        if report is not None:
                            report(listed.count(number))
                    elif tries[number] < TRIES_PER_UNIT:
                        # Another process has its lock: a worker that was cut off may keep it for a moment.
                        time.sleep(1)
                        queue.append(number)
                    else:
                        log.warning("unit %d is left to another process, which has it", number)
        finally:
            # Where the run was asked to stop, the batches at hand are lost and will be done again.
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

    def _answer(self, future: Any, worker: Any, number: int, *, last: bool) -> UnitReport | None:
        """What became of a unit; None where its worker was lost."""
        try:
            done: UnitReport = self._ray.get(future)
        except self._ray.exceptions.RayTaskError as error:
            # The unit function itself raised: a full disk, other settings, a detector that fails on everything.
            cause = error.cause
            raise UniterError(str(cause) if isinstance(cause, UniterError) else f"unit {number}: {in_words(cause)}") from error
        except self._ray.exceptions.RayError as error:
            log.warning("a worker was lost (%s); unit %d is given to another", type(error).__name__, number)
            self._ray.kill(worker)
            if last:
                reason = next(reversed(str(error).strip().splitlines()), type(error).__name__)  # what a worker raised stands there
                raise UniterError(f"unit {number} took {TRIES_PER_UNIT} workers down, lastly: {reason}") from error
            return None
        self._idle.append(worker)
        return done


def _connected(address: str) -> Any:
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
        log.info("this machine belongs to no Ray cluster: a local one is started")
        ray.init(**options)
    return ray
