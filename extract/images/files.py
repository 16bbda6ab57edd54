"""Image files, so many to a unit; a million of them at what their names take."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, repeat

import numpy as np

from uniter.datasets.image_db.keys import STEM, KeyRule, NameParts, stem_of
from uniter.datasets.storage.packed import Packed
from uniter.extract.images.items import ImageItem, digests_of, image_item, lengths_and_keys, refuse_equal_keys, text_of

_AT_ONCE = 1 << 14


def packed(names: Iterable[str]) -> Packed:
    """File names, which need be no valid Unicode."""
    return Packed(name.encode("utf-8", "surrogatepass") for name in names)


def text(name: bytes) -> str:
    """A packed name."""
    return name.decode("utf-8", "surrogatepass")


@dataclass(frozen=True, slots=True)
class FoundFiles:
    """Files that were found in one place.

    Attributes:
        prefix: what stands before each name, so that it can be opened.
        root: the name of the folder that they are relative to.
        files: their names.
        named: what keys are made from; None: the names.
        given: keys that a list gives, behind a "="; empty where it gives none. None: it gives none at all.
    """

    prefix: str
    root: str
    files: Packed
    named: Packed | None = None
    given: Packed | None = None

    def entries(self, begin: int, end: int, rule: KeyRule) -> Iterator[tuple[str, str]]:
        """Key and file of some rows."""
        files = list(map(text, self.files[begin:end]))
        named = map(text, self.named[begin:end]) if self.named is not None else files
        given = self.given[begin:end] if self.given is not None else repeat(b"")
        for file, name, key in zip(files, named, given, strict=False):
            if key:
                made = text(key[1:])
            else:  # the usual rule needs no more than the stem
                made = stem_of(name) if rule is STEM else rule(NameParts.of_file(name, root=self.root))
            yield text_of(made), self.prefix + file


class FileImages:
    """Image files, so many to a unit."""

    def __init__(self, found: Sequence[FoundFiles], rule: KeyRule, *, unit_images: int) -> None:
        self._found, self._rule = list(found), rule
        self._starts = np.cumsum([0, *(len(files.files) for files in found)]).tolist()
        self.unit_images: int = unit_images
        sha, digests, keys = hashlib.sha256(), np.empty(self.images, dtype=np.uint64), (key for key, _ in self._pairs(0, self.images))
        for begin in range(0, self.images, _AT_ONCE):
            chunk = list(islice(keys, _AT_ONCE))
            digests[begin : begin + len(chunk)] = digests_of(chunk)
            sha.update(lengths_and_keys(chunk))
        refuse_equal_keys(digests, lambda: self._pairs(0, self.images), otherwise="path")
        self.keys_sha256 = sha.hexdigest()

    @property
    def units(self) -> int:
        """Units of work, of `unit_images` images each but for the last."""
        return -(-self.images // self.unit_images)

    @property
    def images(self) -> int:
        """Images in all, those that cannot be used among them."""
        return int(self._starts[-1])

    def count(self, number: int) -> int:
        """How many images a unit has."""
        return len(self._rows(number))

    def unit(self, number: int) -> list[ImageItem]:
        """The images of a unit, in order."""
        rows = self._rows(number)
        return [image_item(key, file, file) for key, file in self._pairs(rows.start, rows.stop)]

    def _rows(self, number: int) -> range:
        return range(number * self.unit_images, min((number + 1) * self.unit_images, self.images))

    def _pairs(self, begin: int, end: int) -> Iterator[tuple[str, str]]:
        """Key and file of some images."""
        first = int(np.searchsorted(self._starts, begin, side="right")) - 1
        parts = []
        for place in range(first, len(self._found)):
            start, stop = self._starts[place], self._starts[place + 1]
            if start >= end:
                break
            low, high = max(begin, start) - start, min(end, stop) - start
            parts += [self._found[place].entries(at, min(high, at + _AT_ONCE), self._rule) for at in range(low, high, _AT_ONCE)]
        return chain.from_iterable(parts)
