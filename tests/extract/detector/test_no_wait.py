"""The law "no wait": from the images of a batch to its results, the host never asks the device for a number.

On the device "meta" there are no numbers: whatever asks for one raises by itself. And on the CPU it is counted.
"""

import copy
import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import nms

from uniter.extract.detector.detectron import Detectron2Detector
from uniter.extract.detector.fixed_size import Candidates, first_standing
from uniter.extract.detector.network import RegionNetwork
from uniter.extract.detector.preparation import CaffePreparation, ShortestEdgePreparation
from uniter.extract.detector.recipes import Recipe, find_recipe
from uniter.extract.detector.vinvl_selection import VinvlNetwork

SIZES = [(96, 128), (131, 99), (64, 157)]
ZOO = "COCO-Detection/faster_rcnn_"
DETECTORS = ["butd", f"{ZOO}R_50_C4_1x", f"{ZOO}R_50_DC5_1x", f"{ZOO}R_50_FPN_1x", "on-board"]
ASKING = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::is_nonzero", "aten::_unique2",
    "aten::unique_consecutive", "torchvision::nms",
}  # fmt: skip


class Waits(TorchDispatchMode):
    """Counts the operators that need a value of the device's: those above, boolean indices, copies to another device."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, values: Any = (), words: Any = None) -> Any:
        name = function._schema.name
        indices = [index for index in values[1] if index is not None] if name in ("aten::index", "aten::index_put_") else []
        asks = name in ASKING or any(index.dtype == torch.bool for index in indices)
        asks |= name == "aten::repeat_interleave" and (words or {}).get("output_size") is None
        if asks:
            self.counts[name] += 1
        return function(*values, **(words or {}))


def small(name: str) -> Recipe:
    recipe = find_recipe(name)
    if name == "on-board":
        return recipe
    config = recipe.config.clone()
    config.defrost()
    resnets = config.MODEL.RESNETS
    resnets.DEPTH, resnets.STEM_OUT_CHANNELS, resnets.RES2_OUT_CHANNELS, resnets.WIDTH_PER_GROUP = 50, 8, 16, 4
    config.MODEL.FPN.OUT_CHANNELS, config.MODEL.ROI_BOX_HEAD.FC_DIM, config.MODEL.ROI_HEADS.NUM_CLASSES = 16, 24, 12
    config.MODEL.RPN.PRE_NMS_TOPK_TEST, config.MODEL.RPN.POST_NMS_TOPK_TEST = 400, 40
    kind = CaffePreparation if isinstance(recipe.preparation, CaffePreparation) else ShortestEdgePreparation
    classes = tuple(f"class {number}" for number in range(12))
    colours = ("red", "round", "wet") if name == "butd" else ()
    return dataclasses.replace(recipe, config=config, class_names=classes, attribute_names=colours, preparation=kind(96, 160))


def pictures(sizes: Sequence[tuple[int, int]] = SIZES) -> list[NDArray[np.uint8]]:
    """Blotches with edges, one of each size."""
    made = []
    for number, (height, width) in enumerate(sizes):
        coarse = np.random.default_rng(number).integers(0, 256, (height // 9 + 1, width // 9 + 1, 3), dtype=np.uint8)
        made.append(np.ascontiguousarray(np.kron(coarse, np.ones((9, 9, 1), dtype=np.uint8))[:height, :width]))
    return made


@pytest.fixture(scope="module", params=DETECTORS)
def detector(request: pytest.FixtureRequest) -> Detectron2Detector:
    name = str(request.param)
    weights = None if name == "on-board" else "random:3"
    return Detectron2Detector(small(name), weights=weights, attributes=name == "butd")


def inputs(detector: Detectron2Detector) -> tuple[list[torch.Tensor], list[tuple[float, float]]]:
    prepared = [detector.prepare(picture) for picture in pictures()]
    return [torch.from_numpy(image.pixels) for image in prepared], [image.scale for image in prepared]


def test_no_wait_on_a_device_without_numbers(detector: Detectron2Detector) -> None:
    """Backbone, pyramid, proposals, second look, pooling, heads, of a batch of images of three sizes; and with given boxes."""
    network = RegionNetwork(copy.deepcopy(detector.network.model), device="meta")
    assert network.fixed
    images, scales = inputs(detector)
    attributes = bool(detector.attribute_names)
    with network.exact():
        found = network.regions(images, scales, None, attributes=attributes, fixed=True)
        given = network.regions(images, scales, [torch.zeros(5, 4, device="meta")] * 3, attributes=attributes)
    assert [len(one.boxes) for one in given] == [5] * 3
    for one in found:
        assert one.boxes.device.type == "meta" and one.kept is not None and one.settled is not None
        assert len(one.boxes) == len(one.features) == len(one.classes) > 0 and one.features.shape[1] == detector.feature_width
    with pytest.raises((RuntimeError, NotImplementedError)), network.exact():
        network.regions(images, scales, None, attributes=attributes)  # as on a CPU


def test_no_wait_is_counted_and_the_results_are_the_same(detector: Detectron2Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    network, (images, scales) = detector.network, inputs(detector)
    expected = detector.detect([detector.prepare(picture) for picture in pictures()])
    with network.exact(), Waits() as waiting:
        network.regions(images, scales, None, attributes=False)
    assert sum(waiting.counts.values()) >= len(images)  # as it is counted, it is there
    monkeypatch.setattr(network, "fixed", True)
    monkeypatch.setattr(network, "_max_pooler", None)
    with network.exact(), Waits() as waiting:
        network.regions(images, scales, None, attributes=bool(detector.attribute_names), fixed=True)
    assert not waiting.counts
    for got, wanted in zip(detector.detect([detector.prepare(picture) for picture in pictures()]), expected, strict=True):
        assert got.boxes.shape == wanted.boxes.shape and len(wanted.boxes) > 3
        np.testing.assert_allclose(got.boxes, wanted.boxes, atol=1e-3)
        np.testing.assert_allclose(got.features, wanted.features, atol=2e-4, rtol=1e-4)
        np.testing.assert_allclose(got.probabilities, wanted.probabilities, atol=2e-4)
        assert (got.attributes is None) == (wanted.attributes is None)


def test_what_does_not_settle_is_computed_again(detector: Detectron2Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = [detector.prepare(picture) for picture in pictures()]
    expected = detector.detect(prepared)
    monkeypatch.setattr(detector.network, "fixed", True)
    monkeypatch.setattr("uniter.extract.detector.fixed_size.ROUNDS", 1)
    asked: list[bool] = []
    regions = detector.network.regions
    monkeypatch.setattr(detector.network, "regions", lambda *args, **words: (asked.append(words["fixed"]), regions(*args, **words))[1])
    for got, wanted in zip(detector.detect(prepared), expected, strict=True):
        np.testing.assert_allclose(got.boxes, wanted.boxes, atol=1e-3)
    assert asked == [True, False]


def crowd(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes that overlap each other in long chains, and scores of which some are equal."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=generator) * 60
    boxes = torch.cat([corners, corners + 20 + torch.rand(count, 2, generator=generator) * 25], dim=1)
    return boxes, (torch.rand(count, generator=generator) * 50).round() / 50


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("threshold", [0.3, 0.7])
def test_suppression_of_one_size_is_torchvisions(seed: int, threshold: float) -> None:
    boxes, scores = crowd(150, seed)
    order = scores.argsort(descending=True, stable=True)
    expected = order[nms(boxes[order], scores[order], threshold)][:30]
    usable = torch.ones(150, dtype=torch.bool)
    found = first_standing([Candidates(boxes, scores, usable, boxes, None, 150, 30, threshold)])[0]
    assert bool(found.settled) and found.rows[: int(found.kept)].tolist() == expected.tolist()
    assert torch.equal(found.boxes[int(found.kept) :], boxes[expected[:1]].expand(30 - int(found.kept), 4))
    groups = torch.arange(150) % 3
    found = first_standing([Candidates(boxes, scores, usable, boxes, groups, 150, 150, threshold)])[0]
    alone = [torch.nonzero(groups == number).squeeze(1) for number in range(3)]
    kept = torch.cat([rows[nms(boxes[rows], scores[rows] - 1e-6 * rows, threshold)] for rows in alone])
    assert sorted(found.rows[: int(found.kept)].tolist()) == sorted(kept.tolist())


def test_unusable_boxes_are_not_there() -> None:
    boxes, scores = crowd(40, 3)
    usable = torch.arange(40) % 4 != 0
    boxes[~usable] = torch.nan
    kept = torch.nonzero(usable).squeeze(1)
    order = kept[scores[kept].argsort(descending=True, stable=True)]
    expected = order[nms(boxes[order], scores[order], 0.5)]
    found = first_standing([Candidates(boxes, scores, usable, boxes, None, 40, 40, 0.5)])[0]
    assert found.rows[: int(found.kept)].tolist() == expected.tolist()
    nothing = first_standing([Candidates(boxes, scores, torch.zeros_like(usable), boxes, None, 40, 40, 0.5)])[0]
    assert int(nothing.kept) == 0


def chain() -> Candidates:
    """Thirty boxes of which each overlaps the next."""
    boxes = torch.stack([torch.tensor([3.0 * n, 0.0, 3.0 * n + 10, 10.0]) for n in range(30)])
    return Candidates(boxes, -torch.arange(30.0), torch.ones(30, dtype=torch.bool), boxes, None, 30, 30, 0.5)


def test_a_chain_longer_than_the_rounds_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = first_standing([chain()])
    assert bool(found.settled) and found.rows[: int(found.kept)].tolist() == list(range(0, 30, 2))
    boxes, scores = crowd(20, 0)
    short = Candidates(boxes, scores, torch.ones(20, dtype=torch.bool), boxes, None, 20, 20, 0.5)
    monkeypatch.setattr("uniter.extract.detector.fixed_size.ROUNDS", 12)
    assert [bool(one.settled) for one in first_standing([chain(), short])] == [False, True]


def test_blocks_and_batches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of unlike numbers of boxes together, and blocks of which some are not full."""
    images = []
    for count in (37, 150, 1):
        boxes, scores = crowd(count, count)
        images.append(Candidates(boxes, scores, torch.arange(count) % 7 != 3, boxes, torch.arange(count) % 2, 120, 60, 0.4))
    expected = [first_standing([image])[0] for image in images]
    monkeypatch.setattr("uniter.extract.detector.fixed_size.BLOCK", 16)
    for got, wanted in zip(first_standing(images), expected, strict=True):
        assert bool(got.settled) and int(got.kept) == int(wanted.kept) and torch.equal(got.rows, wanted.rows)


def test_vinvls_choice_of_classes_still_waits() -> None:
    """Whoever makes it wait no more may say so in `can_be_fixed`."""
    assert VinvlNetwork.described is not RegionNetwork.described
