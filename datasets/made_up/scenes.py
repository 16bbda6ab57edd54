"""A made-up captioned world: things of several shapes, colours and sizes on textured ground, everything about them known.

What people get wrong: sizes are sides of a thing in pixels before its outline is drawn, while `box` is the tight box of the pixels
that were drawn, x0 y0 x1 y1 with x1 and y1 exclusive (COCO's x, y, width, height follow from it without a + 1).

Scenes are a pure function of (world, seed, number), so a larger world begins with the same pictures as a smaller one.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from uniter.datasets.made_up.outlines import OUTLINES
from uniter.datasets.made_up.world import World

SUPERSAMPLING = 4
GAP = 3  # pixels between the boxes of two things
_TRIES = 60  # places tried for a thing before it is left out


@dataclass(frozen=True)
class Thing:
    """One thing: words of the world, and its tight box in pixels, x0 y0 x1 y1 (x1, y1 exclusive)."""

    shape: str
    colour: str
    size: str
    box: tuple[int, int, int, int]

    @property
    def centre(self) -> tuple[float, float]:
        """(x, y) in pixels."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    def phrase(self, *, with_size: bool = False) -> str:
        """ "red circle" or "small red circle"."""
        return f"{self.size} {self.colour} {self.shape}" if with_size else f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Relation:
    """Thing `subject` is left of, right of, above or below thing `object` (numbers of things in their scene)."""

    subject: int
    name: Literal["left of", "right of", "above", "below"]
    object: int


@dataclass(frozen=True)
class Scene:
    """One picture and all that can be said about it.

    Attributes:
        key: stem of the picture's file name, different in every scene of a world.
        number: the COCO image id.
        size: (height, width) in pixels.
        things: by no particular order.
        relations: every ordered pair of things of which one clearly lies on one side of the other.
        captions: sentences that are true of the picture.
    """

    key: str
    number: int
    size: tuple[int, int]
    things: tuple[Thing, ...]
    relations: tuple[Relation, ...] = ()
    captions: tuple[str, ...] = field(default=())


def make_scene(world: World, *, seed: int, number: int, captions: int = 5) -> tuple[Scene, NDArray[np.uint8]]:
    """Scene `number` of the world with this seed, and its picture as (H, W, 3) uint8 RGB."""
    rng = np.random.default_rng([seed, number])
    pixels = _ground(world.size, rng)
    things: list[Thing] = []
    for _ in range(int(rng.integers(world.things[0], world.things[1] + 1))):
        thing = _place(world, pixels, things, rng)
        if thing is not None:
            things.append(thing)
    scene = Scene(scene_key(number), number, world.size, tuple(things))
    scene = replace(scene, relations=tuple(relations_between(scene.things)))
    picture = np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
    return replace(scene, captions=tuple(make_captions(scene, rng, count=captions))), picture


def scene_key(number: int) -> str:
    """The key of scene `number`, which is the stem of its picture."""
    return f"scene_{number:06d}"


def relations_between(things: Sequence[Thing]) -> Iterator[Relation]:
    """Every ordered pair in which one thing clearly lies on one side of the other: its distance that way is 1.5 times the other's."""
    for first, thing in enumerate(things):
        for second, other in enumerate(things):
            if first == second:
                continue
            right, down = other.centre[0] - thing.centre[0], other.centre[1] - thing.centre[1]
            if abs(right) >= 1.5 * abs(down):
                yield Relation(first, "left of" if right > 0 else "right of", second)
            elif abs(down) >= 1.5 * abs(right):
                yield Relation(first, "above" if down > 0 else "below", second)


def make_captions(scene: Scene, rng: np.random.Generator, *, count: int) -> list[str]:
    """True sentences about the scene: relations of two things, lists of things; different ones where there are so many."""
    captions: list[str] = []
    for _ in range(count):
        caption = _sentence(scene, rng)
        for _ in range(8):
            if caption not in captions:
                break
            caption = _sentence(scene, rng)
        captions.append(caption)
    return captions


