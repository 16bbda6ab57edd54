"""Images to RegionFeatures: decoding, detectors, selection, the extraction run."""

from uniter.extract.detector import Detector, PreparedImage, RawRegions, build_detector, is_out_of_memory
from uniter.extract.select import keep_given, select_regions

__all__ = ["Detector", "PreparedImage", "RawRegions", "build_detector", "is_out_of_memory", "keep_given", "select_regions"]
