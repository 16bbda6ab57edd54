"""`uniter-db info`: what a database says of itself."""

import contextlib
import os
from pathlib import Path
from typing import Any, Final

import lmdb

from uniter.datasets.errors import UniterError
from uniter.datasets.image_db import ImageDB
from uniter.datasets.image_db.writing.side_files import read_failures
from uniter.datasets.maintenance.kinds import database_kind
from uniter.datasets.text_db import TextDB

# -------------------------------------------------------------------------------------------------------------------- looking


def describe(path: Path) -> dict[str, Any]:
    """What a database is and holds, as far as it can be read; damage is told under "error", never raised.

    Raises:
        BadInput: no database.
    """
    kind = database_kind(path)
    told: dict[str, Any] = {"path": str(path), "kind": kind, "complete": not kind.startswith("unfinished")}
    told["bytes"] = _bytes_below(path)
    try:
        told |= _describe_text(path) if kind.endswith("text") else _describe_regions(path, kind)
    except (UniterError, OSError, ValueError, KeyError, TypeError, lmdb.Error) as error:
        told["complete"] = False
        told["error"] = f"{error}; see `uniter-db check`"
    return told


def _bytes_below(path: Path) -> int:
    """The sizes of all files together; what is moved or removed meanwhile, by a command that is writing there, may be left out."""
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += Path(folder, name).stat().st_size
    return total


def _describe_regions(path: Path, kind: str) -> dict[str, Any]:
    told: dict[str, Any] = {}
    if kind == "unfinished regions":
        units = path / "units"
        names = [entry.name for entry in units.iterdir()] if units.is_dir() else []
        told["finished_units"] = sum(name.isdigit() for name in names)
        told["begun_units"] = sum(name.endswith(".partial") for name in names)
    database = ImageDB(path, allow_partial=True)
    counts = database.region_counts
    told["images"] = len(database)
    told["regions"] = int(counts.sum())
    if len(database):
        told["regions_per_image"] = {"mean": round(float(counts.mean()), 2), "min": int(counts.min()), "max": int(counts.max())}
        told["feature_width"] = database.feature_width
        told["label_classes"] = database.label_classes
        told["tasks_without_data"] = "none" if database.label_classes else "mrc and mrc-kl (no soft labels)"
        first = database[database.keys_list[0]]
        told["first_key"] = database.keys_list[0]
        told["fields"] = [name for name in _FIELDS if getattr(first, name) is not None]
    names_of_classes = database.class_names
    told["class_names"] = None if names_of_classes is None else len(names_of_classes)
    for name in ("detector", "weights_sha256", "box_kind", "selection", "converted_from", "software"):
        if database.header is not None and database.header.get(name) is not None:
            told[name] = database.header[name]
    told["failures"] = len(read_failures(path / "failures.jsonl"))
    return told


_FIELDS: Final = ("features", "norm_bb", "conf", "boxes", "size", "soft_labels", "attributes", "object_ids", "attribute_ids")


def _describe_text(path: Path) -> dict[str, Any]:
    database = TextDB(path, allow_partial=True)
    lengths = database.lengths
    told: dict[str, Any] = {"texts": len(database), "images": len(database.image_keys), "tokenizer": database.tokenizer_name}
    if len(database):
        told["word_pieces"] = {
            "mean": round(float(lengths.mean()), 2),
            "min": int(lengths.min()),
            "max": int(lengths.max()),
            "over_60": int((lengths > 60).sum()),
        }
        told["texts_per_image"] = round(len(database) / max(1, len(database.image_keys)), 2)
        told["first_id"] = database.ids[0]
        told["fields"] = sorted(database.record(0))
    if database.header is not None:
        settings = database.header.get("settings", {})
        told["task"], told["excluded_by"] = settings.get("task"), settings.get("exclude") or "no lists"
        told["report"] = database.header.get("report")
    return told
