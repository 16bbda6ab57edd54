"""Folders of plain `.npy` files, two an image, for whoever wants nothing but NumPy.

    OUT/images.jsonl          {"key", "file", "height", "width", "regions"} a line
    OUT/features/FILE.npy     (n, D) float32
    OUT/boxes/FILE.npy        (n, 4) float32, pixels, x0 y0 x1 y1

What a reader would get wrong: FILE is the key without `.npz`, and no other way to find it is promised; images.jsonl says both, and sizes.
"""

import errno
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from uniter.datasets.errors import BadInput
from uniter.datasets.image_db.formats.records import MAX_REGIONS, MAX_WIDTH, Item, Skip, from_pixels, refuse
from uniter.datasets.image_db.regions import RegionFeatures
from uniter.datasets.storage.claims import NOTE, write_note
from uniter.datasets.storage.files import written_aside
from uniter.datasets.storage.streams import json_lines

INDEX: Final = "images.jsonl"
_FOLDERS: Final = ("features", "boxes")
_NO_NAMES: Final = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)


def is_npy_folder(path: Path) -> bool:
    """Whether a folder is of this layout."""
    return (path / INDEX).is_file() and all((path / name).is_dir() for name in _FOLDERS)


def read(path: Path) -> Iterator[Item]:
    """Items in the order of images.jsonl."""
    for where, row in json_lines(path / INDEX):
        key, file, size = row.get("key"), row.get("file"), (row.get("height"), row.get("width"))
        if not isinstance(key, str) or not isinstance(file, str) or not all(type(number) is int for number in size):
            raise BadInput(f"{where} lacks key, file, height or width; expected what `uniter-db convert --to npy` wrote")
        try:
            features, boxes = (_array(path, folder, file, key) for folder in _FOLDERS)
            yield key, from_pixels(key=key, features=features, boxes=boxes, size=size)  # type: ignore[arg-type]  # of whole numbers
        except BadInput as error:
            yield key, error


def _array(root: Path, folder: str, file: str, key: str) -> NDArray[np.float32]:
    path = root / folder / f"{file}.npy"
    if not path.resolve().is_relative_to(root.resolve()):
        raise BadInput(f"image {key!r}: its file {file!r} lies outside {root}")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False, max_header_size=4096)
    except (OSError, ValueError, EOFError, SyntaxError, TypeError) as error:
        raise BadInput(f"image {key!r}: {path} cannot be read ({error})") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f" or array.ndim != 2 or max(array.shape) > max(MAX_REGIONS, MAX_WIDTH):
        raise BadInput(f"image {key!r}: {path} holds no matrix of numbers, rows of regions")
    return np.array(array, dtype=np.float32)


def write(path: Path, items: Iterable[tuple[str, RegionFeatures]], *, note: Mapping[str, Any] | None = None, skip: Skip = refuse) -> None:
    """Write the folder; what is there is replaced. Every record has boxes and size (`records.with_pixels`).

    Raises:
        BadInput: the folder is there and holds anything else.
    """
    if path.is_dir() and any(child.name not in (INDEX, NOTE, *_FOLDERS) for child in path.iterdir()):
        raise BadInput(f"{path} holds other files than such a folder; choose another, or remove it")
    with written_aside(path, large=True) as folder:
        folder.mkdir(parents=True)
        for name in _FOLDERS:
            (folder / name).mkdir()
        if note is not None:
            write_note(folder, note)
        seen: set[str] = set()
        with open(folder / INDEX, "w", encoding="utf-8") as index:
            for key, regions in items:
                file = key.removesuffix(".npz")
                assert regions.size is not None and regions.boxes is not None
                try:
                    if file in seen:
                        raise BadInput(f"image {key!r} comes twice")
                    seen.add(file)
                    for name in _FOLDERS:
                        _save(folder, name, file, getattr(regions, name), key)
                except BadInput as error:
                    skip(key, regions, error)
                    continue
                row = {"key": key, "file": file, "height": regions.size[0], "width": regions.size[1], "regions": len(regions)}
                index.write(json.dumps(row, ensure_ascii=False) + "\n")


def _save(root: Path, folder: str, file: str, array: NDArray[Any], key: str) -> None:
    target = root / folder / f"{file}.npy"
    try:
        if "\0" in file or not target.resolve().is_relative_to((root / folder).resolve()):
            raise BadInput(f"key {key!r} would be written outside the folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        np.save(target, np.ascontiguousarray(array, dtype=np.float32), allow_pickle=False)
    except (OSError, UnicodeEncodeError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_NAMES:
            raise
        raise BadInput(f"key {key!r} can be no file's name ({error})") from None
