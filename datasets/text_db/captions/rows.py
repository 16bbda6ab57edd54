"""JSONL and CSV with an image and a caption in each row, under the names that such columns go by; also a JSON array of such rows.

And Flickr's `.token` files: `1000092795.jpg#0`, a tab, the caption.
"""

import csv
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

from uniter.datasets.errors import BadInput, WrongUsage, shown
from uniter.datasets.storage.streams import first_character, id_of, json_items, json_lines, lines_of, object_of, text_of
from uniter.datasets.text_db.caption import Caption

IMAGE_COLUMNS = (
    "image",
    "image_name",
    "file_name",
    "filename",
    "file",
    "image_path",
    "filepath",
    "path",
    "img",
    "img_fname",
    "key",
    "image_id",
)


CAPTION_COLUMNS = (
    *("caption", "captions", "text", "sentence", "sent", "comment", "raw", "description"),
    *("sentences", "sentences_raw", "title", "alt_text"),
)


ID_COLUMNS = ("id", "caption_id", "sentid")


DELIMITERS = (",", "\t", "|", ";")


def column_named(columns: Iterable[str], names: Sequence[str]) -> str | None:
    """The column that goes by the first of these names, whatever its letters' case."""
    by_name = {column.strip().lower(): column for column in reversed(list(columns))}
    return next((by_name[name] for name in names if name in by_name), None)


def read_jsonl(path: Path, *, split: str | None, join: Sequence[Path], counts: Counter[str], row_prefix: str = "") -> Iterator[Caption]:
    """Rows {"image": ..., "caption": ...} (or a list of captions), optionally "id" and "split"."""
    yield from captions_of_rows(path, json_rows(path), split=split, join=join, counts=counts, row_prefix=row_prefix)


def read_csv(path: Path, *, split: str | None, join: Sequence[Path], counts: Counter[str], row_prefix: str = "") -> Iterator[Caption]:
    """Rows under a header line that names an image and a caption column; separated by commas, tabs, semicolons or bars."""
    yield from captions_of_rows(path, csv_rows(path), split=split, join=join, counts=counts, row_prefix=row_prefix)


def read_token(path: Path, *, split: str | None, join: Sequence[Path], counts: Counter[str], row_prefix: str = "") -> Iterator[Caption]:
    """Lines of Flickr8k's and Flickr30k's `.token` files; an id is what stands before the tab."""
    if split is not None:
        raise BadInput(f"{path} is a .token file, which has no parts; leave --split away")
    if join:
        raise BadInput(f"{path} is a .token file, which names its images itself; leave --join away")
    for number, line in enumerate(lines_of(path), start=1):
        if not line.strip():
            continue
        found = TOKEN_LINE.match(line)
        if found is None:
            raise BadInput(f"line {number} of {path} is {shown(line)}; expected an image's name, #, a number, a tab and the caption")
        yield Caption(f"{row_prefix}{found['id']}", found["image"], found["text"])


TOKEN_LINE: Final = re.compile(r"(?P<id>(?P<image>[^\t]+\.[A-Za-z]{3,4})#\d+)\t(?P<text>.*)")


def _several(caption: Any) -> list[Any]:
    """The captions of a cell: of a list each, also where CSV holds the list as JSON (Flickr30k's `raw` on the hub)."""
    if isinstance(caption, str) and caption.startswith('["') and caption.rstrip().endswith("]"):
        try:
            found = json.loads(caption)
        except (ValueError, RecursionError):
            return [caption]
        if isinstance(found, list) and all(isinstance(text, str) for text in found):
            return found
    return caption if isinstance(caption, list) else [caption]


