"""Adversarial runs: every row of both tables keeps the laws of training."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from uniter.datasets.runs.run_log import read_log
from uniter.datasets.runs.step_folders import checkpoint_path, checkpoint_steps
from uniter.model.settings.files import read_settings, write_config
from uniter.model.settings.gather import gather_settings
from uniter.model.settings.settings import TrainSettings
from uniter.model.tasks.table import DOWNSTREAM, PRETRAINING
from uniter.model.tasks.task import extras
from uniter.model.train.finetuning import finetune
from uniter.model.train.pretraining import pretrain

Make = Callable[..., TrainSettings]
SHORT = {"steps": 2, "validate_every": 2, "checkpoint_every": 2, "validation_examples": 10, "batch_tokens": 300, "accumulation": 1}
BOTH = {"steps": 3, "rate": {"text": 0.05, "image": 0.1}, "weight": 1.5, "on": ["text", "image"]}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, made_up: Any) -> dict[str, str]:
    """The made-up world's regions (VCR's: annotated and detected), and a text database of each task's texts."""
    folder = tmp_path_factory.mktemp("tasks")
    scenes = made_up.World(width=16, noise=0.1)
    _, images = scenes.write(folder, pictures=24, captions=2)
    _, found = scenes.write(folder / "found", pictures=24, captions=1, prefix="found_scene")
    texts = {row.finetuning.texts[0] for row in DOWNSTREAM.values() if row.finetuning is not None}
    return {"images": str(images), "both kinds": f"{images};{found}"} | {task: str(scenes.write_task(folder, task)) for task in texts}


def of_row(name: str, world: dict[str, str], small: Make, **changes: Any) -> TrainSettings:
    row = DOWNSTREAM[name]
    kinds = name == "vcr"
    corpus = {"name": "toy", "text": [world[extras(row).texts[0]]], "images": [world["both kinds" if kinds else "images"]]}
    return small(**{"corpora": [corpus], "task": name, **SHORT, **changes})


def state_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint_path(run, checkpoint_steps(run)[-1]) / "model.safetensors")


def assert_same(one: Path, other: Path) -> None:
    left, right = state_of(one), state_of(other)
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("name", DOWNSTREAM)
def test_every_down_stream_row_trains(name: str, world: dict[str, str], small: Make, tmp_path: Path) -> None:
    finetune(of_row(name, world, small, adversarial=BOTH), tmp_path / "run")
    lines = [line for line in read_log(tmp_path / "run") if line["kind"] == "train"]
    assert min(line[f"{name}_toy/loss_divergence"] for line in lines) > 0
    assert np.isfinite([line["loss"] for line in lines]).all()


def test_an_interrupted_run_equals_an_unbroken_one(world: dict[str, str], small: Make, tmp_path: Path) -> None:
    unbroken, run = tmp_path / "unbroken", tmp_path / "run"
    finetune(of_row("nlvr2", world, small, adversarial=BOTH, steps=4), unbroken)
    finetune(of_row("nlvr2", world, small, adversarial=BOTH, steps=4, stop_after=2), run)
    finetune(of_row("nlvr2", world, small, adversarial=BOTH, steps=4), run)
    assert_same(unbroken, run)


def of_pretraining(small: Make, **changes: Any) -> TrainSettings:
    settings = small(**changes)
    settings.corpora[0].tasks = dict.fromkeys(PRETRAINING, 1.0)
    return settings


def test_every_pre_training_row_trains_and_resumes(small: Make, tmp_path: Path) -> None:
    unbroken, run = tmp_path / "unbroken", tmp_path / "run"
    steps = {"steps": 14, "accumulation": 1, "validate_every": 14, "checkpoint_every": 7, "validation_examples": 10, "adversarial": BOTH}
    pretrain(of_pretraining(small, **steps), unbroken)
    pretrain(of_pretraining(small, **steps, stop_after=7), run)
    pretrain(of_pretraining(small, **steps), run)
    assert_same(unbroken, run)
    seen = {line["part"]: line for line in read_log(unbroken) if line["kind"] == "train"}
    assert {part.split("_")[0] for part in seen} == set(PRETRAINING)
    assert all(line[f"{part}/loss_divergence"] > 0 for part, line in seen.items())


