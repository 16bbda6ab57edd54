"""LMDB on disk: opening for reading without a way to crash, and the write side of a region database.

What a reader would get wrong: a database is written twice. Each fixed unit of the work first gets an LMDB of its own
(`OUT/units/00007.partial/`, renamed to `OUT/units/00007/` when the unit is done), then its records are moved into
`OUT/data.mdb`, units in order, one transaction a unit. So a killed run loses at most one batch, several processes need no
common writer, and the final file is a function of the records alone, however often the work was killed or divided.

    OUT/settings.json    first: all that changes a value
    OUT/units/           while unfinished
    OUT/data.mdb         LMDB format version 1, key -> record
    OUT/index.safetensors, OUT/failures.jsonl, OUT/box_ids.jsonl where boxes were given with ids
    OUT/README.md        the dataset card
    OUT/header.json      last: complete
"""

import contextlib
import json
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import lmdb
import numpy as np
import orjson

from uniter.datasets.errors import BadInput, SettingsDiffer, UniterError
from uniter.datasets.image_db.ours import value_places
from uniter.datasets.image_db.writing.side_files import BOX_IDS, read_failures, write_failures
from uniter.datasets.image_db.writing.unit_files import (
    SUMMARY,
    Unit,
    drop_if_damaged,
    open_unit,
    save_unit_index,
    tidy_partial,
    unit_failures,
    unit_names,
)
from uniter.datasets.storage.cards import CARD_FILE, has_foreign_readme, region_card
from uniter.datasets.storage.files import difference_in_words, first_json, first_phrases, read_json, sync, write_bytes, write_json
from uniter.datasets.storage.index_file import INDEX, KEY_COLUMNS, KeyList, key_columns, map_arrays, save_arrays
from uniter.datasets.storage.lmdb_files import FIRST_MAP_BYTES, checked_key, full_disk_said, open_writer
from uniter.datasets.storage.locks import file_lock

__all__ = ["UnitStore", "UnitWriter"]

FORMAT_VERSION = 1


"""The caller's ids of given boxes: {"key", "ids"}, ids in the order of the record's rows."""


_OVERWRITING = "overwriting"  # a file that stands there while `--overwrite` clears the folder


