"""Images of a unit through the detector: threads prepare, one batch is on the device, failures are rows.

Three stages overlap: worker threads read, decode and resize (cv2 and NumPy release the interpreter's lock there); the calling thread runs
the detector; workers select regions and encode them, and one writing thread commits a batch at a time.
"""

import contextlib
import logging
import random
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import cv2
import numpy as np

from uniter.datasets.errors import BadInput, UniterError
from uniter.datasets.image_db.records import encode_record
from uniter.datasets.image_db.writing.noted_photographs import Photograph
from uniter.datasets.image_db.writing.units import UnitStore, UnitWriter
from uniter.extract.detector.protocol import Detector, PreparedImage, RawRegions, checked_regions, is_out_of_memory, release_memory
from uniter.extract.images.decoder_words import counted_decoder_words
from uniter.extract.images.decoding import DECODING, decode_image
from uniter.extract.images.items import CutTar, ImageItem, NeverReadable, read_bytes
from uniter.extract.run.faults import Doubts
from uniter.extract.run.options import Work, fitting_workers
from uniter.extract.run.photographs import photograph_as_read
from uniter.extract.select import keep_given, select_regions

log = logging.getLogger(__name__)

BATCHES_AHEAD = 2
"""Batches that are read and prepared while one is in the detector, and that may wait to be written; a photograph takes about 7 MB."""

PREPARING_BYTES = 12  # a pixel, as float32, while an image is brought to the detector's size

REASONS_KEPT = 3

SAMPLES = 12  # images that are tried where so far none went well


@dataclass
class Tally:
    """What happened so far in this run.

    Attributes:
        extracted, failed: images.
        regions: of the images extracted.
        fillers: images of which no region is above the threshold: what they keep are fillers.
        reasons: the first failures, as "path: why".
    """

    extracted: int = 0
    failed: int = 0
    regions: int = 0
    fillers: int = 0
    reasons: list[str] = field(default_factory=list)

    @property
    def done(self) -> int:
        """Images that are accounted for, extracted or failed."""
        return self.extracted + self.failed

    def count_failure(self, path: str, reason: str) -> None:
        """One more image failed."""
        self.failed += 1
        if len(self.reasons) < REASONS_KEPT:
            self.reasons.append(f"{path}: {reason}")

    def add(self, other: "Tally") -> None:
        """What another process did."""
        self.extracted += other.extracted
        self.failed += other.failed
        self.regions += other.regions
        self.fillers += other.fillers
        self.reasons += other.reasons[: REASONS_KEPT - len(self.reasons)]


class Encoded(NamedTuple):
    """An image's record, its number of regions, and whether one of them is above the threshold."""

    value: bytes
    regions: int
    sure: bool


Outcome = Future[Encoded] | Exception


@dataclass(slots=True)
class _Batch:
    """Consecutive images of a unit on their way; `items` is empty at the end of the unit. `read`: by key, what was read of each."""

    writer: UnitWriter
    items: list[ImageItem]
    prepared: list[Future[PreparedImage]]
    read: dict[str, Photograph]


# --- the work --------------------------------------------------------------------------------------------------------------------


