"""Files written whole or not at all, and JSON read with errors in words."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson

from uniter.datasets.errors import BadInput

# ---------------------------------------------------------------------------------------------------------------- small files


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A name beside `path` to write a file to: made durable, it takes the place of `path` at the end; if anything fails, it is removed.

    So a file is there whole or not at all, however the process ends. What a killed one leaves is called `NAME.*.tmp`.
    """
    # Processes in containers on several machines often have the same id.
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        sync_folder(temporary)
        temporary.replace(path)
        sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file so that it is there whole or not at all: temporary file, fsync, rename, fsync of the folder."""
    write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def first_json(path: Path, value: Any) -> Any:
    """What the file holds; `value` is written if there was no file. Of several processes at once exactly one writes."""
    if not path.exists():
        # Processes in containers on several machines often have the same id.
        temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.first")
        write_json(temporary, value)
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            temporary.replace(path)
        temporary.unlink(missing_ok=True)
        sync_folder(path.parent)
    return read_json(path)


def read_json(path: Path) -> Any:
    """A JSON file of ours; BadInput with the path if it is damaged."""
    try:
        return orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise BadInput(f"{path} is no valid JSON ({error}); was it cut off?") from None


def sync_folder(folder: Path) -> None:
    """Make renames and deletions inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
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


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object from a side file.

    Raises:
        BadInput: it is missing, cut off, or something else.
    """
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise BadInput(f"{path} is missing; was the database copied whole?") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is not JSON ({error}); was it cut off?") from None
    if not isinstance(document, dict):
        raise BadInput(f"{path} holds a JSON {type(document).__name__}; expected an object")
    return document


@contextmanager
def complete_folder(path: Path) -> Iterator[Path]:
    """A folder to fill; it appears as `path` by rename once all in it is durable, or not at all.

    Raises:
        BadInput: there is such a folder.
    """
    if path.exists():
        raise BadInput(f"{path} exists already; name a new folder or remove that one")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}-{os.getpid()}")
    aside.mkdir()
    try:
        yield aside
        for inner in (*aside.rglob("*"), aside):
            sync_folder(inner)
        aside.rename(path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    sync_folder(path.parent)
