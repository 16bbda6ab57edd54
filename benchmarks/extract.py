"""How fast extraction is, against the plain loop that one would write on stock Detectron2.

The opponent is here, below: one image at a time, decoded on the main thread, BatchNorm unfolded, the usual memory layout, all RoIs at
once, box regression computed and left, 1,600 calls of non-maximum suppression. Same weights (`random:1`), same float32, same
threads, each in a process of its own, since the extractor has the C library keep freed memory. Runs of both alternate; the ratio is
the median over the pairs. The share of the peak compares the multiplications that an image needs with what this machine's convolutions
reach on the RoI head's shapes, measured between the same runs, in the extractor's process.

    python benchmarks/extract.py [--pairs 5] [--images 2] [--precision fp32 --precision bf16]
    python benchmarks/extract.py --device cuda --images 32 --batch-size 8 --precision fp32 --precision fp16
"""

import argparse
import json
import logging
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import skimage
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import nms

from uniter.datasets.image_db import ImageDB
from uniter.datasets.image_db.records import encode_record
from uniter.extract.detector import network
from uniter.extract.detector.butd import butd_config, caffe_anchors
from uniter.extract.detector.detectron import Detectron2Detector
from uniter.extract.detector.preparation import CaffePreparation
from uniter.extract.detector.protocol import RawRegions
from uniter.extract.run.extraction import extract_images
from uniter.extract.select import select_regions
from uniter.extract.weights.load import load_weights

PHOTOGRAPHS = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "motorcycle_left.png")
# (channels in, channels out, kernel, how often) of the RoI head's convolutions at 14 x 14.
RES5_SHAPES = ((1024, 512, 1, 1), (1024, 2048, 1, 1), (512, 512, 3, 3), (512, 2048, 1, 3), (2048, 512, 1, 2))


class PlainLoop:
    """The opponent: stock Detectron2, with the published detector's parts registered, and Caffe's script written straight."""

    def __init__(self, device: str) -> None:
        from detectron2.modeling import build_model

        config = butd_config()
        config.MODEL.DEVICE = "cpu"
        self.model = build_model(config).eval()
        shapes = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}
        self.model.load_state_dict(load_weights("random:1", shapes=shapes).tensors, strict=False)
        (anchors,) = self.model.proposal_generator.anchor_generator.cell_anchors.buffers()
        anchors.copy_(caffe_anchors())
        self.model.to(device)
        self.device = torch.device(device)
        self.preparation = CaffePreparation()

    def detect(self, path: Path) -> tuple[RawRegions, tuple[int, int]]:
        image = np.asarray(cv2.imread(str(path)), dtype=np.uint8)
        prepared = self.preparation(image)
        model, scale = self.model, prepared.scale[0]
        with torch.no_grad():
            maps = model.backbone(torch.from_numpy(prepared.pixels).permute(2, 0, 1).contiguous()[None].to(self.device))
            rpn = model.proposal_generator
            levels = [maps[name] for name in rpn.in_features]
            logits, deltas = rpn.rpn_head(levels)
            found = rpn.predict_proposals(
                rpn.anchor_generator(levels),
                [level.permute(0, 2, 3, 1).flatten(1) for level in logits],
                [level.permute(0, 2, 3, 1).reshape(1, -1, 4) for level in deltas],
                [(prepared.pixels.shape[0], prepared.pixels.shape[1])],
                scales=[scale],
            )[0]
            pooled = model.roi_heads._shared_roi_transform([maps[name] for name in model.roi_heads.in_features], [found.proposal_boxes])
            features = pooled.mean(dim=[2, 3])
            scores, _ = model.roi_heads.box_predictor(features)
            shares = network.probabilities(scores)
        boxes = (found.proposal_boxes.tensor / scale).cpu().numpy()
        return RawRegions(boxes, features.cpu().numpy(), shares.cpu().numpy()), prepared.size

    def run(self, paths: Sequence[Path], out: Path) -> None:
        """Features of all images, an .npz each."""
        for path in paths:
            raw, size = self.detect(path)
            boxes, shares = torch.from_numpy(raw.boxes), torch.from_numpy(raw.probabilities)
            inclusive = boxes + torch.tensor([0.0, 0.0, 1.0, 1.0])
            confidence = torch.zeros(len(boxes))
            for column in range(1, shares.shape[1]):
                kept = nms(inclusive, shares[:, column], 0.3)
                confidence[kept] = torch.maximum(confidence[kept], shares[kept, column])
            order = confidence.argsort(descending=True, stable=True)
            rows = order[: min(max(int((confidence > 0.2).sum()), 10), 100)].numpy()
            height, width = size
            corners = raw.boxes[rows] / np.array([width, height, width, height], dtype=np.float32)
            np.savez(
                out / path.stem,
                features=raw.features[rows].astype(np.float16),
                norm_bb=np.concatenate([corners, corners[:, 2:] - corners[:, :2]], axis=1).astype(np.float16),
                conf=confidence.numpy()[rows, None].astype(np.float16),
                soft_labels=raw.probabilities[rows].astype(np.float16),
            )


