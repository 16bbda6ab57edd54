"""Locks between processes: POSIX record locks, which also hold against threads of this process."""

import contextlib
import errno
import fcntl
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

_held: set[str] = set()


_held_guard = threading.Lock()


@contextlib.contextmanager
def file_lock(path: Path, *, wait: bool) -> Iterator[bool]:
    """True while this process, and nobody else, has the lock file.

    POSIX locks: a killed owner's lock is gone, and children do not inherit it.
    """
    name = str(path.resolve())
    with _held_guard:
        if name in _held and not wait:
            mine = False
        else:
            while name in _held:  # another thread of this process; rare and short
                _held_guard.release()
                threading.Event().wait(0.01)
                _held_guard.acquire()
            _held.add(name)
            mine = True
    if not mine:
        yield False
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.EACCES):
                    yield False
                    return
                logger.warning("%s: this file system has no locks (%s); do not run two writers on it", path, error)
            yield True
        finally:
            os.close(descriptor)
    finally:
        with _held_guard:
            _held.discard(name)
