"""Images of a unit through the detector: threads prepare, one batch is on the device, failures are rows."""

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import cv2

from uniter.datasets.errors import BadInput, UniterError
from uniter.datasets.image_db.records import encode_record
from uniter.datasets.image_db.writing.units import UnitStore, UnitWriter
from uniter.extract.detector.protocol import Detector, PreparedImage, RawRegions, is_out_of_memory, release_memory
from uniter.extract.images.decoding import decode_image
from uniter.extract.images.items import ImageItem, read_bytes
from uniter.extract.run.options import Work, device_of, fitting_workers
from uniter.extract.select import keep_given, select_regions

log = logging.getLogger(__name__)

BATCHES_AHEAD = 2


LARGE_IMAGE_BYTES = 256 << 20


_LARGE_IMAGES = threading.Lock()


UNEXPECTED_IN_A_ROW = 5


@dataclass
class Tally:
    """What happened so far in this run."""

    extracted: int = 0
    failed: int = 0
    regions: int = 0
    left_to_others: int = 0
    unexpected_in_a_row: int = field(default=0, repr=False)

    @property
    def done(self) -> int:
        return self.extracted + self.failed


# --- the work --------------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Batch:
    """Consecutive images of a unit on their way; `items` is empty at the end of the unit."""

    writer: UnitWriter
    items: list[ImageItem]
    prepared: list[Future[PreparedImage]]


_Outcome = Future[tuple[bytes, int]] | Exception


def extract_units(
    units: Iterable[tuple[int, Sequence[ImageItem]]],
    *,
    store: UnitStore,
    detector: Detector,
    work: Work,
    tally: Tally,
    workers: int | None = None,
    report: Callable[[int], None] | None = None,
    stop: threading.Event | None = None,
) -> None:
    """Do some units: the function that a process, a shard and a Ray actor share.

    Args:
        units: numbers and images; a unit that is finished, or that another living process has, is left out.
        report: called with the number of images after each commit, from the writing thread.
        stop: when it is set, the batch at hand is finished and the function returns.
    """
    halt, broken = stop or threading.Event(), threading.Event()
    device = device_of(detector)
    threads = workers or fitting_workers(device)
    open_writers: list[UnitWriter] = []
    cv2_threads, cv2_loudness = cv2.getNumThreads(), cv2.utils.logging.getLogLevel()
    cv2.setNumThreads(1)  # images run side by side already
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # what is wrong with a file stands in failures.jsonl
    reading = ThreadPoolExecutor(threads, thread_name_prefix="read")
    writing = ThreadPoolExecutor(1, thread_name_prefix="write")
    ahead: deque[_Batch] = deque()
    written: deque[Future[None]] = deque()

    def prepare(item: ImageItem) -> PreparedImage:
        return prepare_item(item, detector=detector, work=work, device=device)

    def batches() -> Iterator[_Batch]:
        for number, items in units:
            if halt.is_set():
                return
            writer = store.unit(number)
            if writer is None:
                tally.left_to_others += 1
                continue
            open_writers.append(writer)
            for first in range(0, len(items), work.batch_size):
                chunk = list(items[first : first + work.batch_size])
                if all(item.key in writer.done for item in chunk):
                    if report is not None:
                        report(len(chunk))
                    continue
                yield _Batch(writer, chunk, [reading.submit(prepare, item) for item in chunk])
            yield _Batch(writer, [], [])

    def write(batch: _Batch, outcomes: Sequence[_Outcome]) -> None:
        if broken.is_set():
            return  # what follows a batch that could not be written must not complete its unit
        try:
            write_batch(batch, outcomes)
        except BaseException:
            broken.set()
            raise

    def write_batch(batch: _Batch, outcomes: Sequence[_Outcome]) -> None:
        if not batch.items:
            batch.writer.complete()
            open_writers.remove(batch.writer)
            return
        for item, outcome in zip(batch.items, outcomes, strict=True):
            error = outcome if isinstance(outcome, Exception) else outcome.exception()
            if item.key in batch.writer.done:
                continue  # done in an earlier run; computed again because the batch is
            if error is None and isinstance(outcome, Future):
                value, regions = outcome.result()
                batch.writer.put(item.key, value, regions=regions)
                tally.extracted += 1
                tally.regions += regions
            else:
                batch.writer.fail(item.key, item.path, in_words(error))
                tally.failed += 1
        batch.writer.commit()
        if report is not None:
            report(len(batch.items))

    source = batches()
    try:
        while True:
            while len(ahead) <= BATCHES_AHEAD and (following := next(source, None)) is not None:
                ahead.append(following)
            if not ahead or halt.is_set():
                break
            batch = ahead.popleft()
            outcomes = run_batch(batch.items, batch.prepared, detector=detector, work=work, pool=reading, tally=tally)
            written.append(writing.submit(write, batch, outcomes))
            while written and (len(written) > BATCHES_AHEAD or written[0].done()):
                written.popleft().result()
        while written:
            written.popleft().result()
    finally:
        for batch in ahead:
            for future in batch.prepared:
                future.cancel()
        reading.shutdown(wait=True, cancel_futures=True)
        writing.shutdown(wait=True, cancel_futures=True)
        for writer in open_writers:
            writer.__exit__(None, None, None)
        cv2.setNumThreads(cv2_threads)
        cv2.utils.logging.setLogLevel(cv2_loudness)


