"""Bottom-Up-Attention on stock Detectron2 against the golden arrays: preprocessing, network, proposals, selection, whole records.

The folder that BUTD_GOLDEN names may hold another set of the same layout; images, seed and calibration come from its golden.json.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import nms

from uniter.extract.detector.detectron import Detectron2Detector
from uniter.extract.detector.network import FeatureMaps, RegionNetwork
from uniter.extract.detector.preparation import CAFFE_MEAN_BGR, CaffePreparation, ShortestEdgePreparation
from uniter.extract.detector.protocol import PreparedImage, RawRegions
from uniter.extract.select import class_confidences, select_regions

GOLDEN = Path(os.environ.get("BUTD_GOLDEN", Path(__file__).parents[2] / "golden" / "butd"))
FACTS = json.loads((GOLDEN / "golden.json").read_text(encoding="utf-8"))
IMAGES = sorted(Path(name).stem for name in FACTS["images"])
# A pass over all proposals takes seconds: by default on the first image, the others are slow. Whole records are checked on all.
FIRST_IMAGE_BY_DEFAULT = pytest.mark.parametrize(
    "image", [IMAGES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in IMAGES[1:])], indirect=True, scope="session"
)
MEAN = np.array(CAFFE_MEAN_BGR, dtype=np.float32)
Arrays = Mapping[str, NDArray[Any]]


@pytest.fixture(scope="session")
def state(generator: ModuleType) -> dict[str, NDArray[np.float32]]:
    """The set's weights in Detectron2's names."""
    made: dict[str, NDArray[np.float32]] = generator.make_state_dict(FACTS["seed"], str(GOLDEN / FACTS["calib"]))
    return made


@pytest.fixture(scope="session")
def detector(state: dict[str, NDArray[np.float32]], tmp_path_factory: pytest.TempPathFactory) -> Detectron2Detector:
    folder = tmp_path_factory.mktemp("weights")
    save_file({name: torch.from_numpy(array) for name, array in state.items()}, folder / "butd.safetensors")
    return Detectron2Detector("butd", weights=str(folder / "butd.safetensors"), attributes=True)


@pytest.fixture(scope="session")
def network(detector: Detectron2Detector) -> RegionNetwork:
    return detector.network


@pytest.fixture(scope="session", params=IMAGES)
def image(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def golden(image: str) -> Arrays:
    return dict(np.load(GOLDEN / f"golden_{image}.npz"))


@pytest.fixture(scope="session")
def facts(image: str) -> dict[str, Any]:
    found: dict[str, Any] = FACTS["images"][f"{image}.png"]
    return found


@pytest.fixture(scope="session")
def raw(image: str) -> NDArray[np.uint8]:
    return read(f"{image}.png")


@pytest.fixture(scope="session")
def levels(network: RegionNetwork, image: str) -> tuple[FeatureMaps, FeatureMaps]:
    """Feature maps and the RPN's answers for the exact network input."""
    with network.exact():
        return network.feature_maps([network.normalised(torch.from_numpy(network_input(image)))])[0]


@pytest.fixture(scope="session")
def raw_regions(detector: Detectron2Detector, raw: NDArray[np.uint8]) -> RawRegions:
    return detector.detect([detector.prepare(raw)])[0]


def read(name: str) -> NDArray[np.uint8]:
    image = cv2.imread(str(GOLDEN / name), cv2.IMREAD_COLOR)
    assert image is not None
    return np.asarray(image, dtype=np.uint8)


def network_input(image: str) -> NDArray[np.float32]:
    return read(f"{image}_net.png").astype(np.float32) - MEAN


def sampled(pixels: NDArray[np.floating]) -> NDArray[np.floating]:
    return pixels.transpose(2, 0, 1)[:, 5::40, 3::40]


def largest_difference(got: NDArray[Any] | Tensor, expected: NDArray[Any]) -> float:
    return float(np.abs(np.asarray(got, dtype=np.float64) - expected).max())


def close_checksums(map_: Tensor, expected: list[float]) -> None:
    values = map_.double()
    sums = [float(values.sum()), float(values.abs().sum()), float((values**2).sum())]
    # The plain sum cancels, so its error is measured by the sum of the absolute values.
    for got, wanted, unit in zip(sums, expected, (expected[1], expected[1], expected[2]), strict=True):
        assert abs(got - wanted) <= 1e-5 * abs(unit)


