"""uniter-db as a user meets it: exit codes, sentences, JSON."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from uniter.cli.db import main
from uniter.datasets.image_db import ImageDB
from uniter.datasets.image_db.records import encode_record
from uniter.datasets.image_db.regions import RegionFeatures
from uniter.datasets.image_db.writing.units import UnitStore


def write(out: Path, keys: list[str], **header: Any) -> Path:
    store = UnitStore(out, settings={})
    with store.unit(0) as writer:
        assert writer is not None
        for key in keys:
            dice = np.random.default_rng(sum(key.encode()))
            corners = np.sort(dice.random((3, 2, 2), dtype=np.float32), axis=1).reshape(3, 4)
            record = RegionFeatures(
                features=dice.random((3, 4), dtype=np.float32),
                norm_bb=np.concatenate([corners, corners[:, 2:] - corners[:, :2]], axis=1),
                conf=np.float32([0.9, 0.8, 0.7]),
                boxes=corners * np.float32([640, 480, 640, 480]),
                soft_labels=np.full((3, 5), 0.2, np.float32),
                size=(480, 640),
            )
            writer.put(key, encode_record(record), regions=3)
        writer.complete()
    store.finish(units=1, header={"feature_width": 4, "label_classes": 5, "class_names": list("abcd"), **header})
    return out


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return write(tmp_path / "out.lmdb", [f"img{index}" for index in range(6)])


def run(*words: str | Path, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == code, result.output
    return result


def as_json(*words: str | Path, code: int = 0) -> Any:
    return json.loads(run(*words, "--json", code=code).stdout)


@pytest.mark.parametrize("command", ["", "info", "check", "convert", "merge", "split"])
def test_help_has_an_example(command: str) -> None:
    output = run(*([command] if command else []), "--help").output
    assert "Example:" in output
    assert "uniter-db" in output
    run("--version")


def test_info(database: Path) -> None:
    told = as_json("info", database)["databases"][0]
    assert (told["kind"], told["images"], told["regions"], told["feature_width"]) == ("regions", 6, 18, 4)
    assert told["regions_per_image"] == {"mean": 3.0, "min": 3, "max": 3}
    assert "regions_per_image.mean" in run("info", database).output
    assert run("info", database.parent / "nowhere", code=1).stderr.startswith("error: ")


def test_golden_info_of_texts_and_published_regions(uniter_data_golden: Path) -> None:
    text = uniter_data_golden / "txt_db" / "pretrain_toy_train.db"
    regions = uniter_data_golden / "img_db" / "scenes"
    told = as_json("info", text, regions)["databases"]
    assert told[0]["texts"] == len(json.loads((text / "id2len.json").read_text()))
    assert told[1]["images"] == len(json.loads((regions / "nbb_th0.2_max100_min10.json").read_text()))


def test_check_says_good_and_bad_by_its_exit_code(database: Path, tmp_path: Path) -> None:
    assert as_json("check", database)["ok"] is True
    data = database / "data.mdb"
    content = data.read_bytes()
    data.write_bytes(content[: len(content) - 5000])
    told = as_json("check", database, code=1)
    assert told["ok"] is False
    assert "cut off" in told["databases"][0]["examples"][0]
    result = run("check", database, code=1)
    assert "! " in result.output
    assert "cut off" in result.output
    (tmp_path / "empty").mkdir()
    assert run("check", tmp_path / "empty", code=1).stderr.startswith("error: ")


def test_repair_keeps_what_is_good(database: Path, tmp_path: Path) -> None:
    data = database / "data.mdb"
    content = bytearray(data.read_bytes())
    place = content.index(ImageDB(database)["img3"].features.tobytes())
    content[place + 1] ^= 1
    data.write_bytes(content)
    run("check", database, "--repair", tmp_path / "good.lmdb", code=1)
    good = ImageDB(tmp_path / "good.lmdb")
    assert sorted(good) == ["img0", "img1", "img2", "img4", "img5"]
    assert good.class_names == tuple("abcd")
    run("check", tmp_path / "good.lmdb")
    run("check", database, database, "--repair", tmp_path / "x", code=2)


def test_golden_coverage_is_checked(uniter_data_golden: Path, database: Path) -> None:
    text, regions = uniter_data_golden / "txt_db" / "pretrain_toy_train.db", uniter_data_golden / "img_db" / "scenes"
    coverage = as_json("check", text, database, code=1)["coverage"]
    assert coverage["texts_with_image"] == 0
    told = CliRunner().invoke(main, ["check", str(text), str(regions), "--json"])
    coverage = json.loads(told.stdout)["coverage"]
    assert (told.exit_code == 0) == (coverage["texts"] == coverage["texts_with_image"])
    assert coverage["images_found"] > 0


def test_convert_there_and_back(database: Path, tmp_path: Path) -> None:
    told = as_json("convert", database, tmp_path / "out.tsv", "--to", "lxmert-tsv")
    assert (told["images"], told["regions"], told["soft_labels"], told["skipped"]) == (6, 18, False, [])
    assert "MRC-KL" in told["lacks"]
    result = run("convert", tmp_path / "out.tsv", tmp_path / "back.lmdb")
    assert "source" in result.output
    assert sorted(ImageDB(tmp_path / "back.lmdb")) == sorted(ImageDB(database))
    run("convert", tmp_path / "out.tsv", tmp_path / "x", "--to", "nonsense", code=2)
    assert "does not exist" in run("convert", tmp_path / "none", tmp_path / "x", code=1).stderr
    again = as_json("convert", database, tmp_path / "out.tsv", "--to", "lxmert-tsv")
    assert {**told, "already_complete": True} == again
    other = write(tmp_path / "other.lmdb", ["other"])
    assert "is there already, made otherwise" in run("convert", other, tmp_path / "out.tsv", "--to", "lxmert-tsv", code=1).stderr


def test_skipped_images_are_said_and_strict_makes_it_an_exit_code(database: Path, tmp_path: Path) -> None:
    run("convert", database, tmp_path / "in.tsv", "--to", "butd-tsv")
    lines = (tmp_path / "in.tsv").read_bytes().splitlines(keepends=True)
    (tmp_path / "in.tsv").write_bytes(b"".join([lines[0][:50] + b"\n", *lines[1:]]))
    result = run("convert", tmp_path / "in.tsv", tmp_path / "a.lmdb")
    assert "skipped: " in result.stderr
    run("convert", tmp_path / "in.tsv", tmp_path / "b.lmdb", "--strict", code=3)
    assert len(as_json("convert", tmp_path / "in.tsv", tmp_path / "a.lmdb")["skipped"]) == 1
    differs = run("convert", tmp_path / "in.tsv", tmp_path / "a.lmdb", "--keep-all", code=1)
    assert "selection.keep_all was false, now true" in differs.stderr


def test_merge_and_split(database: Path, tmp_path: Path) -> None:
    assert as_json("split", database, tmp_path / "parts", "--by", "2")["parts"] == {"part-0": 3, "part-1": 3}
    told = as_json("merge", tmp_path / "parts" / "part-0", tmp_path / "parts" / "part-1", tmp_path / "whole.lmdb")
    assert told["images"] == 6
    for key in ImageDB(database):
        assert ImageDB(database).raw_record(key) == ImageDB(tmp_path / "whole.lmdb").raw_record(key)
    assert ImageDB(tmp_path / "whole.lmdb").class_names == tuple("abcd")
    run("merge", database, code=2)
    assert "does not exist" in run("merge", tmp_path / "none", tmp_path / "x", code=1).stderr
    other = write(tmp_path / "other.lmdb", ["z"], detector="another")
    assert "detector" in run("merge", database, other, tmp_path / "x", code=1).stderr


def test_errors_are_one_line_and_the_rest_is_shown_on_request(database: Path) -> None:
    (database / "header.json").unlink()
    result = run("merge", database, database.parent / "x", code=1)
    assert result.stderr.count("\n") == 1
    assert "is unfinished" in result.stderr
    assert "Traceback" in run("merge", database, database.parent / "x", "--traceback", code=1).stderr


def test_an_interrupted_conversion_is_finished_by_the_same_command(tmp_path: Path) -> None:
    source = write(tmp_path / "in.lmdb", [f"img{index:05d}" for index in range(1500)])
    command = [sys.executable, "-m", "uniter.cli.db", "convert", str(source), str(tmp_path / "out.lmdb"), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while process.poll() is None and not (tmp_path / "out.lmdb" / "settings.json").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = subprocess.run(command, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    assert json.loads(done.stdout)["images"] == 1500
    shutil.copytree(tmp_path / "out.lmdb", tmp_path / "copy")
    run("check", tmp_path / "copy")
