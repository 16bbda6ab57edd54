"""What a made-up world knows: its words for shapes, colours and sizes, and how its pictures look; the worlds on board, and YAML files.

What a reader would get wrong: sizes are fractions of the picture's shorter side and of the square that a thing is drawn in, not of its box.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from uniter.datasets.errors import BadInput, WrongUsage, unknown_name
from uniter.datasets.made_up.outlines import OUTLINES


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


# `shapes` is the default one; `toys` has other words, other pictures and no attributes.
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
        raise WrongUsage(f"{unknown_name('world', name_or_path, WORLDS)}, and no such file is there either")
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
