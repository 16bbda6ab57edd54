"""Caffe's `.caffemodel` without Caffe: the protobuf wire format, read far enough to find each layer's blobs.

A protobuf message is a list of (field number, wire type, value); nothing in it can execute, and lengths are checked against the file.

Source: the protobuf encoding guide; `caffe.proto` (NetParameter, LayerParameter, V1LayerParameter, BlobProto).
"""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from uniter.datasets.errors import BadInput

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


# Field numbers in NetParameter: layers of the new format and of the one before; in each, where a layer keeps its name and its blobs.
LAYER_FIELDS = {100: (1, 7), 2: (4, 6)}


BLOB_LEGACY_SIZES, BLOB_DATA, BLOB_SHAPE, BLOB_DOUBLE_DATA = (1, 2, 3, 4), 5, 7, 8


def read_caffemodel(path: Path) -> dict[str, list[NDArray[np.float32]]]:
    """The blobs of every layer that has some, by the layer's name.

    Raises:
        BadInput: the file is no Caffe model, or is cut off.
    """
    layers: dict[str, list[NDArray[np.float32]]] = {}
    try:
        content = memoryview(path.read_bytes())
        for number, value in _fields(content):
            if number in LAYER_FIELDS and isinstance(value, memoryview):
                name, blobs = _layer(value, *LAYER_FIELDS[number])
                if blobs:
                    layers[name] = blobs
    except (ValueError, UnicodeDecodeError, OverflowError) as error:
        raise BadInput(f"{path}: no readable Caffe model ({error}); was the download cut off? Fetch it again") from error
    if not layers:
        raise BadInput(f"{path}: a Caffe model without any weights; is it a prototxt's or solver's file?")
    return layers


def _layer(message: memoryview, name_field: int, blob_field: int) -> tuple[str, list[NDArray[np.float32]]]:
    name, blobs = "", []
    for number, value in _fields(message):
        if number == name_field and isinstance(value, memoryview):
            name = bytes(value).decode("utf-8")
        elif number == blob_field and isinstance(value, memoryview):
            blobs.append(_blob(value))
    return name, blobs


def _blob(message: memoryview) -> NDArray[np.float32]:
    parts: list[NDArray[np.float32]] = []
    shape: list[int] | None = None
    legacy = dict.fromkeys(BLOB_LEGACY_SIZES, 0)
    for number, value in _fields(message):
        if number in BLOB_LEGACY_SIZES and isinstance(value, int):
            legacy[number] = value
        elif number == BLOB_SHAPE and isinstance(value, memoryview):
            shape = _dimensions(value)
        elif number in (BLOB_DATA, BLOB_DOUBLE_DATA) and isinstance(value, memoryview):
            kind = "<f4" if number == BLOB_DATA else "<f8"
            parts.append(np.frombuffer(value, dtype=kind).astype(np.float32))
    data = parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else np.zeros(0, dtype=np.float32)
    if shape is None:
        shape = list(legacy.values()) if any(legacy.values()) else [len(data)]
    if math.prod(shape) != len(data):
        raise ValueError(f"a blob of shape {shape} holds {len(data)} values")
    return data.reshape(shape)


def _dimensions(message: memoryview) -> list[int]:
    dimensions: list[int] = []
    for number, value in _fields(message):
        if number != 1:
            continue
        if isinstance(value, int):
            dimensions.append(value)
        else:
            at = 0
            while at < len(value):
                dimension, at = _varint(value, at)
                dimensions.append(dimension)
    return dimensions


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(field number, value) of each field: numbers for varints, bytes for everything else."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        number, kind = tag >> 3, tag & 7
        if number == 0:
            raise ValueError(f"field number 0 before byte {at}")
        if kind == VARINT:
            value, at = _varint(message, at)
            yield number, value
            continue
        if kind == BYTES:
            length, at = _varint(message, at)
        elif kind in (FIXED32, FIXED64):
            length = 4 if kind == FIXED32 else 8
        else:
            raise ValueError(f"wire type {kind} before byte {at}")
        if at + length > len(message):
            raise ValueError(f"a field of {length} bytes at byte {at} of {len(message)}")
        yield number, message[at : at + length]
        at += length


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            raise ValueError("the file ends within a number")
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError(f"a number longer than ten bytes before byte {at}")
