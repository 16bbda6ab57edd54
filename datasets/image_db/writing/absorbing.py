"""Moving finished units into `OUT/data.mdb`, in order, in transactions of a bounded size.

    OUT/units/absorbed.json    how many units are wholly in `data.mdb`, and how many records it had with them

What a reader would get wrong: how far the work is, says `data.mdb` itself, whose number of records changes with each commit; the file says
from where they are counted. A transaction ends where the records alone say so (after so many bytes, and with each group of units), never
where a process was killed or came too late: so the bytes of `data.mdb` are a function of the records. And nothing is looked at but the
group at hand: a unit costs the same however many there are. Names are plain strings here: this is done once a unit by one process at a
time, and a `Path` takes longer than the look at the disk.
"""

import contextlib
import itertools
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lmdb

from uniter.datasets.errors import BadInput
from uniter.datasets.storage.files import read_json, read_json_object, write_json
from uniter.datasets.storage.lmdb_files import FIRST_MAP_BYTES, open_writer
from uniter.datasets.storage.lmdb_pages import check_data_file, is_empty_file

GROUP = 128
"""Units that are moved together: small ones share a transaction, whose waits for the disk are what a unit would cost otherwise."""

TRANSACTION_BYTES = 32 << 20
"""Of records, after which a transaction ends, be it amidst a unit: LMDB holds all that a transaction writes in memory."""

_ABSORBED, _OLD_INTENT = "absorbed.json", "absorbing.json"


@dataclass(frozen=True)
class Standing:
    """How far the work is.

    Attributes:
        units: all below it are wholly in `data.mdb`, but for `again`.
        entries: records that `data.mdb` had with these units; what it has more is of the next ones.
        again: units below it that were opened again, to be moved once more when all others are.
        swept: below it no unit but those has a file of its own any more.
    """

    units: int = 0
    entries: int = 0
    again: tuple[int, ...] = ()
    swept: int = 0

    def without(self, number: int, entries: int) -> "Standing":
        """Once a unit is in, too."""
        if number == self.units:
            return Standing(number + 1, entries, self.again, self.swept)
        return replace(self, again=tuple(other for other in self.again if other != number), entries=entries)


def unit_folder(path: Path, number: int, *, partial: bool = False) -> Path:
    """Where a unit of a database lies."""
    return Path(f"{path}/units/{number:05d}{'.partial' if partial else ''}")  # joining paths takes six times as long


def read_standing(path: Path) -> Standing:
    """How far the work is, for who has the lock; written if it was not known yet."""
    told = path / "units" / _ABSORBED
    if told.exists():
        try:
            stored = read_json_object(told)
            return Standing(stored["units"], stored["entries"], tuple(stored["again"]), stored["swept"])
        except (BadInput, KeyError, TypeError) as error:
            raise BadInput(f"{told} is damaged ({error!r}); use --overwrite to begin anew") from None
    # None was moved yet, or by an older version, which deleted each unit's file before it went on to the next.
    number = 0
    while unit_folder(path, number).is_dir() and not (unit_folder(path, number) / "data.mdb").exists():
        number += 1
    intent = path / "units" / _OLD_INTENT
    known = read_json(intent) if intent.exists() else {"unit": -1}
    standing = Standing(number, known["entries"] if known["unit"] == number else stored_records(path), swept=number)
    write_standing(path / "units", standing)
    return standing


def write_standing(units: Path, standing: Standing) -> None:
    """Write it down in the folder of the units."""
    write_json(units / _ABSORBED, asdict(standing))


def stored_records(path: Path) -> int:
    """How many records are in `data.mdb`."""
    if not (path / "data.mdb").exists() or is_empty_file(path / "data.mdb"):
        return 0
    with contextlib.closing(open_writer(path, FIRST_MAP_BYTES)) as environment:
        return int(environment.stat()["entries"])


