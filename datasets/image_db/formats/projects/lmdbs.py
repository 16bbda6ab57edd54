"""Layouts of pickles in an LMDB: MMF, ViLBERT-multi-task, VOLTA.

What a reader would get wrong: every value is a pickle, which is never executed (`plain_pickle`); the record `keys` is one too. VOLTA has
two kinds: arrays under the names of VL-T5's HDF5, and texts, where even numbers are words and arrays are base64.

Source: facts/formats.md, with its corrections 4, 9 and 10.
"""

import base64
import binascii
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import lmdb
import numpy as np
from numpy.typing import NDArray

from uniter.datasets.errors import BadInput
from uniter.datasets.image_db.formats.projects.folders import mmf_info, mmf_record, one_number
from uniter.datasets.image_db.formats.projects.layout import (
    NUMBERS,
    PIXELS,
    SPLITS,
    Known,
    Layout,
    Put,
    Record,
    floats,
    number_at_end,
    record,
)
from uniter.datasets.image_db.formats.records import Item, best_classes
from uniter.datasets.image_db.regions import RegionFeatures
from uniter.datasets.storage.lmdb_files import checked_key, open_reader, put_all
from uniter.datasets.storage.plain_pickle import plain_pickle, to_plain_pickle

_KEYS: Final = b"keys"


def _sources(path: Path) -> list[Path]:
    """The folders of the LMDBs at a path."""
    if path.is_file():
        return [path.parent]
    if (path / "data.mdb").is_file():
        return [path]
    # Of VOLTA's two kinds the one with soft labels comes first: an image is taken from the first that has it.
    return sorted((data.parent for data in path.rglob("data.mdb")), key=lambda folder: (not folder.name.endswith("_feat.lmdb"), folder))


def _reader(of: Callable[[str, dict[str, Any]], tuple[str, RegionFeatures]]) -> Callable[[Path, str, Known], Iterator[Item]]:
    def read(path: Path, name: str, known: Known) -> Iterator[Item]:
        environment = open_reader(path)
        try:
            with environment.begin(buffers=True) as transaction:
                listed = transaction.get(_KEYS)
                if listed is not None:
                    plain_pickle(listed, f"{path}: the record keys")
                for key, value in transaction.cursor():
                    if bytes(key) != _KEYS:
                        yield _item(path, bytes(key).decode("utf-8", "replace"), value, of)
        except lmdb.Error as error:
            raise BadInput(f"{path} is damaged ({error})") from None

    return read


def _item(path: Path, key: str, value: memoryview, of: Callable[[str, dict[str, Any]], tuple[str, RegionFeatures]]) -> Item:
    try:
        found = plain_pickle(value, "its record")
        if not isinstance(found, dict):
            raise BadInput(f"its record is a {type(found).__name__}, expected a map")
        return of(key, found)
    except BadInput as error:
        return key, BadInput(f"image {key!r} in {path}: {error}")


def _array(found: Mapping[str, Any], name: str, spelling: str, rows: int | None = None) -> NDArray[Any]:
    """An array of a record, stored as such or as base64; `rows` gives those of base64 their shape."""
    value = found.get(name)
    if isinstance(value, str | bytes):
        try:
            flat = np.frombuffer(base64.b64decode(value, validate=True), dtype=spelling)
        except (binascii.Error, ValueError):
            raise BadInput(f"{name} is no base64 of {spelling} numbers") from None
        if rows is None:
            return flat
        if not rows or len(flat) % rows:
            raise BadInput(f"{name} has {len(flat)} numbers for {rows} boxes")
        return flat.reshape(rows, -1)
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiu":
        raise BadInput(f"its record has no array {name} (but {', '.join(map(str, list(found)[:12]))})")
    return value


def _whole(found: Mapping[str, Any], name: str) -> int:
    value = found.get(name)
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 12:
        return int(value)
    if value is None or isinstance(value, str | bytes | list | tuple | dict):
        raise BadInput(f"{name} is no number")
    return one_number(found, name)


