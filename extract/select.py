"""Raw detections to kept regions: Bottom-Up-Attention's rule, by which a proposal stays as it was pooled, and the rules of others.

The confidence of a region is not its best class probability: it is the best among the classes in whose non-maximum suppression the
region survives, and 0 for a region suppressed everywhere. Column 0 of the probabilities is the background.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from uniter.datasets.image_db.regions import RegionFeatures, normalised_boxes
from uniter.extract.detector.protocol import Float32Array, RawRegions

CLASS_NMS_THRESHOLD = 0.3


SELECTION_RULE = "caffe: class-wise NMS at {nms} with +1 areas; by confidence, counted after the float16 cast, strictly above the threshold"


GIVEN_RULE = "given: all, in the caller's order; the confidence is the best class probability"


Kept = NDArray[np.integer]


def _above(confidence: Float32Array, least: int, most: int, threshold: float) -> Kept:
    """Those above the threshold in float16, at least `least` and at most `most` of the best."""
    passing = int(np.count_nonzero(confidence.astype(np.float16) > np.float16(threshold)))
    return _best_first(confidence)[: min(max(passing, least), most)]


def _from(confidence: Float32Array, least: int, most: int, threshold: float) -> Kept:
    """VinVL's NMS_FILTER 1: those from the threshold on, at least `least` and at most `most`, none that was suppressed."""
    passing = int(np.count_nonzero(confidence >= np.float32(threshold)))
    kept = _best_first(confidence)[: min(max(passing, least), most)]
    return kept[confidence[kept] > 0]


def _from_or_a_hundredth(confidence: Float32Array, least: int, most: int, threshold: float) -> Kept:
    """VinVL's NMS_FILTER 2: as filter 1, but none at or below a hundredth of the threshold."""
    kept = _from(confidence, least, most, threshold)
    return kept[confidence[kept] > np.float32(0.01 * threshold)]


def _halved(confidence: Float32Array, least: int, most: int, threshold: float) -> Kept:
    """VinVL's NMS_FILTER 0: those above the threshold, which is halved up to ten times until they are `least`; the best `most`."""
    for _ in range(10):
        if np.count_nonzero(confidence > np.float32(threshold)) >= least:
            break
        threshold /= 2
    kept = _best_first(confidence)
    return kept[confidence[kept] > np.float32(threshold)][:most]


def _best_first(confidence: Float32Array) -> Kept:
    return np.argsort(-confidence, kind="stable")


class SelectionRule(NamedTuple):
    """How many regions stay, their confidences being known.

    Attributes:
        words: as settings and headers say it.
        keep: confidence (P,), least, most and threshold to the kept rows, best first.
    """

    words: str
    keep: Callable[[Float32Array, int, int, float], Kept]


RULES = {
    "caffe": SelectionRule(SELECTION_RULE, _above),
    "own": SelectionRule("own: the detector's confidence, counted after the float16 cast, strictly above the threshold", _above),
    "vinvl-filter-1": SelectionRule("vinvl: NMS_FILTER 1, class-wise NMS at 0.3; by confidence, from the threshold on", _from),
    "vinvl-filter-2": SelectionRule(
        "vinvl: NMS_FILTER 2, NMS of all classes at 0.5; by confidence, from the threshold on", _from_or_a_hundredth
    ),
    "vinvl-filter-0": SelectionRule(
        "vinvl: NMS_FILTER 0, class-wise NMS at 0.5, a region a class; by confidence, above the threshold", _halved
    ),
}
"""By what a detector's settings say under "selection_rule"; all but Caffe's take `RawRegions.confidence`."""


def select_regions(
    raw: RawRegions,
    *,
    size: tuple[int, int],
    min_boxes: int = 10,
    max_boxes: int = 100,
    conf_threshold: float = 0.2,
    nms_threshold: float = CLASS_NMS_THRESHOLD,
    rule: str = "caffe",
) -> RegionFeatures:
    """Keep the most confident regions, between `min_boxes` and `max_boxes` of them where the detector proposed so many.

    Args:
        raw: the detector's answer for one image.
        size: (height, width) of the upright image in pixels.
        min_boxes, max_boxes: how many regions stay at least and at most.
        nms_threshold: of the class-wise non-maximum suppression; 0.3 as Caffe's, unless the detector asks for another.
        conf_threshold: regions above it stay; by Caffe's rule compared in float16, strictly, as UNITER's converter does.
        rule: one of `RULES`.

    Returns:
        The kept regions by decreasing confidence (equal ones in the detector's order), arrays in float32.

    Raises:
        ValueError: `min_boxes` is above `max_boxes`, or one is negative; or the regions come without the confidence that the rule needs,
            or with one that it would not look at.

    Source: bottom-up-attention's `generate_tsv.py`, then UNITER's `convert_imgdir.py`; VinVL's: scene_graph_benchmark,
    `roi_heads/box_head/inference.py`.
    """
    if not 0 <= min_boxes <= max_boxes:
        raise ValueError(f"min_boxes {min_boxes} and max_boxes {max_boxes}: expected 0 <= min_boxes <= max_boxes")
    if (raw.confidence is None) != (rule == "caffe"):
        raise ValueError(
            f"rule {rule!r}, but regions {'without' if raw.confidence is None else 'with'} a confidence of their own; a detector that "
            f'gives one says in its settings by which rule regions stay, {{"selection_rule": "own"}}, and no other does'
        )
    confidence = raw.confidence
    if confidence is None:
        foreground = raw.probabilities[:, 1:]
        confidence = _confidences_of_the_best(
            raw.boxes, foreground, wanted=min_boxes, threshold=conf_threshold, nms_threshold=nms_threshold
        )
    return _record(raw, RULES[rule].keep(confidence, min_boxes, max_boxes, conf_threshold), confidence, size)


