"""One image's record: `RegionFeatures` to bytes and back, in UNITER's wire layout."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from uniter.datasets.errors import BadInput, UniterError
from uniter.datasets.image_db.regions import RegionFeatures
from uniter.datasets.storage.array_codec import ArrayPlace, find_layout, guess_layout, pack_arrays
from uniter.datasets.storage.npz import unpack_some

DEFAULT_FIELDS: Final = ("features", "norm_bb")


_VECTORS: Final = ("conf", "object_ids", "object_conf", "attribute_ids", "attribute_conf")


_OPTIONAL: Final = ("boxes", "soft_labels", "attributes", "object_ids", "object_conf", "attribute_ids", "attribute_conf")


ALL_FIELDS: Final = ("features", "norm_bb", "conf", "size", *_OPTIONAL)


_DISK_TYPES: Final = {
    "features": "<f2",
    "norm_bb": "<f2",
    "conf": "<f2",
    "soft_labels": "<f2",
    "boxes": "<f4",
    "size": "<i4",
    "attributes": "<f2",
    "object_ids": "<i4",
    "object_conf": "<f4",
    "attribute_ids": "<i4",
    "attribute_conf": "<f4",
}


class MissingImage(UniterError, KeyError):
    """A key that a database does not hold."""

    def __str__(self) -> str:
        return str(self.args[0])


# ------------------------------------------------------------------------------------------------------------------- records


def encode_record(regions: RegionFeatures, *, key: str = "") -> bytes:
    """The value of a region database, types as the contract says; fields that are None are left out.

    Args:
        key: of the image, for messages.

    Raises:
        BadInput: rows or widths that do not fit, or a number that is not finite in its type on disk (float16 ends at 65504).
    """
    regions.check_shapes(key)
    arrays: dict[str, NDArray[Any]] = {}
    for name, spelling in _DISK_TYPES.items():
        value = getattr(regions, name)
        if value is None:
            continue
        with np.errstate(over="ignore"):
            array = np.ascontiguousarray(np.asarray(value), dtype=spelling)
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            was_finite = bool(np.isfinite(np.asarray(value)).all())
            reason = "a number too large for float16" if was_finite else "NaN or infinity"
            raise BadInput(f"image {key!r}: {name} holds {reason}; are these the right weights?")
        arrays[name] = array[:, None] if name == "conf" else array
    return pack_arrays(arrays)


def decode_record(value: bytes | memoryview, *, key: str) -> RegionFeatures:
    """The record behind a value, all fields, arrays as views of `value`. Reads ours and the published ones (npz as well).

    Raises:
        BadInput: the value is damaged or hostile; names `key`.
    """
    try:
        return decode(value, fields=ALL_FIELDS, rows=None)
    except BadInput as error:
        raise BadInput(f"image {key!r}: {error}") from None


@dataclass(frozen=True, slots=True)
class _Plan:
    """How the wanted fields are taken out of records of one layout.

    Attributes:
        count: rows.
        arrays: (name, shape, type, first byte) of the wanted arrays that are there, in the order asked for; vectors without their
            second dimension.
        size_place: first byte of `size`; None where it is not wanted or not there.
    """

    count: int
    arrays: tuple[tuple[str, tuple[int, ...], "np.dtype[Any]", int], ...]
    size_place: tuple["np.dtype[Any]", int] | None


def _plan(places: Mapping[str, ArrayPlace], fields: Sequence[str]) -> _Plan:
    """Check that the arrays of a record fit together."""
    if "norm_bb" not in places or "features" not in places:
        raise BadInput(f"a record holds {', '.join(sorted(places)) or 'nothing'}; expected at least features and norm_bb")
    shape = places["norm_bb"].shape
    if len(shape) != 2 or shape[1] != 6:
        raise BadInput(f"norm_bb has shape {shape}, expected (n, 6): x0, y0, x1, y1, width, height as fractions")
    count = shape[0]
    arrays = []
    for name in dict.fromkeys((*fields, "features")):
        place = places.get(name)
        if place is None or name == "size" or name not in _DISK_TYPES:
            continue
        shape = place.shape
        if name in _VECTORS and len(shape) == 2 and shape[1] == 1:
            shape = shape[:1]
        if len(shape) != (1 if name in _VECTORS else 2) or shape[0] != count or (name == "boxes" and shape[1] != 4):
            raise BadInput(f"{name} has shape {place.shape} beside {count} rows of norm_bb; was the record cut off?")
        if name in fields:
            arrays.append((name, shape, place.dtype, place.offset))
    size = places.get("size") if "size" in fields else None
    if size is not None and size.shape != (2,):
        raise BadInput(f"size has shape {size.shape}, expected (2,): height, width")
    return _Plan(count, tuple(arrays), None if size is None else (size.dtype, size.offset))


def plan_of(value: bytes | memoryview, fields: tuple[str, ...]) -> _Plan:
    """The plan for a msgpack value. Only the headers of the wanted arrays are looked at if a known layout fits them: each lies on
    another page of the file.
    """
    guess = guess_layout(value)
    if guess is not None:
        known: tuple[_Plan, list[tuple[int, int, bytes]]] | None = guess.plans.get(fields)
        if known is not None:
            for begin, end, header in known[1]:
                if bytes(value[begin:end]) != header:  # bytes compare faster than views
                    break
            else:
                return known[0]
    layout = find_layout(value)
    plan = _plan(layout.places, fields)
    wanted = [name for name, *_ in plan.arrays] + (["size"] if plan.size_place is not None else [])
    layout.plans[fields] = plan, [layout.headers[name] for name in wanted]
    return plan


def decode(
    value: bytes | memoryview,
    *,
    fields: tuple[str, ...],
    rows: int | None,
    soft_label_rows: NDArray[Any] | Sequence[int] | None = None,
) -> RegionFeatures:
    """Views of the wanted fields, `norm_bb` and `conf`; `rows` says how many to take (None: all)."""
    fields = (*fields, "norm_bb", "conf")
    if value[:4] == _NPZ_MAGIC:
        places, whole = unpack_some(value, fields)
        plan = _plan(places, fields)
        kept: dict[str, Any] = {name: whole[name].reshape(shape) for name, shape, _, _ in plan.arrays}
        size = whole["size"] if plan.size_place is not None else None
    else:
        plan = plan_of(value, fields)
        kept = {name: np.ndarray(shape, dtype, value, offset) for name, shape, dtype, offset in plan.arrays}
        size = None if plan.size_place is None else np.frombuffer(value, plan.size_place[0], 2, plan.size_place[1])
    if rows is not None and rows < plan.count:
        kept = {name: array[:rows] for name, array in kept.items()}
    if soft_label_rows is not None and "soft_labels" in kept:
        kept["soft_labels"] = kept["soft_labels"][np.asarray(soft_label_rows)]
    if size is not None:
        kept["size"] = (int(size[0]), int(size[1]))
        if min(kept["size"]) < 1:
            raise BadInput(f"size is {kept['size'][1]}x{kept['size'][0]}, expected at least one pixel")
    if "features" not in kept:
        kept["features"] = np.empty((len(kept["norm_bb"]), 0), dtype=np.float16)
    if "conf" not in kept:
        kept["conf"] = np.zeros(len(kept["norm_bb"]), dtype=np.float16)
    return RegionFeatures(**kept)


_NPZ_MAGIC: Final = b"PK\x03\x04"


def is_npz(value: bytes | memoryview) -> bool:
    """Whether a value is a .npz archive, as UNITER's published databases without `_compressed` hold."""
    return value[:4] == _NPZ_MAGIC


def present(record: RegionFeatures, fields: Sequence[str]) -> list[NDArray[Any]]:
    """Those of the named arrays that a record has, in the names' order."""
    return [array for name in fields if (array := getattr(record, name)) is not None]
