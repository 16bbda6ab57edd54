"""The index of a text database: ids, lengths, checksums, images, memory-mapped; and the side file that needs all images together."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uniter.datasets.progress import Progress
from uniter.datasets.storage.index_file import INDEX, save_arrays
from uniter.datasets.text_db.building.image_names import NamedImages, mapped, pairs
from uniter.datasets.text_db.building.spool import BATCH, JsonObject, Spool


def write_text_index(work: Path, folder: Path, spool: Spool, images: NamedImages) -> int:
    """index.safetensors and img2txts.json; returns how many images the texts are about."""
    used = images.image_of[np.fromfile(work / "images", np.int32)]
    first_uses = np.full(len(images.firsts), len(used), np.int64)
    np.minimum.at(first_uses, used, np.arange(len(used), dtype=np.int32))
    by_first_use = np.argsort(first_uses, kind="stable")[: int((first_uses < len(used)).sum())]
    number_of = np.full(len(images.firsts), -1, np.int32)
    number_of[by_first_use] = np.arange(len(by_first_use), dtype=np.int32)
    numbers = number_of[used]
    del used, first_uses
    image_bytes, image_ends = images.keys(images.firsts[by_first_use])

    order = np.argsort(numbers, kind="stable")
    count = np.bincount(numbers, minlength=len(by_first_use))
    image_starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(count, dtype=np.int64)])
    examples = (order // spool.width).astype(np.int32)
    del order
    ids_bytes = mapped(work / "ids")
    id_ends = np.cumsum(np.fromfile(work / "id_lengths", np.int32), dtype=np.int64)
    _write_texts_of_images(folder / "img2txts.json", image_bytes, image_ends, image_starts, examples, ids_bytes, id_ends)

    arrays: dict[str, NDArray[Any]] = {name: np.fromfile(work / name, np.int32) for name in spool.length_names}
    arrays |= _key_columns("ids", ids_bytes, id_ends, np.fromfile(work / "id_hashes", np.uint64))
    arrays |= _key_columns("image_keys", np.frombuffer(image_bytes, np.uint8), image_ends, images.hashes[by_first_use])
    arrays |= {"image_numbers": numbers.reshape(-1, spool.width), "image_starts": image_starts, "image_examples": examples}
    arrays["checksums"] = np.fromfile(work / "checksums", np.uint32)
    save_arrays(folder / INDEX, arrays)
    return len(by_first_use)


def _key_columns(what: str, key_bytes: NDArray[np.uint8], ends: NDArray[np.int64], hashes: NDArray[np.uint64]) -> dict[str, NDArray[Any]]:
    order = np.argsort(hashes, kind="stable").astype(np.int32)
    columns: dict[str, NDArray[Any]] = {"key_bytes": key_bytes, "key_ends": ends, "hashes": hashes[order], "hash_rows": order}
    return {f"{what}.{name}": column for name, column in columns.items()}


def _write_texts_of_images(
    path: Path,
    image_bytes: bytes,
    image_ends: NDArray[np.int64],
    image_starts: NDArray[np.int64],
    examples: NDArray[np.int32],
    ids_bytes: NDArray[np.uint8],
    id_ends: NDArray[np.int64],
) -> None:
    """{image key: [ids]}, images by first appearance, a block of images at a time."""
    table = JsonObject(path)
    start = 0
    progress = Progress(len(image_ends), unit="images", label="listing texts by image", brief=True)
    for first in range(0, len(image_ends), BATCH):
        last = min(first + BATCH, len(image_ends))
        places = examples[image_starts[first] : image_starts[last]]
        id_starts = np.where(places > 0, id_ends[np.maximum(places, 1) - 1], 0)
        ids = [ids_bytes[begin:end].tobytes().decode() for begin, end in pairs(id_starts, id_ends[places])]
        bounds = (image_starts[first : last + 1] - image_starts[first]).tolist()
        items = []
        for place, end in enumerate(image_ends[first:last].tolist()):
            items.append((image_bytes[start:end].decode(), ids[bounds[place] : bounds[place + 1]]))
            start = end
        table.write(items)
        progress.update(len(items))
    progress.close()
    table.close()
