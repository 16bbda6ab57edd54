"""From the made-up world's task files to text databases over its region database, through the command, for every task."""

import json

import numpy as np
import pytest

from uniter.datasets.image_db.records import encode_record
from uniter.datasets.image_db.regions import RegionFeatures, normalised_boxes
from uniter.datasets.image_db.writing.units import UnitStore
from uniter.datasets.made_up.files import write_world
from uniter.datasets.made_up.tasks.table import write_tasks
from uniter.datasets.text_db import TextDB

COMMANDS = {
    "vqa": [
        "vqa/v2_OpenEnded_mscoco_{part}2014_questions.json",
        "--join",
        "vqa/v2_mscoco_{part}2014_annotations.json",
        "--key",
        "scene_{{id:06d}}",
    ],
    "ve": ["snli_ve/snli_ve_{ve}.jsonl"],
    "nlvr2": ["nlvr2/{nlvr2}.json"],
    "retrieval": ["retrieval/dataset_scenes.json", "--split", "{part}"],
    "refcoco": ["refcoco/refs(unc).p", "--join", "refcoco/instances.json", "--split", "{part}"],
    "refcoco+": ["refcoco+/refs(unc).p", "--join", "refcoco+/instances.json", "--split", "{part}"],
    "refcocog": ["refcocog/refs(umd).p", "--join", "refcocog/instances.json", "--split", "{part}"],
    "vcr": ["vcr/{part}.jsonl"],
}


def region_database(path, keys):
    boxes = np.array([[1, 2, 30, 20]], np.float32)
    record = RegionFeatures(
        np.ones((1, 4), np.float32), normalised_boxes(boxes, (128, 160)), np.ones(1, np.float32), boxes=boxes, size=(128, 160)
    )
    store = UnitStore(path, settings={})
    with store.unit(0) as unit:
        for key in keys:
            unit.put(key, encode_record(record), regions=1)
        unit.commit()
        unit.complete()
    assert store.finish(units=1, header={})
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    out = tmp_path_factory.mktemp("world")
    write_world(out, images=60, held_out=20, captions=2)
    write_tasks(out)
    scenes = region_database(out / "scenes.lmdb", sorted(path.stem for path in (out / "images").iterdir()))
    pairs = region_database(out / "pairs.lmdb", sorted(path.stem for path in (out / "tasks/nlvr2/images").iterdir()))
    return out, {"nlvr2": pairs}, scenes


@pytest.mark.parametrize("part", ["train", "val"])
@pytest.mark.parametrize("task", COMMANDS)
def test_every_text_finds_its_picture(world, build, tmp_path, task, part):
    out, databases, scenes = world
    names = {"part": part, "ve": "dev" if part == "val" else part, "nlvr2": "dev" if part == "val" else part}
    words = [word.format(**names) for word in COMMANDS[task]]
    paths = [out / "tasks" / word if "/" in word else word for word in words]
    # The table of answers is the training part's.
    extra = ["--join", _answers(out, build, tmp_path)] if (task, part) == ("vqa", "val") else []
    command = [
        paths[0],
        tmp_path / "text.db",
        "--task",
        task.rstrip("+g"),
        *paths[1:],
        *extra,
        "--images",
        databases.get(task, scenes),
        "--json",
    ]
    result = build(*command)
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert summary["texts"]["kept"] == summary["texts"]["read"] > 5 and summary["coverage"].get("missing", 0) == 0
    database = TextDB(tmp_path / "text.db")
    assert all(isinstance(database.record(number), dict) for number in range(len(database)))


def _answers(out, build, tmp_path):
    words = [word.format(part="train") for word in COMMANDS["vqa"]]
    paths = [out / "tasks" / word if "/" in word else word for word in words]
    result = build(paths[0], tmp_path / "train.db", "--task", "vqa", *paths[1:])
    assert result.exit_code == 0, result.output
    return tmp_path / "train.db" / "ans2label.json"
