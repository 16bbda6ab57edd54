"""The down-stream tasks over a made-up world: annotation files in exactly their authors' formats, from what is known of the scenes.

    vqa/       v2_OpenEnded_mscoco_{train,val}2014_questions.json, v2_mscoco_{train,val}2014_annotations.json
    snli_ve/   snli_ve_{train,dev}.jsonl
    nlvr2/     {train,dev}.json, and images/ with the pictures under NLVR2's names (links to the world's)
    retrieval/ dataset_scenes.json (Karpathy's)
    refcoco/   refs(unc).p, instances.json: short phrases, by looks or by place
    refcoco+/  refs(unc).p, instances.json: by looks only
    refcocog/  refs(umd).p, instances.json: long ones, with a size and another thing
    vcr/       {train,val}.jsonl, vcr1images/scenes/*.json (metadata)

What a reader would get wrong: VQA names a picture by its number only, as COCO's photographs, so its text database is built with
`--key 'scene_{id:06d}'`; NLVR2 names pictures by statement, so its region database is made from nlvr2/images.
"""

import itertools
import json
import os
import pickle
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from uniter.datasets.errors import BadInput
from uniter.datasets.lmdb_store import read_json, write_json
from uniter.datasets.scenes import Relation, Scene, Thing, World, coco_instances

PARTS: Final = ("train", "val")
# What no picture of this world shows: hypotheses about it are neutral.
_UNSEEN: Final = ("is heavy", "was made yesterday", "belongs to a child", "is made of wood", "was expensive", "is warm")
_OPPOSITE: Final = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def write_tasks(world_folder: str | Path, out: str | Path | None = None, *, seed: int = 0) -> dict[str, int]:
    """Write all tasks' annotation files for a world that `write_world` wrote.

    Args:
        world_folder: the world; its scenes_train.json and scenes_val.json are read.
        out: the folder of the tasks; `tasks/` in the world by default. What an earlier call left there is replaced.
        seed: another seed asks other questions about the same pictures.

    Returns:
        How many examples each task has.

    Raises:
        BadInput: the folder holds no world.
    """
    folder = Path(world_folder)
    target = Path(out) if out is not None else folder / "tasks"
    world, suffix, scenes = _read_world(folder)
    counts = {}
    for name, write in _WRITERS.items():
        shutil.rmtree(target / name, ignore_errors=True)
        (target / name).mkdir(parents=True)
        counts[name] = write(target / name, world, scenes, suffix, folder / "images", seed)
    return counts


_Parts = dict[str, list[Scene]]


def _read_world(folder: Path) -> tuple[World, str, _Parts]:
    scenes: _Parts = {}
    for part in PARTS:
        path = folder / f"scenes_{part}.json"
        if not path.is_file() or not (folder / "world.json").is_file():
            raise BadInput(f"{folder} holds no made-up world ({path.name} and world.json are wanted); make one with uniter-scenes")
        scenes[part] = [_scene(entry) for entry in read_json(path)["scenes"]]
    settings = read_json(folder / "world.json")
    given = settings["world"]
    world = World(
        shapes=given["shapes"],
        colours={word: tuple(colour) for word, colour in given["colours"].items()},
        sizes={word: tuple(sides) for word, sides in given["sizes"].items()},
        size=tuple(given["size"]),
        things=tuple(given["things"]),
        attributes=given["attributes"],
    )
    return world, {"jpeg": ".jpg", "png": ".png"}[settings["image_format"]], scenes


def _scene(entry: dict[str, Any]) -> Scene:
    things = tuple(Thing(thing["shape"], thing["colour"], thing["size"], tuple(thing["box"])) for thing in entry["things"])
    relations = tuple(Relation(relation["subject"], relation["name"], relation["object"]) for relation in entry["relations"])
    return Scene(entry["key"], entry["number"], tuple(entry["size"]), things, relations, tuple(entry["captions"]))


