"""Every figure says what it is of: how many examples, of which task, by which head, of whose regions.

At the level of commands and files.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_world as small
import yaml
from safetensors.numpy import load_file

from uniter.cli.train import main as train

LABELS = re.compile(r"label|truth|annotat|target", re.IGNORECASE)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """See small_world.py; its regions come from a detector."""
    pytest.importorskip("detectron2", reason="Detectron2 is brought by `uniter-extract --install-detectron2`")
    return small.small_world(tmp_path_factory.getbasetemp())


def evaluate(task: str, start: Path, texts: Path, images: Path, *more: object) -> Any:
    return small.run(train, "evaluate", task, "--from", start, "--text", texts, "--images", images, "--device", "cpu", *more)


def figures_of(result: Any) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    figures: dict[str, Any] = json.loads(result.stdout)
    return figures


def validations(run: Path) -> dict[int, dict[str, Any]]:
    """What the log says of each validated update."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if line["kind"] == "validation"}


def best_of(run: Path) -> int:
    link = run / "checkpoints" / "best"
    assert link.exists(), "no checkpoint is called the best"
    return int(link.resolve().name.removeprefix("step-"))


# --- 18: what was left out -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["pretrain", "vqa", "ve"])
def test_an_evaluation_says_how_many_it_left_out_and_why(world: Any, task: str) -> None:
    start = world.pretrained if task == "pretrain" else world.finetuned(task)
    texts = world.captions if task == "pretrain" else world.task(task, "train")
    whole = figures_of(evaluate(task, start, texts, world.regions(), "--json"))
    part = figures_of(evaluate(task, start, texts, world.half, "--json"))
    assert whole["examples"] > part["examples"]
    assert not any(whole.get("left_out", {}).values())
    assert "left_out" in part and sum(part["left_out"].values()) == whole["examples"] - part["examples"]
    assert all(re.search("image|picture", reason) for reason in part["left_out"])
    assert re.search("left.out", evaluate(task, start, texts, world.half).output)


def test_a_submission_has_what_it_lacks_listed_beside_it(world: Any, tmp_path: Path) -> None:
    out = tmp_path / "submission.json"
    words = ("predict", "vqa", "--from", world.finetuned("vqa"), "--text", world.task("vqa", "train"), "--images", world.half)
    said = figures_of(small.run(train, *words, "--out", out, "--device", "cpu", "--json"))
    answered = {row["question_id"] for row in json.loads(out.read_text())}
    asked = {row["question_id"] for row in json.loads(world.vqa_file("questions", "train").read_text())["questions"]}
    assert said["examples"] == len(answered) < len(asked)
    assert "left_out" in said and sum(said["left_out"].values()) == len(asked - answered)
    beside = [path.read_text() for path in tmp_path.iterdir() if path != out]
    assert beside, "nothing lies beside the submission"
    assert all(any(re.search(rf"\b{name}\b", text) for text in beside) for name in asked - answered)


def test_strict_refuses_a_submission_that_lacks_answers(world: Any, tmp_path: Path) -> None:
    words = ("predict", "vqa", "--from", world.finetuned("vqa"), "--text", world.task("vqa", "train"), "--device", "cpu", "--strict")
    assert small.run(train, *words, "--images", world.regions(), "--out", tmp_path / "whole.json").exit_code == 0
    result = small.run(train, *words, "--images", world.half, "--out", tmp_path / "part.json")
    assert result.exit_code in (1, 3) and isinstance(result.exception, SystemExit), result.output
    assert re.search("left.out", result.output)


# --- 19: labels ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["vqa", "ve", "nlvr2-paired"])
def test_no_accuracy_on_a_part_without_labels(world: Any, task: str) -> None:
    texts = world.task(task.partition("-")[0], "unlabelled")
    sentence = small.refused(evaluate(task, world.finetuned(task), texts, world.images_of(task), "--json"))
    assert LABELS.search(sentence)


