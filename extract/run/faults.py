"""Whose fault a failure is: the image's, which makes it a row of `failures.jsonl`, or the machine's, which ends the run.

What a reader would get wrong: the error alone does not tell. "Out of memory" is said of a picture that is too large and of a GPU that
another process fills; "No such file" of a picture that is gone and of a mount that is gone. So such a failure stays in doubt, and nothing
after it is committed, until an image goes well; several in a row, or the end of the run, are decided by trying what went well before.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from uniter.datasets.errors import UniterError
from uniter.extract.detector.protocol import PreparedImage, is_out_of_memory
from uniter.extract.images.items import ImageItem

IN_A_ROW = 5
"""So many images in doubt one after the other are enough to ask whether it is the machine."""

Kind = Literal["reading", "memory", "detector"]


class MachineFault(UniterError):
    """What ends a run is no fault of an image: none was booked as failed, and the same command continues once it is mended."""


def kind_of(error: BaseException) -> Kind | None:
    """What may be wrong with the machine where an image fails so; None where the image alone can be at fault."""
    if is_out_of_memory(error):
        return "memory"
    if isinstance(error, UniterError):
        return None
    return "reading" if isinstance(error, OSError) else "detector"


class Doubts:
    """Failures since the last image that went well.

    Args:
        read: read an image's bytes; raises what reading raises.
        detect: all that is done with one image up to its regions, alone; the image is prepared already where it is at hand.
        samples: other images of the run, to be tried where none went well yet.
    """

    def __init__(
        self,
        *,
        read: Callable[[ImageItem], object],
        detect: Callable[[ImageItem, PreparedImage | None], object],
        samples: Callable[[], Iterable[ImageItem]],
    ) -> None:
        self._read, self._detect, self._samples = read, detect, samples
        self._waiting: list[tuple[ImageItem, Exception]] = []
        self._well: tuple[ImageItem, PreparedImage] | None = None

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def went_well(self, item: ImageItem, prepared: PreparedImage) -> None:
        """An image has its regions: the failures before it are those images' own."""
        self._well = item, prepared
        if any(kind_of(error) == "reading" for _, error in self._waiting):
            self.settle()  # it may have been read before the mount went away
        self._waiting.clear()

    def failed(self, item: ImageItem, error: Exception) -> None:
        """An image failed.

        Raises:
            MachineFault: so did others just before, and what went well before does so no more.
        """
        if kind_of(error) is not None:
            self._waiting.append((item, error))
            if len(self._waiting) >= IN_A_ROW:
                self.settle()

    def settle(self) -> None:
        """Decide: either MachineFault, or the images that are in doubt are at fault."""
        if not self._waiting:
            return
        kinds = [kind_of(error) for _, error in self._waiting]
        reading = all(kind == "reading" for kind in kinds)
        if not (self._readable() if reading else self._detectable()):
            raise MachineFault(_sentence(self._waiting, kinds)) from self._waiting[-1][1]
        self._waiting.clear()

    def _readable(self) -> bool:
        """Whether any image can be read at this moment."""
        for item in self._others():
            try:
                self._read(item)
            except OSError:
                continue
            except UniterError:  # what is in the file is another question
                pass
            return True
        return False

    def _detectable(self) -> bool:
        """Whether the detector can do any image at this moment."""
        prepared = self._well[1] if self._well is not None else None
        for item in self._others():
            try:
                self._detect(item, prepared)
            except Exception:  # of whatever kind: the question is whether anything works
                continue
            return True
        return False

    def _others(self) -> Iterable[ImageItem]:
        if self._well is not None:
            return [self._well[0]]
        doubtful = {item.key for item, _ in self._waiting}
        return (item for item in self._samples() if item.key not in doubtful)


def _sentence(waiting: Sequence[tuple[ImageItem, Exception]], kinds: Sequence[Kind | None]) -> str:
    item, error = waiting[-1]
    count = f"{len(waiting)} images in a row" if len(waiting) > 1 else "an image"
    if all(kind == "memory" for kind in kinds):
        what = f"there was not enough memory for {count}, each alone, last {item.path}"
        advice = "does another process fill the device? Once there is memory"
    elif all(kind == "reading" for kind in kinds):
        reason = getattr(error, "strerror", None) or error
        what = f"{count} cannot be read, last {item.path} ({reason}), nor can others"
        advice = "is the disk or mount gone? Once it is back"
    else:
        text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        what = f"the detector failed on {count}, last on {item.path} ({text})"
        advice = "this is hardly the images' fault, so the run ends; once it is mended"
    return f"{what}; {advice}, the same command continues"
