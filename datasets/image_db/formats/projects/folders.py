"""Layouts of one file an image: X-modaler, OpenVQA, bottom-up-attention.pytorch, MMF's folders.

What a reader would get wrong: OpenVQA's VQA features are stored (width, n), all others (n, width); its loader takes either in silence. The
`.npz` of bottom-up-attention.pytorch and the `_info.npy` of MMF hold a pickled dict, which is read by `plain_pickle` only.

Source: facts/formats.md, with its corrections 1, 10, 14 and 15.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from uniter.datasets.errors import BadInput
from uniter.datasets.image_db.formats.projects.layout import (
    PIXELS,
    SPLITS,
    Known,
    Layout,
    Put,
    Record,
    attempt,
    file_of,
    files_below,
    fits_one,
    floats,
    number,
    number_at_end,
    record,
)
from uniter.datasets.image_db.formats.records import Item, best_classes
from uniter.datasets.image_db.regions import RegionFeatures
from uniter.datasets.storage.npz import map_npy, plain_npy, unpack_npz, write_npy, write_npz

_MOST_BYTES: Final = 1 << 30


def content_of_file(path: Path) -> bytes:
    """A file of one image; BadInput if it is larger than any of those."""
    if path.stat().st_size > _MOST_BYTES:
        raise BadInput(f"the file has more than {_MOST_BYTES:,} bytes")
    return path.read_bytes()


def _arrays(path: Path, *needed: str, plain: str | None = None) -> dict[str, Any]:
    arrays = unpack_npz(content_of_file(path), scalars=True, plain=plain)
    if missing := [name for name in needed if name not in arrays]:
        raise BadInput(f"it has no {missing[0]} (but {', '.join(arrays)})")
    return arrays


def one_number(arrays: Any, name: str) -> int:
    """A size that is stored as a number, an array without dimensions, or one of one number."""
    value = np.asarray(arrays[name])
    if value.size != 1 or (value.dtype.kind not in "iu" and not (value.dtype.kind == "f" and float(value.reshape(())).is_integer())):
        raise BadInput(f"{name} is no number")
    return int(value.reshape(()))


def _of_each(read_one: Callable[[Path], RegionFeatures]) -> Callable[[Path, str, Known], Iterator[Item]]:
    """A reader of files of one image, which is called as its file, with the folders it lies in."""

    def read(path: Path, name: str, known: Known) -> Iterator[Item]:
        key = name.rpartition(".")[0]
        yield attempt(key, path, lambda: read_one(path))

    return read


def _of_last(read_one: Callable[[Path], RegionFeatures]) -> Callable[[Path, str, Known], Iterator[Item]]:
    """A reader of files of one image, whose folders are no part of its name."""

    def read(path: Path, name: str, known: Known) -> Iterator[Item]:
        yield attempt(path.stem, path, lambda: read_one(path))

    return read


def _names_in(files: Sequence[Path], *, of: str = ".npz") -> dict[str, tuple[int, ...]]:
    """The arrays in the first of some files, with their shapes; of none, nothing."""
    for file in files:
        if file.suffix == of:
            with contextlib.suppress(BadInput, OSError):
                return {name: np.shape(array) for name, array in unpack_npz(content_of_file(file), scalars=True, plain="info").items()}
    return {}


def write_one(path: Path, array: NDArray[Any]) -> None:
    """One .npy file."""
    with open(path, "wb") as file:
        write_npy(file, array)


# ----------------------------------------------------------------------------------------------------------------- X-modaler


def _xmodaler(path: Path) -> RegionFeatures:
    arrays = _arrays(path)
    if len(arrays) == 1:
        return record(path.stem, next(iter(arrays.values())))
    arrays = _arrays(path, "features", "boxes", "image_h", "image_w")
    size = one_number(arrays, "image_h"), one_number(arrays, "image_w")
    return record(path.stem, arrays["features"], boxes=arrays["boxes"], size=size, soft_labels=arrays.get("cls_prob"))


@contextlib.contextmanager
def _write_xmodaler(folder: Path, known: Known) -> Iterator[Put]:
    kind = ""

    def put(image: Record) -> None:
        nonlocal kind
        regions = image.regions
        whole = regions.boxes is not None and regions.size is not None and regions.soft_labels is not None
        kind = kind or ("full" if whole else "single")
        if kind == "single":
            write_npz(file_of(folder / kind, image.key, ".npz"), {"feat": floats(regions.features)})
            return
        if not whole:
            raise BadInput("it has no boxes, size or soft labels, which the first image has")
        assert regions.boxes is not None and regions.size is not None and regions.soft_labels is not None
        height, width = regions.size
        arrays: dict[str, NDArray[Any]] = {
            "features": floats(regions.features),
            "cls_prob": floats(regions.soft_labels),
            "boxes": floats(regions.boxes),
        }
        arrays_of_size = {"image_h": np.array([height], np.int64), "image_w": np.array([width], np.int64)}
        write_npz(file_of(folder / kind, image.key, ".npz"), {**arrays, **arrays_of_size})

    yield put


# ------------------------------------------------------------------------------------------------------------------- OpenVQA


def _openvqa_vqa(path: Path) -> RegionFeatures:
    arrays = _arrays(path, "x", "bbox", "image_h", "image_w")
    if arrays["x"].ndim != 2 or arrays["x"].shape[1] != len(arrays["bbox"]):
        raise BadInput(f"x has shape {arrays['x'].shape} beside {len(arrays['bbox'])} boxes, expected (width, boxes)")
    size = one_number(arrays, "image_h"), one_number(arrays, "image_w")
    return record(path.stem, arrays["x"].T, boxes=arrays["bbox"], size=size)


@contextlib.contextmanager
def _write_openvqa_vqa(folder: Path, known: Known) -> Iterator[Put]:
    def put(image: Record) -> None:
        regions = image.regions
        assert regions.boxes is not None and regions.size is not None
        last = number_at_end(image.key, "OpenVQA")
        if "/" in image.key:
            raise BadInput("its key holds '/', and this layout has a folder for each part only")
        name = image.key if not image.key.isdigit() else f"COCO_{image.split}_{last:012d}"
        arrays: dict[str, NDArray[Any]] = {
            "x": np.ascontiguousarray(floats(regions.features).T),
            "bbox": floats(regions.boxes),
            "num_bbox": number(len(regions)),
        }
        write_npz(file_of(folder / image.split, name, ".npz"), {**arrays, **_sizes(regions, "image_h", "image_w")})

    yield put


def _sizes(regions: RegionFeatures, height: str, width: str) -> dict[str, NDArray[Any]]:
    assert regions.size is not None
    return {height: number(regions.size[0]), width: number(regions.size[1])}


def _openvqa_gqa(path: Path) -> RegionFeatures:
    arrays = _arrays(path, "x", "bbox", "height", "width")
    return record(path.stem, arrays["x"], boxes=arrays["bbox"], size=(one_number(arrays, "height"), one_number(arrays, "width")))


def _without_grids(path: Path) -> list[Path]:
    return [file for file in files_below("*.npz")(path) if file.parent.name != "gqa-grid"]


@contextlib.contextmanager
def _write_openvqa_gqa(folder: Path, known: Known) -> Iterator[Put]:
    def put(image: Record) -> None:
        regions = image.regions
        assert regions.boxes is not None
        if "/" in image.key:
            raise BadInput("its key holds '/', and GQA's images are called by an id")
        arrays = {"x": floats(regions.features), "bbox": floats(regions.boxes), **_sizes(regions, "height", "width")}
        write_npz(file_of(folder / "gqa-frcnn", image.key, ".npz"), arrays)
        # The loader opens a grid for every image, whether it is used or not.
        write_npz(file_of(folder / "gqa-grid", image.key, ".npz"), {"x": np.zeros((49, regions.features.shape[1]), np.float32)})

    yield put


# ------------------------------------------------------------------------------------------------ bottom-up-attention.pytorch


def _milvlg(path: Path) -> RegionFeatures:
    arrays = _arrays(path, "x", plain="info")
    boxes = arrays.get("bbox", arrays.get("boxes"))  # ROSITA's files say boxes
    size = (one_number(arrays, "image_h"), one_number(arrays, "image_w")) if {"image_h", "image_w"} <= arrays.keys() else None
    info = arrays.get("info")
    return record(
        path.stem,
        arrays["x"],
        boxes=boxes,
        size=size,
        objects=_pair(info, "objects_id", "objects_conf"),
        attributes=_pair(info, "attrs_id", "attrs_conf"),
    )


def _pair(info: Any, ids: str, conf: str) -> tuple[NDArray[Any], NDArray[Any] | None] | None:
    if not isinstance(info, dict) or not isinstance(info.get(ids), np.ndarray) or info[ids].dtype.kind not in "iu":
        return None
    return info[ids], info[conf] if isinstance(info.get(conf), np.ndarray) else None


@contextlib.contextmanager
def _write_milvlg(folder: Path, known: Known) -> Iterator[Put]:
    def put(image: Record) -> None:
        regions = image.regions
        assert regions.boxes is not None and regions.size is not None
        height, width = regions.size
        info: dict[str, Any] = {
            "image_id": image.key,
            "image_h": height,
            "image_w": width,
            "num_boxes": len(regions),
            **best_classes(regions),
        }
        arrays: dict[str, NDArray[Any]] = {"x": floats(regions.features), "bbox": floats(regions.boxes), "num_bbox": number(len(regions))}
        arrays |= {**_sizes(regions, "image_h", "image_w"), "info": np.array(info, dtype=object)}
        write_npz(file_of(folder, image.key, ".npz"), arrays)

    yield put


# ---------------------------------------------------------------------------------------------------------------------- MMF


def _mmf_files(path: Path) -> list[Path]:
    return [file for file in files_below("*.npy")(path) if not file.stem.endswith("_info")]


def _mmf_npy(path: Path) -> RegionFeatures:
    beside = path.with_name(f"{path.stem}_info.npy")
    info = plain_npy(content_of_file(beside), beside.name) if beside.is_file() else {}
    if not isinstance(info, dict):
        raise BadInput(f"{beside.name} holds a {type(info).__name__}, expected a map")
    return mmf_record(path.stem, np.asarray(map_npy(path)), info)


def mmf_record(key: str, features: NDArray[Any], info: dict[str, Any]) -> RegionFeatures:
    """MMF's features with what it tells beside them: `cls_prob` without the background, or with it under `--background`."""
    boxes, probabilities = info.get("bbox"), info.get("cls_prob")
    sized = {"image_height", "image_width"} <= info.keys()
    size = (one_number(info, "image_height"), one_number(info, "image_width")) if sized else None
    fractions = None
    if isinstance(boxes, np.ndarray) and boxes.ndim == 2 and boxes.shape[1] == 6:  # VinVL's
        boxes, fractions = None, boxes
    objects = info.get("objects")
    numbers = objects if isinstance(objects, np.ndarray) and objects.dtype.kind in "iu" else None
    soft_labels = None
    if isinstance(probabilities, np.ndarray) and probabilities.ndim == 2 and probabilities.shape[1] and len(probabilities):
        soft_labels = probabilities.astype(np.float32)
        if not _has_background(soft_labels, numbers):
            rest = np.clip(1 - soft_labels.sum(axis=1, keepdims=True), 0, 1)
            soft_labels = np.concatenate([rest, soft_labels], axis=1)
    pair = (numbers, None) if numbers is not None and soft_labels is None else None
    conf = info.get("scores") if isinstance(info.get("scores"), np.ndarray) else None
    return record(key, features, boxes=boxes, size=size, fractions=fractions, soft_labels=soft_labels, objects=pair, conf=conf)


