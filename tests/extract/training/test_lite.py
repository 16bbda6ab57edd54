"""Training that begins from what exists: the detector on board by default, ImageNet's backbones as they go around, classes by name."""

import copy
import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances
from safetensors.torch import load_file

from uniter.cli.train_detector import detector_command
from uniter.datasets.errors import BadInput, UniterError
from uniter.datasets.made_up.files import write_world
from uniter.extract.detector.detectron import build_detector
from uniter.extract.detector.lite import ON_BOARD_WEIGHTS
from uniter.extract.training import beginnings, loop
from uniter.extract.training.batches import Batches
from uniter.extract.training.configs import LITE, on_board_config, r101_c4_config
from uniter.extract.training.crops import random_crop
from uniter.extract.training.ignored import IgnoredRegions
from uniter.extract.training.labelled_images import LabelledImages, read_labelled_images
from uniter.extract.training.loop import train_detector
from uniter.extract.training.plan import Choices
from uniter.extract.training.predictor import build_network
from uniter.extract.training.running_mean import RunningMean
from uniter.extract.weights.load import Weights, tensors_sha256

QUICK = ["INPUT.MIN_SIZE_TEST", 64, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 20, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 8]
CLASS_ROWS = "roi_heads.box_predictor.cls_score.weight"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight made-up pictures; two of their shapes go by names of COCO's, some boxes are unsure, one is a crowd."""
    out = tmp_path_factory.mktemp("world")
    write_world(out, images=8, held_out=2, seed=1)
    path = out / "instances_train.json"
    content = json.loads(path.read_text())
    for number, name in enumerate(("zebra", "person")):
        content["categories"][number]["name"] = name
    content["annotations"][0]["class_probabilities"] = {"zebra": 0.6, "person": 0.2}
    content["annotations"][1]["ignore"] = 1
    path.write_text(json.dumps(content))
    return out


def short_run(world: Path, out: Path, **changes: Any) -> dict[str, Any]:
    options: dict[str, Any] = {
        **{"steps": 2, "batch_size": 2, "checkpoint_every": 1, "validate_every": 9},
        "overrides": dict(zip(QUICK[::2], QUICK[1::2], strict=True)),
    }
    return train_detector(world / "images", world / "instances_train.json", out, Choices(**{**options, **changes}))


def labelled_of(world: Path) -> LabelledImages:
    return read_labelled_images(world / "images", world / "instances_train.json")


def lite_network(world: Path, *, seed: int = 0) -> Any:
    labelled = labelled_of(world)
    cfg = on_board_config(labelled)
    cfg.MODEL.DEVICE = "cpu"
    return build_network(cfg, attributes=0, seed=seed)


class Killed(BaseException):
    pass


