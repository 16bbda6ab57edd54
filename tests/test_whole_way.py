"""From features and captions to a model, through the commands, on ten real photographs with the real Caffe detector's features."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(BIN / str(words[0])), *map(str, words[1:])], capture_output=True, text=True)


def done(*words: str | Path) -> subprocess.CompletedProcess[str]:
    finished = run(*words)
    assert finished.returncode == 0, finished.stderr
    return finished


@pytest.fixture(scope="module")
def databases(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("coco10")
    photographs = shared / "data" / "coco10"
    done("uniter-db", "convert", photographs / "train2014_obj36.tsv", folder / "coco10.lmdb")
    built = done("uniter-build-db", photographs / "captions.json", folder / "coco10.db", "--images", folder / "coco10.lmdb", "--json")
    assert json.loads(built.stdout)["texts"]["kept"] == 50
    done("uniter-db", "check", folder / "coco10.lmdb", folder / "coco10.db")
    return folder / "coco10.lmdb", folder / "coco10.db"


def test_the_whole_way_on_real_features(databases: tuple[Path, Path], tmp_path: Path) -> None:
    """There are no soft labels, so MRC-KL is left out, and said; the rest is trained, resumed and measured."""
    images, texts = databases
    command = ["uniter-train", "pretrain", "--text", texts, "--images", images, "--model", "tiny", "--out", tmp_path / "run"]
    first = done(*command, "--steps", "6", "--set", "stop_after=3")
    assert "mrc-kl" in first.stderr.lower() and "soft labels" in first.stderr
    second = done(*command, "--steps", "6")
    assert "resuming after update 3" in second.stderr
    steps = [row["step"] for row in map(json.loads, (tmp_path / "run" / "log.jsonl").read_text().splitlines()) if row["kind"] == "train"]
    assert steps == [1, 2, 3, 4, 5, 6]
    evaluated = done(
        "uniter-train", "evaluate", "pretrain", "--from", tmp_path / "run", "--text", texts, "--images", images, "--candidates", "5",
        "--json",
    )  # fmt: skip
    figures = json.loads(evaluated.stdout)
    assert {"mlm", "itm", "mrfr", "retrieval"} <= set(figures) and "mrc-kl" not in figures
    assert figures["pictures"] == 10


def test_asking_for_mrc_kl_without_soft_labels_is_an_error(databases: tuple[Path, Path], tmp_path: Path) -> None:
    images, texts = databases
    asked = run(
        "uniter-train", "pretrain", "--text", texts, "--images", images, "--model", "tiny", "--out", tmp_path / "run",
        "--set", "corpora.0.tasks={mrc-kl: 1}",
    )  # fmt: skip
    assert asked.returncode == 1
    assert "mrc-kl needs the detector's soft labels" in asked.stderr
