"""Questions with four answers and four reasons, as VCR publishes them.

What a reader would get wrong: a list of numbers among the words (`[2]`) points at objects of the picture, counted from 0 in the order of
its metadata file.
"""

import json
import random
from pathlib import Path
from typing import Any

from uniter.datasets.made_up.scenes import Scene, Thing
from uniter.datasets.made_up.tasks.telling import OPPOSITE, Parts, absent_phrase, absent_phrases, chance, told_apart, write_lines
from uniter.datasets.made_up.world import World


def write_vcr(folder: Path, world: World, scenes: Parts, suffix: str, images: Path, seed: int) -> int:
    """VCR's JSONL of each part, and the metadata with the boxes of things; returns how many examples there are."""
    metadata = folder / "vcr1images" / "scenes"
    metadata.mkdir(parents=True)
    total = 0
    for part, members in scenes.items():
        rows: list[dict[str, Any]] = []
        for scene in members:
            height, width = scene.size
            boxes = [[*map(float, thing.box), 1.0] for thing in scene.things]
            names = [thing.shape for thing in scene.things]
            segments: list[Any] = [[] for _ in boxes]
            document = {"boxes": boxes, "segms": segments, "names": names, "width": width, "height": height}
            (metadata / f"{scene.key}.json").write_text(json.dumps(document), encoding="utf-8")
            asked = _multiple_choice(world, scene, chance(seed, "vcr", scene.number))
            if asked is None:
                continue
            question, answers, answer, rationales, rationale = asked
            rows.append(
                {
                    "movie": "scenes",
                    "objects": names,
                    "interesting_scores": [1],
                    "answer_likelihood": "likely",
                    "img_fn": f"scenes/{scene.key}{suffix}",
                    "metadata_fn": f"scenes/{scene.key}.json",
                    "answer_orig": _plain(answers[answer]),
                    "question_orig": _plain(question),
                    "rationale_orig": _plain(rationales[rationale]),
                    "question": question,
                    "question_match_iter": 0,
                    "answer_choices": answers,
                    "answer_label": answer,
                    "answer_match_iter": [0] * 4,
                    "rationale_choices": rationales,
                    "rationale_label": rationale,
                    "rationale_match_iter": [0] * 4,
                    "img_id": f"{part}-{len(rows)}",
                    "question_number": 0,
                    "annot_id": f"{part}-{len(rows)}",
                    "match_fold": f"{part}-0",
                    "match_index": 0,
                }
            )
        write_lines(folder / f"{part}.jsonl", rows)
        total += len(rows)
    return total


_Tokens = list[str | list[int]]


def _multiple_choice(world: World, scene: Scene, rng: random.Random) -> tuple[_Tokens, list[_Tokens], int, list[_Tokens], int] | None:
    """A question about a relation of two things, four answers, four reasons, and which are right; None where the picture has none.

    The right answer is a thing of the picture, the wrong ones are mostly not; the wrong reasons name another side or another thing.
    """
    things = scene.things
    alone = set(told_apart(things, Thing.phrase))
    fit = [
        relation
        for relation in scene.relations
        if {things[relation.subject], things[relation.object]} <= alone
        and sum(r.object == relation.object and r.name == relation.name for r in scene.relations) == 1
    ]
    if not fit:
        return None
    relation = rng.choice(fit)
    subject, other = things[relation.subject], things[relation.object]
    question: _Tokens = ["What", "is", *relation.name.split(), "the", *other.phrase().split(), [relation.object], "?"]
    wrong_phrases: list[str] = []
    while len(wrong_phrases) < min(3, len(absent_phrases(world, things))):
        phrase = absent_phrase(world, things, rng)
        if phrase not in wrong_phrases:
            wrong_phrases.append(phrase)
    wrong_phrases += ["invisible thing"] * (3 - len(wrong_phrases))

    def answer(phrase: str) -> _Tokens:
        return ["The", *phrase.split(), [relation.subject], "."]

    def reason(first: str, name: str, second: str) -> _Tokens:
        return ["The", *first.split(), [relation.subject], "stands", *name.split(), "the", *second.split(), [relation.object], "."]

    answers = [answer(phrase) for phrase in (subject.phrase(), *wrong_phrases)]
    one, two = subject.phrase(), other.phrase()
    reasons = [
        reason(one, relation.name, two),
        reason(one, OPPOSITE[relation.name], two),
        reason(wrong_phrases[0], relation.name, two),
        reason(one, relation.name, wrong_phrases[1]),
    ]
    answer_order, reason_order = rng.sample(range(4), 4), rng.sample(range(4), 4)
    return (
        question,
        [answers[k] for k in answer_order],
        answer_order.index(0),
        [reasons[k] for k in reason_order],
        reason_order.index(0),
    )


def _plain(tokens: _Tokens) -> str:
    return " ".join(token if isinstance(token, str) else str(token[0] + 1) for token in tokens)
