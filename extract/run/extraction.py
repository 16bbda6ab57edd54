"""The extraction run: batches of images through a detector into a region database.

What a reader would get wrong: the order and the composition of batches are a function of the list of images alone. A batch never
crosses a unit's end, a broken image leaves its batch smaller, and a resumed run computes whole batches again. So one process,
several, and a killed and repeated run write the same bytes at the same batch size.

Three stages overlap: worker threads read, decode and resize (cv2 and NumPy release the interpreter's lock there); the calling
thread runs the detector; workers select regions and encode them, and one writing thread commits a batch at a time.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from uniter.datasets.errors import UniterError
from uniter.datasets.progress import Progress
from uniter.extract.detector.protocol import Detector
from uniter.extract.images.decoding import MAX_PIXELS
from uniter.extract.images.given_boxes import GivenBoxes
from uniter.extract.images.items import UNIT_IMAGES, ImageList
from uniter.extract.images.listing import list_images
from uniter.extract.run.options import plan_work
from uniter.extract.run.shares import check_share
from uniter.extract.run.store import open_store, refuse_full_disk
from uniter.extract.run.summary import ExtractSummary, finish
from uniter.extract.run.units import Tally, extract_units

"""Batches that are read and prepared while one is in the detector; a prepared photograph takes about 7 MB."""


"""Decoded images above it are prepared one at a time, since that takes four times as much again."""


"""So many images in a row on which the detector failed for no known reason end the run: it is not the images' fault."""


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
        images: a folder, an image, a list, or tar shards; see `images.list_images`.
        out: the database's folder.
        detector: see `detector.build_detector`.
        key: how keys are made, see `keys.key_rule`.
        boxes: a file of given boxes (`given_boxes.GivenBoxes`) instead of detection.
        min_boxes, max_boxes, conf_threshold: which detected regions stay; None: the detector's own numbers.
        batch_size: None: what `out` was begun with, else fitted to the machine.
        workers: threads that read and decode; None: fitted to the machine.
        max_pixels: images that claim more are refused as decompression bombs.
        unit_images: images of a unit of work (tars are units of their own).
        shard: (I, N): do the units I, I + N, ... only.
        overwrite: throw away what `out` holds.
        retry_failed: try the images again that failed before.
        check_space: refuse to begin where the disk cannot hold the estimate.
        show_progress: a bar or lines on stderr.
        stop: when it is set, the batch at hand is finished and Stopped is raised.

    Returns:
        What was done.

    Raises:
        SettingsDiffer: `out` was begun with other settings (the difference in words).
        BadInput: there are no images, two would get the same key, or an argument is wrong.
        Stopped: see `stop`.
        UniterError: the disk is full, or the detector fails on everything.
    """
    listed = list_images(images, key=key, unit_images=unit_images)
    given = GivenBoxes(boxes) if boxes is not None else None
    return extract_listed(
        listed, out, detector=detector, given=given, key=key, min_boxes=min_boxes, max_boxes=max_boxes, conf_threshold=conf_threshold,
        batch_size=batch_size, workers=workers, max_pixels=max_pixels, shard=shard, overwrite=overwrite, retry_failed=retry_failed,
        check_space=check_space, show_progress=show_progress, stop=stop,
    )  # fmt: skip


def extract_listed(
    listed: ImageList,
    out: str | os.PathLike[str],
    *,
    detector: Detector,
    given: GivenBoxes | None = None,
    key: str | None = None,
    min_boxes: int | None = None,
    max_boxes: int | None = None,
    conf_threshold: float = 0.2,
    batch_size: int | None = None,
    workers: int | None = None,
    max_pixels: int = MAX_PIXELS,
    shard: tuple[int, int] = (0, 1),
    overwrite: bool = False,
    retry_failed: bool = False,
    check_space: bool = True,
    show_progress: bool = False,
    stop: threading.Event | None = None,
) -> ExtractSummary:
    """`extract_images` for images and boxes that were listed already."""
    check_share(shard, overwrite=overwrite, retry_failed=retry_failed)
    work = plan_work(
        out, detector, given=given, min_boxes=min_boxes, max_boxes=max_boxes, conf_threshold=conf_threshold,
        batch_size=batch_size, max_pixels=max_pixels, overwrite=overwrite,
    )  # fmt: skip
    store = open_store(out, listed, detector, work, key=key, overwrite=overwrite, retry_failed=retry_failed)
    finished = store.finished_units()
    mine = range(shard[0], listed.units, shard[1])
    pending = [number for number in mine if number not in finished]
    to_do = sum(map(listed.count, pending))
    if check_space and pending:
        refuse_full_disk(store.path, images=to_do, detector=detector, work=work)
    total = sum(map(listed.count, mine))
    tally, start = Tally(), time.monotonic()
    with progress_report(total, done=total - to_do, tally=tally, shown=show_progress) as report:
        units = ((number, listed.unit(number)) for number in pending)
        extract_units(units, store=store, detector=detector, work=work, tally=tally, workers=workers, stop=stop, report=report)
    seconds = time.monotonic() - start
    if stop is not None and stop.is_set():
        raise Stopped(f"stopped after {tally.done:,} images of this run; {out} is kept and the same command continues it")
    return finish(store, listed, detector, work, tally, seconds=seconds)


@contextlib.contextmanager
def progress_report(total: int, *, done: int, tally: Tally, shown: bool) -> Iterator[Callable[[int], None] | None]:
    """What `extract_units` calls after each commit: a bar or lines, where they are wanted."""
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