class OpponentProcess:
    """The plain loop in a process of its own."""

    _plain: PlainLoop  # in that process only

    def __init__(self, device: str, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, mp_context=context, initializer=self._begin, initargs=(device, threads))

    @classmethod
    def _begin(cls, device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        cls._plain = PlainLoop(device)

    def seconds(self, paths: Sequence[Path], out: Path) -> float:
        """Of one run, without what it takes to ask for it."""
        return self._pool.submit(self._seconds, paths, out).result()

    @classmethod
    def _seconds(cls, paths: Sequence[Path], out: Path) -> float:
        return seconds(lambda: cls._plain.run(paths, out))

    def multiplications(self, path: Path) -> float:
        return self._pool.submit(self._multiplications, path).result()

    @classmethod
    def _multiplications(cls, path: Path) -> float:
        return multiplications(cls._plain, path)


def photographs(folder: Path, count: int) -> list[Path]:
    """Photographs that scikit-image ships, as JPEG files."""
    made = []
    for number in range(count):
        name = PHOTOGRAPHS[number % len(PHOTOGRAPHS)]
        image = cv2.imread(str(Path(skimage.__file__).parent / "data" / name))
        if image is None:
            sys.exit(f"scikit-image ships no {name} here; install the `demo` extra")
        made.append(folder / f"{Path(name).stem}-{number}.jpg")
        cv2.imwrite(str(made[-1]), image, [cv2.IMWRITE_JPEG_QUALITY, 95])
    return made


def seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def multiplications(plain: PlainLoop, path: Path) -> float:
    """Multiply-adds of all convolutions and matrices for one image, counted while it runs."""
    total = 0.0

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        if isinstance(layer, nn.Conv2d):
            total += output.numel() * layer.weight[0].numel()
        elif isinstance(layer, nn.Linear):
            total += output.numel() * layer.in_features

    hooks = [layer.register_forward_hook(count) for layer in plain.model.modules()]
    plain.detect(path)
    for hook in hooks:
        hook.remove()
    return total


def convolution_rate(dtype: torch.dtype, device: str, rounds: int = 3) -> float:
    """Multiply-adds a second of the RoI head's convolutions alone, each in the layout and chunk that the extractor uses."""
    done = spent = 0.0
    rois = network.ROIS_AT_ONCE[torch.device(device).type]
    with torch.inference_mode():
        for channels, out, kernel, often in RES5_SHAPES:
            maps = torch.randn(rois, channels, 14, 14).to(device, dtype).contiguous(memory_format=torch.channels_last)
            weight = torch.randn(out, channels, kernel, kernel).to(device, dtype).contiguous(memory_format=torch.channels_last)
            bias = torch.randn(out).to(device, dtype)
            dilation = 2 if kernel == 3 else 1

            def convolve(maps: Tensor = maps, weight: Tensor = weight, bias: Tensor = bias, dilation: int = dilation) -> Tensor:
                return F.conv2d(maps, weight, bias, padding=dilation * (weight.shape[2] // 2), dilation=dilation)

            convolve()
            spent += often * statistics.median(seconds(convolve) for _ in range(rounds * 2 - 1))
            done += often * rois * 196.0 * out * channels * kernel * kernel
    return done / spent


def host_work(detector: Detectron2Detector, folder: Path) -> dict[str, float]:
    """Milliseconds on one core for a 640 x 480 photograph: decode, resize and encode; selection in the easy and in the hard case."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    image = cv2.imread(str(Path(skimage.__file__).parent / "data" / "coffee.png"))
    path = folder / "host.jpg"
    cv2.imwrite(str(path), cv2.resize(np.asarray(image), (640, 480)), [cv2.IMWRITE_JPEG_QUALITY, 95])
    rng = np.random.default_rng(0)
    corner, side = rng.uniform(0, 400, (300, 2)), rng.uniform(20, 250, (300, 2))
    spread = np.concatenate([corner, corner + side], axis=1).astype(np.float32)
    # All in one place, so that they strike each other out, with hardly a preference: only a look at every class finds 100.
    together = (np.array([100, 100, 300, 300]) + rng.uniform(-2, 2, (300, 4))).astype(np.float32)
    features = rng.random((300, 2048), dtype=np.float32)

    def regions(boxes: NDArray[np.float32], sharpness: float) -> RawRegions:
        scores = np.exp(rng.normal(size=(300, 1601)) * sharpness)
        return RawRegions(boxes, features, (scores / scores.sum(axis=1, keepdims=True)).astype(np.float32))

    easy, hard = regions(spread, 2.6), regions(together, 0.3)
    kept = select_regions(easy, size=(480, 640))

    def decode_resize_write() -> None:
        detector.prepare(np.asarray(cv2.imread(str(path)), dtype=np.uint8))
        (folder / "record").write_bytes(encode_record(kept))

    works: dict[str, Callable[[], object]] = {
        "decode, resize, encode, write": decode_resize_write,
        "selection, enough regions pass": lambda: select_regions(easy, size=(480, 640)),
        "selection, all classes ranked": lambda: select_regions(hard, size=(480, 640), min_boxes=100),
    }
    return {name: 1000 * statistics.median(seconds(work) for _ in range(15)) for name, work in works.items()}


def compare(theirs: Path, ours: Path, paths: Sequence[Path]) -> dict[str, float]:
    """Of the opponent's regions, how many are in ours (within 1e-3 of the image), and how far their values are apart."""
    database = ImageDB(ours)
    found = expected = 0
    features = confidences = 0.0
    cosine = 1.0
    for path in paths:
        record, plain = database[path.stem], np.load(theirs / f"{path.stem}.npz")
        boxes, wanted = np.asarray(record.norm_bb, dtype=np.float32), plain["norm_bb"].astype(np.float32)
        distance = np.abs(boxes[None] - wanted[:, None]).max(axis=2)
        good = distance.min(axis=1) <= 1e-3
        rows = distance.argmin(axis=1)[good]
        found, expected = found + int(good.sum()), expected + len(wanted)
        first, second = np.asarray(record.features, dtype=np.float32)[rows], plain["features"].astype(np.float32)[good]
        features = max(features, float(np.abs(first - second).max()))
        lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
        cosine = min(cosine, float(((first * second).sum(axis=1) / lengths).min()))
        confidences = max(confidences, float(np.abs(np.asarray(record.conf, dtype=np.float32)[rows] - plain["conf"][good, 0]).max()))
    return {"regions found": found / expected, "feature, max": features, "feature, min cosine": cosine, "confidence, max": confidences}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--precision", action="append", choices=["fp32", "tf32", "bf16", "fp16"], help="repeatable; fp32 where none is named"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(arguments.threads)
    device = arguments.device
    plain = OpponentProcess(device, arguments.threads)
    precisions = arguments.precision or ["fp32"]
    detectors = {name: Detectron2Detector("butd", weights="random:1", device=device, precision=name) for name in precisions}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "photographs").mkdir()
        (folder / "plain").mkdir()
        paths = photographs(folder / "photographs", arguments.images)
        needed = statistics.mean(plain.multiplications(path) for path in paths)
        times: dict[str, list[float]] = {name: [] for name in ("plain", *detectors)}
        rates: dict[str, list[float]] = {name: [] for name in detectors}
        for pair in range(arguments.pairs):
            times["plain"].append(plain.seconds(paths, folder / "plain") / len(paths))
            for name, detector in detectors.items():
                run = time.perf_counter()
                extract_images(folder / "photographs", folder / name, detector=detector, batch_size=arguments.batch_size, overwrite=True)
                times[name].append((time.perf_counter() - run) / len(paths))
                rates[name].append(convolution_rate(network.HEAD_TYPES[name], device))
            shown = ", ".join(f"{name} {values[-1]:.2f} s" for name, values in times.items())
            print(f"pair {pair + 1}: {shown} an image", file=sys.stderr, flush=True)
        figures: dict[str, Any] = {"multiply-adds an image (G)": needed / 1e9, "plain loop (s an image)": statistics.median(times["plain"])}
        for name in detectors:
            ratios = [other / own for other, own in zip(times["plain"], times[name], strict=True)]
            shares = [needed / own / rate for own, rate in zip(times[name], rates[name], strict=True)]
            figures[f"{name}: s an image"] = statistics.median(times[name])
            figures[f"{name}: times the plain loop"] = statistics.median(ratios)
            figures[f"{name}: share of the convolutions' own rate"] = statistics.median(shares)
            figures[f"{name}: convolutions alone (G multiply-adds/s)"] = statistics.median(rates[name]) / 1e9
            figures |= {f"{name} against plain: {what}": value for what, value in compare(folder / "plain", folder / name, paths).items()}
        figures |= {f"one core: {what} (ms)": value for what, value in host_work(next(iter(detectors.values())), folder).items()}
    width = max(map(len, figures))
    for what, value in figures.items():
        print(f"{what:<{width}}  {value:.5g}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
