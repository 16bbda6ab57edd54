"""The layout of SCAN, VSE++, VSE-infinity and SGRAF: one array of features, one file of captions and one of ids for each part.

What a reader would get wrong: caption i is of image i // 5, so there are five captions of every image and no ids are read at all. There is
no room for boxes. `dev` is taken to have 5,000 captions whatever is there.

Source: facts/formats.md, with its correction 14.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from uniter.datasets.errors import BadInput
from uniter.datasets.image_db.formats.projects.layout import (
    CAPTIONS,
    SPLITS,
    THIRTY_SIX,
    Known,
    Layout,
    Put,
    Record,
    attempt,
    files_below,
    floats,
    record,
)
from uniter.datasets.image_db.formats.records import Item
from uniter.datasets.storage.npz import map_npy

_EACH: Final = 5


def _read(path: Path, name: str, known: Known) -> Iterator[Item]:
    features = map_npy(path)
    if features.ndim != 3:
        raise BadInput(f"{path} has shape {features.shape}, expected (images, regions, width)")
    split = path.name.removesuffix("_ims.npy")
    beside = path.with_name(f"{split}_ids.txt")
    ids = (
        beside.read_text(encoding="utf-8", errors="replace").split("\n")
        if beside.is_file()
        else [f"{split}_{row}" for row in range(len(features))]
    )
    ids = [one.strip() for one in ids if one.strip()]
    if len(ids) == _EACH * len(features):
        ids = ids[::_EACH]
    if len(ids) != len(features):
        raise BadInput(f"{beside} has {len(ids)} ids for {len(features)} images")
    for row, key in enumerate(ids):
        yield attempt(key, path, lambda key=key, row=row: record(key, np.array(features[row])))  # type: ignore[misc]


class _Part:
    """The files of a part; a context. How many images there are is written into the head of the array when all are there."""

    def __init__(self, folder: Path, split: str, shape: tuple[int, ...]) -> None:
        if "/" in split or "\0" in split:
            raise BadInput(f"--split {split!r} can be no file's name")
        self.shape = shape
        self._rows = 0
        self._files: list[BinaryIO] = [open(folder / f"{split}_{name}", "wb") for name in ("ims.npy", "caps.txt", "ids.txt")]  # noqa: SIM115
        self._head()
        self._begin = self._files[0].tell()

    def _head(self) -> None:
        header = {"descr": "<f4", "fortran_order": False, "shape": (self._rows, *self.shape)}
        np.lib.format.write_array_header_1_0(self._files[0], header)

    def put(self, image: Record) -> None:
        features, captions, ids = self._files
        features.write(floats(image.regions.features).tobytes())
        captions.write("".join(f"{' '.join(caption.split())}\n" for caption in image.captions[:_EACH]).encode())
        ids.write(f"{image.key}\n".encode())
        self._rows += 1

    def __enter__(self) -> "_Part":
        return self

    def __exit__(self, *_: object) -> None:
        self._files[0].seek(0)
        self._head()
        assert self._files[0].tell() == self._begin, "NumPy leaves room for the number of rows"
        for file in self._files:
            file.close()


@contextlib.contextmanager
def _write(folder: Path, known: Known) -> Iterator[Put]:
    parts: dict[str, _Part] = {}
    with contextlib.ExitStack() as stack:

        def put(image: Record) -> None:
            shape: tuple[Any, ...] = image.regions.features.shape
            if len(image.captions) < _EACH:
                raise BadInput(f"it has {len(image.captions)} captions, and this layout has {_EACH} of every image")
            if "\n" in image.key or image.key != image.key.strip() or image.key != image.key.encode(errors="replace").decode():
                raise BadInput("its key can be no line of a text file")
            if image.split not in parts:
                parts[image.split] = stack.enter_context(_Part(folder, image.split, shape))
            if parts[image.split].shape != shape:
                raise BadInput(f"its features have shape {shape}, the first image's {parts[image.split].shape}")
            if len(image.captions) > _EACH:
                known.say(f"images of whose captions the first {_EACH} were taken")
            parts[image.split].put(image)

        yield put


ROWS: Final[dict[str, Layout]] = {
    "scan": Layout(
        means="SCAN, VSE++, VSE-infinity, SGRAF",
        files=("*_ims.npy", "*_caps.txt", "*_ids.txt"),
        holds=(),
        needs=(SPLITS, THIRTY_SIX, CAPTIONS),
        fits=lambda files: any(file.name.endswith("_ims.npy") for file in files),
        sources=files_below("*_ims.npy"),
        read=_read,
        write=_write,
        most=36,
        parts={"train2014": "train", "val2014": "dev", "val": "dev", "test2015": "test", "test2014": "test", "restval": "train"},
    ),
}
