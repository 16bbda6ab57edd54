"""RefCOCO's candidates: the regions that a phrase may mean, as boxes in pixels, and how far each covers what is meant.

What a reader would get wrong: boxes here are x, y, width, height, and the overlap is the published one, which counts both ends of
an intersection.

Source: ChenRocks/UNITER, `data/re.py` and `inf_re.py`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uniter.datasets.batches.corpus import Corpus
from uniter.datasets.errors import BadInput
from uniter.datasets.text_db import TextDB

IOU_THRESHOLD = 0.5


LOOKED_AT = 500


@dataclass(frozen=True, slots=True)
class Picture:
    """What `images.json` says of a picture: its annotations in the order of the annotated regions, and (height, width) in pixels."""

    annotations: tuple[int, ...]
    size: tuple[int, int]


Pictures = Mapping[int, Picture]


def read_pictures(text: TextDB) -> dict[int, Picture]:
    """The pictures of a RefCOCO text database by their ids.

    Raises:
        BadInput: there is no such file, or it does not say order and size.
    """
    path = text.path / "images.json"
    if not path.is_file():
        raise BadInput(f"{path} is missing; build the texts with uniter-build-db --task refcoco")
    try:
        entries = json.loads(path.read_bytes())
        found = {
            int(entry["id"]): Picture(tuple(map(int, entry["ann_ids"])), (int(entry["height"]), int(entry["width"]))) for entry in entries
        }
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(
            f"{path} does not list id, ann_ids, height and width of every picture ({error!r}); was it built otherwise?"
        ) from None
    for number, picture in found.items():
        if min(picture.size) < 1:
            raise BadInput(
                f"{path}: picture {number} is {picture.size[0]} pixels high and {picture.size[1]} wide; expected at least one each"
            )
    return found


def inclusive_iou(box: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union as published: boxes x, y, w, h in pixels, both ends of an intersection counted, areas plainly w * h.

    Boxes whose intersection is a single row or column of pixels do not meet.
    """
    left, top = max(box[0], other[0]), max(box[1], other[1])
    right = min(box[0] + box[2] - 1, other[0] + other[2] - 1)
    bottom = min(box[1] + box[3] - 1, other[1] + other[3] - 1)
    common = (right - left + 1) * (bottom - top + 1) if left < right and top < bottom else 0.0
    return float(common / (box[2] * box[3] + other[2] * other[3] - common))


def overlap(boxes: NDArray[np.floating], others: NDArray[np.floating]) -> NDArray[np.float32]:
    """Plain intersection over union (N, M) of boxes (N, 4) and (M, 4), each x, y, width, height; 0 where neither has an area."""
    top_left = np.maximum(boxes[:, None, :2], others[None, :, :2])
    bottom_right = np.minimum((boxes[:, :2] + boxes[:, 2:])[:, None], (others[:, :2] + others[:, 2:])[None])
    common = np.clip(bottom_right - top_left, 0, None).prod(axis=2)
    together = boxes[:, 2:].prod(axis=1)[:, None] + others[:, 2:].prod(axis=1)[None] - common
    overlaps: NDArray[np.float32] = np.divide(common, together, out=np.zeros(common.shape, dtype=np.float32), where=together > 0)
    return overlaps


def candidate_boxes(norm_bb: NDArray[np.floating], size: tuple[int, int]) -> NDArray[np.float32]:
    """(N, 4) float32 x, y, width, height in pixels of a picture of (height, width), from (N, 6) fractions."""
    height, width = size
    fractions = np.asarray(norm_bb, dtype=np.float32)[:, [0, 1, 4, 5]]
    return fractions * np.array([width, height, width, height], dtype=np.float32)


def picture_of(pictures: Sequence[Pictures], corpus: Corpus, number: int, record: Mapping[str, Any]) -> Picture:
    """The picture that an example is about.

    Args:
        pictures: of each text database of the corpus.
    """
    found = pictures[int(corpus.database_N[number])].get(record.get("image_id", -1))
    if found is None:
        raise BadInput(
            f"example {corpus.example_id(number)!r} is about picture {record.get('image_id')!r}, which images.json does not list; "
            "were the texts built with uniter-build-db --task refcoco?"
        )
    return found


def are_annotated(corpus: Corpus, pictures: Sequence[Pictures]) -> bool:
    """Whether the regions are the annotated boxes, in the order that the texts say; otherwise they were detected.

    At most `LOOKED_AT` pictures are looked at.

    Raises:
        BadInput: they are annotated boxes, but not these, or in another order.
    """
    _, firsts = np.unique(corpus.image_rows_NK[:, 0], return_index=True)
    chosen = firsts[np.unique(np.linspace(0, len(firsts) - 1, min(len(firsts), LOOKED_AT)).astype(np.int64))]
    other_counts, elsewhere = [], []
    for number in chosen.tolist():
        record, row = corpus.record(number), int(corpus.image_rows_NK[number, 0])
        picture, key = picture_of(pictures, corpus, number, record), corpus.images.keys_list[row]
        if int(corpus.images.region_counts[row]) != len(picture.annotations) or record["ann_id"] not in picture.annotations:
            other_counts.append(key)
            continue
        own = corpus.regions(row).norm_bb[[picture.annotations.index(record["ann_id"])]]
        if inclusive_iou(candidate_boxes(own, picture.size)[0].tolist(), record["bbox"]) <= IOU_THRESHOLD:
            elsewhere.append(key)
    if 2 * len(other_counts) >= len(chosen):
        return False
    # Half precision moves the sides of boxes that are a few pixels wide.
    if other_counts or 10 * len(elsewhere) > len(chosen):
        raise BadInput(
            f"corpus {corpus.name!r}: the regions of {len(other_counts) + len(elsewhere)} of {len(chosen)} pictures are not the "
            f"annotations in the order of images.json, the first {(other_counts + elsewhere)[0]!r}; extract with --boxes from the "
            "instances.json of the texts, or build the texts with the order of the regions (--join iid_to_ann_ids.json)"
        )
    return True
