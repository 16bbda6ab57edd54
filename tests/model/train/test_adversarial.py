"""Adversarial training: VILLA's own loops number by number, its laws on every row, and its settings."""

import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from uniter.datasets.batches.collate import PackedBatch
from uniter.datasets.errors import BadInput
from uniter.model import UniterConfig, losses
from uniter.model.settings.files import assign, load_config, read_settings
from uniter.model.settings.published import read_published
from uniter.model.settings.settings import AdversarialSettings
from uniter.model.tasks.table import DOWNSTREAM
from uniter.model.tasks.task import Task, extras
from uniter.model.train.adversarial import Pass, Shift, passes, with_divergence, zero_shifts
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


def with_gradient(shift: Shift, gradient_NW: torch.Tensor) -> Shift:
    shift.values_NW.grad = gradient_NW.clone()
    return shift


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_a_shift_moves_each_sequence_by_the_rate(norm: Any) -> None:
    """Whatever the others' gradients are; one without gradient, or without rows, stays."""
    lengths = torch.tensor([2, 0, 3, 1])
    gradient = torch.tensor([[3.0, 0.0], [0.0, 4.0], [1e3, 0.0], [0.0, -1e3], [0.0, 0.0], [0.0, 0.0]])
    moved = with_gradient(Shift.zero(lengths, (6, 2)), gradient).moved(0.5, norm, 0.0)
    expected = [0.5, 0.0, 0.5, 0.0]
    assert moved.norms(moved.values_NW, norm).tolist() == pytest.approx(expected)
    behind = with_gradient(Shift.zero(lengths[:2], (6, 2), behind=4), gradient).moved(0.5, norm, 0.0)
    torch.testing.assert_close(behind.values_NW[:2], moved.values_NW[:2])  # rows behind all sequences are not theirs
    divisor = {"l2": 5.0, "linf": 4.0}[norm]
    torch.testing.assert_close(moved.values_NW[:2], gradient[:2] * 0.5 / divisor)
    # Brought back: an l2 norm shrinks, of linf every number is cut.
    short = with_gradient(Shift.zero(lengths, (6, 2)), gradient).moved(0.5, norm, 0.4)
    assert short.norms(short.values_NW.detach(), norm).max().item() == pytest.approx(0.4)


def test_divergences_by_hand() -> None:
    clean, other = torch.tensor([[0.0, 1.0, -1e4]]), torch.tensor([[0.5, 0.0, -1e4]])
    p, q = (torch.softmax(scores, dim=1)[0, :2].double() for scores in (clean, other))
    both = float((p * (p / q).log()).sum() + (q * (q / p).log()).sum())
    outputs = {"scores": clean}, {"scores": other}, {}
    assert float(losses.divergence_of_scores(*outputs)) == pytest.approx(both, rel=1e-5)
    assert losses.divergence_by_class(*outputs).shape == (1, 3)
    assert float(losses.divergence_by_class(*outputs).sum()) == pytest.approx(both, rel=1e-5)
    groups = {"scores": clean.view(3, 1)}, {"scores": other.view(3, 1)}, {}
    assert float(losses.divergence_in_groups(*groups, group_size=3)) == pytest.approx(both, rel=1e-5)
    far = torch.tensor([[2e4, -2e4]]).requires_grad_()
    value = losses.divergence_of_scores({"scores": -far.detach()}, {"scores": far}, {}).sum()
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(far.grad).all(), "where a probability underflows, as in the published form, no NaN"
    squared = losses.squared_distance({"scores": torch.tensor([[1.0, 2.0]])}, {"scores": torch.tensor([[1.5, 0.0]])}, {})
    assert squared.tolist() == [[0.25, 4.0]]
    # Of one's own labels: each by itself, so that a single one is compared too; scores in their deviation.
    single = {"scores": torch.tensor([[0.0]])}, {"scores": torch.tensor([[2.0]]), "deviation": torch.tensor(4.0)}, {}
    applies = 1 / (1 + math.exp(-2.0))
    expected = sum(p * math.log(p / q) for p, q in ((0.5, applies), (0.5, 1 - applies), (applies, 0.5), (1 - applies, 0.5)))
    assert float(losses.divergence_by_label(*single)) == pytest.approx(expected, rel=1e-5)
    assert losses.distance_of_scores(*single).tolist() == [0.25]


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ({"on": ["text", "text"]}, "adversarial.on: text, text names one twice"),
        ({"on": []}, "adversarial.on is [], but list should have at least 1 item"),
        ({"on": ["words"]}, "adversarial.on.0 is 'words', but input should be 'text' or 'image'"),
        ({"rate": {"image": 1e-3}}, "adversarial.rate: has image, but text is shifted (adversarial.on)"),
        ({"alternate": True}, "adversarial.alternate: only text is shifted; set adversarial.on to [text, image]"),
        ({"steps": 0}, "adversarial.steps is 0, but input should be greater than or equal to 1"),
        ({"rates": 1}, "unknown key 'adversarial.rates'; did you mean 'adversarial.rate'?"),
    ],
)
def test_settings_that_cannot_be_are_said(said: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadInput) as caught:
        read_settings({"corpora": [{"text": ["a.db"], "images": ["a.lmdb"]}], "adversarial": said}, source="mine.yaml")
    assert str(caught.value).startswith(f"mine.yaml: {sentence}")


