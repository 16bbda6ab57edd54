"""The selection of regions against its definition: one non-maximum suppression a class, as Caffe's script runs it."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torchvision.ops import box_iou

from uniter.extract.detector.protocol import RawRegions
from uniter.extract.select import class_confidences, keep_given, overlapping, select_regions

Floats = NDArray[np.float32]


def by_definition(boxes: Floats, foreground: Floats) -> Floats:
    """The best probability of each box over the classes in whose suppression it survives, one class and one box at a time."""
    overlaps = overlapping(boxes)
    confidence = np.zeros(len(boxes), dtype=np.float32)
    for scores in foreground.T:
        left = list(np.argsort(-scores, kind="stable"))
        while left:
            best = left.pop(0)
            confidence[best] = max(confidence[best], scores[best])
            left = [other for other in left if not overlaps[best, other]]
    return confidence


def random_regions(seed: int, count: int, classes: int, sharpness: float = 3.0) -> RawRegions:
    rng = np.random.default_rng(seed)
    corner, side = rng.uniform(0, 300, (count, 2)), rng.uniform(5, 250, (count, 2))
    boxes = np.concatenate([corner, corner + side], axis=1).astype(np.float32)
    scores = np.exp(rng.normal(size=(count, classes + 1)) * sharpness)
    shares = (scores / scores.sum(axis=1, keepdims=True)).astype(np.float32)
    return RawRegions(boxes, rng.random((count, 4), dtype=np.float32), shares, shares[:, :3])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 70), st.integers(1, 40), st.floats(0.1, 5), st.integers(0, 40), st.integers(0, 40))
def test_selection_is_what_its_definition_says(seed: int, count: int, classes: int, sharpness: float, least: int, more: int) -> None:
    raw = random_regions(seed, count, classes, sharpness)
    expected = by_definition(raw.boxes, raw.probabilities[:, 1:])
    assert np.array_equal(class_confidences(raw.boxes, raw.probabilities[:, 1:]), expected)
    kept = select_regions(raw, size=(600, 600), min_boxes=least, max_boxes=least + more)
    passing = int((expected.astype(np.float16) > np.float16(0.2)).sum())
    wanted = min(max(passing, least), least + more, count)
    order = np.argsort(-expected, kind="stable")[:wanted]
    assert np.array_equal(kept.conf, expected[order])
    assert np.array_equal(np.asarray(kept.boxes), raw.boxes[order])
    assert np.array_equal(np.asarray(kept.soft_labels), raw.probabilities[order])
    assert kept.attributes is not None and np.array_equal(kept.attributes, np.asarray(raw.attributes)[order])


def test_more_than_64_regions_and_ties_are_in_the_detectors_order() -> None:
    raw = random_regions(1, 130, 3)
    same = np.full((130, 4), 0.25, dtype=np.float32)
    boxes = (np.arange(130, dtype=np.float32) * 1000)[:, None] + np.array([0, 0, 10, 10], dtype=np.float32)
    kept = select_regions(RawRegions(boxes, raw.features, same), size=(10, 10), min_boxes=5, max_boxes=100)
    assert np.array_equal(np.asarray(kept.boxes), boxes[:100])


@pytest.mark.parametrize(("probability", "passes"), [(0.2, False), (0.20001, False), (0.2001, True)])
def test_the_threshold_is_strict_after_the_float16_cast(probability: float, passes: bool) -> None:
    shares = np.array([[1 - probability, probability]], dtype=np.float32)
    raw = RawRegions(np.array([[0, 0, 9, 9]], dtype=np.float32), np.ones((1, 2), dtype=np.float32), shares)
    assert len(select_regions(raw, size=(10, 10), min_boxes=0)) == int(passes)


def test_areas_are_inclusive() -> None:
    # 10 x 10 and 10 x 4 pixels when counted inclusively: 40 / 100; without the + 1 it would be 27 / 81.
    boxes = np.array([[0, 0, 9, 9], [0, 0, 9, 3]], dtype=np.float32)
    assert overlapping(boxes, 0.39)[0, 1] and not overlapping(boxes, 0.41)[0, 1]


def test_overlaps_are_torchvisions_of_boxes_one_pixel_larger() -> None:
    boxes = random_regions(3, 200, 2).boxes
    larger = torch.from_numpy(boxes + np.array([0, 0, 1, 1], dtype=np.float32))
    expected = box_iou(larger, larger).numpy()
    clear = np.abs(expected - 0.3) > 1e-5
    assert (overlapping(boxes, 0.3) == (expected > 0.3))[clear].all() and 0.01 < (expected > 0.3).mean() < 0.5


def test_no_regions_and_no_classes() -> None:
    nothing = RawRegions(np.zeros((0, 4), np.float32), np.zeros((0, 8), np.float32), np.zeros((0, 5), np.float32))
    assert len(select_regions(nothing, size=(5, 5))) == 0 and len(keep_given(nothing, size=(5, 5))) == 0
    unnamed = RawRegions(np.ones((3, 4), np.float32), np.ones((3, 8), np.float32), np.ones((3, 1), np.float32))
    assert select_regions(unnamed, size=(5, 5), min_boxes=2).conf.tolist() == [0, 0]
    with pytest.raises(ValueError, match="min_boxes"):
        select_regions(nothing, size=(5, 5), min_boxes=5, max_boxes=4)


def test_given_regions_keep_their_order_and_number() -> None:
    raw = random_regions(4, 120, 6)
    kept = keep_given(raw, size=(300, 400))
    assert np.array_equal(np.asarray(kept.boxes), raw.boxes) and kept.size == (300, 400)
    assert np.array_equal(kept.conf, raw.probabilities[:, 1:].max(axis=1))


@pytest.mark.parametrize(("sharpness", "least", "most_ms"), [(2.6, 10, 10), (0.3, 100, 80)])
def test_selection_takes_milliseconds(sharpness: float, least: int, most_ms: float) -> None:
    raw = random_regions(2, 300, 1600, sharpness)
    times = []
    for _ in range(7):
        begun = time.perf_counter()
        select_regions(raw, size=(600, 600), min_boxes=least)
        times.append(time.perf_counter() - begun)
    assert min(times) * 1000 <= most_ms