def matched(boxes: NDArray[Any] | Tensor, expected: NDArray[Any], tolerance: float) -> int:
    """How many expected boxes have one within the tolerance."""
    distance = np.abs(np.asarray(boxes)[None] - expected[:, None]).max(axis=2).min(axis=1)
    return int((distance <= tolerance).sum())


# Preprocessing


def test_golden_preprocessing_of_caffe(raw: NDArray[np.uint8], golden: Arrays, facts: dict[str, Any]) -> None:
    prepared = CaffePreparation()(raw)
    assert list(prepared.pixels.shape[:2]) == facts["caffe_hw"] and prepared.scale[0] == pytest.approx(facts["caffe_scale"])
    assert largest_difference(sampled(prepared.pixels), golden["pre_caffe"]) <= 1e-3


def test_golden_preprocessing_of_detectron2(raw: NDArray[np.uint8], golden: Arrays, facts: dict[str, Any], image: str) -> None:
    prepared = ShortestEdgePreparation(600, 1000)(raw)
    assert list(prepared.pixels.shape[:2]) == facts["net_hw"]
    assert largest_difference(sampled(prepared.pixels.astype(np.float32) - MEAN), golden["pre_d2"]) <= 1 + 1e-3
    assert np.abs(prepared.pixels.astype(int) - read(f"{image}_net.png")).max() <= 1


def test_golden_preprocessing_of_hugging_face(raw: NDArray[np.uint8], golden: Arrays, facts: dict[str, Any]) -> None:
    height, width = ShortestEdgePreparation(600, 1000).network_size(*raw.shape[:2])
    assert [height, width] == facts["hf_hw"]
    chw = torch.from_numpy(raw.transpose(2, 0, 1).astype(np.float32))[None]
    resized = F.interpolate(chw, (height, width), mode="bilinear", align_corners=False)[0].permute(1, 2, 0).numpy()
    assert largest_difference(sampled(resized - MEAN), golden["pre_hf"]) <= 1e-3


# Network


def test_golden_feature_map_and_rpn(levels: tuple[FeatureMaps, FeatureMaps], golden: Arrays, facts: dict[str, Any]) -> None:
    maps, answers = levels
    res4 = maps["res4"]
    assert list(res4.shape) == facts["res4_shape"]
    assert largest_difference(res4[0].mean(dim=(1, 2)), golden["res4_chmean"]) <= 1e-4
    assert largest_difference(res4[0, ::61, 2::9, 3::9], golden["res4_slice"]) <= 1e-3
    assert largest_difference(answers["logits0"][0, :, 2::9, 3::9], golden["rpn_logit_slice"]) <= 1e-3
    assert largest_difference(answers["deltas0"][0, :, 2::9, 3::9], golden["rpn_delta_slice"]) <= 1e-3
    close_checksums(res4, facts["res4_check"])
    close_checksums(answers["logits0"], facts["rpn_logit_check"])
    close_checksums(answers["deltas0"], facts["rpn_delta_check"])


def test_golden_given_boxes(network: RegionNetwork, levels: tuple[FeatureMaps, FeatureMaps], golden: Arrays) -> None:
    with network.exact():
        boxes = torch.from_numpy(golden["given_boxes"])
        pooled = network.pooled(levels[0], boxes)
        features = network.region_features(levels[0], boxes)
        logits = network.class_logits(features)
        attributes = network.attribute_logits(features, logits.argmax(dim=1))
        deltas = network.predictor.bbox_pred(features).reshape(len(boxes), -1, 4)[:, ::100][:, :16]
    assert largest_difference(pooled[:, 5:1024:255, ::3, ::3], golden["given_pool"]) <= 1e-3
    assert largest_difference(features, golden["given_feat"]) <= 1e-3
    assert largest_difference(logits, golden["given_cls_logits"]) <= 5e-3
    assert largest_difference(attributes, golden["given_attr_logits"]) <= 5e-3
    assert largest_difference(deltas, golden["given_delta"]) <= 5e-3


