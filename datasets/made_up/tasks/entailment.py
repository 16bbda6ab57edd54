"""Hypotheses about made-up scenes, as SNLI-VE publishes them.

What a reader would get wrong: "neutral" is what no picture could show (what a thing is made of, whose it is), not what is hard to see.
"""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from uniter.datasets.made_up.scenes import Scene, Thing, with_article
from uniter.datasets.made_up.tasks.telling import OPPOSITE, Parts, absent_phrase, chance, told_apart, write_lines
from uniter.datasets.made_up.world import World

# What no picture of this world shows: hypotheses about it are neutral.
_UNSEEN: Final = ("is heavy", "was made yesterday", "belongs to a child", "is made of wood", "was expensive", "is warm")


def write_entailment(folder: Path, world: World, scenes: Parts, suffix: str, images: Path, seed: int) -> int:
    """SNLI-VE's JSONL of each part: sentences that follow from a picture, that contradict it, or neither; returns how many there are."""
    total = 0
    for part, members in scenes.items():
        rows: list[dict[str, Any]] = []
        for scene in members:
            rng = chance(seed, "snli_ve", scene.number)
            if not scene.things:
                continue
            premise = scene.captions[0] if scene.captions else "a picture"
            for label, hypothesis in _hypotheses(world, scene, rng):
                pair = f"{scene.key}{suffix}#0r{len(rows)}{label[0]}"
                rows.append(
                    {
                        "annotator_labels": [label] * 3,
                        "captionID": f"{scene.key}{suffix}#0",
                        "gold_label": label,
                        "pairID": pair,
                        "sentence1": premise,
                        "sentence2": hypothesis,
                        "Flickr30K_ID": scene.key,
                    }
                )
        write_lines(folder / f"snli_ve_{'dev' if part == 'val' else part}.jsonl", rows)
        total += len(rows)
    return total


def _hypotheses(world: World, scene: Scene, rng: random.Random) -> Iterator[tuple[str, str]]:
    things = scene.things
    yield "entailment", f"There is {with_article(rng.choice(things).phrase())}."
    yield "contradiction", f"There is {with_article(absent_phrase(world, things, rng))}."
    yield "neutral", f"The {rng.choice(things).phrase()} {rng.choice(_UNSEEN)}."
    certain = [
        relation
        for relation in scene.relations
        if {things[relation.subject], things[relation.object]} <= set(told_apart(things, Thing.phrase))
    ]
    if certain:
        relation = rng.choice(certain)
        subject, other = things[relation.subject].phrase(), things[relation.object].phrase()
        yield "entailment", f"The {subject} is {relation.name} the {other}."
        yield "contradiction", f"The {subject} is {OPPOSITE[relation.name]} the {other}."
