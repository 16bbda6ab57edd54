"""Whether the photographs are still those that a database was made from, so that one that was replaced is not passed over.

Names and sizes are compared, nothing is read: a photograph whose size is the same is taken to be the same. `uniter-db check --images` reads
them and compares their checksums.
"""

import hashlib
import os
from pathlib import Path

from uniter.datasets.errors import SettingsDiffer
from uniter.datasets.image_db.writing.noted_photographs import UNKNOWN, NotedPhotographs, Photograph
from uniter.extract.images.items import ImageItem, ImageList, digests_of


def photograph_as_read(item: ImageItem, data: bytes) -> Photograph:
    """What is noted of a photograph whose bytes were read."""
    return Photograph(_bytes_of(item) if item.row >= 0 else len(data), hashlib.sha256(data).digest())


def refuse_replaced(path: Path, listed: ImageList) -> None:
    """SettingsDiffer where photographs have another size than when their regions were extracted."""
    noted = NotedPhotographs([path])
    if not len(noted):
        return
    replaced: list[str] = []
    for number in range(listed.units):
        items = listed.unit(number)
        for item, size in zip(items, noted.lengths_of(digests_of([item.key for item in items])).tolist(), strict=True):
            length = _bytes_of(item) if size != UNKNOWN else UNKNOWN
            if length not in (UNKNOWN, size):
                replaced.append(f"{item.path} was {size:,} bytes long, now {length:,}")
    if replaced:
        count = f"{len(replaced):,} photographs have" if len(replaced) > 1 else "a photograph has"
        raise SettingsDiffer(
            f"{count} changed since {path} was made of them ({'; '.join(replaced[:3])}): extract them under other names or into another "
            "OUT, or --overwrite to do all again"
        )


def _bytes_of(item: ImageItem) -> int:
    """The length of a photograph, or of the table that holds it, without reading it."""
    if item.size >= 0:
        return item.size
    try:
        return os.stat(item.file).st_size  # noqa: PTH116  # a million times
    except OSError:
        return UNKNOWN
