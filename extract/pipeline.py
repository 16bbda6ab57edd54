"""The extraction run: batches of images through a detector into a region database.

What a reader would get wrong: the order and the composition of batches are a function of the list of images alone. A batch never
crosses a unit's end, a broken image leaves its batch smaller, and a resumed run computes whole batches again. So one process,
several, and a killed and repeated run write the same bytes at the same batch size.

Three stages overlap: worker threads read, decode and resize (cv2 and NumPy release the interpreter's lock there); the calling
thread runs the detector; workers select regions and encode them, and one writing thread commits a batch at a time.
"""

import contextlib
import importlib.metadata
import json
import logging
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2

from uniter.datasets.errors import BadInput, SettingsDiffer, UniterError
from uniter.datasets.image_db import encode_record
from uniter.datasets.lmdb_store import BOX_IDS, UnitStore, UnitWriter
from uniter.datasets.progress import Progress
from uniter.extract.detector import Detector, PreparedImage, RawRegions, is_out_of_memory, release_memory
from uniter.extract.given_boxes import GivenBoxes
from uniter.extract.images import MAX_PIXELS, UNIT_IMAGES, ImageItem, ImageList, decode_image, list_images, read_bytes
from uniter.extract.select import GIVEN_RULE, SELECTION_RULE, keep_given, select_regions

log = logging.getLogger(__name__)

BATCHES_AHEAD = 2
"""Batches that are read and prepared while one is in the detector; a prepared photograph takes about 7 MB."""

LARGE_IMAGE_BYTES = 256 << 20
"""Decoded images above it are prepared one at a time, since that takes four times as much again."""
_LARGE_IMAGES = threading.Lock()

UNEXPECTED_IN_A_ROW = 5
"""So many images in a row on which the detector failed for no known reason end the run: it is not the images' fault."""


@dataclass(frozen=True)
class Work:
    """All that a unit's bytes depend on besides its images and the detector.

    Attributes:
        min_boxes, max_boxes, conf_threshold: see `select_regions`; not used where boxes are given.
        batch_size: images that go through the detector together.
        max_pixels: images that claim more are refused.
        given: boxes to use instead of detecting.
    """

    min_boxes: int
    max_boxes: int
    conf_threshold: float
    batch_size: int
    max_pixels: int = MAX_PIXELS
    given: GivenBoxes | None = None


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


@dataclass(frozen=True)
class ExtractSummary:
    """What a run did and what the database holds.

    Attributes:
        out: the database.
        complete: whether it bears its header; if not, other shards or another run have to do `units_left` units.
        requested: images asked for, of all shards.
        images, regions, failures: what the database holds where it is complete, else what this run added.
        extracted, failed: images that this run did.
        seconds, images_per_second: of this run's work, loading not counted.
        bytes_on_disk: of the folder.
        detector, box_kind, feature_width, classes: what was made.
    """

    out: str
    complete: bool
    requested: int
    images: int
    regions: int
    mean_regions: float
    failures: int
    extracted: int
    failed: int
    units_left: int
    seconds: float
    images_per_second: float
    bytes_on_disk: int
    detector: str
    weights: str
    box_kind: str
    feature_width: int
    classes: int

    def as_dict(self) -> dict[str, Any]:
        """Everything, for `--json`."""
        return asdict(self)

    def as_table(self) -> dict[str, Any]:
        """What a person wants to see."""
        return {
            "images": f"{self.images:,} of {self.requested:,}",
            "regions": self.regions,
            "regions per image": self.mean_regions,
            "failures": self.failures,
            "this run": f"{self.extracted:,} images, {self.failed:,} failures, {self.images_per_second:g} images/s",
            **({} if self.complete else {"units still to do": self.units_left}),
            "on disk": human_bytes(self.bytes_on_disk),
            "detector": self.detector,
            "weights": self.weights or "-",
            "made": f"{self.feature_width} features a region, {self.classes} classes, boxes: {self.box_kind}",
        }


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


def check_share(shard: tuple[int, int], *, overwrite: bool, retry_failed: bool) -> None:
    """BadInput for a share that does not exist or that would undo what others do."""
    index, shards = shard
    if not 0 <= index < shards:
        raise BadInput(f"--shard {index}/{shards}: expected I/N with 0 <= I < N")
    if shards > 1 and (overwrite or retry_failed):
        raise BadInput("--overwrite and --retry-failed undo what other processes do; run them with one process, or delete the folder first")


