"""Files written whole or not at all, JSON read with errors in words, and names with braces in them."""

import contextlib
import filecmp
import hashlib
import json
import logging
import math
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO, Final

import orjson

from uniter.datasets.errors import BadInput
from uniter.datasets.storage.locks import only_writer

logger = logging.getLogger(__name__)

# ---------------------------------------------------------------------------------------------------------------- small files


UNFINISHED, REPLACED = ".uniter.tmp", ".uniter-old.tmp"  # of large files and folders, beside what they are to be, or were


@contextlib.contextmanager
def written_aside(path: Path, *, large: bool = False) -> Iterator[Path]:
    """A name beside `path` to write a file to: made durable, it takes the place of `path` at the end; if anything fails, it is removed.

    So a file is there whole or not at all, however the process ends. What a killed one leaves is called `NAME.*.tmp`.

    Args:
        large: a file or folder that is worth looking after: what a killed process left of it is removed here. One at a time.
    """
    path = path.resolve()  # what a link leads to is replaced, not the link
    # Processes in containers on several machines often have the same id.
    temporary = path.with_name(path.name + (UNFINISHED if large else f".{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp"))
    old = path.with_name(path.name + REPLACED)
    if large:
        remove(temporary)
        if old.exists() and not path.exists():  # killed between the two renames
            old.rename(path)
    try:
        yield temporary
        sync(temporary)
        if path.exists() and path.is_dir() != temporary.is_dir():
            raise BadInput(f"{path} is a {'folder' if path.is_dir() else 'file'}, and is not replaced; choose another name")
        if path.is_dir():
            remove(old)
            path.rename(old)
        temporary.replace(path)
        sync(path.parent)
        if large:
            remove(old)
    except BaseException:
        remove(temporary)
        raise


@contextlib.contextmanager
def opened_aside(path: Path) -> Iterator[BinaryIO]:
    """`written_aside`, opened for writing bytes."""
    with written_aside(path) as temporary, open(temporary, "wb") as file:
        yield file
        file.flush()


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    with opened_aside(path) as file:
        file.write(content)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file so that it is there whole or not at all."""
    write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def remove(path: Path) -> None:
    """Remove a file, a link (never what it leads to), or a folder with all that is in it; nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def first_json(path: Path, value: Any) -> Any:
    """What the file holds; `value` is written if there was no file. Of several processes at once exactly one writes."""
    if not path.exists():
        temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.first")
        write_json(temporary, value)
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            temporary.replace(path)
        temporary.unlink(missing_ok=True)
        sync(path.parent)
    return read_json(path)


