"""The down-stream benchmark runs from nothing to its table, and its table says where pre-training does not help."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from uniter.model.tasks.table import DOWNSTREAM

TINY = ["hidden_size=32", "num_hidden_layers=2", "num_attention_heads=4", "intermediate_size=64"]


def test_it_runs_to_its_table_and_goes_on(script: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = ["nlvr2", "vcr", "retrieval-flickr30k", "refcocog"]  # each names pictures in its own way
    words = ["--out", str(tmp_path), "--tasks", *rows, "--regions", "known", "--pictures", "24", "--few", "16", "--held-out", "8"]
    words += ["--seeds", "1", "--steps", "2", "--pretrain-steps", "2", "--set", "batch_tokens=400", "--device", "cpu", "--processes", "1"]
    words += [word for size in TINY for word in ("--model-set", size)]
    measured = script("downstream").main(words)
    assert list(measured) == rows and all(0 <= of[origin][0] <= 1 for of in measured.values() for origin in ("scratch", "pretrained"))
    assert "Pre-training helps on " in capsys.readouterr().out
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/checkpoints/*/model.safetensors")}
    tuned = {f"{row}-{origin}-0" for row in rows for origin in ("scratch", "pretrained")}
    assert {path.parts[-4] for path in written} == {"pretrained", "scratch-0", *tuned}
    assert script("downstream").main(words) == measured
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/checkpoints/*/model.safetensors")} == written


def test_nine_rows_as_in_the_paper(script: Callable[[str], ModuleType]) -> None:
    downstream = script("downstream")
    assert len(downstream.ROWS) == 9 and {row.task for row in downstream.ROWS.values()} < set(DOWNSTREAM)
    assert [row.world for name, row in downstream.ROWS.items() if name.startswith("retrieval")] == ["world", "few"]


def test_known_regions_stand_where_the_scene_says(script: Callable[[str], ModuleType], tmp_path: Path) -> None:
    from uniter.datasets.image_db import ImageDB
    from uniter.datasets.made_up.files import write_world
    from uniter.datasets.made_up.tasks.table import write_tasks
    from uniter.datasets.storage.files import read_json

    write_world(tmp_path / "world", images=12, held_out=4)
    write_tasks(tmp_path / "world")
    downstream = script("downstream")
    downstream.known_regions(tmp_path / "world", tmp_path / "a.lmdb", images=tmp_path / "world" / "images")
    downstream.known_regions(tmp_path / "world", tmp_path / "b.lmdb", images=tmp_path / "world" / "tasks" / "nlvr2" / "images")
    scenes = [scene for part in ("train", "val") for scene in read_json(tmp_path / "world" / f"scenes_{part}.json")["scenes"]]
    regions, paired = ImageDB(tmp_path / "a.lmdb"), ImageDB(tmp_path / "b.lmdb")
    for scene in scenes:
        boxes = regions[scene["key"]].boxes
        assert boxes is not None and boxes[: len(scene["things"])].tolist() == [thing["box"] for thing in scene["things"]]
    # The first set of statements is about the first four pictures.
    for scene, name in zip(scenes, ("0-0-img0", "0-0-img1", "0-1-img0", "0-1-img1"), strict=False):
        assert len(paired[f"train-{name}"]) == len(regions[scene["key"]])


def test_the_table_says_where_pre_training_does_not_help(script: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]) -> None:
    script("downstream").print_table(
        {
            "vqa": {"scratch": [0.50, 0.52, 0.51], "pretrained": [0.70, 0.71, 0.73]},
            "ve": {"scratch": [0.70, 0.60, 0.65], "pretrained": [0.66, 0.65, 0.65]},
            "nlvr2": {"scratch": [0.60, 0.61, 0.62], "pretrained": [0.59, 0.60, 0.61]},
        }
    )
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split("   ")[-1].strip() for line in lines[:3]] == ["helps", "NOT BEYOND THE NOISE", "DOES NOT HELP"]
    assert lines[0].split()[2:5] == ["51.0", "±", "1.0"] and "+20.3" in lines[0]
    assert lines[3] == "Pre-training helps on 1 of 3 tasks; not on ve, nlvr2."
