"""Photographs to regions: images a second by detector, precision and batch; without Detectron2 the network's arithmetic alone."""

import importlib.util
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from on_gpu.rows import Place, Row, attempted, seconds_each, waits_of
from torch import nn
from torch.nn import functional as F

from uniter.datasets.devices import float32_products

ARITHMETIC = 420.0  # images a second of butd on an H100, at the rate its products were measured with
OPENED = ("cv2", "ijson", "lmdb", "msgpack", "orjson", "PIL", "tqdm", "safetensors")
AIM = "120, then 200"


def rows(place: Place) -> Iterator[Row]:
    """The detector on board and Bottom-Up-Attention with random weights, where Detectron2 is; the bare network everywhere."""
    missing = [name for name in OPENED if name in place.absent]
    missing += [] if importlib.util.find_spec("detectron2") else ["detectron2"]
    if missing:
        yield Row(
            "detectors", f"{', '.join(missing)} not installed here: the bare network below is all that can be timed", state="left out"
        )
    else:
        yield from attempted("detectors", partial(_detectors, place), place)
    if missing or not place.small:
        precisions = ("fp32", "tf32", "bf16") if place.on_gpu else ("fp32",)
        for precision in precisions:
            yield from attempted(
                f"bare R101-C4, {precision}", partial(_bare, place, precision), place, needs_seconds=0 if place.small else 6
            )


def photographs(folder: Path, count: int, size: tuple[int, int]) -> list[Any]:
    """JPEG files that look like nothing, of about 640 x 480 pixels, lying and standing; and their pixels."""
    import cv2

    rng, pixels = np.random.default_rng(0), []
    for number in range(count):
        coarse = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        height, width = size if number % 4 else size[::-1]
        image = cv2.resize(coarse, (width - number % 3, height), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(folder / f"{number:05d}.jpg"), image)
        pixels.append(image)
    return pixels


def _detectors(place: Place) -> Iterator[Row]:
    from uniter.extract.detector.detectron import PRECISIONS

    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory(dir=place.work) as temporary:
        folder = Path(temporary) / "photographs"
        folder.mkdir()
        pixels = photographs(folder, 4 if place.small else 128, (48, 64) if place.small else (480, 640))
        wanted = [name for name in PRECISIONS if place.on_gpu or name == "fp32"]
        cases: list[tuple[str, str | None, str]] = [("on-board", None, "fp32")]
        cases += [] if place.small else [("butd", "random:1", name) for name in wanted]
        for name, weights, precision in cases:
            work = partial(_detector, place, folder, pixels, name, weights, precision)
            yield from attempted(f"{name}, {precision}", work, place, needs_seconds=0 if place.small else 12)


def _detector(place: Place, folder: Path, pixels: Sequence[Any], name: str, weights: str | None, precision: str) -> Iterator[Row]:
    from uniter.extract.detector.detectron import Detectron2Detector
    from uniter.extract.run.extraction import extract_images

    detector = Detectron2Detector(name, weights=weights, device=str(place.device), precision=precision)
    share = ARITHMETIC if name == "butd" else None
    for batch in (2,) if place.small else (8, 32):
        prepared = [detector.prepare(image) for image in pixels[:batch]]

        def detect(prepared: Sequence[Any] = prepared) -> None:
            detector.detect(prepared)

        what = f"{name}, {precision}, batches of {batch}"
        seconds = seconds_each(detect, place, most=0.1 if place.small else 2.0, least_times=1 if place.small else 2)
        yield from _speed(f"{what}: detector alone", batch / seconds, share)
        if (waits := waits_of(detect, place)) is not None:
            yield Row(f"{what}: waits of a batch", waits, wanted="few, whatever the batch")
    began = time.monotonic()
    summary = extract_images(folder, folder.parent / f"{name}-{precision}", detector=detector, batch_size=batch, check_space=False)
    yield from _speed(f"{what}: photographs to a database", summary.images / (time.monotonic() - began), share)
    yield Row(f"{what}: regions a photograph", summary.mean_regions)
    if place.on_gpu:
        yield Row(f"{what}: peak memory", torch.cuda.max_memory_allocated(place.device) / 2**30, "GiB")
        torch.cuda.reset_peak_memory_stats(place.device)


