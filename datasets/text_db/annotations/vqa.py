"""VQA v2's questions and annotations; Visual Genome's questions in the same layout or in its own; a table of one's own questions.

A question's answers become soft scores over a fixed table of answers: an answer that n of the ten people gave scores min(1, 0.3 n).
The table is given, or made from the annotations: what is the most common answer of more than 8 questions (3,129 of VQA v2's train and
val2014); of one's own questions all answers, unless a number is given. The scores of answers outside the table are lost, and so a question
may have none.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from uniter.datasets.errors import BadInput
from uniter.datasets.storage.streams import first_character, json_events, json_items, object_of
from uniter.datasets.text_db.annotations import own_questions
from uniter.datasets.text_db.annotations.answers import normalise_answer
from uniter.datasets.text_db.annotations.fields import (
    Stamps,
    answer_list,
    has_name,
    id_field,
    list_field,
    no_split,
    number_field,
    stamps,
    text_field,
)
from uniter.datasets.text_db.caption import Caption

log = logging.getLogger(__name__)

MORE_THAN: Final = 8
OWN_MORE_THAN: Final = 0


_SUBSETS: Final = {"test-dev2015": "test2015"}


def read_vqa(
    path: Path,
    *,
    split: str | None,
    join: Sequence[Path],
    counts: Counter[str],
    files: Sequence[Path] = (),
    label_separator: str | None = None,
    answers_more_than: int | None = None,
) -> Iterator[Caption]:
    """The questions in order, with `question_id`, `question` and, where their answers are known, `target` {labels, scores}.

    `counts` receives `without_known_answer` (kept, the labels are empty).

    Args:
        files: all files of the database: the answers of one's own tables are numbered together.
        label_separator: what stands between the answers of several people in a table of one's own.
        answers_more_than: an answer is learnt where it is the most common one of more questions than that.

    Raises:
        BadInput: it is no file of questions, a question is not annotated, or a joined file is neither annotations nor a list of answers.
    """
    annotations, given = _companions(join)
    if own_questions.is_own(path):
        every = tuple(files) or (path,)
        table = _own_table(every, annotations, given, split, label_separator, answers_more_than)
        prefix = f"{every.index(path)}-" if len(every) > 1 and path in every else ""
        for row in own_questions.read(path, split=split, separator=label_separator, counts=counts, row_prefix=prefix):
            fields: dict[str, Any] = {"question_id": row.id, "question": row.question}
            if row.answers:
                fields["target"] = soft_scores(row.answers, table)
                counts["without_known_answer"] += not fields["target"]["labels"]
            yield Caption(row.id, row.image, row.question, (), fields)
        return
    no_split(path, split, "VQA")
    _refuse_idle(path, given, label_separator, answers_more_than, made=bool(join))
    own = _is_genome(path)
    more_than = MORE_THAN if answers_more_than is None else answers_more_than
    table = _table(annotations, given, more_than) if own and join else {}
    targets = _targets(annotations, given, more_than) if annotations and not own else None
    for number, image, question, answer, where in _genome(path) if own else _questions(path):
        fields = {"question_id": number, "question": question}
        target = None
        if answer is not None:  # Visual Genome's own file holds its answers
            target = soft_scores([answer], table) if table else None
        elif targets is not None:
            target = targets.get(str(number))
            if target is None:
                raise BadInput(f"{where} (question {number}) has no annotation in {annotations[0]}; do the two files belong together?")
        if target is not None:
            fields["target"] = target
            counts["without_known_answer"] += not target["labels"]
        yield Caption(str(number), image, question, _origins(image), fields)


def side_files(
    paths: Sequence[Path],
    *,
    split: str | None,
    join: Sequence[Path],
    files: Sequence[Path] = (),
    label_separator: str | None = None,
    answers_more_than: int | None = None,
) -> dict[str, Any]:
    """`ans2label.json`, {answer: number}, as UNITER keeps it; nothing where no answers are known (a test part)."""
    annotations, given = _companions(join)
    if own_questions.is_own(paths[0]):
        table = _own_table(tuple(files) or tuple(paths), annotations, given, split, label_separator, answers_more_than)
        return {"ans2label.json": table} if table else {}
    more_than = MORE_THAN if answers_more_than is None else answers_more_than
    return {"ans2label.json": _table(annotations, given, more_than)} if join else {}


def _refuse_idle(path: Path, given: Path | None, separator: str | None, more_than: int | None, *, made: bool) -> None:
    """An option that would change nothing is an error."""
    if separator is not None:
        raise BadInput(f"{path} is VQA's or Visual Genome's, which list several answers; --label-separator is for a table of your own")
    if more_than is not None and (given is not None or not made):
        why = f"the answers are those of {given}" if given is not None else "no annotations are joined"
        raise BadInput(f"--answers-more-than chooses among the answers of annotations, but {why}; leave it away")


def _own_table(
    files: tuple[Path, ...],
    annotations: tuple[Path, ...],
    given: Path | None,
    split: str | None,
    separator: str | None,
    more_than: int | None,
) -> Mapping[str, int]:
    """The answers of somebody's own tables, all of them unless a number is given; nothing where they hold none."""
    if annotations:
        raise BadInput(f"{annotations[0]} was given with --join, but {files[0]} holds its answers itself; --join a list of answers")
    if given is None:
        return _made_of_own(stamps(files), split, separator, OWN_MORE_THAN if more_than is None else more_than)
    if more_than is not None:
        raise BadInput(f"--answers-more-than chooses among the answers of {files[0]}, but those of {given} are learnt; leave it away")
    return answer_list(given)


