"""Training a detector: a resumed run equals an unbroken one, the folder is a detector, hostile inputs are answered."""

import contextlib
import json
import math
import multiprocessing
import os
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from safetensors.torch import load_file

from uniter.cli.train_detector import detector_command
from uniter.cli.view import main as view_command
from uniter.datasets.errors import BadInput, SettingsDiffer, UniterError
from uniter.datasets.made_up.files import write_world
from uniter.datasets.made_up.world import WORLDS
from uniter.datasets.runs.held_out import read_held_out
from uniter.datasets.stopping import Stopped
from uniter.extract.detector.configuration import merged_config, read_config
from uniter.extract.detector.detectron import build_detector
from uniter.extract.detector.preparation import ShortestEdgePreparation
from uniter.extract.images.decoding import decode_image
from uniter.extract.training import loop as training
from uniter.extract.training.batches import Batches, thumbnail
from uniter.extract.training.configs import FULL, fitted_anchors, fitted_ratios, learning_rate_factor, r101_c4_config, tiny_config
from uniter.extract.training.labelled_images import read_labelled_images
from uniter.extract.training.loop import train_detector
from uniter.extract.training.plan import Choices
from uniter.extract.training.predictor import build_network
from uniter.extract.training.settings import watched


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNITER_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("world")
    write_world(out, images=14, held_out=4, seed=1)
    return out


def short_run(world: Path, out: Path, **changes: Any) -> dict[str, Any]:
    options: dict[str, Any] = {"model": "tiny", "steps": 4, "batch_size": 2, "checkpoint_every": 2, "validate_every": 3}
    overwrite = changes.pop("overwrite", False)
    return train_detector(world / "images", world / "instances_train.json", out, Choices(**{**options, **changes}), overwrite=overwrite)


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "detector"
    short_run(world, out)
    return out


class Killed(BaseException):
    pass


@pytest.mark.parametrize("kills", [(2,), (3, 4), (1,)])
def test_a_resumed_run_equals_an_unbroken_one(
    world: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kills: tuple[int, ...]
) -> None:
    update = training._update
    for kill in kills:
        at_work = iter(range(100))

        def dying(*arguments: Any, seed: int, kill: int = kill, at_work: Any = at_work, **more: Any) -> dict[str, float]:
            next(at_work)
            if seed & 0xFFFF == kill:
                raise Killed
            return update(*arguments, seed=seed, **more)

        monkeypatch.setattr(training, "_update", dying)
        with pytest.raises(Killed):
            short_run(world, tmp_path / "run")
        assert not (tmp_path / "run" / "detector.json").exists()
    monkeypatch.setattr(training, "_update", update)
    short_run(world, tmp_path / "run")
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()
    assert (tmp_path / "run" / "log.jsonl").read_text() == (finished / "log.jsonl").read_text()
    assert (tmp_path / "run" / "detector.json").read_text() == (finished / "detector.json").read_text()


