"""One's own labels from the table to the submission, of each kind, over the tables of the made-up world."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from scipy.stats import spearmanr

from uniter.cli.build_db import main as build_db
from uniter.datasets.batches.corpus import open_corpus
from uniter.datasets.errors import BadInput
from uniter.datasets.image_db.records import encode_record
from uniter.datasets.image_db.regions import RegionFeatures, normalised_boxes
from uniter.datasets.image_db.writing.units import UnitStore
from uniter.datasets.made_up.files import write_world
from uniter.datasets.made_up.tasks.table import write_tasks
from uniter.datasets.runs.run_log import read_log
from uniter.model.checkpoints.export import export_published
from uniter.model.checkpoints.load import load
from uniter.model.evaluation.finetuned import evaluate_finetuned, predict
from uniter.model.heads.classification import UniterForClassification
from uniter.model.settings.settings import TrainSettings
from uniter.model.train.finetuning import finetune

Make = Callable[..., TrainSettings]
OPTIONS = {"one": [], "several": ["--label-separator", "|"], "score": ["--score"]}
FIGURES = {
    "one": {"accuracy", "macro_f1", "auroc", "average_precision"},
    "several": {"accuracy", "macro_f1", "auroc", "average_precision"},
    "score": {"squared_error", "spearman"},
}
WIDTH = 24


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tables, and regions of the scenes: a vector of each thing's shape plus one of its colour."""
    out = tmp_path_factory.mktemp("world")
    write_world(out, images=160, held_out=60, seed=1)
    write_tasks(out)
    rng = np.random.default_rng(0)
    looks: dict[str, Any] = {}
    store = UnitStore(out / "regions.lmdb", settings={"made_up": True})
    writer = store.unit(0)
    assert writer is not None
    with writer:
        for part in ("train", "val"):
            for scene in json.loads((out / f"scenes_{part}.json").read_text())["scenes"]:
                words = [(thing["shape"], thing["colour"]) for thing in scene["things"]] or [("", "")]
                features = [sum(looks.setdefault(word, rng.normal(size=WIDTH)) for word in pair) for pair in words]
                boxes = np.array([thing["box"] for thing in scene["things"]] or [[0, 0, 9, 9]], dtype=np.float32)
                record = RegionFeatures(
                    features=np.array(features, dtype=np.float32),
                    norm_bb=normalised_boxes(boxes, (160, 160)),
                    conf=np.full(len(boxes), 0.9, dtype=np.float32),
                    boxes=boxes,
                    size=(160, 160),
                )
                writer.put(scene["key"], encode_record(record, key=scene["key"]), regions=len(record))
        writer.commit()
        writer.complete()
    assert store.finish(units=1, header={"feature_width": WIDTH, "label_classes": 0})
    return out


def build(world: Path, table: Path, out: Path, *options: str) -> Path:
    words = [str(table), str(out), "--task", "classify", "--images", str(world / "regions.lmdb"), *options]
    result = CliRunner().invoke(build_db, words)
    assert result.exit_code == 0, result.output
    return out