@lru_cache(maxsize=4)
def _made_of_own(files: Stamps, split: str | None, separator: str | None, more_than: int) -> Mapping[str, int]:
    rows = (row for path, _, _ in files for row in own_questions.read(path, split=split, separator=separator, counts=Counter()))
    answers = [Counter(row.answers).most_common(1)[0][0] for row in rows if row.answers]
    return _said(answers, more_than, files[0][0]) if answers else {}


def _said(answers: Sequence[str], more_than: int, source: Path) -> dict[str, int]:
    """The table of answers; what it leaves out is told."""
    table, every = answer_table(answers, more_than=more_than), answer_table(answers, more_than=0)
    if not table:
        raise BadInput(
            f"no answer occurs more than {more_than} times among the {len(answers)} of {source}; "
            "keep rarer ones with --answers-more-than, or give a list of answers with --join answers.json"
        )
    if len(table) < len(every):
        lost = sum(normalise_answer(answer) not in table for answer in answers)
        log.warning(
            "%s of %s answers are learnt, those of more than %s questions each; %s of %s questions have another one and teach nothing "
            "(--answers-more-than says how rare an answer may be)",
            f"{len(table):,}", f"{len(every):,}", more_than, f"{lost:,}", f"{len(answers):,}",
        )  # fmt: skip
    return table


def answer_table(answers: Iterable[str], *, more_than: int = MORE_THAN) -> dict[str, int]:
    """The answers that occur more often than that, normalised, numbered by how often they occur (equally frequent ones by letters).

    Args:
        answers: the most common answer of each training question (`multiple_choice_answer`).

    Source: the usual rule of VQA v2, Bottom-Up-Attention's (3,129 answers).
    """
    times = Counter(map(normalise_answer, answers))
    kept = sorted((answer for answer, count in times.items() if count > more_than and answer), key=lambda answer: (-times[answer], answer))
    return {answer: number for number, answer in enumerate(kept)}


def soft_scores(answers: Sequence[str], table: Mapping[str, int]) -> dict[str, list[Any]]:
    """{labels, scores} of one question's answers: min(1, 0.3 n) for an answer given n times; 1 where there is one answer only."""
    times = Counter(map(normalise_answer, answers))
    known = sorted((table[answer], count) for answer, count in times.items() if answer in table)
    if len(answers) == 1:
        return {"labels": [label for label, _ in known], "scores": [1.0] * len(known)}
    return {"labels": [label for label, _ in known], "scores": [min(1.0, round(0.3 * count, 1)) for _, count in known]}


def _companions(join: Sequence[Path]) -> tuple[tuple[Path, ...], Path | None]:
    """(files of annotations, the file of answers or None)."""
    annotations = [path for path in join if first_character(path) == "{" and has_name(path, "annotations")]
    others = [path for path in join if path not in annotations]
    if len(others) > 1:
        raise BadInput(f"{others[0]} and {others[1]} are both taken for lists of answers; --join one, and VQA's annotations")
    return tuple(annotations), others[0] if others else None


def _table(annotations: tuple[Path, ...], given: Path | None, more_than: int) -> Mapping[str, int]:
    return answer_list(given) if given is not None else _made_table(stamps(annotations), more_than)