def test_the_run_leaves_what_the_contract_says(world: Path, finished: Path) -> None:
    lines = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if line["kind"] == "validation"] == [3, 4]
    losses = {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc", "loss_thumbnail", "loss_attribute"}
    assert losses < set(lines[0])
    assert math.isclose(lines[0]["loss"], sum(lines[0][name] for name in losses), rel_tol=1e-5)
    assert (finished / "checkpoints" / "latest").resolve() == (finished / "checkpoints" / "step-4").resolve()
    assert [path.name for path in (finished / "checkpoints").glob("step-*")] == ["step-4"]
    assert not [path for path in finished.rglob("*") if path.suffix in (".pt", ".pth", ".pkl", ".bin", ".partial", ".tmp")]
    assert list(finished.glob("events.out.tfevents.*"))
    described = json.loads((finished / "detector.json").read_text())
    assert described["class_names"] == list(WORLDS["shapes"].shapes)
    assert described["attribute_names"] == list(WORLDS["shapes"].colours)
    assert not [name for name in load_file(finished / "model.safetensors") if "thumbnail" in name]


def test_a_finished_run_is_not_repeated(world: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_update", None)
    summary = short_run(world, finished)
    assert summary["steps"] == 4
    assert {"ap", "ap50", "train_images", "skipped"} <= set(summary)
    with pytest.raises(SettingsDiffer, match="steps was 4, now 5"):
        short_run(world, finished, steps=5)


def test_its_folder_is_a_detector(world: Path, finished: Path) -> None:
    detector = build_detector(str(finished), attributes=True)
    assert detector.class_names == tuple(WORLDS["shapes"].shapes)
    pixels = decode_image((world / "images" / "scene_000001.jpg").read_bytes())
    boxes = np.array([[20.0, 20.0, 60.0, 60.0], [5.0, 5.0, 100.0, 90.0]])
    (found,) = detector.detect([detector.prepare(pixels)])
    (given,) = detector.detect([detector.prepare(pixels)], boxes=[boxes])
    assert found.probabilities.shape == (len(found.boxes), 9)
    assert given.features.shape == (2, 256)
    assert given.attributes is not None
    assert given.attributes.shape == (2, 9)
    # What the extraction computes is what the trained network's own parts compute, background and "no attribute" first.
    labelled = read_labelled_images(world / "images", world / "instances_train.json")
    cfg = merged_config(read_config(finished / "config.yaml"), path=finished)
    network: Any = build_network(cfg, attributes=8, seed=9)
    network.load_state_dict(load_file(finished / "model.safetensors"), strict=False)
    network.eval()
    item = {"image": torch.from_numpy(pixels.transpose(2, 0, 1).copy()), "height": pixels.shape[0], "width": pixels.shape[1]}
    with torch.no_grad():
        heads = network.roi_heads
        maps = network.backbone(network.preprocess_image([item]).tensor)
        rows = heads.box_head(heads.box_pooler([maps["p3"]], [Boxes(torch.from_numpy(boxes).float())]))
        scores = heads.box_predictor.cls_score(rows).softmax(dim=1)
    np.testing.assert_allclose(given.features, rows, atol=1e-4)
    np.testing.assert_allclose(given.probabilities, torch.cat([scores[:, -1:], scores[:, :-1]], dim=1), atol=1e-5)
    assert len(labelled.images) == 10


def test_without_attributes(tmp_path: Path) -> None:
    write_world(tmp_path / "toys", images=8, held_out=2, world=WORLDS["toys"])
    out = tmp_path / "detector"
    summary = short_run(tmp_path / "toys", out, steps=1, val_annotations=tmp_path / "toys" / "instances_val.json")
    assert (summary["attributes"], summary["val_images"], summary["train_images"]) == (0, 2, 6)
    assert json.loads((out / "detector.json").read_text())["attribute_names"] == []
    assert build_detector(str(out)).feature_width == 256


def test_batches_follow_from_seed_and_number(world: Path) -> None:
    labelled = read_labelled_images(world / "images", world / "instances_train.json")
    preparation = ShortestEdgePreparation(128, 400, "BGR")
    made = [
        Batches(labelled.images, preparation, batch_size=3, attributes=8, seed=seed, cache=cache)
        for seed, cache in ((5, True), (5, False), (6, True))
    ]
    made[0][0]
    for step in (7, 2):
        same, again, other = (batches.batch(step) for batches in made)
        assert all(torch.equal(one["image"], two["image"]) for one, two in zip(same, again, strict=True))
        assert not all(torch.equal(one["image"], two["image"]) for one, two in zip(same, other, strict=True))
    epoch = [made[0]._number(position) for position in range(20)]
    assert sorted(epoch[:10]) == sorted(epoch[10:]) == list(range(10))


def test_mirrored_images_keep_boxes_and_thumbnails_with_their_things(world: Path) -> None:
    labelled = read_labelled_images(world / "images", world / "instances_train.json")
    batches = Batches(labelled.images, ShortestEdgePreparation(128, 400, "BGR"), batch_size=1, attributes=8, seed=0, cache=True)
    plain, mirrored = batches._item(0, False), batches._item(0, True)
    torch.testing.assert_close(plain["image"].flip(2), mirrored["image"])
    for item in (plain, mirrored):
        pixels = item["image"].permute(1, 2, 0).numpy()
        for box, wanted in zip(item["instances"].gt_boxes.tensor.numpy(), item["instances"].gt_thumbnails, strict=True):
            np.testing.assert_allclose(thumbnail(pixels, box).ravel(), wanted.numpy(), atol=2 / 127.5)
    rows = plain["instances"].gt_attributes
    assert rows.shape[1] == 9
    assert torch.equal(rows.sum(dim=1), torch.ones(len(rows)))


def test_a_file_that_turns_out_damaged_is_counted(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world, tmp_path / "world")
    damaged = tmp_path / "world" / "images" / "scene_000002.jpg"
    damaged.write_bytes(damaged.read_bytes()[:-900])
    options = {"steps": 6, "validate_every": 6, "checkpoint_every": 1}
    summary = short_run(tmp_path / "world", tmp_path / "detector", **options)
    assert summary["skipped"] == {"an image that cannot be decoded": 1}
    # Nor is it forgotten where the run was killed after it had been met.
    (tmp_path / "detector" / "detector.json").unlink()
    assert short_run(tmp_path / "world", tmp_path / "detector", **options)["skipped"] == summary["skipped"]


@pytest.mark.parametrize("workers", [0, 1])
def test_photographs_that_vanish_are_a_sentence(world: Path, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(world, tmp_path / "world")
    load = training.load_checkpoint

    def unmounted(*arguments: Any) -> Any:
        shutil.rmtree(tmp_path / "world" / "images")
        return load(*arguments)

    monkeypatch.setattr(training, "load_checkpoint", unmounted)
    with pytest.raises(BadInput, match=r"^none of the training images can be decoded; are the files damaged\?$"):
        short_run(tmp_path / "world", tmp_path / "detector", workers=workers)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_memory_that_does_not_suffice_is_a_sentence(
    world: Path, tmp_path: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(*arguments: Any, **more: Any) -> Any:
        raise error

    monkeypatch.setattr(training, "_update", too_large)
    with pytest.raises(UniterError, match="memory does not suffice for updates of 2 images at 128 pixels; train with a smaller"):
        short_run(world, tmp_path / "detector")


def test_numbers_that_run_away_are_said(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_update", lambda *arguments, **more: {"loss": float("nan")})
    with pytest.raises(UniterError, match="the loss is nan at update 1; start anew with a lower --learning-rate"):
        short_run(world, tmp_path / "detector")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"overrides": {"MODEL.RPN.NONSENSE": 1}}, "Detectron2 has no such setting"),
        ({"overrides": {"MODEL.RPN.NMS_THRESH": "high"}}, "Detectron2 has no such setting or expects another kind"),
        ({"overrides": {"MODEL.BACKBONE.NAME": "nothing"}}, "cannot build this configuration"),
        ({"model": "small"}, "unknown model 'small'"),
        ({"held_out": 1.5}, "between 0 and 1"),
        ({"device": "cuda:99"}, "device 'cuda:99': PyTorch sees"),
    ],
)
def test_mistakes_are_answered_in_a_sentence(world: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UniterError, match=message):
        short_run(world, tmp_path / "detector", **changes)


@pytest.mark.parametrize(
    ("name", "value", "instead"),
    [
        ("SOLVER.BASE_LR", 0.5, "--learning-rate"),
        ("SOLVER.WEIGHT_DECAY", 0.9, ""),
        ("INPUT.MIN_SIZE_TRAIN", [64], "INPUT.MIN_SIZE_TEST"),
        ("SEED", 4, "--seed"),
        ("VIS_PERIOD", 7, ""),
        ("MODEL.MASK_ON", True, ""),
        ("MODEL.RETINANET.NUM_CONVS", 2, ""),
        ("MODEL.WEIGHTS", "nowhere.pkl", "--from"),
        ("MODEL.ROI_HEADS.NUM_CLASSES", 3, "--annotations"),
    ],
)
def test_a_setting_that_changes_nothing_is_refused(world: Path, tmp_path: Path, name: str, value: Any, instead: str) -> None:
    with pytest.raises(BadInput, match=f"{name}=.*{instead}.*would change nothing; leave it out"):
        short_run(world, tmp_path / "detector", overrides={name: value})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(nested(name, value)))
    refused = name != "MODEL.MASK_ON"  # a Mask R-CNN's file is a Faster R-CNN's, and more
    with pytest.raises(BadInput, match=f"{name}=.* of .*config.yaml") if refused else contextlib.nullcontext():
        short_run(world, tmp_path / "of-file", steps=1, config=tmp_path / "config.yaml", overrides=SMALL)
    assert not (tmp_path / "detector").exists() and (tmp_path / "of-file").exists() != refused