def _speed(what: str, rate: float, share: float | None) -> Iterator[Row]:
    yield Row(what, rate, "images/s", AIM if share else "")
    if share:
        yield Row(f"{what}: share of the {share:.0f} that arithmetic allows", rate / share)


class BareR101(nn.Module):
    """The layers of Bottom-Up-Attention's detector, BatchNorm folded away, without what decides: 300 boxes are given."""

    def __init__(self, narrow: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64 // narrow, 7, 2, 3)
        widths, stages = [64 // narrow, 128 // narrow, 256 // narrow], [3, 4, 23]
        before, layers = 64 // narrow, []
        for stage, (width, count) in enumerate(zip(widths, stages if narrow == 1 else [1, 1, 1], strict=True)):
            for number in range(count):
                layers.append(_Bottleneck(before, width, stride=2 if stage and not number else 1))
                before = 4 * width
        self.body = nn.Sequential(*layers)
        self.rpn = nn.Conv2d(before, 512 // narrow, 3, 1, 1)
        self.head = nn.Sequential(*(_Bottleneck(before if not n else 2048 // narrow, 512 // narrow, dilation=2) for n in range(3)))
        self.classes = nn.Linear(2048 // narrow, 1601)

    def forward(self, images: torch.Tensor, boxes: list[torch.Tensor]) -> torch.Tensor:
        maps = self.body(F.max_pool2d(F.relu(self.stem(images)), 3, 2, 0, ceil_mode=True))
        self.rpn(maps)
        if importlib.util.find_spec("torchvision") is None:  # some cells of each map, as many as there are boxes
            pooled = F.interpolate(maps, (14, 14)).repeat_interleave(len(boxes[0]), dim=0)
        else:
            from torchvision.ops import roi_pool

            pooled = roi_pool(maps.float(), boxes, 14, 1 / 16).to(maps.dtype)
        pooled = pooled.contiguous(memory_format=torch.channels_last)
        found: torch.Tensor = self.classes(self.head(pooled).mean(dim=(2, 3))).softmax(dim=1)
        return found


class _Bottleneck(nn.Module):
    def __init__(self, before: int, width: int, *, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.narrow = nn.Conv2d(before, width, 1, stride)
        self.middle = nn.Conv2d(width, width, 3, 1, dilation, dilation)
        self.wide = nn.Conv2d(width, 4 * width, 1)
        self.shortcut = nn.Conv2d(before, 4 * width, 1, stride) if stride > 1 or before != 4 * width else nn.Identity()

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return F.relu(self.wide(F.relu(self.middle(F.relu(self.narrow(maps))))) + self.shortcut(maps))


@torch.inference_mode()
def _bare_seconds(place: Place, precision: str, batch: int) -> float:
    network = BareR101(16 if place.small else 1).eval().to(place.device).to(memory_format=torch.channels_last)
    height, width, count = (64, 96, 5) if place.small else (600, 800, 300)
    images = torch.randn(batch, 3, height, width, device=place.device).to(memory_format=torch.channels_last)
    corners = torch.rand(count, 2, 2, device=place.device).sort(dim=1).values.reshape(count, 4)
    boxes = [corners * torch.tensor([width, height, width, height], device=place.device)] * batch
    with (
        float32_products(tf32=precision == "tf32"),
        torch.autocast(place.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"),
    ):
        return seconds_each(lambda: network(images, boxes), place, most=0.1 if place.small else 2.0, least_times=1)


def _bare(place: Place, precision: str) -> Iterator[Row]:
    batch = 1 if place.small else 8
    yield from _speed(
        f"bare R101-C4 in {precision}, batches of {batch}, 300 boxes given", batch / _bare_seconds(place, precision, batch), ARITHMETIC
    )
