"""Captions of made-up scenes whose phrases are tied to boxes, as Flickr30k Entities publishes them.

What a reader would get wrong: things that look alike are one entity with several boxes.
"""

from collections.abc import Sequence
from pathlib import Path

from markupsafe import escape

from uniter.datasets.made_up.scenes import Scene, Thing, with_article
from uniter.datasets.made_up.tasks.telling import Parts, chance
from uniter.datasets.made_up.world import World


def write_entities(folder: Path, world: World, scenes: Parts, suffix: str, images: Path, seed: int) -> int:
    """Flickr30k Entities' `Sentences/` and `Annotations/`, and the photographs of each part; returns how many examples there are."""
    (folder / "Annotations").mkdir()
    (folder / "Sentences").mkdir()
    total = 0
    for part, members in scenes.items():
        for scene in members:
            numbers = {phrase: 1 + number for number, phrase in enumerate(dict.fromkeys(map(Thing.phrase, scene.things)))}
            rng = chance(seed, "flickr30k_entities", scene.number)
            sentences = []
            for _ in range(2):
                told = list(dict.fromkeys(map(Thing.phrase, rng.sample(scene.things, min(2, len(scene.things))))))
                tied = [f"[/EN#{scene.number * 100 + numbers[phrase]}/other {with_article(phrase)}]" for phrase in told]
                sentences.append(f"{' and '.join(tied)} on [/EN#0/notvisual a plain ground] .")
                total += len(told)
            (folder / "Sentences" / f"{scene.key}.txt").write_text("".join(f"{sentence}\n" for sentence in sentences), encoding="utf-8")
            (folder / "Annotations" / f"{scene.key}.xml").write_text(_annotation(scene, numbers, suffix), encoding="utf-8")
        (folder / f"{part}.txt").write_text("".join(f"{scene.key}\n" for scene in members), encoding="utf-8")
    return total


def _annotation(scene: Scene, numbers: dict[str, int], suffix: str) -> str:
    height, width = scene.size
    objects = [_object(scene.number * 100 + numbers[thing.phrase()], thing.box) for thing in scene.things]
    return (
        f"<annotation>\n<filename>{escape(scene.key + suffix)}</filename>\n"
        f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>\n{''.join(objects)}</annotation>\n"
    )


def _object(number: int, box: Sequence[float]) -> str:
    corners = zip(("xmin", "ymin", "xmax", "ymax"), (box[0], box[1], box[2] - 1, box[3] - 1), strict=True)
    inside = "".join(f"<{name}>{round(value)}</{name}>" for name, value in corners)
    return f"<object><name>{number}</name><bndbox>{inside}</bndbox></object>\n"
