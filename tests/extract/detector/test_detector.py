"""Detectors of every head: batches of mixed sizes equal single images, names and hostile configurations, given boxes, attributes."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray
from safetensors.torch import save_file

from uniter.datasets.errors import BadInput, UniterError
from uniter.extract.detector.configuration import merged_config, read_config
from uniter.extract.detector.detectron import Detectron2Detector
from uniter.extract.detector.preparation import CaffePreparation, ShortestEdgePreparation
from uniter.extract.detector.protocol import RawRegions, is_out_of_memory
from uniter.extract.detector.recipes import Recipe, find_recipe
from uniter.extract.select import select_regions
from uniter.extract.weights.load import load_known_weights

SIZES = [(96, 128), (131, 99), (64, 157), (96, 128)]


def narrow(config: Any, classes: int = 12) -> Any:
    """The same architecture with few and narrow layers."""
    config.defrost()
    resnets = config.MODEL.RESNETS
    resnets.DEPTH, resnets.STEM_OUT_CHANNELS, resnets.RES2_OUT_CHANNELS, resnets.WIDTH_PER_GROUP = 50, 8, 16, 4
    config.MODEL.FPN.OUT_CHANNELS, config.MODEL.ROI_BOX_HEAD.FC_DIM, config.MODEL.ROI_HEADS.NUM_CLASSES = 16, 24, classes
    config.MODEL.RPN.PRE_NMS_TOPK_TEST, config.MODEL.RPN.POST_NMS_TOPK_TEST = 400, 40
    return config


def small_recipe(name: str) -> Recipe:
    recipe = find_recipe(name)
    kind = CaffePreparation if isinstance(recipe.preparation, CaffePreparation) else ShortestEdgePreparation
    return dataclasses.replace(
        recipe,
        config=narrow(recipe.config),
        class_names=tuple(f"class {number}" for number in range(12)),
        attribute_names=("red", "round", "wet") if name.startswith("butd") else (),
        preparation=kind(96, 160),
    )


ZOO = "COCO-Detection/faster_rcnn_"
ARCHITECTURES = {
    "butd": 128,
    f"{ZOO}R_50_C4_1x": 128,
    f"{ZOO}R_50_DC5_1x": 24,
    f"{ZOO}R_50_FPN_1x": 24,
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x": 24,
}


def build(name: str, **arguments: Any) -> Detectron2Detector:
    return Detectron2Detector(small_recipe(name), weights="random:3", **arguments)


def pictures(sizes: Sequence[tuple[int, int]] = SIZES) -> list[NDArray[np.uint8]]:
    """Blotches with edges, one of each size."""
    made = []
    for number, (height, width) in enumerate(sizes):
        rng = np.random.default_rng(number)
        coarse = rng.integers(0, 256, (height // 9 + 1, width // 9 + 1, 3), dtype=np.uint8)
        made.append(np.ascontiguousarray(np.kron(coarse, np.ones((9, 9, 1), dtype=np.uint8))[:height, :width]))
    return made


@pytest.fixture(scope="module", params=ARCHITECTURES)
def detector(request: pytest.FixtureRequest) -> Detectron2Detector:
    made = build(request.param)
    assert made.feature_width == ARCHITECTURES[request.param]
    return made


def same(got: RawRegions, expected: RawRegions) -> None:
    assert got.boxes.shape == expected.boxes.shape
    np.testing.assert_allclose(got.boxes, expected.boxes, atol=2e-3)
    np.testing.assert_allclose(got.features, expected.features, atol=2e-4, rtol=1e-4)
    np.testing.assert_allclose(got.probabilities, expected.probabilities, atol=2e-4)


def test_a_batch_of_mixed_sizes_is_what_each_image_gives_alone(detector: Detectron2Detector) -> None:
    prepared = [detector.prepare(picture) for picture in pictures()]
    assert len({image.pixels.shape for image in prepared}) > 1 and detector.network.mixes_sizes
    together, alone = detector.detect(prepared), [detector.detect([image])[0] for image in prepared]
    for got, expected in zip(together, alone, strict=True):
        assert len(expected.boxes) > 3
        same(got, expected)


def test_feature_maps_of_a_batch_are_exact_up_to_rounding(detector: Detectron2Detector) -> None:
    network = detector.network
    inputs = [network.normalised(torch.from_numpy(detector.prepare(picture).pixels)) for picture in pictures()]
    with network.exact():
        together = network.feature_maps(inputs)
        for image, (maps, answers) in zip(inputs, together, strict=True):
            alone_maps, alone_answers = network.feature_maps([image])[0]
            for got, expected in ((maps, alone_maps), (answers, alone_answers)):
                assert set(got) == set(expected)
                for name in expected:
                    assert got[name].shape == expected[name].shape
                    torch.testing.assert_close(got[name], expected[name], atol=2e-5, rtol=1e-4)


def test_without_the_guard_the_batch_would_differ(detector: Detectron2Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    from uniter.extract.detector.extents import ValidExtents

    network = detector.network
    inputs = [network.normalised(torch.from_numpy(detector.prepare(picture).pixels)) for picture in pictures()]
    monkeypatch.setattr(ValidExtents, "clear_outside", lambda *_: None)
    with network.exact():
        together = [pair[0] for pair in network.feature_maps(inputs)]
        alone = [network.feature_maps([image])[0][0] for image in inputs]
    assert any(
        float((got[name] - expected[name]).abs().max()) > 1e-3 for got, expected in zip(together, alone, strict=True) for name in got
    )


def detectron2s_own(recipe: Recipe, state: dict[str, torch.Tensor] | None = None) -> Any:
    """Detectron2's model of a recipe, built afresh: nothing of it is folded, fused or taken from a detector of ours."""
    from detectron2.modeling import build_model

    config = recipe.config.clone()
    config.MODEL.DEVICE = "cpu"
    model = build_model(config).eval()
    if state is not None:
        model.load_state_dict(state, strict=True)
    return model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_stages_agree_with_detectron2s_own_inference(name: str, tmp_path: Path) -> None:
    """Detectron2's whole inference of single images, listened to where its proposals and its features come out."""
    from uniter.extract.weights.random import random_tensors

    recipe = small_recipe(name)
    state = random_tensors({name: tuple(tensor.shape) for name, tensor in detectron2s_own(recipe).state_dict().items()}, 5)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "w.safetensors")
    detector, model = Detectron2Detector(recipe, weights=str(tmp_path / "w.safetensors")), detectron2s_own(recipe, state)
    heard: dict[str, Any] = {}
    model.proposal_generator.register_forward_hook(lambda _, given, made: heard.update(proposals=made[0][0]))
    model.roi_heads.box_predictor.register_forward_hook(lambda _, given, made: heard.update(features=given[0], logits=made[0]))
    for picture in pictures()[:3]:
        image = detector.prepare(picture)
        pixels = torch.from_numpy(image.pixels).permute(2, 0, 1)
        if pixels.is_floating_point():  # ours were normalised on the host
            pixels = pixels * model.pixel_std + model.pixel_mean
        with torch.no_grad():
            model.inference([{"image": pixels}], do_postprocess=False)
        scale = np.array([*image.scale] * 2)
        boxes = heard["proposals"].proposal_boxes.tensor.numpy() / scale
        if not name.startswith("butd"):  # there it is not told the scale and keeps more proposals than ours
            found = detector.detect([image])[0].boxes
            assert len(found) == len(boxes) > 10
            np.testing.assert_allclose(found * scale, boxes * scale, atol=2e-3)
        ours = detector.detect([image], boxes=[boxes])[0]
        expected = heard["features"].numpy()
        assert np.abs(expected).mean() > 0.05 and len({row.tobytes() for row in expected}) > 3, "features that can tell a difference"
        np.testing.assert_allclose(ours.features, expected, atol=2e-4, rtol=1e-4)
        shares = heard["logits"].softmax(dim=1).numpy()
        np.testing.assert_allclose(ours.probabilities, np.concatenate([shares[:, -1:], shares[:, :-1]], axis=1), atol=2e-4)


