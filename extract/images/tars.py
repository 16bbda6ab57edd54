"""Images inside tar shards."""

import hashlib
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from uniter.datasets.errors import BadInput
from uniter.datasets.image_db.keys import KeyRule, NameParts
from uniter.datasets.image_db.photographs import IMAGE_SUFFIXES
from uniter.extract.images.items import CUT_TAR, ImageItem, digest_of_keys, digests_of, image_item, refuse_equal_keys, text_of


class TarImages:
    """The images of tar shards, a unit a tar. Only the headers are read here, and only numbers are kept."""

    unit_images: int | None = None

    def __init__(self, tars: Sequence[Path], rule: KeyRule) -> None:
        self._tars, self._rule = list(tars), rule
        digests: list[NDArray[np.uint64]] = []
        sha = hashlib.sha256()
        for number in range(len(self._tars)):
            keys = [item.key for item in self.unit(number)]
            digests.append(digests_of(keys))
            sha.update(bytes.fromhex(digest_of_keys(keys)))
        together = np.concatenate(digests)
        if not len(together):
            raise BadInput(f"{self._tars[0]}{' and the other shards' if len(self._tars) > 1 else ''}: no images inside")
        refuse_equal_keys(
            together, lambda: ((item.key, item.path) for n in range(self.units) for item in self.unit(n)), otherwise="'{parent}/{stem}'"
        )
        self.images = len(together)
        self.keys_sha256 = sha.hexdigest()
        self._counts = [len(keys) for keys in digests]

    @property
    def units(self) -> int:
        return len(self._tars)

    def count(self, number: int) -> int:
        """How many images a tar has."""
        return self._counts[number]

    def unit(self, number: int) -> list[ImageItem]:
        """The images of a tar in its order; one more item, with a fault, where the tar is cut off."""
        return list(_tar_items(self._tars[number], self._rule))


def _tar_items(path: Path, rule: KeyRule) -> Iterator[ImageItem]:
    """The images of a tar, by WebDataset's convention: the key is the path up to the first dot of the last part."""
    shown = text_of(str(path))
    last_position = -1
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # the library keeps every header otherwise
                if member.offset <= last_position:
                    raise tarfile.ReadError("its headers run in a circle")
                last_position = member.offset
                item = _tar_item(member, path, shown, rule)
                if item is not None:
                    yield item
            _refuse_cut(path, tar.offset)
    except (tarfile.TarError, EOFError, ValueError) as error:
        # Downloads that were stopped leave such files: what precedes the cut is used.
        yield ImageItem(
            f"{text_of(path.name)}{CUT_TAR}", shown, str(path), fault=f"the tar cannot be read to its end ({error}); write it again"
        )


def _refuse_cut(path: Path, end: int) -> None:
    """The library takes the first header that it cannot read for the tar's end. There are zeros, or nothing."""
    with path.open("rb") as file:
        file.seek(end)
        block = file.read(tarfile.BLOCKSIZE)
        if any(block) or 0 < len(block) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError(f"no header at byte {end:,}, where one should be")
        if not block and file.seek(0, 2) < end:
            raise tarfile.ReadError("unexpected end of data")


def _tar_item(member: tarfile.TarInfo, path: Path, shown: str, rule: KeyRule) -> ImageItem | None:
    name = text_of(member.name.removeprefix("./"))
    folders, _, last = name.rpartition("/")
    if member.isdir() or last.startswith(".") or PurePosixPath(last).suffix.lower() not in IMAGE_SUFFIXES:
        return None
    stem = last.split(".", 1)[0]
    parts = NameParts(last, stem, folders.rpartition("/")[2] or text_of(path.stem), f"{folders}/{stem}" if folders else stem)
    fault = None
    if name.startswith("/") or ".." in name.split("/"):
        fault = "its name in the tar leads outside the tar"
    elif not member.isreg() or member.issparse():
        fault = "it is a link or a special file in the tar, not an image"
    return image_item(rule(parts), f"{shown}/{name}", str(path), member.offset_data, member.size, fault)
