"""VinVL's detector on stock Detectron2 against the golden arrays: preprocessing, network, proposals, all selection modes, attributes.

The folder that VINVL_GOLDEN names may hold another set of the same layout; images, widths, seed and counts come from its golden.json.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from uniter.datasets.errors import BadInput
from uniter.extract.detector.detectron import Detectron2Detector
from uniter.extract.detector.network import FeatureMaps, Places
from uniter.extract.detector.preparation import VinvlPreparation
from uniter.extract.detector.protocol import PreparedImage, RawRegions
from uniter.extract.detector.recipes import Recipe, vinvl_recipe
from uniter.extract.detector.vinvl import clipped, vinvl_config
from uniter.extract.detector.vinvl_selection import VINVL_MODES, Chosen, VinvlNetwork
from uniter.extract.select import RULES, keep_given, select_regions

GOLDEN = Path(os.environ.get("VINVL_GOLDEN", Path(__file__).resolve().parents[4] / "shared" / "golden" / "vinvl"))
if "VINVL_GOLDEN" not in os.environ and not GOLDEN.is_dir():
    pytest.skip(f"{GOLDEN} is absent; VINVL_GOLDEN names a folder of golden arrays", allow_module_level=True)

FACTS = json.loads((GOLDEN / "golden.json").read_text(encoding="utf-8"))
IMAGES = sorted(FACTS["images"])
MODES = {"peter": "vinvl", "fast": "vinvl-filter-2", "demo": "vinvl-regressed", "default": "vinvl-filter-0"}
THRESHOLD, LEAST, MOST = 0.2, 10, 100
Arrays = Mapping[str, NDArray[Any]]


def narrow(name: str) -> Recipe:
    arch = FACTS["arch"]
    depth = {(3, 4, 6): 50, (3, 4, 23): 101, (3, 8, 36): 152}[tuple(arch["blocks"])]
    config = vinvl_config(
        classes=arch["classes"] - 1, depth=depth, stem=arch["stem"], res2=arch["res2"], groups=arch["groups"], width=arch["width"]
    )
    return vinvl_recipe(name, config=config, attributes=arch["attributes"] - 1)


@pytest.fixture(scope="session")
def vinvl_generator() -> ModuleType:
    import importlib.util

    specification = importlib.util.spec_from_file_location("vinvl_generator", GOLDEN / "generator.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def state(vinvl_generator: ModuleType) -> dict[str, NDArray[np.float32]]:
    """The set's weights under their published names."""
    made: dict[str, NDArray[np.float32]] = vinvl_generator.make_state_dict(FACTS["seed"], FACTS["arch"], str(GOLDEN / "calib.npz"))
    assert vinvl_generator.digest(made) == FACTS["weights_sha256"]
    return made


