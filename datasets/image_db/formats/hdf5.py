"""HDF5 files of region features: fixed (the same number of boxes an image), adaptive (`pos_boxes`), and VOLTA's groups.

fixed:    image_features (N, K, D), image_bb (N, K, 4) pixels, spatial_features (N, K, 6) fractions
adaptive: image_features (S, D), image_bb (S, 4), spatial_features (S, 6), pos_boxes (N, 2) first and last + 1 row
VOLTA:    one group an image: features, obj_id, obj_conf, attr_id, attr_conf, boxes, img_w, img_h

What a reader would get wrong: the first two hold no image ids; those stand in `*_imgid2idx.pkl` beside the file (read without
executing anything) or, in files that this project wrote, in the dataset `image_ids`.

Source: facts/butd.md section 8.
"""

import contextlib
import functools
import itertools
import pickle
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import h5py
import numpy as np
from numpy.typing import NDArray

from uniter.datasets.errors import BadInput
from uniter.datasets.image_db.formats.records import MAX_REGIONS, MAX_WIDTH, Item, Skip, best_classes, from_pixels, refuse, size_from
from uniter.datasets.image_db.regions import RegionFeatures, normalised_boxes
from uniter.datasets.storage.files import read_json, written_aside
from uniter.datasets.storage.plain_pickle import load_plain_pickle

FAULTS: Final = (OSError, RuntimeError, LookupError, ValueError, TypeError, AttributeError, MemoryError, OverflowError)


_MOST_PACKED: Final = 1100


"""How many times smaller than itself deflate can make an array."""