def prepare_item(item: ImageItem, *, detector: Detector, work: Work, device: str = "cpu") -> PreparedImage:
    """Read, decode and bring one image to the detector's size; on pinned memory for a GPU, so that copies do not wait."""
    if work.given is not None and item.fault is None and work.given.of(item) is None:
        raise BadInput(f"there are no boxes for it in {work.given.path}")
    image = decode_image(read_bytes(item, max_pixels=work.max_pixels), max_pixels=work.max_pixels)
    with _LARGE_IMAGES if image.nbytes > LARGE_IMAGE_BYTES else contextlib.nullcontext():
        prepared = detector.prepare(image)
    if device.startswith("cuda"):
        import torch

        return replace(prepared, pixels=torch.from_numpy(prepared.pixels).pin_memory().numpy())
    return prepared


def run_batch(
    items: Sequence[ImageItem],
    prepared: Sequence[Future[PreparedImage]],
    *,
    detector: Detector,
    work: Work,
    pool: ThreadPoolExecutor,
    tally: Tally,
) -> list[_Outcome]:
    """Detect in those images of a batch that could be read; the encoded records come as futures, failures as exceptions."""
    outcomes: list[_Outcome | None] = [None] * len(items)
    rows, images, boxes = [], [], []
    for row, (item, future) in enumerate(zip(items, prepared, strict=True)):
        try:
            image = future.result()
            if work.given is not None:
                regions = work.given.of(item)
                assert regions is not None  # prepare_item refuses
                boxes.append(regions.inside(image.size))
        except Exception as error:  # whatever one file provokes in a decoder costs that image alone; in failures.jsonl it is named
            outcomes[row] = error.with_traceback(None)
        else:
            rows.append(row)
            images.append(image)
    for row, image, found in zip(rows, images, _detect(detector, images, boxes if work.given is not None else None), strict=True):
        if isinstance(found, RawRegions):
            tally.unexpected_in_a_row = 0
            outcomes[row] = pool.submit(encode_regions, found, image.size, work, items[row].key)
        else:
            outcomes[row] = found
            if not (is_out_of_memory(found) or isinstance(found, UniterError)):
                tally.unexpected_in_a_row += 1
                if tally.unexpected_in_a_row >= UNEXPECTED_IN_A_ROW:
                    raise UniterError(
                        f"the detector failed on {UNEXPECTED_IN_A_ROW} images in a row, last on {items[row].path} ({in_words(found)}); "
                        "this is hardly the images' fault, so the run ends; once it is mended, continue with --retry-failed"
                    ) from found
    return [outcome for outcome in outcomes if outcome is not None]


def _detect(detector: Detector, images: Sequence[PreparedImage], boxes: Sequence[Any] | None) -> list[RawRegions | Exception]:
    """The whole batch or, where that fails, one image after the other, so that one costs nothing but itself."""
    if not images:
        return []
    failure: Exception
    try:
        return list(detector.detect(images, boxes=boxes))
    except Exception as error:  # memory or whatever one image provokes; `run_batch` ends the run where it is every image
        # Without its traceback, which would keep the batch's tensors alive.
        failure = error.with_traceback(None)
        failure.__cause__ = failure.__context__ = None
    if is_out_of_memory(failure):
        release_memory()
    if len(images) == 1:
        return [failure]
    log.warning("a batch of %d images failed (%s); they are tried one by one", len(images), in_words(failure))
    alone: list[RawRegions | Exception] = []
    for row, image in enumerate(images):
        alone += _detect(detector, [image], None if boxes is None else [boxes[row]])
    return alone


def encode_regions(raw: RawRegions, size: tuple[int, int], work: Work, key: str) -> tuple[bytes, int]:
    """Select and encode; the record and its number of regions. BadInput where a feature does not fit float16."""
    if work.given is not None:
        regions = keep_given(raw, size=size)
    else:
        regions = select_regions(
            raw, size=size, min_boxes=work.min_boxes, max_boxes=work.max_boxes, conf_threshold=work.conf_threshold,
            nms_threshold=work.nms_threshold,
        )  # fmt: skip
    return encode_record(regions, key=key), len(regions)


def in_words(error: BaseException | None) -> str:
    """An exception as `failures.jsonl` says it."""
    if error is None:
        return "unknown"
    if isinstance(error, UniterError):
        return str(error)
    if is_out_of_memory(error):
        return "there was not enough memory for this image alone"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
