"""Questions and answers about made-up scenes, as VQA publishes them.

What a reader would get wrong: ten people answer each question, and in some of them one to three say something else: scores are soft.
"""

import random
from collections.abc import Iterator
from pathlib import Path

from uniter.datasets.made_up.scenes import Scene, Thing, with_article
from uniter.datasets.made_up.tasks.telling import Parts, absent_phrase, chance, told_apart
from uniter.datasets.made_up.world import World
from uniter.datasets.storage.files import write_json


def questions_about(world: World, scene: Scene, rng: random.Random) -> Iterator[tuple[str, str, str, list[str]]]:
    """(question, answer, type of the answer, what somebody might say instead)."""
    things = scene.things
    for thing in told_apart(things, lambda one: one.shape):
        yield f"What colour is the {thing.shape}?", thing.colour, "other", [c for c in world.colours if c != thing.colour]
    for thing in told_apart(things, lambda one: one.colour):
        yield f"What is the {thing.colour} thing?", thing.shape, "other", [s for s in world.shapes if s != thing.shape]
    yield "How many things are there?", str(len(things)), "number", [str(len(things) + 1)]
    if things:
        yield f"Is there {with_article(rng.choice(things).phrase())}?", "yes", "yes/no", ["no"]
    yield f"Is there {with_article(absent_phrase(world, things, rng))}?", "no", "yes/no", ["yes"]
    for relation in scene.relations:
        subject, other = things[relation.subject], things[relation.object]
        alone = sum(r.object == relation.object and r.name == relation.name for r in scene.relations) == 1
        if alone and other in told_apart(things, Thing.phrase):
            yield f"What is {relation.name} the {other.phrase()}?", subject.shape, "other", [s for s in world.shapes if s != subject.shape]


def write_vqa(folder: Path, world: World, scenes: Parts, suffix: str, images: Path, seed: int) -> int:
    """VQA 2.0's questions and annotations of each part, ten answers a question; returns how many examples there are."""
    total = 0
    for part, members in scenes.items():
        questions, annotations = [], []
        for scene in members:
            rng = chance(seed, "vqa", scene.number)
            asked = list(questions_about(world, scene, rng))
            for place, (question, answer, kind, others) in enumerate(rng.sample(asked, min(4, len(asked)))):
                number = scene.number * 1000 + place
                people = [answer] * 10
                if others and rng.random() < 0.3:
                    differing = rng.randint(1, 3)
                    people[:differing] = [rng.choice(others)] * differing
                    rng.shuffle(people)
                questions.append({"image_id": scene.number, "question": question, "question_id": number})
                annotations.append(
                    {
                        "question_type": " ".join(question.lower().rstrip("?").split()[:2]),
                        "multiple_choice_answer": answer,
                        "answers": [{"answer": said, "answer_confidence": "yes", "answer_id": n} for n, said in enumerate(people, start=1)],
                        "image_id": scene.number,
                        "answer_type": kind,
                        "question_id": number,
                    }
                )
        head = {"info": {"description": "a made-up world"}, "license": {}, "data_type": "mscoco", "data_subtype": f"{part}2014"}
        write_json(folder / f"v2_OpenEnded_mscoco_{part}2014_questions.json", {**head, "task_type": "Open-Ended", "questions": questions})
        write_json(folder / f"v2_mscoco_{part}2014_annotations.json", {**head, "annotations": annotations})
        total += len(questions)
    return total
