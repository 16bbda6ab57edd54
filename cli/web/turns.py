"""One at a time: two people who ask at once do not collide, and the second one's answer comes after the first one's.

What a reader would get wrong: a place is taken before a photograph is received, not when the work begins. So however many come, no more
files lie in memory than there are places.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

from uniter.datasets.errors import UniterError

Result = TypeVar("Result")
PLACES: Final = 16


class TooManyWait(UniterError):
    """All places are taken."""


class Turns:
    """A queue of so many places before one worker, first come first served."""

    def __init__(self, places: int = PLACES) -> None:
        self._places, self._taken = places, 0
        self._lock = threading.Lock()
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="answering")

    @property
    def taken(self) -> int:
        """How many wait or are being answered."""
        return self._taken

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """Take a place. Raises TooManyWait where none is free."""
        with self._lock:
            if self._taken >= self._places:
                raise TooManyWait(f"{self._taken} others are waiting for their answers; try again in a moment")
            self._taken += 1
        try:
            yield
        finally:
            with self._lock:
                self._taken -= 1

    def do(self, work: Callable[[], Result]) -> Result:
        """Wait for one's turn and have the work done; what it raises is raised here."""
        return self._worker.submit(work).result()
