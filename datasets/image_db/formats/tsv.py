"""The two TSV files of Bottom-Up-Attention: Caffe's (6 columns) and LXMERT's (10 columns), arrays in base64.

What a reader would get wrong: Caffe's rows say width before height, LXMERT's height before width.

Source: facts/butd.md section 8.
"""

import base64
import binascii
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from uniter.datasets.errors import BadInput
from uniter.datasets.image_db.formats.records import MAX_REGIONS, Item, Skip, best_classes, from_pixels, refuse
from uniter.datasets.image_db.regions import RegionFeatures
from uniter.datasets.storage.files import written_aside

CAFFE_COLUMNS: Final = ("image_id", "image_w", "image_h", "num_boxes", "boxes", "features")


LXMERT_COLUMNS: Final = (
    "img_id",
    "img_h",
    "img_w",
    "objects_id",
    "objects_conf",
    "attrs_id",
    "attrs_conf",
    "num_boxes",
    "boxes",
    "features",
)


_MAX_LINE_BYTES: Final = 1 << 28


def read_caffe(path: Path) -> Iterator[Item]:
    """Items of Caffe's TSV: image_id, image_w, image_h, num_boxes, boxes (n, 4) pixels, features (n, D), both float32."""
    for key, row in _rows(path, CAFFE_COLUMNS):
        yield key, row if isinstance(row, BadInput) else _item(path, key, row, width="image_w", height="image_h")


def read_lxmert(path: Path) -> Iterator[Item]:
    """Items of LXMERT's TSV: as Caffe's, with best class and attribute (int64, counted from 0) and their probabilities."""
    for key, row in _rows(path, LXMERT_COLUMNS):
        yield key, row if isinstance(row, BadInput) else _item(path, key, row, width="img_w", height="img_h")


def _rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, dict[str, bytes] | BadInput]]:
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(_MAX_LINE_BYTES):
            number += 1
            values = line.rstrip(b"\r\n").split(b"\t")
            if values == [b""]:
                continue
            key = values[0][:600].decode("utf-8", errors="replace")
            if number == 1 and key == columns[0]:
                continue  # some copies carry a header line
            if len(values) != len(columns):
                end = "; the file seems cut off" if not line.endswith(b"\n") else ""
                yield key, BadInput(f"{path}, line {number}, image {key!r}: {len(values)} columns, expected {len(columns)}{end}")
                continue
            yield key, {"line": str(number).encode(), **dict(zip(columns, values, strict=True))}


def _item(path: Path, key: str, row: dict[str, bytes], *, width: str, height: str) -> RegionFeatures | BadInput:
    try:
        count = _integer(row, "num_boxes")
        if not 0 < count <= MAX_REGIONS:
            raise BadInput(f"num_boxes is {count}, expected 1 to {MAX_REGIONS:,}")
        labels: dict[str, Any] = {}
        if "objects_id" in row:
            labels = {
                "object_ids": _array(row, "objects_id", "<i8", count)[:, 0],
                "object_conf": _array(row, "objects_conf", "<f4", count)[:, 0],
                "attribute_ids": _array(row, "attrs_id", "<i8", count)[:, 0],
                "attribute_conf": _array(row, "attrs_conf", "<f4", count)[:, 0],
            }
            for name in ("object_ids", "attribute_ids"):
                if not ((labels[name] >= -1) & (labels[name] < 1 << 31)).all():
                    raise BadInput(f"{name} are no class numbers (from {labels[name].min()} to {labels[name].max()})")
        return from_pixels(
            key=key,
            features=_array(row, "features", "<f4", count),
            boxes=_array(row, "boxes", "<f4", count),
            size=(_integer(row, height), _integer(row, width)),
            **labels,
        )
    except BadInput as error:
        return BadInput(f"{path}, line {row['line'].decode()}, image {key!r}: {error}")


def _integer(row: dict[str, bytes], column: str) -> int:
    text = row[column].strip()
    if not text.isdigit() or len(text) > 12:
        raise BadInput(f"{column} is {text[:20].decode(errors='replace')!r}, expected a number")
    return int(text)


def _array(row: dict[str, bytes], column: str, spelling: str, count: int) -> NDArray[Any]:
    try:
        data = base64.b64decode(row[column], validate=True)
    except (binascii.Error, ValueError):
        raise BadInput(f"{column} is no base64; was the file cut off?") from None
    dtype = np.dtype(spelling)
    if not data or len(data) % (count * dtype.itemsize):
        raise BadInput(f"{column} has {len(data):,} bytes, which is no whole number of {dtype.name} columns for {count} boxes")
    return np.frombuffer(data, dtype=dtype).reshape(count, -1)


def write_caffe(path: Path, items: Iterable[tuple[str, RegionFeatures]], *, skip: Skip = refuse) -> None:
    """Write Caffe's TSV; `items` must know `size` and `boxes`."""
    _write(path, items, CAFFE_COLUMNS, skip)


def write_lxmert(path: Path, items: Iterable[tuple[str, RegionFeatures]], *, skip: Skip = refuse) -> None:
    """Write LXMERT's TSV; class ids are -1 where no class is known."""
    _write(path, items, LXMERT_COLUMNS, skip)


def _write(path: Path, items: Iterable[tuple[str, RegionFeatures]], columns: tuple[str, ...], skip: Skip) -> None:
    with written_aside(path, large=True) as temporary, open(temporary, "wb") as file:
        for key, regions in items:
            if any(character in key for character in "\t\r\n") or not key or key != key.encode(errors="replace").decode():
                skip(key, regions, BadInput(f"key {key!r} holds a tab or line break, or is no UTF-8, which a TSV cannot hold"))
                continue
            if not 0 < len(regions) <= MAX_REGIONS:
                skip(key, regions, BadInput(f"image {key!r} has {len(regions)} regions; a TSV holds 1 to {MAX_REGIONS:,}"))
                continue
            assert regions.size is not None
            assert regions.boxes is not None
            height, width = regions.size
            values: dict[str, Any] = {
                "image_id": key,
                "img_id": key,
                "image_w": width,
                "img_w": width,
                "image_h": height,
                "img_h": height,
                "num_boxes": len(regions),
                "boxes": np.asarray(regions.boxes, dtype="<f4"),
                "features": np.asarray(regions.features, dtype="<f4"),
            }
            if "objects_id" in columns:
                values.update(best_classes(regions))
            file.write(b"\t".join(_text(values[column]) for column in columns) + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _text(value: Any) -> bytes:
    return base64.b64encode(value.tobytes()) if isinstance(value, np.ndarray) else str(value).encode()
