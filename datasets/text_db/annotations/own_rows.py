"""Somebody's own table, a row an example: CSV, TSV, JSONL, a JSON array, or parquet.

What a reader would get wrong: everything of a CSV is text, an empty cell too; JSON and parquet have numbers, lists and nulls.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from uniter.datasets.errors import BadInput
from uniter.datasets.image_db.tables import PARQUET_MAGIC, table_columns, table_rows
from uniter.datasets.storage.streams import first_character, json_value, open_stream, starts_with
from uniter.datasets.text_db.captions.rows import csv_rows, json_rows

FIRST_LINE = 1 << 20  # bytes; the first row of a table of one's own is not longer


def own_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(where, row) of each row, in order.

    Raises:
        BadInput: it is no table, damaged, or empty.
    """
    found = False
    for where, row in _rows(path):
        found = True
        yield where, row
    if not found:
        raise BadInput(f"{path} has no row; expected a table with a row for each example")


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if path.is_dir():
        raise BadInput(f"{path} is a folder; expected a table (CSV, TSV, JSONL or parquet) with the column `image`")
    if starts_with(path, PARQUET_MAGIC):
        names = {name.lower() for name in table_columns(path)}
        for number, row in enumerate(table_rows(path, sorted(names))):
            yield f"row {number} of {path}", row
    elif first_character(path) in ("{", "["):
        yield from json_rows(path)
    else:
        yield from csv_rows(path)


def first_line(path: Path) -> dict[str, Any] | None:
    """The object that is the first line of a JSON file by itself; None where there is none, or the line is too long for a row."""
    if first_character(path) != "{":
        return None
    with open_stream(path) as stream:
        line = stream.readline(FIRST_LINE)
    try:
        value = json_value(line, str(path))
    except BadInput:
        return None
    return value if isinstance(value, dict) else None