def test_golden_given_boxes_through_detect_keep_their_order(detector: Detectron2Detector, image: str, golden: Arrays) -> None:
    scale = float(FACTS["images"][f"{image}.png"]["caffe_scale"])
    height, width = FACTS["images"][f"{image}.png"]["raw_hw"]
    prepared = PreparedImage(network_input(image), (scale, scale), (height, width))
    boxes = (golden["given_boxes"] / np.float32(scale)).astype(np.float32)
    found = detector.detect([prepared], boxes=[boxes])[0]
    assert np.array_equal(found.boxes, boxes)
    # Boxes that went through image pixels may round to another cell at a cell's edge; the others agree.
    agree = np.abs(found.features - golden["given_feat"]).max(axis=1) <= 1e-3
    assert agree.sum() >= len(boxes) - 2
    expected = torch.from_numpy(golden["given_cls_logits"]).softmax(dim=1).numpy()
    assert largest_difference(found.probabilities[agree, 1:], expected[agree, :-1]) <= 1e-3
    assert largest_difference(found.probabilities[agree, 0], expected[agree, -1]) <= 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU here")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_record_on_a_gpu(precision: str, detector: Detectron2Detector, tmp_path: Path, state: dict[str, NDArray[np.float32]]) -> None:
    save_file({name: torch.from_numpy(array) for name, array in state.items()}, tmp_path / "butd.safetensors")
    on_gpu = Detectron2Detector("butd", weights=str(tmp_path / "butd.safetensors"), device="cuda", precision=precision, attributes=True)
    prepared = [on_gpu.prepare(read(f"{image}.png")) for image in IMAGES]
    for image, found, size in zip(IMAGES, on_gpu.detect(prepared), [one.size for one in prepared], strict=True):
        kept = select_regions(found, size=size, min_boxes=36, max_boxes=36)
        if precision == "fp32":
            check_record(kept, np.load(GOLDEN / f"record36_{image}.npz"))
        else:
            expected = detector.detect([detector.prepare(read(f"{image}.png"))])[0]
            assert matched(found.boxes, expected.boxes, 0.5) >= 0.95 * len(expected.boxes)
            assert np.isfinite(kept.features).all()


# Proposals


def test_golden_proposals_by_caffes_rule(
    network: RegionNetwork, levels: tuple[FeatureMaps, FeatureMaps], golden: Arrays, facts: dict[str, Any]
) -> None:
    with network.exact():
        boxes, logits = network.proposals(*levels, tuple(facts["net_hw"]), facts["caffe_scale"])
    assert len(boxes) == len(golden["caffe_rois"])
    assert matched(boxes, golden["caffe_rois"], 0.05) >= 0.98 * len(boxes)
    assert bool((logits.diff() <= 0).all())


def test_golden_proposals_by_detectron2s_rule(
    network: RegionNetwork, levels: tuple[FeatureMaps, FeatureMaps], golden: Arrays, facts: dict[str, Any]
) -> None:
    from detectron2.modeling.proposal_generator.rpn import RPN

    maps, answers = levels
    with network.exact():
        anchors = network.rpn.anchor_generator([maps["res4"]])
        logits = answers["logits0"].permute(0, 2, 3, 1).flatten(1)
        deltas = answers["deltas0"].permute(0, 2, 3, 1).reshape(1, -1, 4)
        found = RPN.predict_proposals(network.rpn, anchors, [logits], [deltas], [tuple(facts["net_hw"])])[0]
    assert matched(found.proposal_boxes.tensor, golden["d2_proposals"], 0.05) >= 0.98 * len(golden["d2_proposals"])


# Heads and selection on the golden proposals


@FIRST_IMAGE_BY_DEFAULT
def test_golden_heads_on_all_proposals(
    network: RegionNetwork, levels: tuple[FeatureMaps, FeatureMaps], golden: Arrays, facts: dict[str, Any], image: str
) -> None:
    with network.exact():
        proposals = torch.from_numpy(golden["d2_proposals"])
        features = network.region_features(levels[0], proposals)
        logits = network.class_logits(features)
        attributes = network.attribute_logits(features, logits.argmax(dim=1))
        deltas = network.predictor.bbox_pred(features).reshape(len(features), -1, 4)
    required = len(proposals) - 1
    assert int((logits.argmax(dim=1).numpy() == golden["d2_argmax1601"]).sum()) >= required
    assert int((attributes.argmax(dim=1).numpy() == golden["d2_attr_argmax"]).sum()) >= required
    assert largest_difference(features.norm(dim=1), golden["d2_feat_norm"]) <= 1e-2
    shares = logits.softmax(dim=1)[:, :-1]
    assert largest_difference(shares.max(dim=1).values, golden["d2_fgmax"]) <= 1e-3
    hugging_face_selection(proposals, features, shares, deltas, golden, facts)


