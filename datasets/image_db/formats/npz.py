"""Folders of .npz files as UNITER's extraction docker writes them: one file an image, the file name is the key.

Such a folder holds up to 100 candidates an image; which rows count is decided when it is read (`Selection`). A folder that
this project wrote says in `rows.json` that its rows are the chosen ones already.

Source: facts/uniter.md section 1.1.
"""

import errno
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uniter.datasets.errors import BadInput
from uniter.datasets.image_db.formats.records import Item, Selection, Skip, npz_name, refuse
from uniter.datasets.image_db.records import decode_record
from uniter.datasets.image_db.regions import RegionFeatures
from uniter.datasets.storage.claims import NOTE, write_note
from uniter.datasets.storage.files import write_json, written_aside
from uniter.datasets.storage.npz import pack_npz

_NOTE = "rows.json"


_MAX_FILE_BYTES = 1 << 30


def read(path: Path, selection: Selection) -> Iterator[Item]:
    """Items of every .npz below a folder (or of one file), by name; keys are the file names with `.npz`."""
    files = [path] if path.is_file() else sorted(path.rglob("*.npz"))
    root = path.parent if path.is_file() else path
    chosen = (root / _NOTE).exists()
    for file in files:
        key = str(file.relative_to(root))
        try:
            if file.stat().st_size > _MAX_FILE_BYTES:
                raise BadInput(f"image {key!r}: the file has more than {_MAX_FILE_BYTES:,} bytes")
            content = file.read_bytes()
            if content[:4] != b"PK\x03\x04":
                raise BadInput(f"image {key!r}: {file} is no npz ({len(content):,} bytes)")
            regions = decode_record(content, key=key)
            yield key, regions if chosen else selection.cut(regions)
        except (BadInput, OSError) as error:
            yield key, error if isinstance(error, BadInput) else BadInput(f"image {key!r}: {file} cannot be read ({error})")


def write(path: Path, items: Iterable[tuple[str, RegionFeatures]], *, note: Mapping[str, Any] | None = None, skip: Skip = refuse) -> None:
    """Write a folder of .npz files with `norm_bb`, `features`, `conf`, `soft_labels` (where known), all float16.

    What is there is replaced.

    Raises:
        BadInput: the folder is there and holds anything else than .npz files.
    """
    if path.is_dir() and any(file.is_file() and file.suffix != ".npz" and file.name not in (_NOTE, NOTE) for file in path.rglob("*")):
        raise BadInput(f"{path} holds other files than .npz; choose another folder, or remove it")
    with written_aside(path, large=True) as folder:
        folder.mkdir(parents=True)
        write_json(folder / _NOTE, {"rows": "chosen", "meaning": "every row counts; do not select by confidence again"})
        if note is not None:
            write_note(folder, note)
        for key, regions in items:
            file = folder / npz_name(key)
            try:
                if "\0" in key or not file.resolve().is_relative_to(folder.resolve()):
                    raise BadInput(f"key {key!r} would be written outside {path}")
                content = pack_npz(uniter_arrays(key, regions))
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
            except (OSError, UnicodeEncodeError) as error:
                if isinstance(error, OSError) and error.errno not in (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST):
                    raise
                skip(key, regions, BadInput(f"key {key!r} can be no file's name ({error})"))
            except BadInput as error:
                skip(key, regions, error)


def uniter_arrays(key: str, regions: RegionFeatures) -> dict[str, NDArray[Any]]:
    """The four arrays of UNITER's files, float16, in the docker's order; soft labels only where they are known."""
    arrays: dict[str, NDArray[Any]] = {"norm_bb": regions.norm_bb, "features": regions.features, "conf": regions.conf[:, None]}
    if regions.soft_labels is not None:
        arrays["soft_labels"] = regions.soft_labels
    with np.errstate(over="ignore"):
        halves = {name: np.ascontiguousarray(array, dtype="<f2") for name, array in arrays.items()}
    for name, array in halves.items():
        if not np.isfinite(array).all():
            raise BadInput(f"image {key!r}: {name} holds a number that float16 cannot hold")
    return halves