def keep_given(raw: RawRegions, *, size: tuple[int, int]) -> RegionFeatures:
    """All regions in the caller's order, for boxes that were given; the confidence is the best class probability."""
    foreground = raw.probabilities[:, 1:]
    confidence = foreground.max(axis=1) if foreground.size else np.zeros(len(foreground), dtype=np.float32)
    return _record(raw, np.arange(len(raw.boxes)), confidence, size)


def _record(raw: RawRegions, kept: Kept, confidence: Float32Array, size: tuple[int, int]) -> RegionFeatures:
    boxes = raw.boxes[kept]
    return RegionFeatures(
        features=raw.features[kept],
        norm_bb=normalised_boxes(boxes, size),
        conf=confidence[kept],
        boxes=boxes,
        soft_labels=raw.probabilities[kept],
        size=size,
        attributes=None if raw.attributes is None else raw.attributes[kept],
    )


def _confidences_of_the_best(
    boxes: Float32Array, foreground: Float32Array, *, wanted: int, threshold: float, nms_threshold: float
) -> Float32Array:
    """Confidences, exact wherever they decide: all above the threshold and at least the `wanted` highest.

    A class whose best probability is below a floor cannot give a confidence above it, nor can a lower probability suppress a higher
    one. So the floor starts at the threshold and sinks only while fewer regions than wanted stand above it; most images end at once.
    """
    if not foreground.size:
        return np.zeros(len(boxes), dtype=np.float32)
    overlaps = overlapping(boxes, nms_threshold)
    # A half-precision step below the threshold, since confidences are compared after rounding to half precision.
    floor = float(np.nextafter(np.float16(threshold), np.float16(-1)))
    best_first = np.sort(foreground.max(axis=1))[::-1]
    wanted = min(wanted, len(boxes))
    # No confidence exceeds its region's best probability: below the floor chosen here fewer than `wanted` can be found.
    if wanted and best_first[wanted - 1] < floor:
        floor = float(best_first[wanted - 1])
    while True:
        confidence = class_confidences(boxes, foreground, floor=floor, overlaps=overlaps)
        if floor <= 0 or np.count_nonzero(confidence) >= wanted:
            return confidence
        floor = floor / 4 if floor > 1e-4 else 0.0


def class_confidences(
    boxes: Float32Array, foreground: Float32Array, *, floor: float = 0.0, overlaps: NDArray[np.bool_] | None = None
) -> Float32Array:
    """The best probability of each region among the classes in which it survives non-maximum suppression.

    All classes run at once: step r looks at the r-th best region of every class and, where it still stands, strikes out what it
    overlaps. What is struck is kept as bits, 64 regions a word.

    Args:
        boxes: (P, 4) float32 pixels.
        foreground: (P, C) float32, class probabilities without the background.
        floor: confidences at or above it are exact, all others are 0.
        overlaps: `overlapping(boxes)` where it is at hand.

    Returns:
        (P,) float32.
    """
    count = len(boxes)
    confidence = np.zeros(count, dtype=np.float32)
    if not foreground.size:
        return confidence
    overlaps = overlapping(boxes) if overlaps is None else overlaps
    candidates = foreground >= floor
    per_class = candidates.sum(axis=0)
    classes = np.flatnonzero(per_class)
    if not len(classes):
        return confidence
    # Classes with the most candidates first, so that those which are through form the tail.
    classes = classes[np.argsort(-per_class[classes], kind="stable")]
    per_class = per_class[classes]
    scores_CP = np.ascontiguousarray(foreground[:, classes].T)
    order_PC = np.ascontiguousarray(np.argsort(-scores_CP, axis=1, kind="stable")[:, : per_class[0]].T)
    words = -(-count // 64)
    padded = np.zeros((count, words * 64), dtype=bool)
    padded[:, :count] = overlaps
    padded[np.arange(count), np.arange(count)] = False
    overlap_words = np.packbits(padded, axis=1, bitorder="little").view("<u8")
    struck = np.zeros((len(classes), words), dtype="<u8")
    flat = struck.reshape(-1)
    first_word = np.arange(len(classes)) * words
    word_PC, bit_PC = first_word + (order_PC >> 6), np.left_shift(np.uint64(1), (order_PC & 63).astype(np.uint64))
    active = len(classes)
    for rank in range(per_class[0]):
        while per_class[active - 1] <= rank:
            active -= 1
        stands = np.flatnonzero((flat[word_PC[rank, :active]] & bit_PC[rank, :active]) == 0)
        struck[stands] |= overlap_words[order_PC[rank, stands]]
    survives = np.unpackbits(struck.view(np.uint8), axis=1, bitorder="little")[:, :count] == 0
    best: Float32Array = np.where(survives & (scores_CP >= floor), scores_CP, np.float32(0)).max(axis=0)
    return best


def overlapping(boxes: Float32Array, threshold: float = CLASS_NMS_THRESHOLD) -> NDArray[np.bool_]:
    """(P, P) bool: which boxes, pixels counted inclusively (+ 1), have an intersection over union above the threshold."""
    x0, y0, x1, y1 = np.asarray(boxes, dtype=np.float32).T
    area = (x1 - x0 + 1) * (y1 - y0 + 1)
    width = np.minimum(x1[:, None], x1) - np.maximum(x0[:, None], x0) + 1
    height = np.minimum(y1[:, None], y1) - np.maximum(y0[:, None], y0) + 1
    intersection = np.maximum(width, 0) * np.maximum(height, 0)
    exceeds: NDArray[np.bool_] = intersection / (area[:, None] + area - intersection) > threshold
    return exceeds
