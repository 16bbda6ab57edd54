"""Layouts of Oscar and VinVL: TSV files with a `.lineidx` beside each, features in base64, classes by name.

What a reader would get wrong: captioning pairs rows of the two files by their number, retrieval by `imageid2idx.json`. Six columns behind
the features are x1/W, y1/H, x2/W, y2/H, w/W, h/H; the size of the image stands only in retrieval's predictions, and is worked out from
pixels and fractions of the same boxes in captioning.

Source: facts/formats.md, with its corrections 6 and 7.
"""

import base64
import binascii
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import orjson
from numpy.typing import NDArray

from uniter.datasets.errors import BadInput
from uniter.datasets.image_db.formats.projects.layout import (
    BOXES,
    CAPTIONS,
    NAMES,
    NUMBERS,
    PIXELS,
    SPLITS,
    Known,
    Layout,
    Put,
    Record,
    attempt,
    confidences,
    floats,
    record,
)
from uniter.datasets.image_db.formats.records import Item, size_from
from uniter.datasets.image_db.regions import RegionFeatures, normalised_boxes
from uniter.datasets.storage.files import read_json, write_json

_MOST_LINE: Final = 1 << 28


# --------------------------------------------------------------------------------------------------------------------- rows of TSV


def _rows(path: Path) -> Iterator[tuple[int, str, list[bytes]]]:
    """(number from 0, key, further columns) of each row."""
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(_MOST_LINE):
            key, *columns = line.rstrip(b"\r\n").split(b"\t")
            if key or columns:
                yield number, key.decode("utf-8", "replace"), columns
            number += 1


def _json(text: bytes, what: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise BadInput(f"{what} is no JSON ({error}); was the file cut off?") from None


def _matrix(text: Any, rows: Any, what: str) -> NDArray[np.float32]:
    if type(rows) is not int or not 0 < rows <= 10_000:
        raise BadInput(f"num_boxes is {rows!r}, expected a number from 1 to 10,000")
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError, TypeError):
        raise BadInput(f"{what} is no base64; was the file cut off?") from None
    if len(data) % (4 * rows):
        raise BadInput(f"{what} has {len(data):,} bytes, which is no whole number of float32 columns for {rows} boxes")
    return np.frombuffer(data, dtype="<f4").reshape(rows, -1)


def _objects(found: Any) -> list[dict[str, Any]]:
    """The objects of a row: {"objects": [...]}, or the bare list."""
    objects = found.get("objects") if isinstance(found, dict) else found
    if not isinstance(objects, list) or not all(isinstance(one, dict) for one in objects):
        raise BadInput("it has no list of objects")
    return objects


def _rects(objects: Sequence[Mapping[str, Any]]) -> NDArray[np.float32]:
    try:
        boxes = np.array([one["rect"] for one in objects], dtype=np.float32)
    except (KeyError, ValueError, TypeError):
        raise BadInput("an object has no rect of four numbers") from None
    return boxes.reshape(len(objects), -1)


def _labelled(key: str, features: NDArray[Any], objects: Sequence[Mapping[str, Any]], known: Known, **more: Any) -> RegionFeatures:
    """The record of features and the objects that were found there."""
    if len(objects) != len(features):
        raise BadInput(f"{len(objects)} labels beside {len(features)} feature rows")
    names = [one.get("class") for one in objects]
    classes = known.numbers_of([str(name) for name in names]) if names and all(names) else None
    try:
        conf = np.array([one.get("conf", 0) for one in objects], dtype=np.float32)
    except (ValueError, TypeError):
        raise BadInput("an object's conf is no number") from None
    if conf.shape != (len(objects),):
        raise BadInput("an object's conf is no number")
    return record(key, features, boxes=_rects(objects), conf=conf, objects=None if classes is None else (classes, conf), **more)


