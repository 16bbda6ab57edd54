"""Conceptual Captions' TSV: 3M has the caption first and the url second, 12M the url first; quotes are quotes, and a caption may hold tabs.

Images have no names there. What `--join` names (img2dataset's output, a downloader's report) tells the file of each url; without it the
image of row n is called by n in nine digits, which is img2dataset's key of it in shards of 10,000.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from uniter.datasets.errors import BadInput
from uniter.datasets.image_db.tables import PARQUET_MAGIC, table_columns, table_rows
from uniter.datasets.storage.streams import lines_of, starts_with, text_of
from uniter.datasets.text_db.caption import Caption
from uniter.datasets.text_db.captions.downloads import URL_COLUMNS, find_urls, names_of_urls
from uniter.datasets.text_db.captions.rows import CAPTION_COLUMNS, column_named

BATCH = 4096


def read_conceptual(
    path: Path, *, split: str | None, join: Sequence[Path], counts: Counter[str], row_prefix: str = ""
) -> Iterator[Caption]:
    """The rows in order; an id is its row.

    `counts` receives `urls_not_downloaded` where --join is given.
    """
    if split is not None:
        raise BadInput(f"{path} is one part of Conceptual Captions; leave --split away and give the file of the part")
    names = names_of_urls(join) if join else None
    rows = enumerate(_parquet_pairs(path) if starts_with(path, PARQUET_MAGIC) else _pairs(path))
    while batch := list(islice(rows, BATCH)):
        if names is None:
            for row, (text, _) in batch:
                yield Caption(f"{row_prefix}{row}", f"{row:09d}", text)
            continue
        for (row, (text, _)), name in zip(batch, find_urls(names, [url for _, (_, url) in batch]), strict=True):
            if name is None:
                counts["urls_not_downloaded"] += 1
            yield Caption(f"{row_prefix}{row}", name or "", text)


def is_url(cell: str) -> bool:
    """Whether a cell is a web address."""
    return cell.strip().lower().startswith(("http://", "https://"))


def _pairs(path: Path) -> Iterator[tuple[str, str]]:
    """(caption, url) of each line; a header line and empty lines are passed over, so row 0 is the first caption."""
    first = True
    for number, line in enumerate(lines_of(path)):
        if not line.strip():
            continue
        cells = line.split("\t")
        url = next((place for place, cell in enumerate(cells) if is_url(cell)), None)
        if url is None:
            names = [cell.strip().lower() for cell in cells]
            if first and column_named(names, URL_COLUMNS) and column_named(names, CAPTION_COLUMNS):
                first = False
                continue
            raise BadInput(f"line {number + 1} of {path} holds no url ({line[:60]!r}); expected Conceptual Captions: caption, tab, url")
        first = False
        # 12M has the url first. In 3M all before the url is the caption, tabs and all, and an address in a caption is not the last cell.
        if url == 0:
            yield "\t".join(cells[1:]), cells[0].strip()
        else:
            url = len(cells) - 1 if is_url(cells[-1]) else url
            yield "\t".join(cells[:url]), cells[url].strip()


def _parquet_pairs(path: Path) -> Iterator[tuple[str, str]]:
    for number, row in enumerate(table_rows(path, (*URL_COLUMNS, *CAPTION_COLUMNS))):
        url, caption = column_named(row, URL_COLUMNS), column_named(row, CAPTION_COLUMNS)
        if url is None or caption is None:
            missing = "url" if url is None else "caption"
            raise BadInput(f"{path} has no {missing} column (it has: {', '.join(table_columns(path))})")
        yield text_of(row[caption], f"row {number} of {path}"), str(row[url] or "")