def test_the_key_on_is_a_word_in_yaml(tmp_path: Path) -> None:
    """YAML 1.1 reads it as true."""
    path = tmp_path / "mine.yaml"
    path.write_text("corpora: [{text: [a.db], images: [a.lmdb]}]\ntensorboard: no\nadversarial: {on: [image], rate: 1e-2}\n")
    settings = read_settings(load_config(str(path)), source="mine.yaml")
    assert settings.adversarial is not None and settings.adversarial.on == ["image"] and settings.adversarial.rate == 0.01
    assert settings.tensorboard is False
    values: dict[str, Any] = {"adversarial": None}
    assign(values, "adversarial.steps=2")
    assign(values, "adversarial.on=[text, image]")
    assert values == {"adversarial": {"steps": 2, "on": ["text", "image"]}}
    assign(values, "adversarial={on: [image]}")
    assert values == {"adversarial": {"on": ["image"]}}


VILLA = {
    "train_txt_db": "t", "train_img_db": "i", "optim": "adamw", "adv_training": True, "adv_steps": 3, "adv_kl_weight": 1,
    "adv_lr_txt": 1e-3, "adv_lr_img": 2e-3,
}  # fmt: skip


def test_villas_keys_mean_our_settings() -> None:
    def read(**changes: Any) -> Any:
        return read_published({**VILLA, **changes}, source="x.json", own_start=True, task="ve").get("adversarial")

    assert read()["rate"] == {"text": 1e-3} and not read()["alternate"]
    alternating = read(adv_modality=["text", "image", "alter"])
    assert alternating["alternate"] and alternating["rate"] == {"text": 1e-3, "image": 2e-3}
    assert read(adv_training=False) is None
    for changes, sentence in (
        ({"adv_init_mag": 0.1}, "x.json: adv_init_mag is 0.1; shifts begin at zero"),
        ({"adv_modality": ["sound"]}, "x.json: adv_modality names sound; expected text, image"),
        ({"adv_modality": ["image"], "adv_lr_img": None}, "adversarial"),
    ):
        with pytest.raises(BadInput, match=sentence):
            read_settings({"corpora": [{"text": ["a"], "images": ["b"]}], "adversarial": read(**changes)}, source="x.json")
    without = {key: value for key, value in VILLA.items() if key != "adv_steps"}
    with pytest.raises(BadInput, match="adv_training without adv_steps"):
        read_published(without, source="x.json", own_start=True, task="ve")


def sequence_alone(batch: PackedBatch, number: int) -> PackedBatch:
    """A batch of one sequence of another one."""
    texts, regions = (lengths.cumsum(0).tolist() for lengths in (batch.text_lengths_B, batch.region_counts_B))
    words, shown = (slice(([0, *ends])[number], ends[number]) for ends in (texts, regions))
    return PackedBatch(
        input_ids_T=batch.input_ids_T[words],
        text_positions_T=batch.text_positions_T[words],
        text_types_T=batch.text_types_T[words],
        features_RD=batch.features_RD[shown],
        positions_R7=batch.positions_R7[shown],
        region_types_R=batch.region_types_R[shown],
        text_lengths_B=batch.text_lengths_B[number : number + 1],
        region_counts_B=batch.region_counts_B[number : number + 1],
    )


def test_a_sequence_is_shifted_as_if_it_were_alone(make_batch: Any) -> None:
    """Packed together or one by one: the same shifts, and the same gradients added up."""
    config = UniterConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_feature_size=12,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    task = DOWNSTREAM["vqa"]
    model = extras(task).model(config, answers=5)
    with torch.no_grad():
        model.vqa_output[3].weight.mul_(20)
    together = make_batch([4, 9, 3], [7, 2, 5], width=12, vocabulary=60)
    together.targets["answers"] = torch.rand(3, 5)
    adversarial = AdversarialSettings(steps=3, rate=0.5, on=["text", "image"])
    weighed = with_divergence(task, adversarial)

    def run(batch: PackedBatch) -> dict[str, torch.Tensor]:
        shifts = zero_shifts(batch, adversarial.on, hidden=32)
        *_, last = passes(partial(task.head, model), weighed, batch, shifts, adversarial, normalisation="global-mean")
        return {side: shift.values_NW.detach() for side, shift in last.shifts.items()}

    expected = run(together)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    alone = []
    for number in range(3):
        one = sequence_alone(together, number)
        alone.append(run(replace(one, targets={"answers": together.targets["answers"][number : number + 1]})))
    for side, values in expected.items():
        torch.testing.assert_close(torch.cat([shifts[side] for shifts in alone]), values, atol=1e-5, rtol=1e-4)
    for name, gradient in gradients.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, atol=2e-5, rtol=1e-3, msg=name)
