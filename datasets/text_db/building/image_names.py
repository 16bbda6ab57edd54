"""The images that captions name, on their way into a database: each name's key, found once and written down.

What a reader would get wrong: `REMEMBERED_IMAGES` names are known at once. One that was forgotten and comes again gets another number, and
`NamedImages`, which has all of them together, makes one image of what has one key.
"""

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from uniter.datasets.errors import BadInput, shown
from uniter.datasets.storage.index_file import hash_key

REMEMBERED_IMAGES = 1 << 18
MISSING: Final = "missing"
BY_TEMPLATE: Final = "template"
_AT_ONCE: Final = 4096

FindImage = Callable[[str], tuple[str, str] | None]
"""From an image's name to (its key, the rule it was found by), None where it is in no database."""

_Known = tuple[tuple[int, ...], str | list[str]] | None


class ImageNames:
    """Names to numbers and keys, spooled as columns in the working folder.

    Attributes:
        rules: the rules that found images, in the order of their numbers; the first is `MISSING`.
    """

    def __init__(self, work: Path, find: FindImage) -> None:
        self._find = find
        self._known: dict[str, _Known] = {}
        self._rows = 0
        self.rules: list[str] = [MISSING]
        columns = ("image_keys", "image_key_ends", "image_names", "image_name_ends", "image_rules", "image_name_hashes")
        self._columns = {name: open(work / name, "wb") for name in columns}  # noqa: SIM115 - closed in close()
        self._ends = {"image_keys": 0, "image_names": 0}

    def of(self, names: str | tuple[str, ...]) -> _Known:
        """The numbers of the images that an example names and their key, or keys; None where one of them is in no database."""
        if isinstance(names, str):
            return self._known[names] if names in self._known else self._added(names)
        each = [self._known[name] if name in self._known else self._added(name) for name in names]
        there = [found for found in each if found is not None]
        if not names or len(there) < len(names):
            return None
        return tuple(numbers[0] for numbers, _ in there), [str(key) for _, key in there]

    def forget(self) -> None:
        """Make room where too many names are known."""
        if len(self._known) >= REMEMBERED_IMAGES:
            self._known.clear()

    def close(self) -> None:
        """Write what waits; the names can then be mapped from disk by `NamedImages`."""
        self._known.clear()
        for column in self._columns.values():
            column.close()

    def _added(self, name: str) -> _Known:
        found = self._find(name) if name.strip("/. ") else None  # else the source does not say which image it is
        key, rule = found if found is not None else (name, MISSING)
        if rule not in self.rules:
            self.rules.append(rule)
        key = whole_text(key)
        for column, text in (("image_keys", key), ("image_names", whole_text(name))):
            encoded = text.encode()
            self._columns[column].write(encoded)
            self._ends[column] += len(encoded)
            self._columns[f"{column[:-1]}_ends"].write(self._ends[column].to_bytes(8, "little"))
        self._columns["image_rules"].write(bytes((self.rules.index(rule),)))
        self._columns["image_name_hashes"].write(array("q", (hash(name),)).tobytes())
        self._known[name] = ((self._rows,), key) if rule != MISSING else None
        self._rows += 1
        return self._known[name]


class NamedImages:
    """All that `ImageNames` wrote, by number.

    Attributes:
        firsts: (K,) int64, for each different key a number that has it.
        image_of: (R,) int32, for each number the place of its key in `firsts`.
        hashes: (K,) uint64, of the keys.
        rules: (R,) uint8, which rule found it.
    """

    def __init__(self, work: Path) -> None:
        self._keys, self._key_ends = mapped(work / "image_keys"), np.fromfile(work / "image_key_ends", np.int64)
        self._work = work
        self.rules = np.fromfile(work / "image_rules", np.uint8)
        hashes = np.fromiter(map(hash_key, self._each_key(np.arange(len(self._key_ends)))), np.uint64, len(self._key_ends))
        self.hashes, self.firsts, image_of = np.unique(hashes, return_index=True, return_inverse=True)
        self.image_of: NDArray[np.int32] = image_of.astype(np.int32)

    def keys(self, numbers: NDArray[np.int64]) -> tuple[bytes, NDArray[np.int64]]:
        """The keys of these numbers end to end, and where each ends."""
        lengths = self._key_ends[numbers] - self._starts[numbers]
        return b"".join(self._each_key(numbers)), np.cumsum(lengths, dtype=np.int64)

    def found_by(self, rules: Sequence[str]) -> dict[str, int]:
        """How many images each of the rules found."""
        counts = np.bincount(self.rules[self.firsts], minlength=len(rules))
        return {rule: int(count) for rule, count in zip(rules, counts, strict=True)}

    def names_sharing_a_key(self, used: NDArray[np.int32]) -> int:
        """How many names have the key of another one ("1.jpg" and "1.png").

        Args:
            used: the numbers of images that texts are about, as often as they are.

        Raises:
            BadInput: names of different folders share a key.
        """
        numbers = np.flatnonzero(np.bincount(used, minlength=len(self.image_of)))
        names = np.fromfile(self._work / "image_name_hashes", np.int64)[numbers]
        order = np.lexsort((names, self.image_of[numbers]))
        numbers, names, images = numbers[order], names[order], self.image_of[numbers[order]]
        other = np.flatnonzero((images[1:] == images[:-1]) & (names[1:] != names[:-1]))  # of one image, but another name
        named: dict[int, set[str]] = {}
        for place in other.tolist():
            named.setdefault(int(images[place]), set()).update(self._name(int(numbers[row])) for row in (place, place + 1))
        apart = {image: same for image, same in named.items() if len({PurePosixPath(name).parent for name in same}) > 1}
        for image, same in apart.items():
            key = self.keys(self.firsts[image : image + 1])[0].decode()
            others = f", and {len(apart) - 1:,} more keys are shared so" if len(apart) > 1 else ""
            raise BadInput(
                f"{' and '.join(map(shown, sorted(same)[:3]))} lie in different folders and would all be the image {key!r}{others}; "
                "give them keys of their own, for instance with --key path (and extract the regions with it)"
            )
        return sum(map(len, named.values()))

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        return np.concatenate([np.zeros(1, np.int64), self._key_ends[:-1]])

    def _each_key(self, numbers: NDArray[np.int64]) -> Iterator[bytes]:
        for start, end in pairs(self._starts[numbers], self._key_ends[numbers]):
            yield self._keys[start:end].tobytes()

    def _name(self, number: int) -> str:
        ends = np.memmap(self._work / "image_name_ends", np.int64, "r")
        return mapped(self._work / "image_names")[ends[number - 1] if number else 0 : ends[number]].tobytes().decode()


def whole_text(value: Any) -> Any:
    """The value with U+FFFD for every half of a surrogate pair: JSON can hold one (\\ud83d), UTF-8 cannot."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, Mapping):
        return {whole_text(name): whole_text(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [whole_text(item) for item in value]
    return value


def mapped(path: Path) -> NDArray[np.uint8]:
    """The bytes of a file of the working folder."""
    return np.asarray(np.memmap(path, np.uint8, "r")) if path.stat().st_size else np.zeros(0, np.uint8)


def pairs(starts: NDArray[np.int64], ends: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Starts and ends as plain numbers, some thousands at once."""
    for first in range(0, len(starts), _AT_ONCE):
        yield from zip(starts[first : first + _AT_ONCE].tolist(), ends[first : first + _AT_ONCE].tolist(), strict=True)
