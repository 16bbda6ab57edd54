"""The layout of ImageCaptioning.pytorch (self-critical, AoANet, SGAE): features, their mean and boxes in three folders.

What a reader would get wrong: instead of the folder of features there may be one file, an lmdbdict (an LMDB without a folder, whose lists
of keys and functions are pickles), an HDF5 or a dictionary of tensors. The sizes of the images stand in the JSON beside them only.

Source: facts/formats.md, with its corrections 5 and 17.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import lmdb
import numpy as np
from numpy.typing import NDArray

from uniter.datasets.errors import BadInput
from uniter.datasets.image_db.formats import hdf5
from uniter.datasets.image_db.formats.projects.folders import content_of_file, write_one
from uniter.datasets.image_db.formats.projects.layout import NUMBERS, SPLITS, Known, Layout, Put, Record, attempt, floats, record
from uniter.datasets.image_db.formats.records import Item
from uniter.datasets.storage.npz import map_npy, unpack_npz, write_npz
from uniter.datasets.storage.plain_pickle import plain_pickle
from uniter.datasets.storage.streams import whole_json


def _selfcritical_sources(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    inside = [file for file in sorted(path.rglob("*")) if file.is_file()]
    folders = [file for file in inside if file.suffix == ".npz"]
    return [*folders, *(file for file in inside if file.stem.endswith("_att") and file.suffix in (".h5", ".lmdb", ".pth"))]


def _beside(path: Path, known: Known, key: str) -> dict[str, Any]:
    """The boxes and the size of an image, as far as they lie beside its features."""
    holder = path.parent if path.suffix == ".npz" else path.with_suffix("")
    box = holder.with_name(f"{holder.name.removesuffix('_att')}_box") / f"{key}.npy"
    if holder.parent not in known.kept:
        sizes: dict[str, tuple[int, int]] = {}
        for file in sorted(holder.parent.glob("*.json")):
            for row in _rows_of(file):
                with contextlib.suppress(KeyError, TypeError, ValueError):
                    sizes[str(row["id"])] = int(row["height"]), int(row["width"])
        known.kept[holder.parent] = sizes
    return {"boxes": map_npy(box) if box.is_file() else None, "size": known.kept[holder.parent].get(key)}


def _rows_of(file: Path) -> list[Any]:
    rows = whole_json(file)
    rows = rows.get("images") if isinstance(rows, dict) else None
    return rows if isinstance(rows, list) else []


def _read_selfcritical(path: Path, name: str, known: Known) -> Iterator[Item]:
    reader = {".lmdb": _of_lmdbdict, ".h5": _of_hdf5, ".pth": _of_pth}.get(path.suffix, _of_npz)
    for key, features in reader(path):
        yield attempt(key, path, lambda key=key, features=features: record(key, features(), **_beside(path, known, key)))  # type: ignore[misc]


_Features = Iterator[tuple[str, Callable[[], NDArray[Any]]]]


def _of_npz(path: Path) -> _Features:
    yield path.stem, lambda: _feat_of(content_of_file(path))


def _feat_of(content: bytes | memoryview) -> NDArray[Any]:
    arrays = unpack_npz(content)
    found = arrays.get("feat", arrays.get("z"))
    if found is None:
        raise BadInput(f"it has neither feat nor z (but {', '.join(arrays) or 'nothing'})")
    return found.reshape(-1, found.shape[-1])


def _of_hdf5(path: Path) -> _Features:
    with hdf5.opened(path) as file:
        for key in file:
            yield str(key), lambda key=key: hdf5.numbers_in(file, key, 2)[:]  # type: ignore[misc]


def _of_lmdbdict(path: Path) -> _Features:
    try:
        environment = lmdb.open(str(path), readonly=True, subdir=False, lock=False, create=False, max_spare_txns=0)
    except lmdb.Error as error:
        raise BadInput(f"{path} cannot be opened: {error}") from None
    with contextlib.closing(environment), environment.begin(buffers=True) as transaction:
        for name in (b"__keys__", b"__key_dumps__", b"__key_loads__", b"__value_dumps__", b"__value_loads__"):
            value = transaction.get(name)
            if value is not None:  # functions may be kept there; these are names
                plain_pickle(value, f"{path}: {name.decode()}")
        for key, value in transaction.cursor():
            spelt = bytes(key).decode("utf-8", "replace")
            if not (spelt.startswith("__") and spelt.endswith("__")):
                yield spelt, lambda value=value: _feat_of(value)  # type: ignore[misc]


def _of_pth(path: Path) -> _Features:
    from uniter.datasets.storage.tensors import read_plain_tensors  # torch takes seconds to import

    for key, tensor in read_plain_tensors(path).items():
        yield key, lambda tensor=tensor: tensor  # type: ignore[misc]


@contextlib.contextmanager
def _write_selfcritical(folder: Path, known: Known) -> Iterator[Put]:
    for name in ("att", "fc", "box"):
        (folder / f"cocobu_{name}").mkdir()
    sizes = 0
    with open(folder / "cocotalk.json", "w") as information:

        def put(image: Record) -> None:
            nonlocal sizes
            features = floats(image.regions.features)
            write_npz(folder / "cocobu_att" / f"{image.number}.npz", {"feat": features})
            write_one(folder / "cocobu_fc" / f"{image.number}.npy", features.mean(axis=0, dtype=np.float32))
            if image.regions.boxes is not None:
                write_one(folder / "cocobu_box" / f"{image.number}.npy", floats(image.regions.boxes))
            if image.regions.size is not None:
                height, width = image.regions.size
                row: dict[str, Any] = {"id": image.number, "cocoid": image.number, "height": height, "width": width}
                row |= {"split": image.split} if image.split else {}
                information.write(('{"images": [\n' if not sizes else ",\n") + json.dumps(row))
                sizes += 1

        yield put
        information.write("\n]}\n" if sizes else '{"images": []}\n')


# ---------------------------------------------------------------------------------------------------------------------- row


def _fits_selfcritical(files: Sequence[Path]) -> bool:
    return any(
        (file.suffix in (".lmdb", ".h5", ".pth") and file.stem.endswith("_att"))
        or (file.suffix == ".npz" and file.parent.name.endswith("_att"))
        for file in files
    )


ROWS: Final[dict[str, Layout]] = {
    "selfcritical": Layout(
        means="ImageCaptioning.pytorch (self-critical, AoANet)",
        files=("cocobu_att/*.npz", "cocobu_fc/*.npy", "cocobu_box/*.npy", "cocotalk.json"),
        holds=("boxes", "sizes"),
        needs=(NUMBERS,),
        takes=(SPLITS,),
        parts={"train2014": "train", "val2014": "val", "test2014": "test", "test2015": "test"},
        fits=_fits_selfcritical,
        sources=_selfcritical_sources,
        read=_read_selfcritical,
        write=_write_selfcritical,
    ),
}
