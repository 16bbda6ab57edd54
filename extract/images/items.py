"""One image of a run: its key, where its bytes are, and the list of all of them."""

import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from uniter.datasets.errors import BadInput
from uniter.datasets.image_db.keys import key_fault
from uniter.datasets.image_db.tables import picture_of_row
from uniter.extract.images.decoding import MAX_PIXELS

# Opening a named pipe would wait for ever; Windows has neither of the first two, and knows text files.
_WITHOUT_WAITING = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)

UNIT_IMAGES = 128
"""Images of a unit, where there are no tars. It decides which images share a batch, so it stands in settings.json."""

CUT_TAR = "#end"
"""How the key of the item ends that stands for what a tar was cut off from."""


class CutTar(BadInput):
    """A tar that was cut off: written again, it can be read."""


class NeverReadable(BadInput):
    """What no retry can mend: the fault is in a name, not in a file."""


@dataclass(frozen=True, slots=True)
class ImageItem:
    """One requested image.

    Attributes:
        key: under which it is stored.
        path: as messages show it; `shard.tar/member` within a tar.
        file: the file to open.
        offset, size: the bytes within the file; size -1 means the whole file.
        row: of a table that holds the bytes in a column; -1 where the file is no table.
        fault: why it cannot be read, where that is known already.
    """

    key: str
    path: str
    file: str
    offset: int = 0
    size: int = -1
    fault: str | None = None
    row: int = -1


class ImageList(Protocol):
    """All requested images in their order, cut into fixed units."""

    @property
    def units(self) -> int:
        """How many units of work there are; `unit(k)` gives the images of one."""

    @property
    def images(self) -> int:
        """How many images are asked for, of all units."""

    @property
    def unit_images(self) -> int | None:
        """Images of a unit; None where a unit is a tar."""

    @property
    def keys_sha256(self) -> str:
        """The SHA-256 of all keys in order, in hexadecimal: what tells this list from another."""

    def count(self, number: int) -> int:
        """How many images a unit has."""
        ...

    def unit(self, number: int) -> list[ImageItem]:
        """The images of a unit, in order."""
        ...


def image_item(key: str, path: str, file: str, offset: int = 0, size: int = -1, fault: str | None = None, *, row: int = -1) -> ImageItem:
    """An image of a list, with text made fit for JSON; a key that no database can hold becomes the item's `fault`."""
    key = text_of(key)
    return ImageItem(key, text_of(path), file, offset, size, fault or key_fault(key), row)


def text_of(name: str) -> str:
    """A file name as text: bytes that are not UTF-8 become `\\udcXX`, visibly."""
    return name if name.isascii() else name.encode("utf-8", "backslashreplace").decode()


def digests_of(keys: Sequence[str]) -> NDArray[np.uint64]:
    """Eight bytes of BLAKE2b of each key, (N,) uint64: enough to find keys that come twice, in little memory."""
    blake2b = hashlib.blake2b  # a million times
    packed = b"".join([blake2b(key, digest_size=8).digest() for key in map(str.encode, keys)])
    return np.frombuffer(packed, dtype=np.uint64)


def digest_of_keys(keys: Sequence[str]) -> str:
    """The SHA-256 of the keys in order, in hexadecimal; each is hashed with its length, so that no two lists run together."""
    return hashlib.sha256(lengths_and_keys(keys)).hexdigest()


def lengths_and_keys(keys: Sequence[str]) -> bytes:
    """What the digest of a list of keys is of."""
    return b"".join([len(encoded).to_bytes(4, "little") + encoded for encoded in map(str.encode, keys)])


def refuse_equal_keys(digests: NDArray[np.uint64], pairs: Callable[[], Iterator[tuple[str, str]]], *, otherwise: str) -> None:
    """BadInput where images share a key; `otherwise` is the rule that tells images of different folders or tars apart."""
    ordered = np.sort(digests)
    suspects = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    del ordered
    if not suspects:
        return
    files: dict[str, list[str]] = {}
    for (key, file), digest in zip(pairs(), digests.tolist(), strict=True):
        if digest in suspects:
            files.setdefault(key, []).append(file)
    equal = {key: names for key, names in files.items() if len(names) > 1}
    if equal:
        key, names = next(iter(equal.items()))
        others = f" ({len(equal)} keys are not unique)" if len(equal) > 1 else ""
        if len(set(names)) < len(names):
            raise BadInput(f"{text_of(names[0])} is named {names.count(names[0])} times{others}; name it once")
        beside = len({name.rpartition("/")[0] for name in names}) < len(names)
        other = "'{name}'" if beside else otherwise
        raise BadInput(
            f"{' and '.join(text_of(name) for name in names[:3])} would all get the key {key!r}{others}; choose another --key, "
            f"for instance --key {other}"
        )


# --- reading ---------------------------------------------------------------------------------------------------------------------


def read_bytes(item: ImageItem, *, max_pixels: int = MAX_PIXELS) -> bytes:
    """The bytes of an image, refused unread where the file is larger than any image of `max_pixels` pixels.

    Raises:
        BadInput: a known fault, an empty or oversized file, no ordinary file, or the tar changed.
        OSError: the file cannot be opened or read.
    """
    if item.fault is not None:
        raise (CutTar if item.key.endswith(CUT_TAR) else NeverReadable)(item.fault)
    limit = 8 * max_pixels + (16 << 20)  # four channels of 16 bit, and whatever stands beside the pixels
    if item.row >= 0:
        content = picture_of_row(item.file, item.row)
        _refuse_large(len(content), limit, max_pixels)
        if not content:
            raise BadInput("its bytes in the table are empty")
        return content
    with open(os.open(item.file, _WITHOUT_WAITING), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise BadInput("it is no ordinary file")
        size = item.size if item.size >= 0 else status.st_size
        _refuse_large(size, limit, max_pixels)
        file.seek(item.offset)
        data = file.read(size)
    if len(data) < size:
        raise (CutTar if item.size >= 0 else BadInput)(f"the file ends after {len(data):,} of {size:,} bytes; copy it again")
    if not data:
        raise BadInput("the file is empty")
    return data


def _refuse_large(size: int, limit: int, max_pixels: int) -> None:
    if size > limit:
        raise BadInput(f"the file has {size:,} bytes, more than {max_pixels:,} pixels need; raise --max-pixels if it is an image")
