"""What became of urls: tables of downloaders (img2dataset's parquet or JSON, CSV and TSV reports) as url -> the image's name."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from uniter.datasets.errors import BadInput
from uniter.datasets.image_db.tables import PARQUET_MAGIC, table_rows
from uniter.datasets.storage.streams import (
    first_character,
    json_events,
    json_items,
    json_lines,
    json_value,
    lines_of,
    object_of,
    starts_with,
    whole_json,
)
from uniter.datasets.text_db.captions.names import NameTable
from uniter.datasets.text_db.captions.rows import column_named, csv_rows

URL_COLUMNS = ("url", "image_url", "image url", "link")


FILE_COLUMNS = ("key", "file", "file_name", "filename", "image", "path", "name")


DONE = ("success", "200", "200.0", "ok")  # what downloaders write of a file that they have


LARGEST_OBJECT = 16 << 20  # bytes of what a downloader says of one image


def names_of_urls(paths: Sequence[Path]) -> NameTable:
    """url -> name of the downloaded file, from all these tables; urls that failed are not in it.

    Raises:
        BadInput: a table has no url or no name column, or none was downloaded.
    """
    names = NameTable("url")
    for path in paths:
        for table in tables_in(path):
            for row in _rows(table):
                url_column, file_column = column_named(row, URL_COLUMNS), column_named(row, FILE_COLUMNS)
                if url_column is None or file_column is None:
                    missing = "url" if url_column is None else "file name"
                    raise BadInput(
                        f"{table} has no {missing} column (it has: {', '.join(list(row)[:8])[:400]}); expected a downloader's table"
                    )
                status = row.get("status")
                url, name = row[url_column], row[file_column]
                if (status is None or str(status).lower() in DONE) and isinstance(url, str) and name is not None and str(name):
                    names.add(_url_id(url), str(name))
    if not len(names):
        raise BadInput(f"no url was downloaded, says {', '.join(map(str, paths))}; expected img2dataset's output or its parquet files")
    return names


def find_urls(names: NameTable, urls: Sequence[str]) -> list[str | None]:
    """The name of each url, None where it was not downloaded."""
    return names.find([_url_id(url) for url in urls])


def _url_id(url: str) -> str:
    return f"url {url.strip()}"  # never a string of digits alone


def tables_in(path: Path) -> list[Path]:
    """The tables of a folder (parquet where there is one), or the file itself."""
    if path.is_dir():
        for pattern in ("*.parquet", "*/*.parquet", "*.json", "*/*.json", "*.csv", "*.tsv", "*.tsv.gz"):
            found = sorted(table for table in path.glob(pattern) if not table.name.endswith("_stats.json"))
            if found:
                return found
        raise BadInput(f"folder {path} holds no parquet, JSON, CSV or TSV table; expected img2dataset's output")
    if not path.is_file():
        raise BadInput(f"{path} is not there; expected img2dataset's output or its parquet files")
    return [path]


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    if starts_with(path, PARQUET_MAGIC):
        yield from table_rows(path, (*URL_COLUMNS, *FILE_COLUMNS, "status"))
        return
    first = first_character(path)
    if first == "[":
        for row, value in enumerate(json_items(path, "item")):
            yield object_of(value, f"entry {row} of {path}")
    elif first == "{":
        yield from _json_objects(path)
    else:
        for _, cells in csv_rows(path):
            yield cells


def _json_objects(path: Path) -> Iterator[Mapping[str, Any]]:
    """Rows of JSON lines, img2dataset's JSON of one image, or one object {url: name}, which may be a single line of gigabytes."""
    for prefix, event, value in json_events(path):
        if event == "map_key" and not prefix:
            if not value.lower().startswith(("http:", "https:")):
                break
            url = value
        elif event in ("string", "number") and prefix:
            yield {"url": url, "file": value}
        elif event == "end_map":
            return
    try:
        json_value(next(lines_of(path), ""), str(path))
    except BadInput:  # one object in several lines
        yield object_of(whole_json(path, "a downloader's table", most_bytes=LARGEST_OBJECT), str(path))
        return
    yield from (row for _, row in json_lines(path))
