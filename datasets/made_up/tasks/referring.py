"""Phrases that single out one thing, as RefCOCO, RefCOCO+ and RefCOCOg publish them.

What a reader would get wrong: `refs(...).p` is a pickle, as its authors' is; it is written here and read without executing anything.
"""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from uniter.datasets.made_up.files import coco_instances
from uniter.datasets.made_up.scenes import Scene, Thing
from uniter.datasets.made_up.tasks.telling import PARTS, Parts, chance, told_apart, whole_phrase
from uniter.datasets.made_up.world import World
from uniter.datasets.storage.files import write_json


def phrases_by_looks(scene: Scene, thing: Thing) -> list[str]:
    """What names this thing and no other of the picture by what it looks like, shortest first: RefCOCO+ allows nothing else."""
    things = scene.things
    phrases = []
    if thing in told_apart(things, lambda one: one.shape):
        phrases.append(thing.shape)
    if thing in told_apart(things, lambda one: one.colour):
        phrases.append(f"{thing.colour} thing")
    if thing in told_apart(things, Thing.phrase):
        phrases.append(thing.phrase())
    if thing in told_apart(things, whole_phrase):
        phrases.append(thing.phrase(with_size=True))
    return phrases


def _phrases_by_place(scene: Scene, thing: Thing) -> list[str]:
    """What names it by where it is: on one side of the picture, or of another thing."""
    things = scene.things
    phrases = []
    half = scene.size[1] / 2
    for side, is_there in (("left", thing.centre[0] < half), ("right", thing.centre[0] > half)):
        beside = [one for one in things if (one.centre[0] <= half if side == "left" else one.centre[0] >= half)]
        if is_there and thing in told_apart(beside, lambda one: one.shape):
            phrases.append(f"{side} {thing.shape}")
        if is_there and thing in told_apart(beside, lambda one: one.colour):
            phrases.append(f"{thing.colour} thing on the {side}")
    place = things.index(thing)
    for relation in scene.relations:
        other = things[relation.object]
        rivals = [r for r in scene.relations if r.object == relation.object and r.name == relation.name and r.subject != place]
        if (
            relation.subject == place
            and other in told_apart(things, Thing.phrase)
            and all(things[r.subject].shape != thing.shape for r in rivals)
        ):
            phrases.append(f"{thing.shape} {relation.name} the {other.phrase()}")
    return phrases


def short_phrases(scene: Scene, thing: Thing) -> list[str]:
    """Phrases that fit one thing of the scene alone, by its looks or its place; none where nothing tells it apart."""
    return phrases_by_looks(scene, thing) + _phrases_by_place(scene, thing)


def long_phrases(scene: Scene, thing: Thing) -> list[str]:
    """Whole descriptions: a thing with size and colour, and where another one, described as fully, stands from it."""
    things = scene.things
    phrases = []
    place = things.index(thing)
    for relation in scene.relations:
        other = things[relation.object]
        rivals = [r for r in scene.relations if r.object == relation.object and r.name == relation.name and r.subject != place]
        alone = other in told_apart(things, whole_phrase)
        if relation.subject == place and alone and all(whole_phrase(things[r.subject]) != whole_phrase(thing) for r in rivals):
            phrases.append(f"the {whole_phrase(thing)} that is {relation.name} the {whole_phrase(other)}")
    return phrases


_Describe = Callable[[Scene, Thing], list[str]]


def write_referring(
    folder: Path,
    world: World,
    scenes: Parts,
    suffix: str,
    images: Path,
    seed: int,
    *,
    describe: _Describe,
    by: str,
    held_out: tuple[str, ...],
) -> int:
    """RefCOCO's `refs` and `instances.json`; returns how many examples there are."""
    refs: list[dict[str, Any]] = []
    sentence = 0
    everything = [scene for part in PARTS for scene in scenes[part]]
    instances = coco_instances(everything, world, suffix=suffix)
    categories = {annotation["id"]: annotation["category_id"] for annotation in instances["annotations"]}
    for part in PARTS:
        for place, scene in enumerate(scenes[part]):
            rng = chance(seed, folder.name, scene.number)
            for number, thing in enumerate(scene.things):
                phrases = describe(scene, thing)
                if not phrases:
                    continue
                chosen = rng.sample(phrases, min(3, len(phrases)))
                ids = list(range(sentence, sentence + len(chosen)))
                sentence += len(ids)
                annotation = scene.number * 100 + number
                refs.append(
                    {
                        "sent_ids": ids,
                        "file_name": f"{scene.key}_{annotation}{suffix}",
                        "ann_id": annotation,
                        "ref_id": len(refs),
                        "image_id": scene.number,
                        "split": part if part == "train" else held_out[place % len(held_out)],
                        "sentences": [
                            {"tokens": text.split(), "raw": text, "sent_id": n, "sent": text} for n, text in zip(ids, chosen, strict=True)
                        ],
                        "category_id": categories[annotation],
                    }
                )
    with open(folder / f"refs({by}).p", "wb") as file:
        pickle.dump(refs, file, protocol=2)  # what its authors' Python 2 wrote
    write_json(folder / "instances.json", instances)
    return sentence
