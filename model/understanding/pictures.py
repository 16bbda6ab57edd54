"""Answers drawn on photographs."""

from pathlib import Path

import numpy as np

from uniter.datasets.view.pictures import ByteImage, read_photograph, resized
from uniter.model.understanding.results import Photograph

SHOWN_WORDS, SHOWN_REGIONS, SHOWN_PHOTOGRAPHS = 12, 12, 11


def pixels(image: Photograph, longest: int) -> ByteImage:
    """A photograph upright, its longer side `longest` pixels: (H, W, 3) uint8 BGR."""
    return resized(image if isinstance(image, np.ndarray) else read_photograph(Path(image), longest=longest)[0], longest)
