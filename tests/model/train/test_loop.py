"""The loop's own laws: what an update does, what it logs, and that it stops before nonsense is learned."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from uniter.datasets.batches.corpus import Corpus
from uniter.datasets.batches.loader import Assembler
from uniter.datasets.errors import BadInput, UniterError
from uniter.datasets.runs.run_log import read_log
from uniter.datasets.runs.step_folders import checkpoint_path, checkpoint_steps
from uniter.model import losses
from uniter.model.settings.settings import TrainSettings
from uniter.model.tasks.compiling import compiled_head
from uniter.model.train.finite import NotFinite
from uniter.model.train.optim import AdamW
from uniter.model.train.pretraining import build_mixture, build_model, open_data, pretrain
from uniter.model.uniter import set_dropout

Make = Callable[..., TrainSettings]
ADVERSARIAL = {"steps": 2, "rate": 0.05, "on": ["text", "image"]}
ONE_OR_THE_OTHER = pytest.mark.parametrize("adversarial", [None, ADVERSARIAL], ids=["plain", "adversarial"])


def gradients_of_an_update(settings: TrainSettings, *, part_name: str) -> tuple[dict[str, torch.Tensor], Any, Any]:
    """The gradients after two micro-batches normalised by hand, the one model and the list of batches."""
    data = open_data(settings)
    model = build_model(settings, data)
    set_dropout(model, 0.0)
    tasks, mixture = build_mixture(settings, data)
    number = next(number for number, part in enumerate(mixture.parts) if part.name == part_name)
    step = next(step for step in range(1, 100) if mixture.part_at(step) == number)
    plans = list(mixture.plans([0] * len(mixture.parts), first_step=step, last_step=step, accumulation=2))
    batches = [Assembler(mixture.parts, 1)[plan].batch for plan in plans]
    return model, tasks[number], batches


@pytest.mark.parametrize("name", ["mlm_toy", "mrfr_toy", "mrc-kl_toy", "itm_toy"])
def test_global_mean_is_the_mean_over_all_that_the_update_held(small: Make, name: str) -> None:
    """Micro-batches differ in size; their update is that of the one batch that holds them both."""
    model, task, batches = gradients_of_an_update(small(), part_name=name)
    terms = [task.losses(task.head(model, batch), batch.targets) for batch in batches]
    rows = sum(next(iter(one.values())).shape[0] for one in terms)
    summed = sum(losses.of(one, weights=task.weights, reduction=task.reduction, normalisation="global-mean").number for one in terms) / rows
    joint = {key: torch.cat([one[key] for one in terms]) for key in terms[0]}
    expected = losses.of(joint, weights=task.weights, reduction=task.reduction).number
    assert summed.item() == pytest.approx(expected.item(), rel=1e-6)
    published = sum(losses.of(one, weights=task.weights, reduction=task.reduction, normalisation="published").number for one in terms)
    assert published.item() == pytest.approx(sum(losses.of(one, weights=task.weights).number.item() for one in terms), rel=1e-6)


def test_the_log_names_every_part(small: Make, tmp_path: Path) -> None:
    pretrain(small(steps=12, validate_every=12, tensorboard=True), tmp_path / "run")
    lines = read_log(tmp_path / "run")
    training = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in training] == list(range(1, 13))
    for line in training:
        part = line["part"]
        assert line["loss"] == line[f"{part}/loss"]
        assert {"learning_rate", "grad_norm", "tokens", "tokens_per_second", "padding_share", "data_wait_share"} <= line.keys()
        assert 0.3 < line["budget_fill"] <= 1
    validation = [line for line in lines if line["kind"] == "validation"]
    assert len(validation) == 1
    assert {"mlm_toy/accuracy", "itm_toy/accuracy", "mrc-kl_toy/kl", "mrfr_toy/mse", "itm_toy/loss_transport"} <= validation[0].keys()
    assert list((tmp_path / "run").glob("events.out.tfevents.*"))


def test_the_rate_warms_up_and_decays(small: Make, tmp_path: Path) -> None:
    pretrain(small(steps=10, optimizer={"learning_rate": 1e-3, "warmup_steps": 4}), tmp_path / "run")
    rates = [line["learning_rate"] for line in read_log(tmp_path / "run") if line["kind"] == "train"]
    assert rates == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 5e-4 / 0.6, 4e-4 / 0.6, 3e-4 / 0.6, 2e-4 / 0.6, 1e-4 / 0.6, 1e-8])


def logs_of_both_precisions(make: Make, folder: Path, **changes: Any) -> list[tuple[dict[str, float], dict[str, float]]]:
    """The losses of float32's and of bf16's run, line by line; relative to the first validation that one is 1 in both."""
    logs = []
    for precision in ("fp32", "bf16"):
        pretrain(make(precision=precision, steps=4, **changes), folder / precision)
        logs.append(read_log(folder / precision))
    assert [(line["kind"], line["step"]) for line in logs[0]] == [(line["kind"], line["step"]) for line in logs[1]]
    return [
        tuple({name: line[name] for name in line if "loss" in name and name != "relative_loss"} for line in lines)
        for lines in zip(*logs, strict=True)
    ]


def test_bf16_trains(small: Make, tmp_path: Path) -> None:
    """Near float32 and not it: a run that forgot to compute in half precision would log float32's losses to the last digit."""
    for whole, half in logs_of_both_precisions(small, tmp_path):
        assert whole and half == pytest.approx(whole, rel=0.02, abs=0.01)
        assert all(half[name] != whole[name] for name in whole)
    weights = [load_file(checkpoint_path(tmp_path / "bf16", step) / "model.safetensors") for step in (2, 4)]
    assert {tensor.dtype for tensors in weights for tensor in tensors.values()} == {torch.float32}
    assert not torch.equal(*(tensors["uniter.pooler.dense.weight"] for tensors in weights))


