"""Regions as one types it in a notebook: `extract_regions("photo.jpg")`, and the picture with its boxes below the cell.

What a reader would get wrong: the detector is kept from one call to the next with the same arguments; the first call loads it, which takes
seconds, and `forget_detectors()` gives its memory back.
"""

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, overload

import numpy as np

from uniter.datasets.image_db.regions import RegionFeatures
from uniter.datasets.view.one_picture import regions_as_html
from uniter.extract.detector.protocol import Detector
from uniter.extract.on_demand import Photograph, RegionExtractor


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class PhotographRegions(RegionFeatures):
    """The regions of a photograph, which a notebook shows drawn on it.

    Attributes:
        photograph: the file, or the upright picture as (H, W, 3) uint8 BGR.
        class_names, attribute_names: the detector's, counted from 0 without the background.
    """

    photograph: Photograph | None = None
    class_names: tuple[str, ...] = ()
    attribute_names: tuple[str, ...] = ()

    def __repr__(self) -> str:
        of = "" if self.photograph is None or isinstance(self.photograph, np.ndarray) else f" of {os.fspath(self.photograph)}"
        return f"<{len(self)} regions{of}, features {self.features.shape[1]} wide>"

    def _repr_html_(self) -> str:
        photograph = self.photograph if isinstance(self.photograph, np.ndarray | None) else os.fspath(self.photograph)
        return regions_as_html(self, photograph, class_names=self.class_names, attribute_names=self.attribute_names)


@overload
def extract_regions(images: Photograph, detector: str | os.PathLike[str] | Detector = ..., **settings: Any) -> PhotographRegions: ...
@overload
def extract_regions(
    images: Sequence[Photograph], detector: str | os.PathLike[str] | Detector = ..., **settings: Any
) -> list[PhotographRegions]: ...
def extract_regions(
    images: Photograph | Sequence[Photograph], detector: str | os.PathLike[str] | Detector = "butd", **settings: Any
) -> PhotographRegions | list[PhotographRegions]:
    """Find the regions of a photograph, or of several.

    Args:
        images: a file, or the upright picture as an (H, W, 3) uint8 BGR array; or a list of such.
        detector: `butd`, `on-board` (which needs no download), or what else `RegionExtractor` takes.
        settings: the other arguments of `RegionExtractor`: weights, cache, device, min_boxes, max_boxes, conf_threshold ...

    Returns:
        One record, or a list of records in the order of the photographs, by decreasing confidence; `.numpy()` gives plain arrays.

    Raises:
        UniterError: as of `RegionExtractor`.
    """
    named = isinstance(detector, str | os.PathLike)
    extractor = _extractor(os.fspath(detector), **settings) if named else RegionExtractor(detector, **settings)  # type: ignore[arg-type]
    alone = isinstance(images, str | os.PathLike) or (isinstance(images, np.ndarray) and images.ndim == 3)
    several: list[Photograph] = [images] if alone else list(images)  # type: ignore[arg-type, list-item]
    names = extractor.class_names, tuple(extractor.detector.attribute_names)
    found = [
        PhotographRegions(**{field.name: getattr(regions, field.name) for field in fields(RegionFeatures)}, photograph=photograph,
                          class_names=names[0], attribute_names=names[1])
        for photograph, regions in zip(several, extractor(several), strict=True)
    ]  # fmt: skip
    return found[0] if alone else found


@functools.lru_cache(maxsize=2)
def _extractor(detector: str, **settings: Any) -> RegionExtractor:
    return RegionExtractor(detector, **settings)


def forget_detectors() -> None:
    """Give the memory of the detectors back that `extract_regions` keeps."""
    _extractor.cache_clear()
