"""What a run leaves to be read: JSON lines, TensorBoard's events and, where it is wanted, Weights & Biases."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from uniter.datasets.errors import BadInput
from uniter.datasets.runs.run_log import RunLog, read_log
from uniter.model.settings.settings import TrainSettings
from uniter.model.train.pretraining import pretrain

Make = Callable[..., TrainSettings]


def numbers(run: Path, kind: str) -> dict[str, list[tuple[int, float]]]:
    """{"kind/figure": [(step, value)]} of the JSON lines."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in read_log(run):
        for name, value in line.items():
            if line["kind"] == kind and name not in {"step", "kind", "part"}:
                found.setdefault(f"{kind}/{name}", []).append((line["step"], value))
    return found


def test_tensorboard_shows_what_the_lines_say_also_after_a_resume(small: Make, tmp_path: Path) -> None:
    settings = {"tensorboard": True, "steps": 12, "validate_every": 6}
    pretrain(small(**settings, stop_after=5), tmp_path / "run")
    pretrain(small(**settings), tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"scalars": 0})
    events.Reload()
    expected = numbers(tmp_path / "run", "train") | numbers(tmp_path / "run", "validation")
    assert set(events.Tags()["scalars"]) == set(expected)
    for name in (
        "train/learning_rate", "train/grad_norm", "train/padding_share", "train/data_wait_share", "train/mlm_toy/accuracy",
        "train/mlm_toy/loss", "train/itm_toy/loss_transport", "validation/mlm_toy/accuracy",
    ):  # fmt: skip
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in shown] == [step for step, _ in expected[name]]
        assert [value for _, value in shown] == pytest.approx([value for _, value in expected[name]], rel=1e-6)


def test_weights_and_biases_gets_every_figure(small: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: dict[str, Any] = {}
    logged: list[tuple[int, dict[str, float]]] = []
    finished: list[bool] = []
    run = SimpleNamespace(log=lambda figures, step: logged.append((step, figures)), finish=lambda: finished.append(True))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **told: opened.update(told) or run))
    pretrain(small(steps=3, validate_every=3, wandb_project="toys"), tmp_path / "mine")
    assert opened["project"] == "toys" and opened["name"] == "mine" and finished == [True]
    first = opened["id"]
    lines = read_log(tmp_path / "mine")
    assert [step for step, _ in logged] == [line["step"] for line in lines]
    assert logged[0][1]["train/loss"] == lines[0]["loss"] and "validation/loss" in logged[-1][1]
    pretrain(small(steps=3, validate_every=3, wandb_project="toys"), tmp_path / "mine")
    assert opened["id"] == first and opened["resume"] == "allow"


def test_weights_and_biases_that_is_not_installed_is_a_sentence(small: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(BadInput, match=r"wandb is not installed; pip install 'uniter-toolkit\[wandb\]' or leave it out"):
        pretrain(small(wandb_project="toys"), tmp_path / "run")


def test_lines_can_be_read_while_the_run_goes_on(tmp_path: Path) -> None:
    with RunLog(tmp_path, step=0, tensorboard=False) as log:
        log.write(1, "train", {"loss": 0.5})
        assert json.loads((tmp_path / "log.jsonl").read_text()) == {"step": 1, "kind": "train", "loss": 0.5}