def group_end(number: int) -> int:
    """The end of the group that a unit belongs to."""
    return (number // GROUP + 1) * GROUP


def sweep(path: Path, standing: Standing) -> Standing:
    """Delete the files of units whose records are in `data.mdb`."""
    for number in set(range(standing.swept, standing.units)) - set(standing.again):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{path}/units/{number:05d}/data.mdb")  # noqa: PTH108
    return replace(standing, swept=standing.units)


def settle(path: Path, standing: Standing) -> Standing:
    """Move the rest of a unit of which a part is in `data.mdb`, so that units may change."""
    while stored_records(path) != standing.entries:
        following = standing.units if unit_folder(path, standing.units).is_dir() else next(iter(standing.again), None)
        if following is None:
            raise _replaced(path)
        standing = move(path, standing, [following])
    return standing


def move(path: Path, standing: Standing, numbers: Sequence[int]) -> Standing:
    """Move finished units, the next ones in order; their files are deleted once it is written down that they are in.

    Safe to be killed anywhere, and to be called again with the same.

    Raises:
        BadInput: a key is in another unit already, or `data.mdb` is not what these units made it.
    """
    present = stored_records(path) - standing.entries
    if present < 0:
        raise _replaced(path)
    with contextlib.closing(_Opened(path)) as opened:
        piece: list[tuple[Any, Any]] = []
        size, entries, known = 0, standing.entries, standing
        for number in numbers:
            count, records = opened.unit(number)
            skipped = min(present, count)
            present -= skipped
            pairs = list(itertools.islice(records, skipped, None) if skipped else records)
            whole = sum([len(value) for _, value in pairs])
            if size + whole < TRANSACTION_BYTES:
                piece += pairs
                size += whole
                pairs.clear()
            for pair in pairs:
                piece.append(pair)
                size += len(pair[1])
                if size >= TRANSACTION_BYTES:
                    _commit(path, piece, number)
                    piece, size = [], 0
                    if standing != known:  # the units before this one are wholly in
                        write_standing(path / "units", standing)
                        opened.delete(but=number)
                        known = standing
            entries += count
            standing = standing.without(number, entries)
        if piece:
            _commit(path, piece, numbers[-1])
        write_standing(path / "units", standing)
        opened.delete()
    return replace(standing, swept=standing.units)


def _replaced(path: Path) -> BadInput:
    return BadInput(f"{path}/data.mdb does not hold what its units have given it; was a file replaced? Use --overwrite")


class _Opened:
    """The files of finished units, open for reading until they are deleted."""

    def __init__(self, path: Path) -> None:
        self._folder = f"{path}/units"
        self._units: dict[int, contextlib.ExitStack] = {}

    def unit(self, number: int) -> tuple[int, Iterable[tuple[Any, Any]]]:
        """The number of records of a unit, and the records as views; none where its file is gone already."""
        stack = self._units[number] = contextlib.ExitStack()
        data = self._data(number)
        if not os.path.exists(data):  # noqa: PTH110
            return 0, ()
        check_data_file(data)
        # Nobody writes a finished unit, so it needs no locks.
        environment = lmdb.open(data, subdir=False, readonly=True, create=False, lock=False, max_dbs=1, max_spare_txns=0)
        stack.callback(environment.close)
        transaction = stack.enter_context(environment.begin(buffers=True))
        records = environment.open_db(b"records", txn=transaction, create=False)
        return transaction.stat(records)["entries"], stack.enter_context(transaction.cursor(records))

    def delete(self, *, but: int | None = None) -> None:
        """Delete all files but that of one unit."""
        for number in [number for number in self._units if number != but]:
            self._units.pop(number).close()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._data(number))  # noqa: PTH108

    def _data(self, number: int) -> str:
        return f"{self._folder}/{number:05d}/data.mdb"

    def close(self) -> None:
        """Close what is open."""
        while self._units:
            self._units.popitem()[1].close()


def _commit(path: Path, piece: Sequence[tuple[Any, Any]], number: int) -> None:
    """Put records into `data.mdb`, in one transaction; the last ones are of unit `number`."""
    # Opened for each transaction: LMDB writes into unused bytes of a page what earlier ones left in its memory.
    with contextlib.closing(open_writer(path, FIRST_MAP_BYTES)) as target:
        # The map's size is stored in the file: it may depend on the records only, not on how often the work was killed.
        page = target.stat()["psize"]
        pages = sum([len(value) // page + 2 for _, value in piece]) + 256
        map_bytes = FIRST_MAP_BYTES
        while map_bytes < 2 * page * (target.info()["last_pgno"] + 1 + pages):
            map_bytes *= 2
        while True:
            target.set_mapsize(map_bytes)
            try:
                with target.begin(write=True) as transaction, transaction.cursor() as cursor:
                    _, added = cursor.putmulti(piece, overwrite=False)
                    if added != len(piece):
                        transaction.abort()
                        raise _known_already(target, piece, number)
                return
            except lmdb.MapFullError:
                map_bytes *= 2


def _known_already(target: lmdb.Environment, piece: Sequence[tuple[Any, Any]], number: int) -> BadInput:
    """Which key of a piece was there before, or comes twice."""
    seen: set[bytes] = set()
    with target.begin() as transaction:
        for key, _ in piece:
            if transaction.get(key) is not None or bytes(key) in seen:
                return BadInput(f"key {bytes(key).decode()!r} of unit {number} (or of one just before it) was already written by another")
            seen.add(bytes(key))
    return _replaced(Path(target.path()))
