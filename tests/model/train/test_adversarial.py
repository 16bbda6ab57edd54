"""Adversarial training: VILLA's own loops number by number, its laws on every row, and its settings."""

import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from uniter.datasets.batches.collate import PackedBatch
from uniter.model import UniterConfig, losses
from uniter.model.settings.published import read_published
from uniter.model.settings.settings import AdversarialSettings
from uniter.model.tasks.table import DOWNSTREAM
from uniter.model.tasks.task import Task, extras
from uniter.model.train.adversarial import Pass, passes, with_divergence, zero_shifts
from uniter.model.train.optim import AdamW, clear_gradients, clip_gradients, learning_rate, parameter_groups, set_learning_rate

# The golden README's limits: (atol, rtol).
LIMITS = {
    "logits": (2e-5, 1e-5),
    "task_loss": (1e-5, 1e-5),
    "loss": (1e-5, 1e-5),
    "kl_loss": (2e-6, 1e-4),
    "delta": (1e-5, 0.0),
    "delta_grad_norm": (2e-6, 2e-5),
    "lr": (0.0, 1e-12),
    "grad_norm": (0.0, 1e-5),
    "grad_l2": (2e-5, 2e-5),
    "param": (3e-5, 1e-5),
    "final": (1e-5, 0.0),
}
PUBLISHED_LIMITS = {**LIMITS, "delta": (1e-8, 0.0), "kl_loss": (5e-7, 0.0), "final": (2e-6, 0.0)}
TARGETS = {"vqa": "answers", "ve": "answers", "nlvr2": "truth", "vcr": "correct"}
Pack = Callable[[Mapping[str, np.ndarray]], Any]


# Beside the project, not part of it; where it is absent its tests are skipped, visibly.
FOLDER = Path(os.environ.get("VILLA_GOLDEN", Path(__file__).parents[4] / "shared" / "golden" / "villa"))
CASES = sorted(path.stem for path in (FOLDER / "cases").glob("*.json")) or ["absent"]


@pytest.fixture
def villa_golden() -> Path:
    if "VILLA_GOLDEN" not in os.environ and not FOLDER.is_dir():
        pytest.skip(f"{FOLDER} is absent; VILLA_GOLDEN names another folder")
    assert CASES != ["absent"], f"{FOLDER} holds no cases/*.json"
    return FOLDER


@dataclass
class Golden:
    """One recording, and the model and batches it was made with."""

    case: dict[str, Any]
    task: Task
    model: Any
    keys: dict[str, Any]
    inputs: list[dict[str, np.ndarray]]
    batches: list[PackedBatch]
    expected: Any
    final: Path

    @classmethod
    def read(cls, folder: Path, name: str, pack: Pack) -> "Golden":
        case = json.loads((folder / "cases" / f"{name}.json").read_text())
        head = case["head"]
        state = {**load_file(folder / "weights.safetensors"), **load_file(folder / "heads" / f"{head}.weights.safetensors")}
        keys = json.loads((folder / "heads" / f"{head}.keys.json").read_text())
        words, types = (len(state[f"uniter.embeddings.{table}_embeddings.weight"]) for table in ("word", "token_type"))
        width = json.loads((folder / "meta.json").read_text())["img_dim"]
        config = UniterConfig.from_json(folder / "config.json", image_feature_size=width, vocab_size=words, type_vocab_size=types)
        task = DOWNSTREAM[case["task"]]
        kind = extras(task).model
        model = kind(config, **kind.sizes(state))
        model.load_state_dict(state)
        assert {key: list(value.shape) for key, value in model.state_dict().items()} == keys["keys"]
        inputs = [dict(np.load(folder / path)) for path in case["inputs"]]
        batches = []
        for arrays in inputs:
            batch = pack({key: value for key, value in arrays.items() if key != "targets"}).batch
            assert batch.text_lengths_B.tolist() == arrays["text_lengths"].tolist()
            assert batch.region_counts_B.tolist() == arrays["region_counts"].tolist()
            wanted = torch.from_numpy(arrays["targets"])
            batch.targets[TARGETS[case["task"]]] = wanted if wanted.is_floating_point() else wanted.reshape(-1)
            batches.append(batch)
        recorded = np.load(folder / "cases" / f"{name}.npz")
        return cls(case, task, model.train(), keys, inputs, batches, recorded, folder / "cases" / f"{name}.final.safetensors")

    def settings(self) -> AdversarialSettings | None:
        """As our reader of VILLA's files understands the case."""
        values = {**self.case, "train_txt_db": "t", "train_img_db": "i", "optim": "adamw"}
        ours = read_published(values, source="case", own_start=True, task=self.case["task"])
        return AdversarialSettings.model_validate(ours["adversarial"]) if "adversarial" in ours else None

    def optimizer(self) -> AdamW:
        case = self.case
        groups = parameter_groups(
            self.model, weight_decay=case["weight_decay"], head=extras(self.task).head, head_rate_multiplier=case["lr_mul"]
        )
        named = {(group["weight_decay"] > 0, group["rate_multiplier"] != 1): sorted(group["names"]) for group in groups}
        for name, names in self.keys["groups"].items():
            assert named[not name.endswith("no_decay"), name.startswith("top_") and case["lr_mul"] != 1] == sorted(names), name
        return AdamW(groups, lr=1.0, betas=tuple(case["betas"]))

    def real_rows(self, number: int, padded: np.ndarray, side: str) -> np.ndarray:
        """The rows of a padded (N, T or R, width) array that stand for a word or region."""
        lengths = self.inputs[number]["text_lengths" if side == "text" else "region_counts"]
        return np.concatenate([rows[:length] for rows, length in zip(padded, lengths, strict=True)])


