"""`uniter-db split`: one database becomes several."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from uniter.datasets.errors import BadInput, WrongUsage, shown
from uniter.datasets.image_db import ImageDB
from uniter.datasets.image_db.database import kind_of_child
from uniter.datasets.image_db.writing.side_files import read_failures
from uniter.datasets.maintenance.copying import (
    box_ids_of,
    folders_of,
    records_of,
    refuse_overlap,
    shared_header,
    write_regions,
    write_texts,
)
from uniter.datasets.maintenance.kinds import database_kind
from uniter.datasets.storage.claims import source_names, standing_for
from uniter.datasets.storage.streams import lines_of
from uniter.datasets.text_db import TextDB

# ------------------------------------------------------------------------------------------------------------------ splitting


def split(source: Path, out: Path, *, by: str, overwrite: bool = False) -> dict[str, Any]:
    """Take a database apart into databases below `out`, which together read as the whole.

    Args:
        by: a number of equal parts (`out/part-0` …), or a file: one key a line (`out/listed`, `out/rest`), or a key and, after
            a tab, the name of its part. Texts go by their id, or by the image they are about.

    Raises:
        BadInput: the list is empty, or names nothing that is there.
    """
    lists = {"list": Path(by)} if Path(by).is_file() and not _is_number(by) else {}
    if database_kind(source).endswith("text"):
        refuse_overlap(out, [source])
        texts = TextDB(source)
        parts = _parts(texts.ids, by, lambda row: _as_tuple(texts.image_key(row)))
        _refuse_other_parts(out, parts)
        complete = True
        for name, chosen in parts.items():
            records = ((key, texts.raw_record(key)) for key in chosen)
            _, there = write_texts(
                out / name, records, [source], made_by="uniter-db split", part=f"{name} of {len(parts)}", lists=lists, overwrite=overwrite
            )
            complete = complete and there
        return _told(out, "text", parts, complete)
    folders = folders_of(source)
    refuse_overlap(out, [source, *folders])
    images = ImageDB(source)
    parts = _parts(images.keys_list, by, lambda row: ())
    _refuse_other_parts(out, parts)
    header: dict[str, Any] = {"feature_width": images.feature_width, "label_classes": images.label_classes}
    header |= shared_header(images.headers, [source] * len(images.headers))
    box_ids = box_ids_of(folders)
    failures = _parts_of_failures([row for folder in folders for row in read_failures(folder / "failures.jsonl")], by, parts)
    complete = True
    for name, chosen in parts.items():
        written = write_regions(
            out / name,
            records_of(images, chosen),
            settings={"made_by": "uniter-db split", "source": source.name, "part": name, "images": len(chosen)},
            sources={**source_names(folders), **lists},
            header=lambda: header,
            failures=failures.get(name, ()),
            box_ids=box_ids,
            overwrite=overwrite,
        )
        complete = complete and written.already_complete
    return _told(out, "regions", parts, complete)


def _told(out: Path, kind: str, parts: Mapping[str, Sequence[str]], complete: bool) -> dict[str, Any]:
    sizes = {name: len(chosen) for name, chosen in parts.items()}
    return {"out": str(out), "kind": kind, "parts": sizes, "already_complete": complete}


def _refuse_other_parts(out: Path, parts: Mapping[str, Any]) -> None:
    """BadInput if there are databases in `out` that are no parts of this splitting: together they would not be the whole."""
    there = [standing_for(child.name) for child in out.iterdir() if kind_of_child(child)] if out.is_dir() else []
    others = sorted(name for name in there if name not in parts)
    if others:
        raise BadInput(
            f"{out} holds the databases {', '.join(others[:4])}, which are no parts of this splitting: all in it are read as one; "
            "choose another OUT, or remove them"
        )


def _parts_of_failures(rows: Sequence[Mapping[str, Any]], by: str, parts: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """Part -> the failures that go with it: as the list says; else with the rest, or with the first part."""
    listed = {} if _is_number(by) else _listed(Path(by))
    together: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        part = next((listed[name] for name in (row["key"], str(row["key"]).removesuffix(".npz")) if name in listed), "rest")
        together.setdefault(part if part in parts else next(iter(parts)), []).append(row)
    return together


def _is_number(by: str) -> bool:
    return by.isascii() and by.isdigit() and len(by) <= 18


def _as_tuple(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value


def _parts(keys: Sequence[str], by: str, alias: Callable[[int], tuple[str, ...]]) -> dict[str, list[str]]:
    if _is_number(by):
        count = int(by)
        if not 1 <= count <= len(keys):
            raise WrongUsage(f"--by {count}: expected a number of parts from 1 to {len(keys):,}, the number of records")
        bounds = np.linspace(0, len(keys), count + 1).round().astype(int)
        width = len(str(count - 1))
        return {f"part-{part:0{width}d}": list(keys[int(bounds[part]) : int(bounds[part + 1])]) for part in range(count)}
    part_of = _listed(Path(by))
    parts: dict[str, list[str]] = {}
    found = 0
    for row, key in enumerate(keys):
        names = (key, key.removesuffix(".npz"), *alias(row))
        part = next((part_of[name] for name in names if name in part_of), "")
        found += bool(part)
        parts.setdefault(part or "rest", []).append(key)
    if not found:
        raise BadInput(
            f"none of the {len(part_of):,} keys of {by} is in the database; its keys look like {keys[0]!r}"
            if len(keys)
            else "the database is empty; there is nothing to split"
        )
    return parts


def _listed(path: Path) -> dict[str, str]:
    """Key -> part, from a list; "listed" where no part is named."""
    if not path.is_file():
        raise WrongUsage(f"--by {path}: expected a number of parts or a file that lists keys")
    part_of: dict[str, str] = {}
    for line in lines_of(path):
        key, _, part = line.partition("\t")
        if key.strip():
            part_of[key.strip()] = part.strip() or "listed"
    for part in set(part_of.values()):
        if part in (".", "..") or any(character in part for character in "/\\\0") or len(part.encode(errors="replace")) > 200:
            raise BadInput(f"--by {path}: {shown(part)} is no name of a part")
    return part_of