@pytest.mark.parametrize("kind", OPTIONS)
def test_it_trains_resumes_evaluates_predicts_and_learns(kind: str, world: Path, small: Make, tmp_path: Path) -> None:
    tables, images = world / "tasks" / "own_labels", [str(world / "regions.lmdb")]
    train = build(world, tables / f"train_{kind}.csv", tmp_path / "train.db", *OPTIONS[kind])
    listed = ["--join", str(train / "ans2label.json")] if kind != "score" else []
    held_out = build(world, tables / f"val_{kind}.csv", tmp_path / "val.db", *OPTIONS[kind], *listed)

    def settings(**changes: Any) -> TrainSettings:
        corpus = {"name": "toy", "text": [str(train)], "images": images, "validation_text": [str(held_out)]}
        numbers = {"steps": 80, "batch_tokens": 300, "accumulation": 1, "dropout": 0.0, "validate_every": 40, "checkpoint_every": 40}
        sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96, "initializer_range": 0.1}
        return small(corpora=[corpus], task="classify", model=sizes, optimizer={"learning_rate": 2e-3}, **numbers, **changes)

    run = tmp_path / "run"
    finetune(settings(stop_after=40), run)
    finetune(settings(), run)
    asked = {"text": [str(held_out)], "images": images, "device": "cpu"}
    figures = evaluate_finetuned("classify", str(run), **asked)
    assert FIGURES[kind] <= set(figures)
    # By chance some 0.2, 0.3 and 0.
    name, least = {"one": ("accuracy", 0.4), "several": ("average_precision", 0.6), "score": ("spearman", 0.7)}[kind]
    assert figures[name] > least, figures
    validated = [line for line in read_log(run) if line["kind"] == "validation"][-1]
    assert all(validated[f"classify_toy/{name}"] == pytest.approx(figures[name], abs=1e-5) for name in FIGURES[kind])

    predict("classify", str(run), tmp_path / "said.csv", **asked)
    rows = {row["id"]: row for row in csv.DictReader((tmp_path / "said.csv").open())}
    corpus = open_corpus("x", [held_out], images)
    records = {corpus.example_id(number): corpus.record(number) for number in range(len(corpus))}
    targets = {name: record["target"] for name, record in records.items() if "target" in record}
    if kind == "score":
        said = [float(rows[name]["score"]) for name in targets]
        assert figures["spearman"] == pytest.approx(spearmanr(said, [target["scores"][0] for target in targets.values()]).statistic)
    else:
        numbers = json.loads((held_out / "ans2label.json").read_text())
        given = {name: sorted(numbers[label] for label in row["label"].split("|") if label) for name, row in rows.items()}
        right = [given[name] == wanted["labels"] for name, wanted in targets.items()]
        assert figures["accuracy"] == pytest.approx(np.mean(right))

    # A file of weights alone tells what it predicts.
    export_published(load(run).model, tmp_path / "alone.pt")
    found = load(tmp_path / "alone.pt", answers=None if kind == "score" else train / "ans2label.json")
    assert isinstance(found.model, UniterForClassification) and found.model.kind == kind
    again = evaluate_finetuned("classify", str(tmp_path / "alone.pt"), **asked)
    assert {name: again[name] for name in FIGURES[kind]} == pytest.approx({name: figures[name] for name in FIGURES[kind]}, abs=1e-6)


def test_a_part_without_labels_is_predicted_and_not_measured(world: Path, small: Make, tmp_path: Path) -> None:
    images = [str(world / "regions.lmdb")]
    train = build(world, world / "tasks/own_labels/train_several.csv", tmp_path / "train.db", "--label-separator", "|")
    rows = list(csv.DictReader((world / "tasks/own_labels/val_several.csv").open()))
    (tmp_path / "test.jsonl").write_text("".join(json.dumps({"img": f"img/{row['image']}", "id": n}) + "\n" for n, row in enumerate(rows)))
    test = build(world, tmp_path / "test.jsonl", tmp_path / "test.db")
    assert not (test / "labels.json").exists() and not (test / "ans2label.json").exists()
    run = tmp_path / "run"
    finetune(small(corpora=[{"text": [str(train)], "images": images}], task="classify", steps=2), run)
    summary = predict("classify", str(run), tmp_path / "said.csv", text=[str(test)], images=images, device="cpu")
    assert summary["examples"] == len(rows) == len(list(csv.DictReader((tmp_path / "said.csv").open())))
    with pytest.raises(BadInput, match="none of its 60 texts has a label"):
        evaluate_finetuned("classify", str(run), text=[str(test)], images=images, device="cpu")


def test_labels_of_another_kind_are_refused(world: Path, small: Make, tmp_path: Path) -> None:
    images = [str(world / "regions.lmdb")]
    one = build(world, world / "tasks/own_labels/train_one.csv", tmp_path / "one.db")
    score = build(world, world / "tasks/own_labels/train_score.csv", tmp_path / "score.db", "--score")
    run = tmp_path / "run"
    with pytest.raises(BadInput, match="its texts have labels of the kind one and score; expected one of"):
        finetune(small(corpora=[{"text": [str(one), str(score)], "images": images}], task="classify", steps=1), tmp_path / "both")
    finetune(small(corpora=[{"text": [str(one)], "images": images}], task="classify", steps=1), run)
    said = r"run knows .*'label_kind': 'one'\}, but the texts \{'labels': 1, 'label_kind': 'score'\}"
    with pytest.raises(BadInput, match=said):
        evaluate_finetuned("classify", str(run), text=[str(score)], images=images, device="cpu")
