"""Locks between processes, which hold against other threads of this process too and are gone with their owner, however it ends.

Windows has no such locks of folders: there, as on a file system without locks, it is said once that two writers are not kept apart.
"""

import contextlib
import errno
import functools
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from uniter.datasets.errors import UniterError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

_held: set[str] = set()


_held_guard = threading.Lock()


_folders: dict[tuple[int, int], int | None] = {}  # device and inode of the folders that this process writes alone, and their descriptors


def _give_back_in_child() -> None:
    """A forked worker that outlives its parent must not keep the parent's folder; closing its copy takes nothing from the parent."""
    for descriptor in _folders.values():
        if descriptor is not None:
            os.close(descriptor)
    _folders.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_give_back_in_child)


@functools.cache
def _say_that_nothing_is_locked() -> None:
    logger.warning("this system has no locks of POSIX; do not run two writers on one folder")


@contextlib.contextmanager
def only_writer(folder: Path, *, doing: str = "writing") -> Iterator[None]:
    """Be the only one who writes in a folder; it is made if it is absent, and may be renamed meanwhile.

    Args:
        doing: as in the sentence "another process is building OUT".

    Raises:
        UniterError: somebody else is.
    """
    taken = f"another process is {doing} {folder}; wait for it, or choose another OUT"
    descriptor = _opened(folder)
    identity = _identity(folder.stat() if descriptor is None else os.fstat(descriptor))
    try:
        if identity in _folders:
            raise UniterError(taken)
        try:
            if fcntl is None or descriptor is None:
                _say_that_nothing_is_locked()
            else:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UniterError(taken) from None
        except OSError as error:
            logger.warning("%s: this file system has no locks (%s); do not run two writers on it", folder, error)
    except BaseException:
        if descriptor is not None:
            os.close(descriptor)
        raise
    _folders[identity] = descriptor
    try:
        yield
    finally:
        if identity in _folders:  # not in a forked child, which has given it back
            del _folders[identity]
            if descriptor is not None:
                os.close(descriptor)


def is_held_here(folder: Path) -> bool:
    """Whether this process is the only writer of the folder."""
    return _identity(folder.stat()) in _folders


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _opened(folder: Path) -> int | None:
    """A descriptor of the folder, made if it is absent, though others may rename it at any moment; None where folders have none."""
    folder = folder.resolve()  # a link to nothing can neither be made nor opened
    while True:
        with contextlib.suppress(FileExistsError):  # it was there, and is not any more
            folder.mkdir(parents=True, exist_ok=True)
        if fcntl is None:
            return None
        with contextlib.suppress(FileNotFoundError):
            return os.open(folder, os.O_RDONLY | os.O_DIRECTORY)


@contextlib.contextmanager
def file_lock(path: Path, *, wait: bool, remove: bool = False) -> Iterator[bool]:
    """True while this process, and nobody else, has the lock file.

    POSIX locks: a killed owner's lock is gone, and children do not inherit it.

    Args:
        wait: until whoever has it gives it back.
        remove: take the lock file away at the end; all who use it must say so.
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
        descriptor = _locked(path, wait=wait)
        if descriptor is None:
            yield False
            return
        try:
            yield True
        finally:
            if remove:
                path.unlink(missing_ok=True)
            os.close(descriptor)
    finally:
        with _held_guard:
            _held.discard(name)


def _locked(path: Path, *, wait: bool) -> int | None:
    """A descriptor that has the lock; None where another process has it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if fcntl is None:
            _say_that_nothing_is_locked()
            return descriptor
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                os.close(descriptor)
                return None
            logger.warning("%s: this file system has no locks (%s); do not run two writers on it", path, error)
            return descriptor
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        os.close(descriptor)  # its owner took the file away while we waited: another one is the lock now