def hugging_face_selection(
    proposals: Tensor, features: Tensor, shares: Tensor, deltas: Tensor, golden: Arrays, facts: dict[str, Any]
) -> None:
    """Arg-max class's regressed box, class-agnostic suppression at .3, .4 ... until 36: kept as a witness that regression is right."""
    best, classes = shares.max(dim=1)
    chosen = deltas[torch.arange(len(deltas)), classes] / torch.tensor([10.0, 10.0, 5.0, 5.0])
    size = proposals[:, 2:] - proposals[:, :2]
    centre = proposals[:, :2] + size / 2 + chosen[:, :2] * size
    half = chosen[:, 2:].clamp(max=float(np.log(1000 / 16))).exp() * size / 2
    height, width = facts["net_hw"]
    limit = torch.tensor([width, height, width, height], dtype=torch.float32)
    boxes = torch.minimum(torch.cat([centre - half, centre + half], dim=1).clamp(min=0), limit)
    kept = torch.zeros(0)
    for threshold in np.arange(0.3, 1.0, 0.1):
        kept = nms(boxes, best, float(threshold))[:36]
        if len(kept) >= 36:
            break
    assert set(kept.tolist()) == set(golden["hf36_keep"].tolist())
    place = {index: row for row, index in enumerate(kept.tolist())}
    rows = [place[index] for index in golden["hf36_keep"].tolist()]
    raw_height, raw_width = facts["raw_hw"]
    to_raw = torch.tensor([raw_width / width, raw_height / height] * 2, dtype=torch.float32)
    assert largest_difference((boxes * to_raw)[kept][rows], golden["hf36_boxes"]) <= 0.05
    assert largest_difference(best[kept][rows], golden["hf36_prob"]) <= 1e-3
    assert np.array_equal(classes[kept][rows].numpy(), golden["hf36_cls"])
    assert largest_difference(features[kept][rows][:8], golden["hf36_feat8"]) <= 1e-3


@FIRST_IMAGE_BY_DEFAULT
def test_golden_caffe_selection(
    network: RegionNetwork, levels: tuple[FeatureMaps, FeatureMaps], golden: Arrays, facts: dict[str, Any]
) -> None:
    with network.exact():
        rois = torch.from_numpy(golden["caffe_rois"])
        features = network.region_features(levels[0], rois)
        shares, _ = network.scores(features)
    assert largest_difference(features.norm(dim=1), golden["caffe_feat_norm"]) <= 1e-2
    boxes = (golden["caffe_rois"] / np.float32(facts["caffe_scale"])).astype(np.float32)
    raw = RawRegions(boxes, features.numpy(), shares.numpy())
    confidence = class_confidences(boxes, raw.probabilities[:, 1:])
    height, width = facts["raw_hw"]
    for name, least, most in (("caffe10_100", 10, 100), ("caffe36_36", 36, 36)):
        kept = select_regions(raw, size=(height, width), min_boxes=least, max_boxes=most)
        rows = {box.tobytes(): row for row, box in enumerate(boxes)}
        assert kept.boxes is not None and kept.boxes.dtype == np.float32
        assert {rows[box.tobytes()] for box in np.asarray(kept.boxes, dtype=np.float32)} == set(golden[f"{name}_keep"].tolist())
        assert largest_difference(confidence[golden[f"{name}_keep"]], golden[f"{name}_conf"]) <= 1e-3
        assert largest_difference(boxes[golden[f"{name}_keep"]], golden[f"{name}_boxes"]) <= 0.05
        assert bool((np.diff(kept.conf) <= 0).all())
    best = raw.probabilities[golden["caffe36_36_keep"], 1:].argmax(axis=1)
    assert int((best == golden["caffe36_obj"]).sum()) >= len(best) - 1


# Whole records