class _Lmdb:
    """An LMDB that is written in bundles; a context, at whose end it has its list of keys."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._environment = lmdb.open(str(folder), map_size=1 << 26, lock=False, max_spare_txns=0)
        self._bundle: list[tuple[bytes, bytes]] = []
        self._bytes = 0
        self._keys: list[bytes] = []

    def put(self, key: str, value: Mapping[str, Any]) -> None:
        raw = checked_key(key)
        if raw == _KEYS:
            raise BadInput("its key is 'keys', under which this layout keeps its list")
        self._bundle.append((raw, to_plain_pickle(dict(value))))
        self._keys.append(raw)
        self._bytes += len(self._bundle[-1][1])
        if self._bytes > 1 << 24:
            self._flush()

    def _flush(self) -> None:
        put_all(self._environment, self._bundle)
        self._bundle, self._bytes = [], 0

    def __enter__(self) -> "_Lmdb":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self._bundle.append((_KEYS, to_plain_pickle(self._keys)))
                self._flush()
        finally:
            self._environment.close()


@contextlib.contextmanager
def _write(folder: Path, known: Known, *, place: Callable[[Record], tuple[str, str, dict[str, Any]]]) -> Iterator[Put]:
    """Write LMDBs; `place` says in which folder an image stands, under which key, and its record."""
    files: dict[str, _Lmdb] = {}
    with contextlib.ExitStack() as stack:

        def put(image: Record) -> None:
            name, key, value = place(image)
            if name not in files:
                files[name] = stack.enter_context(_Lmdb(folder / name))
            files[name].put(key, value)

        yield put


# ----------------------------------------------------------------------------------------------------------------------- MMF


def _of_mmf(key: str, found: dict[str, Any]) -> tuple[str, RegionFeatures]:
    return key, mmf_record(key, _array(found, "features", "<f4"), found)


def _to_mmf(image: Record) -> tuple[str, str, dict[str, Any]]:
    value = {"feature_path": image.key, "features": floats(image.regions.features), **mmf_info(image.regions)}
    return "numbers.lmdb" if image.key.isdigit() else "names.lmdb", image.key, value


# ------------------------------------------------------------------------------------------------------------------- ViLBERT


def _of_vilbert(key: str, found: dict[str, Any]) -> tuple[str, RegionFeatures]:
    count = _whole(found, "num_boxes")
    boxes, features = _array(found, "boxes", "<f4", count), _array(found, "features", "<f4", count)
    return key, record(key, features, boxes=boxes, size=(_whole(found, "image_h"), _whole(found, "image_w")))


def _to_vilbert(image: Record) -> tuple[str, str, dict[str, Any]]:
    regions = image.regions
    assert regions.boxes is not None and regions.size is not None
    value = {"image_id": image.key, "image_h": regions.size[0], "image_w": regions.size[1], "num_boxes": len(regions)}
    return "features.lmdb", image.key, {**value, "boxes": floats(regions.boxes), "features": floats(regions.features)}


# --------------------------------------------------------------------------------------------------------------------- VOLTA


def _of_volta(key: str, found: dict[str, Any]) -> tuple[str, RegionFeatures]:
    key = str(found["img_id"]) if isinstance(found.get("img_id"), str | int) else key
    count = _whole(found, "num_boxes") if "num_boxes" in found else None
    features, boxes = _array(found, "features", "<f4", count), _array(found, "boxes", "<f4", count)
    soft_labels = _array(found, "cls_prob", "<f4", count) if found.get("cls_prob") is not None else None
    pairs: dict[str, Any] = {}
    for kind, name in (("objects", "obj"), ("attributes", "attr"), ("objects", "objects"), ("attributes", "attrs")):
        if f"{name}_id" in found:
            conf = _array(found, f"{name}_conf", "<f4") if f"{name}_conf" in found else None
            pairs[kind] = _array(found, f"{name}_id", "<i8"), conf
    if soft_labels is not None:
        pairs.pop("objects", None)
    regions = record(key, features, boxes=boxes, size=(_whole(found, "img_h"), _whole(found, "img_w")), soft_labels=soft_labels, **pairs)
    if found.get("attrs") is not None:
        regions = replace(regions, attributes=_array(found, "attrs", "<f4", count), attribute_ids=None, attribute_conf=None)
        regions.check_shapes(key)
    return key, regions


def _to_volta(image: Record) -> tuple[str, str, dict[str, Any]]:
    """Texts for COCO's parts where the soft labels are known, which only they have room for; arrays else."""
    regions, classes = image.regions, best_classes(image.regions)
    assert regions.boxes is not None and regions.size is not None
    height, width = regions.size
    if not image.split or regions.soft_labels is None:
        value = {"features": floats(regions.features), "boxes": floats(regions.boxes), "img_h": np.int64(height), "img_w": np.int64(width)}
        value |= {name.replace("objects_", "obj_").replace("attrs_", "attr_"): array for name, array in classes.items()}
        return "raw.lmdb", image.key, {**value, "img_id": image.key}
    texts: dict[str, Any] = {"img_id": image.key, "img_h": str(height), "img_w": str(width), "num_boxes": str(len(regions))}
    arrays = {**classes, "boxes": floats(regions.boxes), "features": floats(regions.features), "cls_prob": floats(regions.soft_labels)}
    arrays["classes"] = arrays["cls_prob"]
    if regions.attributes is not None:
        arrays["attrs"] = floats(regions.attributes)
    texts |= {name: base64.b64encode(array.tobytes()).decode() for name, array in arrays.items()}
    return f"{image.split}_feat.lmdb", str(number_at_end(image.key, "VOLTA")), texts


