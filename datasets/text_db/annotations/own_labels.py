"""Somebody's own labels: a table with the columns `image`, `label` and, where there is one, `text`; hateful memes' JSONL as it is.

A record's `target` is {labels, scores} as that of a question: the numbers of the labels that apply, each with the score 1; where scores are
learnt it is {labels: [0], scores: [the score]}. Beside the database `labels.json` says which kind it is, `ans2label.json` numbers labels.

What a reader would get wrong: a number is the name of a class unless scores are asked for, and a row without a label (a test part) is kept.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, NamedTuple

from uniter.datasets.errors import BadInput, shown, unknown_name
from uniter.datasets.storage.streams import id_of, text_of
from uniter.datasets.text_db.annotations.fields import Stamps, answer_list, stamps
from uniter.datasets.text_db.annotations.own_rows import own_rows
from uniter.datasets.text_db.caption import Caption
from uniter.datasets.text_db.captions.rows import CAPTION_COLUMNS, ID_COLUMNS, IMAGE_COLUMNS, column_named, columns_in_words, image_named
from uniter.datasets.text_db.captions.rows import rows_of_split as of_split

KINDS: Final = ("one", "several", "score")  # one label each, any number of labels, a number
KIND_FILE: Final = "labels.json"
LABEL_COLUMNS: Final = ("label", "labels", "score", "class", "category", "target", "gold_label")


class _Labels(NamedTuple):
    """Of a whole set of files: the kind (None where no row has a label), and the labels' numbers."""

    kind: str | None
    numbers: Mapping[str, int]


def read_labels(
    path: Path,
    *,
    split: str | None,
    join: Sequence[Path],
    counts: Counter[str],
    files: Sequence[Path] = (),
    label_separator: str | None = None,
    score: bool = False,
) -> Iterator[Caption]:
    """The rows in order; an id is that of the `id` column, else the row.

    Args:
        join: a list of labels, or `{label: number}`; otherwise they are those of `files`, in the order of their letters or numbers.
        counts: receives `without_label` (kept, without a target).
        files: all files of the database, whose labels are numbered together; by default `path` alone.
        label_separator: what stands between the labels of a row that has several.
        score: labels are numbers to be predicted as such.

    Raises:
        BadInput: it is no table, lacks a column, or a label is of another kind or not in the list.
    """
    every = tuple(files) or (path,)
    labels = _labels(stamps(every), stamps(join), split, label_separator, score)
    prefix = f"{every.index(path)}-" if len(every) > 1 and path in every else ""
    for number, where, row in of_split(path, own_rows(path), split=split, counts=counts):
        text_column, id_column = column_named(row, CAPTION_COLUMNS), column_named(row, ID_COLUMNS)
        fields: dict[str, Any] = {}
        given = _given(row, where, label_separator, score=score)
        if given is None:
            counts["without_label"] += 1
        else:
            fields["target"] = _target(given, labels, where)
        text = text_of(row[text_column], where) if text_column is not None else ""
        image_column = column_named(row, IMAGE_COLUMNS)
        if image_column is None:
            raise BadInput(f"{where} has no image column (it has: {columns_in_words(row)}); expected `image`, `label` and perhaps `text`")
        example = id_of(row[id_column] if id_column is not None else None, number, prefix)
        yield Caption(example, image_named(row[image_column], where), text, (), fields)


def side_files(
    paths: Sequence[Path],
    *,
    split: str | None,
    join: Sequence[Path],
    files: Sequence[Path] = (),
    label_separator: str | None = None,
    score: bool = False,
) -> dict[str, Any]:
    """`ans2label.json` {label: number} (not of scores) and `labels.json`; nothing of a part without labels."""
    labels = _labels(stamps(tuple(files) or tuple(paths)), stamps(join), split, label_separator, score)
    if labels.kind is None:
        return {}
    if labels.kind == "score":
        return {KIND_FILE: {"kind": labels.kind}}
    return {KIND_FILE: {"kind": labels.kind}, "ans2label.json": dict(labels.numbers)}