_CHUNK_ROWS: Final = 64


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A file for reading.

    Raises:
        BadInput: it is no HDF5, or is damaged where it was read.
    """
    try:
        file = h5py.File(path, "r")
    except FAULTS as error:
        raise BadInput(f"{path} cannot be read as HDF5 ({error}); was it cut off?") from None
    with file:
        try:
            yield file
        except FAULTS as error:
            raise BadInput(f"{path} is damaged ({type(error).__name__}: {error})") from None


def kind_of(path: Path) -> str:
    """ "hdf5" (adaptive), "hdf5-36" (fixed) or "hdf5-volta"."""
    with opened(path) as file:
        if "image_features" in file:
            return "hdf5" if "pos_boxes" in file else "hdf5-36"
        first = next(iter(file), None)
        if first is not None and isinstance(file.get(first, getlink=True), h5py.HardLink) and isinstance(file[first], h5py.Group):
            return "hdf5-volta"
    raise BadInput(f"{path} is HDF5 but holds neither image_features nor a group for each image")


def read(path: Path) -> Iterator[Item]:
    """Items of any of the three kinds."""
    kind = kind_of(path)
    items = _read_volta(path) if kind == "hdf5-volta" else _read_rows(path, adaptive=kind == "hdf5")
    try:
        yield from items
    except FAULTS as error:
        raise BadInput(f"{path} is damaged ({type(error).__name__}: {error})") from None


def numbers_in(file: Any, name: str, dimensions: int) -> Any:
    """A plain array of numbers that lies in this very file; BadInput says what it is otherwise."""
    link = file.get(name, getlink=True)
    if link is None:
        raise BadInput(f"{file.file.filename}{file.name} has no {name}")
    if not isinstance(link, h5py.HardLink):
        raise BadInput(f"{file.file.filename}: {name} is a link to another place, which is not followed")
    dataset = file[name]
    if not isinstance(dataset, h5py.Dataset) or dataset.is_virtual or dataset.external:
        raise BadInput(f"{file.file.filename}: {name} is no plain dataset")
    if dataset.dtype.kind not in "fiu" or dataset.dtype.itemsize > 8 or dataset.ndim != dimensions:
        raise BadInput(
            f"{file.file.filename}: {name} has type {dataset.dtype} and shape {dataset.shape}, expected numbers in {dimensions} dimensions"
        )
    check_stored(dataset, f"{file.file.filename}: {name}")
    return dataset


def check_stored(dataset: Any, what: str) -> None:
    """Refuse arrays of which only the size was written: reading them fills the memory."""
    if dataset.nbytes > _MOST_PACKED * max(dataset.id.get_storage_size(), 1):
        raise BadInput(
            f"{what} claims shape {dataset.shape}, {dataset.nbytes:,} bytes, but only {dataset.id.get_storage_size():,} are stored"
        )


def _read_rows(path: Path, *, adaptive: bool) -> Iterator[Item]:
    with h5py.File(path, "r") as file:
        depth = 2 if adaptive else 3
        features = numbers_in(file, "image_features", depth)
        boxes, spatial = numbers_in(file, "image_bb", depth), numbers_in(file, "spatial_features", depth)
        if (
            features.shape[:-1] != boxes.shape[:-1]
            or features.shape[:-1] != spatial.shape[:-1]
            or boxes.shape[-1] != 4
            or spatial.shape[-1] != 6
        ):
            raise BadInput(
                f"{path}: image_features {features.shape}, image_bb {boxes.shape}, spatial_features {spatial.shape} do not fit together"
            )
        if features.shape[-1] > MAX_WIDTH or (not adaptive and features.shape[1] > MAX_REGIONS):
            raise BadInput(f"{path}: image_features has shape {features.shape}, which is larger than any detector's")
        places = numbers_in(file, "pos_boxes", 2)[:].astype(np.int64) if adaptive else None
        if places is not None and places.shape[1] != 2:
            raise BadInput(f"{path}: pos_boxes has shape {places.shape}, expected (images, 2)")
        count = len(features) if places is None else len(places)
        sizes = numbers_in(file, "image_sizes", 2)[:] if "image_sizes" in file else None
        if sizes is not None and sizes.shape != (count, 2):
            raise BadInput(f"{path}: image_sizes has shape {sizes.shape}, expected ({count}, 2)")
        for row, key in sorted(_image_ids(path, file, count).items()):
            if places is None:
                where: Any = row
            else:
                begin, end = places[row]
                if not (0 <= begin <= end <= len(features) and end - begin <= MAX_REGIONS):
                    yield key, BadInput(f"{path}, image {key!r}: pos_boxes says rows {begin} to {end} of {len(features)}")
                    continue
                where = slice(int(begin), int(end))
            size = (int(sizes[row][0]), int(sizes[row][1])) if sizes is not None else None
            try:
                yield key, _from_rows(key, features[where], boxes[where], spatial[where], size)
            except BadInput as error:
                yield key, error


def _from_rows(
    key: str, features: NDArray[Any], boxes: NDArray[Any], spatial: NDArray[Any], size: tuple[int, int] | None
) -> RegionFeatures:
    boxes, spatial = boxes.astype(np.float32), spatial.astype(np.float32)
    regions = RegionFeatures(
        features=features if features.dtype.str in ("<f2", "<f4") else features.astype(np.float32),
        norm_bb=spatial,
        conf=np.zeros(len(features), dtype=np.float32),
        boxes=boxes,
        size=size or size_from(boxes, spatial),
    )
    regions.check_shapes(key)
    return regions


def _image_ids(path: Path, file: Any, count: int) -> dict[int, str]:
    """Row -> key."""
    if "image_ids" in file and isinstance(file.get("image_ids", getlink=True), h5py.HardLink):
        check_stored(file["image_ids"], f"{path}: image_ids")
        ids = file["image_ids"].asstr()[:]
        if len(ids) != count:
            raise BadInput(f"{path}: {len(ids)} image_ids for {count} images")
        return {row: str(key) for row, key in enumerate(ids)}
    beside = path.with_name(f"{path.stem}_imgid2idx.pkl")
    candidates = [beside] if beside.exists() else sorted(path.parent.glob("*_imgid2idx.*"))
    if len(candidates) != 1:
        found = ", ".join(candidate.name for candidate in candidates) or "none"
        raise BadInput(f"{path} holds no image ids: expected {beside.name} beside it, found {found}")
    rows = read_json(candidates[0]) if candidates[0].suffix == ".json" else load_plain_pickle(candidates[0])
    if not isinstance(rows, dict) or not all(
        isinstance(key, int | str) and type(row) is int and 0 <= row < count for key, row in rows.items()
    ):
        raise BadInput(f"{candidates[0]} is no map from image id to a row below {count}")
    if len(set(rows.values())) != len(rows):
        raise BadInput(f"{candidates[0]} gives two image ids the same row")
    return {row: str(key) for key, row in rows.items()}


def _read_volta(path: Path) -> Iterator[Item]:
    with h5py.File(path, "r") as file:
        for key in file:
            try:
                if not isinstance(file.get(key, getlink=True), h5py.HardLink) or not isinstance(file[key], h5py.Group):
                    raise BadInput("is no group of this file")
                yield str(key), _from_group(str(key), file[key])
            except (BadInput, *FAULTS) as error:
                yield str(key), BadInput(f"{path}, image {key!r}: {error}")


def _from_group(key: str, group: Any) -> RegionFeatures:
    features = numbers_in(group, "features", 2)
    if len(features) > MAX_REGIONS or features.shape[1] > MAX_WIDTH:
        raise BadInput(f"features has shape {features.shape}, which is larger than any detector's")

    def column(name: str, spelling: str) -> NDArray[Any] | None:
        return numbers_in(group, name, 1)[:].astype(spelling) if name in group else None

    boxes = numbers_in(group, "boxes", 2)
    if boxes.shape != (len(features), 4):
        raise BadInput(f"boxes has shape {boxes.shape} beside {len(features)} feature rows")
    return from_pixels(
        key=key,
        features=features[:] if features.dtype.str in ("<f2", "<f4") else features[:].astype(np.float32),
        boxes=boxes[:].astype(np.float32),
        size=(_number(group, "img_h"), _number(group, "img_w")),
        object_ids=column("obj_id", "<i8"),
        object_conf=column("obj_conf", "<f4"),
        attribute_ids=column("attr_id", "<i8"),
        attribute_conf=column("attr_conf", "<f4"),
    )


def _number(group: Any, name: str) -> int:
    dataset = group.get(name) if isinstance(group.get(name, getlink=True), h5py.HardLink) else None
    if not isinstance(dataset, h5py.Dataset) or dataset.size != 1 or dataset.dtype.kind not in "fiu":
        raise BadInput(f"{name} is no single number")
    return int(np.asarray(dataset[()]).reshape(()))


# ------------------------------------------------------------------------------------------------------------------- writing


def write_adaptive(path: Path, items: Iterable[tuple[str, RegionFeatures]], *, skip: Skip = refuse) -> None:
    """Write the adaptive kind; `items` must know `size` and `boxes`. Ids go into `image_ids` and into a pickle beside the file."""
    _write_rows(path, items, skip, fixed=False)


def write_fixed(path: Path, items: Iterable[tuple[str, RegionFeatures]], *, skip: Skip = refuse) -> None:
    """Write the fixed kind. Every record must have as many regions as the first.

    Raises:
        BadInput: one has not; that is no fault of the image, so it is not skipped.
    """
    _write_rows(path, items, skip, fixed=True)


def _write_rows(path: Path, items: Iterable[tuple[str, RegionFeatures]], skip: Skip, *, fixed: bool) -> None:
    with written_aside(path, large=True) as temporary:
        with RowFile(temporary, fixed=fixed) as rows:
            for key, regions in items:
                try:
                    rows.put(key, regions)
                except Unequal:
                    raise
                except BadInput as error:
                    skip(key, regions, error)
        path.with_name(f"{path.stem}_imgid2idx.pkl").write_bytes(rows.pickled_ids())


_AT_ONCE: Final = 1 << 22  # bytes


class Growing:
    """An array of a file that is written to bit by bit, along its first axis; `flush` before the file is closed.

    Args:
        tail: the shape of a row.
        rows: of a chunk.
    """

    def __init__(self, file: Any, name: str, tail: tuple[int, ...], *, dtype: str = "<f4", rows: int = 1) -> None:
        self._array = file.create_dataset(name, (0, *tail), maxshape=(None, *tail), dtype=dtype, chunks=(rows, *tail))
        self.tail = tail
        self._waiting: list[NDArray[Any]] = []
        self._bytes = 0

    def put(self, rows: NDArray[Any]) -> None:
        """Add rows, (k, *tail)."""
        self._waiting.append(rows)
        self._bytes += rows.nbytes
        if self._bytes > _AT_ONCE:
            self.flush()

    def flush(self) -> None:
        """Write the rows that wait; also where there are none."""
        if self._waiting:
            together = np.concatenate(self._waiting)
            count = len(self._array)
            self._array.resize(count + len(together), axis=0)
            self._array[count:] = together
            self._waiting, self._bytes = [], 0


def put_array(group: Any, name: str, array: NDArray[Any]) -> None:
    """`group[name] = array`, of numbers, in a fifth of the time: millions of small arrays are written so."""
    kind, properties = _as_stored(array.dtype.str)
    space = h5py.h5s.create_simple(array.shape)
    h5py.h5d.create(group.id, name.encode(), kind, space, properties).write(h5py.h5s.ALL, h5py.h5s.ALL, np.ascontiguousarray(array))


@functools.cache
def _as_stored(spelling: str) -> tuple[Any, Any]:
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_obj_track_times(False)  # the same contents are the same bytes
    return h5py.h5t.py_create(np.dtype(spelling), logical=True), properties


class Unequal(BadInput):
    """An image has another number of regions than the first; no fault of the image."""


class RowFile:
    """A file of the fixed or adaptive kind that is written image by image; a context, at whose end it is whole.

    Attributes:
        rows: key -> row.
    """

    def __init__(self, path: Path, *, fixed: bool) -> None:
        self._file = h5py.File(path, "w")
        self._fixed = fixed
        self._datasets: dict[str, Growing] = {}
        self.rows: dict[str, int] = {}
        self._sizes: list[tuple[int, int]] = []
        self._ends = [0]
        self._per_image = 0

    def put(self, key: str, regions: RegionFeatures) -> None:
        """Add an image that knows `size` and `boxes`.

        Raises:
            Unequal: the kind is fixed and it has another number of regions than the first.
            BadInput: the file cannot hold it.
        """
        assert regions.size is not None
        assert regions.boxes is not None
        arrays = {
            "image_features": np.asarray(regions.features, dtype=np.float32),
            "image_bb": np.asarray(regions.boxes, dtype=np.float32),
            "spatial_features": normalised_boxes(regions.boxes, regions.size),
        }
        if self._fixed and self._datasets and len(regions) != self._per_image:
            raise Unequal(
                f"image {key!r} has {len(regions)} regions but the first has {self._per_image}; use --to hdf5, which holds any number"
            )
        fault = _row_fault(key, arrays, self._datasets, self.rows)
        if fault is not None:
            raise BadInput(f"image {key!r} {fault}")
        if not self._datasets:
            self._per_image = len(regions)
            for name, array in arrays.items():
                tail = array.shape if self._fixed else array.shape[1:]
                self._datasets[name] = Growing(self._file, name, tail, rows=1 if self._fixed else _CHUNK_ROWS)
        for name, array in arrays.items():
            self._datasets[name].put(array[None] if self._fixed else array)
        self.rows[key] = len(self.rows)
        self._sizes.append(regions.size)
        self._ends.append(self._ends[-1] + len(regions))

    def __enter__(self) -> "RowFile":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._finish()
        self._file.close()

    def _finish(self) -> None:
        for one in self._datasets.values():
            one.flush()
        if not self._fixed:
            places = np.array(list(itertools.pairwise(self._ends)), dtype=np.int32 if self._ends[-1] < 1 << 31 else np.int64)
            self._file.create_dataset("pos_boxes", data=places.reshape(-1, 2))
        self._file.create_dataset("image_sizes", data=np.array(self._sizes, dtype=np.int32).reshape(-1, 2))
        self._file.create_dataset("image_ids", data=list(self.rows), dtype=h5py.string_dtype())
        self._file.attrs["image_sizes"] = "height, width"

    def pickled_ids(self) -> bytes:
        """What other people's readers look rows up in; numbers stay numbers there."""
        numbered: dict[int | str, int] = {
            int(key) if key.isascii() and key.isdigit() and len(key) <= 18 and str(int(key)) == key else key: row
            for key, row in self.rows.items()
        }
        return pickle.dumps(numbered, protocol=2)


