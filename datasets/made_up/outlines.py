"""The outlines of the made-up world's shapes: what can be drawn, each into a square mask of a given side.

What a reader would get wrong: these are names of forms, not words of a world. A world gives each outline that it uses a word of its own
(`shapes: {coin: circle}`).
"""

import math
from collections.abc import Callable, Sequence

from PIL import Image, ImageChops, ImageDraw

Polygon = Sequence[tuple[float, float]]


def _polygon(points: Polygon) -> Callable[[int], Image.Image]:
    def draw(side: int) -> Image.Image:
        mask = Image.new("L", (side, side))
        ImageDraw.Draw(mask).polygon([(x * (side - 1), y * (side - 1)) for x, y in points], fill=255)
        return mask

    return draw


def _ellipses(*ellipses: tuple[float, float, float, float, int]) -> Callable[[int], Image.Image]:
    """Ellipses as x0, y0, x1, y1 (fractions of the side) and what they fill with, one over the other."""

    def draw(side: int) -> Image.Image:
        mask = Image.new("L", (side, side))
        for x0, y0, x1, y1, fill in ellipses:
            ImageDraw.Draw(mask).ellipse([x0 * (side - 1), y0 * (side - 1), x1 * (side - 1), y1 * (side - 1)], fill=fill)
        return mask

    return draw


def _both(first: Callable[[int], Image.Image], second: Callable[[int], Image.Image]) -> Callable[[int], Image.Image]:
    return lambda side: ImageChops.lighter(first(side), second(side))


def _regular(corners: int, *, inner: float = 0.0) -> Polygon:
    """A regular polygon standing on its base, or a star whose inner corners lie at `inner` of the radius."""
    steps = corners * (2 if inner else 1)
    points = []
    for step in range(steps):
        radius = 0.5 * (inner if inner and step % 2 else 1.0)
        angle = 2 * math.pi * step / steps - math.pi / 2
        points.append((0.5 + radius * math.cos(angle), 0.5 + radius * math.sin(angle)))
    return points


_HEART = [
    (0.5 + math.sin(t) ** 3 / 2, 0.44 - (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 31)
    for t in (2 * math.pi * step / 48 for step in range(48))
]


OUTLINES: dict[str, Callable[[int], Image.Image]] = {
    "arch": _both(_polygon([(0.0, 0.5), (0.3, 0.5), (0.3, 1.0), (0.0, 1.0)]), lambda side: _arch(side)),
    "arrow": _polygon([(0.0, 0.35), (0.5, 0.35), (0.5, 0.05), (1.0, 0.5), (0.5, 0.95), (0.5, 0.65), (0.0, 0.65)]),
    "bar": _polygon([(0.0, 0.32), (1.0, 0.32), (1.0, 0.68), (0.0, 0.68)]),
    "bolt": _polygon([(0.55, 0.0), (0.15, 0.55), (0.45, 0.55), (0.3, 1.0), (0.85, 0.38), (0.52, 0.38), (0.75, 0.0)]),
    "circle": _ellipses((0, 0, 1, 1, 255)),
    "cross": _polygon(
        [
            (0.33, 0),
            (0.67, 0),
            (0.67, 0.33),
            (1, 0.33),
            (1, 0.67),
            (0.67, 0.67),
            (0.67, 1),
            (0.33, 1),
            (0.33, 0.67),
            (0, 0.67),
            (0, 0.33),
            (0.33, 0.33),
        ]
    ),
    "diamond": _polygon([(0.5, 0.0), (0.9, 0.5), (0.5, 1.0), (0.1, 0.5)]),
    "drop": _both(_ellipses((0.15, 0.3, 0.85, 1.0, 255)), _polygon([(0.5, 0.0), (0.8, 0.5), (0.2, 0.5)])),
    "heart": _polygon(_HEART),
    "hexagon": _polygon(_regular(6)),
    "house": _polygon([(0.5, 0.0), (1.0, 0.45), (0.85, 0.45), (0.85, 1.0), (0.15, 1.0), (0.15, 0.45), (0.0, 0.45)]),
    "moon": _ellipses((0, 0, 1, 1, 255), (0.35, -0.05, 1.15, 0.85, 0)),
    "oval": _ellipses((0.0, 0.2, 1.0, 0.8, 255)),
    "pillar": _polygon([(0.3, 0.0), (0.7, 0.0), (0.7, 1.0), (0.3, 1.0)]),
    "ring": _ellipses((0, 0, 1, 1, 255), (0.27, 0.27, 0.73, 0.73, 0)),
    "square": _polygon([(0.05, 0.05), (0.95, 0.05), (0.95, 0.95), (0.05, 0.95)]),
    "star": _polygon(_regular(5, inner=0.42)),
    "triangle": _polygon([(0.5, 0.05), (1.0, 0.95), (0.0, 0.95)]),
    "wedge": _polygon([(0.0, 0.0), (1.0, 1.0), (0.0, 1.0)]),
}


def _arch(side: int) -> Image.Image:
    mask = _ellipses((0.0, 0.0, 1.0, 1.0, 255), (0.3, 0.3, 0.7, 0.7, 0))(side)
    lower = Image.new("L", (side, side))
    lower.paste(mask.crop((0, 0, side, side // 2)), (0, 0))
    ImageDraw.Draw(lower).rectangle([0.7 * (side - 1), 0.5 * (side - 1), side - 1, side - 1], fill=255)
    return lower