def test_given_boxes_keep_their_order_and_number(detector: Detectron2Detector) -> None:
    images = [detector.prepare(picture) for picture in pictures()[:2]]
    boxes = [np.array([[5, 5, 60, 70], [0, 0, 128, 96], [5, 5, 60, 70]], dtype=np.float64), np.zeros((0, 4))]
    found = detector.detect(images, boxes=boxes)
    assert np.array_equal(found[0].boxes, boxes[0].astype(np.float32)) and found[1].features.shape == (0, detector.feature_width)
    assert np.array_equal(found[0].features[0], found[0].features[2])
    assert not np.allclose(found[0].features[0], found[0].features[1])
    with pytest.raises(ValueError, match="one each"):
        detector.detect(images, boxes=boxes[:1])
    with pytest.raises(BadInput, match="not finite"):
        detector.detect(images[:1], boxes=[np.array([[0, 0, np.nan, 1]])])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "width"),
    [
        *((f"{ZOO}{kind}", 2048) for kind in ("R_50_C4_1x", "R_50_C4_3x", "R_101_C4_3x")),
        *((f"{ZOO}{kind}", 1024) for kind in ("R_50_DC5_3x", "R_101_DC5_3x", "R_50_FPN_3x", "R_101_FPN_3x", "X_101_32x8d_FPN_3x")),
        ("PascalVOC-Detection/faster_rcnn_R_50_FPN", 1024),
        ("COCO-InstanceSegmentation/mask_rcnn_R_50_C4_3x", 2048),
    ],
)
def test_every_faster_rcnn_of_the_model_zoo_at_full_width(name: str, width: int) -> None:
    detector = Detectron2Detector(name, weights="random:1")
    small = ShortestEdgePreparation(96, 160, find_recipe(name).config.INPUT.FORMAT)
    found = detector.detect([small(picture) for picture in pictures()])
    assert detector.feature_width == width and len(detector.class_names) in (20, 80)
    for regions in found:
        assert len(regions.boxes) > 10 and regions.features.shape == (len(regions.boxes), width)
        assert regions.probabilities.shape == (len(regions.boxes), len(detector.class_names) + 1)
        assert np.isfinite(regions.features.astype(np.float16)).all()