@pytest.mark.parametrize("task", ["vqa", "ve", "nlvr2-paired"])
def test_a_part_without_labels_is_predicted(world: Any, task: str, tmp_path: Path) -> None:
    texts, out = world.task(task.partition("-")[0], "unlabelled"), tmp_path / "submission"
    words = ("predict", task, "--from", world.finetuned(task), "--text", texts, "--images", world.images_of(task), "--device", "cpu")
    assert figures_of(small.run(train, *words, "--out", out, "--json"))["examples"] > 0 and out.stat().st_size > 0


@pytest.mark.parametrize("task", ["vqa", "ve", "nlvr2"])
def test_nothing_is_learnt_from_texts_without_labels(world: Any, task: str, tmp_path: Path) -> None:
    sentence = small.refused(small.run(train, *world.finetuning(task, world.task(task, "unlabelled")), "--out", tmp_path / "run"))
    assert LABELS.search(sentence) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(("task", "other"), [("vqa", "ve"), ("ve", "vqa")])
def test_nothing_is_learnt_from_texts_of_another_task(world: Any, task: str, other: str, tmp_path: Path) -> None:
    sentence = small.refused(small.run(train, *world.finetuning(task, world.task(other, "train")), "--out", tmp_path / "run"))
    assert re.search(rf"\b{other}\b", sentence, re.IGNORECASE) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("task", ["ve", "nlvr2-paired"])
def test_rows_of_unknown_truth_count_as_left_out(world: Any, task: str, tmp_path: Path) -> None:
    name = task.partition("-")[0]
    lines = world.lines(name, "val").read_text().splitlines(keepends=True)
    # The same file, once with every second label missing and once without those lines.
    mixed, known = tmp_path / "mixed.jsonl", tmp_path / "known.jsonl"
    small.unlabelled(world.lines(name, "val"), mixed, every=2)
    known.write_text("".join(lines[1::2]))
    found = [
        figures_of(
            evaluate(task, world.finetuned(task), world.texts(f"{name}-{part.stem}", part, "--task", name), world.images_of(task), "--json")
        )
        for part in (mixed, known)
    ]
    assert found[0]["accuracy"] == pytest.approx(found[1]["accuracy"])
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-4)
    assert found[0]["examples"] == found[1]["examples"]
    assert "left_out" in found[0] and sum(found[0]["left_out"].values()) == len(lines[::2])


# --- 20: the head that answers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["nlvr2-paired", "pretrained"])
def test_random_heads_are_not_evaluated(world: Any, start: str) -> None:
    run = world.pretrained if start == "pretrained" else world.finetuned(start)
    sentence = small.refused(evaluate("nlvr2", run, world.task("nlvr2", "val"), world.images_of("nlvr2"), "--json"))
    # Said is what the checkpoint was trained for.
    assert re.search("nlvr2-paired" if start == "nlvr2-paired" else "pre-?train", sentence.replace(str(run), ""))


def test_random_heads_predict_nothing(world: Any, tmp_path: Path) -> None:
    words = ("predict", "nlvr2", "--from", world.pretrained, "--text", world.task("nlvr2", "test"), "--images", world.images_of("nlvr2"))
    small.refused(small.run(train, *words, "--out", tmp_path / "submission.csv", "--device", "cpu"))
    assert not (tmp_path / "submission.csv").exists()


def test_a_test_part_built_as_documented_is_predicted(world: Any, tmp_path: Path) -> None:
    out = tmp_path / "submission.json"
    words = ("predict", "vqa", "--from", world.finetuned("vqa"), "--text", world.task("vqa", "test"), "--images", world.regions())
    assert figures_of(small.run(train, *words, "--out", out, "--device", "cpu", "--json"))["examples"] > 0
    rows = json.loads(out.read_text())
    asked = {row["question_id"] for row in json.loads(world.vqa_file("questions", "val").read_text())["questions"]}
    known = set(json.loads((world.task("vqa", "train") / "ans2label.json").read_text()))
    assert {row["question_id"] for row in rows} == asked and {row["answer"] for row in rows} <= known


