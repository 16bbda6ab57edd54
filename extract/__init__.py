"""Images to RegionFeatures: decoding, detectors, selection, the extraction run."""
