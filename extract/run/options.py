"""What a run was asked to do: one frozen value, built once and passed whole, and what is settled from it once the detector is known."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uniter.datasets.errors import BadInput, WrongUsage, unknown_name
from uniter.extract.detector.protocol import Detector
from uniter.extract.images.decoding import MAX_PIXELS
from uniter.extract.images.given_boxes import GivenBoxes
from uniter.extract.select import CLASS_NMS_THRESHOLD, GIVEN_RULE, RULES


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the user asked for; None is left to the detector, the database or the machine.

    Attributes:
        key: how keys are made, see `keys.key_rule`.
        given: boxes to use instead of detecting.
        min_boxes, max_boxes, conf_threshold: which detected regions stay.
        batch_size: images that go through the detector together; None: what the database was begun with, else fitted to the machine.
        workers: threads that read and decode.
        max_pixels: images that claim more are refused as decompression bombs.
        shard: (I, N): do the units I, I + N, ... only.
        overwrite: begin anew, beside what is there.
        retry_failed: try the images again that failed before.
        check_space: refuse to begin where the disk cannot hold the estimate.
        show_progress: a bar or lines on stderr.

    Raises:
        BadInput: a number is out of its range, or two options do not go together.
    """

    key: str | None = None
    given: GivenBoxes | None = None
    min_boxes: int | None = None
    max_boxes: int | None = None
    conf_threshold: float = 0.2
    batch_size: int | None = None
    workers: int | None = None
    max_pixels: int = MAX_PIXELS
    shard: tuple[int, int] = (0, 1)
    overwrite: bool = False
    retry_failed: bool = False
    check_space: bool = True
    show_progress: bool = False

    def __post_init__(self) -> None:
        index, shards = self.shard
        if not 0 <= index < shards:
            raise WrongUsage(f"--shard {index}/{shards}: expected I/N with 0 <= I < N")
        if shards > 1 and (self.overwrite or self.retry_failed):
            raise BadInput(
                "--overwrite and --retry-failed undo what other processes do; run them with one process, or delete the folder first"
            )
        if self.given is not None and not (self.min_boxes is self.max_boxes is None):
            raise WrongUsage("--min-boxes and --max-boxes say which detected regions stay; given boxes all stay, so leave them out")
        if not 0 <= self.conf_threshold < 1:
            raise WrongUsage(f"--conf-threshold {self.conf_threshold}: expected a probability, 0 <= threshold < 1")
        if self.batch_size is not None and self.batch_size < 1:
            raise WrongUsage(f"--batch-size {self.batch_size}: expected at least 1")
        if self.max_pixels < 1:
            raise WrongUsage(f"--max-pixels {self.max_pixels}: expected at least 1")


@dataclass(frozen=True)
class Work:
    """All that a unit's bytes depend on besides its images and the detector.

    Attributes:
        min_boxes, max_boxes, conf_threshold: see `select_regions`; not used where boxes are given.
        batch_size: images that go through the detector together.
        max_pixels: images that claim more are refused.
        given: boxes to use instead of detecting.
        nms_threshold, rule: see `select_regions`; what the detector's settings ask for, else Caffe's.
    """

    min_boxes: int
    max_boxes: int
    conf_threshold: float
    batch_size: int
    max_pixels: int = MAX_PIXELS
    given: GivenBoxes | None = None
    nms_threshold: float = CLASS_NMS_THRESHOLD
    rule: str = "caffe"

    def selection(self) -> dict[str, Any]:
        """Which regions stay, as settings and headers say it."""
        if self.given is not None:
            return {"rule": GIVEN_RULE, "boxes_sha256": self.given.sha256}
        return {
            "rule": RULES[self.rule].words.format(nms=self.nms_threshold),
            "min_boxes": self.min_boxes,
            "max_boxes": self.max_boxes,
            "conf_threshold": self.conf_threshold,
        }


def plan_work(options: Options, detector: Detector, *, begun: int | None = None) -> Work:
    """Fill in what was left open: the detector's numbers of boxes, and a batch size.

    Args:
        begun: the batch size that the database was begun with, see `begun_with`; None fits it to the machine.
    """
    low = detector.min_boxes if options.min_boxes is None else options.min_boxes
    high = detector.max_boxes if options.max_boxes is None else options.max_boxes
    # One bound alone moves the other, so that `--max-boxes 5` means what it says.
    if options.min_boxes is None:
        low = min(low, high)
    if options.max_boxes is None:
        high = max(low, high)
    if not 0 <= low <= high or high < 1:
        raise WrongUsage(f"--min-boxes {low} and --max-boxes {high}: expected 0 <= min <= max and at least one box")
    settings = detector.settings()
    nms_threshold, rule = float(settings.get("nms_threshold", CLASS_NMS_THRESHOLD)), settings.get("selection_rule", "caffe")
    if rule not in RULES:
        raise BadInput(unknown_name("selection_rule in the settings of the detector", str(rule), list(RULES)))
    batch_size = options.batch_size or begun or fitting_batch_size(detector.device)
    return Work(low, high, options.conf_threshold, batch_size, options.max_pixels, options.given, nms_threshold, rule)


def begun_with(out: Path) -> int | None:
    """The batch size that an unfinished database was begun with."""
    try:
        size = json.loads((out / "settings.json").read_bytes())["batch_size"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None  # UnitStore says what is wrong with the file
    return size if isinstance(size, int) and size >= 1 else None


def fitting_batch_size(device: str) -> int:
    """Images at once: 2 on a CPU, whose cores the RoI head fills anyway; on a GPU a power of two up to 32 that leaves 4 GiB an image."""
    if not device.startswith("cuda"):
        return 2
    import torch

    if not torch.cuda.is_available():
        return 2
    gibibytes = torch.cuda.get_device_properties(torch.device(device)).total_memory >> 30
    size = 1
    while size < 32 and 2 * size * 4 <= gibibytes:
        size *= 2
    return size


def fitting_workers(device: str) -> int:
    """Threads that read and decode: as many as cores on a GPU machine (at most 16), two on a CPU, whose cores the network needs."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if device.startswith("cuda"):
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1") or 1)
        return max(2, min(16, cores // max(processes, 1)))
    return min(2, cores)
