"""Annotation files in which something is missing, of another type, or cut off: read as they are, or refused in a sentence."""

import csv
import json
import pickle
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from uniter.datasets.errors import UniterError
from uniter.datasets.made_up.files import write_world
from uniter.datasets.made_up.tasks.table import write_tasks
from uniter.datasets.text_db.annotations.table import ANNOTATIONS

# task: its file, what is joined, the split.
SOURCES = {
    "vqa": ("vqa/v2_OpenEnded_mscoco_train2014_questions.json", ["vqa/v2_mscoco_train2014_annotations.json"], None),
    "ve": ("snli_ve/snli_ve_train.jsonl", [], None),
    "nlvr2": ("nlvr2/train.json", ["missing.json"], None),
    "retrieval": ("retrieval/dataset_scenes.json", [], "train"),
    "refcoco": ("refcoco/refs(unc).p", ["refcoco/instances.json"], "train"),
    "vcr": ("vcr/train.jsonl", ["vcr/vcr1images"], None),
    "gqa": ("gqa/train_balanced_questions.json", [], None),
    "classify": ("own.jsonl", [], None),
}
STRANGE = (None, 7, -1, 2.5, "", "x", [], {}, [1], {"a": 1}, True, "9" * 30)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("world")
    write_world(out, images=20, held_out=4, captions=1)
    write_tasks(out)
    (out / "tasks" / "missing.json").write_text(json.dumps(["nlvr2_train-0-0-img0.npz"]))
    with (out / "tasks" / "own_labels" / "train_one.csv").open(newline="") as file:
        (out / "tasks" / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in csv.DictReader(file)))
    return out / "tasks"


def load(path: Path) -> Any:
    if path.suffix == ".p":
        return pickle.loads(path.read_bytes())
    if path.suffix == ".jsonl" or path.parent.name == "nlvr2":
        return [json.loads(line) for line in path.read_text().splitlines()]
    return json.loads(path.read_text())


def dump(path: Path, document: Any, *, of: Path) -> None:
    if of.suffix == ".p":
        path.write_bytes(pickle.dumps(document, protocol=2))
    elif of.suffix == ".jsonl" or of.parent.name == "nlvr2":
        path.write_text("".join(json.dumps(row) + "\n" for row in document))
    else:
        path.write_text(json.dumps(document))


def spoil(document: Any, rng: random.Random) -> str:
    """Take something out of it or put something strange in its place, in the first entries, which are read first."""
    place, steps = document, []
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(min(len(place), 3)))
        key = rng.choice(keys)
        steps.append(str(key))
        inner = place[key]
        if not (isinstance(inner, dict | list) and inner) or rng.random() < 0.3:
            break
        place = inner
    if isinstance(place, dict) and rng.random() < 0.4:
        del place[key]
        return f"without {'.'.join(steps)}"
    place[key] = rng.choice(STRANGE)
    return f"{'.'.join(steps)} = {place[key]!r}"


@pytest.mark.parametrize("task", SOURCES)
def test_a_broken_file_is_read_or_refused_in_a_sentence(task: str, world: Path, tmp_path: Path) -> None:
    file, joined, split = SOURCES[task]
    files = [world / file, *(world / name for name in joined)]
    rng, refused = random.Random(task), 0
    for _ in range(120):
        spoiled = rng.choice([number for number, path in enumerate(files) if path.is_file()])
        given = list(files)
        document = load(files[spoiled])
        what = spoil(document, rng)
        given[spoiled] = tmp_path / files[spoiled].name
        dump(given[spoiled], document, of=files[spoiled])
        if rng.random() < 0.15:
            given[spoiled].write_bytes(given[spoiled].read_bytes()[: rng.randrange(given[spoiled].stat().st_size)])
            what += ", cut off"
        try:
            list(ANNOTATIONS[task].read(given[0], split=split, join=given[1:], counts=Counter()))
            ANNOTATIONS[task].side_files([given[0]], split=split, join=given[1:])
        except UniterError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 600, what
        except Exception as error:
            raise AssertionError(f"{task}: {what} ends in {type(error).__name__}: {error}") from error
    assert refused > 10
