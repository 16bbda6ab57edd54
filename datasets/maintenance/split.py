"""`uniter-db split`: one database becomes several."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from uniter.datasets.errors import BadInput, shown
from uniter.datasets.image_db import ImageDB
from uniter.datasets.maintenance.copying import box_ids_of, folders_of, records_of, shared_header, write_regions, write_texts
from uniter.datasets.maintenance.kinds import database_kind
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
    text = database_kind(source).endswith("text")
    if text:
        texts = TextDB(source)
        parts = _parts(texts.ids, by, lambda row: _as_tuple(texts.image_key(row)))
    else:
        images = ImageDB(source)
        parts = _parts(images.keys_list, by, lambda row: ())
        header: dict[str, Any] = {"feature_width": images.feature_width, "label_classes": images.label_classes}
        header |= shared_header(images.headers, [source] * len(images.headers))
        box_ids = box_ids_of(folders_of(source))
    for name, chosen in parts.items():
        if text:
            records = ((key, texts.raw_record(key)) for key in chosen)
            write_texts(out / name, records, [source], made_by="uniter-db split", part=f"{name} of {len(parts)}", overwrite=overwrite)
        else:
            settings = {"made_by": "uniter-db split", "source": source.name, "part": name, "images": len(chosen)}
            write_regions(
                out / name, records_of(images, chosen), settings=settings, header=lambda: header, box_ids=box_ids, overwrite=overwrite
            )
    told = {name: len(chosen) for name, chosen in parts.items()}
    return {"out": str(out), "kind": "text" if text else "regions", "parts": told}


def _as_tuple(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value


def _parts(keys: Sequence[str], by: str, alias: Callable[[int], tuple[str, ...]]) -> dict[str, list[str]]:
    if by.isascii() and by.isdigit() and len(by) <= 18:
        count = int(by)
        if not 1 <= count <= len(keys):
            raise BadInput(f"--by {count}: expected a number of parts from 1 to {len(keys):,}, the number of records")
        bounds = np.linspace(0, len(keys), count + 1).round().astype(int)
        width = len(str(count - 1))
        return {f"part-{part:0{width}d}": list(keys[int(bounds[part]) : int(bounds[part + 1])]) for part in range(count)}
    path = Path(by)
    if not path.is_file():
        raise BadInput(f"--by {by}: expected a number of parts or a file that lists keys")
    part_of: dict[str, str] = {}
    for line in lines_of(path):
        key, _, part = line.partition("\t")
        if key.strip():
            part_of[key.strip()] = part.strip() or "listed"
    for part in set(part_of.values()):
        if part in (".", "..") or any(character in part for character in "/\\\0") or len(part.encode(errors="replace")) > 200:
            raise BadInput(f"--by {by}: {shown(part)} is no name of a part")
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
