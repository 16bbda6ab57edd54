"""Every source of captions: name -> reader. A reader gives `Caption`s in the source's order and counts what it passes over."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Protocol

from uniter.datasets.errors import BadInput
from uniter.datasets.image_db.tables import PARQUET_MAGIC, is_saved_dataset, is_table, table_columns
from uniter.datasets.storage.streams import first_character, json_events, lines_of, open_stream
from uniter.datasets.text_db.caption import Caption
from uniter.datasets.text_db.captions.coco import read_coco
from uniter.datasets.text_db.captions.conceptual import is_url, read_conceptual
from uniter.datasets.text_db.captions.downloads import URL_COLUMNS
from uniter.datasets.text_db.captions.folders import is_folder_of_pairs, read_folder
from uniter.datasets.text_db.captions.img2dataset import read_img2dataset
from uniter.datasets.text_db.captions.karpathy import read_karpathy
from uniter.datasets.text_db.captions.rows import (
    CAPTION_COLUMNS,
    DELIMITERS,
    IMAGE_COLUMNS,
    TOKEN_LINE,
    column_named,
    read_csv,
    read_jsonl,
    read_token,
)
from uniter.datasets.text_db.captions.sbu import read_sbu, two_files
from uniter.datasets.text_db.captions.tables import has_pictures_or_names, read_tables
from uniter.datasets.text_db.captions.visual_genome import read_visual_genome

__all__ = ["CAPTIONS", "CaptionReader", "detect"]


class CaptionReader(Protocol):
    """`split`: one part, or several with commas; `join`: tables that name the images; `counts`: what was passed over, by name;
    `row_prefix`: of ids that are rows, where several files are read.
    """

    def __call__(
        self, path: Path, *, split: str | None, join: Sequence[Path], counts: Counter[str], row_prefix: str = ""
    ) -> Iterator[Caption]: ...


CAPTIONS: dict[str, CaptionReader] = {
    "coco": read_coco,
    "karpathy": read_karpathy,
    "vg": read_visual_genome,
    "cc": read_conceptual,
    "sbu": read_sbu,
    "img2dataset": read_img2dataset,
    "jsonl": read_jsonl,
    "csv": read_csv,
    "parquet": read_tables,
    "datasets": read_tables,
    "folder": read_folder,
    "token": read_token,
}


LOOKED_AT = 2_000_000  # JSON events; what decides stands near the start


def detect(path: Path) -> str:
    """The name in `CAPTIONS` of what a file or folder holds, by its content.

    Raises:
        BadInput: it is none of them.
    """
    if path.is_dir():
        return _detect_folder(path)
    with open_stream(path) as stream:
        start = stream.read(1024)
    if not start.strip():
        raise BadInput(f"{path} is empty; expected captions")
    if start[:4] == PARQUET_MAGIC:
        return _detect_parquet(path)
    if path.suffix == ".arrow" and is_table(path):
        return "datasets"
    if start[257:262] == b"ustar" or path.suffix == ".tar":
        return "img2dataset"
    found = _detect_json(path) if first_character(path) in ("{", "[") else _detect_lines(path)
    if found is None:
        raise BadInput(
            f"{path} is no caption file that is known here (it begins {start[:40].decode('utf-8', 'replace')!r}); "
            "expected COCO, Karpathy, Visual Genome, Conceptual "
            "Captions, SBU, img2dataset, Flickr's .token, or JSONL, CSV or parquet with the columns `image` and `caption`: name it with "
            "--format if it is one"
        )
    return found


def _detect_folder(path: Path) -> str:
    if any(path.glob("*captions*.txt")) and any(path.glob("*urls*.txt")):
        return "sbu"
    if is_saved_dataset(path):
        return "datasets"
    parquet = next(iter(sorted(path.glob("*.parquet")) or sorted(path.rglob("*.parquet"))), None)
    if parquet is not None:
        return _detect_parquet(parquet)
    shards = next(path.glob("*.tar"), None) is not None or next(path.glob("*/*.json"), None) is not None
    return "folder" if not shards and is_folder_of_pairs(path) else "img2dataset"


def _detect_parquet(path: Path) -> str:
    names = {name.lower() for name in table_columns(path)}
    if "key" in names and column_named(names, (*URL_COLUMNS, "status")):
        return "img2dataset"
    if has_pictures_or_names(path):
        return "parquet"
    return "cc" if column_named(names, (*URL_COLUMNS, *CAPTION_COLUMNS)) and "key" not in names else "img2dataset"


def _detect_json(path: Path) -> str | None:
    images_without_sentences = False
    keys: set[str] = set()
    for prefix, event, value in islice(json_events(path), LOOKED_AT):
        if event == "map_key" and prefix in ("", "item"):
            keys.add(value)
        if event == "end_map" and prefix in ("", "item"):
            break
        if prefix == "images.item.sentences":
            return "karpathy"
        if prefix == "images.item" and event == "end_map":
            images_without_sentences = True
        if prefix == "item.regions" or prefix == "item.regions.item.phrase":
            return "vg"
        if event == "start_array" and prefix in ("image_urls", "captions") and {"image_urls", "captions", "user_ids"} >= keys:
            return "sbu" if _has_both(path) else "jsonl"
        if prefix.startswith("annotations.item") or images_without_sentences:
            return "coco"
    if "annotations" in keys or "images" in keys:
        return "coco"
    if column_named(keys, CAPTION_COLUMNS) and column_named(keys, ("key",)) and column_named(keys, URL_COLUMNS):
        return "img2dataset"
    return "jsonl" if column_named(keys, IMAGE_COLUMNS) and column_named(keys, CAPTION_COLUMNS) else None


def _has_both(path: Path) -> bool:
    """Whether a JSON object has SBU's two lists (one line of JSONL may have a list of captions)."""
    with open_stream(path) as stream:
        return b'"image_urls"' in stream.read(4096) or any(prefix == "image_urls" for prefix, _, _ in json_events(path))


def _detect_lines(path: Path) -> str | None:
    first = next((line for line in lines_of(path) if line.strip()), "")
    if TOKEN_LINE.match(first):
        return "token"
    cells = [cell.strip().lower() for cell in first.split("\t")]
    if len(cells) > 1 and (any(map(is_url, cells)) or (column_named(cells, URL_COLUMNS) and column_named(cells, CAPTION_COLUMNS))):
        return "cc"
    delimiters: Sequence[str] = [mark for mark in DELIMITERS if mark in first]
    for mark in delimiters:
        names = [cell.strip().strip('"').lower() for cell in first.split(mark)]
        if column_named(names, IMAGE_COLUMNS) and column_named(names, CAPTION_COLUMNS):
            return "csv"
    if len(cells) >= 4:
        return "sbu"
    try:
        two_files(path)
    except BadInput:
        return None
    return "sbu"
