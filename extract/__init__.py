"""Images to RegionFeatures: decoding, detectors, selection, the extraction run.

The names below are imported when they are first used: `import uniter.extract` needs neither Detectron2 nor PyTorch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uniter.extract.detector.detectron import Detectron2Detector, build_detector
    from uniter.extract.detector.protocol import Detector, PreparedImage, RawRegions
    from uniter.extract.notebook import PhotographRegions, extract_regions
    from uniter.extract.on_demand import RegionExtractor
    from uniter.extract.run.extraction import extract_images
    from uniter.extract.run.summary import ExtractSummary

__all__ = [
    "Detector",
    "Detectron2Detector",
    "ExtractSummary",
    "PhotographRegions",
    "PreparedImage",
    "RawRegions",
    "RegionExtractor",
    "build_detector",
    "extract_images",
    "extract_regions",
]

_HOMES = {
    "Detector": "detector.protocol",
    "Detectron2Detector": "detector.detectron",
    "ExtractSummary": "run.summary",
    "PhotographRegions": "notebook",
    "PreparedImage": "detector.protocol",
    "RawRegions": "detector.protocol",
    "RegionExtractor": "on_demand",
    "build_detector": "detector.detectron",
    "extract_images": "run.extraction",
    "extract_regions": "notebook",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