@lru_cache(maxsize=2)
def _made_table(stamped: Stamps, more_than: int) -> Mapping[str, int]:
    answers = [_most_common(entry, where) for path, _, _ in stamped for where, entry in _annotations(path)]
    return _said(answers, more_than, stamped[0][0])


def _targets(annotations: tuple[Path, ...], given: Path | None, more_than: int) -> Mapping[str, dict[str, list[Any]]]:
    return _read_targets(stamps(annotations), stamps([given] if given is not None else []), more_than)


@lru_cache(maxsize=1)  # several files of questions share their annotations, which are large
def _read_targets(annotations: Stamps, given: Stamps, more_than: int) -> Mapping[str, dict[str, list[Any]]]:
    paths = tuple(path for path, _, _ in annotations)
    table = _table(paths, given[0][0] if given else None, more_than)
    return {
        str(id_field(entry, "question_id", where)): soft_scores(_answers(entry, where), table)
        for path in paths
        for where, entry in _annotations(path)
    }


def _annotations(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for row, value in enumerate(json_items(path, "annotations.item")):
        where = f"annotation {row:,} of {path}"
        yield where, object_of(value, where)


def _answers(entry: dict[str, Any], where: str) -> list[str]:
    if "answers" not in entry:
        return [_most_common(entry, where)]
    given = [answer.get("answer") if isinstance(answer, dict) else answer for answer in list_field(entry, "answers", where)]
    if not given or not all(isinstance(answer, str) for answer in given):
        raise BadInput(f'{where} has answers that are no texts; expected VQA\'s [{{"answer": ...}}, ...]')
    return [str(answer) for answer in given]


def _most_common(entry: dict[str, Any], where: str) -> str:
    answer = entry.get("multiple_choice_answer")
    if isinstance(answer, str):
        return answer
    if "answers" in entry:
        return Counter(_answers(entry, where)).most_common(1)[0][0]
    raise BadInput(f"{where} has neither multiple_choice_answer nor answers; expected VQA's annotations")


_Question = tuple[int, str, str, str | None, str]


def _questions(path: Path) -> Iterator[_Question]:
    if first_character(path) != "{" or not has_name(path, "questions"):
        raise BadInput(f"{path} is no file of questions; expected VQA's v2_OpenEnded_..._questions.json, and the annotations with --join")
    subset = next((value for prefix, _, value in _until_questions(path) if prefix == "data_subtype"), None)
    subset = subset or next((value for value in json_items(path, "data_subtype")), None)
    found = False
    for row, value in enumerate(json_items(path, "questions.item")):
        found = True
        where = f"question {row:,} of {path}"
        entry = object_of(value, where)
        image = number_field(entry, "image_id", where)
        part = entry.get("data_subtype", subset)
        yield number_field(entry, "question_id", where), _image_name(image, part), text_field(entry, "question", where), None, where
    if not found:
        raise BadInput(f"{path} holds no questions; expected VQA's v2_OpenEnded_..._questions.json")


def _until_questions(path: Path) -> Iterator[tuple[str, str, Any]]:
    for event in json_events(path):
        if event[0] == "questions.item":
            return
        yield event


def _image_name(image: int, subset: Any) -> str:
    """A COCO photograph below the folder of its part; without a part a photograph of Visual Genome."""
    if not isinstance(subset, str) or not subset:
        return f"{image}.jpg"
    part = _SUBSETS.get(subset, subset)
    return f"{part}/COCO_{part}_{image:012d}.jpg"


def _origins(image: str) -> tuple[tuple[str, str], ...]:
    stem = image.rpartition("/")[2].removesuffix(".jpg")
    return (("coco", str(int(stem.rpartition("_")[2]))),) if "_" in stem else (("vg", stem),)


def _is_genome(path: Path) -> bool:
    """Whether it is Visual Genome's own question_answers.json, a list of images with `qas`."""
    return first_character(path) == "["


def _genome(path: Path) -> Iterator[_Question]:
    for row, value in enumerate(json_items(path, "item")):
        where = f"image {row:,} of {path}"
        for place, item in enumerate(list_field(object_of(value, where), "qas", where)):
            spot = f"question {place} of {where}"
            entry = object_of(item, spot)
            image = entry["image_id"] if "image_id" in entry else object_of(value, where).get("id")
            number = number_field(entry, "qa_id", spot)
            yield number, f"{image}.jpg", text_field(entry, "question", spot), text_field(entry, "answer", spot).rstrip("."), spot