def _has_background(probabilities: NDArray[np.float32], objects: NDArray[Any] | None) -> bool:
    """Whether column 0 is the background: `objects` are the best foreground classes, counted from 0 in either case."""
    if objects is not None and objects.shape == (len(probabilities),) and probabilities.shape[1] > 1:
        if bool((probabilities.argmax(axis=1) == objects).all()):
            return False
        if bool((probabilities[:, 1:].argmax(axis=1) == objects).all()):
            return True
    return int(probabilities.shape[1]) == 1601


def mmf_info(regions: RegionFeatures) -> dict[str, Any]:
    """What MMF's extraction tells of an image; classes and probabilities only where they are known."""
    assert regions.boxes is not None and regions.size is not None
    told: dict[str, Any] = {"bbox": floats(regions.boxes), "num_boxes": len(regions)}
    best = regions.best_objects()
    if best is not None:
        told["objects"] = np.asarray(best[0], dtype=np.int64)
    if regions.soft_labels is not None:
        told["cls_prob"] = floats(regions.soft_labels[:, 1:])
    return told | {"image_width": regions.size[1], "image_height": regions.size[0]}


@contextlib.contextmanager
def _write_mmf_npy(folder: Path, known: Known) -> Iterator[Put]:
    def put(image: Record) -> None:
        if image.key.endswith("_info"):
            raise BadInput("its key ends in _info, as the files beside the features do")
        path = file_of(folder, image.key, ".npy")
        beside = file_of(folder, image.key, "_info.npy")
        write_one(path, floats(image.regions.features))
        write_one(beside, np.array(mmf_info(image.regions), dtype=object))

    yield put