def _parted(matrix: NDArray[np.float32]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Features and the six box columns behind them."""
    if matrix.shape[1] <= 6:
        raise BadInput(f"its features have {matrix.shape[1]} columns, expected six box numbers behind them")
    return matrix[:, :-6], matrix[:, -6:]


def _label_rows(regions: RegionFeatures, known: Known) -> list[dict[str, Any]]:
    assert regions.boxes is not None
    rows = zip(known.names_of(regions), floats(regions.boxes).tolist(), confidences(regions).tolist(), strict=True)
    return [{"class": name, "rect": rect, "conf": conf} for name, rect, conf in rows]


def _with_boxes(regions: RegionFeatures) -> str:
    assert regions.boxes is not None and regions.size is not None
    matrix = np.concatenate([floats(regions.features), normalised_boxes(regions.boxes, regions.size)], axis=1)
    return base64.b64encode(matrix.tobytes()).decode()


class _Tsv:
    """A TSV with its `.lineidx`, the first byte of every row; a context."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = open(path, "wb")  # noqa: SIM115 - closed in __exit__
        self._places: BinaryIO = open(path.with_suffix(".lineidx"), "wb")  # noqa: SIM115
        self.rows = 0

    def put(self, key: str, *columns: str | bytes) -> None:
        self._places.write(f"{self._file.tell()}\n".encode())
        self._file.write(b"\t".join(one.encode() if isinstance(one, str) else one for one in (key, *columns)) + b"\n")
        self.rows += 1

    def __enter__(self) -> "_Tsv":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._places.close()


def _checked(image: Record) -> RegionFeatures:
    """The regions of an image whose key a TSV can hold."""
    if any(character in image.key for character in "\t\r\n") or image.key != image.key.encode(errors="replace").decode():
        raise BadInput("its key holds a tab or line break, or is no UTF-8, which a TSV cannot hold")
    return image.regions


# ---------------------------------------------------------------------------------------------------------------- captioning


def _caption_sources(path: Path) -> list[Path]:
    if path.is_file():
        return [path.with_name(f"{path.name.split('.')[0]}.feature.tsv")]
    return sorted(path.rglob("*.feature.tsv"))


def _read_caption(path: Path, name: str, known: Known) -> Iterator[Item]:
    beside = path.with_name(f"{path.name.removesuffix('.feature.tsv')}.label.tsv")
    labels = _rows(beside) if beside.is_file() else None
    for _, key, columns in _rows(path):
        label = next(labels, (0, "", [b""])) if labels is not None else None
        yield attempt(key, path, lambda key=key, columns=columns, label=label: _of_caption(key, columns, label, known))  # type: ignore[misc]


def _of_caption(key: str, columns: list[bytes], label: tuple[int, str, list[bytes]] | None, known: Known) -> RegionFeatures:
    row = _json(columns[0] if columns else b"", "its row")
    if not isinstance(row, dict):
        raise BadInput("its row is no JSON object with num_boxes and features")
    features, fractions = _parted(_matrix(row.get("features"), row.get("num_boxes"), "features"))
    if label is None:
        return record(key, features, fractions=fractions)
    if label[1] != key:
        raise BadInput(f"the row of the same number in the label file is of {label[1]!r}; the files must have the same order")
    objects = _objects(_json(label[2][0] if label[2] else b"", "its label row"))
    size = size_from(_rects(objects), fractions) if len(objects) == len(features) and _rects(objects).shape[1:] == (4,) else None
    return _labelled(key, features, objects, known, fractions=fractions, size=size)


@contextlib.contextmanager
def _write_caption(folder: Path, known: Known) -> Iterator[Put]:
    files: dict[str, tuple[_Tsv, _Tsv]] = {}
    captions: dict[str, BinaryIO] = {}
    with contextlib.ExitStack() as stack:

        def put(image: Record) -> None:
            regions, split = _checked(image), image.split
            rows = _label_rows(regions, known)
            if split not in files:
                if "/" in split or "\0" in split:
                    raise BadInput(f"--split {split!r} can be no file's name")
                pair = [stack.enter_context(_Tsv(folder / f"{split}.{kind}.tsv")) for kind in ("feature", "label")]
                files[split] = pair[0], pair[1]
                (folder / f"{split}.yaml").write_text(_yaml(split, captions=known.captions is not None))
                if known.captions is not None:
                    captions[split] = stack.enter_context(open(folder / f"{split}_caption.json", "wb"))
                    captions[split].write(b"[")
            feature, label = files[split]
            if known.captions is not None:
                texts = [orjson.dumps({"image_id": image.key, "caption": caption}) for caption in image.captions]
                lead = b"" if captions[split].tell() == 1 or not texts else b",\n"
                captions[split].write(lead + b",\n".join(texts))
            feature.put(image.key, orjson.dumps({"num_boxes": len(regions), "features": _with_boxes(regions)}))
            label.put(image.key, orjson.dumps(rows))

        yield put
        for file in captions.values():
            file.write(b"]\n")


def _yaml(split: str, *, captions: bool) -> str:
    lines = [f"caption: {split}_caption.json"] if captions else []
    return "\n".join([*lines, f"feature: {split}.feature.tsv", f"label: {split}.label.tsv", ""])


# ----------------------------------------------------------------------------------------------------------------- retrieval


def _retrieval_sources(path: Path) -> list[Path]:
    if path.is_file():
        return [path.with_name("features.tsv")]
    return [file.parent / "features.tsv" for file in sorted(path.rglob("features.tsv"))]


def _read_retrieval(path: Path, name: str, known: Known) -> Iterator[Item]:
    for captions in sorted(path.parent.glob("*_captions.pt")):
        from uniter.datasets.storage.tensors import read_torch  # torch takes seconds to import

        read_torch(captions)  # a folder with a hostile file is not taken, whether that one is needed or not
    numbers = read_json(path.with_name("imageid2idx.json")) if path.with_name("imageid2idx.json").is_file() else None
    if numbers is not None and not isinstance(numbers, dict):
        raise BadInput(f"{path.with_name('imageid2idx.json')} holds no map from image id to row")
    predictions = path.with_name("predictions.tsv")
    places: dict[str, int] = {}
    if predictions.is_file():
        with open(predictions, "rb") as file:
            begin = 0
            while line := file.readline(_MOST_LINE):
                places[line.partition(b"\t")[0].decode("utf-8", "replace")] = begin
                begin += len(line)
    with contextlib.ExitStack() as stack:
        file_of_labels = stack.enter_context(open(predictions, "rb")) if places else None
        for row, key, columns in _rows(path):
            if numbers is not None and numbers.get(key) != row:
                yield key, BadInput(f"image {key!r} stands in row {row} of {path}, and imageid2idx.json says row {numbers.get(key)}")
                continue
            line = b""
            if file_of_labels is not None and key in places:
                file_of_labels.seek(places[key])
                line = file_of_labels.readline(_MOST_LINE).rstrip(b"\r\n").partition(b"\t")[2]
            yield attempt(key, path, lambda key=key, columns=columns, line=line: _of_retrieval(key, columns, line, known))  # type: ignore[misc]


def _of_retrieval(key: str, columns: list[bytes], line: bytes, known: Known) -> RegionFeatures:
    if len(columns) != 2 or not columns[0].isdigit() or len(columns[0]) > 6:
        raise BadInput("its row has no number of boxes and features")
    features, fractions = _parted(_matrix(columns[1], int(columns[0]), "features"))
    if not line:
        return record(key, features, fractions=fractions)
    found = _json(line, "its row of predictions.tsv")
    sized = isinstance(found, dict) and all(type(found.get(name)) is int for name in ("image_h", "image_w"))
    return _labelled(key, features, _objects(found), known, fractions=fractions, size=_size(found) if sized else None)


def _size(found: Mapping[str, Any]) -> tuple[int, int]:
    return int(found["image_h"]), int(found["image_w"])


@contextlib.contextmanager
def _write_retrieval(folder: Path, known: Known) -> Iterator[Put]:
    numbers: dict[str, int] = {}
    captions: dict[str, dict[int, list[str]]] = {}
    with _Tsv(folder / "features.tsv") as features, _Tsv(folder / "predictions.tsv") as predictions:

        def put(image: Record) -> None:
            regions = _checked(image)
            assert regions.size is not None
            told = {"image_h": regions.size[0], "image_w": regions.size[1], "objects": _label_rows(regions, known)}
            numbers[image.key] = features.rows
            features.put(image.key, str(len(regions)), _with_boxes(regions))
            predictions.put(image.key, orjson.dumps(told))
            if known.captions is not None:
                captions.setdefault(image.split or "test", {})[image.number] = list(image.captions)

        yield put
    write_json(folder / "imageid2idx.json", numbers)
    for split, texts in captions.items():
        import torch  # it takes seconds to import

        torch.save(texts, folder / f"{split}_captions.pt")


# --------------------------------------------------------------------------------------------------------------------- VinVL


def _prediction_sources(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.rglob("*.tsv"))


def _read_predictions(path: Path, name: str, known: Known) -> Iterator[Item]:
    for _, key, columns in _rows(path):
        yield attempt(key, path, lambda key=key, columns=columns: _of_predictions(key, columns, known))  # type: ignore[misc]


def _of_predictions(key: str, columns: list[bytes], known: Known) -> RegionFeatures:
    found = _json(columns[-1] if columns else b"", "its row")
    objects = _objects(found)
    if not objects or not all("feature" in one for one in objects):
        raise BadInput("its objects have no feature; were they written without TSV_SAVE_SUBSET feature?")
    rows = [_matrix(one["feature"], 1, "feature")[0] for one in objects]
    if len({row.shape for row in rows}) > 1:
        raise BadInput("its features are not equally wide")
    sized = isinstance(found, dict) and all(type(found.get(name)) is int for name in ("image_h", "image_w"))
    return _labelled(key, np.stack(rows), objects, known, size=_size(found) if sized else None)


@contextlib.contextmanager
def _write_predictions(folder: Path, known: Known) -> Iterator[Put]:
    with _Tsv(folder / "predictions.tsv") as file:

        def put(image: Record) -> None:
            regions = _checked(image)
            features = floats(regions.features)
            objects = [
                {
                    "rect": row["rect"],
                    "bbox_id": number,
                    "class": row["class"],
                    "conf": row["conf"],
                    "feature": base64.b64encode(feature.tobytes()).decode(),
                }
                for number, (row, feature) in enumerate(zip(_label_rows(regions, known), features, strict=True))
            ]
            file.put(image.key, orjson.dumps({"objects": objects, "relations": None}))

        yield put


# ---------------------------------------------------------------------------------------------------------------------- rows


def _first_row(files: Sequence[Path], *, columns: int, says: bytes) -> bool:
    """Whether a TSV among some files begins with a row of so many columns, the last of which says something."""
    for file in files:
        if file.suffix == ".tsv":
            with open(file, "rb") as stream:
                line = stream.readline(_MOST_LINE)
            if line.count(b"\t") == columns - 1 and says in line.rpartition(b"\t")[2][:4096]:
                return True
    return False


_PARTS: Final = {"train2014": "train", "val2014": "val", "test2015": "test", "test2014": "test"}

ROWS: Final[dict[str, Layout]] = {
    "oscar_caption": Layout(
        means="Oscar and VinVL, captioning",
        files=("*.yaml", "*.feature.tsv", "*.label.tsv", "*.lineidx", "*_caption.json"),
        holds=("boxes", "sizes", "classes", "confidences"),
        needs=(SPLITS, PIXELS, NAMES),
        takes=(CAPTIONS,),
        parts=_PARTS,
        fits=lambda files: any(file.name.endswith(".feature.tsv") for file in files),
        sources=_caption_sources,
        read=_read_caption,
        write=_write_caption,
    ),
    "oscar_retrieval": Layout(
        means="Oscar and VinVL, retrieval and pre-training",
        pickled="the captions, by torch.save",
        files=("features.tsv", "features.lineidx", "predictions.tsv", "predictions.lineidx", "imageid2idx.json", "*_captions.pt"),
        holds=("boxes", "sizes", "classes", "confidences"),
        needs=(NUMBERS, PIXELS, NAMES),
        takes=(CAPTIONS, SPLITS),
        parts=_PARTS,
        fits=lambda files: any(file.name in ("imageid2idx.json", "features.tsv") or file.name.endswith("_captions.pt") for file in files),
        sources=_retrieval_sources,
        read=_read_retrieval,
        write=_write_retrieval,
    ),
    "vinvl_predictions": Layout(
        means="VinVL and scene_graph_benchmark, predictions",
        files=("predictions.tsv", "predictions.lineidx"),
        holds=("boxes", "classes", "confidences"),
        needs=(BOXES, NAMES),
        fits=lambda files: _first_row(files, columns=2, says=b'"objects"'),
        sources=_prediction_sources,
        read=_read_predictions,
        write=_write_predictions,
    ),
}
