"""Writing one unit of a region database: records and failures, a batch at a time."""

import contextlib
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import lmdb
import numpy as np
import orjson

from uniter.datasets.errors import BadInput
from uniter.datasets.image_db.writing.noted_photographs import NOT_KNOWN, Photograph, photographs_in
from uniter.datasets.image_db.writing.side_files import write_failures
from uniter.datasets.image_db.writing.unit_files import (
    Unit,
    drop_if_damaged,
    failure_digest,
    open_unit,
    pack_summary,
    save_unit_index,
    tidy_partial,
    unpack_summary,
)
from uniter.datasets.storage.files import sync
from uniter.datasets.storage.index_file import INDEX, KeyList, map_arrays
from uniter.datasets.storage.lmdb_files import checked_key, full_disk_said


class UnitWriter:
    """Writes one unit; made by `UnitStore.unit`, used as a context manager.

    Args:
        folder, finished: where the unit lies while it is written, and afterwards.
        stack: closed at the end: it holds the unit's lock.
        absorb: called once the unit is finished.

    Attributes:
        number: which unit.
        done: keys already stored or failed in an earlier try of this unit, and now.
    """

    def __init__(self, number: int, folder: Path, finished: Path, *, stack: contextlib.ExitStack, absorb: Callable[[], None]) -> None:
        self.number, self._folder, self._finished, self._stack, self._absorb = number, folder, finished, stack, absorb
        self._folder.mkdir(parents=True, exist_ok=True)
        tidy_partial(self._folder)
        drop_if_damaged(self._folder / "data.mdb")
        self._unit: Unit = stack.enter_context(open_unit(self._folder))
        self._values: dict[bytes, tuple[bytes, int, Photograph]] = {}
        self._failures: dict[bytes, bytes] = {}
        absorbed = self._folder / f"absorbed.{INDEX}"
        self._absorbed = map_arrays(absorbed) if absorbed.exists() else None
        with self._unit.environment.begin() as transaction:
            self.done: set[str] = {key.decode() for key, _ in transaction.cursor(self._unit.summaries)}
            self.done |= {orjson.loads(row)["key"] for _, row in transaction.cursor(self._unit.failures)}
        if self._absorbed is not None:
            self.done |= set(KeyList(self._absorbed))

    def put(self, key: str, value: bytes, *, regions: int, photograph: Photograph = NOT_KNOWN) -> None:
        """Store a record at the next `commit`.

        Args:
            photograph: what is known of the photograph that it is of.

        Raises:
            BadInput: the key is empty, too long for LMDB, or was already written in this unit.
        """
        raw = checked_key(key)
        if key in self.done:
            raise BadInput(f"image {key!r} was already written; every image needs a key of its own (see --key)")
        self._values[raw] = (value, regions, photograph)
        self.done.add(key)

    def fail(self, key: str, path: str, error: str, *, retry: bool | None = None) -> None:
        """Record at the next `commit` that the image `key` could not be done.

        Args:
            retry: True where it is tried again once its file is mended, as with a tar that was cut off; False where no retry can mend it.
                The row says so.
        """
        # File names need not be valid UTF-8; what JSON cannot hold is written as \\udc80.
        plain = [text.encode(errors="backslashreplace").decode() for text in (key, path, " ".join(error.split()))]
        row: dict[str, Any] = dict(zip(("key", "path", "error"), plain, strict=True))
        if retry is not None:
            row["retry"] = retry
        self._failures[failure_digest(key)] = json.dumps(row, ensure_ascii=True).encode()
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
                            value, regions, photograph = self._values[key]
                            transaction.put(key, value, db=self._unit.records)
                            transaction.put(key, pack_summary(regions, zlib.crc32(value), photograph), db=self._unit.summaries)
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
                    summaries.append(unpack_summary(packed))
                rows = [orjson.loads(row) for _, row in transaction.cursor(self._unit.failures)]
            counts = np.array([count for count, _, _ in summaries], dtype=np.int32)
            checksums = np.array([checksum for _, checksum, _ in summaries], dtype=np.uint32)
            photographs = [photograph for _, _, photograph in summaries]
            if self._absorbed is not None:
                earlier = KeyList(self._absorbed)
                keys += [earlier.raw(row) for row in range(len(earlier))]
                counts = np.concatenate([counts, self._absorbed["region_counts"]])
                checksums = np.concatenate([checksums, self._absorbed["checksums"]])
                photographs += photographs_in(self._absorbed, len(earlier))
            save_unit_index(self._folder / INDEX, keys, counts, checksums, photographs)
            if rows:
                write_failures(self._folder / "failures.jsonl", sorted(rows, key=lambda row: str(row["key"])))
            self._unit.environment.close()
            (self._folder / "lock.mdb").unlink(missing_ok=True)
            sync(self._folder)
            self._folder.rename(self._finished)
            with contextlib.suppress(FileNotFoundError):  # it was the last: another process may have put the whole in its place
                sync(self._finished.parent)
        self._stack.close()
        self._absorb()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()
