"""Regions of photographs at the moment they are asked for: a detector, and a folder where what it found is kept.

What a reader would get wrong: photographs are recognised by their content, not by their name. The same picture under two names is
detected once, and a changed file under an old name is detected again. Whether regions come from the detector or from disk, they are
the numbers that a region database holds (features in float16), so answers do not depend on what happens to be kept.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uniter.datasets.errors import BadInput, UniterError
from uniter.datasets.image_db.origin import RegionOrigin
from uniter.datasets.image_db.records import decode_record
from uniter.datasets.image_db.regions import RegionFeatures
from uniter.datasets.progress import Progress
from uniter.extract.detector.detectron import build_detector
from uniter.extract.detector.protocol import Detector, PreparedImage
from uniter.extract.images.decoding import MAX_PIXELS, decode_image
from uniter.extract.images.items import ImageItem, read_bytes
from uniter.extract.region_cache import RegionCache
from uniter.extract.run.options import Options, fitting_workers, plan_work
from uniter.extract.run.units import in_words, quiet_libraries, run_batch
from uniter.extract.weights.cache import cache_folder

Photograph = str | os.PathLike[str] | NDArray[np.uint8]


"""A file, or the upright picture as (H, W, 3) uint8 BGR."""


READ_AT_ONCE = 32  # photographs that are held in memory while it is looked up which of them are known


def default_cache() -> Path:
    """Where the command keeps regions: `regions` in the toolkit's cache folder."""
    return cache_folder() / "regions"


