"""Images inside tar shards.

OUT/listing/    what the headers of each tar say, so that they are read once and not by every process at every start
"""

import hashlib
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uniter.datasets.errors import BadInput
from uniter.datasets.image_db.keys import KeyRule, NameParts
from uniter.datasets.image_db.photographs import IMAGE_SUFFIXES
from uniter.datasets.storage.index_file import load_arrays, save_arrays
from uniter.datasets.storage.packed import Packed
from uniter.extract.images.items import CUT_TAR, ImageItem, digest_of_keys, digests_of, image_item, refuse_equal_keys, text_of

_FORM = 1  # of the notes


@dataclass(frozen=True, slots=True)
class _Members:
    """The images of a tar in its order.

    Attributes:
        names, faults: of each; a fault is empty where there is none.
        offsets, sizes: (N,) int64, bytes in the tar.
        cut: why the tar cannot be read to its end; empty where it can.
    """

    names: Packed
    faults: Packed
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    cut: str = ""


class TarImages:
    """The images of tar shards, a unit a tar. Only the headers are read here.

    Args:
        tars: the shards.
        rule: makes the keys.
        notes: a folder; what was noted there of tars that are the same by size and time is believed.
    """

    unit_images: int | None = None

    def __init__(self, tars: Sequence[Path], rule: KeyRule, *, notes: Path | None = None) -> None:
        self._tars, self._rule, self._notes = list(tars), rule, notes
        self._read: dict[int, _Members] = {}  # until it is noted beside the work
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
        """One unit a tar: it is read from its beginning to its end."""
        return len(self._tars)

    def count(self, number: int) -> int:
        """How many images a tar has."""
        return self._counts[number]

    def unit(self, number: int) -> list[ImageItem]:
        """The images of a tar in its order; one more item, with a fault, where the tar is cut off."""
        return list(_items(self._tars[number], self._members(number), self._rule))

    def keep(self, notes: Path) -> None:
        """Note what was read of the headers in a folder, and forget it here."""
        self._notes = notes
        for number, members in self._read.items():
            _write_note(_note(notes, self._tars[number]), self._tars[number], members)
        self._read.clear()

    def _members(self, number: int) -> _Members:
        tar = self._tars[number]
        if number not in self._read:
            known = _read_note(_note(self._notes, tar), tar) if self._notes is not None else None
            if known is not None:
                return known
            self._read[number] = _members_of(tar)
        return self._read[number]


def _items(path: Path, members: _Members, rule: KeyRule) -> Iterator[ImageItem]:
    """By WebDataset's convention: the key is the path up to the first dot of the last part."""
    shown = text_of(str(path))
    columns = (members.names, members.faults, members.offsets.tolist(), members.sizes.tolist())
    for raw, fault, offset, size in zip(*columns, strict=True):
        name = raw.decode()
        folders, _, last = name.rpartition("/")
        stem = last.split(".", 1)[0]
        parts = NameParts(last, stem, folders.rpartition("/")[2] or text_of(path.stem), f"{folders}/{stem}" if folders else stem)
        yield image_item(rule(parts), f"{shown}/{name}", str(path), offset, size, fault.decode() or None)
    if members.cut:
        yield ImageItem(f"{text_of(path.name)}{CUT_TAR}", shown, str(path), fault=members.cut)


def _members_of(path: Path) -> _Members:
    found: list[tuple[bytes, bytes, int, int]] = []
    last_position, cut = -1, ""
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # the library keeps every header otherwise
                if member.offset <= last_position:
                    raise tarfile.ReadError("its headers run in a circle")
                last_position = member.offset
                image = _image_member(member)
                if image is not None:
                    found.append(image)
            _refuse_cut(path, tar.offset)
    except (tarfile.TarError, EOFError, ValueError) as error:
        # Downloads that were stopped leave such files: what precedes the cut is used.
        cut = f"the tar cannot be read to its end ({error}); write it again"
    offsets, sizes = (np.array([row[place] for row in found], dtype=np.int64) for place in (2, 3))
    return _Members(Packed(row[0] for row in found), Packed(row[1] for row in found), offsets, sizes, cut)


def _image_member(member: tarfile.TarInfo) -> tuple[bytes, bytes, int, int] | None:
    """Name, fault, place and size of an image in a tar; None of what is no image."""
    name = text_of(member.name.removeprefix("./"))
    last = name.rpartition("/")[2]
    if member.isdir() or last.startswith(".") or PurePosixPath(last).suffix.lower() not in IMAGE_SUFFIXES:
        return None
    fault = ""
    if name.startswith("/") or ".." in name.split("/"):
        fault = "its name in the tar leads outside the tar"
    elif not member.isreg() or member.issparse():
        fault = "it is a link or a special file in the tar, not an image"
    return name.encode(), fault.encode(), member.offset_data, member.size


def _refuse_cut(path: Path, end: int) -> None:
    """The library takes the first header that it cannot read for the tar's end. There are zeros, or nothing."""
    with path.open("rb") as file:
        file.seek(end)
        block = file.read(tarfile.BLOCKSIZE)
        if any(block) or 0 < len(block) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError(f"no header at byte {end:,}, where one should be")
        if not block and file.seek(0, 2) < end:
            raise tarfile.ReadError("unexpected end of data")


# --- beside the work -------------------------------------------------------------------------------------------------------------


def _note(notes: Path, tar: Path) -> Path:
    """Where the headers of a tar are noted."""
    return notes / f"{hashlib.blake2b(os.fsencode(tar.absolute()), digest_size=16).hexdigest()}.safetensors"


def _identity(tar: Path) -> list[int]:
    status = tar.stat()
    return [_FORM, status.st_size, status.st_mtime_ns]


def _write_note(note: Path, tar: Path, members: _Members) -> None:
    note.parent.mkdir(exist_ok=True)
    columns: dict[str, NDArray[Any]] = {"identity": np.array(_identity(tar), np.int64), "offsets": members.offsets, "sizes": members.sizes}
    for name, packed in (("names", members.names), ("faults", members.faults)):
        columns |= {f"{name}_{part}": array for part, array in packed.arrays().items()}
    save_arrays(note, {**columns, "cut": np.frombuffer(members.cut.encode(), dtype=np.uint8)})


def _read_note(note: Path, tar: Path) -> _Members | None:
    """What was noted of a tar; None where it was not, or the tar is another one by now."""
    if not note.is_file():
        return None
    try:
        columns = load_arrays(
            note, needed=("identity", "offsets", "sizes", "names_bytes", "names_ends", "faults_bytes", "faults_ends", "cut")
        )
        if columns["identity"].tolist() != _identity(tar):
            return None
        names, faults = (Packed.of_arrays(columns[f"{name}_bytes"], columns[f"{name}_ends"]) for name in ("names", "faults"))
        if not len(names) == len(faults) == len(columns["offsets"]) == len(columns["sizes"]):
            return None
        return _Members(names, faults, columns["offsets"], columns["sizes"], columns["cut"].tobytes().decode())
    except (BadInput, OSError, ValueError, KeyError):
        return None  # a damaged note is no harm: the tar is there