@pytest.mark.parametrize(("name", "least", "most"), [("record36", 36, 36), ("record10_100", 10, 100)])
def test_golden_records_end_to_end(raw_regions: RawRegions, raw: NDArray[np.uint8], image: str, name: str, least: int, most: int) -> None:
    kept = select_regions(raw_regions, size=(raw.shape[0], raw.shape[1]), min_boxes=least, max_boxes=most)
    check_record(kept, np.load(GOLDEN / f"{name}_{image}.npz"))


@pytest.mark.slow
def test_golden_records_from_one_batch_of_mixed_sizes(detector: Detectron2Detector) -> None:
    prepared = [detector.prepare(read(f"{image}.png")) for image in IMAGES]
    for image, one, found in zip(IMAGES, prepared, detector.detect(prepared), strict=True):
        for name, least, most in (("record36", 36, 36), ("record10_100", 10, 100)):
            kept = select_regions(found, size=one.size, min_boxes=least, max_boxes=most)
            check_record(kept, np.load(GOLDEN / f"{name}_{image}.npz"))


def test_golden_uniter_file_from_the_network_input(detector: Detectron2Detector) -> None:
    files = sorted(GOLDEN.glob("uniter36_*.npz"))
    assert files
    for file in files:
        image = file.stem.removeprefix("uniter36_")
        facts = FACTS["images"][f"{image}.png"]
        scale = float(facts["caffe_scale"])
        prepared = PreparedImage(network_input(image), (scale, scale), tuple(facts["raw_hw"]))
        kept = select_regions(detector.detect([prepared])[0], size=prepared.size, min_boxes=36, max_boxes=36)
        check_record(kept, np.load(file), features=4e-3, confidences=2e-3)


def check_record(kept: Any, expected: Any, *, features: float = 6e-3, confidences: float = 3e-3) -> None:
    """Rows matched by box, then values within the set's tolerances for float16 files."""
    wanted = expected["norm_bb"].astype(np.float32)
    distance = np.abs(np.asarray(kept.norm_bb)[None] - wanted[:, None]).max(axis=2)
    rows, found = np.arange(len(wanted)), distance.argmin(axis=1)
    good = distance[rows, found] <= 1e-3
    assert abs(len(kept) - len(wanted)) <= 1 and good.sum() >= len(wanted) - 1
    rows, found = rows[good], found[good]
    assert len(set(found.tolist())) == len(found)
    assert largest_difference(np.asarray(kept.features)[found], expected["features"][rows].astype(np.float32)) <= features
    assert largest_difference(np.asarray(kept.conf)[found], expected["conf"][rows, 0].astype(np.float32)) <= confidences
    assert largest_difference(np.asarray(kept.soft_labels)[found], expected["soft_labels"][rows].astype(np.float32)) <= confidences


# The golden weights in every layout that the generator makes


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["pickle", "huggingface", "huggingface-legacy", "milvlg", "caffemodel"])
def test_golden_records_from_every_weight_layout(
    layout: str,
    state: dict[str, NDArray[np.float32]],
    generator: ModuleType,
    writer: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import pickle

    monkeypatch.setenv("UNITER_CACHE", str(tmp_path / "cache"))

    def tensors(arrays: Mapping[str, Any]) -> dict[str, Tensor]:
        return {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()}

    file = tmp_path / "weights.dat"
    if layout == "pickle":
        file.write_bytes(pickle.dumps({"model": state, "__author__": "golden"}, protocol=2))
    elif layout == "milvlg":
        torch.save({"model": tensors(generator.to_milvlg(state))}, file)
    elif layout == "caffemodel":
        file.write_bytes(writer.caffemodel_of(state))
    else:
        torch.save(tensors(generator.to_hf(state)), file, _use_new_zipfile_serialization=layout == "huggingface")
    loaded = Detectron2Detector("butd", weights=str(file))
    image = IMAGES[0]
    raw = read(f"{image}.png")
    found = loaded.detect([loaded.prepare(raw)])[0]
    for name, least, most in (("record36", 36, 36), ("record10_100", 10, 100)):
        kept = select_regions(found, size=(raw.shape[0], raw.shape[1]), min_boxes=least, max_boxes=most)
        check_record(kept, np.load(GOLDEN / f"{name}_{image}.npz"))