def _given(row: Mapping[str, Any], where: str, separator: str | None, *, score: bool) -> list[str] | str | float | None:
    """What a row says: the names of its labels (a list where there may be several), a score, or None."""
    column = column_named(row, LABEL_COLUMNS)
    value = None if column is None else row[column]
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    if score:
        return _score(value, where)
    if isinstance(value, list):
        return [_name(one, where) for one in value]
    name = _name(value, where)
    if separator is None:
        return name
    names = [part.strip() for part in name.split(separator)]
    if "" in names:
        raise BadInput(f"the label of {where} is {shown(value)}; expected labels between {separator!r}, none of them empty")
    return names


def _score(value: Any, where: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not abs(number) < 1e30:
        raise BadInput(f"the label of {where} is {shown(value)}; expected a number, because --score was given")
    return number


def _name(value: Any, where: str) -> str:
    if isinstance(value, bool | int):
        return str(int(value)) if isinstance(value, int) and not isinstance(value, bool) else str(value).lower()
    if isinstance(value, float):
        if not value.is_integer():
            raise BadInput(f"the label of {where} is the fraction {value}; a number to be predicted is asked for with --score")
        return str(int(value))
    if not isinstance(value, str) or not value.strip():
        raise BadInput(f"the label of {where} is {shown(value)}; expected a name or a number, or several as a list")
    return value.strip()


def _target(given: list[str] | str | float, labels: _Labels, where: str) -> dict[str, list[Any]]:
    if isinstance(given, float):
        return {"labels": [0], "scores": [given]}
    if isinstance(given, list) and labels.kind == "one":
        raise BadInput(f"{where} has a list of labels, other rows have one; expected lists, or --label-separator for all of them")
    names = dict.fromkeys([given] if isinstance(given, str) else given)
    for name in names:
        if name not in labels.numbers:
            raise BadInput(f"{where}: {unknown_name('label', name, labels.numbers)}; give the list that has it with --join")
    numbers = sorted(labels.numbers[name] for name in names)
    return {"labels": numbers, "scores": [1.0] * len(numbers)}


@lru_cache(maxsize=4)  # a row of one file needs the labels of all
def _labels(files: Stamps, join: Stamps, split: str | None, separator: str | None, score: bool) -> _Labels:
    if len(join) > 1:
        raise BadInput(f"{join[0][0]} and {join[1][0]} are both taken for lists of labels; --join one")
    if join and score:
        raise BadInput(f"{join[0][0]} was given with --join, but scores (--score) have no list of labels; leave it away")
    listed = answer_list(join[0][0]) if join else None
    found: Counter[str] = Counter()
    scores = one = several = 0
    for path, _, _ in files:
        for _, where, row in of_split(path, own_rows(path), split=split, counts=Counter()):
            given = _given(row, where, separator, score=score)
            if isinstance(given, float):
                scores += 1
            elif given is not None:
                several, one = several + isinstance(given, list), one + isinstance(given, str)
                found.update([given] if isinstance(given, str) else given)
    if scores:
        return _Labels("score", {})
    if not one and not several:
        return _Labels(None, listed or {})
    if one and several:
        raise BadInput(f"{files[0][0]} has {one:,} rows with one label and {several:,} with a list of them; expected lists in all rows")
    numbers = listed if listed is not None else {name: number for number, name in enumerate(sorted(found, key=_by_number))}
    if len(numbers) < (1 if several else 2):
        raise BadInput(
            f"{files[0][0]} has the label {shown(next(iter(numbers), ''))} in all rows, so there is nothing to tell apart; "
            "expected two labels at least, or a list of all of them with --join"
        )
    return _Labels("several" if several else "one", numbers)


def _by_number(name: str) -> tuple[bool, int, str]:
    """Whole numbers by their size and before all other names, these by their letters."""
    is_number = name.removeprefix("-").isdecimal() and name.isascii() and len(name) <= 18
    return not is_number, int(name) if is_number else 0, name