class UnitRun:
    """Does units: what a process, a shard and a Ray actor share. For one call of `work_off`.

    Args:
        store: where the units are written.
        tally: counted up in it.
        workers: threads that read and decode; None: fitted to the machine.
        samples: images of the whole run that tell whether the machine is at fault, see `Doubts`.
        report: called with the number of images after each commit, from the writing thread.
        stop: when it is set, the batch at hand is finished and `work_off` returns.
    """

    def __init__(
        self,
        store: UnitStore,
        detector: Detector,
        work: Work,
        tally: Tally,
        *,
        workers: int | None = None,
        samples: Callable[[], Iterable[ImageItem]] = lambda: (),
        report: Callable[[int], None] | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        self._store, self._detector, self._work, self._tally = store, detector, work, tally
        self._report = report or (lambda count: None)
        self._halt, self._broken = stop or threading.Event(), threading.Event()
        self._samples, self._unit_items = samples, list[ImageItem]()
        self._doubts = Doubts(
            read=lambda item: read_bytes(item, max_pixels=work.max_pixels), detect=self._detect_alone, samples=self._everywhere
        )
        self._open_writers: list[UnitWriter] = []
        self._reading = ThreadPoolExecutor(workers or fitting_workers(detector.device), thread_name_prefix="read")
        self._writing = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._ahead: deque[_Batch] = deque()
        self._held: list[tuple[_Batch, list[Outcome]]] = []
        self._written: deque[Future[None]] = deque()

    def work_off(self, units: Iterable[tuple[int, Sequence[ImageItem]]]) -> None:
        """Do some units; one that is finished, or that another living process has, is left out.

        Args:
            units: numbers and images.

        Raises:
            MachineFault: images fail for what is hardly their fault.
            UniterError: the disk is full.
        """
        source = self._batches(units)
        try:
            with quiet_libraries():
                while True:
                    while len(self._ahead) <= BATCHES_AHEAD and (following := next(source, None)) is not None:
                        self._ahead.append(following)
                    if not self._ahead or self._halt.is_set():
                        break
                    self._do(self._ahead.popleft())
                if not self._halt.is_set():  # what is in doubt when the run is asked to stop will be done again
                    self._doubts.settle()
                    self._write_held()
                while self._written:
                    self._written.popleft().result()
        finally:
            self._close()

    def _batches(self, units: Iterable[tuple[int, Sequence[ImageItem]]]) -> Iterator[_Batch]:
        for number, items in units:
            if self._halt.is_set():
                return
            writer = self._store.unit(number)
            if writer is None:
                continue
            self._open_writers.append(writer)
            self._unit_items = list(items)
            for first in range(0, len(items), self._work.batch_size):
                chunk = list(items[first : first + self._work.batch_size])
                if all(item.key in writer.done for item in chunk):
                    self._report(len(chunk))
                    continue
                read: dict[str, Photograph] = {}
                yield _Batch(writer, chunk, [self._reading.submit(self._prepare, item, read) for item in chunk], read)
            yield _Batch(writer, [], [], {})

    def _prepare(self, item: ImageItem, read: dict[str, Photograph]) -> PreparedImage:
        return prepare_item(item, detector=self._detector, work=self._work, read=read)

    def _do(self, batch: _Batch) -> None:
        """Detect in a batch; it is written at once unless a failure is in doubt, and then when it no longer is."""
        outcomes = run_batch(batch.items, batch.prepared, detector=self._detector, work=self._work, pool=self._reading)
        for item, prepared, outcome in zip(batch.items, batch.prepared, outcomes, strict=True):
            if isinstance(outcome, Exception):
                self._doubts.failed(item, outcome)
            else:
                self._doubts.went_well(item, prepared.result())
        self._held.append((batch, outcomes))
        if not self._doubts:
            self._write_held()

    def _write_held(self) -> None:
        for batch, outcomes in self._held:
            self._written.append(self._writing.submit(self._write, batch, outcomes))
        self._held.clear()
        while self._written and (len(self._written) > BATCHES_AHEAD or self._written[0].done()):
            self._written.popleft().result()

    def _write(self, batch: _Batch, outcomes: Sequence[Outcome]) -> None:
        if self._broken.is_set():
            return  # what follows a batch that could not be written must not complete its unit
        try:
            if batch.items:
                self._commit(batch, outcomes)
            else:
                batch.writer.complete()
                self._open_writers.remove(batch.writer)
        except BaseException:
            self._broken.set()
            raise

    def _commit(self, batch: _Batch, outcomes: Sequence[Outcome]) -> None:
        for item, outcome in zip(batch.items, outcomes, strict=True):
            error = outcome if isinstance(outcome, Exception) else outcome.exception()
            if item.key in batch.writer.done:
                continue  # done in an earlier run; computed again because the batch is
            if error is None and isinstance(outcome, Future):
                value, regions, sure = outcome.result()
                batch.writer.put(item.key, value, regions=regions, photograph=batch.read[item.key])
                self._tally.extracted += 1
                self._tally.regions += regions
                self._tally.fillers += not sure
            else:
                retry = True if isinstance(error, CutTar) else False if isinstance(error, NeverReadable) else None
                batch.writer.fail(item.key, item.path, in_words(error), retry=retry)
                self._tally.count_failure(item.path, in_words(error))
        batch.writer.commit()
        self._report(len(batch.items))

    def _detect_alone(self, item: ImageItem, prepared: PreparedImage | None) -> None:
        """All of an image up to its regions; raises what goes wrong."""
        image = prepared if prepared is not None else self._prepare(item, {})
        boxes = _given_boxes(self._work, item, image)
        try:
            self._detector.detect([image], boxes=None if boxes is None else [boxes])
        finally:
            release_memory()

    def _everywhere(self) -> Iterator[ImageItem]:
        """Some images of the unit at hand and of the run."""
        yield from random.Random(0).sample(self._unit_items, min(SAMPLES, len(self._unit_items)))
        yield from self._samples()

    def _close(self) -> None:
        for batch in self._ahead:
            for future in batch.prepared:
                future.cancel()
        self._reading.shutdown(wait=True, cancel_futures=True)
        self._writing.shutdown(wait=True, cancel_futures=True)
        for writer in self._open_writers:
            writer.__exit__(None, None, None)


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """OpenCV on one thread, since images run side by side already, and no library's words on stderr: failures.jsonl says what is wrong.

    What decoders say of pictures that they decode all the same is counted, and said at the end.
    """
    threads, loudness = cv2.getNumThreads(), cv2.utils.logging.getLogLevel()
    cv2.setNumThreads(1)
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        with counted_decoder_words(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")
            yield
    finally:
        cv2.setNumThreads(threads)
        cv2.utils.logging.setLogLevel(loudness)


# --- one image and one batch -----------------------------------------------------------------------------------------------------


def prepare_item(item: ImageItem, *, detector: Detector, work: Work, read: dict[str, Photograph]) -> PreparedImage:
    """Read, decode and bring one image to the detector's size; on pinned memory for a GPU, so that copies do not wait.

    What was read is noted in `read`, by the image's key.
    """
    if work.given is not None and work.given.of(item) is None:
        raise BadInput(work.given.why_not(item))
    data = read_bytes(item, max_pixels=work.max_pixels)
    read[item.key] = photograph_as_read(item, data)
    image = decode_image(data, max_pixels=work.max_pixels)
    del data
    with DECODING.taking(PREPARING_BYTES * image.shape[0] * image.shape[1]):
        prepared = detector.prepare(image)
    if detector.device.startswith("cuda"):
        import torch

        if torch.cuda.is_available():
            return replace(prepared, pixels=torch.from_numpy(prepared.pixels).pin_memory().numpy())
    return prepared


def run_batch(
    items: Sequence[ImageItem], prepared: Sequence[Future[PreparedImage]], *, detector: Detector, work: Work, pool: ThreadPoolExecutor
) -> list[Outcome]:
    """Detect in those images of a batch that could be read; the encoded records come as futures, failures as exceptions."""
    outcomes: list[Outcome | None] = [None] * len(items)
    rows, images, boxes = [], [], []
    for row, (item, future) in enumerate(zip(items, prepared, strict=True)):
        try:
            image = future.result()
            given = _given_boxes(work, item, image)
        except Exception as error:  # whatever one file provokes in a decoder costs that image alone; in failures.jsonl it is named
            outcomes[row] = error.with_traceback(None)
        else:
            rows.append(row)
            images.append(image)
            boxes.append(given)
    for row, image, found in zip(rows, images, _detect(detector, images, boxes if work.given is not None else None), strict=True):
        if isinstance(found, RawRegions):
            outcomes[row] = pool.submit(encode_regions, found, image.size, work, items[row].key)
        else:
            outcomes[row] = found
    return [outcome for outcome in outcomes if outcome is not None]


def _given_boxes(work: Work, item: ImageItem, image: PreparedImage) -> Any:
    if work.given is None:
        return None
    regions = work.given.of(item)
    assert regions is not None  # prepare_item refuses
    return regions.inside(image.size)


def _detect(detector: Detector, images: Sequence[PreparedImage], boxes: Sequence[Any] | None) -> list[RawRegions | Exception]:
    """The whole batch or, where that fails, one image after the other, so that one costs nothing but itself."""
    if not images:
        return []
    failure: Exception
    try:
        return list(checked_regions(detector.detect(images, boxes=boxes), detector, len(images)))
    except Exception as error:  # memory or whatever one image provokes; `Doubts` ends the run where it is every image
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


def encode_regions(raw: RawRegions, size: tuple[int, int], work: Work, key: str) -> Encoded:
    """Select and encode. BadInput where a feature does not fit float16."""
    if work.given is not None:
        regions = keep_given(raw, size=size)
        sure = True
    else:
        regions = select_regions(
            raw, size=size, min_boxes=work.min_boxes, max_boxes=work.max_boxes, conf_threshold=work.conf_threshold,
            nms_threshold=work.nms_threshold, rule=work.rule,
        )  # fmt: skip
        sure = bool((np.asarray(regions.conf).astype(np.float16) > np.float16(work.conf_threshold)).any())
    return Encoded(encode_record(regions, key=key), len(regions), sure)


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
