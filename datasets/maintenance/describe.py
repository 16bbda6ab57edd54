"""`uniter-db info`: what a database says of itself."""

import contextlib
import os
from pathlib import Path
from typing import Any, Final

import lmdb

from uniter.datasets.errors import BadInput, UniterError
from uniter.datasets.image_db import ImageDB
from uniter.datasets.image_db.formats.records import Selection
from uniter.datasets.image_db.formats.table import FORMATS, read_items, recognise
from uniter.datasets.image_db.parts import parts_under_way
from uniter.datasets.image_db.regions import has_positions
from uniter.datasets.image_db.writing.side_files import read_failures
from uniter.datasets.maintenance.convert import provenance_of
from uniter.datasets.maintenance.kinds import database_kind
from uniter.datasets.progress import Progress
from uniter.datasets.storage.claims import PROVENANCE, REPORT, note_of
from uniter.datasets.storage.files import read_json_object
from uniter.datasets.text_db import TextDB

# -------------------------------------------------------------------------------------------------------------------- looking


def describe(path: Path) -> dict[str, Any]:
    """What a database is and holds, as far as it can be read; damage is told under "error", never raised. Features in the layout of
    another project's code are told of in the same words.

    Raises:
        BadInput: no database, and of no layout that is known.
    """
    layout = _layout_of_others(path)
    if layout is not None:
        return _describe_others(path, layout)
    kind = database_kind(path)
    told: dict[str, Any] = {
        "path": str(path),
        "kind": kind,
        "complete": not kind.startswith("unfinished") and parts_under_way(path) is None,
    }
    told["bytes"] = _bytes_below(path)
    try:
        told |= _describe_text(path) if kind.endswith("text") else _describe_regions(path, kind)
    except (UniterError, OSError, ValueError, KeyError, TypeError, lmdb.Error) as error:
        told["complete"] = False
        told["error"] = f"{error}; see `uniter-db check`"
    return told


def _bytes_below(path: Path) -> int:
    """The sizes of all files together; what is moved or removed meanwhile, by a command that is writing there, may be left out."""
    if path.is_file():
        return path.stat().st_size
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += Path(folder, name).stat().st_size
    return total


_OURS: Final = ("lmdb", "uniter", "uniter-compressed")


def _layout_of_others(path: Path) -> str | None:
    """The name in `FORMATS` of features that are no database; None of databases, and of what is not known (`database_kind` says so)."""
    try:
        name = recognise(path)
    except BadInput:
        return None
    return None if name in _OURS else name


def _describe_others(path: Path, name: str) -> dict[str, Any]:
    note = read_json_object(note_of(path)) if note_of(path).is_file() else None
    told: dict[str, Any] = {"path": str(path), "kind": "features", "format": name, "means": FORMATS[name].means, "complete": True}
    told["bytes"] = _bytes_below(path)
    if note is not None:
        told["complete"] = REPORT in note
        told |= {"made_by": note.get("made_by"), "made_from": note.get("source"), **_provenance(note.get(PROVENANCE))}
    try:
        told |= _counted(path, name)
    except (UniterError, OSError) as error:
        told |= {"complete": False, "error": str(error)}
    return told


def _provenance(known: Any) -> dict[str, Any]:
    return {one: known[one] for one in _ORIGIN if known.get(one) is not None} if isinstance(known, dict) else {}


def _counted(path: Path, name: str) -> dict[str, Any]:
    """All images looked at: nothing else knows how many there are, and how many are whole."""
    images = regions = unreadable = 0
    first: dict[str, Any] = {}
    with Progress(None, unit="images", label=name) as progress:
        for key, found in read_items(path, source=name, selection=Selection(keep_all=True)):
            progress.update()
            if isinstance(found, BadInput):
                unreadable += 1
                first.setdefault("first_error", str(found))
                continue
            images, regions = images + 1, regions + len(found)
            if images == 1:
                fields = [one for one in _FIELDS if getattr(found, one) is not None and (one != "norm_bb" or has_positions(found))]
                labels = 0 if found.soft_labels is None else found.soft_labels.shape[1]
                first |= {"feature_width": found.features.shape[1], "label_classes": labels, "first_key": key, "fields": fields}
    return {"images": images, "regions": regions, "unreadable": unreadable, **first}


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
    told |= _provenance(database.header if database.header is not None else provenance_of(path))
    told["failures"] = len(read_failures(path / "failures.jsonl"))
    return told


_ORIGIN: Final = ("detector", "weights_sha256", "box_kind", "selection", "converted_from", "software")
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
