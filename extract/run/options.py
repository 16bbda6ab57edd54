"""What a run was asked to do, settled once: batch size, workers, selection, units."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uniter.datasets.errors import BadInput
from uniter.extract.detector.protocol import Detector
from uniter.extract.images.decoding import MAX_PIXELS
from uniter.extract.images.given_boxes import GivenBoxes
from uniter.extract.select import CLASS_NMS_THRESHOLD, GIVEN_RULE, SELECTION_RULE


@dataclass(frozen=True)
class Work:
    """All that a unit's bytes depend on besides its images and the detector.

    Attributes:
        min_boxes, max_boxes, conf_threshold: see `select_regions`; not used where boxes are given.
        batch_size: images that go through the detector together.
        max_pixels: images that claim more are refused.
        given: boxes to use instead of detecting.
        nms_threshold: see `select_regions`; the detector's own, where it has one.
    """

    min_boxes: int
    max_boxes: int
    conf_threshold: float
    batch_size: int
    max_pixels: int = MAX_PIXELS
    given: GivenBoxes | None = None
    nms_threshold: float = CLASS_NMS_THRESHOLD


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
    nms_threshold = float(getattr(detector, "nms_threshold", CLASS_NMS_THRESHOLD))
    return Work(low, high, conf_threshold, batch_size, max_pixels, given, nms_threshold)


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


def selection_settings(work: Work) -> dict[str, Any]:
    """Which regions stay."""
    if work.given is not None:
        return {"rule": GIVEN_RULE, "boxes_sha256": work.given.sha256}
    return {
        "rule": SELECTION_RULE.format(nms=work.nms_threshold),
        "min_boxes": work.min_boxes,
        "max_boxes": work.max_boxes,
        "conf_threshold": work.conf_threshold,
    }


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
