"""A detector without a network, for tests of the run around it; run as a script, one extraction in a process that can be killed.

Its features depend on the whole batch: a run that does not keep its batches together writes other bytes and is found out.
"""

import contextlib
import json
import os
import signal
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uniter.datasets.errors import BadInput
from uniter.extract.detector.preparation import CaffePreparation
from uniter.extract.detector.protocol import PreparedImage, RawRegions
from uniter.extract.run.extraction import Stopped, extract_images


@dataclass
class FakeDetector:
    """Twelve random regions, from the pixels; see the module."""

    name: str = "fake"
    feature_width: int = 8
    class_names: tuple[str, ...] = ("cat", "dog", "tree", "house", "boat")
    attribute_names: tuple[str, ...] = ()
    min_boxes: int = 3
    max_boxes: int = 7
    seconds: float = 0.0
    device: str = "cpu"
    preparation: CaffePreparation = field(default_factory=lambda: CaffePreparation(shortest=24, longest=40))
    batches: list[int] = field(default_factory=list)

    def settings(self) -> dict[str, Any]:
        weights = {"layout": "none", "sha256": "0" * 64}
        return {"name": self.name, "weights": weights, "box_kind": "proposal", "preparation": self.preparation.settings()}

    def prepare(self, image: NDArray[np.uint8]) -> PreparedImage:
        return self.preparation(image)

    def detect(self, images: Sequence[PreparedImage], *, boxes: Sequence[NDArray[np.floating]] | None = None) -> list[RawRegions]:
        self.batches.append(len(images))
        if self.seconds:
            time.sleep(self.seconds * len(images))
        together = zlib.crc32(b"".join(image.pixels.tobytes() for image in images))
        found = []
        for row, image in enumerate(images):
            rng = np.random.default_rng(zlib.crc32(image.pixels.tobytes()))
            height, width = image.size
            if boxes is not None:
                where = np.asarray(boxes[row], dtype=np.float32)
            else:
                corners = np.sort(rng.random((12, 2, 2)), axis=1).reshape(12, 4) * [width, height, width, height]
                where = corners.astype(np.float32)
            features = rng.random((len(where), self.feature_width), dtype=np.float32)
            features[:, 0] = together % 1009
            logits = rng.normal(0, 2, (len(where), len(self.class_names) + 1))
            odds = np.exp(logits - logits.max(axis=1, keepdims=True))
            found.append(RawRegions(where, features, (odds / odds.sum(axis=1, keepdims=True)).astype(np.float32)))
        return found


def build_fake(device: str = "cpu", seconds: float = 0.0) -> FakeDetector:
    """What a Ray actor calls to have its own."""
    return FakeDetector(device=device, seconds=seconds)


def build_slow(device: str = "cpu") -> FakeDetector:
    """So slow that no process can do everything before another is there."""
    return FakeDetector(device=device, seconds=0.02)


class DyingDetector(FakeDetector):
    """The process is killed in its third batch, unless the folder `mark` says that one was already."""

    mark: Path

    def detect(self, images: Sequence[PreparedImage], *, boxes: Sequence[NDArray[np.floating]] | None = None) -> list[RawRegions]:
        if len(self.batches) == 2:
            with contextlib.suppress(FileExistsError):
                self.mark.mkdir()
                os.kill(os.getpid(), signal.SIGKILL)
        return super().detect(images, boxes=boxes)


def build_dying(device: str = "cpu", mark: str = "") -> DyingDetector:
    """Of all processes with the same mark, one dies; without one, all."""
    detector = DyingDetector(device=device, seconds=0.02)
    detector.mark = Path(mark) if mark else Path(tempfile.mkdtemp()) / "mark"
    return detector


def build_with(device: str = "cpu", weights: str = "") -> FakeDetector:
    """What a user names by a path that holds in the folder where the command was started."""
    if not Path(weights).is_file():
        raise BadInput(f"{weights} does not exist in {Path.cwd()}")
    return FakeDetector(device=device)


class FailingDetector(FakeDetector):
    """Says what a detector says that cannot go on."""

    def detect(self, images: Sequence[PreparedImage], *, boxes: Sequence[NDArray[np.floating]] | None = None) -> list[RawRegions]:
        raise AttributeError("no such attribute")


def build_failing(device: str = "cpu") -> FailingDetector:
    return FailingDetector(device=device)


def main(images: str, out: str, options: str) -> None:
    """Extract; `options` is JSON: `seconds` an image takes, and arguments of `extract_images`."""
    arguments = json.loads(options)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    arguments["shard"] = tuple(arguments.get("shard", (0, 1)))
    detector = FakeDetector(seconds=arguments.pop("seconds", 0.0))
    try:
        summary = extract_images(images, out, detector=detector, stop=stop, **arguments)
    except Stopped as stopped:
        print(stopped)
        sys.exit(1)
    print(json.dumps(summary.as_dict()))


if __name__ == "__main__":
    main(*sys.argv[1:])
