"""A made-up captioned world: things of several shapes, colours and sizes on textured ground, everything about them known.

What people get wrong: sizes are sides of a thing in pixels before its outline is drawn, while `box` is the tight box of the pixels
that were drawn, x0 y0 x1 y1 with x1 and y1 exclusive (COCO's x, y, width, height follow from it without a + 1).

A world is a vocabulary (`World`): words for outlines, colours and sizes. Scenes are a pure function of (world, seed, number), so a
larger world begins with the same pictures as a smaller one. `write_world` writes COCO's two annotation formats and the scenes
themselves, from which questions, statements or referring phrases can be made later.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw

from uniter.datasets.errors import BadInput, SettingsDiffer, UniterError, unknown_name
from uniter.datasets.lmdb_store import write_json
from uniter.datasets.progress import Progress

FORMAT_VERSION = 1
SUPERSAMPLING = 4
JPEG_QUALITY = 90
GAP = 3  # pixels between the boxes of two things
_TRIES = 60

Polygon = Sequence[tuple[float, float]]


# ------------------------------------------------------------------------------------------------------------------- outlines


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
"""What can be drawn, each into a square mask of the given side; a world gives them its own words."""


def _arch(side: int) -> Image.Image:
    mask = _ellipses((0.0, 0.0, 1.0, 1.0, 255), (0.3, 0.3, 0.7, 0.7, 0))(side)
    lower = Image.new("L", (side, side))
    lower.paste(mask.crop((0, 0, side, side // 2)), (0, 0))
    ImageDraw.Draw(lower).rectangle([0.7 * (side - 1), 0.5 * (side - 1), side - 1, side - 1], fill=255)
    return lower


# -------------------------------------------------------------------------------------------------------------- the description


@dataclass(frozen=True)
class World:
    """A vocabulary, and how its pictures look.

    Attributes:
        shapes: word -> outline (a name of OUTLINES).
        colours: word -> red, green, blue, 0 to 255.
        sizes: word -> least and greatest side of a thing as fractions of the picture's shorter side.
        size: (height, width) of the pictures in pixels.
        things: least and greatest number of things in a picture.
        attributes: whether colours are annotated as attributes of the boxes.
    """

    shapes: Mapping[str, str]
    colours: Mapping[str, tuple[int, int, int]]
    sizes: Mapping[str, tuple[float, float]]
    size: tuple[int, int] = (128, 160)
    things: tuple[int, int] = (2, 5)
    attributes: bool = True

    def __post_init__(self) -> None:
        for word, outline in self.shapes.items():
            if outline not in OUTLINES:
                raise BadInput(f"shape {word!r}: {unknown_name('outline', str(outline), OUTLINES)}")
        for word, colour in self.colours.items():
            if len(colour) != 3 or not all(isinstance(value, int) and 0 <= value <= 255 for value in colour):
                raise BadInput(f"colour {word!r} is {colour!r}, expected red, green and blue from 0 to 255")
        for word, (least, greatest) in self.sizes.items():
            if not 0.05 <= least <= greatest <= 0.6:
                raise BadInput(
                    f"size {word!r} is {least} to {greatest} of the picture, expected two fractions from 0.05 to 0.6, the smaller first"
                )
        for kind, words in (("shapes", self.shapes), ("colours", self.colours), ("sizes", self.sizes)):
            if not words:
                raise BadInput(f"the world has no {kind}; name at least one")
            if any(not isinstance(word, str) or not re.fullmatch(r"\S+( \S+)*", word) for word in words):
                raise BadInput(f"the world's {kind} are {list(words)}, expected words")
        if min(self.size) < 48 or max(self.size) > 2048:
            raise BadInput(f"pictures of {self.size[1]} x {self.size[0]} pixels were asked for, expected sides from 48 to 2048")
        if not 1 <= self.things[0] <= self.things[1] <= 12:
            raise BadInput(f"{self.things[0]} to {self.things[1]} things a picture were asked for, expected 1 to 12, the smaller first")


@dataclass(frozen=True)
class Thing:
    """One thing: words of the world, and its tight box in pixels, x0 y0 x1 y1 (x1, y1 exclusive)."""

    shape: str
    colour: str
    size: str
    box: tuple[int, int, int, int]

    @property
    def centre(self) -> tuple[float, float]:
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


WORLDS: dict[str, World] = {
    "shapes": World(
        shapes={name: name for name in ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "heart")},
        colours={
            **{"red": (215, 35, 35), "green": (40, 160, 60), "blue": (40, 80, 215), "yellow": (240, 220, 50)},
            **{"purple": (140, 50, 175), "orange": (245, 135, 25), "white": (245, 245, 245), "black": (20, 20, 20)},
        },
        sizes={"small": (0.17, 0.24), "large": (0.32, 0.42)},
    ),
    "toys": World(
        shapes={"ball": "circle", "tent": "triangle", "wheel": "ring", "house": "house", "arrow": "arrow", "moon": "moon", "leaf": "drop"},
        colours={
            **{"gold": (225, 175, 40), "pink": (245, 140, 190), "brown": (125, 75, 35), "silver": (200, 205, 212)},
            **{"scarlet": (205, 25, 45), "lime": (150, 220, 40), "navy": (25, 35, 110)},
        },
        sizes={"tiny": (0.18, 0.23), "big": (0.30, 0.44)},
        size=(144, 192),
        attributes=False,
    ),
}
"""The worlds on board: `shapes` is the default one; `toys` has other words, other pictures and no attributes."""


def load_world(name_or_path: str) -> World:
    """A world by name, or from a YAML file.

    The file is a mapping with any of `shapes` (word: outline), `colours` (word: [red, green, blue] or "#rrggbb"), `sizes` (word: [least,
    greatest]), `size` ([height, width]), `things` ([least, greatest]), `attributes` (true or false), and `like` (a world on board whose
    values hold where the file names none; `shapes` by default).
    """
    if name_or_path in WORLDS:
        return WORLDS[name_or_path]
    path = Path(name_or_path)
    if not path.is_file():
        raise UniterError(f"{unknown_name('world', name_or_path, WORLDS)}, and no such file is there either")
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} is no YAML that can be read: {error}") from error
    known = ("shapes", "colours", "sizes", "size", "things", "attributes", "like")
    if not isinstance(given, dict):
        raise BadInput(f"{path} holds a {type(given).__name__}, expected a mapping with any of {', '.join(known)}")
    for name in given:
        if name not in known:
            raise BadInput(f"{path}: {unknown_name('entry', str(name), known)}")
    like = given.pop("like", "shapes")
    if like not in WORLDS:
        raise BadInput(f"{path}: {unknown_name('world', str(like), WORLDS)}")
    try:
        if "colours" in given:
            given["colours"] = {word: _colour(value) for word, value in given["colours"].items()}
        if "shapes" in given and isinstance(given["shapes"], list):
            given["shapes"] = {word: word for word in given["shapes"]}
        if "sizes" in given:
            given["sizes"] = {word: (float(low), float(high)) for word, (low, high) in given["sizes"].items()}
        for name in ("size", "things"):
            if name in given:
                first, second = given[name]
                given[name] = (int(first), int(second))
        return replace(WORLDS[like], **given)
    except (TypeError, ValueError, AttributeError) as error:
        raise BadInput(f"{path} cannot be understood as a world ({error}); see `uniter-scenes --help` for an example") from error


def _colour(value: Any) -> tuple[int, int, int]:
    if isinstance(value, str) and re.fullmatch(r"#[0-9a-fA-F]{6}", value):
        return int(value[1:3], 16), int(value[3:5], 16), int(value[5:7], 16)
    red, green, blue = value
    return int(red), int(green), int(blue)


# ----------------------------------------------------------------------------------------------------------------- making scenes


def make_scene(world: World, *, seed: int, number: int, captions: int = 5) -> tuple[Scene, NDArray[np.uint8]]:
    """Scene `number` of the world with this seed, and its picture as (H, W, 3) uint8 RGB."""
    rng = np.random.default_rng([seed, number])
    pixels = _ground(world.size, rng)
    things: list[Thing] = []
    for _ in range(int(rng.integers(world.things[0], world.things[1] + 1))):
        thing = _place(world, pixels, things, rng)
        if thing is not None:
            things.append(thing)
    scene = Scene(f"scene_{number:06d}", number, world.size, tuple(things))
    scene = replace(scene, relations=tuple(relations_between(scene.things)))
    picture = np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
    return replace(scene, captions=tuple(make_captions(scene, rng, count=captions))), picture


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
    things = [_with_article(thing.phrase(with_size=bool(rng.random() < 0.4))) for thing in scene.things]
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


def _with_article(phrase: str) -> str:
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


# ------------------------------------------------------------------------------------------------------------------------ files


def write_world(
    out: str | Path,
    *,
    world: World | None = None,
    images: int = 1200,
    held_out: int = 200,
    captions: int = 5,
    seed: int = 0,
    image_format: Literal["jpeg", "png"] = "jpeg",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a world: `images/`, and for `train` and `val` each `instances_*.json`, `captions_*.json` (COCO) and `scenes_*.json`.

    Args:
        out: the folder; `world.json` in it says what it was made with.
        world: the vocabulary; WORLDS["shapes"] by default.
        images: pictures in all, the last `held_out` of them being the `val` part.
        captions: sentences for each picture.
        seed: another seed gives other pictures of the same world.
        overwrite: replace a world that was made with other settings.

    Returns:
        The summary: counts of pictures, things and captions, and the paths.

    Raises:
        SettingsDiffer: the folder holds a world made with other settings.
        BadInput: the numbers contradict each other.
    """
    world = world or WORLDS["shapes"]
    if not 0 <= held_out < images:
        raise BadInput(f"{held_out} of {images} pictures are to be held out, expected fewer held out than there are")
    if captions < 1:
        raise BadInput(f"{captions} captions a picture were asked for, expected at least 1")
    out = Path(out)
    settings = json.loads(
        json.dumps(
            {
                **{"format": FORMAT_VERSION, "seed": seed, "images": images, "held_out": held_out, "captions": captions},
                **{"image_format": image_format, "world": asdict(world)},
            }
        )
    )
    _claim(out, settings, overwrite=overwrite)
    folder = out / "images"
    folder.mkdir(parents=True, exist_ok=True)
    scenes: list[Scene] = []
    wanted: set[str] = set()
    suffix = {"jpeg": ".jpg", "png": ".png"}[image_format]
    with Progress(images, unit="pictures", label="drawing") as progress:
        for number in range(1, images + 1):
            scene, picture = make_scene(world, seed=seed, number=number, captions=captions)
            # 4:4:4: halved colour would smear small things.
            options: dict[str, Any] = {"quality": JPEG_QUALITY, "subsampling": 0} if image_format == "jpeg" else {"compress_level": 6}
            Image.fromarray(picture).save(folder / f"{scene.key}{suffix}", format=image_format.upper(), **options)
            wanted.add(f"{scene.key}{suffix}")
            scenes.append(scene)
            progress.update()
    for path in folder.glob("scene_*"):  # what a world with other settings left
        if path.name not in wanted:
            path.unlink()
    parts = {"train": scenes[: images - held_out], "val": scenes[images - held_out :]}
    for part, members in parts.items():
        write_json(out / f"instances_{part}.json", coco_instances(members, world, suffix=suffix))
        write_json(out / f"captions_{part}.json", coco_captions(members, suffix=suffix))
        write_json(out / f"scenes_{part}.json", {"format": FORMAT_VERSION, "scenes": [asdict(scene) for scene in members]})
    return {
        "out": str(out),
        "images": images,
        "train": len(parts["train"]),
        "held_out": len(parts["val"]),
        "things": sum(len(scene.things) for scene in scenes),
        "captions": sum(len(scene.captions) for scene in scenes),
        "shapes": list(world.shapes),
        "colours": list(world.colours),
        "sizes": list(world.sizes),
    }


