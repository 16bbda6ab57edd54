"""How long the photographs were that a database was made from, so that one that was replaced is not passed over.

    OUT/photographs.safetensors    key digests and bytes of the images that have regions; older databases lack it

Names and sizes are compared, nothing is read: a photograph whose size is the same is taken to be the same.
"""

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from uniter.datasets.errors import SettingsDiffer
from uniter.datasets.image_db.writing.units import PHOTOGRAPHS, UnitStore
from uniter.datasets.storage.index_file import map_arrays, save_arrays
from uniter.extract.images.items import ImageItem, ImageList, digests_of

UNKNOWN = -1


def note_photographs(store: UnitStore, images: ImageList) -> None:
    """Write the sizes of those images that have regions; those that an earlier run noted stay."""
    digests, sizes = _noted(store.path)
    done = np.sort(digests_of([key for _, key, has_regions in store.keys() if has_regions]))  # noqa: SIM118  # a store is no mapping
    found, lengths = [digests], [sizes]
    for number in range(images.units):
        items = images.unit(number)
        now = digests_of([item.key for item in items])
        wanted = _places(now, done)[1] & ~_places(now, digests)[1]
        found.append(now[wanted])
        lengths.append(np.array([_bytes_of(items[row]) for row in np.flatnonzero(wanted)], dtype=np.int64))
    together, all_lengths = np.concatenate(found), np.concatenate(lengths)
    order = np.argsort(together, kind="stable")
    save_arrays(store.path / PHOTOGRAPHS, {"digests": together[order], "bytes": all_lengths[order]})


def refuse_replaced(path: Path, listed: ImageList) -> None:
    """SettingsDiffer where photographs have another size than when their regions were extracted."""
    digests, sizes = _noted(path)
    if not len(digests):
        return
    replaced: list[str] = []
    for number in range(listed.units):
        items = listed.unit(number)
        places, noted = _places(digests_of([item.key for item in items]), digests)
        for item, found, size in zip(items, noted.tolist(), sizes[places].tolist(), strict=True):
            length = _bytes_of(item) if found and size != UNKNOWN else UNKNOWN
            if length not in (UNKNOWN, size):
                replaced.append(f"{item.path} was {size:,} bytes long, now {length:,}")
    if replaced:
        count = f"{len(replaced):,} photographs have" if len(replaced) > 1 else "a photograph has"
        raise SettingsDiffer(
            f"{count} changed since {path} was made of them ({'; '.join(replaced[:3])}): extract them under other names or into another "
            "OUT, or --overwrite to do all again"
        )


def _noted(path: Path) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    if not (path / PHOTOGRAPHS).is_file():
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    columns = map_arrays(path / PHOTOGRAPHS, needed=("digests", "bytes"))
    return np.array(columns["digests"], dtype=np.uint64), np.array(columns["bytes"], dtype=np.int64)


def _places(some: NDArray[np.uint64], ordered: NDArray[np.uint64]) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """Where each of some digests stands among sorted ones, and whether it does; without a look at all of them for each unit."""
    if not len(ordered):
        return np.zeros(len(some), np.intp), np.zeros(len(some), np.bool_)
    places = np.minimum(np.searchsorted(ordered, some), len(ordered) - 1)
    return places, ordered[places] == some


def _bytes_of(item: ImageItem) -> int:
    if item.size >= 0:
        return item.size
    try:
        return os.stat(item.file).st_size  # noqa: PTH116  # a million times
    except OSError:
        return UNKNOWN
