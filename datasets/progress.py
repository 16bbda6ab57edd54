"""How far a long run is: a bar on a terminal, plain lines elsewhere (rates and time left in both), always on stderr."""

import sys
import time
from types import TracebackType
from typing import NoReturn, Self

from tqdm import tqdm

LINE_EVERY_SECONDS = 10.0
BRIEF_AFTER_SECONDS = 1.0


class Progress:
    """Counts `unit`s up to `total` (None where unknown).

    Args:
        total: how many units the whole run has, None if that is not known.
        unit: the plural noun of what is counted, e.g. "images".
        label: what is being done, e.g. "extracting".
        done: how many were done before this run (a resume); they do not count into the rate.
        brief: a step of something longer, often over at once: on a terminal the bar comes after a second and goes with the step.
    """

    def __init__(self, total: int | None, *, unit: str, label: str, done: int = 0, brief: bool = False) -> None:
        self.total, self.unit, self.label, self.done = total, unit, label, done
        self._first = done
        self._start = self._last_line = time.monotonic()
        self._bar: tqdm[NoReturn] | None = None
        if sys.stderr.isatty():
            # The bar of a step stands below that of the whole.
            self._bar = tqdm(
                total=total, initial=done, unit=f" {unit}", desc=label, file=sys.stderr, smoothing=0.1,
                leave=not brief, delay=BRIEF_AFTER_SECONDS if brief else 0,
            )  # fmt: skip

    def update(self, count: int = 1, **figures: float | str) -> None:
        """Count `count` more units; `figures` (loss, tokens/s ...) are shown beside the count."""
        self.done += count
        if self._bar is not None:
            if figures:
                self._bar.set_postfix({name: _short(value) for name, value in figures.items()}, refresh=False)
            self._bar.update(count)
            return
        now = time.monotonic()
        if now - self._last_line >= LINE_EVERY_SECONDS:
            self._last_line = now
            print(self.line(**figures), file=sys.stderr, flush=True)

    def found(self, count: int) -> None:
        """Count `count` units that were done by an earlier run; like `done`, they do not count into the rate."""
        self.done += count
        self._first += count
        if self._bar is not None:
            self._bar.initial += count
            self._bar.update(count)

    def line(self, **figures: float | str) -> str:
        """One plain line: count, rate, time left and the figures."""
        elapsed = max(time.monotonic() - self._start, 1e-9)
        rate = (self.done - self._first) / elapsed
        of_total = f" of {self.total:,}" if self.total is not None else ""
        left = ""
        if self.total is not None and rate > 0:
            left = f", {duration((self.total - self.done) / rate)} left"
        shown = "".join(f", {name} {_short(value)}" for name, value in figures.items())
        return f"{self.label}: {self.done:,}{of_total} {self.unit}, {_short(rate)} {self.unit}/s{left}{shown}"

    def close(self) -> None:
        """Take the bar away, or leave it standing where the whole was shown; also done by `with`."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def duration(seconds: float) -> str:
    """Seconds as people say them: "42 s", "3 min 20 s", "2 h 05 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _short(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def human_bytes(count: float) -> str:
    """12.3 GB and the like, in powers of 1000."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
