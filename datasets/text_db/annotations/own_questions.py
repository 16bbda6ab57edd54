"""Somebody's own questions and answers: a table with the columns `image`, `question` and, where it is known, `answer`.

What a reader would get wrong: a row may hold the answers of several people (a list, or a text with a separator), which make soft scores.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from uniter.datasets.errors import BadInput, shown
from uniter.datasets.storage.streams import first_character, id_of
from uniter.datasets.text_db.annotations.own_rows import first_line, own_rows
from uniter.datasets.text_db.captions.rows import IMAGE_COLUMNS, column_named, columns_in_words, image_named, rows_of_split

QUESTION_COLUMNS: Final = ("question", "text", "sentence", "sent")
ANSWER_COLUMNS: Final = ("answer", "answers", "label", "multiple_choice_answer")
ID_COLUMNS: Final = ("question_id", "id", "qa_id")


class OwnQuestion(NamedTuple):
    """A row: its id, the name of its image, the question, and what people answered; no answer in a test part."""

    id: str
    image: str
    question: str
    answers: list[str]


def is_own(path: Path) -> bool:
    """Whether a file is such a table, and not VQA's or Visual Genome's JSON."""
    first = "" if path.is_dir() else first_character(path)
    if first == "{":
        row = first_line(path)
        return row is not None and "questions" not in row and column_named(row, IMAGE_COLUMNS) is not None
    return first != "["


def read(path: Path, *, split: str | None, separator: str | None, counts: Counter[str], row_prefix: str = "") -> Iterator[OwnQuestion]:
    """The questions in order.

    Raises:
        BadInput: it is no table, or lacks a column.
    """
    for number, where, row in rows_of_split(path, own_rows(path), split=split, counts=counts):
        image, asked = column_named(row, IMAGE_COLUMNS), column_named(row, QUESTION_COLUMNS)
        if image is None or asked is None:
            missing = "image" if image is None else "question"
            raise BadInput(f"{where} has no {missing} column (it has: {columns_in_words(row)}); expected `image`, `question` and `answer`")
        question = row[asked]
        if not isinstance(question, str):
            raise BadInput(f"the question of {where} is {shown(question)}; expected a text")
        id_column = column_named(row, ID_COLUMNS)
        example = id_of(row[id_column] if id_column is not None else None, number, row_prefix)
        yield OwnQuestion(example, image_named(row[image], where), question, _answers(row, where, separator))


def _answers(row: Mapping[str, Any], where: str, separator: str | None) -> list[str]:
    column = column_named(row, ANSWER_COLUMNS)
    value = None if column is None else row[column]
    if value is None or value == "":
        return []
    given = value if isinstance(value, list) else str(value).split(separator) if separator is not None else [value]
    if not all(isinstance(answer, str | int | float) for answer in given):
        raise BadInput(f"the answer of {where} is {shown(value)}; expected a text, or a list of the answers of several people")
    return [str(answer).strip() for answer in given]
