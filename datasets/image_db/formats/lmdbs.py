"""Reading and writing the two LMDB formats: UNITER's published layout and this project's region database."""

import contextlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lmdb

from uniter.datasets.errors import BadInput
from uniter.datasets.image_db.database import ImageDB
from uniter.datasets.image_db.formats.npz import uniter_arrays
from uniter.datasets.image_db.formats.records import Item, Selection, Skip, npz_name, refuse, written_aside
from uniter.datasets.image_db.records import encode_record
from uniter.datasets.image_db.regions import RegionFeatures
from uniter.datasets.image_db.writing.side_files import write_box_ids
from uniter.datasets.image_db.writing.units import UnitStore
from uniter.datasets.storage.array_codec import pack_arrays
from uniter.datasets.storage.files import sync, write_json
from uniter.datasets.storage.index_file import hash_key
from uniter.datasets.storage.lmdb_files import checked_key, put_all
from uniter.datasets.storage.npz import pack_npz

UNIT_RECORDS = 512


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


def write_uniter(
    path: Path,
    items: Iterable[tuple[str, RegionFeatures]],
    *,
    selection: Selection,
    compressed: bool = False,
    overwrite: bool = False,
    skip: Skip = refuse,
) -> None:
    """Write what UNITER's `convert_imgdir.py` writes: `PATH/feat_th…/data.mdb` and `PATH/nbb_th….json` (or `feat_numbb…`, `all`).

    The records are those given, not cut again; keys get `.npz` at the end.
    """
    rule = f"th{selection.conf_th}_max{selection.max_bb}_min{selection.min_bb}"
    name = "all" if selection.keep_all else f"feat_numbb{selection.num_bb}" if selection.conf_th == -1 else f"feat_{rule}"
    name += "_compressed" if compressed else ""
    folder = path / name
    if folder.exists() and not (overwrite and (folder / "data.mdb").is_file()):
        raise BadInput(f"{folder} is there already; choose another folder, or --overwrite")
    path.mkdir(parents=True, exist_ok=True)
    counts: dict[str, int] = {}
    with written_aside(folder, folder=True) as temporary:
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
                    counts[stored] = max(len(regions), selection.min_bb)  # the lower bound is not cut to the rows there are
                put_all(environment, values)
            if not counts:
                raise BadInput(f"no image could be written to {folder}")
            put_all(environment, [(b"__keys__", json.dumps(sorted(counts)).encode())])
        finally:
            environment.close()
        if not selection.keep_all and selection.conf_th != -1:
            write_json(path / f"nbb_{rule}.json", counts)
    sync(path)


def write_ours(
    path: Path,
    items: Iterable[Item],
    *,
    settings: Mapping[str, Any],
    header: Callable[[], Mapping[str, Any]],
    box_ids: Mapping[str, Sequence[Any]] | None = None,
    overwrite: bool = False,
) -> list[dict[str, Any]]:
    """Write a region database in units of 512 records; the same call again goes on where a killed one stopped.

    Args:
        header: asked at the end for what else the header says.
        box_ids: the caller's ids of given boxes by key.

    Broken items become rows of `failures.jsonl`; so does an image that comes twice.

    Returns:
        The failures.
    """
    store = UnitStore(path, settings=settings, overwrite=overwrite)
    if store.is_complete():
        return store.failures()
    seen: set[int] = set()
    widths: dict[str, int] = {"feature_width": 0, "label_classes": 0}
    units = 0
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, UNIT_RECORDS)):
        writer = store.unit(units)
        units += 1
        with writer or contextlib.nullcontext() as unit:
            for key, regions in batch:
                digest = hash_key(key.encode(errors="surrogatepass"))
                twice = digest in seen
                seen.add(digest)
                if isinstance(regions, RegionFeatures) and not widths["feature_width"]:
                    widths["feature_width"] = regions.features.shape[1]
                    widths["label_classes"] = 0 if regions.soft_labels is None else regions.soft_labels.shape[1]
                if unit is None or (key in unit.done and not twice):
                    continue
                try:
                    if isinstance(regions, BadInput):
                        raise regions
                    if twice:
                        raise BadInput(f"image {key!r} comes twice; the first one was taken")
                    found = regions.features.shape[1], 0 if regions.soft_labels is None else regions.soft_labels.shape[1]
                    if found != (widths["feature_width"], widths["label_classes"]):
                        raise BadInput(
                            f"image {key!r}: features and soft labels are {found[0]} and {found[1]} wide, "
                            f"the first image's {widths['feature_width']} and {widths['label_classes']}"
                        )
                    unit.put(key, encode_record(regions, key=key), regions=len(regions))
                except BadInput as error:
                    unit.fail(key, key, str(error))
            if unit is not None:
                unit.complete()
    if not store.is_complete():
        write_box_ids(path, box_ids or {})
    if not store.finish(units=units, header={**widths, **header()}):
        raise BadInput(f"{path} is being written by another process; wait for it, or choose another folder")
    return store.failures()
