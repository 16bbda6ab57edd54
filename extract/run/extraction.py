"""The extraction run: batches of images through a detector into a region database.

What a reader would get wrong: the order and the composition of batches are a function of the list of images alone. A batch never
crosses a unit's end, a broken image leaves its batch smaller, and a resumed run computes whole batches again. So one process,
several, and a killed and repeated run write the same bytes at the same batch size.
"""

import contextlib
import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from uniter.datasets.errors import UniterError
from uniter.datasets.image_db.writing.units import LISTING, UnitStore
from uniter.datasets.progress import Progress
from uniter.extract.detector.protocol import Detector
from uniter.extract.images.decoding import MAX_PIXELS
from uniter.extract.images.given_boxes import GivenBoxes
from uniter.extract.images.items import UNIT_IMAGES, ImageItem, ImageList
from uniter.extract.images.listing import list_images
from uniter.extract.images.tars import TarImages
from uniter.extract.run.options import Options, Work, begun_with, plan_work
from uniter.extract.run.store import complete, open_store, refuse_full_disk
from uniter.extract.run.summary import ExtractSummary, summarised
from uniter.extract.run.units import Tally, UnitRun

log = logging.getLogger(__name__)


class Stopped(UniterError):
    """The run was asked to stop; what is done is kept."""


def extract_images(
    images: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    detector: Detector,
    key: str | None = None,
    boxes: str | os.PathLike[str] | None = None,
    min_boxes: int | None = None,
    max_boxes: int | None = None,
    conf_threshold: float = 0.2,
    batch_size: int | None = None,
    workers: int | None = None,
    max_pixels: int = MAX_PIXELS,
    unit_images: int = UNIT_IMAGES,
    shard: tuple[int, int] = (0, 1),
    overwrite: bool = False,
    retry_failed: bool = False,
    check_space: bool = True,
    show_progress: bool = False,
    stop: threading.Event | None = None,
) -> ExtractSummary:
    """Extract region features; the same call again continues where the last one stopped.

    Args:
        images: a folder, an image, a list, tar shards or tables; see `images.list_images`.
        out: the database's folder.
        detector: see `detector.build_detector`.
        boxes: a file of given boxes (`given_boxes.GivenBoxes`) instead of detection.
        unit_images: images of a unit of work (tars are units of their own).
        stop: when it is set, the batch at hand is finished and Stopped is raised.
        key, min_boxes and so on: see `run.options.Options`.

    Returns:
        What was done.

    Raises:
        SettingsDiffer: `out` was begun with other settings (the difference in words).
        BadInput: there are no images, two would get the same key, or an argument is wrong.
        Stopped: see `stop`.
        UniterError: the disk is full, images fail for what is no fault of theirs, or no image at all could be used.
    """
    options = Options(
        key=key, given=GivenBoxes(boxes) if boxes is not None else None, min_boxes=min_boxes, max_boxes=max_boxes,
        conf_threshold=conf_threshold, batch_size=batch_size, workers=workers, max_pixels=max_pixels, shard=shard, overwrite=overwrite,
        retry_failed=retry_failed, check_space=check_space, show_progress=show_progress,
    )  # fmt: skip
    listed = list_images(images, key=key, unit_images=unit_images, notes=Path(out) / LISTING)
    return extract_listed(listed, out, options, detector=detector, stop=stop)


@dataclass(frozen=True)
class Job:
    """Units that are to be done, by threads here or by a crew elsewhere.

    Attributes:
        images: all of them, by unit.
        pending: numbers of the units to do.
        samples: some images that tell whether the machine is at fault, see `faults.Doubts`.
        store: where they are written.
        workers: threads that read and decode, in each process.
        tally: counted up in it.
        report: called with the number of images that are done.
        stop: when it is set, no more is begun.
    """

    images: ImageList
    pending: Sequence[int]
    samples: Callable[[], Iterable[ImageItem]]
    store: UnitStore
    detector: Detector
    work: Work
    workers: int | None
    tally: Tally
    report: Callable[[int], None] | None
    stop: threading.Event


def on_threads(job: Job) -> None:
    """Work off in this process."""
    run = UnitRun(
        job.store, job.detector, job.work, job.tally,
        workers=job.workers, samples=job.samples, report=job.report, stop=job.stop,
    )  # fmt: skip
    run.work_off((number, job.images.unit(number)) for number in job.pending)


def extract_listed(
    listed: ImageList,
    out: str | os.PathLike[str],
    options: Options,
    *,
    detector: Detector,
    work_off: Callable[[Job], None] = on_threads,
    stop: threading.Event | None = None,
) -> ExtractSummary:
    """`extract_images` for images that were listed already.

    Args:
        detector: what `work_off` computes with, or the description of what others compute with.
        work_off: does the units of a job; see `cluster.Crew` for the other one.
    """
    stop = stop or threading.Event()
    if options.given is not None:
        options.given.settle(item for number in range(listed.units) for item in listed.unit(number))
    work = plan_work(options, detector, begun=None if options.overwrite else begun_with(Path(out)))
    store, wanted = open_store(out, listed, detector, work, options)
    if isinstance(listed, TarImages):
        listed.keep(store.path / LISTING)
    finished = store.finished_units()
    mine = range(options.shard[0], wanted.units, options.shard[1])
    pending = [number for number in mine if number not in finished]
    to_do = sum(map(wanted.count, pending))
    if options.check_space and pending:
        refuse_full_disk(store.path, images=to_do, detector=detector, work=work)
    total = sum(map(wanted.count, mine))
    tally, start = Tally(), time.monotonic()
    with progress_report(total, done=total - to_do, tally=tally, shown=options.show_progress) as report:
        samples = functools.partial(spread, listed)
        work_off(Job(wanted, pending, samples, store, detector, work, options.workers, tally, report, stop))
    seconds = time.monotonic() - start
    if stop.is_set():
        raise Stopped(f"stopped after {tally.done:,} images of this run; {out} is kept and the same command continues it")
    header = complete(store, wanted, detector, work)
    summary = summarised(store, wanted, detector, work, tally, header=header, seconds=seconds)
    if summary.only_fillers:
        log.warning("%s, kept because of --min-boxes; is it the right detector, with the right weights?", summary.fillers_in_words())
    return summary


def spread(listed: ImageList, units: int = 4) -> Iterator[ImageItem]:
    """Some images from all over the list."""
    for number in range(0, listed.units, max(1, listed.units // units)):
        items = listed.unit(number)
        yield from items[:: max(1, len(items) // 2)][:2]


@contextlib.contextmanager
def progress_report(total: int, *, done: int, tally: Tally, shown: bool) -> Iterator[Callable[[int], None] | None]:
    """What is called after each commit: a bar or lines, where they are wanted."""
    if not shown:
        yield None
        return
    with Progress(total, unit="images", label="extracting", done=done) as progress:

        def report(count: int) -> None:
            if tally.failed:
                progress.update(count, failed=tally.failed)
            else:
                progress.update(count)

        yield report
