"""Which files are photographs, and the photographs of a folder found again by the keys of a database.

What a reader would get wrong: where several files could be meant, none is found: another picture's size would be wrong in silence.
"""

import functools
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Final

from uniter.datasets.errors import BadInput

_JPEG, _PNG, _TIFF, _BMP = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"), (".png", ".apng"), (".tif", ".tiff"), (".bmp", ".dib")

HEIF_SUFFIXES: Final = (".heic", ".heif", ".hif")
"""Phones' photographs; they count as images where pillow-heif is installed."""

READS_HEIF: Final = importlib.util.find_spec("pillow_heif") is not None
HEIF_WANTS: Final = "pillow-heif: pip install 'uniter-toolkit[heic]'"
"""What HEIC takes, for the sentences that say so."""

_OTHERS: Final = (".webp", ".gif", ".ppm", ".pgm", ".pbm", ".pnm", ".avif", *(HEIF_SUFFIXES if READS_HEIF else ()))

IMAGE_SUFFIXES: Final = frozenset((*_JPEG, *_PNG, *_BMP, *_TIFF, *_OTHERS))
"""What counts as an image in folders and tars, in upper or lower case."""


@functools.cache
def let_pillow_read_heif() -> None:
    """`PIL.Image.open` opens HEIC from here on, where pillow-heif is installed."""
    if READS_HEIF:
        import pillow_heif

        pillow_heif.register_heif_opener()


class Photographs:
    """The photographs of a folder, found again by the keys of a database.

    A key names a photograph by its path below the folder or the end of it, with or without suffix; without `.npz`; in any case of
    letters; and without the prefixes and zeros that UNITER's published keys have (`nlvr2_dev-850-0-img0.npz` is `dev-850-0-img0.png`,
    `flickr30k_000000012345.npz` is `12345.jpg`). Where several could be meant it is the one whose whole path it is, then the one that is
    spelt so; else none.
    """

    def __init__(self, folder: str | Path) -> None:
        """List the folder and all below it. Raises BadInput where there is no such folder, or no image in it."""
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise BadInput(f"{self.folder} is no folder; --images wants the folder of the photographs that the regions were taken from")
        paths = sorted(path for path in self.folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
        if not paths:
            raise BadInput(f"no image in {self.folder}; --images wants the folder of the photographs that the regions were taken from")
        if any(path.suffix.lower() in HEIF_SUFFIXES for path in paths):
            let_pillow_read_heif()
        self._count = len(paths)
        self._named: dict[str, list[PurePosixPath]] = {}
        for path in paths:
            relative = PurePosixPath(path.relative_to(self.folder).as_posix())
            for name in {_plain(relative.name), _plain(relative.stem)}:
                self._named.setdefault(name, []).append(relative)

    def __len__(self) -> int:
        return self._count

    def find(self, key: str) -> Path | None:
        """The photograph of a key, None where there is none or where it is not clear which."""
        found = self.meant(key)
        return found[0] if len(found) == 1 else None

    def meant(self, key: str) -> list[Path]:
        """The photographs that a key could mean."""
        for form in _forms(key):
            parts = PurePosixPath(form).parts or ("",)
            found = [path for path in self._named.get(_plain(parts[-1]), ()) if _ends_alike(path.parts[:-1], parts[:-1])]
            found = [path for path in found if len(path.parts) == len(parts)] or found
            found = [path for path in found if parts[-1] in (path.name, path.stem)] or found
            if found:
                return [self.folder / path for path in found]
        return []


def _forms(key: str) -> Iterator[str]:
    """The key; without `.npz`; without up to four of the prefixes that end in "_"."""
    yield key
    rest, underscore = key.removesuffix(".npz"), "_"
    for _ in range(5):
        if underscore:
            yield rest
            _, underscore, rest = rest.partition("_")


def _plain(name: str) -> str:
    """A name in small letters, a number without its zeros."""
    return (name.lstrip("0") or "0") if name.isdecimal() else name.casefold()


def _ends_alike(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether the folders of two paths agree as far as both have any."""
    return all(mine.casefold() == its.casefold() for mine, its in zip(reversed(one), reversed(other), strict=False))
