"""What lies beside the records: failures and the ids of given boxes."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from uniter.datasets.errors import BadInput
from uniter.datasets.storage.files import write_bytes
from uniter.datasets.storage.streams import json_lines

BOX_IDS = "box_ids.jsonl"


def read_failures(path: Path | str) -> list[dict[str, Any]]:
    """The rows of a `failures.jsonl`, none if the file is absent."""
    if not os.path.isfile(path):  # noqa: PTH113 - asked for each of a million units
        return []
    rows = [row for _, row in json_lines(Path(path))]
    if not all(isinstance(row.get("key"), str) for row in rows):
        raise BadInput(f'{path} is damaged: expected {{"key", "path", "error"}} in each line')
    return rows


def read_box_ids(folder: Path) -> dict[str, list[Any]]:
    """The caller's ids of given boxes by image key, from `box_ids.jsonl`; none if the file is absent."""
    if not (folder / BOX_IDS).is_file():
        return {}
    try:
        return {str(row["key"]): list(row["ids"]) for _, row in json_lines(folder / BOX_IDS)}
    except (BadInput, KeyError, TypeError) as error:
        raise BadInput(f"{folder / BOX_IDS} is damaged ({error!r}); remove it if the ids are not needed") from None


def write_box_ids(folder: Path, ids: Mapping[str, Sequence[Any]]) -> None:
    """Write `box_ids.jsonl`, whole or not at all; no ids, no file."""
    if ids:
        _write_rows(folder / BOX_IDS, [{"key": key, "ids": row} for key, row in ids.items()])


def write_failures(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write `failures.jsonl`: one JSON object an image, with `key`, `path` and `error`."""
    _write_rows(path, rows)


def _write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    write_bytes(path, b"".join(json.dumps(row, ensure_ascii=False).encode(errors="backslashreplace") + b"\n" for row in rows))