def _sentence(scene: Scene, rng: np.random.Generator) -> str:
    things = [with_article(thing.phrase(with_size=bool(rng.random() < 0.4))) for thing in scene.things]
    choice = rng.random()
    if scene.relations and choice < 0.65:
        relation = scene.relations[int(rng.integers(len(scene.relations)))]
        first, second = things[relation.subject], things[relation.object]
        opening = ("", "", "there is ", "a picture of ")[int(rng.integers(4))]
        return f"{opening}{first} {relation.name} {second}"
    order = [int(place) for place in rng.permutation(len(things))]
    if choice < 0.85:
        order = order[:2]
    listed = [things[place] for place in order]
    if len(listed) == 1:
        return f"there is {listed[0]}"
    return f"{', '.join(listed[:-1])} and {listed[-1]}"


def with_article(phrase: str) -> str:
    """ "a red circle", "an orange star"."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _place(world: World, pixels: NDArray[np.float32], things: Sequence[Thing], rng: np.random.Generator) -> Thing | None:
    """Draw one more thing onto `pixels`, (H, W, 3) float32, where it touches no other; None if no free place was found."""
    height, width = world.size
    for _ in range(_TRIES):
        shape, colour, size = _one_of(world.shapes, rng), _one_of(world.colours, rng), _one_of(world.sizes, rng)
        least, greatest = world.sizes[size]
        side = max(round(float(rng.uniform(least, greatest)) * min(height, width)), 6)
        left, top = int(rng.integers(2, width - side - 1)), int(rng.integers(2, height - side - 1))
        mask = OUTLINES[world.shapes[shape]](side * SUPERSAMPLING).resize((side, side), Image.Resampling.BOX)
        inner = Image.fromarray(np.asarray(mask)).point(lambda value: 255 if value > 64 else 0).getbbox()
        if inner is None:
            continue
        box = (left + inner[0], top + inner[1], left + inner[2], top + inner[3])
        if any(_too_near(box, other.box) for other in things):
            continue
        cover = np.asarray(mask, dtype=np.float32)[:, :, None] / 255
        paint = np.array(world.colours[colour], dtype=np.float32) + rng.uniform(-14, 14, size=3).astype(np.float32)
        paint = paint + rng.normal(0, 5, size=(side, side, 1)).astype(np.float32)
        region = pixels[top : top + side, left : left + side]
        region[:] = (1 - cover) * region + cover * paint
        return Thing(shape, colour, size, box)
    return None


def _one_of(words: Mapping[str, Any], rng: np.random.Generator) -> str:
    return list(words)[int(rng.integers(len(words)))]


def _too_near(first: tuple[int, int, int, int], second: tuple[int, int, int, int]) -> bool:
    return first[0] < second[2] + GAP and second[0] < first[2] + GAP and first[1] < second[3] + GAP and second[1] < first[3] + GAP


def _ground(size: tuple[int, int], rng: np.random.Generator) -> NDArray[np.float32]:
    """A muted ground, (H, W, 3) float32: a colour, a slow unevenness, a pattern and grain."""
    height, width = size
    base = rng.uniform(95, 165) + rng.uniform(-18, 18, size=3)
    coarse = Image.fromarray(rng.normal(0, 16, size=(5, 6)).astype(np.float32))
    uneven = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float64)
    rows, columns = np.mgrid[0:height, 0:width]
    period, angle = rng.uniform(6, 20), rng.uniform(0, math.pi)
    along = (columns * math.cos(angle) + rows * math.sin(angle)) * (2 * math.pi / period)
    across = (rows * math.cos(angle) - columns * math.sin(angle)) * (2 * math.pi / period)
    pattern = (np.zeros((height, width)), np.sin(along), np.sign(np.sin(along) * np.sin(across)), np.sin(along) + np.sin(across))[
        int(rng.integers(4))
    ]
    grain = rng.normal(0, 7, size=(height, width))
    return (base + (uneven + rng.uniform(4, 11) * pattern + grain)[:, :, None]).astype(np.float32)