PLAIN = {"steps": 1, "weight": 0}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_pass_without_weight_is_plain_training_to_the_bit(precision: str, world: dict[str, str], small: Make, tmp_path: Path) -> None:
    """With both sides named, and even with dropout: no clean pass draws before."""
    for number, adversarial in enumerate((None, {**BOTH, **PLAIN})):
        more: dict[str, Any] = {"adversarial": adversarial, "precision": precision, "validation_examples": 10}
        pretrain(of_pretraining(small, **more, steps=6, validate_every=6, checkpoint_every=6), tmp_path / f"pretrain{number}")
        finetune(of_row("vqa", world, small, **more), tmp_path / f"vqa{number}")
    for name in ("pretrain", "vqa"):
        assert_same(tmp_path / f"{name}0", tmp_path / f"{name}1")


def test_it_is_another_run_than_a_plain_one(world: dict[str, str], small: Make, tmp_path: Path) -> None:
    for number, adversarial in enumerate((None, {"steps": 1}, {"steps": 2, "weight": 0}, {"steps": 2}, {"steps": 2, "on": ["image"]})):
        finetune(of_row("ve", world, small, adversarial=adversarial, dropout=0.1), tmp_path / str(number))
    heads = [state_of(tmp_path / str(number))["vqa_output.3.weight"] for number in range(5)]
    assert all(not torch.equal(one, other) for place, one in enumerate(heads) for other in heads[:place])


