"""One image's regions: the record that every other file speaks.

Boxes on disk are kept twice: `norm_bb` as fractions of the image (what UNITER reads) and `boxes` as pixels of the
upright image (what people draw). Column 0 of `soft_labels` is the background, so class k (counted from 0) is column k + 1.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uniter.datasets.errors import BadInput
from uniter.datasets.image_db.transformers_inputs import lxmert_inputs, visualbert_inputs

FloatArray = NDArray[np.floating]


IntArray = NDArray[np.integer]


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class RegionFeatures:
    """The regions of one image, rows by decreasing confidence where they were detected.

    Attributes:
        features: (N, D) float16 or float32, what the detector's box predictor sees; 2048 wide for Bottom-Up-Attention.
        norm_bb: (N, 6) float, x0/W, y0/H, x1/W, y1/H, w/W, h/H with w = x1 - x0 (no + 1).
        conf: (N,) float, confidence of each region, 0 where there is none.
        boxes: (N, 4) float32, pixels of the upright image, x0 y0 x1 y1; None where the source holds fractions only.
        soft_labels: (N, C) float, the detector's distribution with the background in column 0; None where unknown.
        size: (height, width) of the upright image in pixels; None where unknown.
        attributes: (N, A) float, distribution over attributes with "no attribute" in column 0; None unless asked for.
        object_ids, attribute_ids: (N,) int64, best class and attribute counted from 0 without background; set only by
            sources that keep names instead of distributions (LXMERT's TSV). Use `best_objects()` to read either.
        object_conf, attribute_conf: (N,) float32, the probability of those.

    Source: UNITER's image databases (ChenRocks/UNITER, `convert_imgdir.py`); `boxes` and `size` are this project's.
    """

    features: FloatArray
    norm_bb: FloatArray
    conf: FloatArray
    boxes: FloatArray | None = None
    soft_labels: FloatArray | None = None
    size: tuple[int, int] | None = None
    attributes: FloatArray | None = None
    object_ids: IntArray | None = None
    object_conf: FloatArray | None = None
    attribute_ids: IntArray | None = None
    attribute_conf: FloatArray | None = None

    def __len__(self) -> int:
        return len(self.features)

    def __repr__(self) -> str:
        of = "" if self.size is None else f" of {self.size[1]} x {self.size[0]} pixels"
        return f"<{len(self)} regions{of}, features {self.features.shape[1]} wide>"

    @property
    def position(self) -> NDArray[np.float32]:
        """(N, 7) float32: x0, y0, x1, y1, w, h, w * h as fractions; the area in float32, after the cast (as UNITER's reader)."""
        box = np.asarray(self.norm_bb, dtype=np.float32)
        return np.concatenate([box, box[:, 4:5] * box[:, 5:6]], axis=1)

    def rows(self, selection: IntArray | slice) -> "RegionFeatures":
        """The same record with the selected rows only, in the selection's order."""
        changed = {
            field.name: value[selection]
            for field in fields(RegionFeatures)
            if field.name != "size" and (value := getattr(self, field.name)) is not None
        }
        return replace(self, **changed)

    def best_objects(self) -> tuple[IntArray, FloatArray] | None:
        """Best foreground class of each region, (N,) counted from 0, and its probability (N,); None where unknown."""
        if self.soft_labels is not None and self.soft_labels.shape[1] > 1:
            return _best_foreground(self.soft_labels)
        if self.object_ids is not None:
            return self.object_ids, self.conf if self.object_conf is None else self.object_conf
        return None

    def best_attributes(self) -> tuple[IntArray, FloatArray] | None:
        """Best attribute of each region, (N,) counted from 0 without "no attribute", -1 where a source knows none, and its probability
        (N,); None where all are unknown.
        """
        if self.attributes is not None and self.attributes.shape[1] > 1:
            return _best_foreground(self.attributes)
        if self.attribute_ids is not None:
            unknown = np.zeros(len(self), np.float32)
            return self.attribute_ids, unknown if self.attribute_conf is None else self.attribute_conf
        return None

    def numpy(self) -> dict[str, NDArray[Any]]:
        """All that is known, as plain arrays that may be written to: numbers as float32, ids as int64, `size` (2,) height and width."""
        found = {field.name: getattr(self, field.name) for field in fields(RegionFeatures)}
        arrays = {name: np.asarray(value) for name, value in found.items() if value is not None}
        return {name: np.array(array, np.float32 if array.dtype.kind == "f" else np.int64) for name, array in arrays.items()}

    def to_lxmert(self, *, labels: bool = False) -> dict[str, Any]:
        """What `transformers.LxmertModel` takes of this picture, as a batch of one; of several: `lxmert_inputs([...])`.

        `model(**tokenizer(text, return_tensors="pt"), **regions.to_lxmert())`. Boxes are fractions of the image, as it wants them.
        """
        return lxmert_inputs([self], labels=labels)

    def to_visualbert(self) -> dict[str, Any]:
        """What `transformers.VisualBertModel` takes of this picture, as a batch of one; of several: `visualbert_inputs([...])`."""
        return visualbert_inputs([self])

    def check_shapes(self, key: str) -> None:
        """Raise BadInput, naming the image, unless all fields hold the same number of rows and fitting widths."""
        count = len(self.features)
        widths = {"norm_bb": 6, "boxes": 4}
        for field in fields(RegionFeatures):
            value = getattr(self, field.name)
            if value is None or field.name == "size":
                continue
            wanted = 1 if field.name in _VECTORS else 2
            if value.ndim != wanted or (field.name in widths and value.shape[1] != widths[field.name]):
                raise BadInput(f"image {key!r}: {field.name} has shape {value.shape}; is the file of another format?")
            if len(value) != count:
                raise BadInput(
                    f"image {key!r}: {len(value)} rows of {field.name} but {count} feature rows; was the file cut off? Export it again"
                )


_VECTORS = {"conf", "object_ids", "object_conf", "attribute_ids", "attribute_conf"}


def _best_foreground(distributions: FloatArray) -> tuple[IntArray, FloatArray]:
    """The best column of each row but column 0, counted from 0 behind it, and what stands there as float32."""
    foreground = distributions[:, 1:]
    best = foreground.argmax(axis=1)
    return best, foreground[np.arange(len(best)), best].astype(np.float32)


def normalised_boxes(boxes: FloatArray, size: tuple[int, int]) -> NDArray[np.float32]:
    """UNITER's six box numbers from pixels.

    Args:
        boxes: (N, 4), pixels, x0 y0 x1 y1.
        size: (height, width) of the image in pixels.

    Returns:
        (N, 6) float32: x0/W, y0/H, x1/W, y1/H, w/W, h/H with w = x1 - x0 (no + 1).
    """
    height, width = size
    pixels = np.asarray(boxes, dtype=np.float32)
    scaled = pixels / np.array([width, height, width, height], dtype=np.float32)
    extent = scaled[:, 2:] - scaled[:, :2]
    return np.concatenate([scaled, extent], axis=1)


def without_positions(count: int) -> NDArray[np.float32]:
    """The `norm_bb` of regions whose place in the image the source does not say: (count, 6) zeros, which no region of an image has."""
    return np.zeros((count, 6), dtype=np.float32)


def has_positions(regions: RegionFeatures) -> bool:
    """Whether `norm_bb` says where the regions are."""
    return len(regions) == 0 or bool(np.any(regions.norm_bb))


def pixel_boxes(norm_bb: FloatArray, size: tuple[int, int]) -> NDArray[np.float32]:
    """The inverse of `normalised_boxes`: (N, 6) fractions to (N, 4) float32 pixels of an image of (height, width)."""
    height, width = size
    return np.asarray(norm_bb[:, :4], dtype=np.float32) * np.array([width, height, width, height], dtype=np.float32)
