"""The golden set of layouts: the truth behind it, and files of every layout as plain values, read by the libraries themselves."""

import base64
import contextlib
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import lmdb
import numpy as np
import torch
from numpy.typing import NDArray

from uniter.datasets.image_db.regions import RegionFeatures, normalised_boxes
from uniter.datasets.storage.plain_pickle import load_plain_pickle, plain_pickle


@dataclass(frozen=True)
class Image:
    """One image of the truth; `fields` by the names of the golden README, rows of this image only."""

    id: int
    stem: str
    gqa: str
    split: str
    size: tuple[int, int]
    captions: tuple[str, ...]
    fields: dict[str, NDArray[Any]]
    class_names: tuple[str, ...]

    def record(self, *, labels: bool = True) -> RegionFeatures:
        """What a database of ours would hold of it."""
        held = self.fields
        return RegionFeatures(
            features=held["features"],
            norm_bb=normalised_boxes(held["boxes"], self.size),
            conf=held["class_conf"],
            boxes=held["boxes"],
            size=self.size,
            soft_labels=held["soft_labels"] if labels else None,
            attributes=held["attr_probs"] if labels else None,
            object_ids=None if labels else held["class_id"] - 1,
            object_conf=None if labels else held["class_conf"],
            attribute_ids=None if labels else held["attr_id"] - 1,
            attribute_conf=None if labels else held["attr_conf"],
        )


class Truth:
    """`truth/NAME.npz`; images by any name that a layout gives them."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as stored:
            self.class_names = tuple(str(name) for name in stored["class_names"][1:])
            rows = {name: stored[name] for name in stored.files}
        offsets = rows["offsets"]
        per_region = [name for name, array in rows.items() if array.ndim and len(array) == offsets[-1] and name != "offsets"]
        self.images = [
            Image(
                id=int(rows["image_id"][number]),
                stem=Path(str(rows["file_name"][number])).stem,
                gqa=str(rows["gqa_id"][number]),
                split=str(rows["split"][number]),
                size=(int(rows["height"][number]), int(rows["width"][number])),
                captions=tuple(str(text) for text in rows["captions"][number]),
                fields={name: rows[name][offsets[number] : offsets[number + 1]] for name in per_region},
                class_names=self.class_names,
            )
            for number in range(len(offsets) - 1)
        ]
        self._by_name = {name: image for image in self.images for name in (str(image.id), image.stem, f"gqa {image.gqa}")}

    def called(self, key: str, *, gqa: bool = False) -> Image:
        return self._by_name[f"gqa {key}" if gqa else key]


def contents(path: Path) -> Any:
    """A file as dictionaries, lists, arrays and texts."""
    return _LOADERS[path.suffix](path)


def _npz(path: Path) -> Any:
    with np.load(path, allow_pickle=True) as stored:
        return {name: stored[name].item() if stored[name].dtype == object else stored[name] for name in stored.files}


def _npy(path: Path) -> Any:
    array = np.load(path, allow_pickle=True)
    return array.item() if array.dtype == object else array


def _hdf5(path: Path) -> Any:
    found: dict[str, Any] = {}
    with h5py.File(path) as file:
        file.visititems(lambda name, one: found.__setitem__(name, one[()]) if isinstance(one, h5py.Dataset) else None)
        found |= {f"attribute {name}": value for name, value in file.attrs.items()}
    return found


def _lmdb(path: Path) -> Any:
    with contextlib.closing(lmdb.open(str(path.parent), readonly=True, lock=False)) as environment, environment.begin() as records:
        found = {key.decode(): plain_pickle(value, "value") for key, value in records.cursor()}
    found["keys"] = sorted(found["keys"])
    return found


def _tsv(path: Path) -> Any:
    lines = path.read_bytes().splitlines(keepends=True)
    starts = np.cumsum([0, *map(len, lines)])[:-1]
    places = [int(line) for line in path.with_suffix(".lineidx").read_text().split()]
    assert places == list(starts), f"{path}: .lineidx says the first byte of every row"
    return {line.split(b"\t")[0].decode(): [_cell(cell) for cell in line.rstrip(b"\n").split(b"\t")[1:]] for line in lines}


def _cell(cell: bytes) -> Any:
    return json.loads(cell) if cell[:1] in (b"{", b"[") else cell.decode()


def _zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        return {name: json.loads(archive.read(name)) for name in archive.namelist()}


def _lines(path: Path) -> Any:
    return sorted(path.read_text().splitlines())


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError:
        return [json.loads(line) for line in path.read_text().splitlines()]


_LOADERS: dict[str, Any] = {
    ".npz": _npz,
    ".npy": _npy,
    ".h5": _hdf5,
    ".hdf5": _hdf5,
    ".mdb": _lmdb,
    ".tsv": _tsv,
    ".zip": _zip,
    ".json": _json,
    ".pkl": load_plain_pickle,
    ".pt": lambda path: torch.load(path, weights_only=True),
    ".txt": lambda path: path.read_text().splitlines(),
    ".yaml": _lines,
}


def assert_alike(mine: Any, theirs: Any, where: str) -> None:
    """All that theirs holds, mine holds too: the same types, and numbers to 2e-6."""
    if isinstance(theirs, dict):
        assert isinstance(mine, dict), where
        assert set(theirs) <= set(mine), f"{where}: {set(theirs) - set(mine)} is missing"
        for name, value in theirs.items():
            assert_alike(mine[name], value, f"{where} {name}")
    elif isinstance(theirs, list):
        assert len(mine) == len(theirs), where
        for number, (one, other) in enumerate(zip(mine, theirs, strict=True)):
            assert_alike(one, other, f"{where}[{number}]")
    elif isinstance(theirs, np.ndarray | np.generic):
        assert np.asarray(mine).dtype == theirs.dtype, f"{where}: {np.asarray(mine).dtype} instead of {theirs.dtype}"
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=2e-6, err_msg=where)
    elif isinstance(theirs, float):
        assert abs(mine - theirs) <= 2e-6 + 1e-5 * abs(theirs), where
    elif isinstance(theirs, str) and len(theirs) > 64 and isinstance(mine, str) and mine != theirs:
        np.testing.assert_allclose(_numbers(mine), _numbers(theirs), rtol=1e-5, atol=2e-6, err_msg=where)
    else:
        assert mine == theirs, f"{where}: {str(mine)[:80]!r} instead of {str(theirs)[:80]!r}"


def _numbers(text: str) -> NDArray[np.float32]:
    return np.frombuffer(base64.b64decode(text), dtype="<f4")
