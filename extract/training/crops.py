"""Square crops of photographs at random scales: many small, quick inputs of one size from few photographs."""

import math
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

SCALES = (0.68, 1.8)
"""From a photograph that just does not fill the crop to one of which a small part does, times crop / shorter side."""
LEAST_VISIBLE, LEAST_SIDE = 0.35, 5.0
"""Of a box's area, and pixels of its shorter side: what shows less of itself is left alone, neither found nor background."""
GREY = (127, 127, 127)
TRIES = 8


@dataclass(frozen=True, slots=True, eq=False)
class Crop:
    """A cut-out and what is to be seen in it.

    Attributes:
        pixels: (size, size, 3) uint8, grey where the photograph ends.
        boxes: (N, 4) float32 in its pixels.
        rows: (N,) which of the photograph's boxes they are.
        hidden: (M, 4) what shows too little of itself, and what was to be left alone before.
    """

    pixels: NDArray[np.uint8]
    boxes: NDArray[np.float32]
    rows: NDArray[np.int64]
    hidden: NDArray[np.float32]


def random_crop(
    pixels: NDArray[np.uint8], boxes: NDArray[np.float32], ignored: NDArray[np.bool_], *, size: int, rng: np.random.Generator
) -> Crop:
    """A crop in which at least one box can be seen; the whole photograph, made small, where none is met.

    Args:
        pixels: (h, w, 3) uint8.
        boxes: (N, 4) float32 in its pixels, at least one that is not ignored.
        ignored: (N,) bool, which are neither to be found nor background.
        size: pixels a side of the crop.
        rng: decides scale and place; the same state gives the same crop.
    """
    height, width = pixels.shape[:2]
    for _ in range(TRIES):
        scale = min(math.exp(rng.uniform(math.log(SCALES[0]), math.log(SCALES[1]))) * size / min(height, width), 2.2)
        x, y = (float(rng.uniform(min(0.0, side * scale - size), max(0.0, side * scale - size))) for side in (width, height))
        clipped, seen = _placed(boxes, scale, (x, y), size)
        if (seen & ~ignored).any():
            break
    else:
        scale, x, y = size / max(height, width), 0.0, 0.0
        clipped, _ = _placed(boxes, scale, (x, y), size)
        seen = np.ones(len(boxes), dtype=bool)
    rows = np.flatnonzero(seen & ~ignored)
    shows = (clipped[:, 2:] - clipped[:, :2]).min(axis=1) > 1
    hidden = clipped[shows & (ignored | ~seen)]
    return Crop(_cut(pixels, scale, (x, y), size), clipped[rows], rows, hidden)


def _placed(
    boxes: NDArray[np.float32], scale: float, corner: tuple[float, float], size: int
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Boxes in the crop's pixels, within its border, and which of them show enough."""
    placed = boxes * np.float32(scale) - np.array(corner * 2, dtype=np.float32)
    clipped = placed.clip(0, size)
    visible = (clipped[:, 2:] - clipped[:, :2]).prod(axis=1) / np.maximum((placed[:, 2:] - placed[:, :2]).prod(axis=1), 1e-6)
    return clipped, (visible > LEAST_VISIBLE) & ((clipped[:, 2:] - clipped[:, :2]).min(axis=1) >= LEAST_SIDE)


def _cut(pixels: NDArray[np.uint8], scale: float, corner: tuple[float, float], size: int) -> NDArray[np.uint8]:
    if scale < 0.7:  # an interpolation between four pixels would leave others out
        smaller = (max(round(pixels.shape[1] * scale), 1), max(round(pixels.shape[0] * scale), 1))
        pixels, scale = np.asarray(cv2.resize(pixels, smaller, interpolation=cv2.INTER_AREA), dtype=np.uint8), 1.0
    placing = np.array([[scale, 0, -corner[0]], [0, scale, -corner[1]]], dtype=np.float32)
    return np.asarray(cv2.warpAffine(pixels, placing, (size, size), flags=cv2.INTER_LINEAR, borderValue=GREY), dtype=np.uint8)


def jittered(pixels: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Another brightness, contrast, saturation and tint."""
    changed = pixels.astype(np.float32) * rng.uniform(0.7, 1.3)
    changed = (changed - changed.mean()) * rng.uniform(0.7, 1.3) + changed.mean()
    grey = changed.mean(axis=2, keepdims=True)
    changed = ((changed - grey) * rng.uniform(0.6, 1.4) + grey) * rng.uniform(0.93, 1.07, 3)
    return np.asarray(changed.clip(0, 255).round(), dtype=np.uint8)