# --------------------------------------------------------------------------------------------------------------------- rows


def _fits_xmodaler(files: Sequence[Path]) -> bool:
    names = _names_in(files)
    return set(names) == {"feat"} or {"features", "boxes", "image_h", "image_w"} <= set(names)


def _fits_openvqa_vqa(files: Sequence[Path]) -> bool:
    return any(
        {"x", "bbox", "image_h", "image_w"} <= set(names) and "info" not in names and names["x"][-1:] == names["bbox"][:1] != names["x"][:1]
        for names in (_names_in([file]) for file in files[:8])
    )


ROWS: Final[dict[str, Layout]] = {
    "xmodaler": Layout(
        means="X-modaler",
        files=("full/*.npz", "single/*.npz"),
        holds=("boxes", "sizes", "classes", "soft labels"),
        needs=(),
        fits=_fits_xmodaler,
        sources=files_below("*.npz"),
        read=_of_last(_xmodaler),
        write=_write_xmodaler,
    ),
    "openvqa_vqa": Layout(
        means="OpenVQA for VQA",
        files=("*/*.npz",),
        holds=("boxes", "sizes"),
        needs=(SPLITS, PIXELS),
        fits=_fits_openvqa_vqa,
        sources=files_below("*.npz"),
        read=_of_last(_openvqa_vqa),
        write=_write_openvqa_vqa,
    ),
    "openvqa_gqa": Layout(
        means="OpenVQA for GQA",
        files=("gqa-frcnn/*.npz", "gqa-grid/*.npz"),
        holds=("boxes", "sizes"),
        needs=(PIXELS,),
        fits=lambda files: {"x", "bbox", "height", "width"} <= set(_names_in([file for file in files if file.parent.name != "gqa-grid"])),
        sources=_without_grids,
        read=_of_last(_openvqa_gqa),
        write=_write_openvqa_gqa,
    ),
    "milvlg": Layout(
        means="bottom-up-attention.pytorch (MILVLG)",
        pickled="`info` in each file",
        files=("*.npz",),
        holds=("boxes", "sizes", "classes", "attributes"),
        needs=(PIXELS,),
        fits=lambda files: {"x"} < set(_names_in(files)) & {"x", "bbox", "boxes"},
        sources=files_below("*.npz"),
        read=_of_each(_milvlg),
        write=_write_milvlg,
    ),
    "mmf_npy": Layout(
        means="MMF, folders",
        pickled="the info files",
        rounds="the background becomes 1 - the rest",
        files=("*.npy", "*_info.npy"),
        holds=("boxes", "sizes", "classes", "soft labels"),
        needs=(PIXELS,),
        fits=lambda files: any(fits_one(file.name, ("*_info.npy",)) for file in files),
        sources=_mmf_files,
        read=_of_each(_mmf_npy),
        write=_write_mmf_npy,
    ),
}
