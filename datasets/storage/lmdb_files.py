"""LMDB environments: opened once a process, grown when full, their errors in words."""

import contextlib
import errno
import shutil
import threading
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

import lmdb

from uniter.datasets.errors import BadInput, UniterError
from uniter.datasets.storage.lmdb_pages import MAX_KEY_BYTES, check_data_file, is_empty_file

FIRST_MAP_BYTES = 1 << 24


_LOCK_FILE_BYTES = 8192  # of LMDB's lock.mdb, with its 126 places for readers


# ------------------------------------------------------------------------------------------------------------------- reading


_environments: dict[tuple[int, int], "weakref.ref[lmdb.Environment]"] = {}


_opening = threading.Lock()


def open_reader(path: Path, *, readahead: bool = True, max_dbs: int = 0) -> lmdb.Environment:
    """Open the LMDB in folder `path` for reading only, without locks; its header is verified before LMDB sees it.

    One environment per file and process is shared (LMDB forbids a second one). Under fork the child goes on with what it
    inherited: read-only and without locks that is safe. Do not close it; it closes when nobody uses it any more.

    Args:
        readahead: False is faster for random reads on a local disk when the file is larger than memory.
        max_dbs: how many named databases the file may hold.
    """
    data = path / "data.mdb"
    check_data_file(data)
    status = data.stat()
    identity = (status.st_dev, status.st_ino)
    with _opening:
        known = _environments.get(identity)
        environment = known() if known is not None else None
        if environment is None:
            try:
                environment = lmdb.open(
                    str(path), readonly=True, create=False, lock=False, readahead=readahead, max_dbs=max_dbs, max_spare_txns=0
                )
            except lmdb.Error as error:
                raise BadInput(f"{data} cannot be opened: {error}") from None
            _environments[identity] = weakref.ref(environment)
            for stale in [key for key, reference in _environments.items() if reference() is None]:
                del _environments[stale]
    return environment


# ------------------------------------------------------------------------------------------------------------------- writing


@contextlib.contextmanager
def full_disk_said(place: Path) -> Iterator[None]:
    """LMDB's errors and a full disk as UniterError."""
    try:
        yield
    except lmdb.Error as error:
        raise _said(error, place) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _said(error, place) from error
        raise


def _said(error: Exception, place: Path) -> UniterError:
    text = str(error)
    full = "space" in text.lower() or "quota" in text.lower() or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    # LMDB says "Input/output error" where the disk took only a part of what it wrote.
    if full or ("Input/output" in text and shutil.disk_usage(place).free < 16 << 20):
        return UniterError(f"the disk is full while writing {place}; what was committed is kept: make room and run the same command again")
    return UniterError(f"writing {place} failed: {text}; what was committed is kept")


def put_all(environment: lmdb.Environment, values: Sequence[tuple[bytes, bytes]]) -> None:
    """Write keys and values in one transaction into a database of a writer's own, whose map grows as needed.

    Raises:
        UniterError: they could not be written, because the disk is full for instance.
    """
    while True:
        try:
            with environment.begin(write=True) as transaction:
                for key, value in values:
                    transaction.put(key, value)
            return
        except lmdb.MapFullError:
            environment.set_mapsize(2 * environment.info()["map_size"])
        except lmdb.Error as error:
            raise UniterError(f"writing {environment.path()} failed: {error}; make room and run the same command again") from None


def allocate_lock_file(folder: Path) -> None:
    """Give an LMDB's lock file its bytes before LMDB maps it and writes into the mapping: on a full disk, that kills the process."""
    with open(folder / "lock.mdb", "ab") as file:
        file.write(bytes(max(0, _LOCK_FILE_BYTES - file.tell())))


def checked_key(key: str) -> bytes:
    """A key as UTF-8; BadInput if LMDB could not hold it."""
    try:
        raw = key.encode()
    except UnicodeEncodeError:
        raise BadInput(f"key {key!r} is no valid Unicode; rename the file, or choose another --key") from None
    if not 0 < len(raw) <= MAX_KEY_BYTES:
        raise BadInput(
            f"key {key[:40]!r}{'...' if len(key) > 40 else ''} has {len(raw)} bytes, expected 1 to {MAX_KEY_BYTES}; choose another --key"
        )
    return raw


def open_writer(folder: Path, map_bytes: int, *, max_dbs: int = 0) -> lmdb.Environment:
    """Open an LMDB for its only writer, made if it is not there.

    Args:
        map_bytes: the greatest size to which the file may grow.
        max_dbs: named tables in it.

    Raises:
        BadInput: what is there is no LMDB, or is cut off.
    """
    data = folder / "data.mdb"
    with contextlib.suppress(FileNotFoundError):
        if is_empty_file(data):
            data.unlink()
        else:
            check_data_file(data)
    allocate_lock_file(folder)
    return lmdb.open(str(folder), map_size=map_bytes, max_dbs=max_dbs, max_spare_txns=0)