def updates(golden: Golden, observe: Callable[[str, int, Pass], None]) -> Iterator[tuple[int, float, float]]:
    """Number, rate and gradient norm of each update, before it is made; whoever takes the next one lets it be made."""
    case, adversarial = golden.case, golden.settings()
    task, optimizer = with_divergence(golden.task, adversarial), golden.optimizer()
    score = partial(task.head, golden.model)
    taken = itertools.count()
    for update in range(1, case["updates"] + 1):
        for number in range(1, case["gradient_accumulation_steps"] + 1):
            place = next(taken)
            batch = golden.batches[place % len(golden.batches)]
            if adversarial is None:
                loss = losses.of(task.losses(score(batch), batch.targets), reduction=task.reduction)
                loss.number.backward()
                assert_close(loss.number, golden.expected[f"u{update}.b{number}.loss"], LIMITS["loss"])
                continue
            shifts = zero_shifts(batch, adversarial.on, hidden=golden.model.config.hidden_size)
            for inner, one in enumerate(passes(score, task, batch, shifts, adversarial, normalisation="published"), start=1):
                observe(f"u{update}.b{number}.k{inner}.", place % len(golden.batches), one)
        norm = float(clip_gradients(golden.model.parameters(), -1))
        rate = learning_rate(update, base=case["learning_rate"], warmup_steps=case["warmup_steps"], total_steps=case["num_train_steps"])
        yield update, rate, norm
        clip_gradients(golden.model.parameters(), case["grad_norm"])
        set_learning_rate(optimizer, rate)
        optimizer.step()
        clear_gradients(optimizer, "none")


def assert_close(got: Any, expected: Any, limit: tuple[float, float], what: str = "") -> None:
    got = got.detach().numpy() if isinstance(got, torch.Tensor) else np.asarray(got)
    np.testing.assert_allclose(got, np.asarray(expected).reshape(got.shape), atol=limit[0], rtol=limit[1], err_msg=what)


@pytest.mark.parametrize("name", CASES)
def test_golden_villa(name: str, villa_golden: Path, pack: Pack) -> None:
    """Every recorded number of the authors' loops, within the limits of the recording's README."""
    golden = Golden.read(villa_golden, name, pack)
    limits = PUBLISHED_LIMITS if name.endswith("published") else LIMITS
    adversarial, parameters = golden.settings(), dict(golden.model.named_parameters())
    expected, looked_at = golden.expected, set()

    def compare(key: str, got: Any, limit: str) -> None:
        looked_at.add(key)
        assert_close(got, expected[key], limits[limit], key)

    def observe(key: str, place: int, one: Pass) -> None:
        assert adversarial is not None
        sides = [f"_{side}" for side in one.shifts] if adversarial.alternate else [""]
        for side, outputs, loss in zip(sides, one.outputs, one.losses, strict=True):
            compare(f"{key}logits{side}", outputs["scores"], "logits")
            sums = {term: total / count for term, (total, count) in loss.sums.items()}
            divergence = sums.pop(losses.DIVERGENCE, torch.zeros(()))
            compare(f"{key}kl_loss{side}", divergence, "kl_loss")
            compare(f"{key}task_loss{side}", sum(sums.values()), "task_loss")
        if key.endswith("k1."):
            compare(key.replace("k1.", "clean_logits"), one.outputs[0]["scores"], "logits")  # the first pass shifts nothing
        compare(f"{key}loss", sum(loss.number for loss in one.losses) / (adversarial.steps * len(one.losses)), "loss")
        for side, shift in one.shifts.items():
            wanted = expected[f"{key}delta_{side}"]
            looked_at.add(f"{key}delta_{side}")
            assert_close(shift.values_NW, golden.real_rows(place, wanted, side), limits["delta"], f"{key}delta_{side}")
            compare(f"{key}delta_grad_norm_{side}", shift.norms(shift.values_NW.grad, "l2"), "delta_grad_norm")

    def compare_weights(update: int) -> None:
        for what, of in (("sum", torch.Tensor.sum), ("abs", lambda values: values.abs().sum())):
            sums = [of(parameters[parameter].detach().double()).item() for parameter in golden.keys["parameters"]]
            compare(f"u{update}.param_{what}", sums, "param")

    for update, rate, norm in updates(golden, observe):
        if update > 1:
            compare_weights(update - 1)
        compare(f"u{update}.lr", rate, "lr")
        compare(f"u{update}.grad_norm", norm, "grad_norm")
        gradients = [parameters[parameter].grad for parameter in golden.keys["parameters"]]
        compare(f"u{update}.grad_l2", [-1 if one is None else one.double().norm().item() for one in gradients], "grad_l2")
    compare_weights(golden.case["updates"])
    assert looked_at | {key for key in expected.files if adversarial is None and key.endswith(".loss")} == set(expected.files)
    if golden.final.is_file():
        for key, value in load_file(golden.final).items():
            assert_close(golden.model.state_dict()[key], value, limits["final"], key)


def test_golden_villa_with_one_step_and_no_weight_is_a_plain_update(villa_golden: Path, pack: Pack) -> None:
    """Bit for bit, also here: the same weights after three updates."""
    ended = []
    for name in ("vqa_k1", "vqa_plain"):
        golden = Golden.read(villa_golden, name, pack)
        list(updates(golden, lambda *_: None))
        ended.append(golden.model.state_dict())
    assert all(torch.equal(value, ended[1][key]) for key, value in ended[0].items())