def _rng(seed: int, task: str, number: int) -> random.Random:
    return random.Random(f"{task} {seed} {number}")


def _lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _unique(things: Sequence[Thing], text: Callable[[Thing], str]) -> list[Thing]:
    """The things that this text fits alone."""
    times = Counter(map(text, things))
    return [thing for thing in things if times[text(thing)] == 1]


def _phrase(thing: Thing) -> str:
    return thing.phrase()


def _phrase_with_size(thing: Thing) -> str:
    return thing.phrase(with_size=True)


def _with_article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _shown(things: Sequence[Thing]) -> set[str]:
    return {thing.phrase() for thing in things}


def _absent(world: World, things: Sequence[Thing], rng: random.Random) -> str:
    """A coloured shape that the picture does not show: half the time its shape or its colour is there, on another thing."""
    shown = _shown(things)
    every = [f"{colour} {shape}" for colour in world.colours for shape in world.shapes if f"{colour} {shape}" not in shown]
    near = [phrase for phrase in every if any(phrase.endswith(f" {t.shape}") or phrase.startswith(f"{t.colour} ") for t in things)]
    pool = near if near and rng.random() < 0.5 else every
    return rng.choice(pool) if pool else "invisible thing"


# ------------------------------------------------------------------------------------------------------------------------- VQA


def _questions(world: World, scene: Scene, rng: random.Random) -> Iterator[tuple[str, str, str, list[str]]]:
    """(question, answer, type of the answer, what somebody might say instead)."""
    things = scene.things
    for thing in _unique(things, lambda one: one.shape):
        yield f"What colour is the {thing.shape}?", thing.colour, "other", [c for c in world.colours if c != thing.colour]
    for thing in _unique(things, lambda one: one.colour):
        yield f"What is the {thing.colour} thing?", thing.shape, "other", [s for s in world.shapes if s != thing.shape]
    yield "How many things are there?", str(len(things)), "number", [str(len(things) + 1)]
    if things:
        yield f"Is there {_with_article(rng.choice(things).phrase())}?", "yes", "yes/no", ["no"]
    yield f"Is there {_with_article(_absent(world, things, rng))}?", "no", "yes/no", ["yes"]
    for relation in scene.relations:
        subject, other = things[relation.subject], things[relation.object]
        alone = sum(r.object == relation.object and r.name == relation.name for r in scene.relations) == 1
        if alone and other in _unique(things, _phrase):
            yield f"What is {relation.name} the {other.phrase()}?", subject.shape, "other", [s for s in world.shapes if s != subject.shape]


def _write_vqa(folder: Path, world: World, scenes: _Parts, suffix: str, images: Path, seed: int) -> int:
    total = 0
    for part, members in scenes.items():
        questions, annotations = [], []
        for scene in members:
            rng = _rng(seed, "vqa", scene.number)
            asked = list(_questions(world, scene, rng))
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


# --------------------------------------------------------------------------------------------------------------------- SNLI-VE


def _write_entailment(folder: Path, world: World, scenes: _Parts, suffix: str, images: Path, seed: int) -> int:
    total = 0
    for part, members in scenes.items():
        rows: list[dict[str, Any]] = []
        for scene in members:
            rng = _rng(seed, "snli_ve", scene.number)
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
        _lines(folder / f"snli_ve_{'dev' if part == 'val' else part}.jsonl", rows)
        total += len(rows)
    return total


def _hypotheses(world: World, scene: Scene, rng: random.Random) -> Iterator[tuple[str, str]]:
    things = scene.things
    yield "entailment", f"There is {_with_article(rng.choice(things).phrase())}."
    yield "contradiction", f"There is {_with_article(_absent(world, things, rng))}."
    yield "neutral", f"The {rng.choice(things).phrase()} {rng.choice(_UNSEEN)}."
    certain = [
        relation for relation in scene.relations if {things[relation.subject], things[relation.object]} <= set(_unique(things, _phrase))
    ]
    if certain:
        relation = rng.choice(certain)
        subject, other = things[relation.subject].phrase(), things[relation.object].phrase()
        yield "entailment", f"The {subject} is {relation.name} the {other}."
        yield "contradiction", f"The {subject} is {_OPPOSITE[relation.name]} the {other}."