# What VILLA's files say beside what UNITER's do; numbers of config/train-*-adv.json.
ADVERSARIAL = {
    "adv_training": True, "adv_modality": ["text"], "adv_lr_txt": 1e-3, "adv_lr_img": 1e-3, "adv_steps": 3, "norm_type": "l2",
    "adv_max_norm": 0, "adv_kl_weight": 1.5,
}  # fmt: skip
COMMON = {
    "checkpoint": "/pretrain/villa-base.pt", "model_config": "/src/config/uniter-base.json", "output_dir": "/storage/villa-base",
    "max_txt_len": 60, "conf_th": 0.2, "max_bb": 100, "min_bb": 10, "num_bb": 36, "val_batch_size": 4096, "optim": "adamw",
    "betas": [0.9, 0.98], "dropout": 0.1, "weight_decay": 0.01, "grad_norm": 2.0, "seed": 42, "fp16": True, "n_workers": 4,
    "pin_mem": True, "valid_steps": 500,
}  # fmt: skip
FILES: dict[str, dict[str, Any]] = {
    "vqa": {"train_txt_dbs": ["/txt/t.db"], "train_img_dbs": ["/img/i/"], "train_batch_size": 5120, "gradient_accumulation_steps": 5,
            "learning_rate": 8e-5, "lr_mul": 10.0, "num_train_steps": 6000, "warmup_steps": 600},
    "ve": {"train_txt_db": "/txt/t.db", "train_img_db": "/img/i/", "train_batch_size": 4096, "gradient_accumulation_steps": 4,
           "learning_rate": 8e-5, "num_train_steps": 4000, "warmup_steps": 400, "compressed_db": False},
    "nlvr2": {"train_txt_db": "/txt/t.db", "train_img_db": "/img/i/", "train_batch_size": 10240, "gradient_accumulation_steps": 1,
              "learning_rate": 3e-5, "num_train_steps": 8000, "warmup_steps": 800, "model": "paired-attn", "use_img_type": True},
    "vcr": {"train_txt_dbs": ["/txt/t.db"], "train_img_dbs": ["/img/i/;/img/f/"], "train_batch_size": 4000, "lr_mul": 1.0,
            "gradient_accumulation_steps": 5, "learning_rate": 6e-5, "num_train_steps": 8000, "warmup_steps": 800, "max_txt_len": 220,
            "checkpoint_from": "vcr_pretrain", "adv_modality": ["image", "text"], "adv_lr_txt": 1e-2, "adv_lr_img": 1e-2},
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_villas_own_files_run_from_villas_checkpoints(name: str, world: dict[str, str], small: Make, tmp_path: Path) -> None:
    """Whose tensors are called `bert.`; they are the start, not something random."""
    start = tmp_path / "pretrain" / "villa-base.pt"
    pretrain(small(steps=1, validate_every=1, checkpoint_every=1), tmp_path / "pretrained")
    state = {key.replace("uniter.", "bert."): value for key, value in state_of(tmp_path / "pretrained").items()}
    start.parent.mkdir()
    torch.save(state, start)
    start.with_suffix(".json").write_text((tmp_path / "pretrained" / "checkpoints" / "latest" / "config.json").read_text())
    images = world["both kinds"].split(";")
    for place, target in {"txt/t.db": world[name], "img/i": images[0], "img/f": images[1]}.items():
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).symlink_to(target)
    path = tmp_path / f"train-{name}-base-4gpu-adv.json"
    path.write_text(json.dumps({**COMMON, **ADVERSARIAL, **FILES[name]}))
    roots = [f"/{folder}={tmp_path / folder}" for folder in ("txt", "img", "pretrain")]
    short = ["steps=2", "optimizer.warmup_steps=1", "batch_tokens=400", "accumulation=1", "validate_every=2", "tensorboard=false"]
    settings = gather_settings(str(path), roots=roots, options={"task": name, "device": "cpu", "workers": 0}, assignments=short)
    assert settings.from_ == str(start) and settings.adversarial is not None
    rate = 0.01 if name == "vcr" else 0.001
    assert settings.adversarial.model_dump() == {
        "steps": 3, "weight": 1.5, "norm": "l2", "max_norm": 0.0, "alternate": False,
        "on": ["text", "image"] if name == "vcr" else ["text"],
        "rate": {"text": rate, "image": rate} if name == "vcr" else {"text": rate},
    }  # fmt: skip
    assert finetune(settings, tmp_path / "run")["steps"] == 2
    layer = "uniter.encoder.layer.0.attention.self.query.weight"
    torch.testing.assert_close(state_of(tmp_path / "run")[layer], state[layer.replace("uniter.", "bert.")], atol=5e-4, rtol=0)


def test_settings_of_an_adversarial_run_read_back(small: Make) -> None:
    settings = small(adversarial=BOTH)
    assert read_settings(settings.model_dump(mode="json", by_alias=True), source="again") == settings


def test_two_processes_equal_one_with_twice_the_accumulation(small: Make, tmp_path: Path) -> None:
    """Dropout, shifts and all; in both the settings say for two processes what an update is."""
    more: dict[str, Any] = {"processes": 2, "accumulation": 1, "adversarial": BOTH, "steps": 3, "validate_every": 3, "checkpoint_every": 3}
    more |= {"normalisation": "published", "validation_examples": 10}
    two, one, alone = tmp_path / "two", tmp_path / "one", tmp_path / "alone"
    write_config(tmp_path / "two.yaml", small(**more))
    scripts = Path(sys.executable).parent
    command = [str(scripts / "torchrun"), "--standalone", "--nproc-per-node=2", "--no-python", str(scripts / "uniter-train")]
    command += ["pretrain", "--config", str(tmp_path / "two.yaml"), "--out", str(two)]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    pretrain(small(**more), one)
    pretrain(small(**more, stop_after=2), alone)
    pretrain(small(**more), alone)
    said = running.communicate(timeout=400)[1]
    assert running.returncode == 0, said
    left, right = state_of(one), state_of(two)
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, right[name], rtol=1e-5, atol=1e-6, msg=name)
    assert_same(one, alone)
    norms = [[line["grad_norm"] for line in read_log(run) if line["kind"] == "train"] for run in (one, two)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4), "averaged over two processes, however many there are"