def test_no_images_no_regions(detector: Detectron2Detector) -> None:
    assert detector.detect([]) == []


def test_layers_that_mix_positions_otherwise_run_size_by_size() -> None:
    recipe = small_recipe(f"{ZOO}R_50_FPN_1x")
    recipe.config.MODEL.FPN.NORM = "GN"
    recipe.config.MODEL.FPN.OUT_CHANNELS = 32
    detector = Detectron2Detector(recipe, weights="random:3")
    assert not detector.network.mixes_sizes
    prepared = [detector.prepare(picture) for picture in pictures()]
    for got, image in zip(detector.detect(prepared), prepared, strict=True):
        same(got, detector.detect([image])[0])


def test_class_agnostic_regression_and_grouped_convolutions() -> None:
    recipe = small_recipe(f"{ZOO}X_101_32x8d_FPN_3x")
    recipe.config.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = True
    recipe.config.MODEL.RESNETS.NUM_GROUPS, recipe.config.MODEL.RESNETS.WIDTH_PER_GROUP = 4, 2
    detector = Detectron2Detector(recipe, weights="random:3")
    prepared = [detector.prepare(picture) for picture in pictures()]
    for got, image in zip(detector.detect(prepared), prepared, strict=True):
        same(got, detector.detect([image])[0])