@pytest.fixture(scope="session")
def weights(state: dict[str, NDArray[np.float32]], vinvl_generator: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as its trainer writes it, and the label map beside it."""
    folder = tmp_path_factory.mktemp("vinvl")
    form = vinvl_generator.to_checkpoint({name: torch.from_numpy(array) for name, array in state.items()}, True, True, True)
    torch.save({**form, "iteration": 7, "optimizer": {"state": {}}}, folder / "vinvl.pth")
    label_map = json.dumps(vinvl_generator.made_up_labelmap(FACTS["arch"]))
    (folder / "VG-SGG-dicts-vgoi6-clipped.json").write_text(label_map, encoding="utf-8")
    return folder / "vinvl.pth"


@pytest.fixture(scope="session")
def detector(weights: Path) -> Detectron2Detector:
    return Detectron2Detector(narrow("vinvl"), weights=str(weights), attributes=True)


@pytest.fixture
def network(detector: Detectron2Detector) -> VinvlNetwork:
    found = detector.network
    assert isinstance(found, VinvlNetwork)
    found.mode = VINVL_MODES["vinvl"]
    return found


@pytest.fixture(scope="session", params=IMAGES)
def image(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def golden(image: str) -> Arrays:
    return dict(np.load(GOLDEN / f"golden_{image}.npz"))


@pytest.fixture(scope="session")
def facts(image: str) -> dict[str, Any]:
    found: dict[str, Any] = FACTS["images"][image]
    return found


@pytest.fixture(scope="session")
def prepared(image: str) -> PreparedImage:
    return VinvlPreparation()(read(f"{image}.png"))


@pytest.fixture(scope="session")
def levels(detector: Detectron2Detector, prepared: PreparedImage) -> tuple[FeatureMaps, FeatureMaps]:
    network = detector.network
    with network.exact():
        return network.feature_maps([network.normalised(torch.from_numpy(prepared.pixels))])[0]


@pytest.fixture(scope="session")
def places(detector: Detectron2Detector, levels: tuple[FeatureMaps, FeatureMaps], prepared: PreparedImage) -> Places:
    size = (prepared.pixels.shape[0], prepared.pixels.shape[1])
    with detector.network.exact():
        boxes, _ = detector.network.proposals(*levels, size, prepared.scale[0])
    factors = torch.tensor(prepared.scale * 2)
    return Places(boxes, boxes / factors, factors, size, False)


@pytest.fixture(scope="session")
def features(detector: Detectron2Detector, levels: tuple[FeatureMaps, FeatureMaps], places: Places) -> Tensor:
    with detector.network.exact():
        return detector.network.region_features(levels[0], places.in_network)


def read(name: str) -> NDArray[np.uint8]:
    picture = cv2.imread(str(GOLDEN / name))
    assert picture is not None
    return np.asarray(picture, dtype=np.uint8)


def difference(got: NDArray[Any] | Tensor, expected: NDArray[Any]) -> float:
    array = np.asarray(got)
    assert array.shape == expected.shape
    return float(np.abs(array.astype(np.float64) - expected).max()) if array.size else 0.0


def close_checksums(map_: Tensor, expected: list[float]) -> None:
    exact = map_.double()
    got = [float(exact.sum()), float(exact.abs().sum()), float(exact.square().sum())]
    assert got == pytest.approx(expected, rel=1e-5)


def best_attributes(shares: NDArray[np.floating], most: int = 16, threshold: float = 0.05) -> tuple[NDArray[np.intp], NDArray[np.floating]]:
    """The reference's rule: "no attribute" and what is at or below the threshold become 0; the largest follow, with their labels."""
    scores = np.where(shares <= threshold, 0, shares)
    scores[:, 0] = 0
    order = np.argsort(-scores, axis=1, kind="stable")[:, :most]
    return order, np.take_along_axis(scores, order, axis=1)


def check_attributes(shares: NDArray[np.floating], labels: NDArray[Any], scores: NDArray[Any]) -> None:
    got_labels, got_scores = best_attributes(shares, most=labels.shape[1])
    assert difference(got_scores, scores) <= 2e-4
    seen = scores > 0
    assert np.array_equal(got_labels[seen], labels[seen])


# Weights, in every form that a file may have


@pytest.mark.parametrize("shared", ["box", "attribute", "both"])
@pytest.mark.parametrize("ddp", [False, True])
@pytest.mark.parametrize("wrapper", [False, True])
def test_golden_vinvl_weights_are_the_same_in_every_form(
    wrapper: bool,
    ddp: bool,
    shared: str,
    state: dict[str, NDArray[np.float32]],
    vinvl_generator: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from uniter.extract.weights import load_weight_file
    from uniter.extract.weights.layouts import to_detectron2

    monkeypatch.setenv("UNITER_CACHE", str(tmp_path / "cache"))
    plain = {name: torch.from_numpy(array) for name, array in state.items()}
    if shared == "attribute":
        plain = {name.replace("roi_heads.box.feature_extractor.", "attribute.feature_extractor."): tensor for name, tensor in plain.items()}
    torch.save(vinvl_generator.to_checkpoint(plain, wrapper, ddp, shared == "both"), tmp_path / "vinvl.pth")
    loaded = load_weight_file(tmp_path / "vinvl.pth")
    expected, layout = to_detectron2({name: torch.from_numpy(array) for name, array in state.items()})
    assert loaded.layout == layout == "vinvl" and loaded.tensors.keys() == expected.keys()
    assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in expected.items())
    shutil.rmtree(tmp_path)  # a set of the full width takes gigabytes


def test_golden_vinvl_weights_of_another_width_are_refused(weights: Path) -> None:
    wider = narrow("vinvl").config.clone()
    wider.MODEL.RESNETS.STEM_OUT_CHANNELS *= 2
    with pytest.raises(BadInput, match=r"these weights are of another detector than 'vinvl' \(backbone.* is expected\)"):
        Detectron2Detector(vinvl_recipe(config=wider, attributes=FACTS["arch"]["attributes"] - 1), weights=str(weights))


def test_golden_vinvl_names_come_from_the_label_map(detector: Detectron2Detector, vinvl_generator: ModuleType) -> None:
    made = vinvl_generator.made_up_labelmap(FACTS["arch"])
    assert detector.class_names == tuple(sorted(made["label_to_idx"], key=made["label_to_idx"].get))
    assert detector.attribute_names == tuple(sorted(made["attribute_to_idx"], key=made["attribute_to_idx"].get))
    assert detector.settings()["anchors"]["origin"] == "weights"


# Preprocessing and network


def test_golden_vinvl_preprocessing(
    detector: Detectron2Detector, prepared: PreparedImage, golden: Arrays, facts: dict[str, Any], image: str
) -> None:
    assert list(prepared.pixels.shape[1::-1]) == facts["net"]
    assert np.array_equal(prepared.pixels, read(f"{image}_net.png"))
    normalised = detector.network.normalised(torch.from_numpy(prepared.pixels))
    assert difference(normalised[:, 5::40, 3::40], golden["input"]) <= 1e-4
    close_checksums(normalised, facts["input_checks"])


def test_golden_vinvl_maps_and_rpn(levels: tuple[FeatureMaps, FeatureMaps], golden: Arrays, facts: dict[str, Any]) -> None:
    maps, answers = levels
    res4 = maps["res4"][0]
    assert list(res4.shape) == facts["c4_shape"]
    close_checksums(res4, facts["c4_checks"])
    assert difference(res4.mean(dim=(1, 2)), golden["c4_chmean"]) <= 1e-4
    assert difference(res4[::17, 2::9, 3::9], golden["c4_slice"]) <= 1e-3
    assert difference(answers["logits0"][0, :, 2::9, 3::9], golden["rpn_logit_slice"]) <= 1e-3
    assert difference(answers["deltas0"][0, :, 2::9, 3::9], golden["rpn_delta_slice"]) <= 1e-4


def test_golden_vinvl_proposals(
    network: VinvlNetwork, levels: tuple[FeatureMaps, FeatureMaps], places: Places, prepared: PreparedImage, golden: Arrays
) -> None:
    with network.exact():
        _, logits = network.proposals(*levels, places.size, prepared.scale[0])
    boxes, count = np.asarray(places.in_network), len(golden["proposals"])
    assert len(boxes) == count
    same = np.abs(boxes - golden["proposals"]).max(axis=1) <= 0.01
    assert same.sum() >= count - 2
    assert difference(logits.sigmoid()[torch.from_numpy(same)], golden["prop_scores"][same]) <= 1e-4


# Heads, on the golden proposals


def test_golden_vinvl_heads(network: VinvlNetwork, levels: tuple[FeatureMaps, FeatureMaps], golden: Arrays, facts: dict[str, Any]) -> None:
    boxes = torch.from_numpy(golden["proposals"])
    with network.exact():
        pooled = network.pooled(levels[0], boxes)
        close_checksums(pooled, facts["pool_checks"])
        assert difference(pooled[:24:3, 5::31, ::3, ::3], golden["pool_slice"]) <= 1e-3
        features = network.region_features(levels[0], boxes)
        assert difference(features, golden["prop_feat"]) <= 2e-3
        logits = network.class_logits(features)
        deltas = network.predictor.bbox_pred(features).view(len(boxes), -1, 4)
    step = len(boxes) // len(golden["cls_logits_12"])
    background_first = torch.cat([logits[:, -1:], logits[:, :-1]], dim=1)
    assert difference(background_first[::step], golden["cls_logits_12"]) <= 1e-3
    # Class 0, the background, has none here; class k of the reference is row k - 1.
    assert difference(deltas[::step, 99::100], golden["deltas_12"][:, 1:]) <= 1e-3
    shares = background_first.softmax(dim=1)
    best = shares[:, 1:].max(dim=1)
    assert np.array_equal(background_first.argmax(dim=1), golden["prop_argmax"])
    assert np.array_equal(best.indices + 1, golden["prop_fg_label"])
    assert difference(best.values, golden["prop_fg_score"]) <= 2e-4 and difference(shares[:, 0], golden["prop_bg_score"]) <= 2e-4


@pytest.mark.parametrize("mode", MODES)
def test_golden_vinvl_selection(
    mode: str, network: VinvlNetwork, levels: tuple[FeatureMaps, FeatureMaps], places: Places, features: Tensor, golden: Arrays
) -> None:
    network.mode = VINVL_MODES[MODES[mode]]
    with network.exact():
        shares = network.scores(features)[0]
        chosen = network.chosen(features, shares[:, 1:], places)
    for suffix, threshold in (("", THRESHOLD), ("_t001", 0.01), ("_t090", 0.9)):
        kept = kept_rows(mode, chosen, threshold)
        assert np.array_equal(chosen.rows[kept], golden[f"{mode}{suffix}_keep"]), suffix
        assert np.array_equal(chosen.labels[kept] + 1, golden[f"{mode}{suffix}_labels"]), suffix
    kept = kept_rows(mode, chosen, THRESHOLD)
    assert difference(chosen.confidence[kept], golden[f"{mode}_scores"]) <= 2e-4
    assert difference(chosen.boxes[kept], golden[f"{mode}_boxes_net"]) <= 0.01
    assert difference(chosen.boxes[kept] / places.factors, golden[f"{mode}_boxes"]) <= 0.01
    with network.exact():
        seen = network.region_features(levels[0], chosen.boxes[kept])
        logits = network.attribute_logits(seen, chosen.labels[kept])
        hidden = network.predictor.fc_attr(torch.cat([seen, network.predictor.cls_embedding(chosen.labels[kept])], dim=1)).relu()
    if f"{mode}_attr_logits" in golden:
        wanted = golden[f"{mode}_attr_logits"]
        assert difference(torch.cat([logits[:, -1:], logits[:, :-1]], dim=1)[: len(wanted)], wanted) <= 2e-3
        assert difference(hidden.norm(dim=1), golden[f"{mode}_attr_feature_norm"]) <= 2e-3


def kept_rows(mode: str, chosen: Chosen, threshold: float) -> NDArray[np.integer]:
    """The kept rows in the reference's order: by score, but class by class where each class has boxes of its own."""
    kept = RULES[VINVL_MODES[MODES[mode]].rule].keep(np.asarray(chosen.confidence), LEAST, MOST, threshold)
    if mode == "default":
        kept = kept[np.argsort(np.asarray(chosen.labels)[kept], kind="stable")]
    return kept


@pytest.mark.parametrize("mode", MODES)
def test_golden_vinvl_regions_of_the_detector(
    mode: str, detector: Detectron2Detector, network: VinvlNetwork, prepared: PreparedImage, golden: Arrays, facts: dict[str, Any]
) -> None:
    network.mode = VINVL_MODES[MODES[mode]]
    found = detector.detect([prepared])[0]
    kept = select_regions(found, size=prepared.size, min_boxes=LEAST, max_boxes=MOST, conf_threshold=THRESHOLD, rule=network.mode.rule)
    assert len(kept) == len(golden[f"{mode}_keep"]) == facts["counts"][mode]
    order = np.argsort(-golden[f"{mode}_scores"], kind="stable")
    assert difference(np.asarray(kept.conf), golden[f"{mode}_scores"][order]) <= 2e-4
    assert kept.boxes is not None and kept.attributes is not None
    assert difference(np.asarray(kept.boxes), golden[f"{mode}_boxes"][order]) <= 0.01
    assert difference(np.asarray(kept.features), golden["prop_feat"][golden[f"{mode}_keep"][order]]) <= 2e-3
    check_attributes(np.asarray(kept.attributes), golden[f"{mode}_attr_labels"][order], golden[f"{mode}_attr_scores"][order])


# Given boxes


def test_golden_vinvl_given_boxes(
    detector: Detectron2Detector, network: VinvlNetwork, levels: tuple[FeatureMaps, FeatureMaps], prepared: PreparedImage, golden: Arrays
) -> None:
    size = (prepared.pixels.shape[0], prepared.pixels.shape[1])
    boxes = torch.from_numpy(golden["given_boxes"])
    with network.exact():
        assert difference(network.pooled(levels[0], boxes)[:, 5::31, ::3, ::3], golden["given_pool"]) <= 1e-3
        moved = network.predictor.bbox_pred(torch.from_numpy(golden["given_feat"])).view(len(boxes), -1, 4)
        assert difference(moved[:, 99::100], golden["given_deltas"][:, 1:]) <= 1e-3
        from uniter.extract.detector.vinvl import decoded

        rows, labels = torch.arange(len(boxes)), torch.from_numpy(golden["given_labels"].astype(np.int64)) - 1
        assert difference(decoded(boxes, moved[rows, labels], (10.0, 10.0, 5.0, 5.0)), golden["given_decoded"]) <= 0.01
        assert difference(clipped(boxes, size), golden["given_boxes_out"]) <= 0.01
    in_image = golden["given_boxes"] / np.asarray(prepared.scale * 2, dtype=np.float32)
    found = detector.detect([prepared], boxes=[in_image])[0]
    assert difference(found.features, golden["given_feat"]) <= 2e-3
    logits = golden["given_cls_logits"].astype(np.float64)
    assert difference(np.log(found.probabilities) - np.log(found.probabilities[:, :1]), logits - logits[:, :1]) <= 2e-3
    assert np.array_equal(found.probabilities[:, 1:].argmax(axis=1) + 1, golden["given_labels"])
    assert difference(np.asarray(keep_given(found, size=prepared.size).conf), golden["given_scores"]) <= 2e-4
    assert found.attributes is not None
    check_attributes(found.attributes, golden["given_attr_labels"], golden["given_attr_scores"])
    attribute_logits = golden["given_attr_logits"].astype(np.float64)
    assert difference(np.log(found.attributes) - np.log(found.attributes[:, :1]), attribute_logits - attribute_logits[:, :1]) <= 4e-3


# Batches


def test_golden_vinvl_batches_give_what_each_image_gives_alone(detector: Detectron2Detector, network: VinvlNetwork) -> None:
    images = [detector.prepare(read(f"{name}.png")) for name in IMAGES]
    together = detector.detect(images)
    for one, found in zip(images, together, strict=True):
        same_regions(found, detector.detect([one])[0])


def same_regions(found: RawRegions, expected: RawRegions) -> None:
    same = np.abs(found.boxes - expected.boxes).max(axis=1) <= 0.01
    assert same.sum() >= len(same) - 2
    for got, wanted in ((found.features, expected.features), (found.probabilities, expected.probabilities)):
        assert difference(got[same], wanted[same]) <= 2e-3
