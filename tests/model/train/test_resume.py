"""Resume is a law: a run that was stopped, killed or pre-empted and repeated equals one that never was, to the bit."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from uniter.datasets.errors import BadInput, SettingsDiffer
from uniter.datasets.runs.run_log import read_log
from uniter.datasets.runs.step_folders import checkpoint_path, checkpoint_steps, point, remove_old
from uniter.model import losses
from uniter.model.settings.files import CONFIG_FILE, write_config
from uniter.model.settings.settings import TrainSettings
from uniter.model.train import state
from uniter.model.train.pretraining import pretrain
from uniter.model.train.runs import _earlier_settings

CLOCK = {"seconds", "tokens_per_second", "data_wait_share"}
Make = Callable[..., TrainSettings]


def log_of(run: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name not in CLOCK} for line in read_log(run)]


def assert_same_runs(one: Path, other: Path) -> None:
    """Weights, optimizer, progress and everything logged but the clock."""
    last = checkpoint_steps(one)[-1]
    assert checkpoint_steps(other)[-1] == last
    left, right = checkpoint_path(one, last), checkpoint_path(other, last)
    for name in ("model.safetensors", "optimizer.safetensors"):
        before, after = load_file(left / name), load_file(right / name)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before), name
    assert json.loads((left / "state.json").read_text()) == json.loads((right / "state.json").read_text())
    assert log_of(one) == log_of(other)


@pytest.fixture
def unbroken(small: Make, tmp_path: Path) -> Path:
    run = tmp_path / "unbroken"
    pretrain(small(), run)
    return run


def test_stopped_twice_equals_never_stopped(small: Make, unbroken: Path, tmp_path: Path) -> None:
    run = tmp_path / "stopped"
    pretrain(small(stop_after=3), run)
    assert checkpoint_steps(run)[-1] == 3
    pretrain(small(stop_after=5), run)
    summary = pretrain(small(), run)
    assert summary["steps"] == 8
    assert_same_runs(unbroken, run)


def test_killed_inside_an_accumulation_window(small: Make, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, calls, original = tmp_path / "killed", [0], losses.of

    def dying(*args: Any, **given: Any) -> Any:
        calls[0] += "normalisation" in given  # validation differentiates nothing
        if calls[0] == 2 * 5 + 2:  # the second micro-batch of update 6, with gradients of the first in the parameters
            raise MemoryError
        return original(*args, **given)

    monkeypatch.setattr(losses, "of", dying)
    with pytest.raises(MemoryError):
        pretrain(small(), run)
    monkeypatch.setattr(losses, "of", original)
    assert checkpoint_steps(run)[-1] == 4
    pretrain(small(), run)
    assert_same_runs(unbroken, run)


def test_a_finished_run_repeated_does_nothing(small: Make, unbroken: Path) -> None:
    before = log_of(unbroken)
    assert pretrain(small(), unbroken)["steps"] == 8
    assert log_of(unbroken) == before


def test_no_generator_of_the_caller_matters(small: Make, unbroken: Path, tmp_path: Path) -> None:
    torch.manual_seed(123)
    pretrain(small(), tmp_path / "again")
    assert_same_runs(unbroken, tmp_path / "again")


def start(settings: TrainSettings, run: Path) -> subprocess.Popen[str]:
    write_config(run.parent / f"{run.name}.yaml", settings)
    command = [sys.executable, "-m", "uniter.cli.train", "pretrain", "--config", f"{run}.yaml", "--out", str(run)]
    # One thread, as in this process: another number of threads sums in another order.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def wait_for_line(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    for _ in range(1200):
        if (run / "checkpoints" / f"step-{step}").exists():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError("the run never came so far")


def test_sigterm_writes_a_checkpoint_and_exits(small: Make, tmp_path: Path) -> None:
    # Long enough that the signal comes in the middle.
    settings = small(steps=400, checkpoint_every=5, validate_every=400)
    run = tmp_path / "told"
    process = start(settings, run)
    wait_for_line(run, 5, process)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    steps = checkpoint_steps(run)[-1]
    assert f"stopped by SIGTERM after update {steps} of 400" in said
    last = log_of(run)[-1]
    assert last["step"] == steps


def test_what_killed_processes_left_is_removed(small: Make, tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    for name in ("step-1", ".incoming-2-77", ".leaving-step-0-77"):
        (checkpoints / name).mkdir(parents=True)
        (checkpoints / name / "model.safetensors").touch()
    with contextlib.suppress(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        point(checkpoints / "latest", "step-1")
    assert len(list(checkpoints.iterdir())) == 4
    remove_old(tmp_path, keep=2)
    assert [path.name for path in checkpoints.iterdir()] == ["step-1"] and list((checkpoints / "step-1").iterdir())
    # The very first thing that a run writes.
    with contextlib.suppress(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        (tmp_path / "run").mkdir()
        write_config(tmp_path / "run" / CONFIG_FILE, small())
    assert list((tmp_path / "run").iterdir()) and _earlier_settings(tmp_path / "run") is None


def killed(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.slow
def test_killed_at_any_instant_leaves_complete_checkpoints_only(small: Make, tmp_path: Path) -> None:
    settings = small(steps=60, checkpoint_every=1, validate_every=60)
    unbroken, run = tmp_path / "unbroken", tmp_path / "killed"
    pretrain(settings, unbroken)
    for wait in (0.0, 0.13, 0.31, 0.47):
        process = start(settings, run)
        have = checkpoint_steps(run)
        wait_for_line(run, (have[-1] if have else 0) + 3, process)
        time.sleep(wait)
        process.kill()
        process.communicate()
        for step in checkpoint_steps(run):
            path = checkpoint_path(run, step)
            assert state.read_state(path)[0].step == step
            assert load_file(path / "model.safetensors") and load_file(path / "optimizer.safetensors")
    pretrain(settings, run)
    assert_same_runs(unbroken, run)
    assert not [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".")]


def test_the_newest_and_the_best_are_kept(small: Make, tmp_path: Path) -> None:
    run = tmp_path / "run"
    pretrain(small(keep=2, checkpoint_every=1), run)
    checkpoints = run / "checkpoints"
    best = (checkpoints / "best").readlink().name
    assert (checkpoints / "latest").readlink().name == "step-8"
    assert {path.name for path in checkpoints.iterdir()} == {"latest", "best", "step-7", "step-8", best}
    losses = {line["step"]: line["relative_loss"] for line in log_of(run) if line["kind"] == "validation"}
    assert losses[4] == pytest.approx(1)  # the first is what the others are relative to
    assert best == f"step-{min(losses, key=lambda step: losses[step])}"
    files = {path.name for path in (checkpoints / "step-8").iterdir()}
    assert files == {"model.safetensors", "config.json", "optimizer.safetensors", "state.json", "vocab.txt", "tokenizer_config.json"}


def test_the_best_of_an_older_run_is_told_by_its_log(small: Make, tmp_path: Path) -> None:
    """Before, a checkpoint knew the mean of the losses and its step alone."""
    run = tmp_path / "run"
    pretrain(small(steps=16, stop_after=8, keep=20), run)
    file = checkpoint_path(run, 8) / "state.json"
    values = json.loads(file.read_text())
    known = values.pop("first"), values["best"]
    file.write_text(json.dumps({**values, "best": [values["best"][1] * 100, 4]}))
    pretrain(small(steps=16, stop_after=10, keep=20), run)
    after = json.loads((checkpoint_path(run, 10) / "state.json").read_text())
    assert (after["first"], after["best"]) == known
    assert (run / "checkpoints" / "best").readlink().name == f"step-{known[1][2]}"


def test_another_run_in_the_same_folder_is_refused(small: Make, unbroken: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsDiffer, match=r"other settings \(seed: 42 -> 43\)"):
        pretrain(small(seed=43), unbroken)
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday" / "photo.jpg").touch()
    with pytest.raises(BadInput, match=r"not empty and no run of uniter-train"):
        pretrain(small(), tmp_path / "holiday")


def test_a_damaged_checkpoint_is_named(small: Make, unbroken: Path) -> None:
    path = checkpoint_path(unbroken, 8)
    (path / "state.json").write_text('{"step": 8')
    with pytest.raises(BadInput, match=r"step-8: cannot read state.json"):
        pretrain(small(), unbroken)


def test_half_a_line_of_the_log_is_cut_off(small: Make, unbroken: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    pretrain(small(stop_after=4), run)
    with (run / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "kind": "train", "loss": 1.0}\n{"step": 6, "kin')
    pretrain(small(), run)
    assert_same_runs(unbroken, run)