def open_store(
    out: str | os.PathLike[str], listed: ImageList, detector: Detector, work: Work, *, key: str | None, overwrite: bool, retry_failed: bool
) -> UnitStore:
    """Begin or continue the database.

    Raises:
        SettingsDiffer: it was begun with other settings, or for other images.
        BadInput: `out` is a folder of other things, for instance the photographs themselves.
    """
    if not overwrite:
        _refuse_foreign_folder(Path(out))
    settings = run_settings(listed, detector, work, key=key)
    try:
        store = UnitStore(Path(out), settings=settings, overwrite=overwrite)
    except SettingsDiffer:
        if (begun := other_images(Path(out), settings)) is None:
            raise
        raise SettingsDiffer(
            f"{out} was begun for other images ({begun:,} then, {listed.images:,} now): extract those that were "
            "added into another OUT (a .txt list can name them) and join the two with `uniter-db merge`; or --overwrite to begin anew"
        ) from None
    if retry_failed:
        log.info("%d units hold images that failed and are tried again", len(store.forget_failures()))
    return store


def _refuse_foreign_folder(out: Path) -> None:
    """A database among somebody's photographs is a mistake; what lies there of a run that begins at this moment is none."""
    if not out.is_dir():
        return
    ours = ("settings.json", "header.json", "data.mdb", "overwriting", "units", "README.md", ".")
    foreign = sorted(entry.name for entry in out.iterdir() if not entry.name.startswith(ours))
    if foreign and not any((out / name).exists() for name in ours[:4]):
        raise BadInput(f"{out} holds files that are no region database (such as {foreign[0]}); choose another OUT, or pass --overwrite")


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


def finish(store: UnitStore, listed: ImageList, detector: Detector, work: Work, tally: Tally, *, seconds: float) -> ExtractSummary:
    """Complete the database if all units are there, and say what was done."""
    if work.given is not None and not store.is_complete() and len(store.finished_units()) == listed.units:
        with contextlib.suppress(FileNotFoundError):  # another process has completed the database meanwhile, ids and all
            write_box_ids(store.path, listed, work.given)
    complete = store.finish(units=listed.units, header=run_header(detector, work))
    stored: Mapping[str, Any] = json.loads((store.path / "header.json").read_bytes()) if complete else {}
    images, regions = stored.get("images", tally.extracted), stored.get("regions", tally.regions)
    header = run_header(detector, work)
    return ExtractSummary(
        out=str(store.path),
        complete=complete,
        requested=listed.images,
        images=images,
        regions=regions,
        mean_regions=round(regions / images, 2) if images else 0.0,
        failures=stored.get("failures", tally.failed),
        extracted=tally.extracted,
        failed=tally.failed,
        units_left=0 if complete else listed.units - len(store.finished_units()),
        seconds=round(seconds, 2),
        images_per_second=round(tally.done / seconds, 2) if tally.done and seconds > 0 else 0.0,
        bytes_on_disk=folder_bytes(store.path),
        detector=detector.name,
        weights=described_weights(header["weights"]),
        box_kind=header["box_kind"],
        feature_width=detector.feature_width,
        classes=len(detector.class_names),
    )


# --- settings --------------------------------------------------------------------------------------------------------------------


def plan_work(
    out: str | os.PathLike[str],
    detector: Detector,
    *,
    given: GivenBoxes | None = None,
    min_boxes: int | None = None,
    max_boxes: int | None = None,
    conf_threshold: float = 0.2,
    batch_size: int | None = None,
    max_pixels: int = MAX_PIXELS,
    overwrite: bool = False,
) -> Work:
    """Fill in what was left open: the detector's numbers of boxes, the batch size of an unfinished `out` or one that fits the machine."""
    low = detector.min_boxes if min_boxes is None else min_boxes
    high = detector.max_boxes if max_boxes is None else max_boxes
    # One bound alone moves the other, so that `--max-boxes 5` means what it says.
    if min_boxes is None:
        low = min(low, high)
    if max_boxes is None:
        high = max(low, high)
    if not 0 <= low <= high or high < 1:
        raise BadInput(f"--min-boxes {low} and --max-boxes {high}: expected 0 <= min <= max and at least one box")
    if not 0 <= conf_threshold < 1:
        raise BadInput(f"--conf-threshold {conf_threshold}: expected a probability, 0 <= threshold < 1")
    if batch_size is not None and batch_size < 1:
        raise BadInput(f"--batch-size {batch_size}: expected at least 1")
    if max_pixels < 1:
        raise BadInput(f"--max-pixels {max_pixels}: expected at least 1")
    if batch_size is None and not overwrite:
        batch_size = begun_with(Path(out))
    if batch_size is None:
        batch_size = fitting_batch_size(device_of(detector))
    return Work(low, high, conf_threshold, batch_size, max_pixels, given)


