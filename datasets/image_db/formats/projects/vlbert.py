"""The layout of VL-BERT: one JSON an image in a zip that is not compressed, arrays in base64.

What a reader would get wrong: its VQA finds `<name of the zip>/<image id>.json` and no soft labels; its Conceptual Captions
`<eight digits>.json` with the soft labels under `classes`, and the images in a file of one JSON a line beside the zip.

Source: facts/formats.md, with its correction 13.
"""

import base64
import binascii
import contextlib
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import orjson
from numpy.typing import NDArray

from uniter.datasets.errors import BadInput
from uniter.datasets.image_db.formats.projects.layout import (
    CAPTIONS,
    PIXELS,
    SPLITS,
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
from uniter.datasets.image_db.regions import RegionFeatures

_MOST_BYTES: Final = 1 << 28
_FAULTS: Final = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError, OSError)


def _read(path: Path, name: str, known: Known) -> Iterator[Item]:
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if member.filename.endswith(".json"):
                    yield _item(path, archive, member)
    except _FAULTS as error:
        raise BadInput(f"{path} cannot be read as a zip ({error or type(error).__name__}); was it cut off?") from None


def _item(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Item:
    key = Path(member.filename).stem
    try:
        with archive.open(member) as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise BadInput(f"it has more than {_MOST_BYTES:,} bytes")
        found = orjson.loads(content)
        if not isinstance(found, dict):
            raise BadInput("it is no JSON object")
    except (BadInput, orjson.JSONDecodeError, *_FAULTS) as error:
        return key, BadInput(f"image {key!r} in {path}: {error}")
    if isinstance(found.get("image_id"), int | str) and str(found["image_id"]):
        key = str(found["image_id"])
    return attempt(key, path, lambda: _record(key, found))


def _record(key: str, found: dict[str, Any]) -> RegionFeatures:
    count, height, width = (found.get(name) for name in ("num_boxes", "image_h", "image_w"))
    if type(count) is not int or not 0 < count <= 10_000 or type(height) is not int or type(width) is not int:
        raise BadInput(f"num_boxes, image_h and image_w are {count!r}, {height!r} and {width!r}, expected numbers")
    labels = _array(found, "classes", count) if found.get("classes") is not None else None
    boxes, features = _array(found, "boxes", count), _array(found, "features", count)
    return record(key, features, boxes=boxes, size=(height, width), soft_labels=labels)


def _array(found: dict[str, Any], name: str, rows: int) -> NDArray[np.float32]:
    try:
        flat = np.frombuffer(base64.b64decode(found[name], validate=True), dtype="<f4")
    except (KeyError, binascii.Error, ValueError, TypeError):
        raise BadInput(f"{name} is no base64 of float32 numbers") from None
    if len(flat) % rows:
        raise BadInput(f"{name} has {len(flat)} numbers for {rows} boxes")
    return flat.reshape(rows, -1)


# ------------------------------------------------------------------------------------------------------------------- writing


def _text(array: NDArray[Any]) -> str:
    return base64.b64encode(floats(array).tobytes()).decode()


def _coco(split: str) -> str | None:
    """The zip of a part of COCO, as the configurations for VQA call it; None for other data."""
    part = {"train2014": "trainval", "val2014": "trainval", "trainval": "trainval", "test2014": "test2015", "test2015": "test2015"}.get(
        split
    )
    return None if part is None else f"{part}_resnet101_faster_rcnn_genome_36"


@contextlib.contextmanager
def _write(folder: Path, known: Known) -> Iterator[Put]:
    zips: dict[str, zipfile.ZipFile] = {}
    lists: dict[str, BinaryIO] = {}
    with contextlib.ExitStack() as stack:

        def put(image: Record) -> None:
            regions, coco = image.regions, _coco(image.split)
            assert regions.boxes is not None and regions.size is not None
            name = coco or f"{image.split}_frcnn"
            if "/" in name or "\0" in name + image.key or (coco and "/" in image.key) or not _encodes(image.key):
                raise BadInput("its key or split can be no file's name")
            if name not in zips:
                zips[name] = stack.enter_context(zipfile.ZipFile(folder / f"{name}.zip", "w"))
            row = len(zips[name].filelist)
            member = f"{name}/{image.key}.json" if coco else f"{row:08d}.json"
            told: dict[str, Any] = {"image_id": int(image.key) if _plain_number(image.key) else image.key}
            told |= {"image_w": regions.size[1], "image_h": regions.size[0], "num_boxes": len(regions)}
            told |= {"boxes": _text(regions.boxes), "features": _text(regions.features)}
            if not coco and regions.soft_labels is not None:
                told["classes"] = _text(regions.soft_labels)
            zips[name].writestr(zipfile.ZipInfo(member, date_time=(1980, 1, 1, 0, 0, 0)), orjson.dumps(told))
            if not coco and known.captions is not None:
                if name not in lists:
                    lists[name] = stack.enter_context(open(folder / f"{name}.json", "wb"))
                lists[name].write(_lines(image, name, member))

        yield put


def _encodes(key: str) -> bool:
    return key == key.encode(errors="replace").decode()


def _plain_number(key: str) -> bool:
    return key.isascii() and key.isdigit() and len(key) <= 18 and str(int(key)) == key


def _lines(image: Record, name: str, member: str) -> bytes:
    rows = [
        {"image": f"{image.split}_image.zip@/{member.removesuffix('.json')}.jpg", "caption": text.split(), "frcnn": f"{name}.zip@/{member}"}
        for text in image.captions
    ]
    return b"".join(orjson.dumps(row) + b"\n" for row in rows)


def _fits(files: Sequence[Path]) -> bool:
    for file in files:
        if file.suffix == ".zip":
            with contextlib.suppress(*_FAULTS), zipfile.ZipFile(file) as archive:
                return any(member.filename.endswith(".json") for member in archive.infolist()[:8])
    return False


ROWS: Final[dict[str, Layout]] = {
    "vlbert_zip": Layout(
        means="VL-BERT",
        files=("*_resnet101_faster_rcnn_genome_36.zip", "*_frcnn.zip", "*_frcnn.json"),
        holds=("boxes", "sizes", "classes", "soft labels"),
        rounds="soft labels only in parts other than COCO's",
        needs=(SPLITS, PIXELS),
        takes=(CAPTIONS,),
        fits=_fits,
        sources=files_below("*.zip"),
        read=_read,
        write=_write,
    ),
}
