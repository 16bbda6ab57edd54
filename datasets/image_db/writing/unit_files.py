"""The files of one unit, opened and tidied after a crash."""

import contextlib
import logging
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import orjson
from numpy.typing import NDArray

from uniter.datasets.errors import BadInput
from uniter.datasets.image_db.writing.noted_photographs import NOT_KNOWN, Photograph, columns_of
from uniter.datasets.storage.index_file import INDEX, key_columns, save_arrays
from uniter.datasets.storage.lmdb_files import FIRST_MAP_BYTES, open_writer
from uniter.datasets.storage.lmdb_pages import PageFile, is_empty_file

logger = logging.getLogger(__name__)

_SUMMARY = struct.Struct("<iI")  # number of regions, crc32 of the value
_PHOTOGRAPH = struct.Struct("<q32s")  # behind it, where it is known: length and SHA-256 of the photograph


def pack_summary(regions: int, checksum: int, photograph: Photograph) -> bytes:
    """What a unit that is being written keeps of a record."""
    packed = _SUMMARY.pack(regions, checksum)
    return packed + _PHOTOGRAPH.pack(photograph.length, photograph.sha256) if photograph else packed


def unpack_summary(packed: bytes) -> tuple[int, int, Photograph]:
    """The inverse."""
    regions, checksum = _SUMMARY.unpack_from(packed)
    if len(packed) == _SUMMARY.size:
        return regions, checksum, NOT_KNOWN
    length, sha256 = _PHOTOGRAPH.unpack_from(packed, _SUMMARY.size)
    return regions, checksum, Photograph(length, sha256 if any(sha256) else b"")


class Unit:
    """The LMDB of one unit: records, their summaries and the failures change in one transaction."""

    def __init__(self, environment: lmdb.Environment) -> None:
        self.environment = environment
        self.records = environment.open_db(b"records")
        self.summaries = environment.open_db(b"summaries")
        self.failures = environment.open_db(b"failures")


@contextlib.contextmanager
def open_unit(folder: Path) -> Iterator[Unit]:
    """Open the LMDB of one unit of work, made if it is not there, for as long as the block lasts."""
    environment = open_writer(folder, FIRST_MAP_BYTES, max_dbs=3)
    try:
        yield Unit(environment)
    finally:
        environment.close()


def tidy_partial(folder: Path) -> None:
    """Bring a unit that was finished before, or killed just before its rename, back into the unfinished form."""
    if (folder / INDEX).exists() and not (folder / "data.mdb").exists():
        (folder / INDEX).replace(folder / f"absorbed.{INDEX}")  # its records are in OUT/data.mdb already
    (folder / INDEX).unlink(missing_ok=True)
    (folder / "failures.jsonl").unlink(missing_ok=True)


def drop_if_damaged(data: Path) -> None:
    """Remove a unit's LMDB that cannot be read any more (a broken disk, a copy that was cut off): its images are then done again."""
    if not data.exists() or is_empty_file(data):
        return
    try:
        with PageFile(data) as pages:
            damage = pages.damage((b"records", b"summaries", b"failures"))
    except BadInput as error:
        damage = str(error)
    if damage is not None:
        logger.warning("%s is damaged (%s); its images are done again", data, damage)
        data.unlink()


def failure_digest(key: str) -> bytes:
    """Under what the failure of an image is kept: the key may be the very thing that is too long."""
    raw = key.encode(errors="replace")
    return zlib.crc32(raw).to_bytes(4, "big") + raw[:400]


def unit_failures(folder: Path) -> list[dict[str, Any]]:
    """The rows of a unit that is being written, by key."""
    if not (folder / "data.mdb").exists() or is_empty_file(folder / "data.mdb"):
        return []
    opened = contextlib.closing(lmdb.open(str(folder), readonly=True, create=False, max_dbs=3))
    with opened as environment, environment.begin() as transaction:
        failures = environment.open_db(b"failures", txn=transaction, create=False)
        return sorted((orjson.loads(row) for _, row in transaction.cursor(failures)), key=lambda row: str(row["key"]))


def save_unit_index(
    path: Path, keys: list[bytes], counts: NDArray[Any], checksums: NDArray[Any], photographs: Sequence[Photograph] = ()
) -> None:
    """Write a unit's index, sorted by key.

    Args:
        keys: N keys, in any order.
        counts: (N,) regions of each. checksums: (N,) CRC-32 of each value.
        photographs: what was read of each, if it is known.
    """
    order = sorted(range(len(keys)), key=keys.__getitem__)
    save_arrays(
        path,
        {
            **key_columns([keys[row] for row in order]),
            "region_counts": counts[order].astype(np.int32),
            "checksums": checksums[order].astype(np.uint32),
            **columns_of([photographs[row] for row in order] if photographs else ()),
        },
    )


def unit_names(folder: Path) -> list[str]:
    """The names of what lies in a folder of units; none where it is not there."""
    try:
        return [entry.name for entry in folder.iterdir()]
    except FileNotFoundError:
        return []