def _row_fault(key: str, arrays: dict[str, NDArray[Any]], datasets: Mapping[str, Growing], rows: dict[str, int]) -> str | None:
    """Why an image cannot be one of the rows."""
    if not len(arrays["image_features"]):
        return "has no regions"
    if key in rows:
        return "comes twice"
    if "\0" in key or key != key.encode(errors="replace").decode():
        return "has a key with a NUL, or one that is no UTF-8, which HDF5 cannot hold"
    width = arrays["image_features"].shape[1]
    stored = datasets["image_features"].tail[-1] if datasets else width
    return None if width == stored else f"has features {width} wide, the first image's are {stored}"


def write_volta(path: Path, items: Iterable[tuple[str, RegionFeatures]], *, skip: Skip = refuse) -> None:
    """Write VOLTA's groups; class ids are -1 where no class is known."""
    with written_aside(path, large=True) as temporary, h5py.File(temporary, "w") as file:
        for key, regions in items:
            try:
                put_group(file, key, regions)
            except BadInput as error:
                skip(key, regions, error)


def put_group(file: Any, key: str, regions: RegionFeatures) -> None:
    """Add an image that knows `size` and `boxes` to VOLTA's groups; BadInput if they cannot hold it."""
    assert regions.size is not None
    assert regions.boxes is not None
    if "/" in key or "\0" in key or key in ("", ".", "..") or key != key.encode(errors="replace").decode():
        raise BadInput(f"key {key!r} holds '/' or NUL or is no UTF-8, which VOLTA's HDF5 cannot hold")
    if key in file:
        raise BadInput(f"image {key!r} comes twice")
    group = file.create_group(key)
    classes = best_classes(regions)
    height, width = (np.array(extent, dtype=np.int64) for extent in regions.size)
    arrays: dict[str, NDArray[Any]] = {
        "features": np.asarray(regions.features, dtype=np.float32),
        "boxes": np.asarray(regions.boxes, dtype=np.float32),
    }
    arrays |= {"obj_id": classes["objects_id"], "obj_conf": classes["objects_conf"]}
    arrays |= {"attr_id": classes["attrs_id"], "attr_conf": classes["attrs_conf"], "img_h": height, "img_w": width}
    for name, array in arrays.items():
        put_array(group, name, array)
