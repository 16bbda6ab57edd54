"""Sorted runs on disk become one LMDB.

Ours rather than a temporary LMDB that sorts: tried on 2 million captions, that took 1.4 times the time and three times the memory.
"""

import heapq
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import lmdb
import msgpack

from uniter.datasets.errors import BadInput, UniterError
from uniter.datasets.progress import Progress
from uniter.datasets.text_db.building.spool import BATCH, Spool


def merge_runs(folder: Path, spool: Spool) -> None:
    """Write `data.mdb` of a text database in the order of its ids.

    Raises:
        BadInput: an id comes twice.
        UniterError: the disk is full.
    """
    # Twice what is needed costs nothing: the file grows only as far as it is filled.
    map_size = 2 * spool.record_bytes + (64 << 20)
    records = heapq.merge(*map(_read_run, spool.runs)) if len(spool.runs) > 1 else _read_run(spool.runs[0])
    try:
        environment = lmdb.open(str(folder), map_size=map_size, lock=False, sync=False, metasync=False, max_spare_txns=0)
        with environment, Progress(spool.kept, unit="captions", label="writing") as progress:
            last, last_number = b"", -1
            while batch := list(islice(records, 4 * BATCH)):
                for key, _, number in batch:
                    if key == last:
                        first, second = sorted((last_number + 1, number + 1))
                        raise BadInput(
                            f"the id {key.decode()!r} is used twice, by texts number {first:,} and {second:,} of those kept; "
                            "ids must differ: mend them, or leave the id field away to number the texts"
                        )
                    last, last_number = key, number
                with environment.begin(write=True) as transaction:
                    transaction.cursor().putmulti(((key, value) for key, value, _ in batch), append=True)
                progress.update(len(batch))
            environment.sync(True)
    except lmdb.Error as error:
        raise UniterError(
            f"writing {folder / 'data.mdb'} failed ({error}); make room if the disk is full, and run the same command again"
        ) from None


def _read_run(path: Path) -> Iterator[tuple[bytes, bytes, int]]:
    with open(path, "rb") as file:
        yield from msgpack.Unpacker(file, raw=True, use_list=False, read_size=1 << 16, max_buffer_size=0)
