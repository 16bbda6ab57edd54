"""Statements about two made-up scenes, as NLVR2 publishes them.

What a reader would get wrong: NLVR2 names a picture by its pair ("train-0-1-img0"), so a scene's picture stands in `images/` under such a
name (a link), and its regions are extracted from there.
"""

import itertools
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from uniter.datasets.made_up.scenes import Scene
from uniter.datasets.made_up.tasks.telling import Parts, chance, write_lines
from uniter.datasets.made_up.world import World

Holds = Callable[[Scene, Scene], bool]


def _statements(world: World, rng: random.Random) -> Iterator[tuple[str, Holds]]:
    """Statements about a left and a right picture, each with its truth, without end."""
    while True:
        yield _statement(world, rng)


def _statement(world: World, rng: random.Random) -> tuple[str, Holds]:
    shape, colour, count = rng.choice(list(world.shapes)), rng.choice(list(world.colours)), rng.randint(*world.things)

    def has_shape(scene: Scene) -> bool:
        return any(thing.shape == shape for thing in scene.things)

    def has_colour(scene: Scene) -> bool:
        return any(thing.colour == colour for thing in scene.things)

    offered: list[tuple[str, Holds]] = [
        (f"At least one of the pictures shows a {shape}.", lambda left, right: has_shape(left) or has_shape(right)),
        (f"The left picture shows a {shape}.", lambda left, right: has_shape(left)),
        (f"The right picture shows something {colour}.", lambda left, right: has_colour(right)),
        (f"Exactly one of the pictures shows something {colour}.", lambda left, right: has_colour(left) != has_colour(right)),
        (f"There are {count} things in the left picture.", lambda left, right: len(left.things) == count),
        ("There are more things in the left picture than in the right one.", lambda left, right: len(left.things) > len(right.things)),
    ]
    return rng.choice(offered)


def write_nlvr2(folder: Path, world: World, scenes: Parts, suffix: str, images: Path, seed: int) -> int:
    """NLVR2's JSONL of each part, and the pictures in pairs under its names; returns how many examples there are."""
    (folder / "images").mkdir()
    total = 0
    for part, members in scenes.items():
        name = "dev" if part == "val" else part
        rows: list[dict[str, Any]] = []
        # A set: two pairs of pictures, and statements that hold for one of them only (where one is found).
        for number, four in enumerate(members[start : start + 4] for start in range(0, len(members) - 3, 4)):
            rng = chance(seed, "nlvr2", four[0].number)
            pairs = [(four[0], four[1]), (four[2], four[3])]
            for place, pair in enumerate(pairs):
                for side, scene in enumerate(pair):
                    _link(images / f"{scene.key}{suffix}", folder / "images" / f"{name}-{number}-{place}-img{side}{suffix}")
            for sentence_number, (sentence, holds) in enumerate(_telling(_statements(world, rng), pairs, count=3)):
                for place, (left, right) in enumerate(pairs):
                    rows.append(
                        {
                            "sentence": sentence,
                            "left_url": f"{left.key}{suffix}",
                            "right_url": f"{right.key}{suffix}",
                            "writer": 0,
                            "label": str(holds(left, right)),
                            "identifier": f"{name}-{number}-{place}-{sentence_number}",
                            "directory": number % 100,
                            "synset": "made-up",
                            "query": "scenes",
                        }
                    )
        write_lines(folder / f"{name}.json", rows)
        total += len(rows)
    return total


def _telling(statements: Iterator[tuple[str, Holds]], pairs: Sequence[tuple[Scene, Scene]], *, count: int) -> Iterator[tuple[str, Holds]]:
    """`count` different statements that are true of one pair and false of another; others where 60 tries find none."""
    said: set[str] = set()
    tried: list[tuple[str, Holds]] = []
    for sentence, holds in itertools.islice(statements, 60):
        if sentence in said:
            continue
        said.add(sentence)
        if len({holds(left, right) for left, right in pairs}) == 2:
            yield sentence, holds
            count -= 1
        else:
            tried.append((sentence, holds))
        if not count:
            return
    yield from tried[:count]


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