def read_json(path: Path) -> Any:
    """A JSON file of ours. (Other people's, which may be packed, large or hostile: `streams.whole_json`.)

    Raises:
        BadInput: it is damaged; with the path.
        FileNotFoundError: it is not there.
    """
    try:
        return orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise BadInput(f"{path} is no valid JSON ({error}); was it cut off?") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file of ours.

    Raises:
        BadInput: it is missing, cut off, or something else.
    """
    try:
        document = read_json(path)
    except FileNotFoundError:
        raise BadInput(f"{path} is missing; was the folder copied whole?") from None
    if not isinstance(document, dict):
        raise BadInput(f"{path} holds a JSON {type(document).__name__}; expected an object")
    return document


def sync(path: Path) -> None:
    """Make a file durable; of a folder, the renames and deletions in it."""
    if not hasattr(os, "O_DIRECTORY") and path.is_dir():
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY if hasattr(os, "O_DIRECTORY") else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def difference_in_words(stored: Any, asked: Any, name: str = "") -> list[str]:
    """How two JSON values differ, one phrase per leaf: "batch_size was 8, now 4"."""
    if isinstance(stored, dict) and isinstance(asked, dict):
        phrases = []
        for key in [*stored, *(key for key in asked if key not in stored)]:
            inner = f"{name}.{key}" if name else str(key)
            if key not in asked:
                phrases.append(f"{inner} was {_short(stored[key])}, now absent")
            elif key not in stored:
                phrases.append(f"{inner} was absent, now {_short(asked[key])}")
            else:
                phrases += difference_in_words(stored[key], asked[key], inner)
        return phrases
    return [] if stored == asked else [f"{name or 'value'} was {_short(stored)}, now {_short(asked)}"]


def first_phrases(phrases: Sequence[str], most: int = 4) -> str:
    """Differences as one message can say them: another detector alone changes twenty settings."""
    more = len(phrases) - most
    return "; ".join(phrases[:most]) + (f"; and {more} more" if more > 0 else "")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


@contextlib.contextmanager
def complete_folder(path: Path, *, again: bool = False) -> Iterator[Path]:
    """A folder to fill; it appears as `path` by rename once all in it is durable, or not at all. What a killed process left goes.

    Args:
        again: where there is such a folder that holds the very same files, that is said and nothing done; it may hold others beside them.

    Raises:
        BadInput: there is such a folder; with `again`, one that holds other contents.
        UniterError: another process is making it at this moment.
    """
    if path.exists() and not again:
        raise BadInput(f"{path} exists already; name a new folder or remove that one")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.incoming")
    with only_writer(aside, doing="filling"):
        try:
            for left in aside.iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield aside
            if path.exists():
                _refuse_another(path, aside)
                logger.info("%s is complete already: it holds the same", path)
                return
            for inner in (*aside.rglob("*"), aside):
                sync(inner)
            aside.rename(path)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    sync(path.parent)


def _refuse_another(path: Path, made: Path) -> None:
    """Raise BadInput where a file of the folder that was made anew is missing or another one in `path`."""
    for new in sorted(made.rglob("*")):
        old = path / new.relative_to(made)
        if new.is_file() and not (old.is_file() and filecmp.cmp(old, new, shallow=False)):
            other = f"another {old.name} than would be written now" if old.exists() else f"no {old.name}"
            raise BadInput(f"{path} exists already and holds {other}; name a new folder or remove that one")


def keep_others(old: Path, new: Path, *, ours: Callable[[str], bool]) -> None:
    """Let the folder `new`, which takes the place of `old`, also hold what lies there and is not ours.

    Files are linked, or copied where they cannot be: until `old` goes, both have them.

    Args:
        ours: whether a name at the top of the folders is ours, with all below it.
    """
    if not old.is_dir():
        return
    for path in sorted(old.rglob("*")):
        inner = path.relative_to(old)
        if path.is_dir() and not path.is_symlink():
            continue
        if ours(inner.parts[0]) or (new / inner).exists():
            continue
        (new / inner).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, new / inner, follow_symlinks=False)
        except OSError:  # a file system without hard links
            shutil.copy2(path, new / inner, follow_symlinks=False)


# ----------------------------------------------------------------------------------------------------------------- many names


_BRACES: Final = re.compile(r"\{([^{}]*)\}")
_MOST_NAMES: Final = 1_000_000


def expand_braces(pattern: str) -> list[str]:
    """The names that a name with braces stands for, in order: {00000..00331} counts, {train,val} lists.

    Raises:
        BadInput: it counts downwards, or stands for more than a million names.
    """
    pieces = _BRACES.split(pattern)
    choices = [[piece] if place % 2 == 0 else _choices(piece, pattern) for place, piece in enumerate(pieces)]
    if math.prod(map(len, choices)) > _MOST_NAMES:
        raise BadInput(f"{pattern!r} stands for more than {_MOST_NAMES:,} names; name the folder that holds them")
    return ["".join(parts) for parts in product(*choices)]


def _choices(inside: str, pattern: str) -> list[str]:
    counted = re.fullmatch(r"(\d{1,9})\.\.(\d{1,9})", inside)
    if counted is None:
        return inside.split(",")
    first, last = int(counted[1]), int(counted[2])
    if last < first or last - first >= _MOST_NAMES:
        raise BadInput(f"{{{inside}}} in {pattern!r} counts from {first} to {last}; expected at most a million, upwards")
    return [f"{number:0{len(counted[1])}d}" for number in range(first, last + 1)]
