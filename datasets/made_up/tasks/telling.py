"""What every task of the made-up world needs: phrases for things, and what a scene lacks."""

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


def random_of(seed: int, task: str, number: int) -> random.Random:
    return random.Random(f"{task} {seed} {number}")


def lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def unique(things: Sequence[Thing], text: Callable[[Thing], str]) -> list[Thing]:
    """The things that this text fits alone."""
    times = Counter(map(text, things))
    return [thing for thing in things if times[text(thing)] == 1]


def phrase_for(thing: Thing) -> str:
    return thing.phrase()


def phrase_with_size(thing: Thing) -> str:
    return thing.phrase(with_size=True)


def with_article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _shown(things: Sequence[Thing]) -> set[str]:
    return {thing.phrase() for thing in things}


def absent(world: World, things: Sequence[Thing], rng: random.Random) -> str:
    """A coloured shape that the picture does not show: half the time its shape or its colour is there, on another thing."""
    shown = _shown(things)
    every = [f"{colour} {shape}" for colour in world.colours for shape in world.shapes if f"{colour} {shape}" not in shown]
    near = [phrase for phrase in every if any(phrase.endswith(f" {t.shape}") or phrase.startswith(f"{t.colour} ") for t in things)]
    pool = near if near and rng.random() < 0.5 else every
    return rng.choice(pool) if pool else "invisible thing"
