"""SBU captioned photographs: sbu-captions-all.json (parallel lists), the two text files, or the tab-separated list with paths.

An image is called by its url's last part, `<Flickr photo id>_<secret>.jpg`, or as `--join` says.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from uniter.datasets.errors import BadInput
from uniter.datasets.storage.streams import first_character, json_items, lines_of, text_of
from uniter.datasets.text_db.caption import Caption
from uniter.datasets.text_db.captions.downloads import find_urls, names_of_urls

BATCH = 4096


_MISSING = object()


def read_sbu(path: Path, *, split: str | None, join: Sequence[Path], counts: Counter[str], row_prefix: str = "") -> Iterator[Caption]:
    """The captions in order.

    `counts` receives `urls_not_downloaded` where --join is given.
    """
    if split is not None:
        raise BadInput(f"{path} is SBU, which has no parts; leave --split away")
    names = names_of_urls(join) if join else None
    rows = enumerate(_rows(path))
    while batch := list(islice(rows, BATCH)):
        found = find_urls(names, [url for _, (_, url, _, _) in batch]) if names is not None else [None] * len(batch)
        for (row, (example, url, name, text)), joined in zip(batch, found, strict=True):
            if names is not None:
                counts["urls_not_downloaded"] += joined is None
                name = joined or ""
            photo = flickr_photo(url or name)
            origins = (("flickr", example.rpartition("_")[2] if not url else photo),)
            yield Caption(example or f"{row_prefix}{row}", name, text, origins)


def flickr_photo(url: str) -> str:
    """The photo's id: what stands before the first "_" of the url's last part."""
    return url.rstrip("/").rpartition("/")[2].split("_")[0].split(".")[0]


def _rows(path: Path) -> Iterator[tuple[str, str, str, str]]:
    """(id or "", url or "", name, text) of each."""
    if path.is_dir() or _sibling(path) is not None:
        captions, urls = two_files(path)
        pairs = zip_longest(lines_of(urls), lines_of(captions), fillvalue=_MISSING)
        yield from (("", url, _last_part(url), text) for url, text in _together(pairs, f"{urls} and {captions}"))
        return
    if first_character(path) == "{":
        parallel = zip_longest(json_items(path, "image_urls.item"), json_items(path, "captions.item"), fillvalue=_MISSING)
        for row, (url, text) in enumerate(_together(parallel, f"image_urls and captions of {path}")):
            where = f"entry {row} of {path}"
            address = text_of(url, where)
            yield "", address, _last_part(address), text_of(text, where)
        return
    for number, line in enumerate(lines_of(path)):
        cells = line.split("\t", 3)
        if len(cells) < 4:
            raise BadInput(f"line {number + 1} of {path} has {len(cells)} cells; expected path, token, id and text with tabs between them")
        yield cells[2].strip(), "", cells[0].strip(), cells[3]


def two_files(path: Path) -> tuple[Path, Path]:
    """(captions, urls) of SBU's two text files, of which `path` is one, or their folder.

    Raises:
        BadInput: one of them is missing.
    """
    if path.is_dir():
        found = [sorted(path.glob(f"*{word}*.txt")) for word in ("captions", "urls")]
        if any(len(files) != 1 for files in found):
            raise BadInput(f"folder {path} holds {len(found[0])} *captions*.txt and {len(found[1])} *urls*.txt; expected SBU's one of each")
        return found[0][0], found[1][0]
    other = _sibling(path)
    if other is None:
        raise BadInput(f"{path} has no text file of urls or captions beside it; expected SBU's two files in one folder")
    return (other, path) if "urls" in path.name else (path, other)


def _sibling(path: Path) -> Path | None:
    """SBU_captioned_photo_dataset_captions.txt <-> ..._urls.txt"""
    if path.suffix != ".txt":
        return None
    for here, there in (("captions", "urls"), ("urls", "captions")):
        if here in path.name:
            other = path.with_name(path.name.replace(here, there))
            return other if other.is_file() else None
    return None


def _together(pairs: Iterator[tuple[Any, Any]], what: str) -> Iterator[tuple[Any, Any]]:
    for row, pair in enumerate(pairs):
        if _MISSING in pair:
            raise BadInput(f"{what} are not equally long: one ends after {row:,}; was it cut off?")
        yield pair


def _last_part(url: str) -> str:
    return url.strip().rstrip("/").rpartition("/")[2]