# ---------------------------------------------------------------------------------------------------------------------- rows


def _holds(*names: str) -> Callable[[Sequence[Path]], bool]:
    """Whether the first record of the first LMDB among some files is a map of these names."""

    def look(files: Sequence[Path]) -> bool:
        for file in files:
            if file.name == "data.mdb":
                with contextlib.suppress(BadInput, lmdb.Error), open_reader(file.parent).begin(buffers=True) as transaction:
                    for key, value in transaction.cursor():
                        if bytes(key) != _KEYS and bytes(value[:1]) in (b"\x80", b"(", b"}"):
                            return all(name.encode() in bytes(value) for name in names)
                return False
        return False

    return look


ROWS: Final[dict[str, Layout]] = {
    "mmf_lmdb": Layout(
        means="MMF, LMDB",
        pickled="every record",
        rounds="the background becomes 1 - the rest",
        files=("names.lmdb/*", "numbers.lmdb/*"),
        holds=("boxes", "sizes", "classes", "soft labels"),
        needs=(PIXELS,),
        fits=_holds("feature_path", "features"),
        sources=_sources,
        read=_reader(_of_mmf),
        write=partial(_write, place=_to_mmf),
    ),
    "vilbert_lmdb": Layout(
        means="ViLBERT-multi-task (12-in-1)",
        pickled="every record",
        files=("features.lmdb/*",),
        holds=("boxes", "sizes"),
        needs=(NUMBERS, PIXELS),
        fits=_holds("features", "image_h", "image_w", "boxes"),
        sources=_sources,
        read=_reader(_of_vilbert),
        write=partial(_write, place=_to_vilbert),
    ),
    "volta_lmdb": Layout(
        means="VOLTA, LMDB",
        pickled="every record",
        files=("raw.lmdb/*", "*_feat.lmdb/*"),
        holds=("boxes", "sizes", "classes", "attributes", "soft labels"),
        needs=(PIXELS,),
        takes=(SPLITS,),
        parts={"train2014": "trainval", "val2014": "trainval", "test2015": "test", "test2014": "test"},
        fits=_holds("features", "img_h", "img_w", "boxes"),
        sources=_sources,
        read=_reader(_of_volta),
        write=partial(_write, place=_to_volta),
    ),
}