def nested(name: str, value: Any) -> dict[str, Any]:
    first, _, rest = name.partition(".")
    return {first: nested(rest, value) if rest else value}


SMALL = {
    **{"MODEL.RESNETS.DEPTH": 50, "MODEL.RESNETS.WIDTH_PER_GROUP": 2, "MODEL.RESNETS.RES2_OUT_CHANNELS": 8},
    **{"MODEL.RESNETS.STEM_OUT_CHANNELS": 4, "INPUT.MIN_SIZE_TEST": 64, "INPUT.MAX_SIZE_TEST": 100},
    **{"MODEL.RESNETS.NORM": "BN", "MODEL.BACKBONE.FREEZE_AT": 0},
}


def test_what_a_setting_has_anyway_may_be_said(world: Path, finished: Path, tmp_path: Path) -> None:
    short_run(world, tmp_path / "detector", overrides={"SOLVER.MAX_ITER": 40000, "MODEL.ROI_HEADS.NUM_CLASSES": 8})
    assert (tmp_path / "detector" / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()


def test_a_detectors_own_configuration_makes_it_again(world: Path, finished: Path, tmp_path: Path) -> None:
    short_run(world, tmp_path / "detector", config=finished / "config.yaml")
    assert (tmp_path / "detector" / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()


def test_a_configuration_of_other_photographs_is_obeyed(world: Path, finished: Path, tmp_path: Path) -> None:
    cfg = yaml.safe_load((finished / "config.yaml").read_text())
    assert cfg["INPUT"]["MIN_SIZE_TRAIN"] == [128]
    for name in ("MIN_SIZE_TEST", "MIN_SIZE_TRAIN"):
        cfg["INPUT"][name] = 96 if name == "MIN_SIZE_TEST" else [96]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(cfg))
    short_run(world, tmp_path / "detector", steps=1, config=tmp_path / "config.yaml")
    assert "MIN_SIZE_TEST: 96" in (tmp_path / "detector" / "config.yaml").read_text()


def test_every_setting_of_the_shipped_models_is_obeyed(world: Path) -> None:
    """What Detectron2 reads while it builds is seen, whichever way it reads it."""
    labelled = read_labelled_images(world / "images", world / "instances_train.json")
    cfg = r101_c4_config(labelled)
    cfg.MODEL.DEVICE = "cpu"
    read: set[str] = set()
    build_network(watched(cfg, read), attributes=0, seed=0)
    assert {"MODEL.RESNETS.DEPTH", "MODEL.RPN.BATCH_SIZE_PER_IMAGE", "MODEL.ROI_BOX_HEAD.POOLER_TYPE", "MODEL.PIXEL_STD"} < read
    assert {"MODEL.ANCHOR_GENERATOR.SIZES", "TEST.DETECTIONS_PER_IMAGE", "MODEL.ROI_HEADS.SCORE_THRESH_TEST"} < read
    assert not [name for name in read if name.startswith(("SOLVER.", "DATASETS.", "MODEL.FPN.OUT"))]


def test_overwriting_keeps_the_old_detector_until_the_new_one_is_whole(
    world: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out, symlinks=True)
    (out / "notes.txt").write_text("mine")
    old = (out / "model.safetensors").read_bytes()
    update = training._update
    monkeypatch.setattr(training, "_update", lambda *arguments, **more: {"loss": float("nan")})
    with pytest.raises(UniterError, match="the loss is nan"):
        short_run(world, out, seed=5, overwrite=True)
    monkeypatch.setattr(training, "_update", update)
    assert (out / "model.safetensors").read_bytes() == old and build_detector(str(out))
    short_run(world, out, seed=5, overwrite=True)
    assert (out / "model.safetensors").read_bytes() != old
    assert (out / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["run"]


def test_nothing_that_is_read_is_overwritten(world: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out, symlinks=True)
    with pytest.raises(BadInput, match=r"holds the source .*model\.safetensors"):
        short_run(world, out, from_weights=out / "model.safetensors", overwrite=True)
    assert (out / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()


def test_other_photographs_are_another_training(world: Path, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(world, tmp_path / "world")
    shutil.copytree(finished, tmp_path / "run", symlinks=True)
    (tmp_path / "world" / "images" / "of-no-concern.jpg").write_bytes(b"not annotated")
    short_run(tmp_path / "world", tmp_path / "run")
    cv2.imwrite(str(tmp_path / "world" / "images" / "scene_000002.jpg"), np.zeros((128, 160, 3), dtype=np.uint8))
    with pytest.raises(SettingsDiffer, match=r"images \(images\) has other contents now"):
        short_run(tmp_path / "world", tmp_path / "run")


def test_slow_updates_are_saved_by_the_clock(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    update = training._update

    def dying(*arguments: Any, seed: int, **more: Any) -> dict[str, float]:
        if seed == 3:
            raise Killed
        return update(*arguments, seed=seed, **more)

    monkeypatch.setattr(training, "_update", dying)
    with pytest.raises(Killed):
        short_run(world, tmp_path / "run", checkpoint_every=100)
    assert (tmp_path / "run" / "checkpoints" / "latest").resolve().name == "step-2"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_keeps_what_it_has(
    world: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, number: signal.Signals
) -> None:
    update = training._update

    def stopping(*arguments: Any, seed: int, **more: Any) -> dict[str, float]:
        if seed == 3:
            for process in [*(child.pid for child in multiprocessing.active_children()), os.getpid()]:
                os.kill(process or 0, number)
        return update(*arguments, seed=seed, **more)

    monkeypatch.setattr(training, "_update", stopping)
    with pytest.raises(Stopped, match=f"stopped by {number.name} after update 3 of 4; a checkpoint is written") as stopped:
        short_run(world, tmp_path / "run", checkpoint_every=100, workers=workers)
    assert stopped.value.signal_number == number
    assert (tmp_path / "run" / "checkpoints" / "latest").resolve().name == "step-3"
    monkeypatch.setattr(training, "_update", update)
    short_run(world, tmp_path / "run", checkpoint_every=100, workers=workers)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()
    assert (tmp_path / "run" / "log.jsonl").read_text() == (finished / "log.jsonl").read_text()


def test_several_processes_are_refused(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UniterError, match="torchrun started 2 processes"):
        short_run(world, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_hostile_configuration_executes_nothing(world: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"MODEL: !!python/object/apply:os.system ['touch {tmp_path}/executed']\n")
    with pytest.raises(BadInput, match="no readable Detectron2 YAML"):
        short_run(world, tmp_path / "detector", config=config)
    assert not (tmp_path / "executed").exists()


def test_starting_from_weights(world: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "detector"
    short_run(world, out, steps=1, learning_rate=1e-12, from_weights=finished / "model.safetensors")
    before, after = load_file(finished / "model.safetensors"), load_file(out / "model.safetensors")
    name = "roi_heads.box_head.fc1.weight"
    torch.testing.assert_close(before[name], after[name])
    torch.save({"model": {"other.weight": torch.zeros(3)}}, tmp_path / "other.pth")
    with pytest.raises(BadInput, match="none of its 1 tensors fits"):
        short_run(world, tmp_path / "no", from_weights=tmp_path / "other.pth")


def test_a_narrow_detector_leaves_half_of_the_cores_alone() -> None:
    narrow, wide = torch.nn.Linear(10, 10), torch.nn.Linear(10_000, 1_001, device="meta")
    for network, before, during in ((narrow, 4, 2), (narrow, 1, 1), (wide, 4, 4)):
        torch.set_num_threads(before)
        with training.fitting_threads(network, torch.device("cpu")):
            assert torch.get_num_threads() == during
        assert torch.get_num_threads() == before
    torch.set_num_threads(1)


def test_a_damaged_checkpoint_is_named(world: Path, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run", symlinks=True)
    (tmp_path / "run" / "detector.json").unlink()
    weights = tmp_path / "run" / "checkpoints" / "step-4" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(BadInput, match=r"step-4 cannot be read .* remove that folder"):
        short_run(world, tmp_path / "run")


def test_the_full_model_is_bottom_up_attentions_size(world: Path) -> None:
    labelled = read_labelled_images(world / "images", world / "instances_train.json")
    cfg = r101_c4_config(labelled)
    assert (cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.ROI_HEADS.NAME, cfg.INPUT.MIN_SIZE_TEST) == (101, "Res5ROIHeads", 800)
    cfg.MODEL.DEVICE, cfg.MODEL.ROI_HEADS.NUM_CLASSES = "cpu", 8
    # The same network, narrower, so that an update takes a second.
    resnets = cfg.MODEL.RESNETS
    resnets.DEPTH, resnets.STEM_OUT_CHANNELS, resnets.RES2_OUT_CHANNELS, resnets.WIDTH_PER_GROUP = 50, 16, 32, 8
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 16
    network: Any = build_network(cfg, attributes=8, seed=0)
    assert network.roi_heads.box_predictor.cls_score.in_features == 8 * 32
    batches = Batches(labelled.images, ShortestEdgePreparation(96, 160, "BGR"), batch_size=1, attributes=8, seed=0, cache=True)
    optimizer = training._optimizer(network, FULL, 1e-3)
    network.train()
    with EventStorage(0):
        losses = training._update(network, optimizer, batches.batch(0), rate=1e-3, seed=0)
    assert losses["loss_attribute"] > 0
    assert math.isfinite(losses["loss"])


def test_anchors_and_ratios_fit_the_boxes() -> None:
    assert fitted_anchors(np.full(50, 30.0)) == pytest.approx([23.7, 30.0, 37.9], abs=0.1)
    wide = fitted_anchors(np.geomspace(8, 200, 100))
    assert len(wide) == 6
    assert wide[0] < 12
    assert wide[-1] > 150
    assert fitted_ratios(np.ones(9)) == [0.71, 1.0, 1.4]
    assert fitted_ratios(np.geomspace(0.2, 4, 101)) == pytest.approx([0.27, 0.89, 2.97], abs=0.02)


def test_the_input_is_scaled_to_the_boxes(world: Path, tmp_path: Path) -> None:
    labelled = read_labelled_images(world / "images", world / "instances_train.json")
    assert tiny_config(labelled).INPUT.MIN_SIZE_TEST == 128
    large = WORLDS["shapes"]
    write_world(tmp_path, images=6, held_out=0, world=type(large)(large.shapes, large.colours, {"huge": (0.5, 0.6)}, size=(600, 800)))
    shrunk = tiny_config(read_labelled_images(tmp_path / "images", tmp_path / "instances_train.json"))
    assert shrunk.INPUT.MIN_SIZE_TEST == 96
    assert shrunk.INPUT.MAX_SIZE_TEST == 129


def test_the_learning_rate_rises_and_falls() -> None:
    rates = [learning_rate_factor(step, steps=1000, warmup=50) for step in range(1000)]
    assert rates[0] == pytest.approx(0.02)
    assert max(rates) == rates[49] == pytest.approx(1, abs=0.01)
    assert rates[-1] == pytest.approx(0.02, abs=1e-3)


def test_the_command(world: Path, tmp_path: Path) -> None:
    arguments = ["--images", str(world / "images"), "--annotations", str(world / "instances_train.json"), "--out", str(tmp_path / "out")]
    arguments += ["--model", "tiny"]
    options = ["--steps", "1", "--batch-size", "1", "--set", "checkpoint_every=1", "--set", "MODEL.RPN.NMS_THRESH=0.6", "--json"]
    result = CliRunner().invoke(detector_command, [*arguments, *options])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["train_images"] == 9
    assert "NMS_THRESH: 0.6" in (tmp_path / "out" / "config.yaml").read_text()
    assert CliRunner().invoke(detector_command, [*arguments, "--set", "nonsense"]).exit_code == 2
    both = ["--held-out", "0.2", "--val-annotations", str(world / "instances_val.json")]
    assert "leave one of the two out" in CliRunner().invoke(detector_command, [*arguments, *both]).stderr
    refused = CliRunner().invoke(detector_command, [*arguments, "--steps", "2"])
    assert refused.exit_code == 1
    assert refused.stderr.startswith("error: ")
    content = json.loads((world / "instances_train.json").read_text())
    content["annotations"][0]["bbox"] = [0, 0, 0, 0]
    (tmp_path / "partly.json").write_text(json.dumps(content))
    strict = [*arguments, "--annotations", str(tmp_path / "partly.json"), "--out", str(tmp_path / "strict")]
    assert CliRunner().invoke(detector_command, [*strict, *options[:4], "--strict"]).exit_code == 3


def test_what_was_found_on_the_photographs_held_out_is_kept_and_drawn(world: Path, finished: Path, tmp_path: Path) -> None:
    """The classes' figures agree with COCOeval's mean over them, the pictures with the annotations."""
    kept = read_held_out(finished)
    assert kept is not None
    truth = json.loads((world / "instances_train.json").read_text())
    training = json.loads((finished / "detector.json").read_text())["training"]
    assert kept.step == training["steps"] and kept.images == len(kept.worst) > 0
    assert sum(row.boxes for row in kept.classes) == sum(len(picture.annotated) for picture in kept.worst)
    for figure in ("ap", "ap50"):
        assert sum(getattr(row, figure) for row in kept.classes) / len(kept.classes) == pytest.approx(training[figure], abs=1e-6)
    files = {row["id"]: row["file_name"] for row in truth["images"]}
    annotated = Counter(files[row["image_id"]] for row in truth["annotations"])
    assert all(len(picture.annotated) == annotated[picture.file] for picture in kept.worst)
    page = ["--images", str(world / "images"), "--out", str(tmp_path / "page"), "--json"]
    shown = CliRunner().invoke(view_command, [str(finished), *page])
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.stdout)["held_out_pictures"] == len(kept.worst) == len(list((tmp_path / "page" / "pictures").iterdir()))
    idle = CliRunner().invoke(view_command, [str(finished), *page, "--limit", "3"])
    assert idle.exit_code == 2 and "--limit makes no difference" in idle.stderr
    assert all(len(picture.annotated) - picture.missed == len(picture.found) - picture.wrong for picture in kept.worst)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", sorted(WORLDS))
def test_the_defaults_learn_a_world(tmp_path: Path, name: str) -> None:
    """Shapes are found, and the features tell shapes and colours apart, whether or not colours were annotated."""
    torch.set_num_threads(2)
    write_world(tmp_path / "world", world=WORLDS[name], images=1200, held_out=200)
    folder = tmp_path / "world"
    choices = Choices(model="tiny", val_annotations=folder / "instances_val.json")
    summary = train_detector(folder / "images", folder / "instances_train.json", tmp_path / "detector", choices)
    assert summary["ap50"] > 0.85
    probed = {field: probe_accuracy(tmp_path / "detector", folder, field) for field in ("shape", "colour")}
    assert probed["shape"] > 0.85
    assert probed["colour"] > 0.8


def probe_accuracy(detector_folder: Path, world: Path, field: str) -> float:
    """Held-out accuracy of a linear classifier of the things' words on the features of their true boxes."""
    detector = build_detector(str(detector_folder))
    rows: dict[str, list[Any]] = {}
    words: dict[str, list[str]] = {}
    for part, most in (("train", 400), ("val", 200)):
        rows[part], words[part] = [], []
        for scene in json.loads((world / f"scenes_{part}.json").read_text())["scenes"][:most]:
            prepared = detector.prepare(decode_image((world / "images" / f"{scene['key']}.jpg").read_bytes()))
            boxes = np.array([thing["box"] for thing in scene["things"]], dtype=np.float32)
            rows[part].append(detector.detect([prepared], boxes=[boxes])[0].features)
            words[part] += [thing[field] for thing in scene["things"]]
    known = sorted(set(words["train"]))
    inputs, targets = torch.from_numpy(np.concatenate(rows["train"])), torch.tensor([known.index(word) for word in words["train"]])
    held_out, expected = torch.from_numpy(np.concatenate(rows["val"])), torch.tensor([known.index(word) for word in words["val"]])
    mean, deviation = inputs.mean(dim=0), inputs.std(dim=0) + 1e-3
    torch.manual_seed(0)
    classifier = torch.nn.Linear(inputs.shape[1], len(known))
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=1e-2, weight_decay=1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(classifier((inputs - mean) / deviation), targets).backward()
        optimizer.step()
    with torch.no_grad():
        return float((classifier((held_out - mean) / deviation).argmax(dim=1) == expected).float().mean())