@pytest.mark.parametrize("head", ["C4", "DC5", "FPN"])
def test_other_backbones_and_heads_by_a_yaml(head: str, tmp_path: Path) -> None:
    """ResNet-101 and ResNeXt-101 with each kind of head as people write them: a YAML on top of the model zoo's, narrow here."""
    from detectron2 import model_zoo

    zoo = model_zoo.get_config_file(f"{ZOO}R_50_{head}_1x.yaml")
    width = {"C4": 128, "DC5": 24, "FPN": 24}[head]
    for name, groups, agnostic in (("R101", 1, False), ("X101", 4, True)):
        values = {
            "MODEL": {
                "RESNETS": {
                    **{"DEPTH": 101, "NUM_GROUPS": groups, "WIDTH_PER_GROUP": 4 // groups * 2, "STRIDE_IN_1X1": groups == 1},
                    **{"STEM_OUT_CHANNELS": 8, "RES2_OUT_CHANNELS": 16},
                },
                "FPN": {"OUT_CHANNELS": 16},
                "RPN": {"POST_NMS_TOPK_TEST": 30},
                "ROI_BOX_HEAD": {"CLS_AGNOSTIC_BBOX_REG": agnostic, "FC_DIM": 24},
                "ROI_HEADS": {"NUM_CLASSES": 12},
            },
            "INPUT": {"MIN_SIZE_TEST": 96, "MAX_SIZE_TEST": 160},
        }
        file = tmp_path / f"{name}.yaml"
        file.write_text(f"_BASE_: {zoo}\n{yaml.safe_dump(values)}")
        detector = Detectron2Detector(str(file), weights="random:3")
        predictor = detector.network.predictor
        assert (detector.name, detector.feature_width) == (name, width) and predictor.bbox_pred.out_features == (4 if agnostic else 48)
        prepared = [detector.prepare(picture) for picture in pictures()[:3]]
        for got, image in zip(detector.detect(prepared), prepared, strict=True):
            assert got.features.shape == (len(got.boxes), width) and got.probabilities.shape[1] == 13 and len(got.boxes) > 3
            same(got, detector.detect([image])[0])


def test_attributes_on_request() -> None:
    detector, plain = build("butd", attributes=True), build("butd")
    image = detector.prepare(pictures()[0])
    found, without = detector.detect([image])[0], plain.detect([image])[0]
    assert detector.attribute_names == ("red", "round", "wet") and plain.attribute_names == () and without.attributes is None
    assert found.attributes is not None and found.attributes.shape == (len(found.boxes), 4)
    np.testing.assert_allclose(found.attributes.sum(axis=1), 1, atol=1e-5)
    same(found, without)
    assert detector.settings()["attributes"] is True
    with pytest.raises(UniterError, match="knows no attributes"):
        build(f"{ZOO}R_50_C4_1x", attributes=True)


def test_lower_precision_stays_close_and_says_so() -> None:
    exact, half = build("butd"), build("butd", precision="bf16")
    image = exact.prepare(pictures()[0])
    first, second = exact.detect([image])[0], half.detect([image])[0]
    np.testing.assert_allclose(second.boxes, first.boxes, atol=2e-3)
    cosine = (
        (first.features * second.features).sum(axis=1) / np.linalg.norm(first.features, axis=1) / np.linalg.norm(second.features, axis=1)
    )
    assert cosine.min() > 0.999 and half.settings()["precision"] == "bf16" and second.features.dtype == np.float32
    with pytest.raises(UniterError, match="fp16 needs a GPU"):
        build("butd", precision="fp16")
    with pytest.raises(UniterError, match="did you mean 'bf16'"):
        build("butd", precision="bf61")
    with pytest.raises(UniterError, match=r"sees no GPU|no such device|only cpu and cuda"):
        build("butd", device="cuda" if not torch.cuda.is_available() else "xpu")


def test_random_regions_are_finite_in_float16_and_differ(detector: Detectron2Detector) -> None:
    found = detector.detect([detector.prepare(pictures()[0])])[0]
    assert np.isfinite(found.features.astype(np.float16)).all() and found.features.std(axis=0).max() > 0
    assert "RANDOM" in detector.settings()["weights"]["note"]
    json.dumps(detector.settings())


def test_an_image_narrower_than_the_smallest_proposal_still_has_regions() -> None:
    detector = build("butd")
    image = detector.prepare(pictures([(12, 40)])[0])
    found = detector.detect([image])[0]
    assert len(found.boxes) > 0 and len(select_regions(found, size=image.size)) > 0


@pytest.mark.parametrize("size", [(1, 1), (2, 400), (3000, 3), (40, 40)])
def test_strange_sizes_become_regions_or_a_sentence(detector: Detectron2Detector, size: tuple[int, int]) -> None:
    picture = np.full((*size, 3), 90, dtype=np.uint8)
    try:
        prepared = detector.prepare(picture)
    except BadInput as error:
        assert "elongated" in str(error)
        return
    found = detector.detect([prepared])[0]
    height, width = size
    assert np.isfinite(found.features).all() and (found.boxes <= np.array([width, height, width, height]) + 1e-3).all()


# Weights and detectors that do not fit each other


def state_of(detector: Detectron2Detector) -> dict[str, torch.Tensor]:
    """What a checkpoint of this detector would hold, its BatchNorm being folded into the biases."""
    from uniter.extract.weights.random import random_tensors

    del detector
    from detectron2.modeling import build_model

    config = small_recipe("butd").config
    config.MODEL.DEVICE = "cpu"
    return random_tensors({name: tuple(tensor.shape) for name, tensor in build_model(config).state_dict().items()}, 5)


@pytest.fixture(scope="module")
def butd_state() -> dict[str, torch.Tensor]:
    return state_of(build("butd"))


def load(state: dict[str, torch.Tensor], folder: Path, **arguments: Any) -> Detectron2Detector:
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "w.safetensors")
    return Detectron2Detector(small_recipe("butd"), weights=str(folder / "w.safetensors"), **arguments)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNITER_CACHE", str(tmp_path / "cache"))


