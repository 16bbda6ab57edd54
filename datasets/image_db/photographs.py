"""Which files are photographs, and the photographs of a folder found again by the keys of a database.

What a reader would get wrong: where several files could be meant, none is found: another picture's size would be wrong in silence.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Final

from uniter.datasets.errors import BadInput

_JPEG, _PNG, _TIFF, _BMP = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"), (".png", ".apng"), (".tif", ".tiff"), (".bmp", ".dib")

IMAGE_SUFFIXES: Final = frozenset((*_JPEG, *_PNG, ".webp", ".gif", *_BMP, *_TIFF, ".ppm", ".pgm", ".pbm", ".pnm", ".avif"))
"""What counts as an image in folders and tars, in upper or lower case."""


class Photographs:
    """The photographs of a folder, found again by the keys of a database.

    A key is looked up as the path below the folder (with and without suffix), the file name and the stem; without `.npz`; in any
    case of letters; and without the prefixes and zeros that UNITER's published keys have (`nlvr2_dev-850-0-img0.npz` is
    `dev-850-0-img0.png`, `flickr30k_000000012345.npz` is `12345.jpg`). A stem that several files bear finds none of them,
    unless it is the path of one.
    """

    def __init__(self, folder: str | Path) -> None:
        """List the folder and all below it. Raises BadInput where there is no such folder, or no image in it."""
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise BadInput(f"{self.folder} is no folder; --images wants the folder of the photographs that the regions were taken from")
        paths = sorted(path for path in self.folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
        if not paths:
            raise BadInput(f"no image in {self.folder}; --images wants the folder of the photographs that the regions were taken from")
        self._count = len(paths)
        self._paths: dict[str, Path | None] = {}
        self._exact: dict[str, Path | None] = {}
        self._folded: dict[str, Path | None] = {}
        for path in paths:
            relative = path.relative_to(self.folder)
            names = {relative.as_posix(), relative.with_suffix("").as_posix(), path.name, path.stem}
            _enter(self._paths, {relative.as_posix(), relative.with_suffix("").as_posix()}, path)
            _enter(self._exact, names, path)
            folded = {name.casefold() for name in names}
            _enter(self._folded, folded | ({path.stem.lstrip("0") or "0"} if path.stem.isdecimal() else set()), path)

    def __len__(self) -> int:
        return self._count

    def find(self, key: str) -> Path | None:
        """The photograph of a key, None where there is none or where it is not clear which."""
        bare = key.removesuffix(".npz")
        for name in (key, bare):
            if (path := self._paths.get(name) or self._exact.get(name)) is not None:
                return path
        rest = bare.casefold()
        for _ in range(5):
            for name in (rest, rest.lstrip("0") or "0") if rest.isdecimal() else (rest,):
                if (path := self._folded.get(name)) is not None:
                    return path
            _, underscore, rest = rest.partition("_")
            if not underscore:
                break
        return None


def _enter(table: dict[str, Path | None], names: Iterable[str], path: Path) -> None:
    for name in names:
        table[name] = path if table.get(name, path) == path else None