def test_bf16_validates(small: Make, tmp_path: Path) -> None:
    """Under a rate that leaves the weights as they were only the validation's own precision can tell the runs apart."""
    *_, (whole, half) = logs_of_both_precisions(small, tmp_path, optimizer={"learning_rate": 1e-12}, validate_every=4)
    assert len(whole) > 4 and half == pytest.approx(whole, rel=0.02, abs=0.01)
    assert all(abs(half[name] - whole[name]) > 1e-6 * abs(whole[name]) for name in whole)


@ONE_OR_THE_OTHER
def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_learned(
    small: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adversarial: dict[str, Any] | None
) -> None:
    from uniter.datasets.batches import loader

    original = loader.collate

    def poisoned(samples: Any) -> Any:
        batch = original(samples)
        if "scene_1_00007#0" in batch.example_ids:
            place = batch.example_ids.index("scene_1_00007#0")
            batch.features_RD[int(batch.region_counts_B[:place].sum())] = float("nan")
        return batch

    monkeypatch.setattr(loader, "collate", poisoned)
    with pytest.raises(NotFinite) as caught:
        pretrain(small(steps=60, checkpoint_every=1, adversarial=adversarial), tmp_path / "run")
    said = str(caught.value)
    step = checkpoint_steps(tmp_path / "run")[-1] + 1 if checkpoint_steps(tmp_path / "run") else 1
    assert f"update {step}," in said and "not finite" in said and "nothing was updated" in said
    assert "'scene_1_00007#0'" in said.split("features that are no finite numbers:")[1]


