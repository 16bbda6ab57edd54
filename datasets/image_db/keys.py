"""The key under which an image is stored: made from its name by a rule that the user chooses.

`stem` (the default for files), `path` (the default for tar shards, where it is WebDataset's `__key__`), or a template such as
`coco_train2014_{id:012d}.npz`. A template is parsed here, never handed to `str.format`, so that it can reach nothing but its fields.
Images that are extracted and images that captions name get their keys here, so the same rule makes the same keys.
"""

import re
import string
from collections.abc import Callable
from operator import attrgetter
from pathlib import PurePosixPath
from typing import NamedTuple

from uniter.datasets.errors import BadInput, WrongUsage, unknown_name
from uniter.datasets.storage.lmdb_pages import MAX_KEY_BYTES

FIELDS = ("stem", "name", "parent", "path", "id")


_RULES = {"stem": "{stem}", "path": "{path}"}


LONGEST_NUMBER = 255  # digits; no file name is longer, and int() refuses thousands


class NameParts(NamedTuple):
    """An image's name as templates see it.

    Attributes:
        name: `COCO_train2014_000000000009.jpg`.
        stem: the name without its suffix.
        parent: the name of the folder that holds it (one name, not a path).
        path: the path relative to IMAGES, with `/`, without the suffix.
    """

    name: str
    stem: str
    parent: str
    path: str

    @classmethod
    def of_file(cls, relative: str, *, root: str) -> "NameParts":
        """The parts of a path with `/`, relative to a folder of the name `root`."""
        folders, _, name = relative.rpartition("/")
        stem = stem_of(name)
        return cls(name, stem, folders.rpartition("/")[2] or root, f"{folders}/{stem}" if folders else stem)


def stem_of(relative: str) -> str:
    """The stem of a path with `/`: what `NameParts.of_file` gives, without the rest."""
    name = relative.rpartition("/")[2]
    dot = name.rfind(".")
    return name[:dot] if dot > 0 else name


KeyRule = Callable[[NameParts], str]
STEM: KeyRule = attrgetter("stem")


def key_rule(rule: str) -> KeyRule:
    """The function that makes keys.

    Args:
        rule: `stem`, `path`, or a template of {stem} {name} {parent} {path} {id} {id:012d}; the id is the last run of digits of the stem.

    Raises:
        BadInput: the template is malformed or names another field; from the function: `{id}` was asked for and the stem has no digits.
    """
    template = _RULES.get(rule, rule)
    if "{" not in template:
        raise WrongUsage(
            f"--key {rule!r} is neither stem, path nor a template such as 'coco_{{id:012d}}'; all images would get the same key"
        )
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise WrongUsage(f"--key {rule!r} is no template ({error}); expected for instance 'coco_{{id:012d}}'") from error
    pieces: list[tuple[str, str | None, str]] = []
    for literal, field, specification, conversion in parsed:
        if field is not None:
            if field not in FIELDS:
                raise WrongUsage(f"--key {rule!r}: {unknown_name('field', field, FIELDS)}")
            if conversion or (specification and (field != "id" or not re.fullmatch(r"0?[1-9][0-9]?d?", specification))):
                raise WrongUsage(f"--key {rule!r}: only {{id}} takes a format, and only a width such as {{id:012d}}")
        pieces.append((literal, field, specification or ""))

    if template in _RULES.values():  # a million times
        return STEM if template == "{stem}" else attrgetter(template[1:-1])

    def make(parts: NameParts) -> str:
        key = ""
        for literal, field, specification in pieces:
            key += literal
            if field == "id":
                number = last_number(parts.stem)
                if number is None:
                    raise BadInput(f"image {parts.name!r} has no digits in its name, and --key {rule!r} asks for {{id}}; choose another")
                key += format(number, specification)
            elif field is not None:
                key += str(getattr(parts, field))
        return key

    return make


def key_maker(rule: str) -> Callable[[str], str]:
    """The same for the names of images in other people's files: from a name or path with `/` to the key; errors as of `key_rule`."""
    make = key_rule(rule)
    # Most names hold no folder; only the others are worth a Path.
    return lambda name: make(NameParts.of_file(name if name and "/" not in name else str(PurePosixPath(name)), root=""))


def last_number(stem: str) -> int | None:
    """The last run of ASCII digits of a name without suffix: "COCO_train2014_000000000009" -> 9; None where there is none."""
    end = len(stem)
    while end and not ("0" <= stem[end - 1] <= "9"):
        end -= 1
    start = end
    while start and "0" <= stem[start - 1] <= "9":
        start -= 1
    return int(stem[start:end]) if 0 < end - start <= LONGEST_NUMBER else None


def key_fault(key: str) -> str | None:
    """Why a key cannot stand in a database, or None."""
    length = len(key.encode())
    if length == 0:
        return "its key is empty; choose another --key"
    if length > MAX_KEY_BYTES:
        return f"its key has {length} bytes and a database takes at most {MAX_KEY_BYTES}; choose another --key"
    if key == "__keys__":
        return "its key is '__keys__', under which published databases keep their list; choose another --key"
    return None