# --- 21: exports and official runs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["vqa", "nlvr2-paired"])
def test_the_card_of_an_export_loads_it_with_its_head(world: Any, task: str, tmp_path: Path) -> None:
    small.succeed(train, "export", "--from", world.finetuned(task), "--to", "hub", tmp_path / "shared")
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "shared" / "README.md").read_text(), flags=re.DOTALL)
    # The folder stands in the card under a name that nobody has yet.
    code = re.sub(r"""\((["']).*?\1""", lambda _: f"({str(tmp_path / 'shared')!r}", code)
    names: dict[str, Any] = {}
    exec(code, names)
    (state,) = [value.state_dict() for value in names.values() if hasattr(value, "state_dict") and not isinstance(value, type)]
    written = load_file(tmp_path / "shared" / "model.safetensors")
    assert set(written) <= set(state)
    assert all(np.array_equal(values, state[name].numpy()) for name, values in written.items())


def test_an_export_shows_no_local_paths(world: Any, tmp_path: Path) -> None:
    vocabulary = tmp_path / "at-home" / "vocab.txt"
    vocabulary.parent.mkdir()
    shutil.copy(world.captions / "vocab.txt", vocabulary)
    texts = world.texts("at-home", world.world / "captions_train.json", "--tokenizer", vocabulary)
    words = ("--text", texts, "--images", world.regions(), "--steps", 1, "--device", "cpu", *small.sets(small.QUICK + small.HEADS_OF_16))
    small.succeed(train, "pretrain", *words, "--out", tmp_path / "at-home" / "run")
    small.succeed(train, "export", "--from", tmp_path / "at-home" / "run", "--to", "hub", tmp_path / "shared")
    for path in (tmp_path / "shared").iterdir():
        for local in (tmp_path, world.folder):
            assert str(local).encode() not in path.read_bytes(), path.name


def test_an_official_run_loads_with_its_own_heads(world: Any, tmp_path: Path) -> None:
    small.succeed(train, "export", "--from", world.pretrained, "--to", "published", tmp_path / "uniter.pt")
    for source, target in (("uniter.pt", "official/ckpt/model_step_4.pt"), ("uniter.json", "official/log/model.json")):
        (tmp_path / target).parent.mkdir(parents=True)
        shutil.copy(tmp_path / source, tmp_path / target)
    words = (world.captions, world.regions(), "--candidates", 4, "--json")
    ours = figures_of(evaluate("pretrain", world.pretrained, *words))
    theirs = figures_of(evaluate("pretrain", tmp_path / "official" / "ckpt" / "model_step_4.pt", *words))
    assert theirs["mrfr"]["mse"] == pytest.approx(ours["mrfr"]["mse"], rel=1e-6)
    assert theirs["mlm"] == pytest.approx(ours["mlm"])


# --- 22: resuming, and what is best ----------------------------------------------------------------------------------------------


def pretraining(world: Any, run: Path, *more: object) -> list[object]:
    words = ["pretrain", "--text", world.captions, "--images", world.regions(), "--device", "cpu", "--out", run]
    return [*words, *small.sets(small.QUICK + small.HEADS_OF_16), *more]


@pytest.mark.parametrize("unused", ["none", "zero"])
def test_resuming_changes_nothing_whatever_the_gradients_of_unused_heads(world: Any, unused: str, tmp_path: Path) -> None:
    words = ("--steps", 8, *small.sets([f"optimizer.unused_gradients={unused}", "validate_every=8"]))
    small.succeed(train, *pretraining(world, tmp_path / "unbroken", *words))
    for stop in (3, 5, 8):
        small.succeed(train, *pretraining(world, tmp_path / "resumed", *words, "--set", f"stop_after={stop}"))
    unbroken, resumed = (load_file(tmp_path / run / "checkpoints" / "latest" / "model.safetensors") for run in ("unbroken", "resumed"))
    assert not [name for name, values in unbroken.items() if not np.array_equal(values, resumed[name])]