class UnitStore:
    """The write side of a region database (contract, "fixed units").

    Args:
        path: the folder; made if it is absent.
        settings: all that changes a value, JSON; written first.
        overwrite: throw away what is there, whatever its settings.

    Raises:
        SettingsDiffer: `path` was begun with other settings; the difference in words.
        BadInput: `path` holds something that is no database of ours.
    """

    def __init__(self, path: Path | str, *, settings: Mapping[str, Any], overwrite: bool = False) -> None:
        self.path = Path(path)
        self.units_folder = self.path / "units"
        asked = json.loads(json.dumps(settings))
        if self.path.exists() and not self.path.is_dir():
            raise BadInput(f"{self.path} is a file; expected a folder to write the database into")
        self.path.mkdir(parents=True, exist_ok=True)
        if overwrite or (self.path / _OVERWRITING).exists():
            self._clear()
        if not (self.path / "settings.json").exists() and ((self.path / "data.mdb").exists() or (self.path / "header.json").exists()):
            raise BadInput(f"{self.path} holds a database that was made elsewhere; choose another folder, or --overwrite")
        with full_disk_said(self.path):
            stored = first_json(self.path / "settings.json", asked)
        phrases = difference_in_words(stored, asked)
        if phrases:
            raise SettingsDiffer(
                f"{self.path} was begun with other settings ({first_phrases(phrases)}): use the same ones, another folder, or --overwrite"
            )
        self._recover()
        if not self.is_complete():
            self.units_folder.mkdir(exist_ok=True)

    def _clear(self) -> None:
        """Throw everything away; where that is killed, it is gone on with when the folder is next written to.

        The header goes first and the settings last: in between this is an unfinished database, not one that was made elsewhere.
        """
        (self.path / _OVERWRITING).touch()
        sync(self.path)
        for name in ("header.json", "data.mdb", "lock.mdb", INDEX, "failures.jsonl", BOX_IDS):
            (self.path / name).unlink(missing_ok=True)
        if not has_foreign_readme(self.path):
            (self.path / CARD_FILE).unlink(missing_ok=True)
        for name in ("units", "units.tmp"):
            shutil.rmtree(self.path / name, ignore_errors=True)
        (self.path / "settings.json").unlink(missing_ok=True)
        (self.path / _OVERWRITING).unlink(missing_ok=True)

    def _recover(self) -> None:
        """Bring what a kill inside `forget_failures` or at the end of `finish` left into one of the two plain states."""
        remade = self.path / "units.tmp"
        if self.is_complete():
            shutil.rmtree(remade, ignore_errors=True)
        elif remade.is_dir():
            shutil.rmtree(self.units_folder, ignore_errors=True)
            remade.rename(self.units_folder)

    # -- what is there ---------------------------------------------------------------------------------------------------

    def is_complete(self) -> bool:
        """Whether `header.json` is there."""
        return (self.path / "header.json").exists()

    def finished_units(self) -> set[int]:
        """Numbers of the units that are done (all of them in a complete database)."""
        if self.is_complete():
            return set(range(read_json(self.path / "header.json")["units"]))
        return {int(name) for name in unit_names(self.units_folder) if name.isdigit()}

    def _partial_units(self) -> set[int]:
        names = unit_names(self.units_folder)
        return {int(name[: -len(".partial")]) for name in names if name.endswith(".partial") and name[: -len(".partial")].isdigit()}

    def failures(self) -> list[dict[str, Any]]:
        """{"key", "path", "error"} of all units, finished or not, by unit and key."""
        if self.is_complete():
            return read_failures(self.path / "failures.jsonl")
        rows = []
        for number in sorted(self.finished_units() | self._partial_units()):
            folder = self._folder(number)
            if folder.is_dir():
                rows += read_failures(folder / "failures.jsonl")
            else:
                with contextlib.suppress(lmdb.Error, UniterError):
                    rows += unit_failures(self._folder(number, partial=True))
        return rows

    def _folder(self, number: int, *, partial: bool = False) -> Path:
        return self.units_folder / f"{number:05d}{'.partial' if partial else ''}"

    # -- writing ---------------------------------------------------------------------------------------------------------

    def unit(self, number: int) -> "UnitWriter | None":
        """A writer for unit `number`, a context manager that goes on with what a killed run left.

        None if the unit is finished or another living process (or writer) has it.
        """
        if self.is_complete() or self._folder(number).is_dir():
            return None
        stack = contextlib.ExitStack()
        if not stack.enter_context(file_lock(self.units_folder / ".locks" / f"{number:05d}", wait=False)):
            stack.close()
            return None
        try:
            if self.is_complete() or self._folder(number).is_dir():  # finished while we waited for the lock
                stack.close()
                return None
            with full_disk_said(self._folder(number, partial=True)):
                return UnitWriter(self, number, stack)
        except BaseException:
            stack.close()
            raise

    def forget_failures(self) -> set[int]:
        """Forget all failed rows (`--retry-failed`); the units that held them are unfinished again.

        Returns:
            Their numbers. In a complete database without failures nothing happens.
        """
        if self.is_complete():
            self._reopen()
        numbers = set()
        for number in sorted(self.finished_units() | self._partial_units()):
            with file_lock(self.units_folder / ".locks" / f"{number:05d}", wait=False) as mine:
                if not mine:
                    continue
                finished, partial = self._folder(number), self._folder(number, partial=True)
                folder = finished if finished.is_dir() else partial
                forgot = bool(read_failures(folder / "failures.jsonl"))
                if (folder / "data.mdb").exists():
                    with full_disk_said(folder), open_unit(folder) as unit, unit.environment.begin(write=True) as transaction:
                        forgot |= transaction.stat(unit.failures)["entries"] > 0
                        transaction.drop(unit.failures, delete=False)
                if forgot:
                    numbers.add(number)
                    if folder == finished:
                        finished.rename(partial)
                    (partial / "failures.jsonl").unlink(missing_ok=True)
        return numbers

    def _reopen(self) -> None:
        """Turn a complete database with failures back into an unfinished one, all its units absorbed."""
        rows = read_failures(self.path / "failures.jsonl")
        if not rows:
            return
        columns = map_arrays(self.path / INDEX, needed=(*KEY_COLUMNS, "region_counts", "checksums", "units", "failure_units"))
        keys, units = KeyList(columns), columns["units"]
        failed_units = columns["failure_units"]
        if len(failed_units) != len(rows):
            raise BadInput(
                f"{self.path}/failures.jsonl has {len(rows)} rows but the index knows of {len(failed_units)} failures; was it edited? "
                "Use --overwrite to begin anew"
            )
        if not len(keys) == len(units) == len(columns["region_counts"]) == len(columns["checksums"]):
            raise BadInput(f"{self.path / INDEX} has columns of different lengths; run `uniter-db check --repair OUT` on the database")
        remade = self.path / "units.tmp"
        shutil.rmtree(remade, ignore_errors=True)
        order = np.argsort(units, kind="stable")
        bounds = np.searchsorted(units[order], np.arange(read_json(self.path / "header.json")["units"] + 1))
        for number in range(len(bounds) - 1):
            folder = remade / f"{number:05d}"
            folder.mkdir(parents=True)
            mine = order[bounds[number] : bounds[number + 1]]
            save_unit_index(
                folder / INDEX, [keys.raw(int(row)) for row in mine], columns["region_counts"][mine], columns["checksums"][mine]
            )
            write_failures(folder / "failures.jsonl", [row for row, unit in zip(rows, failed_units, strict=True) if unit == number])
        sync(remade)
        (self.path / "header.json").unlink()
        sync(self.path)
        shutil.rmtree(self.units_folder, ignore_errors=True)
        remade.rename(self.units_folder)
        for name in (INDEX, "failures.jsonl"):
            (self.path / name).unlink(missing_ok=True)

    def absorb(self, *, wait: bool = False) -> None:
        """Move finished units, in order and without a gap, into `data.mdb`; a unit's own file is deleted after the commit.

        Safe to be killed anywhere. Without `wait`, nothing happens while another process does the same.
        """
        with file_lock(self.units_folder / ".locks" / "absorb", wait=wait) as mine:
            if not mine or self.is_complete():
                return
            finished = self.finished_units()
            number = 0
            while number in finished:
                if (self._folder(number) / "data.mdb").exists():
                    with full_disk_said(self.path):
                        self._absorb_one(number)
                number += 1

    def _absorb_one(self, number: int) -> None:
        folder = self._folder(number)
        intent_path = self.units_folder / "absorbing.json"
        with open_unit(folder) as unit, unit.environment.begin(buffers=True) as source:
            count = source.stat(unit.records)["entries"]
            sizes = [len(value) for _, value in source.cursor(unit.records)]
            # The map's size is stored in the file: it may depend on the records only, not on how often the work was killed.
            pages = sum(size // 4096 + 2 for size in sizes) + 256
            environment = open_writer(self.path, FIRST_MAP_BYTES)
            try:
                used = environment.info()["last_pgno"] + 1
                map_bytes = FIRST_MAP_BYTES
                while map_bytes < 2 * 4096 * (used + pages):
                    map_bytes *= 2
                intent = read_json(intent_path) if intent_path.exists() else None
                entries = environment.stat()["entries"]
                committed = intent is not None and intent["unit"] == number and entries == intent["entries"] + count
                if count and not committed:
                    write_json(intent_path, {"unit": number, "entries": entries})
                    while True:
                        environment.set_mapsize(map_bytes)
                        try:
                            with environment.begin(write=True) as target:
                                for key, value in source.cursor(unit.records):
                                    if not target.put(key, value, overwrite=False):
                                        raise BadInput(f"key {bytes(key).decode()!r} of unit {number} was already written by another unit")
                            break
                        except lmdb.MapFullError:
                            map_bytes *= 2
            finally:
                environment.close()
        (folder / "data.mdb").unlink()
        (folder / "lock.mdb").unlink(missing_ok=True)
        sync(folder)

    def finish(self, *, units: int, header: Mapping[str, Any]) -> bool:
        """Complete the database if all units are there: `data.mdb`, index, `failures.jsonl`, and `header.json` last.

        Args:
            units: how many units the whole work has, numbered from 0.
            header: what else the header says (detector, class names, ...).

        Returns:
            Whether the database is complete. Safe to be killed anywhere and called again, and by several processes.
        """
        if self.is_complete():
            self._sweep()
            return True
        if self.finished_units() != set(range(units)):
            extra = self.finished_units() - set(range(units))
            if extra:
                raise BadInput(f"{self.path} holds unit {min(extra)}, but the work has {units} units; use --overwrite to begin anew")
            return False
        self.absorb(wait=True)
        with file_lock(self.units_folder / ".locks" / "finish", wait=True), full_disk_said(self.path):
            if not self.is_complete():  # another process may have done it while we waited
                self._put_together(units, header)
        self._sweep()
        return True

    def _put_together(self, units: int, header: Mapping[str, Any]) -> None:
        """Write what stands beside `data.mdb`, from the units that are all in it; `header.json` last."""
        keys: list[bytes] = []
        counts, checksums, unit_numbers, failure_units = [], [], [], []
        failed: list[dict[str, Any]] = []
        for number in range(units):
            folder = self._folder(number)
            columns = map_arrays(folder / INDEX)
            unit_keys = KeyList(columns)
            keys += [unit_keys.raw(row) for row in range(len(unit_keys))]
            counts.append(columns["region_counts"])
            checksums.append(columns["checksums"])
            unit_numbers.append(np.full(len(unit_keys), number, dtype=np.int32))
            rows = read_failures(folder / "failures.jsonl")
            failed += rows
            failure_units += [number] * len(rows)
        environment = open_writer(self.path, FIRST_MAP_BYTES)  # also makes the file where no unit holds a record
        try:
            stored = environment.stat()["entries"]
        finally:
            environment.close()
        if stored != len(keys):
            raise BadInput(f"{self.path}/data.mdb holds {stored} records but its units {len(keys)}; was a file replaced? Use --overwrite")
        order = sorted(range(len(keys)), key=keys.__getitem__)
        places = value_places(self.path / "data.mdb", [keys[row] for row in order])
        region_counts = np.concatenate([*counts, np.zeros(0, np.int32)])[order].astype(np.int32)
        save_arrays(
            self.path / INDEX,
            {
                **key_columns([keys[row] for row in order]),
                "region_counts": region_counts,
                "checksums": np.concatenate([*checksums, np.zeros(0, np.uint32)])[order].astype(np.uint32),
                "units": np.concatenate([*unit_numbers, np.zeros(0, np.int32)])[order].astype(np.int32),
                "failure_units": np.array(failure_units, dtype=np.int32),
                **places,
            },
        )
        write_failures(self.path / "failures.jsonl", failed)
        (self.path / "lock.mdb").unlink(missing_ok=True)
        sync(self.path)
        told = {
            "format_version": FORMAT_VERSION,
            "kind": "regions",
            "images": len(keys),
            "regions": int(region_counts.sum()),
            "failures": len(failed),
            "units": units,
            **header,
        }
        if not has_foreign_readme(self.path):
            write_bytes(self.path / CARD_FILE, region_card(told).encode())
        write_json(self.path / "header.json", told)

    def _sweep(self) -> None:
        """Remove what only an unfinished database needs, and temporary files of killed processes."""
        shutil.rmtree(self.units_folder, ignore_errors=True)
        for name in ("settings.json", "header.json", "failures.jsonl", INDEX, CARD_FILE):
            for leftover in self.path.glob(f"{name}.*"):
                leftover.unlink(missing_ok=True)


class UnitWriter:
    """Writes one unit; made by `UnitStore.unit`, used as a context manager.

    Attributes:
        number: which unit.
        done: keys already stored or failed in an earlier try of this unit, and now.
    """

    def __init__(self, store: UnitStore, number: int, stack: contextlib.ExitStack) -> None:
        self._store, self.number, self._stack = store, number, stack
        self._folder = store._folder(number, partial=True)
        self._folder.mkdir(parents=True, exist_ok=True)
        tidy_partial(self._folder)
        drop_if_damaged(self._folder / "data.mdb")
        self._unit: Unit = stack.enter_context(open_unit(self._folder))
        self._values: dict[bytes, tuple[bytes, int]] = {}
        self._failures: dict[bytes, bytes] = {}
        absorbed = self._folder / f"absorbed.{INDEX}"
        self._absorbed = map_arrays(absorbed) if absorbed.exists() else None
        with self._unit.environment.begin() as transaction:
            self.done: set[str] = {key.decode() for key, _ in transaction.cursor(self._unit.summaries)}
            self.done |= {orjson.loads(row)["key"] for _, row in transaction.cursor(self._unit.failures)}
        if self._absorbed is not None:
            self.done |= set(KeyList(self._absorbed))

    def put(self, key: str, value: bytes, *, regions: int) -> None:
        """Store a record at the next `commit`.

        Raises:
            BadInput: the key is empty, too long for LMDB, or was already written in this unit.
        """
        raw = checked_key(key)
        if key in self.done:
            raise BadInput(f"image {key!r} was already written; every image needs a key of its own (see --key)")
        self._values[raw] = (value, regions)
        self.done.add(key)

    def fail(self, key: str, path: str, error: str) -> None:
        """Record at the next `commit` that the image `key` could not be done."""
        # File names need not be valid UTF-8; what JSON cannot hold is written as \\udc80.
        plain = [text.encode(errors="backslashreplace").decode() for text in (key, path, " ".join(error.split()))]
        row = dict(zip(("key", "path", "error"), plain, strict=True))
        # Under a digest: the key may be the very thing that is too long.
        digest = zlib.crc32(key.encode(errors="replace")).to_bytes(4, "big") + key.encode(errors="replace")[:400]
        self._failures[digest] = json.dumps(row, ensure_ascii=True).encode()
        self.done.add(key)

    def commit(self) -> None:
        """Make everything so far durable, in one transaction. One call per batch.

        Raises:
            UniterError: the disk is full; what was committed before is kept.
        """
        if not self._values and not self._failures:
            return
        environment = self._unit.environment
        with full_disk_said(self._folder):
            while True:
                try:
                    with environment.begin(write=True) as transaction:
                        for key in sorted(self._values):
                            value, regions = self._values[key]
                            transaction.put(key, value, db=self._unit.records)
                            transaction.put(key, SUMMARY.pack(regions, zlib.crc32(value)), db=self._unit.summaries)
                        for digest in sorted(self._failures):
                            transaction.put(digest, self._failures[digest], db=self._unit.failures)
                    break
                except lmdb.MapFullError:  # no transaction is open any more: the map may grow
                    environment.set_mapsize(2 * environment.info()["map_size"])
        self._values.clear()
        self._failures.clear()

    def complete(self) -> None:
        """Commit what is left and let the unit appear by rename; then move finished units into `data.mdb` if nobody else does."""
        self.commit()
        with full_disk_said(self._folder):
            with self._unit.environment.begin() as transaction:
                keys, summaries = [], []
                for key, packed in transaction.cursor(self._unit.summaries):
                    keys.append(key)
                    summaries.append(SUMMARY.unpack(packed))
                rows = [orjson.loads(row) for _, row in transaction.cursor(self._unit.failures)]
            counts = np.array([count for count, _ in summaries], dtype=np.int32)
            checksums = np.array([checksum for _, checksum in summaries], dtype=np.uint32)
            if self._absorbed is not None:
                earlier = KeyList(self._absorbed)
                keys += [earlier.raw(row) for row in range(len(earlier))]
                counts = np.concatenate([counts, self._absorbed["region_counts"]])
                checksums = np.concatenate([checksums, self._absorbed["checksums"]])
            save_unit_index(self._folder / INDEX, keys, counts, checksums)
            write_failures(self._folder / "failures.jsonl", sorted(rows, key=lambda row: str(row["key"])))
            finished = self._store._folder(self.number)
            self._unit.environment.close()
            (self._folder / "lock.mdb").unlink(missing_ok=True)
            sync(self._folder)
            self._folder.rename(finished)
            sync(finished.parent)
        self._stack.close()
        self._store.absorb()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()