class RegionExtractor:
    """From photographs to their regions, one call after the other.

    Args:
        detector: `butd`, `butd-36`, `on-board`, a Detectron2 model-zoo name or YAML, the folder that `uniter-train detector` made, or
            a detector that was built already.
        weights: as for `build_detector`; only for a detector that is named.
        cache: a folder where regions are kept between calls and processes, in a folder of its own for each combination of detector,
            weights and selection; None keeps nothing.
        device: "cpu", "cuda", "cuda:1" ...; None: a GPU where there is one; only for a detector that is named.
        min_boxes, max_boxes, conf_threshold: which regions stay, see `select_regions`; None: the detector's own numbers.
        batch_size: photographs that go through the detector together; None: fitted to the device. It is no part of what tells kept
            regions apart: a detector gives the same regions in any batch.
        max_pixels: photographs that claim more are refused as decompression bombs.

    Attributes:
        detector: the detector.
        class_names: without the background, class k is column k + 1 of the soft labels.
        feature_width: columns of a feature.
        origin: whose regions they are, as the header of a region database says it.
        detected: photographs that the detector was shown so far; all others were kept.

    Raises:
        UniterError: as `build_detector`.
        SettingsDiffer: the cache's folder for these settings says others.
    """

    def __init__(
        self,
        detector: str | os.PathLike[str] | Detector = "butd",
        *,
        weights: str | None = None,
        cache: str | os.PathLike[str] | None = None,
        device: str | None = None,
        min_boxes: int | None = None,
        max_boxes: int | None = None,
        conf_threshold: float = 0.2,
        batch_size: int | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        if isinstance(detector, str | os.PathLike):
            detector = build_detector(os.fspath(detector), weights=weights, device=device or _device_here())
        elif weights is not None or device is not None:
            raise ValueError("weights and device belong to a detector that is named; this one is built already")
        self.detector: Detector = detector
        self.class_names, self.feature_width = detector.class_names, detector.feature_width
        options = Options(
            min_boxes=min_boxes, max_boxes=max_boxes, conf_threshold=conf_threshold, batch_size=batch_size, max_pixels=max_pixels
        )
        self._work = plan_work(options, detector)
        settings = {"kind": "regions", "detector": detector.settings(), "selection": self._work.selection(), "key": "content"}
        weights = detector.settings().get("weights", {}).get("sha256")
        self.origin = RegionOrigin(detector.name, weights, self._work.selection())
        self._cache = RegionCache(Path(cache), settings) if cache is not None else None
        self.detected = 0

    def __call__(self, images: Photograph | Sequence[Photograph]) -> list[RegionFeatures]:
        """The regions of each photograph, by decreasing confidence, with soft labels and boxes in pixels.

        Args:
            images: files, or upright pictures as (H, W, 3) uint8 BGR arrays; one alone is taken for a list of one.

        Returns:
            One record a photograph, in order, float16 features as on disk.

        Raises:
            BadInput: a photograph cannot be read or used; the sentence names it. What was detected before it is kept.
        """
        if isinstance(images, str | os.PathLike) or (isinstance(images, np.ndarray) and images.ndim == 3):
            several: Sequence[Any] = [images]
        else:
            several = images  # type: ignore[assignment]  # an array of four dimensions is a sequence of pictures
        with quiet_libraries():
            return self._regions(several)

    def _regions(self, images: Sequence[Photograph]) -> list[RegionFeatures]:
        found: dict[str, RegionFeatures] = {}
        keys: list[str] = []
        waiting: list[tuple[ImageItem, Future[PreparedImage]]] = []
        with (
            ThreadPoolExecutor(fitting_workers(self.detector.device), thread_name_prefix="photograph") as pool,
            Progress(len(images), unit="photographs", label="regions", brief=True) as progress,
        ):
            for first in range(0, len(images), READ_AT_ONCE):
                read = list(pool.map(self._read, images[first : first + READ_AT_ONCE], range(first, first + READ_AT_ONCE)))
                keys += [item.key for item, _ in read]
                unknown = {item.key: (item, content) for item, content in read if item.key not in found}
                if self._cache is not None:
                    found |= self._cache.get(list(unknown))
                asked = {item.key for item, _ in waiting}
                new = [(item, content) for key, (item, content) in unknown.items() if key not in found and key not in asked]
                waiting += [(item, pool.submit(self._prepare, content)) for item, content in new]
                progress.found(len(read) - len(new))
                last = first + READ_AT_ONCE >= len(images)
                for batch in _full_batches(waiting, self._work.batch_size, last=last):
                    found |= self._detect(batch, pool)
                    progress.update(len(batch))
        return [found[key] for key in keys]

    def _read(self, image: Photograph, place: int) -> tuple[ImageItem, bytes | NDArray[np.uint8]]:
        """The photograph's key, what messages call it, and its content."""
        if isinstance(image, np.ndarray):
            pixels = np.ascontiguousarray(image)
            if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
                raise BadInput(f"photograph {place}: an array of shape {image.shape}, {image.dtype}; expected BGR pixels (H, W, 3) uint8")
            digest = hashlib.sha256(f"{pixels.shape}".encode())
            digest.update(pixels.data)
            return ImageItem(f"pixels-{digest.hexdigest()}", f"photograph {place}", ""), pixels
        file = os.fspath(image)
        try:
            content = read_bytes(ImageItem("", file, file), max_pixels=self._work.max_pixels)
        except (UniterError, OSError) as error:
            raise BadInput(f"{file}: {in_words(error)}; expected a photograph") from error
        return ImageItem(f"file-{hashlib.sha256(content).hexdigest()}", file, file), content

    def _prepare(self, content: bytes | NDArray[np.uint8]) -> PreparedImage:
        image = decode_image(content, max_pixels=self._work.max_pixels) if isinstance(content, bytes) else content
        return self.detector.prepare(image)

    def _detect(self, batch: Sequence[tuple[ImageItem, Future[PreparedImage]]], pool: ThreadPoolExecutor) -> dict[str, RegionFeatures]:
        items = [item for item, _ in batch]
        outcomes = run_batch(items, [future for _, future in batch], detector=self.detector, work=self._work, pool=pool)
        self.detected += len(batch)
        values: dict[str, bytes] = {}
        failed: tuple[ImageItem, BaseException] | None = None
        for item, outcome in zip(items, outcomes, strict=True):
            try:
                if isinstance(outcome, Exception):
                    raise outcome
                values[item.key] = outcome.result().value
            except Exception as error:  # of whatever kind: the others of the batch are kept before it is raised
                failed = failed or (item, error)
        if self._cache is not None:
            self._cache.put(values)
        if failed is not None:
            raise BadInput(f"{failed[0].path}: {in_words(failed[1])}") from failed[1]
        return {key: decode_record(value, key=key) for key, value in values.items()}


def _full_batches(waiting: list[Any], size: int, *, last: bool) -> Iterator[list[Any]]:
    """Take batches off the front of `waiting`; one that is not full only at the end."""
    while len(waiting) >= size or (last and waiting):
        batch, waiting[:] = waiting[:size], waiting[size:]
        yield batch


def _device_here() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
