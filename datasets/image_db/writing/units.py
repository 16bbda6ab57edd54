"""LMDB on disk: opening for reading without a way to crash, and the write side of a region database.

What a reader would get wrong: a database is written twice. Each fixed unit of the work first gets an LMDB of its own
(`OUT/units/00007.partial/`, renamed to `OUT/units/00007/` when the unit is done), then its records are moved into
`OUT/data.mdb`, units in order (`absorbing`). So a killed run loses at most one batch, several processes need no
common writer, and the final file is a function of the records alone, however often the work was killed or divided.

    OUT/settings.json    first: all that changes a value
    OUT/units/           while unfinished
    OUT/data.mdb         LMDB format version 1, key -> record
    OUT/index.safetensors, OUT/failures.jsonl, OUT/box_ids.jsonl where boxes were given with ids
    OUT/listing/         headers of tars, where it was extracted from some
    OUT/photographs.safetensors   length and SHA-256 of the photographs, where they are known
    OUT/README.md        the dataset card
    OUT/header.json      last: complete
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import lmdb

from uniter.datasets.errors import BadInput, UniterError
from uniter.datasets.image_db.writing.absorbing import (
    Standing,
    group_end,
    move,
    read_standing,
    settle,
    sweep,
    unit_folder,
    write_standing,
)
from uniter.datasets.image_db.writing.finishing import put_together, take_apart
from uniter.datasets.image_db.writing.noted_photographs import PHOTOGRAPHS
from uniter.datasets.image_db.writing.side_files import BOX_IDS, read_failures
from uniter.datasets.image_db.writing.unit_files import failure_digest, open_unit, tidy_partial, unit_failures, unit_names
from uniter.datasets.image_db.writing.unit_writer import UnitWriter
from uniter.datasets.storage.cards import CARD_FILE
from uniter.datasets.storage.claims import SETTINGS, Maker, claim
from uniter.datasets.storage.files import read_json, read_json_object, sync, write_json
from uniter.datasets.storage.index_file import INDEX, KEY_COLUMNS, KeyList, map_arrays
from uniter.datasets.storage.lmdb_files import full_disk_said
from uniter.datasets.storage.locks import file_lock

__all__ = ["ADDED", "LISTING", "REGIONS", "UnitStore", "UnitWriter"]

_OLD_MARK = "overwriting"  # a file of older versions, which cleared the folder first: they were killed meanwhile


ADDED = "added.json"  # while a database grows: what is to be added
LISTING = "listing"  # a folder: what the headers of tars say, see extraction
REGIONS = Maker(
    "regions",
    "header.json",
    ("data.mdb", "lock.mdb", INDEX, "failures.jsonl", BOX_IDS, CARD_FILE, "units", "units.tmp", ADDED, PHOTOGRAPHS, LISTING, _OLD_MARK),
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
        self._first = self._awaited = 0  # of the group that is to be moved next, as far as this process knows, and whom it waits for
        self._moved = 0  # how far this process moved the work last: it deleted what was moved itself
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

    def is_finished(self, number: int) -> bool:
        """Whether a unit is done."""
        return self._folder(number).is_dir() or self.is_complete()

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
        return unit_folder(self.path, number, partial=partial)

    def _locked(self, number: int) -> AbstractContextManager[bool]:
        return file_lock(self.units_folder / ".locks" / f"{number:05d}", wait=False)

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
            if not self.claim.published() and not self.is_complete():
                raise

    def _writer(self, number: int) -> "UnitWriter | None":
        if self.is_complete() or self._folder(number).is_dir():
            return None
        stack = contextlib.ExitStack()
        if not stack.enter_context(self._locked(number)):
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
                self.absorb(units=len(finished))
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
        with self._absorbing(wait=True) as standing:
            if standing is None:
                return set()
            standing = settle(self.path, standing)
            finished = self.finished_units()
            found = [number for number in sorted(finished | self._partial_units()) if any(map(which, self._rows_of(number)))]
            moved = {number for number in found if number in finished and number < standing.units}
            if moved - set(standing.again):
                write_standing(self.units_folder, replace(standing, again=tuple(sorted(moved.union(standing.again)))))
            return {number for number in found if self._forget_in(number, which)}

    def _rows_of(self, number: int) -> list[dict[str, Any]]:
        """The failures of a unit, finished or not."""
        folder = self._folder(number)
        return read_failures(folder / "failures.jsonl") if folder.is_dir() else unit_failures(self._folder(number, partial=True))

    def _forget_in(self, number: int, which: Callable[[Mapping[str, Any]], bool]) -> bool:
        with self._locked(number) as mine:
            if not mine:
                return False
            finished, partial = self._folder(number), self._folder(number, partial=True)
            rows = self._rows_of(number)
            if finished.is_dir():
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
        remade = self.path / "units.tmp"
        take_apart(self.path, remade)
        (self.path / "header.json").unlink()
        sync(self.path)
        shutil.rmtree(self.units_folder, ignore_errors=True)
        remade.rename(self.units_folder)
        for name in (INDEX, "failures.jsonl"):
            (self.path / name).unlink(missing_ok=True)

    def absorb(self, *, units: int | None = None) -> None:
        """Move finished units into `data.mdb`, in order and without a gap (see `absorbing`); a unit's own file is deleted then.

        Safe to be killed anywhere.

        Args:
            units: how many there are, all of them finished; all are moved, by whichever process. None: whole groups that are finished are,
                and nothing happens while another process does the same.
        """
        if units is None and not self._group_is_finished():
            return
        with self._unless_moved(), self._absorbing(wait=units is not None) as standing:
            if standing is None:
                return
            while standing.units < units if units is not None else self._group_is_finished(standing.units):
                end = group_end(standing.units)
                numbers = range(standing.units, end if units is None else min(end, units))
                standing = move(self.path, standing, numbers)
                self._moved = standing.units
            if units is not None and standing.again:
                move(self.path, standing, standing.again)

    @contextlib.contextmanager
    def _absorbing(self, *, wait: bool) -> Iterator[Standing | None]:
        """How far the work is, while this process alone goes on with it; None where another does, or all is done."""
        with file_lock(self.units_folder / ".locks" / "absorb", wait=wait) as mine:
            if not mine or self.is_complete():
                yield None
                return
            with full_disk_said(self.path):
                standing = read_standing(self.path)
                yield standing if standing.units in (standing.swept, self._moved) else sweep(self.path, standing)

    def _group_is_finished(self, first: int | None = None) -> bool:
        """Whether the units from `first` to the end of its group are all there; the one that was found missing last is looked for first."""
        self._first = self._first if first is None else first
        numbers, folder = range(self._first, group_end(self._first)), str(self.units_folder)
        if self._awaited in numbers and not os.path.isdir(f"{folder}/{self._awaited:05d}"):  # noqa: PTH112
            return False
        for number in reversed(numbers):
            if not os.path.isdir(f"{folder}/{number:05d}"):  # noqa: PTH112
                self._awaited = number
                return False
        return True

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
        self.absorb(units=units)
        with file_lock(self.units_folder / ".locks" / "finish", wait=True), full_disk_said(self.path):
            if not self.is_complete():  # another process may have done it while we waited
                put_together(self.path, units, header)
        return True

    def _sweep(self) -> None:
        """Remove what only an unfinished database needs, and temporary files of killed processes; touch nothing where none are."""
        shutil.rmtree(self.units_folder, ignore_errors=True)
        for path in (*self.path.glob(ADDED), *self.path.glob("*.*.*")):
            if path.name == ADDED or (path.suffix in (".tmp", ".first") and REGIONS.made(path)):
                path.unlink(missing_ok=True)
