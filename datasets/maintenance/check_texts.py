"""Is every record of a text database whole?"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uniter.datasets.errors import BadInput, UniterError, shown
from uniter.datasets.maintenance.check_report import CheckReport, records_of
from uniter.datasets.maintenance.kinds import database_kind
from uniter.datasets.storage.files import read_json
from uniter.datasets.storage.index_file import INDEX, KeyList, key_columns
from uniter.datasets.storage.streams import json_pairs
from uniter.datasets.text_db import MissingExample, TextDB
from uniter.datasets.text_db.records import decode_text_record

# ------------------------------------------------------------------------------------------------------------------------- text


def examine_text(path: Path, report: CheckReport) -> Iterator[tuple[str, bytes, dict[str, Any]]]:
    """The good records of one text database; `report` is complete when this is exhausted."""
    report.kind = database_kind(path)
    try:
        stated = _stated(path)
        whole_vocabulary = _vocabulary_end(path)
    except BadInput as error:
        report.problem("side file", str(error))
        stated, whole_vocabulary = _Stated([], np.zeros(0, np.int32)), None
    for key, value in records_of(path, report):
        report.records += 1
        name = key.decode(errors="replace")
        try:
            record = decode_text_record(value, example=name)
        except BadInput as error:
            report.problem("record", f"{path}: {error}")
            continue
        length = stated.seen(key)
        sentence = _text_fault(record, length, whole_vocabulary)
        if sentence is not None:
            report.problem("text", f"{path}: text {name!r} {sentence}")
            continue
        if len(stated) and length is None:
            report.problem("index", f"{path}: text {name!r} is stored but not in the index or id2len.json")
            continue
        report.good += 1
        yield name, value, record
    for name in stated.unseen():
        report.problem("lost", f"{path}: text {name!r} is in the index or id2len.json but not readable in data.mdb")
    if report.kind == "text":
        _text_side_files(path, report)


class _Stated:
    """Ids with their stated lengths, without an object an id, and which of them were seen."""

    def __init__(self, ids: Sequence[str], lengths: NDArray[np.int32]) -> None:
        self._ids = ids if isinstance(ids, KeyList) else KeyList(key_columns([name.encode("utf-8", "surrogatepass") for name in ids]))
        self._lengths, self._seen = lengths, np.zeros(len(self._ids), dtype=np.bool_)

    def __len__(self) -> int:
        return len(self._ids)

    def seen(self, key: bytes) -> int | None:
        """The length of an id that was found; None where none is stated."""
        row = self._ids.find_raw(key)
        if row < 0:
            return None
        self._seen[row] = True
        return int(self._lengths[row])

    def unseen(self) -> Iterator[str]:
        """The ids that were not found."""
        return (self._ids.raw(row).decode(errors="replace") for row in np.flatnonzero(~self._seen).tolist())


def _stated(path: Path) -> _Stated:
    """Stated lengths, from ours or from the JSON side files; what VCR states is not compared."""
    if (path / "header.json").exists() and (path / INDEX).exists():
        database = TextDB(path, lengths=None)
        return _Stated(database.ids, database.lengths)
    if (path / "id2len.json").exists():
        stated = read_json(path / "id2len.json")
        if not isinstance(stated, dict) or not all(type(length) is int and -(2**31) <= length < 2**31 for length in stated.values()):
            raise BadInput(f"{path / 'id2len.json'} is no object of numbers")
        return _Stated(list(stated), np.fromiter(stated.values(), np.int32, len(stated)))
    return _Stated([], np.zeros(0, np.int32))


def _text_side_files(path: Path, report: CheckReport) -> None:
    """Whether the JSON that other people's readers go by says what the index says; both are read as they stand, never as a whole."""
    try:
        database = TextDB(path)
    except UniterError as error:
        report.problem("index", str(error))
        return
    texts_of = database.images()
    wanted: dict[str, Iterable[tuple[str, Any]]] = {
        "id2len.json": zip(database.ids, database.lengths.tolist(), strict=True),
        "txt2img.json": ((example, database.image_key(row)) for row, example in enumerate(database.ids)),
        "img2txts.json": ((key, [database.ids[row] for row in texts_of[key]]) for key in database.image_keys),
    }
    for name, rows in wanted.items():
        if not (path / name).is_file():
            if name != "id2len.json" or not (path / "id2len_qa.json").is_file():  # VCR has two other ones
                report.problem("side file", f"{path / name} is missing")
            continue
        try:
            for stored, expected in itertools.zip_longest(json_pairs(path / name), rows):
                found = stored and (stored[0], tuple(stored[1]) if name == "txt2img.json" and isinstance(stored[1], list) else stored[1])
                if found != expected:
                    report.problem("side file", f"{path / name} says {shown(stored)} where the index says {shown(expected)}")
                    break
        except BadInput as error:
            report.problem("side file", str(error))
        except (MissingExample, IndexError) as error:
            report.problem("index", f"{path / INDEX} is damaged: its columns refer to rows that are not there ({error})")


def _vocabulary_end(path: Path) -> int | None:
    try:
        bounds = read_json(path / "meta.json").get("v_range")
    except (FileNotFoundError, AttributeError):
        return None
    return int(bounds[1]) if isinstance(bounds, list) and len(bounds) == 2 and type(bounds[1]) is int else None


def _text_fault(record: Mapping[str, Any], length: int | None, vocabulary_end: int | None) -> str | None:
    ids = record.get("input_ids")
    if not isinstance(ids, list) or not all(type(number) is int and number >= 0 for number in ids):
        return "has no list of word pieces in input_ids"
    # VCR adds special rows beyond the vocabulary.
    if vocabulary_end is not None and ids and max(ids) >= vocabulary_end + 256:
        return f"has word piece {max(ids)}, beyond the vocabulary's {vocabulary_end}"
    plain = not any(name in record for name in ("input_ids_as", "input_ids_rs"))
    if length is not None and plain and length != len(ids):
        return f"has {len(ids)} word pieces but the index or id2len.json says {length}"
    return None
