"""LMDB on disk: opening for reading without a way to crash, and the write side of a region database.

What a reader would get wrong: a database is written twice. Each fixed unit of the work first gets an LMDB of its own
(`OUT/units/00007.partial/`, renamed to `OUT/units/00007/` when the unit is done), then its records are moved into
`OUT/data.mdb`, units in order, one transaction a unit. So a killed run loses at most one batch, several processes need no
common writer, and the final file is a function of the records alone, however often the work was killed or divided.

    OUT/settings.json    first: all that changes a value
    OUT/units/           while unfinished
    OUT/data.mdb         LMDB format version 1, key -> record
    OUT/index.safetensors, OUT/failures.jsonl, OUT/box_ids.jsonl where boxes were given with ids
    OUT/photographs.safetensors   sizes of the photographs, where they were extracted here
    OUT/README.md        the dataset card
    OUT/header.json      last: complete
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import lmdb
import numpy as np

from uniter.datasets.errors import BadInput, UniterError
from uniter.datasets.image_db.ours import value_places
from uniter.datasets.image_db.writing.side_files import BOX_IDS, read_failures, write_failures
from uniter.datasets.image_db.writing.unit_files import failure_digest, open_unit, save_unit_index, tidy_partial, unit_failures, unit_names
from uniter.datasets.image_db.writing.unit_writer import UnitWriter
from uniter.datasets.storage.cards import CARD_FILE, has_foreign_readme, region_card
from uniter.datasets.storage.claims import SETTINGS, Maker, claim
from uniter.datasets.storage.files import read_json, read_json_object, sync, write_bytes, write_json
from uniter.datasets.storage.index_file import INDEX, KEY_COLUMNS, KeyList, key_columns, map_arrays, save_arrays
from uniter.datasets.storage.lmdb_files import FIRST_MAP_BYTES, full_disk_said, open_writer
from uniter.datasets.storage.locks import file_lock

__all__ = ["ADDED", "PHOTOGRAPHS", "REGIONS", "UnitStore", "UnitWriter"]

FORMAT_VERSION = 1


_OLD_MARK = "overwriting"  # a file of older versions, which cleared the folder first: they were killed meanwhile


ADDED = "added.json"  # while a database grows: what is to be added
PHOTOGRAPHS = "photographs.safetensors"  # how long they were: written and compared by extraction
REGIONS = Maker(
    "regions",
    "header.json",
    ("data.mdb", "lock.mdb", INDEX, "failures.jsonl", BOX_IDS, CARD_FILE, "units", "units.tmp", ADDED, PHOTOGRAPHS, _OLD_MARK),
)


class UnitStore:
    """The write side of a region database (contract, "fixed units"), on a claim that several processes may hold.

    Args:
        path: the folder; made if it is absent.
        settings: all that changes a value, JSON; written first.
        sources: what the database is made from, see `claims.claim`.
        overwrite: begin anew, beside what is there, and put the new one in its place when it is complete.
        may_differ: keys of `settings` of which another value refuses nothing: `settings` then says what is stored, and `extend` changes it.

    Attributes:
        settings: what `settings.json` says.

    Raises:
        SettingsDiffer: `path` was begun with other settings, or from other contents; the difference in words.
        BadInput: `path` holds something that is no database of ours.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        settings: Mapping[str, Any],
        sources: Mapping[str, Path] | None = None,
        overwrite: bool = False,
        may_differ: Sequence[str] = (),
    ) -> None:
        if (Path(path) / _OLD_MARK).is_file():
            (Path(path) / _OLD_MARK).unlink()
            overwrite = True
        self.claim = claim(path, settings, maker=REGIONS, sources=sources, overwrite=overwrite, may_differ=may_differ)
        self.settings: Mapping[str, Any] = self.claim.settings
        self._recover()
        if not self.is_complete():
            self.units_folder.mkdir(exist_ok=True)

    @property
    def path(self) -> Path:
        """Where the database is: beside the one that it is to replace until it is complete."""
        return self.claim.out if self.claim.published() else self.claim.folder

    @property
    def units_folder(self) -> Path:
        """Where units lie while the database is unfinished."""
        return self.path / "units"

    def _recover(self) -> None:
        """Bring what a kill inside `_reopen` or at the end of `finish` left into one of the two plain states."""
        remade = self.path / "units.tmp"
        if remade.is_dir():
            with self._reopening():
                if self.is_complete():
                    shutil.rmtree(remade, ignore_errors=True)
                elif remade.is_dir():
                    shutil.rmtree(self.units_folder, ignore_errors=True)
                    remade.rename(self.units_folder)

    def _reopening(self) -> AbstractContextManager[bool]:
        return file_lock(self.path / ".reopening", wait=True, remove=True)

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
        with self._unless_moved():
            return self._writer(number)
        return None

    @contextlib.contextmanager
    def _unless_moved(self) -> Iterator[None]:
        """Do something in a folder that another process may finish, and put in its place, at any moment: then it needs no doing."""
        try:
            yield
        except FileNotFoundError:
            if not self.claim.published():
                raise

    def _writer(self, number: int) -> "UnitWriter | None":
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
                partial = self._folder(number, partial=True)
                return UnitWriter(number, partial, self._folder(number), stack=stack, absorb=self.absorb)
        except BaseException:
            stack.close()
            raise

    def keys(self) -> Iterator[tuple[int, str, bool]]:
        """Every key of the finished units, with the unit's number, and whether the image could be done."""
        if self.is_complete():
            columns = map_arrays(self.path / INDEX, needed=(*KEY_COLUMNS, "units", "failure_units"))
            yield from ((int(unit), key, True) for unit, key in zip(columns["units"], KeyList(columns), strict=True))
            rows = read_failures(self.path / "failures.jsonl")
            yield from ((int(unit), str(row["key"]), False) for unit, row in zip(columns["failure_units"], rows, strict=False))
            return
        for number in sorted(self.finished_units()):
            folder = self._folder(number)
            yield from ((number, key, True) for key in KeyList(map_arrays(folder / INDEX, needed=KEY_COLUMNS)))
            yield from ((number, str(row["key"]), False) for row in read_failures(folder / "failures.jsonl"))

    def extend(self, settings: Mapping[str, Any]) -> None:
        """Open a database for further units. What it holds stays as it is, byte for byte, and needs no unit again.

        Safe to be killed anywhere and called again with the same, and by several processes.

        Args:
            settings: what `settings.json` says from now on, of the keys that may differ.

        Raises:
            UniterError: a unit that was begun earlier is not finished: the earlier work has to be done first.
        """
        with self._reopening():
            stored = read_json_object(self.path / SETTINGS)
            asked = {**stored, **json.loads(json.dumps(settings))}
            if stored != asked:
                if self.is_complete():
                    self._reopen()
                finished = self.finished_units()
                if finished != set(range(len(finished))) or self._partial_units():
                    raise UniterError(f"{self.path} is unfinished; finish it with the images that it was begun for, then add others")
                with full_disk_said(self.path):
                    write_json(self.path / SETTINGS, asked)
            self.settings = asked

    def forget_failures(self, which: Callable[[Mapping[str, Any]], bool] = lambda row: True) -> set[int]:
        """Forget failed rows (`--retry-failed`), all or those that `which` says; the units that held them are unfinished again.

        Returns:
            Their numbers. In a complete database without such failures nothing happens.
        """
        with self._reopening():
            if self.is_complete():
                if not any(map(which, read_failures(self.path / "failures.jsonl"))):
                    return set()
                self._reopen()
        numbers = set()
        for number in sorted(self.finished_units() | self._partial_units()):
            with file_lock(self.units_folder / ".locks" / f"{number:05d}", wait=False) as mine:
                if mine and self._forget_in(number, which):
                    numbers.add(number)
        return numbers

    def _forget_in(self, number: int, which: Callable[[Mapping[str, Any]], bool]) -> bool:
        finished, partial = self._folder(number), self._folder(number, partial=True)
        folder = finished if finished.is_dir() else partial
        rows = read_failures(folder / "failures.jsonl") if folder == finished else unit_failures(folder)
        if not any(map(which, rows)):
            return False
        if folder == finished:
            finished.rename(partial)
        tidy_partial(partial)
        kept = [row for row in rows if not which(row)]
        if kept or (partial / "data.mdb").exists():
            with full_disk_said(partial), open_unit(partial) as unit, unit.environment.begin(write=True) as transaction:
                transaction.drop(unit.failures, delete=False)
                for row in kept:
                    transaction.put(failure_digest(row["key"]), json.dumps(row).encode(), db=unit.failures)
        return True

    def _reopen(self) -> None:
        """Turn a complete database back into an unfinished one, all its units absorbed."""
        rows = read_failures(self.path / "failures.jsonl")
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
        remade.mkdir(exist_ok=True)
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
        with self._unless_moved(), file_lock(self.units_folder / ".locks" / "absorb", wait=wait) as mine:
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
            environment = open_writer(self.path, FIRST_MAP_BYTES)
            try:
                page = environment.stat()["psize"]
                pages = sum(size // page + 2 for size in sizes) + 256
                used = environment.info()["last_pgno"] + 1
                map_bytes = FIRST_MAP_BYTES
                while map_bytes < 2 * page * (used + pages):
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
        with self._unless_moved():
            if not self.is_complete() and not self._finished(units, header):
                return False
        self.claim.publish(self._sweep)
        return True

    def _finished(self, units: int, header: Mapping[str, Any]) -> bool:
        finished, wanted = self.finished_units(), set(range(units))
        if extra := finished - wanted:
            raise BadInput(f"{self.path} holds unit {min(extra)}, but the work has {units} units; use --overwrite to begin anew")
        if finished != wanted:
            return self.is_complete()  # another process may just have done it
        self.absorb(wait=True)
        with file_lock(self.units_folder / ".locks" / "finish", wait=True), full_disk_said(self.path):
            if not self.is_complete():  # another process may have done it while we waited
                self._put_together(units, header)
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
        """Remove what only an unfinished database needs, and temporary files of killed processes; touch nothing where none are."""
        shutil.rmtree(self.units_folder, ignore_errors=True)
        for path in (*self.path.glob(ADDED), *self.path.glob("*.*.*")):
            if path.name == ADDED or (path.suffix in (".tmp", ".first") and REGIONS.made(path)):
                path.unlink(missing_ok=True)
