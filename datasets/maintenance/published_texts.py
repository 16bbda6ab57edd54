"""Text databases in UNITER's layout: an LMDB and JSON side files; and what lies beside the texts of any layout."""

import contextlib
import itertools
import shutil
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lmdb
import orjson

from uniter.datasets.errors import BadInput, SettingsDiffer
from uniter.datasets.storage.claims import may_replace, write_note
from uniter.datasets.storage.files import read_json, write_json, written_aside
from uniter.datasets.storage.lmdb_files import put_all
from uniter.datasets.text_db.building.folder import TASK_FILES
from uniter.datasets.text_db.database import LENGTHS
from uniter.datasets.text_db.records import decode_text_record

Text = tuple[str, bytes]


"""A text on its way: id, record as stored."""


def write_published_texts(
    out: Path,
    texts: Iterable[Text],
    sources: Sequence[Path],
    *,
    settings: Mapping[str, Any],
    contents: Mapping[str, Path],
    overwrite: bool,
    side_files: Callable[[Mapping[str, Any], Container[str]], Mapping[str, Any]] = lambda files, _: files,
) -> tuple[int, bool]:
    """Write a text database in UNITER's layout; what meta.json and RefCOCO's side files say is taken from the sources.

    Args:
        settings, contents: see `claims.may_replace`.
        side_files: from the task's files of the sources and the ids written to the files that are written.

    Returns:
        How many texts it holds, and whether it was there already.
    """
    note = may_replace(out, settings, sources=contents, overwrite=overwrite)
    if note is None:
        return len(read_json(out / "txt2img.json")), True
    tables = _Tables([_stated_lengths(source) for source in sources])
    out.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(out, large=True) as folder:
        folder.mkdir()
        environment = lmdb.open(str(folder), map_size=1 << 26, lock=False, max_spare_txns=0)
        with contextlib.closing(environment):
            rows = tables.watch(texts)
            while batch := list(itertools.islice(rows, 4096)):
                put_all(environment, batch)
        if not tables.lengths and not tables.images:
            raise BadInput(f"there is not one good text to write to {out}")
        side: dict[str, Any] = {f"{name}.json": table for name, table in tables.lengths.items()}
        side |= {"txt2img.json": tables.images, "img2txts.json": tables.texts_of}
        side |= side_files(side_files_of(sources), tables.images)
        side["meta.json"] = next((meta for source in sources if (meta := stated_settings(source, "meta.json"))), {})
        for name, value in side.items():
            write_json(folder / name, value)
        if (sources[0] / "vocab.txt").exists():
            shutil.copyfile(sources[0] / "vocab.txt", folder / "vocab.txt")
        texts_written = len(tables.images) or max(map(len, tables.lengths.values()))
        write_note(folder, note, {"texts": texts_written})
    return texts_written, False


class _Tables:
    """What the side files say of the texts that go by.

    Attributes:
        lengths: "id2len" and the like -> text -> length.
        images: text -> key of its image, or keys.
        texts_of: image -> texts.
    """

    def __init__(self, stated: Sequence[Mapping[str, Mapping[str, int]]]) -> None:
        self._stated = stated
        self.lengths: dict[str, dict[str, int]] = {}
        self.images: dict[str, Any] = {}
        self.texts_of: dict[str, list[str]] = {}

    def watch(self, texts: Iterable[Text]) -> Iterator[tuple[bytes, bytes]]:
        """The same, as they are put into the database."""
        for key, value in texts:
            record = decode_text_record(value, example=key)
            for name in LENGTHS:
                found = next((tables[name][key] for tables in self._stated if key in tables.get(name, {})), None)
                if found is None and name == "id2len" and not any(self._stated):
                    found = len(record.get("input_ids", ()))
                if found is not None:
                    self.lengths.setdefault(name, {})[key] = found
            image = record.get("img_fname")
            if image is not None:
                self.images[key] = image
                for name in [image] if isinstance(image, str) else image:
                    self.texts_of.setdefault(name, []).append(key)
            yield key.encode(), value


def stated_settings(source: Path, name: str = "settings.json") -> dict[str, Any]:
    """A JSON object beside a text database; an empty one if it cannot be read."""
    try:
        stated = read_json(source / name)
    except (FileNotFoundError, BadInput):
        return {}
    return stated if isinstance(stated, dict) else {}


def side_files_of(sources: Sequence[Path]) -> dict[str, Any]:
    """The task's files of the sources as one: equal ones are kept, lists (RefCOCO's) put together without repetition.

    Raises:
        SettingsDiffer: they are others, so that labels would mean other things.
    """
    together: dict[str, Any] = {}
    for name in TASK_FILES:
        values = [read_json(source / name) for source in sources if (source / name).exists()]
        if values and all(value == values[0] for value in values):
            together[name] = values[0]
        elif values and all(isinstance(value, list) for value in values):
            rows = {orjson.dumps(row, option=orjson.OPT_SORT_KEYS): row for value in values for row in value}
            together[name] = list(rows.values())
        elif values:
            raise SettingsDiffer(
                f"{', '.join(str(source / name) for source in sources)} differ; texts of other labels cannot be one database"
            )
    return together


def _stated_lengths(source: Path) -> dict[str, dict[str, int]]:
    """The length tables of a text database, as far as they can be read."""
    tables = {}
    for name in LENGTHS:
        try:
            table = read_json(source / f"{name}.json")
        except (FileNotFoundError, BadInput):
            continue
        if isinstance(table, dict):
            tables[name] = {key: length for key, length in table.items() if type(length) is int}
    return tables