@ONE_OR_THE_OTHER
def test_how_often_the_numbers_are_looked_at_changes_nothing(small: Make, tmp_path: Path, adversarial: dict[str, Any] | None) -> None:
    pretrain(small(steps=7, validate_every=7, adversarial=adversarial), tmp_path / "each")
    pretrain(small(steps=7, validate_every=7, adversarial=adversarial, look_every=3), tmp_path / "third")
    each, third = (read_log(tmp_path / name) for name in ("each", "third"))
    figures = [[{key: line[key] for key in ("step", "loss", "grad_norm") if key in line} for line in lines] for lines in (each, third)]
    assert figures[0] == figures[1] and len(each) == 8
    one, other = (load_file(checkpoint_path(tmp_path / name, 7) / "model.safetensors") for name in ("each", "third"))
    assert all(torch.equal(values, other[name]) for name, values in one.items())


def test_nothing_is_learned_from_a_bad_update_on_before_it_is_seen(small: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked at every five updates, the first bad one is named, and the device has left the weights as they were ever since."""
    from uniter.datasets.batches import loader

    original, made = loader.collate, []

    def poisoned(samples: Any) -> Any:
        batch = original(samples)
        made.append(batch)
        if len(made) == 5:  # of update 3; an update is two micro-batches
            batch.features_RD[0] = float("nan")
        return batch

    monkeypatch.setattr(loader, "collate", poisoned)
    kept: list[list[torch.Tensor]] = []
    step = AdamW.step

    def stepping(optimizer: AdamW, closure: None = None) -> None:
        step(optimizer)
        kept.append([parameter.detach().clone() for group in optimizer.param_groups for parameter in group["params"]])

    monkeypatch.setattr(AdamW, "step", stepping)
    with pytest.raises(NotFinite, match="update 3, "):
        pretrain(small(steps=10, validate_every=10, checkpoint_every=10, look_every=5), tmp_path / "run")
    assert len(kept) == 5 and not all(map(torch.equal, kept[0], kept[1]))
    for later in kept[2:]:
        assert all(map(torch.equal, kept[1], later))


@ONE_OR_THE_OTHER
def test_a_run_with_compiled_heads_equals_one_without(
    small: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adversarial: dict[str, Any] | None
) -> None:
    monkeypatch.setattr("uniter.model.train.runs.compiled_head", partial(compiled_head, backend="eager"))
    settings = {"steps": 4, "validate_every": 4, "dropout": 0.0, "alignment_weight": 0.0, "adversarial": adversarial}
    pretrain(small(**settings), tmp_path / "plain")
    pretrain(small(**settings, compile=True), tmp_path / "compiled")
    plain, compiled = (read_log(tmp_path / name) for name in ("plain", "compiled"))
    assert [line["loss"] for line in compiled] == pytest.approx([line["loss"] for line in plain], rel=1e-5)
    assert all(line["padding_share"] == 0 for line in plain if line["kind"] == "train")
    for line in compiled[:-1]:
        assert line["padding_share"] == pytest.approx(1 - line["tokens"] / (2 * 192))  # two micro-batches filled up from 150 to 192


def test_a_rate_that_explodes_is_named(small: Make, tmp_path: Path) -> None:
    with pytest.raises(NotFinite, match=r"update \d+, \w+[-\w]*: .*(not finite|norm is (nan|inf)).*lower optimizer.learning_rate|Lower"):
        pretrain(small(steps=40, optimizer={"learning_rate": 1e30, "warmup_steps": 0, "clip": -1}), tmp_path / "run")


def test_start_from_another_run_takes_its_weights(small: Make, tmp_path: Path) -> None:
    pretrain(small(steps=2, validate_every=2), tmp_path / "first")
    settings = small(steps=2, validate_every=2, model={}, **{"from": str(tmp_path / "first")})
    model = build_model(settings, open_data(settings))
    weights = load_file(checkpoint_path(tmp_path / "first", 2) / "model.safetensors")
    assert torch.equal(model.state_dict()["uniter.pooler.dense.weight"], weights["uniter.pooler.dense.weight"])
    pretrain(settings, tmp_path / "second")


def test_soft_labels_decide_the_tasks(small: Make, tmp_path: Path, made_up: Any, caplog: pytest.LogCaptureFixture) -> None:
    texts, images = made_up.World(width=16).write(tmp_path / "bare", soft_labels=False)
    corpus = {"name": "bare", "text": [str(texts)], "images": [str(images)]}
    assert open_data(small(corpora=[corpus])).tasks["bare"] == {"itm": 2, "mlm": 2, "mrfr": 1}
    assert "no soft labels, so mrc-kl is left out" in caplog.text
    with pytest.raises(BadInput, match="task mrc-kl needs the detector's soft labels"):
        open_data(small(corpora=[{**corpus, "tasks": {"mlm": 1, "mrckl": 1}}]))


def test_soft_labels_are_read_only_when_their_task_is_drawn(small: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are nearly half of a record."""
    read: set[str] = set()
    original = Corpus.region_arrays

    def noting(corpus: Corpus, image_row: int, fields: tuple[str, ...] = ("features", "norm_bb")) -> Any:
        read.update(fields)
        return original(corpus, image_row, fields)

    monkeypatch.setattr(Corpus, "region_arrays", noting)
    settings = small()
    _, mixture = build_mixture(settings, open_data(settings))
    assembler = Assembler(mixture.parts, 1)
    taken = set()
    for plan in mixture.plans([0] * len(mixture.parts), first_step=1, last_step=30, accumulation=1):
        read.clear()
        name = mixture.parts[plan.part].name
        taken.add(name)
        assert assembler[plan].batch.tokens
        assert ("soft_labels" in read) == (name == "mrc-kl_toy")
    assert taken == {"itm_toy", "mlm_toy", "mrfr_toy", "mrc-kl_toy"}


@pytest.mark.parametrize("readahead", [True, False])
def test_reading_ahead_is_a_setting(tmp_path: Path, made_up, small, readahead: bool) -> None:
    """The kernel itself says of a mapping whether it was told to expect random reads ("rr")."""
    texts, images = made_up.World(width=16).write(tmp_path, pictures=10)
    data = open_data(small(corpora=[{"name": "toy", "text": [str(texts)], "images": [str(images)]}], readahead=readahead))
    corpus = data.training["toy"]
    corpus.record(0), corpus.regions(int(corpus.image_rows_NK[0, 0]))
    flags, path = {}, ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line.startswith("VmFlags:"):
            flags[path] = "rr" in line.split()
        elif not line.split()[0].endswith(":"):
            path = line.split(maxsplit=5)[-1]
    assert {flags[str(folder / "data.mdb")] for folder in (texts, images)} == {not readahead}


def test_databases_of_two_detectors_are_refused(small: Make, databases: tuple[Path, Path], tmp_path: Path, made_up: Any) -> None:
    other = made_up.World(width=24).write(tmp_path / "other")
    corpora = [{"name": name, "text": [str(texts)], "images": [str(images)]} for name, (texts, images) in (("a", databases), ("b", other))]
    with pytest.raises(UniterError, match="differ in width"):
        open_data(small(corpora=corpora))


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"width": 24}, r"region features are 24 wide, but .* was trained on 16; use its detector"),
        ({"classes": 5}, r"the region databases have \[5\] detector classes, the model 9; use its detector, or leave mrc-kl out"),
    ],
)
def test_databases_that_do_not_fit_the_model_are_refused(
    small: Make, databases: tuple[Path, Path], tmp_path: Path, made_up: Any, other: dict[str, int], said: str
) -> None:
    pretrain(small(steps=2, validate_every=2), tmp_path / "run")
    texts, images = made_up.World(width=other.get("width", 16)).write(tmp_path / "other", pictures=40)
    if "classes" in other:
        header = json.loads((images / "header.json").read_text())
        (images / "header.json").write_text(json.dumps({**header, "label_classes": other["classes"]}))
    corpora = [{"name": "toy", "text": [str(texts)], "images": [str(images)]}]
    settings = small(corpora=corpora, model={}, **{"from": str(tmp_path / "run")})
    with pytest.raises(BadInput, match=said):
        build_model(settings, open_data(settings))
