"""RefCOCO and VCR the whole way through the commands, over a made-up world and a small real detector: from pictures and annotation
files to figures and submissions; and the four questions about photographs with that detector and what was trained.

Nothing here is trained long enough to be right: other tests hold learning and numbers; this one holds the way.
"""

import csv
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from uniter.cli.build_db import main as build_db
from uniter.cli.extract import main as extract
from uniter.cli.scenes import main as scenes
from uniter.cli.train import main as train
from uniter.datasets.batches.candidates import inclusive_iou
from uniter.datasets.image_db import ImageDB

TINY = ("--set", "tensorboard=false", "--set", "batch_tokens=400", "--set", "accumulation=1", "--device", "cpu", "--json")
SIZES = ("model.hidden_size=32", "model.num_hidden_layers=2", "model.num_attention_heads=4", "model.intermediate_size=64")


def done(command: Any, *words: object) -> dict[str, Any]:
    result = CliRunner().invoke(command, [*map(str, words), "--json"] if "--json" not in words else list(map(str, words)))
    assert result.exit_code == 0, result.output
    summary: dict[str, Any] = json.loads(result.stdout)
    return summary


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with world/, a detector of three updates, its regions of both kinds, text databases and a pre-trained run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("given")
    done(scenes, out / "world", "--images", 16, "--held-out", 6, "--captions", 1, "--tasks")
    instances = out / "world" / "instances_train.json"
    done(train, "detector", "--images", out / "world/images", "--annotations", instances, "--out", out / "detector",
         "--model", "tiny", "--steps", 3, "--batch-size", 2, "--device", "cpu")  # fmt: skip
    tasks, images = out / "world/tasks", (out / "world/images", "--detector", out / "detector", "--device", "cpu")
    done(extract, images[0], out / "gt.lmdb", *images[1:], "--boxes", tasks / "refcoco/instances.json")
    done(extract, images[0], out / "det.lmdb", *images[1:], "--max-boxes", 12)
    done(build_db, out / "world/captions_train.json", out / "captions.db", "--images", out / "det.lmdb")
    done(train, "pretrain", "--text", out / "captions.db", "--images", out / "det.lmdb", "--out", out / "run", "--steps", 2, *TINY,
         *(word for size in SIZES for word in ("--set", size)))  # fmt: skip
    torch.set_num_threads(threads)
    return out


def test_referring_expressions_with_annotated_and_detected_boxes(world: Path) -> None:
    tasks = world / "world/tasks/refcoco"
    databases = {}
    for part in ("train", "val", "testA", "testB"):
        databases[part] = world / f"refcoco_{part}.db"
        done(build_db, tasks / "refs(unc).p", databases[part], "--task", "refcoco", "--split", part, "--join", tasks / "instances.json",
             "--images", world / "gt.lmdb")  # fmt: skip
    trained = done(train, "finetune", "refcoco", "--from", world / "run", "--text", databases["train"], "--images", world / "gt.lmdb",
                   "--out", world / "refcoco", "--steps", 2, *TINY)  # fmt: skip
    assert trained["steps"] == 2
    for part in ("val", "testA", "testB"):
        for images in ("gt.lmdb", "det.lmdb"):
            asked = ("--from", world / "refcoco", "--text", databases[part], "--images", world / images, "--device", "cpu")
            figures = done(train, "evaluate", "refcoco", *asked)
            summary = done(train, "predict", "refcoco+", *asked, "--out", world / "boxes.json", "--overwrite")
            boxes = json.loads((world / "boxes.json").read_text())
            assert summary["examples"] == figures["examples"] == len(boxes) > 0
            wanted = {row["sent_id"]: row for row in _sentences(tasks, part)}
            hits = [inclusive_iou(row["box"], wanted[row["sent_id"]]["bbox"]) > 0.5 for row in boxes]
            assert figures["accuracy"] == pytest.approx(np.mean(hits))


def _sentences(tasks: Path, part: str) -> list[dict[str, Any]]:
    """What RefCOCO's own files say, read without the code under test."""
    boxes = {row["id"]: row["bbox"] for row in json.loads((tasks / "instances.json").read_text())["annotations"]}
    refs = pickle.loads((tasks / "refs(unc).p").read_bytes())  # ours, made by the test itself
    return [{**sentence, "bbox": boxes[ref["ann_id"]]} for ref in refs if ref["split"] == part for sentence in ref["sentences"]]


