"""Locks between processes, which hold against other threads of this process too and are gone with their owner, however it ends."""

import contextlib
import errno
import fcntl
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from uniter.datasets.errors import UniterError

logger = logging.getLogger(__name__)

_held: set[str] = set()


_held_guard = threading.Lock()


_folders: set[int] = set()  # descriptors of the folders that this process writes alone


def _give_back_in_child() -> None:
    """A forked worker that outlives its parent must not keep the parent's folder; closing its copy takes nothing from the parent."""
    for descriptor in _folders:
        os.close(descriptor)
    _folders.clear()


os.register_at_fork(after_in_child=_give_back_in_child)


@contextlib.contextmanager
def only_writer(folder: Path, *, doing: str = "writing") -> Iterator[None]:
    """Be the only one who writes in a folder; it is made if it is absent, and may be renamed meanwhile.

    Args:
        doing: as in the sentence "another process is building OUT".

    Raises:
        UniterError: somebody else is.
    """
    descriptor = _opened(folder)
    _folders.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UniterError(f"another process is {doing} {folder}; wait for it, or choose another OUT") from None
        except OSError as error:
            logger.warning("%s: this file system has no locks (%s); do not run two writers on it", folder, error)
        yield
    finally:
        if descriptor in _folders:  # not in a forked child, which has given it back
            _folders.discard(descriptor)
            os.close(descriptor)


def is_held_here(folder: Path) -> bool:
    """Whether this process is the only writer of the folder."""
    status = folder.stat()
    return any(os.path.samestat(os.fstat(descriptor), status) for descriptor in list(_folders))


def _opened(folder: Path) -> int:
    """A descriptor of the folder, made if it is absent, though another process may rename it at any moment."""
    folder = folder.resolve()  # a link to nothing can neither be made nor opened
    while True:
        with contextlib.suppress(FileExistsError):  # it was there, and is not any more
            folder.mkdir(parents=True, exist_ok=True)
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