def test_anchors_come_from_the_file_where_it_has_them_and_the_log_says_so(
    butd_state: dict[str, torch.Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    plain = load(butd_state, tmp_path)
    assert "Caffe's own (the weight file has none)" in caplog.text and plain.settings()["anchors"]["origin"] == "caffe"
    name = "proposal_generator.anchor_generator.cell_anchors.0"
    moved = torch.arange(48, dtype=torch.float32).reshape(12, 4)
    own = load({**butd_state, name: moved}, tmp_path)
    assert "anchors: from the weight file" in caplog.text and own.settings()["anchors"]["origin"] == "weights"
    (buffer,) = own.network.rpn.anchor_generator.cell_anchors.buffers()
    assert torch.equal(buffer, moved)
    with pytest.raises(BadInput, match="anchors are"):
        load({**butd_state, name: moved[:6]}, tmp_path)


def test_weights_of_another_detector_are_refused_in_words(butd_state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    score = "roi_heads.box_predictor.cls_score.weight"
    changes: list[tuple[Callable[[dict[str, torch.Tensor]], object], str]] = [
        (lambda state: state.pop("backbone.stem.conv1.weight"), r"backbone\.stem\.conv1\.weight missing"),
        (lambda state: state.update({score: torch.zeros(5, 128)}), r"cls_score\.weight is \(5, 128\) where \(13, 128\) is expected"),
        (lambda state: state.update({"backbone.fpn_lateral2.weight": torch.zeros(2)}), r"fpn_lateral2\.weight left over"),
    ]
    for change, words in changes:
        state = dict(butd_state)
        change(state)
        with pytest.raises(BadInput, match=words):
            load(state, tmp_path)
    with pytest.raises(BadInput, match="know no attributes"):
        load(butd_state, tmp_path, attributes=True)
    load({**butd_state, "pixel_mean": torch.zeros(3, 1, 1), "roi_heads.mask_head.a.weight": torch.zeros(3)}, tmp_path)


# Names and configurations


def test_unknown_names_answer_with_the_nearest_known_one() -> None:
    with pytest.raises(UniterError, match=r"unknown detector 'budt'; did you mean 'butd'"):
        find_recipe("budt")
    with pytest.raises(UniterError, match=r"did you mean 'COCO-Detection/faster_rcnn_R_50_FPN_3x'"):
        find_recipe("COCO-Detection/faster_rcnn_R50_FPN_3x")
    with pytest.raises(BadInput, match="RetinaNet"):
        find_recipe("COCO-Detection/retinanet_R_50_FPN_1x")
    with pytest.raises(BadInput, match="CascadeROIHeads"):
        find_recipe("Misc/cascade_mask_rcnn_R_50_FPN_3x")


def test_names_and_numbers_of_known_detectors() -> None:
    butd, fixed, coco = find_recipe("butd"), find_recipe("butd-36"), find_recipe(f"{ZOO}R_101_C4_3x")
    assert (butd.min_boxes, butd.max_boxes, fixed.min_boxes, fixed.max_boxes) == (10, 100, 36, 36)
    assert len(butd.class_names) == 1600 and len(butd.attribute_names) == 400 and len(butd.known_sources) > 1
    assert len(coco.class_names) == 80 and coco.class_names[0] == "person" and coco.weights is None
    assert len(coco.known_sources) == 1 and coco.known_sources[0].endswith(".pkl")
    assert find_recipe("PascalVOC-Detection/faster_rcnn_R_50_C4").class_names[0] == "aeroplane"


def test_a_zoo_detector_whose_weights_cannot_be_fetched_names_the_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(source: str) -> Path:
        raise UniterError(f"{source}: the server answers 403 Forbidden")

    monkeypatch.setattr("uniter.extract.weights.load.find_weight_file", gone)
    monkeypatch.setattr("uniter.extract.weights.load.silent_sources", lambda _: {})
    recipe = find_recipe(f"{ZOO}R_50_FPN_1x")
    with pytest.raises(
        UniterError, match=r"model_final_\w+\.pkl: the server answers 403 Forbidden\. What works now, .*on-board.*--weights FILE"
    ) as caught:
        load_known_weights(recipe.known_sources, detector=recipe.name)
    assert "`uniter-train detector`" in str(caught.value) and "\n" not in str(caught.value)


HOSTILE_YAML = {
    "object": "MODEL:\n  META_ARCHITECTURE: !!python/object/apply:os.system ['touch witness']\n",
    "new": "MODEL: !!python/object/new:os.system [touch witness]\n",
    "name": "OUTPUT_DIR: !!python/name:os.system\n",
    "base with code": "_BASE_: code.yaml\n",
    "itself": "_BASE_: hostile.yaml\n",
    "nested aliases": "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40)),
    "contains itself": "a: &a [*a]\n",
    "no mapping": "- 1\n- 2\n",
    "no yaml": "{unclosed: [",
    "remote base": "_BASE_: https://example.org/a.yaml\n",
    "unknown setting": "MODEL:\n  NO_SUCH_THING: 1\n",
    "wrong type": "MODEL:\n  RPN: 7\n",
    "not text": "\x00\x01",
}


@pytest.mark.parametrize("name", HOSTILE_YAML)
def test_a_configuration_executes_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "code.yaml").write_text("x: !!python/object/apply:os.system ['touch witness']\n")
    file = tmp_path / "hostile.yaml"
    file.write_text(HOSTILE_YAML[name])
    with pytest.raises(BadInput, match=r"\.yaml"):
        find_recipe(str(file))
    assert not (tmp_path / "witness").exists()


def test_a_yaml_builds_on_its_base_and_names_its_digest(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("MODEL:\n  RPN:\n    NMS_THRESH: 0.5\n  ROI_HEADS:\n    NUM_CLASSES: 3\n")
    (tmp_path / "mine.yaml").write_text("_BASE_: base.yaml\nMODEL:\n  RPN:\n    NMS_THRESH: 0.6\n")
    values = read_config(tmp_path / "mine.yaml")
    assert values["MODEL"] == {"RPN": {"NMS_THRESH": 0.6}, "ROI_HEADS": {"NUM_CLASSES": 3}}
    config = merged_config(values, path=tmp_path / "mine.yaml")
    assert config.MODEL.RPN.NMS_THRESH == 0.6
    recipe = find_recipe(str(tmp_path / "mine.yaml"))
    assert recipe.class_names == ("class 0", "class 1", "class 2") and len(recipe.facts["config_sha256"]) == 64
    with pytest.raises(UniterError, match="no weights of its own"):
        Detectron2Detector(str(tmp_path / "mine.yaml"))


def test_the_weights_that_a_yaml_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "sub" / "mine.yaml"
    file.parent.mkdir()
    monkeypatch.chdir(tmp_path)
    for named in ("beside.pth", "output/current.pth", "nowhere.pth", "https://example.org/model_final.pkl"):
        file.write_text(f"MODEL:\n  WEIGHTS: {named}\n")
        (tmp_path / "sub" / "beside.pth").touch()
        (tmp_path / "output").mkdir(exist_ok=True)
        (tmp_path / "output" / "current.pth").touch()
        recipe = find_recipe(str(file))
        assert (recipe.weights, recipe.known_sources) == {
            "beside.pth": (str(tmp_path / "sub" / "beside.pth"), ()),
            "output/current.pth": ("output/current.pth", ()),
            "nowhere.pth": (None, ()),
            "https://example.org/model_final.pkl": (None, ("https://example.org/model_final.pkl",)),
        }[named]
    file.write_text("MODEL:\n  WEIGHTS: detectron2://ImageNetPretrained/MSRA/R-50.pkl\n")  # of a backbone, no detector's
    assert find_recipe(str(file)).known_sources == ()


def trained_folder(folder: Path, state: dict[str, torch.Tensor], **changes: Any) -> Path:
    """As `uniter-train detector` leaves one."""
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(small_recipe("butd").config.dump())
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    described = {
        "format": 1,
        "config": "config.yaml",
        "weights": "model.safetensors",
        "class_names": [f"thing {number}" for number in range(12)],
        "attribute_names": [],
        **changes,
    }
    (folder / "detector.json").write_text(json.dumps(described))
    return folder


def test_a_trained_detectors_folder(butd_state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    detector = Detectron2Detector(str(trained_folder(tmp_path / "mine", butd_state)))
    assert detector.class_names[3] == "thing 3" and detector.name == "mine"
    assert len(detector.detect([detector.prepare(pictures()[0])])[0].boxes) > 0
    for changes, words in (
        ({"weights": "../w.safetensors"}, "outside its folder"),
        ({"config": "/etc/passwd"}, "outside its folder"),
        ({"class_names": ["one"]}, "1 class names"),
        ({"format": 9}, "format 9"),
        ({"class_names": None}, "cannot be used"),
        ({"sha256": "0" * 64}, "not the weights that"),
    ):
        with pytest.raises(BadInput, match=words):
            Detectron2Detector(str(trained_folder(tmp_path / "mine", butd_state, **changes)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match=r"no detector\.json"):
        Detectron2Detector(str(tmp_path / "empty"))


def test_memory_errors_are_told_from_others() -> None:
    for error in (
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("not enough memory: you tried to allocate"),
    ):
        assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("shapes differ")) and not is_out_of_memory(BadInput("out of memory"))


def test_a_real_allocation_that_does_not_fit_is_told() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
