"""Layouts of HDF5 files: M2, VL-T5 and VOLTA, BUTD-VQA and BAN, GQA's official files, VisDial.

What a reader would get wrong: M2 gives random features for an image that is not in the file; VL-T5, BAN and VisDial have 36 regions of
every image; GQA pads with zero rows that its JSON does not count; VisDial's script writes `image_ids`, its reader wants `image_id`.

Source: facts/formats.md, with its corrections 3, 8, 14 and 15.
"""

import contextlib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import h5py
import numpy as np
from numpy.typing import NDArray

from uniter.datasets.errors import BadInput
from uniter.datasets.image_db.formats import hdf5
from uniter.datasets.image_db.formats.hdf5 import Growing, numbers_in, opened, put_array
from uniter.datasets.image_db.formats.projects.layout import (
    NUMBERS,
    PIXELS,
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
from uniter.datasets.image_db.formats.records import Item, best_classes
from uniter.datasets.image_db.regions import RegionFeatures
from uniter.datasets.storage.streams import whole_json

_SUFFIXES: Final = (".h5", ".hdf5")
_PATTERNS: Final = ("*.h5", "*.hdf5")


def _first(files: Sequence[Path]) -> Path | None:
    """The first HDF5 among some files; a file that was named itself may be called anything."""
    return next((file for file in files if file.suffix in _SUFFIXES or len(files) == 1), None)


def _names(files: Sequence[Path]) -> list[str]:
    """What the first HDF5 among some files holds, as far as it tells of which layout it is."""
    file = _first(files)
    with contextlib.suppress(BadInput):
        if file is not None:
            with opened(file) as inside:
                return [str(name) for name in itertools.islice(inside, 8)]
    return []


def _kind(files: Sequence[Path]) -> str:
    file = _first(files)
    with contextlib.suppress(BadInput):
        return hdf5.kind_of(file) if file is not None else ""
    return ""


# ------------------------------------------------------------------------------------------------------------------------ M2


def _read_m2(path: Path, name: str, known: Known) -> Iterator[Item]:
    with opened(path) as file:
        for array in file:
            if str(array).endswith("_features"):
                key = str(array).removesuffix("_features")
                yield attempt(key, path, lambda key=key: _of_m2(file, key))  # type: ignore[misc]


def _of_m2(file: Any, key: str) -> RegionFeatures:
    boxes, labels = (numbers_in(file, f"{key}_{of}", 2)[:] if f"{key}_{of}" in file else None for of in ("boxes", "cls_prob"))
    return record(key, numbers_in(file, f"{key}_features", 2)[:], boxes=boxes, soft_labels=labels)


@contextlib.contextmanager
def _write_m2(folder: Path, known: Known) -> Iterator[Put]:
    with h5py.File(folder / "coco_detections.hdf5", "w") as file:

        def put(image: Record) -> None:
            regions = image.regions
            arrays = {"features": regions.features, "boxes": regions.boxes, "cls_prob": regions.soft_labels}
            for name, array in arrays.items():
                if array is not None:
                    put_array(file, f"{image.number}_{name}", floats(array))

        yield put


# ------------------------------------------------------------------------------------------------- VL-T5, VOLTA; BUTD-VQA, BAN


def _read_plainly(path: Path, name: str, known: Known) -> Iterator[Item]:
    return hdf5.read(path)


@contextlib.contextmanager
def _write_vlt5(folder: Path, known: Known) -> Iterator[Put]:
    with contextlib.ExitStack() as stack:
        files: dict[str, Any] = {}

        def put(image: Record) -> None:
            if image.split not in files:
                files[image.split] = stack.enter_context(h5py.File(_named(folder, image.split, "_obj36.h5"), "w"))
            hdf5.put_group(files[image.split], image.key, image.regions)

        yield put


@contextlib.contextmanager
def _write_butd_vqa(folder: Path, known: Known) -> Iterator[Put]:
    files: dict[str, hdf5.RowFile] = {}
    with contextlib.ExitStack() as stack:

        def put(image: Record) -> None:
            if image.split not in files:
                files[image.split] = stack.enter_context(hdf5.RowFile(_named(folder, image.split, "36.hdf5"), fixed=True))
            files[image.split].put(image.key, image.regions)

        yield put
    for split, rows in files.items():
        (folder / f"{split}36_imgid2idx.pkl").write_bytes(rows.pickled_ids())


def _named(folder: Path, split: str, ending: str) -> Path:
    if "/" in split or "\0" in split:
        raise BadInput(f"--split {split!r} can be no file's name")
    return folder / f"{split}{ending}"


# ----------------------------------------------------------------------------------------------------------------------- GQA

_GQA_ROWS: Final = 100
_GQA_IMAGES: Final = 10_000  # a file; the official sixteen have some 9,300


def _read_gqa(path: Path, name: str, known: Known) -> Iterator[Item]:
    beside = path.with_name("gqa_objects_info.json")
    if beside not in known.kept:
        if not beside.is_file():
            raise BadInput(f"{path} holds no image ids: expected {beside.name} beside it")
        information = whole_json(beside)
        if not isinstance(information, dict):
            raise BadInput(f"{beside} holds no map from image id to its place")
        known.kept[beside] = information
    mine = path.stem.rpartition("_")[2]
    with opened(path) as file:
        features, boxes = numbers_in(file, "features", 3), numbers_in(file, "bboxes", 3)
        for key, row in known.kept[beside].items():
            if isinstance(row, dict) and str(row.get("file", 0)) == mine:
                yield attempt(key, path, lambda key=key, row=row: _of_gqa(key, row, features, boxes))  # type: ignore[misc]


def _of_gqa(key: str, row: dict[str, Any], features: Any, boxes: Any) -> RegionFeatures:
    numbers = [row.get(name) for name in ("idx", "objectsNum", "height", "width")]
    if not all(type(value) is int for value in numbers):
        raise BadInput(f"gqa_objects_info.json says {row}, expected the numbers idx, objectsNum, height and width")
    place, count, height, width = (int(value) for value in numbers if value is not None)
    if not (0 <= place < min(len(features), len(boxes)) and 0 <= count <= min(features.shape[1], boxes.shape[1])):
        raise BadInput(f"gqa_objects_info.json says row {place} with {count} objects, the file has shape {features.shape}")
    return record(key, features[place, :count], boxes=boxes[place, :count], size=(height, width))


@contextlib.contextmanager
def _write_gqa(folder: Path, known: Known) -> Iterator[Put]:
    count = 0
    arrays: dict[str, Growing] = {}
    with contextlib.ExitStack() as stack, open(folder / "gqa_objects_info.json", "w") as information:

        def put(image: Record) -> None:
            nonlocal count
            regions, row = image.regions, count % _GQA_IMAGES
            assert regions.boxes is not None and regions.size is not None
            width = regions.features.shape[1]
            if arrays and arrays["features"].tail[1] != width:
                raise BadInput(f"its features are {width} wide, the first image's {arrays['features'].tail[1]}")
            if row == 0:
                stack.pop_all().close()
                file = stack.enter_context(h5py.File(folder / f"gqa_objects_{count // _GQA_IMAGES}.h5", "w"))
                for name, columns in (("features", width), ("bboxes", 4)):
                    arrays[name] = Growing(file, name, (_GQA_ROWS, columns))
                    stack.callback(arrays[name].flush)
            for name, array in (("features", regions.features), ("bboxes", regions.boxes)):
                padded = np.zeros((1, *arrays[name].tail), dtype=np.float32)
                padded[0, : len(regions)] = array
                arrays[name].put(padded)
            told = {"width": regions.size[1], "height": regions.size[0], "objectsNum": len(regions)}
            told |= {"idx": row, "file": count // _GQA_IMAGES}
            information.write(("{" if not count else ",\n") + f"{json.dumps(image.key)}: {json.dumps(told)}")
            count += 1

        yield put
        information.write("}\n")


# ------------------------------------------------------------------------------------------------------------------- VisDial


def _read_visdial(path: Path, name: str, known: Known) -> Iterator[Item]:
    with opened(path) as file:
        features = numbers_in(file, "features", 3)
        ids = numbers_in(file, "image_id" if "image_id" in file else "image_ids", 1)[:]
        if len(ids) != len(features):
            raise BadInput(f"{path} has {len(ids)} image ids for {len(features)} images")
        beside = {of: numbers_in(file, of, 3 if of == "boxes" else 2) for of in ("boxes", "classes", "scores") if of in file}
        for row, key in enumerate(ids):
            yield attempt(str(int(key)), path, lambda row=row, key=key: _of_visdial(str(int(key)), row, features, beside))  # type: ignore[misc]


def _of_visdial(key: str, row: int, features: Any, beside: dict[str, Any]) -> RegionFeatures:
    stored = features[row]
    if not stored.any():
        raise BadInput("its rows are all zero, as the script leaves them where an image could not be read")
    rows = {of: array[row] for of, array in beside.items()}
    objects = None
    if "classes" in rows:  # counted with the background as 0
        objects = rows["classes"].astype(np.int64) - 1, rows.get("scores")
    return record(key, stored, boxes=rows.get("boxes"), objects=objects)


@contextlib.contextmanager
def _write_visdial(folder: Path, known: Known) -> Iterator[Put]:
    files: dict[str, dict[str, Growing]] = {}
    with contextlib.ExitStack() as stack:

        def put(image: Record) -> None:
            regions = image.regions
            arrays: dict[str, NDArray[Any]] = {"image_id": np.array(image.number, np.int64), "features": floats(regions.features)}
            if regions.boxes is not None:
                arrays["boxes"] = floats(regions.boxes)
            if regions.best_objects() is not None:
                best = best_classes(regions)
                arrays |= {"classes": floats(best["objects_id"] + 1), "scores": floats(best["objects_conf"])}
            held = files.get(image.split)
            if held is None:
                path = _named(folder, f"features_faster_rcnn_x101_{image.split}", ".h5")
                file = stack.enter_context(h5py.File(path, "w"))
                file.attrs["split"] = image.split
                held = files[image.split] = {}
                for name, array in arrays.items():
                    held[name] = Growing(file, name, array.shape, dtype=array.dtype.str, rows=1024 if name == "image_id" else 1)
                    stack.callback(held[name].flush)
            if {name: one.tail for name, one in held.items()} != {name: array.shape for name, array in arrays.items()}:
                raise BadInput(f"it holds {', '.join(arrays)} otherwise than the first image")
            for name, array in arrays.items():
                held[name].put(array[None])

        yield put


# ---------------------------------------------------------------------------------------------------------------------- rows


ROWS: Final[dict[str, Layout]] = {
    "m2": Layout(
        means="M2, the meshed-memory transformer",
        files=("coco_detections.hdf5",),
        holds=("boxes", "classes", "soft labels"),
        needs=(NUMBERS,),
        fits=lambda files: any(re.fullmatch(r"\d+_(features|boxes|cls_prob)", name) for name in _names(files)),
        sources=files_below(*_PATTERNS),
        read=_read_m2,
        write=_write_m2,
    ),
    "vlt5_h5": Layout(
        means="VL-T5 and VOLTA, HDF5",
        files=("*_obj36.h5",),
        holds=("boxes", "sizes", "classes", "attributes"),
        needs=(SPLITS, THIRTY_SIX, PIXELS),
        fits=lambda files: _kind(files) == "hdf5-volta",
        sources=files_below(*_PATTERNS),
        read=_read_plainly,
        write=_write_vlt5,
        most=36,
    ),
    "butd_vqa": Layout(
        means="bottom-up-attention-vqa (hengyuan-hu) and BAN",
        pickled="imgid2idx",
        files=("*36.hdf5", "*36_imgid2idx.pkl"),
        holds=("boxes", "sizes"),
        needs=(NUMBERS, SPLITS, THIRTY_SIX, PIXELS),
        fits=lambda files: _kind(files) == "hdf5-36",
        sources=files_below(*_PATTERNS),
        read=_read_plainly,
        write=_write_butd_vqa,
        most=36,
        parts={"train2014": "train", "val2014": "val"},
    ),
    "gqa_h5": Layout(
        means="GQA's official object features",
        files=("gqa_objects_*.h5", "gqa_objects_info.json"),
        holds=("boxes", "sizes"),
        needs=(PIXELS,),
        fits=lambda files: {"features", "bboxes"} <= set(_names(files)),
        sources=files_below("gqa_objects_*.h5"),
        read=_read_gqa,
        write=_write_gqa,
        most=_GQA_ROWS,
    ),
    "visdial_h5": Layout(
        means="VisDial's starter code",
        files=("features_faster_rcnn_x101_*.h5",),
        holds=("boxes", "classes"),
        needs=(NUMBERS, SPLITS, THIRTY_SIX),
        fits=lambda files: "features" in _names(files) and bool({"image_id", "image_ids"} & set(_names(files))),
        sources=files_below(*_PATTERNS),
        read=_read_visdial,
        write=_write_visdial,
        most=36,
        parts={"train2014": "train", "val2014": "val", "test2015": "test", "test2014": "test"},
    ),
}