# ----------------------------------------------------------------------------------------------------------------------- NLVR2


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


def _write_nlvr2(folder: Path, world: World, scenes: _Parts, suffix: str, images: Path, seed: int) -> int:
    (folder / "images").mkdir()
    total = 0
    for part, members in scenes.items():
        name = "dev" if part == "val" else part
        rows: list[dict[str, Any]] = []
        # A set: two pairs of pictures, and statements that hold for one of them only (where one is found).
        for number, four in enumerate(members[start : start + 4] for start in range(0, len(members) - 3, 4)):
            rng = _rng(seed, "nlvr2", four[0].number)
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
        _lines(folder / f"{name}.json", rows)
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


# ------------------------------------------------------------------------------------------------------------------- retrieval


def _write_retrieval(folder: Path, world: World, scenes: _Parts, suffix: str, images: Path, seed: int) -> int:
    entries: list[dict[str, Any]] = []
    sentence = 0
    for part, members in scenes.items():
        for place, scene in enumerate(members):
            split = part if part == "train" else ("val", "test")[place % 2]
            ids = list(range(sentence, sentence + len(scene.captions)))
            sentence += len(ids)
            entries.append(
                {
                    "filepath": "images",
                    "sentids": ids,
                    "filename": f"{scene.key}{suffix}",
                    "imgid": len(entries),
                    "split": split,
                    "sentences": [
                        {"tokens": text.replace(",", "").split(), "raw": text, "imgid": len(entries), "sentid": number}
                        for number, text in zip(ids, scene.captions, strict=True)
                    ],
                    "cocoid": scene.number,
                }
            )
    write_json(folder / "dataset_scenes.json", {"images": entries, "dataset": "scenes"})
    return sentence


# --------------------------------------------------------------------------------------------------------------------- RefCOCO


def _phrases_by_looks(scene: Scene, thing: Thing) -> list[str]:
    """What names this thing and no other of the picture by what it looks like, shortest first: RefCOCO+ allows nothing else."""
    things = scene.things
    phrases = []
    if thing in _unique(things, lambda one: one.shape):
        phrases.append(thing.shape)
    if thing in _unique(things, lambda one: one.colour):
        phrases.append(f"{thing.colour} thing")
    if thing in _unique(things, _phrase):
        phrases.append(thing.phrase())
    if thing in _unique(things, _phrase_with_size):
        phrases.append(thing.phrase(with_size=True))
    return phrases


def _phrases_by_place(scene: Scene, thing: Thing) -> list[str]:
    """What names it by where it is: on one side of the picture, or of another thing."""
    things = scene.things
    phrases = []
    half = scene.size[1] / 2
    for side, is_there in (("left", thing.centre[0] < half), ("right", thing.centre[0] > half)):
        beside = [one for one in things if (one.centre[0] <= half if side == "left" else one.centre[0] >= half)]
        if is_there and thing in _unique(beside, lambda one: one.shape):
            phrases.append(f"{side} {thing.shape}")
        if is_there and thing in _unique(beside, lambda one: one.colour):
            phrases.append(f"{thing.colour} thing on the {side}")
    place = things.index(thing)
    for relation in scene.relations:
        other = things[relation.object]
        rivals = [r for r in scene.relations if r.object == relation.object and r.name == relation.name and r.subject != place]
        if relation.subject == place and other in _unique(things, _phrase) and all(things[r.subject].shape != thing.shape for r in rivals):
            phrases.append(f"{thing.shape} {relation.name} the {other.phrase()}")
    return phrases