def csv_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of a table with a header line.

    Raises:
        BadInput: a row has more or fewer cells than the header.
    """
    lines = lines_of(path)
    header_line = next((line for line in lines if line.strip()), "")
    delimiter = delimiter_of(header_line)
    number = -1
    # Between tabs and bars (Flickr30k's results.csv) quotes are just quotes; elsewhere they hold cells together.
    quoting: Literal[0, 3] = csv.QUOTE_NONE if delimiter in "\t|" else csv.QUOTE_MINIMAL
    try:
        header = [cell.strip() for cell in next(csv.reader([header_line], delimiter=delimiter, quoting=quoting), [])]
        # strict: a quote that is never closed would otherwise swallow the rows behind it.
        reader = csv.reader((f"{line}\n" for line in lines), delimiter=delimiter, quoting=quoting, strict=True)
        for number, cells in enumerate(reader):
            if not cells:
                continue
            if len(cells) > len(header) and delimiter == "|":
                cells = [*cells[: len(header) - 1], delimiter.join(cells[len(header) - 1 :])]
            if len(cells) != len(header):
                raise BadInput(
                    f"row {number} of {path} has {len(cells)} cells, the header {len(header)}; is a quote or a separator missing?"
                )
            if delimiter == "|":
                cells = [cell.strip() for cell in cells]
            yield f"row {number} of {path}", dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise BadInput(f"{path} is no readable CSV: row {number + 1} {_CSV_WORDS.get(str(error), f'({error})')}") from None


_CSV_WORDS = {
    "unexpected end of data": "opens a quote that is never closed",
    **{f"'{mark}' expected after '\"'": "has a quote inside a quoted cell; write it twice" for mark in DELIMITERS},
}


def delimiter_of(header: str) -> str:
    """The separator that a header line has most of."""
    return max(DELIMITERS, key=header.count)


def json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of JSON lines, or of a JSON array."""
    if first_character(path) == "[":
        for row, value in enumerate(json_items(path, "item")):
            yield f"entry {row} of {path}", object_of(value, f"entry {row} of {path}")
        return
    yield from json_lines(path)


def captions_of_rows(
    path: Path,
    rows: Iterable[tuple[str, Mapping[str, Any]]],
    *,
    split: str | None,
    join: Sequence[Path],
    counts: Counter[str],
    row_prefix: str,
) -> Iterator[Caption]:
    """What rows of an image and a caption column say; other arguments as of the readers."""
    if join:
        raise BadInput(f"{path} names its images itself; leave --join away")
    for number, where, row in rows_of_split(path, rows, split=split, counts=counts):
        image_column, caption_column = column_named(row, IMAGE_COLUMNS), column_named(row, CAPTION_COLUMNS)
        if image_column is None or caption_column is None:
            missing = "image" if image_column is None else "caption"
            raise BadInput(f"{where} has no {missing} column (it has: {columns_in_words(row)}); expected `image` and `caption`")
        caption, name = row[caption_column], image_named(row[image_column], where)
        id_column = column_named(row, ID_COLUMNS)
        example = id_of(row[id_column] if id_column is not None else None, number, row_prefix)
        captions = _several(caption)
        for place, text in enumerate(captions):
            yield Caption(f"{example}-{place}" if len(captions) > 1 else example, name, text_of(text, where))


def rows_of_split(
    path: Path, rows: Iterable[tuple[str, Mapping[str, Any]]], *, split: str | None, counts: Counter[str]
) -> Iterator[tuple[int, str, Mapping[str, Any]]]:
    """(its number, where, the row) of the rows whose `split` column says one of these parts; of all rows where none is asked for.

    `counts` receives `texts_of_other_parts`.

    Raises:
        BadInput: no row is of a part that was asked for.
    """
    wanted = set(split.split(",")) if split is not None else None
    seen: set[str] = set()
    split_column = False
    for number, (where, row) in enumerate(rows):
        if wanted is not None:
            split_column |= "split" in row
            part = str(row.get("split"))
            seen.add(part)
            if part not in wanted:
                counts["texts_of_other_parts"] += 1
                continue
        yield number, where, row
    for part in sorted((wanted or set()) - seen):
        if seen and not split_column:
            raise WrongUsage(f"{path} has no `split` column; leave --split away, or add the column")
        known = ", ".join(map(shown, sorted(seen)[:40])) or "nothing"
        raise BadInput(f"{path} has no part {shown(part)} in its `split` column (it has: {known})")


def image_named(value: Any, where: str) -> str:
    """The name in an image column.

    Raises:
        BadInput: it is none.
    """
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise BadInput(f"the image of {where} is {shown(value)}; expected its name")
    return str(value)


def columns_in_words(row: Mapping[str, Any]) -> str:
    """The columns that a row has, for a sentence."""
    return ", ".join(map(str, list(row)[:8]))[:400]
