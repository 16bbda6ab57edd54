"""Parquet files with an image and a caption column, and what Hugging Face's `datasets` saved to disk.

The image is a name, or the picture itself ({bytes, path}), which is then called as `uniter-extract` of the same table calls it.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Final

from uniter.datasets.errors import BadInput
from uniter.datasets.image_db.tables import (
    NAME_COLUMNS,
    PICTURE_COLUMNS,
    is_saved_dataset,
    picture_column,
    picture_name,
    table_columns,
    table_name,
    table_rows,
    tables_in,
)
from uniter.datasets.text_db.caption import Caption
from uniter.datasets.text_db.captions.rows import CAPTION_COLUMNS, ID_COLUMNS, IMAGE_COLUMNS, captions_of_rows, column_named

_SPLIT: Final = ("split",)


def read_tables(path: Path, *, split: str | None, join: Sequence[Path], counts: Counter[str], row_prefix: str = "") -> Iterator[Caption]:
    """The rows of all tables in order; an id is the table's, or the row, counted through all of them.

    Parts: those of a dataset saved to disk, a `split` column, or the beginning of the files' names (`train-00000-of-00002.parquet`).
    """
    by_column = split is None or (not is_saved_dataset(path) and "split" in _columns(tables_in(path)[0]))
    by_file = not by_column and path.is_file() and re.match(r"[\w.+-]+-\d+-of-\d+$", path.stem)
    if by_file and not path.name.startswith(tuple(f"{part}-" for part in (split or "").split(","))):
        raise BadInput(f"{path} is of part {path.name.split('-')[0]!r}, going by its name, and --split asks for {split!r}")
    tables = tables_in(path, split=None if by_column else split)
    part = split if by_column or (path.is_file() and not by_file) else None
    rows = chain.from_iterable(map(_rows, tables))
    yield from captions_of_rows(path, rows, split=part, join=join, counts=counts, row_prefix=row_prefix)


def _columns(table: Path) -> set[str]:
    return {name.lower() for name in table_columns(table)}


def _rows(table: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row); pictures are replaced by their names, under "image"."""
    pictures = picture_column(table)
    names = {*IMAGE_COLUMNS, *CAPTION_COLUMNS, *ID_COLUMNS, *NAME_COLUMNS, *PICTURE_COLUMNS, *_SPLIT}
    if pictures is not None:
        names.add(pictures.lower())
    called = table_name(table)
    for number, row in enumerate(table_rows(table, tuple(names))):
        if pictures is not None:
            name = picture_name(called, number, row, pictures)
            row = {column: cell for column, cell in row.items() if column.lower() != "image"} | {"image": name}
        yield f"row {number} of {table}", row


def has_pictures_or_names(table: Path) -> bool:
    """Whether a table says itself which images its captions are about, so that no url has to."""
    if picture_column(table) is not None:
        return True
    return column_named(_columns(table), tuple(name for name in IMAGE_COLUMNS if name != "key")) is not None
