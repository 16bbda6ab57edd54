"""Questions with one answer each about made-up scenes, as GQA publishes them.

What a reader would get wrong: ids are texts with zeros in front, and an image is named by its key.
"""

from pathlib import Path
from typing import Any

from uniter.datasets.made_up.tasks.telling import Parts, chance
from uniter.datasets.made_up.tasks.vqa import questions_about
from uniter.datasets.made_up.world import World
from uniter.datasets.storage.files import write_json


def write_gqa(folder: Path, world: World, scenes: Parts, suffix: str, images: Path, seed: int) -> int:
    """GQA's questions of each part, four a picture at most; returns how many examples there are."""
    total = 0
    for part, members in scenes.items():
        questions: dict[str, Any] = {}
        for scene in members:
            asked = list(questions_about(world, scene, chance(seed, "gqa", scene.number)))
            for place, (question, answer, kind, _) in enumerate(chance(seed, "gqa chosen", scene.number).sample(asked, min(4, len(asked)))):
                questions[f"{scene.number * 100 + place:08d}"] = {
                    "question": question,
                    "imageId": scene.key,
                    "answer": answer,
                    "fullAnswer": f"{answer.capitalize()}.",
                    "isBalanced": True,
                    "types": {"structural": "verify" if kind == "yes/no" else "query", "semantic": "attr", "detailed": kind},
                    "entailed": [],
                    "equivalent": [],
                }
        write_json(folder / f"{part}_balanced_questions.json", questions)
        total += len(questions)
    return total