def _claim(out: Path, settings: Mapping[str, Any], *, overwrite: bool) -> None:
    """Write `world.json`, or check that the one that is there says the same."""
    path = out / "world.json"
    if path.exists() and not overwrite:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise BadInput(f"{path} is damaged ({error}); pass --overwrite to make the world anew") from error
        if found != settings:
            known = found if isinstance(found, dict) else {}
            differing = [name for name in settings if known.get(name) != settings[name]]
            raise SettingsDiffer(
                f"{out} holds a world made with other settings ({', '.join(differing)} differ); choose another folder or pass --overwrite"
            )
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, settings)


def _coco_images(scenes: Sequence[Scene], suffix: str) -> list[dict[str, Any]]:
    return [{"id": scene.number, "file_name": f"{scene.key}{suffix}", "height": scene.size[0], "width": scene.size[1]} for scene in scenes]


def coco_instances(scenes: Sequence[Scene], world: World, *, suffix: str = ".jpg") -> dict[str, Any]:
    """COCO's instances of these scenes: categories are the world's shapes; colours are `attributes` where the world annotates them."""
    categories = {word: number for number, word in enumerate(world.shapes, start=1)}
    annotations: list[dict[str, Any]] = []
    for scene in scenes:
        for place, thing in enumerate(scene.things):
            x0, y0, x1, y1 = thing.box
            annotation: dict[str, Any] = {
                **{"id": scene.number * 100 + place, "image_id": scene.number, "category_id": categories[thing.shape]},
                **{"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0), "iscrowd": 0},
            }
            if world.attributes:
                annotation["attributes"] = [thing.colour]
            annotations.append(annotation)
    found: dict[str, Any] = {"images": _coco_images(scenes, suffix), "annotations": annotations}
    found["categories"] = [{"id": number, "name": word, "supercategory": "thing"} for word, number in categories.items()]
    if world.attributes:
        found["attributes"] = [{"id": number, "name": word} for number, word in enumerate(world.colours, start=1)]
    return found


def coco_captions(scenes: Sequence[Scene], *, suffix: str = ".jpg") -> dict[str, Any]:
    """COCO's captions of these scenes."""
    annotations = [
        {"id": scene.number * 100 + place, "image_id": scene.number, "caption": caption}
        for scene in scenes
        for place, caption in enumerate(scene.captions)
    ]
    return {"images": _coco_images(scenes, suffix), "annotations": annotations}


def read_scenes(path: str | Path) -> list[Scene]:
    """The scenes of a `scenes_*.json`; BadInput with the path where it is something else."""
    try:
        stored = json.loads(Path(path).read_text(encoding="utf-8"))
        if stored["format"] != FORMAT_VERSION:
            raise ValueError(f"format {stored['format']}, expected {FORMAT_VERSION}")
        return [
            Scene(
                key=scene["key"],
                number=scene["number"],
                size=(scene["size"][0], scene["size"][1]),
                things=tuple(Thing(**{**thing, "box": tuple(thing["box"])}) for thing in scene["things"]),
                relations=tuple(Relation(**relation) for relation in scene["relations"]),
                captions=tuple(scene["captions"]),
            )
            for scene in stored["scenes"]
        ]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise BadInput(f"{path} holds no scenes ({error}); was it written by `uniter-scenes`?") from error