def test_the_best_checkpoint_is_the_best_one(world: Any, tmp_path: Path) -> None:
    """A rate so high that what was validated first, between two checkpoints, stays the best."""
    chosen = ["optimizer.learning_rate=0.05", "validate_every=2", "checkpoint_every=3", "keep=20"]
    small.succeed(train, *pretraining(world, tmp_path, "--tasks", "mlm", "--steps", 12, *small.sets(chosen)))
    losses = {step: line["mlm_data/loss"] for step, line in validations(tmp_path).items()}
    kept = {int(path.name.removeprefix("step-")) for path in (tmp_path / "checkpoints").glob("step-*")}
    best = best_of(tmp_path)
    assert best in losses and losses[best] == min(losses[step] for step in kept & losses.keys())


def test_the_best_of_fine_tuning_is_by_the_tasks_metric(world: Any, tmp_path: Path) -> None:
    words = ("--val-text", world.task("ve", "val"), *small.sets(["validate_every=1", "keep=20"]), "--out", tmp_path)
    small.succeed(train, *world.finetuning("ve", world.task("ve", "train"), steps=12), *words)
    found = validations(tmp_path)
    accuracies = {step: line["ve_data/accuracy"] for step, line in found.items()}
    least = min(found, key=lambda step: found[step]["ve_data/loss"])
    if accuracies[least] == max(accuracies.values()):
        raise RuntimeError("loss and accuracy are best at the same update here: nothing can be seen; take another seed")
    assert accuracies[best_of(tmp_path)] == max(accuracies.values())


# --- 23: numbers that follow the model -------------------------------------------------------------------------------------------


def test_a_base_model_is_fine_tuned_as_published_on_any_device(world: Any, tmp_path: Path) -> None:
    # One layer of its twelve is enough to be of that size, and quick.
    sizes = ["model.num_hidden_layers=1", "model.max_position_embeddings=40", "keep=1"]
    words = ("--model", "base", "--text", world.task("vqa", "train"), "--images", world.regions(), "--steps", 1, "--device", "cpu")
    small.succeed(train, "finetune", "vqa", *words, *small.sets(small.QUICK + sizes), "--out", tmp_path)
    chosen = yaml.safe_load((tmp_path / "config.yaml").read_text())["optimizer"]
    assert chosen["learning_rate"] == pytest.approx(8e-5) and chosen["head_rate_multiplier"] == pytest.approx(10)


def test_a_tiny_model_is_fine_tuned_with_rates_that_small_models_learn_with(world: Any) -> None:
    chosen = yaml.safe_load((world.finetuned("vqa") / "config.yaml").read_text())["optimizer"]
    assert chosen["learning_rate"] == pytest.approx(5e-4) and chosen["head_rate_multiplier"] == pytest.approx(1)


# --- 30: whose regions -----------------------------------------------------------------------------------------------------------


def test_a_detector_of_other_classes_is_refused_in_words(world: Any) -> None:
    sentence = small.refused(evaluate("pretrain", world.pretrained, world.captions, world.regions("five"), "--json"))
    assert "detector" in sentence or "classes" in sentence


@pytest.mark.parametrize("task", ["pretrain", "retrieval"])
def test_an_evaluation_on_another_detectors_regions_must_be_meant(world: Any, task: str) -> None:
    words = (task, world.pretrained, world.captions, world.regions("two"), "--json")
    assert "detector" in small.refused(evaluate(*words))
    figures_of(evaluate(*words, "--other-detector"))


def test_a_question_with_another_detector_must_be_meant(world: Any) -> None:
    photograph = world.world / "images" / "scene_000001.jpg"
    words = ("predict", "match", "--from", world.pretrained, "--image", photograph, "--text", "a red star", "--no-cache", "--device", "cpu")
    assert small.run(train, *words, "--detector", world.detector("one")).exit_code == 0
    assert "detector" in small.refused(small.run(train, *words, "--detector", world.detector("two")))
    assert small.run(train, *words, "--detector", world.detector("two"), "--other-detector").exit_code == 0


def test_captions_are_no_questions(world: Any) -> None:
    sentence = small.refused(evaluate("vqa", world.pretrained, world.captions, world.regions(), "--json"))
    assert re.search("caption|label|pre-?train", sentence.replace(str(world.folder), ""))
