"""What stands beside `data.mdb` once all units are in it: put together from the units, and taken apart where they are opened anew."""

import shutil
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uniter.datasets.errors import BadInput
from uniter.datasets.image_db.ours import value_places
from uniter.datasets.image_db.writing.absorbing import Standing, unit_folder, write_standing
from uniter.datasets.image_db.writing.noted_photographs import note_photographs
from uniter.datasets.image_db.writing.side_files import read_failures, write_failures
from uniter.datasets.image_db.writing.unit_files import save_unit_index
from uniter.datasets.storage.cards import CARD_FILE, has_foreign_readme, region_card
from uniter.datasets.storage.files import read_json, sync, write_bytes, write_json
from uniter.datasets.storage.index_file import INDEX, KEY_COLUMNS, KeyList, key_columns, load_arrays, map_arrays, save_arrays
from uniter.datasets.storage.lmdb_files import FIRST_MAP_BYTES, open_writer

FORMAT_VERSION = 1


class _Units:
    """The indexes and failures of all units, end to end; what they know of the photographs, unit by unit."""

    def __init__(self, path: Path, units: int) -> None:
        found: dict[str, list[NDArray[Any]]] = defaultdict(list)
        self.keys: list[bytes] = []
        self.failed: list[dict[str, Any]] = []
        self.photographs: list[dict[str, NDArray[Any]]] = []
        self.counts: list[int] = []
        failure_units: list[int] = []
        for number in range(units):
            folder = str(unit_folder(path, number))
            columns = load_arrays(f"{folder}/{INDEX}", needed=(*KEY_COLUMNS, "region_counts", "checksums"))
            text, begin = columns["key_bytes"].tobytes(), 0
            for end in columns["key_ends"].tolist():
                self.keys.append(text[begin:end])
                begin = end
            hashes = np.empty(len(columns["hashes"]), dtype=np.uint64)
            hashes[columns["hash_rows"]] = columns["hashes"]
            found["hashes"].append(hashes)
            found["region_counts"].append(columns["region_counts"])
            found["checksums"].append(columns["checksums"])
            found["units"].append(np.full(len(hashes), number, dtype=np.int32))
            self.photographs.append({name: column for name, column in columns.items() if name.startswith("photograph_")})
            self.counts.append(len(hashes))
            rows = read_failures(f"{folder}/failures.jsonl")
            self.failed += rows
            failure_units += [number] * len(rows)
        kinds = {"hashes": np.uint64, "region_counts": np.int32, "checksums": np.uint32, "units": np.int32}
        self.columns = {name: np.concatenate([*found[name], np.zeros(0, kind)]).astype(kind) for name, kind in kinds.items()}
        self.failure_units = np.array(failure_units, dtype=np.int32)


def put_together(path: Path, units: int, header: Mapping[str, Any]) -> None:
    """Write what stands beside `data.mdb`, from the units that are all in it; `header.json` last."""
    found = _Units(path, units)
    environment = open_writer(path, FIRST_MAP_BYTES)  # also makes the file where no unit holds a record
    try:
        stored = environment.stat()["entries"]
    finally:
        environment.close()
    if stored != len(found.keys):
        raise BadInput(f"{path}/data.mdb holds {stored} records but its units {len(found.keys)}; was a file replaced? Use --overwrite")
    note_photographs(path, found.columns["hashes"], found.photographs, found.counts)
    order = sorted(range(stored), key=found.keys.__getitem__)
    keys = [found.keys[row] for row in order]
    columns = {name: column[order] for name, column in found.columns.items()}
    hashes = columns.pop("hashes")
    save_arrays(
        path / INDEX,
        {
            **key_columns(keys, hashes=hashes),
            **columns,
            "failure_units": found.failure_units,
            **value_places(path / "data.mdb", keys),
        },
    )
    write_failures(path / "failures.jsonl", found.failed)
    (path / "lock.mdb").unlink(missing_ok=True)
    sync(path)
    told = {
        "format_version": FORMAT_VERSION,
        "kind": "regions",
        "images": len(keys),
        "regions": int(columns["region_counts"].sum()),
        "failures": len(found.failed),
        "units": units,
        **header,
    }
    if not has_foreign_readme(path):
        write_bytes(path / CARD_FILE, region_card(told).encode())
    write_json(path / "header.json", told)


def take_apart(path: Path, remade: Path) -> None:
    """Make the units of a complete database again in the folder `remade`, all of them moved into `data.mdb`.

    Raises:
        BadInput: its files do not fit together.
    """
    rows = read_failures(path / "failures.jsonl")
    columns = map_arrays(path / INDEX, needed=(*KEY_COLUMNS, "region_counts", "checksums", "units", "failure_units"))
    keys, units, failed_units = KeyList(columns), columns["units"], columns["failure_units"]
    if len(failed_units) != len(rows):
        raise BadInput(
            f"{path}/failures.jsonl has {len(rows)} rows but the index knows of {len(failed_units)} failures; was it edited? "
            "Use --overwrite to begin anew"
        )
    if not len(keys) == len(units) == len(columns["region_counts"]) == len(columns["checksums"]):
        raise BadInput(f"{path / INDEX} has columns of different lengths; run `uniter-db check --repair OUT` on the database")
    shutil.rmtree(remade, ignore_errors=True)
    count = read_json(path / "header.json")["units"]
    order = np.argsort(units, kind="stable")
    bounds = np.searchsorted(units[order], np.arange(count + 1))
    failed: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row, unit in zip(rows, failed_units.tolist(), strict=True):
        failed[unit].append(row)
    for number in range(count):
        folder = remade / f"{number:05d}"
        folder.mkdir(parents=True)
        mine = order[bounds[number] : bounds[number + 1]]
        save_unit_index(folder / INDEX, [keys.raw(int(row)) for row in mine], columns["region_counts"][mine], columns["checksums"][mine])
        if failed[number]:
            write_failures(folder / "failures.jsonl", failed[number])
    remade.mkdir(exist_ok=True)
    write_standing(remade, Standing(count, len(keys), swept=count))
    sync(remade)