def test_multiple_choice_after_a_second_stage(world: Path) -> None:
    images = (world / "world/images", "--detector", world / "detector", "--device", "cpu")
    tasks, both = world / "world/tasks/vcr", {}
    questions = [json.loads(line) for line in (tasks / "val.jsonl").read_text().splitlines()]
    blind = [{**question, "annot_id": question["annot_id"].replace("val", "test")} for question in questions]
    for question in blind:
        del question["answer_label"], question["rationale_label"]
    (tasks / "test.jsonl").write_text("".join(json.dumps(question) + "\n" for question in blind))
    for part in ("train", "val", "test"):
        done(build_db, tasks / f"{part}.jsonl", world / f"vcr_{part}.db", "--task", "vcr", "--join", tasks / "vcr1images",
             "--key", "{stem}")  # fmt: skip
        gt = world / f"vcr_gt_{part}.lmdb"
        done(extract, images[0], gt, *images[1:], "--boxes", world / f"vcr_{part}.db/boxes.json")
        both[part] = f"{gt};{world / 'det.lmdb'}"
        assert ImageDB(gt).region_counts.sum() == len(json.loads((world / f"vcr_{part}.db/boxes.json").read_text())["annotations"])
    training = ("--text", world / "vcr_train.db", "--images", both["train"], "--steps", 2, *TINY)
    second = done(train, "pretrain", *training, "--from", world / "run", "--out", world / "second")
    assert second["steps"] == 2
    held_out = ("--text", world / "vcr_val.db", "--images", both["val"], "--device", "cpu")
    assert {"mlm", "mrfr", "mrc-kl"} <= set(done(train, "evaluate", "pretrain", "--from", world / "second", *held_out))
    done(train, "finetune", "vcr", *training, "--from", world / "second", "--out", world / "vcr")
    figures = done(train, "evaluate", "vcr", "--from", world / "vcr", *held_out)
    assert 0 <= figures["q2ar"] <= min(figures["qa"], figures["qar"])
    for part, asked in (("val", questions), ("test", blind)):
        submission = world / f"{part}.csv"
        done(train, "predict", "vcr", "--from", world / "vcr", "--text", world / f"vcr_{part}.db", "--images", both[part],
             "--device", "cpu", "--out", submission)  # fmt: skip
        rows = list(csv.DictReader(submission.open()))
        assert {row["annot_id"] for row in rows} == {question["annot_id"] for question in asked}
        assert all(len(row) == 21 and all(np.isfinite(float(value)) for name, value in row.items() if name != "annot_id") for row in rows)


def test_the_four_questions_with_a_real_detector(world: Path, tmp_path: Path) -> None:
    from uniter.extract import RegionExtractor
    from uniter.model import Understanding

    tasks, photographs = world / "world/tasks", sorted((world / "world/images").iterdir())[:3]
    asked = json.loads((tasks / "vqa/v2_mscoco_train2014_annotations.json").read_text())["annotations"]
    (tmp_path / "answers.json").write_text(json.dumps(sorted({row["multiple_choice_answer"] for row in asked})))
    done(build_db, tasks / "vqa/v2_OpenEnded_mscoco_train2014_questions.json", world / "vqa.db", "--task", "vqa",
         "--join", tasks / "vqa/v2_mscoco_train2014_annotations.json", "--join", tmp_path / "answers.json",
         "--key", "scene_{id:06d}", "--images", world / "det.lmdb")  # fmt: skip
    done(train, "finetune", "vqa", "--from", world / "run", "--text", world / "vqa.db", "--images", world / "det.lmdb",
         "--out", world / "vqa", "--steps", 2, *TINY)  # fmt: skip
    extractor = RegionExtractor(world / "detector", cache=tmp_path / "kept", device="cpu", max_boxes=12)
    ask = Understanding(extractor, world / "run", world / "vqa", device="cpu")
    matched, answered = ask.match(photographs[0], "a red star"), ask.answer(photographs[0], "what color is the star?")
    pointed, ranked = ask.ground(photographs[0], "the red star"), ask.rank(photographs, "a red star")
    assert 0 < matched.probability < 1 and answered.answer in json.loads((world / "vqa.db/ans2label.json").read_text())
    height, width = pointed.regions.size or (0, 0)
    assert (pointed.box >= 0).all() and (pointed.box <= [width, height, width, height]).all() and (height, width) == (128, 160)
    assert sorted(ranked.order.tolist()) == [0, 1, 2] and ranked.probabilities[0] == pytest.approx(matched.probability, abs=1e-5)
    for result in (matched, answered, pointed, ranked):
        page = ask.picture(result)
        assert page.dtype == np.uint8 and min(page.shape[:2]) > 300 and len(ask.attention(result)) >= 3
    # The regions are those of the database, and another process finds them kept.
    database = ImageDB(world / "det.lmdb")
    assert np.abs(matched.regions.boxes - database[photographs[0].stem].boxes).max() < 0.5
    assert extractor.detected == 3
    again = RegionExtractor(world / "detector", cache=tmp_path / "kept", device="cpu", max_boxes=12)
    repeated = Understanding(again, world / "run", device="cpu").match(photographs[0], "a red star")
    assert repeated.probability == matched.probability and again.detected == 0

    page = tmp_path / "page.png"
    said = done(train, "predict", "match", "--from", world / "run", "--detector", world / "detector", "--image", photographs[0],
                "--text", "a red star", "--cache", tmp_path / "own", "--out", page, "--device", "cpu")  # fmt: skip
    assert 0 < said["answers"][0]["probability"] < 1 and Image.open(page).width >= 300
