"""What every task of the made-up world needs: phrases that fit one thing alone, phrases that fit none, chance, files of lines.

What a reader would get wrong: chance is that of one scene of one task. A question about scene 7 stays the same when the world grows, and
when another task is added.
"""

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from uniter.datasets.made_up.scenes import Scene, Thing
from uniter.datasets.made_up.world import World

PARTS: Final = ("train", "val")
OPPOSITE: Final = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
Parts = dict[str, list[Scene]]


def chance(seed: int, task: str, number: int) -> random.Random:
    """What decides all about scene `number` in this task."""
    return random.Random(f"{task} {seed} {number}")


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """JSON, an object on each line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def told_apart(things: Sequence[Thing], text: Callable[[Thing], str]) -> list[Thing]:
    """The things that this text of theirs fits alone."""
    times = Counter(map(text, things))
    return [thing for thing in things if times[text(thing)] == 1]


def whole_phrase(thing: Thing) -> str:
    """Size, colour and shape."""
    return thing.phrase(with_size=True)


def absent_phrases(world: World, things: Sequence[Thing]) -> list[str]:
    """All coloured shapes that the picture does not show; few in a small world."""
    shown = {thing.phrase() for thing in things}
    return [f"{colour} {shape}" for colour in world.colours for shape in world.shapes if f"{colour} {shape}" not in shown]


def absent_phrase(world: World, things: Sequence[Thing], rng: random.Random) -> str:
    """A coloured shape that the picture does not show: half the time its shape or its colour is there, on another thing."""
    every = absent_phrases(world, things)
    near = [phrase for phrase in every if any(phrase.endswith(f" {t.shape}") or phrase.startswith(f"{t.colour} ") for t in things)]
    pool = near if near and rng.random() < 0.5 else every
    return rng.choice(pool) if pool else "invisible thing"
