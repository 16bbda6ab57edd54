"""Regions of single photographs kept on disk, found again by what the photograph holds.

Each combination of settings (detector, weights, selection) has a folder of its own, named after their hash, so that another detector
never gets another one's regions. Such a folder is a region database that is never finished: `settings.json` and `data.mdb`, no
header. `uniter-db info` and `uniter-view --allow-partial` read it, and to empty the cache is to delete the folder.

What a reader would get wrong: LMDB may be opened only once in a process, so every call opens the file and closes it again.
"""

import contextlib
import hashlib
import json
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lmdb

from uniter.datasets.errors import BadInput, SettingsDiffer, UniterError
from uniter.datasets.image_db.records import decode_record
from uniter.datasets.image_db.regions import RegionFeatures
from uniter.datasets.storage.claims import Maker, claim
from uniter.datasets.storage.lmdb_files import allocate_lock_file
from uniter.datasets.storage.lmdb_pages import check_data_file, is_empty_file

log = logging.getLogger(__name__)

FIRST_MAP_BYTES = 1 << 26


KEEPER = Maker("regions", "header.json", ("data.mdb", "lock.mdb"))


_one_at_a_time = threading.Lock()


class RegionCache:
    """Records by key, under settings.

    Args:
        root: the folder of all caches; made if it is absent.
        settings: all that changes a value, JSON.

    Attributes:
        path: the folder within `root` for these settings.

    Raises:
        SettingsDiffer: the folder of these settings' hash says other settings.
        BadInput: `root` is a file, or its `settings.json` is damaged.
    """

    def __init__(self, root: str | Path, settings: Mapping[str, Any]) -> None:
        asked = json.loads(json.dumps(settings))
        digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
        self.path = Path(root) / digest[:16]
        if Path(root).exists() and not Path(root).is_dir():
            raise BadInput(f"{root} is a file; expected a folder in which to keep regions")
        try:
            claim(self.path, asked, maker=KEEPER)
        except SettingsDiffer as error:
            raise SettingsDiffer(f"{error}; delete the folder or give another cache") from None

    def get(self, keys: Sequence[str]) -> dict[str, RegionFeatures]:
        """The records of those keys that are there; a damaged one counts as absent."""
        with self._opened() as environment, _begun(environment) as transaction:
            values = {key: transaction.get(key.encode()) for key in keys}
        found = {}
        for key, value in values.items():
            if value is None:
                continue
            try:
                found[key] = decode_record(value, key=key)
            except BadInput as error:
                log.warning("%s: %s; the regions are extracted again", self.path, error)
        return found

    def put(self, records: Mapping[str, bytes]) -> None:
        """Keep records as `image_db.encode_record` makes them, durable when this returns; what stood under their keys is replaced."""
        if not records:
            return
        with self._opened() as environment:
            while True:
                try:
                    with _begun(environment, write=True) as transaction:
                        for key, value in records.items():
                            transaction.put(key.encode(), value)
                    return
                except lmdb.MapFullError:
                    environment.set_mapsize(2 * environment.info()["map_size"])

    @contextlib.contextmanager
    def _opened(self) -> Iterator[lmdb.Environment]:
        with _one_at_a_time:
            data = self.path / "data.mdb"
            if data.exists() and not is_empty_file(data):  # else it is being made at this moment
                check_data_file(data)
            allocate_lock_file(self.path)
            try:
                environment = lmdb.open(str(self.path), map_size=FIRST_MAP_BYTES, max_spare_txns=0)
                try:
                    yield environment
                finally:
                    environment.close()
            except lmdb.Error as error:
                raise UniterError(
                    f"the regions kept in {self.path} cannot be read or written ({error}); make room, or delete the folder"
                ) from error


def _begun(environment: lmdb.Environment, *, write: bool = False) -> lmdb.Transaction:
    try:
        return environment.begin(write=write)
    except lmdb.MapResizedError:  # another process made the file longer after we opened it
        environment.set_mapsize(0)
        return environment.begin(write=write)
