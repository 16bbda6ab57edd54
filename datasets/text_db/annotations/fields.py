"""Getting fields out of other people's JSON, with sentences that name the file and the entry where one is missing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from uniter.datasets.errors import BadInput, shown
from uniter.datasets.storage.streams import json_events, whole_json

LARGEST_LIST = 64 << 20  # bytes of a list of answers

Stamps = tuple[tuple[Path, int, int], ...]
"""Files with size and time, by which what was read of them is remembered."""


def text_field(entry: dict[str, Any], name: str, where: str) -> str:
    """A string that must be there and not be empty."""
    value = entry.get(name)
    if not isinstance(value, str) or not value.strip():
        raise BadInput(f"{where} has the {name} {shown(value)}; expected a text")
    return value


def id_field(entry: dict[str, Any], name: str, where: str) -> int | str:
    """A number or string that must be there."""
    value = entry.get(name)
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise BadInput(f"{where} has the {name} {shown(value)}; expected an id")
    return value


def number_field(entry: dict[str, Any], name: str, where: str) -> int:
    """A whole number that must be there; digits in a string are one too."""
    value = id_field(entry, name, where)
    if isinstance(value, str) and not (value.isascii() and value.isdecimal() and len(value) <= 18):
        raise BadInput(f"{where} has the {name} {shown(value)}; expected a whole number")
    return int(value)


def list_field(entry: dict[str, Any], name: str, where: str) -> list[Any]:
    """A list that must be there."""
    value = entry.get(name)
    if not isinstance(value, list):
        raise BadInput(f"{where} has the {name} {shown(value)}; expected a list")
    return value


def has_name(path: Path, wanted: str) -> bool:
    """Whether a JSON file is an object with that name at its top; reads no further than to it."""
    return any(event == "map_key" and prefix == "" and value == wanted for prefix, event, value in json_events(path))


def no_split(path: Path, split: str | None, what: str) -> None:
    """Refuse --split where the source has no parts."""
    if split is not None:
        raise BadInput(f"{path} is {what}, whose parts are files of their own; leave --split away and name the part's file")


def no_companions(join: Sequence[Path], what: str) -> None:
    """Refuse --join where there is nothing to join."""
    if join:
        raise BadInput(f"{join[0]} was given with --join, but {what} needs no further file; leave it away")


def stamps(paths: Sequence[Path]) -> Stamps:
    """The files as they are now.

    Raises:
        BadInput: one is not there.
    """
    try:
        return tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in paths)
    except OSError as error:
        raise BadInput(f"{error.filename} cannot be read ({error.strerror}); expected a file of annotations") from None


def answer_list(path: Path) -> dict[str, int]:
    """A list of answers or labels by number: a JSON list, or {answer: number}.

    Raises:
        BadInput: it is something else.
    """
    document = whole_json(path, "a list of answers", most_bytes=LARGEST_LIST)
    if isinstance(document, list) and all(isinstance(answer, str) for answer in document):
        table = {answer: number for number, answer in enumerate(document)}
        if len(table) != len(document):
            raise BadInput(f"{path} lists an answer twice; expected each once")
    elif isinstance(document, dict) and sorted(map(str, document.values())) == sorted(map(str, range(len(document)))):
        table = {answer: int(number) for answer, number in document.items()}
    else:
        raise BadInput(f"{path} is no table of answers; expected a JSON list, or {{answer: number}} with the numbers from 0")
    if not table:
        raise BadInput(f"{path} holds no answer; expected a JSON list of them")
    return table