def test_it_begins_from_on_board_says_so_and_continues_exactly(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        short_run(world, tmp_path / "whole")
    assert "start from on-board" in caplog.text and "2 of 8 classes are known to it; new: " in caplog.text
    assert json.loads((tmp_path / "whole" / "settings.json").read_text())["from"] == tensors_sha256(on_board_tensors())
    update = loop._update

    def dying(*arguments: Any, seed: int, **more: Any) -> dict[str, float]:
        if seed & 0xFFFF == 2:
            raise Killed
        return update(*arguments, seed=seed, **more)

    monkeypatch.setattr(loop, "_update", dying)
    with pytest.raises(Killed):
        short_run(world, tmp_path / "killed")
    monkeypatch.setattr(loop, "_update", update)
    short_run(world, tmp_path / "killed")
    assert (tmp_path / "killed" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    losses = json.loads((tmp_path / "whole" / "log.jsonl").read_text().splitlines()[0])
    assert math.isfinite(losses["loss_soft"])
    trained = build_detector(str(tmp_path / "whole"))
    assert (trained.feature_width, trained.settings()["box_kind"], len(trained.class_names)) == (512, "regressed", 8)


def on_board_tensors() -> dict[str, torch.Tensor]:
    return {name: tensor.float() for name, tensor in load_file(ON_BOARD_WEIGHTS).items()}


def test_classes_are_taken_by_their_names(world: Path) -> None:
    network, labelled, theirs = lite_network(world), labelled_of(world), on_board_tensors()
    drawn = network.state_dict()[CLASS_ROWS].clone()
    start = beginnings.find_beginning(None, on_board_config(labelled))
    assert start is not None and start.class_names is not None
    beginnings.begin(network, start, labelled.class_names)
    rows = network.state_dict()[CLASS_ROWS]
    for row, name in enumerate(labelled.class_names):
        wanted = theirs[CLASS_ROWS][start.class_names.index(name)] if name in start.class_names else drawn[row]
        torch.testing.assert_close(rows[row], wanted)
    torch.testing.assert_close(rows[-1], theirs[CLASS_ROWS][-1])  # background
    boxes = network.state_dict()["roi_heads.box_predictor.bbox_pred.weight"].view(8, 4, -1)
    place = start.class_names.index(labelled.class_names[0])
    torch.testing.assert_close(boxes[0], theirs["roi_heads.box_predictor.bbox_pred.weight"].view(80, 4, -1)[place])


@pytest.mark.parametrize(
    ("names", "box_rows"),
    [
        pytest.param(("zebra", "person", "person"), 12, id="two classes of one name"),
        pytest.param(("zebra", "person", "dog"), 4, id="one box for all classes"),
    ],
)
def test_classes_of_unusual_detectors_are_taken_by_their_names(world: Path, names: tuple[str, ...], box_rows: int) -> None:
    network, labelled = lite_network(world), labelled_of(world)
    drawn = network.state_dict()["roi_heads.box_predictor.bbox_pred.weight"].clone()
    theirs = {CLASS_ROWS: torch.randn(4, 512), "roi_heads.box_predictor.bbox_pred.weight": torch.randn(box_rows, 512)}
    beginnings.begin(network, beginnings.Beginning("odd", Weights(theirs, "detectron2", "odd", None, ""), names), labelled.class_names)
    found = network.state_dict()
    torch.testing.assert_close(found[CLASS_ROWS][[0, -1]], theirs[CLASS_ROWS][[0, -1]])  # zebra and the background
    boxes = found["roi_heads.box_predictor.bbox_pred.weight"]
    torch.testing.assert_close(boxes[:4], theirs["roi_heads.box_predictor.bbox_pred.weight"][:4] if box_rows == 12 else drawn[:4])


def test_from_random_is_the_old_way(world: Path) -> None:
    labelled = labelled_of(world)
    assert beginnings.find_beginning("random", on_board_config(labelled)) is None
    assert beginnings.find_beginning(None, r101_c4_config(labelled)) is None


def narrow_c4(labelled: LabelledImages) -> CfgNode:
    cfg = r101_c4_config(labelled)
    cfg.MODEL.DEVICE, cfg.MODEL.ROI_HEADS.NUM_CLASSES = "cpu", 8
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.STEM_OUT_CHANNELS, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 50, 8, 16
    cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 4
    return cfg


def without_prefix(name: str) -> str | None:
    """As Detectron2's `R-50.pkl` names a backbone."""
    for above in ("backbone.", "roi_heads."):
        if name.startswith(above) and "box_predictor" not in name:
            return name.removeprefix(above)
    return None


def as_torchvision(name: str) -> str | None:
    core = without_prefix(name)
    if core is None:
        return None
    core = core.replace("stem.conv1.norm", "bn1").replace("stem.conv1", "conv1").replace("shortcut.norm", "downsample.1")
    core = core.replace("shortcut", "downsample.0")
    for number in "123":
        core = core.replace(f"conv{number}.norm", f"bn{number}")
    for stage in "2345":
        core = core.replace(f"res{stage}.", f"layer{int(stage) - 1}.")
    return core


@pytest.mark.parametrize("naming", [without_prefix, as_torchvision])
def test_backbones_of_imagenet_are_taken_as_they_go_around(world: Path, tmp_path: Path, naming: Any) -> None:
    """Another network's backbone, in the names of Detectron2's files and of torchvision's, is found again in every tensor."""
    labelled = labelled_of(world)
    source: Any = build_network(narrow_c4(labelled), attributes=0, seed=5)
    for name, buffer in source.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 2)
    file = tmp_path / "R.pth"
    named = {naming(name): tensor for name, tensor in source.state_dict().items() if naming(name) is not None}
    torch.save({**named, "fc.weight": torch.zeros(10, 3)}, file)
    cfg = narrow_c4(labelled)
    start = beginnings.find_beginning(str(file), cfg)
    assert start is not None
    beginnings.follow_weights(cfg, start)
    assert (cfg.MODEL.RESNETS.NORM, cfg.MODEL.BACKBONE.FREEZE_AT) == ("FrozenBN", 2)
    wanted = ([58.395, 57.12, 57.375], "RGB", False) if naming is as_torchvision else ([1.0, 1.0, 1.0], "BGR", True)
    assert (list(cfg.MODEL.PIXEL_STD), cfg.INPUT.FORMAT, cfg.MODEL.RESNETS.STRIDE_IN_1X1) == wanted
    network: Any = build_network(cfg, attributes=0, seed=0)
    beginnings.begin(network, start, labelled.class_names)
    found = network.state_dict()
    taken = [name for name in source.state_dict() if naming(name) is not None and not name.endswith("num_batches_tracked")]
    assert len(taken) > 200
    for name in taken:
        torch.testing.assert_close(found[name], source.state_dict()[name])


def test_efficientnets_published_weights_are_folded(world: Path, tmp_path: Path) -> None:
    """Convolution and BatchNorm of the published file, one after the other, give what the folded convolution gives."""
    network, generator = lite_network(world), torch.Generator().manual_seed(0)
    published: dict[str, torch.Tensor] = {}
    for name, tensor in network.backbone.bottom_up.state_dict().items():
        if not name.endswith(".weight"):
            continue
        layer = name.removesuffix(".weight")
        above, _, kind = layer.rpartition(".")
        place = f"_{above}." if above else ""
        convolution, norm = {"stem": ("_conv_stem", "_bn0"), "expand": ("_expand_conv", "_bn0"), "depthwise": ("_depthwise_conv", "_bn1"),
                             "project": ("_project_conv", "_bn2")}[kind]  # fmt: skip
        published[f"{place}{convolution}.weight"] = torch.randn(tensor.shape, generator=generator)
        for part in ("weight", "bias", "running_mean", "running_var"):
            published[f"{place}{norm}.{part}"] = torch.rand(len(tensor), generator=generator) + 0.5
    torch.save(published, tmp_path / "lite0.pth")
    start = beginnings.find_beginning(str(tmp_path / "lite0.pth"), on_board_config(labelled_of(world)))
    assert start is not None
    beginnings.begin(network, start, ("a",))
    maps = torch.randn(1, 24, 8, 8, generator=generator)
    norm = [published[f"_blocks.2._bn0.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
    wanted = torch.nn.functional.batch_norm(torch.nn.functional.conv2d(maps, published["_blocks.2._expand_conv.weight"]), *norm, eps=1e-3)
    torch.testing.assert_close(network.backbone.bottom_up.blocks[2].expand(maps), wanted, rtol=1e-4, atol=1e-4)


def test_imagenet_without_a_network_names_what_works(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> Any:
        raise UniterError("cannot be reached")

    monkeypatch.setattr(beginnings, "load_weights", unreachable)
    with pytest.raises(UniterError, match=r"R-101\.pkl|--model lite, which begins from on-board"):
        beginnings.find_beginning("imagenet", r101_c4_config(labelled_of(world)))
    with pytest.raises(UniterError, match="on-board's backbone began from ImageNet's weights"):
        beginnings.find_beginning("imagenet", on_board_config(labelled_of(world)))


def test_weights_of_which_nothing_fits_are_refused(world: Path) -> None:
    weights = Weights({"other.weight": torch.zeros(3)}, "detectron2", "other.pth", None, "")
    with pytest.raises(BadInput, match=r"other\.pth: none of its 1 tensors fits"):
        beginnings.begin(lite_network(world), beginnings.Beginning("other.pth", weights), ("a",))


def test_annotations_say_what_is_unsure_and_what_to_leave_alone(world: Path, tmp_path: Path) -> None:
    image = labelled_of(world).images[0]
    assert image.soft is not None and image.crowd.tolist()[:3] == [False, True, False][: len(image.crowd)]
    np.testing.assert_allclose(image.soft[0, :2], [0.75, 0.25])
    assert image.soft[1:].sum() == 0
    content = json.loads((world / "instances_train.json").read_text())
    content["categories"][2]["name"] = "zebra"
    (tmp_path / "instances.json").write_text(json.dumps(content))
    twice = read_labelled_images(world / "images", tmp_path / "instances.json").images[0].soft
    assert twice is not None and twice.shape[1] == 8  # two classes of one name are two
    content["annotations"][0]["class_probabilities"] = {"unicorn": 0.5}
    (tmp_path / "instances.json").write_text(json.dumps(content))
    read = read_labelled_images(world / "images", tmp_path / "instances.json")
    assert read.skipped == {"class probabilities that are no {name of a category: 0 to 1}": 1}


def test_a_weight_of_distributions_that_are_not_there_is_refused(world: Path, tmp_path: Path) -> None:
    content = json.loads((world / "instances_train.json").read_text())
    del content["annotations"][0]["class_probabilities"]
    (tmp_path / "instances.json").write_text(json.dumps(content))
    with pytest.raises(BadInput, match="has class_probabilities"):
        train_detector(world / "images", tmp_path / "instances.json", tmp_path / "out", Choices(soft_weight=1.0))


def test_ignored_regions_are_neither_things_nor_background(world: Path) -> None:
    network = lite_network(world)
    IgnoredRegions(network)
    rpn, heads = network.proposal_generator, network.roi_heads
    rpn.batch_size_per_image = heads.batch_size_per_image = 10_000
    anchors = Boxes(torch.tensor([[0.0, 0, 20, 20], [2, 2, 18, 18], [40, 40, 60, 60], [70, 0, 90, 20], [4, 4, 100, 100]]))
    wanted = Instances((100, 100))
    wanted.gt_boxes, wanted.gt_classes = Boxes(torch.tensor([[40.0, 40, 60, 60]])), torch.tensor([3])
    network.train()
    network._forward_pre_hooks[next(iter(network._forward_pre_hooks))](
        network, ([{"ignored": torch.tensor([[0.0, 0, 25, 25], [35, 35, 65, 65]])}],)
    )
    (labels,), _ = rpn.label_and_sample_anchors([anchors], [wanted])
    assert labels.tolist() == [-1, -1, 1, 0, 0]
    from detectron2.utils.events import EventStorage

    found = Instances((100, 100))
    found.proposal_boxes, found.objectness_logits = anchors, torch.zeros(5)
    with EventStorage(0):
        (sampled,) = heads.label_and_sample_proposals([copy.deepcopy(found)], [wanted])
    kept = {tuple(box) for box in sampled.proposal_boxes.tensor.tolist()}
    assert kept == {(40, 40, 60, 60), (70, 0, 90, 20), (4, 4, 100, 100)}


def test_crops_follow_their_boxes() -> None:
    """A picture whose boxes are white: in every crop each box that is told of is white, and what is white is told of."""
    pixels = np.full((90, 140, 3), 60, dtype=np.uint8)
    boxes = np.array([[10, 10, 40, 50], [80, 30, 130, 80], [60, 5, 75, 20]], dtype=np.float32)
    for x0, y0, x1, y1 in boxes.astype(int):
        pixels[y0:y1, x0:x1] = 255
    ignored = np.array([False, False, True])
    for seed in range(60):
        crop = random_crop(pixels, boxes, ignored, size=64, rng=np.random.default_rng(seed))
        again = random_crop(pixels, boxes, ignored, size=64, rng=np.random.default_rng(seed))
        assert crop.pixels.shape == (64, 64, 3) and len(crop.rows) >= 1 and np.array_equal(crop.pixels, again.pixels)
        assert not ignored[crop.rows].any()
        told = np.zeros((64, 64), dtype=bool)
        for x0, y0, x1, y1 in np.concatenate([crop.boxes, crop.hidden]):
            assert 0 <= x0 < x1 <= 64 and 0 <= y0 < y1 <= 64
            told[math.floor(y0) : math.ceil(y1), math.floor(x0) : math.ceil(x1)] = True
            inside = crop.pixels[math.ceil(y0) + 1 : math.floor(y1) - 1, math.ceil(x0) + 1 : math.floor(x1) - 1]
            assert not inside.size or inside.min() > 200
        white = crop.pixels[:, :, 0] > 230
        assert (white & ~told).sum() <= 2 * 64  # the border of what shows by a pixel


def test_batches_of_crops_follow_from_seed_and_number(world: Path) -> None:
    from uniter.extract.detector.preparation import ShortestEdgePreparation

    labelled = labelled_of(world)
    made = [
        Batches(labelled.images, ShortestEdgePreparation(96, 400, "RGB"), batch_size=3, attributes=0, seed=5, cache=cache, crop=64)
        for cache in (True, False)
    ]
    made[0].batch(0)
    one, two = (batches.batch(4) for batches in made)
    for left, right in zip(one, two, strict=True):
        assert torch.equal(left["image"], right["image"]) and left["image"].shape == (3, 64, 64)
        assert torch.equal(left["instances"].gt_boxes.tensor, right["instances"].gt_boxes.tensor)
        assert left["instances"].gt_soft.shape == (len(left["instances"]), 8)


def test_the_running_mean_is_a_mean_of_the_weights() -> None:
    network = torch.nn.Linear(2, 1)
    mean = RunningMean(network, 0.5)
    network.weight.requires_grad_(False)
    wanted = float(network.weight[0, 0])
    for step in range(1, 4):
        network.weight.fill_(float(step))
        mean.take(network, step)
        stays = min(0.5, step / (step + 20))
        wanted = stays * wanted + (1 - stays) * step
    assert float(mean.tensors["weight"][0, 0]) == pytest.approx(wanted)
    with mean.in_place(network):
        assert float(network.weight[0, 0]) == pytest.approx(wanted)
    assert float(network.weight[0, 0]) == 3


def test_how_long_it_takes_is_said_and_changes_nothing(
    world: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from detectron2.utils.events import EventStorage

    from uniter.extract.training.plan import plan_training

    choices = Choices(steps=1200, batch_size=1, overrides=dict(zip(QUICK[::2], QUICK[1::2], strict=True)))
    plan, network = plan_training(world / "images", world / "instances_train.json", choices, device=torch.device("cpu"))
    network.train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with caplog.at_level(logging.INFO), EventStorage(0):
        loop._say_how_long(network, plan, 0)
    assert "for 1200 updates on this machine" in caplog.text and "`--steps 150`" in caplog.text
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_the_command_takes_its_own_settings(world: Path, tmp_path: Path) -> None:
    arguments = ["--images", str(world / "images"), "--annotations", str(world / "instances_train.json"), "--out", str(tmp_path / "out")]
    for wrong in ("running_mean=much", "soft_weight=-1"):
        assert CliRunner().invoke(detector_command, [*arguments, "--set", wrong]).exit_code == 2
    refused = CliRunner().invoke(detector_command, [*arguments, "--set", "running_mean=1"])
    assert refused.exit_code == 1 and "expected a share" in refused.stderr
    assert LITE.running_mean == 0.998