def begun_with(out: Path) -> int | None:
    """The batch size that an unfinished database was begun with."""
    try:
        size = json.loads((out / "settings.json").read_bytes())["batch_size"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # UnitStore says what is wrong with the file
    return size if isinstance(size, int) and size >= 1 else None


def fitting_batch_size(device: str) -> int:
    """Images at once: 2 on a CPU, whose cores the RoI head fills anyway; on a GPU a power of two up to 32 that leaves 4 GiB an image."""
    if not device.startswith("cuda"):
        return 2
    import torch

    gibibytes = torch.cuda.get_device_properties(torch.device(device)).total_memory >> 30
    size = 1
    while size < 32 and 2 * size * 4 <= gibibytes:
        size *= 2
    return size


def run_settings(listed: ImageList, detector: Detector, work: Work, *, key: str | None) -> dict[str, Any]:
    """All that changes a value or decides which values there are; `settings.json`.

    The toolkit's version is not part of it: an update in mid-run is no reason to begin anew. Nor is the device.
    """
    return {
        "kind": "regions",
        "detector": detector.settings(),
        "selection": selection_settings(work),
        "key": key or ("path" if listed.unit_images is None else "stem"),
        "images": {"count": listed.images, "units": listed.units, "unit_images": listed.unit_images, "keys_sha256": listed.keys_sha256},
        "batch_size": work.batch_size,
    }


def other_images(out: Path, settings: Mapping[str, Any]) -> int | None:
    """How many images `out` was begun for, if that list is all in which its settings differ."""
    stored = json.loads((out / "settings.json").read_bytes())
    asked = json.loads(json.dumps(settings))
    was, now = stored.pop("images", {}), asked.pop("images")
    if stored != asked or not isinstance(was, dict) or was.get("unit_images") != now["unit_images"]:
        return None
    return int(was.get("count", 0))


def selection_settings(work: Work) -> dict[str, Any]:
    """Which regions stay."""
    if work.given is not None:
        return {"rule": GIVEN_RULE, "boxes_sha256": work.given.sha256}
    return {
        "rule": SELECTION_RULE,
        "min_boxes": work.min_boxes,
        "max_boxes": work.max_boxes,
        "conf_threshold": work.conf_threshold,
    }


def run_header(detector: Detector, work: Work) -> dict[str, Any]:
    """What `header.json` says besides the counts."""
    settings = detector.settings()
    weights = settings.get("weights", {})
    return {
        "feature_width": detector.feature_width,
        "label_classes": len(detector.class_names) + 1,
        "detector": detector.name,
        "detector_settings": settings,
        "weights": weights,
        "weights_sha256": weights.get("sha256"),
        "box_kind": "given" if work.given is not None else settings.get("box_kind", "proposal"),
        "selection": selection_settings(work),
        "batch_size": work.batch_size,
        "software": f"uniter-toolkit {importlib.metadata.version('uniter-toolkit')}",
        "class_names": list(detector.class_names),
        "attribute_names": list(detector.attribute_names),
    }


def described_weights(weights: Mapping[str, Any]) -> str:
    """Weights in a few words, a warning included where they are random."""
    sha256 = str(weights.get("sha256", ""))[:12]
    return str(weights.get("note") or f"{weights.get('layout', 'unknown layout')}, sha256 {sha256}...")


def write_box_ids(out: Path, listed: ImageList, given: GivenBoxes) -> None:
    """Keep the caller's ids of given boxes in `box_ids.jsonl`: `{"key", "ids"}`, ids in the order of the rows. None given, no file."""
    temporary = out / "units" / f"box_ids.{os.getpid()}.tmp"  # a folder that goes when the database is complete
    wrote = False
    with temporary.open("w", encoding="utf-8") as lines:
        for number in range(listed.units):
            for item in listed.unit(number):
                regions = given.of(item)
                if regions is not None and regions.ids is not None:
                    lines.write(json.dumps({"key": item.key, "ids": regions.ids}, ensure_ascii=False) + "\n")
                    wrote = True
    if wrote:
        temporary.replace(out / BOX_IDS)
    else:
        temporary.unlink()


# --- room ------------------------------------------------------------------------------------------------------------------------


def estimated_bytes(images: int, *, detector: Detector, work: Work) -> int:
    """What so many records will take, in bytes.

    How many regions an image keeps is not known before; with Bottom-Up-Attention it is near 40 of 10 to 100, and so it is estimated.
    """
    if work.given is not None:
        regions = work.given.regions_per_image()
    else:
        regions = work.min_boxes + (work.max_boxes - work.min_boxes) / 3
    attributes = len(detector.attribute_names) + 1 if detector.attribute_names else 0
    row = 2 * (detector.feature_width + 6 + 1 + len(detector.class_names) + 1 + attributes) + 4 * 4
    page = 4096
    return int(images * (regions * row + 300 + page / 2 + 100))


def refuse_full_disk(out: Path, *, images: int, detector: Detector, work: Work) -> None:
    """Raise UniterError where the disk has less room than the images will need."""
    needed = estimated_bytes(images, detector=detector, work=work)
    free = shutil.disk_usage(out).free
    log.info("%s images still to do: about %s on disk (%s free)", f"{images:,}", human_bytes(needed), human_bytes(free))
    if free < needed:
        raise UniterError(
            f"about {human_bytes(needed)} are needed for {images:,} images and {out} has {human_bytes(free)} free; make room, choose "
            "another OUT, keep fewer regions with --max-boxes, or pass --ignore-disk-space"
        )


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except OSError:  # another process has just moved it
            continue
    return total


def human_bytes(count: float) -> str:
    """12.3 GB and the like, in powers of 1000."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


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
        regions = select_regions(raw, size=size, min_boxes=work.min_boxes, max_boxes=work.max_boxes, conf_threshold=work.conf_threshold)
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


def device_of(detector: Detector) -> str:
    """Where a detector computes: "cpu", "cuda:0" ..."""
    return str(getattr(detector, "device", None) or getattr(getattr(detector, "network", None), "device", "cpu"))


def fitting_workers(device: str) -> int:
    """Threads that read and decode: as many as cores on a GPU machine (at most 16), two on a CPU, whose cores the network needs."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if device.startswith("cuda"):
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1") or 1)
        return max(2, min(16, cores // max(processes, 1)))
    return min(2, cores)


# --- shares ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """This process's part of the work: shard `index` of `count`, its number on this machine, and where that was read."""

    index: int = 0
    count: int = 1
    local_index: int = 0
    source: str = ""


def share_from_environment(environment: Mapping[str, str]) -> Share:
    """What torchrun or Slurm says about this process.

    torchrun: RANK of WORLD_SIZE. Slurm: tasks that `srun` started (a batch script's own shell is none of them), times array jobs.
    """

    def number(name: str, default: int | None = None) -> int | None:
        text = environment.get(name, "")
        return int(text) if text.lstrip("-").isdigit() else default

    world, rank = number("WORLD_SIZE"), number("RANK")
    if world is not None and rank is not None:
        return Share(rank, world, number("LOCAL_RANK", 0) or 0, "torchrun's RANK and WORLD_SIZE") if world > 1 else Share()
    index, count, sources = 0, 1, []
    job, jobs = number("SLURM_ARRAY_TASK_ID"), number("SLURM_ARRAY_TASK_COUNT", 1) or 1
    if job is not None and jobs > 1:
        first, step = number("SLURM_ARRAY_TASK_MIN", 0) or 0, number("SLURM_ARRAY_TASK_STEP", 1) or 1
        index, count = (job - first) // step, jobs
        if not 0 <= index < count or (job - first) % step:
            raise BadInput(f"SLURM_ARRAY_TASK_ID {job} does not fit an evenly numbered array of {jobs} jobs; pass --shard I/N")
        sources.append("SLURM_ARRAY_TASK_ID")
    tasks, task = number("SLURM_STEP_NUM_TASKS", 1) or 1, number("SLURM_PROCID", 0) or 0
    if tasks > 1:
        index, count = index * tasks + task, count * tasks
        sources.append("SLURM_PROCID")
    return Share(index, count, number("SLURM_LOCALID", 0) or 0, "Slurm's " + " and ".join(sources)) if sources else Share()
