"""UNITER's published layout, written; it and this project's region database, read."""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lmdb

from uniter.datasets.errors import BadInput
from uniter.datasets.image_db.database import ImageDB
from uniter.datasets.image_db.formats.npz import uniter_arrays
from uniter.datasets.image_db.formats.records import Item, Selection, Skip, npz_name, refuse
from uniter.datasets.image_db.regions import RegionFeatures
from uniter.datasets.storage.array_codec import pack_arrays
from uniter.datasets.storage.claims import write_note
from uniter.datasets.storage.files import write_json, written_aside
from uniter.datasets.storage.lmdb_files import checked_key, put_all
from uniter.datasets.storage.npz import pack_npz


def read(path: Path, selection: Selection, *, allow_partial: bool = False) -> Iterator[Item]:
    """Items of any region database that `ImageDB` reads, in the order of its keys."""
    rule = {"conf_th": selection.conf_th, "min_bb": selection.min_bb, "max_bb": selection.max_bb, "num_bb": selection.num_bb}
    if selection.keep_all:
        rule = {**rule, "conf_th": -1, "num_bb": 1 << 30}
    database = ImageDB(path, allow_partial=allow_partial, **rule)  # type: ignore[arg-type]
    for key in database.keys_list:
        try:
            yield key, database[key]
        except BadInput as error:
            yield key, error


def uniter_folder(path: Path, selection: Selection, *, compressed: bool = False) -> Path:
    """The folder of the LMDB that `write_uniter` writes."""
    name = "all" if selection.keep_all else f"feat_numbb{selection.num_bb}" if selection.conf_th == -1 else f"feat_{_rule(selection)}"
    return path / (name + ("_compressed" if compressed else ""))


def _rule(selection: Selection) -> str:
    return f"th{selection.conf_th}_max{selection.max_bb}_min{selection.min_bb}"


def write_uniter(
    path: Path,
    items: Iterable[tuple[str, RegionFeatures]],
    *,
    selection: Selection,
    compressed: bool = False,
    note: Mapping[str, Any] | None = None,
    skip: Skip = refuse,
) -> None:
    """Write what UNITER's `convert_imgdir.py` writes: `PATH/feat_th…/data.mdb` and `PATH/nbb_th….json` (or `feat_numbb…`, `all`).

    The records are those given, not cut again; keys get `.npz` at the end. What is there is replaced.
    Differs from UNITER: an image with fewer regions than the lower bound is stated with as many as it has, where UNITER's reader dies.
    """
    folder = uniter_folder(path, selection, compressed=compressed)
    path.mkdir(parents=True, exist_ok=True)
    counts: dict[str, int] = {}
    with written_aside(folder, large=True) as temporary:
        temporary.mkdir()
        environment = lmdb.open(str(temporary), map_size=1 << 26, lock=False, max_spare_txns=0)
        try:
            iterator = iter(items)
            while batch := list(itertools.islice(iterator, 256)):
                values = []
                for key, regions in batch:
                    stored = npz_name(key)
                    try:
                        if stored in counts:
                            raise BadInput(f"image {stored!r} comes twice")
                        arrays = uniter_arrays(key, regions)
                        values.append((checked_key(stored), pack_npz(arrays) if compressed else pack_arrays(arrays)))
                    except BadInput as error:
                        skip(key, regions, error)
                        continue
                    counts[stored] = len(regions)
                put_all(environment, values)
            if not counts:
                raise BadInput(f"no image could be written to {folder}")
            put_all(environment, [(b"__keys__", json.dumps(sorted(counts)).encode())])
        finally:
            environment.close()
        if note is not None:
            write_note(temporary, note)
        if not selection.keep_all and selection.conf_th != -1:
            write_json(path / f"nbb_{_rule(selection)}.json", counts)
