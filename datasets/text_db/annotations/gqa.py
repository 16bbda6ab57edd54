"""GQA: `{train,val,testdev}_balanced_questions.json` as published, an object {question id: question}; test parts have no answers.

The answers are all those of the balanced train and val questions (1,842 of the published ones), as they are: one right answer a question,
and no normalisation. What a reader would get wrong: ids are texts ("02930152"), and so are the images' ("n161313" beside Visual Genome's).

Source: cs.stanford.edu/people/dorarad/gqa; the rule of the answers as in github.com/airsplay/lxmert.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from uniter.datasets.errors import BadInput
from uniter.datasets.storage.streams import first_character, json_pairs, object_of
from uniter.datasets.text_db.annotations.fields import Stamps, answer_list, no_split, stamps, text_field
from uniter.datasets.text_db.caption import Caption


def read_gqa(path: Path, *, split: str | None, join: Sequence[Path], counts: Counter[str], files: Sequence[Path] = ()) -> Iterator[Caption]:
    """The questions in order, with `question` and, where it is known, `answer` and `target` {labels, scores}.

    `counts` receives `without_known_answer` (kept, the labels are empty).

    Args:
        join: a list of answers, or further files of questions whose answers are learnt too.
        files: all files of the database, whose answers are learnt; by default `path` alone.

    Raises:
        BadInput: it is no file of GQA's questions, or a question lacks its text or its image.
    """
    no_split(path, split, "GQA")
    table = _table(tuple(files) or (path,), join)
    for number, entry, where in _questions(path):
        question, image = text_field(entry, "question", where), text_field(entry, "imageId", where)
        fields: dict[str, Any] = {"question_id": number, "question": question}
        if entry.get("answer") is not None:
            fields["answer"] = answer = text_field(entry, "answer", where)
            labels = [table[answer]] if answer in table else []
            fields["target"] = {"labels": labels, "scores": [1.0] * len(labels)}
            counts["without_known_answer"] += not labels
        origins = (("vg", image),) if image.isascii() and image.isdecimal() else ()
        yield Caption(number, f"{image}.jpg", question, origins, fields)


def side_files(paths: Sequence[Path], *, split: str | None, join: Sequence[Path], files: Sequence[Path] = ()) -> dict[str, Any]:
    """`ans2label.json`, {answer: number}; nothing where no answers are known (a test part)."""
    table = _table(tuple(files) or tuple(paths), join)
    return {"ans2label.json": dict(table)} if table else {}


def _table(files: Sequence[Path], join: Sequence[Path]) -> Mapping[str, int]:
    """The answers by number: the given ones, or those of all questions, by how often they are right."""
    questions = [path for path in join if _is_questions(path)]
    lists = [path for path in join if path not in questions]
    if len(lists) > 1 or (lists and questions):
        raise BadInput(f"{join[0]} and {join[1]} were given with --join; expected one list of answers, or further files of questions")
    return answer_list(lists[0]) if lists else _answers(stamps([*files, *questions]))


@lru_cache(maxsize=2)  # a million questions
def _answers(files: Stamps) -> Mapping[str, int]:
    times: Counter[str] = Counter()
    for path, _, _ in files:
        for _, entry, where in _questions(path):
            if entry.get("answer") is not None:
                times[text_field(entry, "answer", where)] += 1
    return {answer: number for number, answer in enumerate(sorted(times, key=lambda answer: (-times[answer], answer)))}


def _is_questions(path: Path) -> bool:
    return first_character(path) == "{" and all(isinstance(entry, dict) for _, entry in islice(json_pairs(path), 1))


def _questions(path: Path) -> Iterator[tuple[str, dict[str, Any], str]]:
    if first_character(path) != "{":
        raise BadInput(f"{path} is no file of GQA's questions; expected {{question id: question}} as in train_balanced_questions.json")
    found = False
    for number, value in json_pairs(path):
        found = True
        where = f"question {number[:40]!r} of {path}"
        yield number, object_of(value, where), where
    if not found:
        raise BadInput(f"{path} holds no questions; expected GQA's train_balanced_questions.json")