def _short_phrases(scene: Scene, thing: Thing) -> list[str]:
    return _phrases_by_looks(scene, thing) + _phrases_by_place(scene, thing)


def _long_phrases(scene: Scene, thing: Thing) -> list[str]:
    """Whole descriptions: a thing with size and colour, and where another one, described as fully, stands from it."""
    things = scene.things
    phrases = []
    place = things.index(thing)
    for relation in scene.relations:
        other = things[relation.object]
        rivals = [r for r in scene.relations if r.object == relation.object and r.name == relation.name and r.subject != place]
        alone = other in _unique(things, _phrase_with_size)
        if relation.subject == place and alone and all(_phrase_with_size(things[r.subject]) != _phrase_with_size(thing) for r in rivals):
            phrases.append(f"the {_phrase_with_size(thing)} that is {relation.name} the {_phrase_with_size(other)}")
    return phrases


_Describe = Callable[[Scene, Thing], list[str]]


def _write_referring(
    folder: Path,
    world: World,
    scenes: _Parts,
    suffix: str,
    images: Path,
    seed: int,
    *,
    describe: _Describe,
    by: str,
    held_out: tuple[str, ...],
) -> int:
    refs: list[dict[str, Any]] = []
    sentence = 0
    everything = [scene for part in PARTS for scene in scenes[part]]
    instances = coco_instances(everything, world, suffix=suffix)
    categories = {annotation["id"]: annotation["category_id"] for annotation in instances["annotations"]}
    for part in PARTS:
        for place, scene in enumerate(scenes[part]):
            rng = _rng(seed, folder.name, scene.number)
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


# ------------------------------------------------------------------------------------------------------------------------- VCR


def _write_vcr(folder: Path, world: World, scenes: _Parts, suffix: str, images: Path, seed: int) -> int:
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
            asked = _multiple_choice(world, scene, _rng(seed, "vcr", scene.number))
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
        _lines(folder / f"{part}.jsonl", rows)
        total += len(rows)
    return total


_Tokens = list[str | list[int]]


def _multiple_choice(world: World, scene: Scene, rng: random.Random) -> tuple[_Tokens, list[_Tokens], int, list[_Tokens], int] | None:
    """A question about a relation of two things, four answers, four reasons, and which are right; None where the picture has none.

    The right answer is a thing of the picture, the wrong ones are mostly not; the wrong reasons name another side or another thing.
    """
    things = scene.things
    alone = set(_unique(things, _phrase))
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
    while len(wrong_phrases) < 3:
        phrase = _absent(world, things, rng)
        if phrase not in wrong_phrases or phrase == "invisible thing":
            wrong_phrases.append(phrase)

    def answer(phrase: str) -> _Tokens:
        return ["The", *phrase.split(), [relation.subject], "."]

    def reason(first: str, name: str, second: str) -> _Tokens:
        return ["The", *first.split(), [relation.subject], "stands", *name.split(), "the", *second.split(), [relation.object], "."]

    answers = [answer(phrase) for phrase in (subject.phrase(), *wrong_phrases)]
    one, two = subject.phrase(), other.phrase()
    reasons = [
        reason(one, relation.name, two),
        reason(one, _OPPOSITE[relation.name], two),
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


_WRITERS: Final[dict[str, Callable[[Path, World, _Parts, str, Path, int], int]]] = {
    "vqa": _write_vqa,
    "snli_ve": _write_entailment,
    "nlvr2": _write_nlvr2,
    "retrieval": _write_retrieval,
    "refcoco": partial(_write_referring, describe=_short_phrases, by="unc", held_out=("val", "testA", "testB")),
    "refcoco+": partial(_write_referring, describe=_phrases_by_looks, by="unc", held_out=("val", "testA", "testB")),
    "refcocog": partial(_write_referring, describe=_long_phrases, by="umd", held_out=("val", "test")),
    "vcr": _write_vcr,
}
