"""All texts with all pictures: the right pairs, kept in slices, resumed, and the same from two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from uniter.cli.train import main
from uniter.datasets import progress
from uniter.datasets.batches.collate import collate
from uniter.datasets.batches.corpus import open_corpus
from uniter.datasets.batches.example import Example, Masking
from uniter.datasets.batches.pretraining import matched_pair
from uniter.datasets.errors import BadInput, SettingsDiffer
from uniter.datasets.image_db import ImageDB
from uniter.model import UniterConfig
from uniter.model.checkpoints.load import load_downstream
from uniter.model.checkpoints.write import save_checkpoint
from uniter.model.evaluation import finetuned, known_pictures, pair_scores
from uniter.model.evaluation.finetuned import evaluate_finetuned, predict
from uniter.model.heads.downstream import UniterForRetrieval
from uniter.model.train.distributed import Processes
from uniter.model.train.scoring import Scoring

PICTURES = 14


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, made_up: Any) -> tuple[Path, Path]:
    return made_up.World(width=16).write(tmp_path_factory.mktemp("world"), pictures=PICTURES, captions=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, world: tuple[Path, Path]) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64, "image_feature_size": 16, "initializer_range": 0.3}
    vocabulary = open_corpus("toy", [world[0]], [world[1]]).texts[0].v_range[1]
    folder = tmp_path_factory.mktemp("model") / "retrieval"
    made = UniterForRetrieval(UniterConfig.preset("tiny", vocab_size=vocabulary, **sizes))
    save_checkpoint(folder, made)
    return folder


@pytest.fixture
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_scores, "SLICE_PAIRS", 5 * PICTURES)


def evaluated(model: Path, world: tuple[Path, Path], **options: Any) -> dict[str, Any]:
    return evaluate_finetuned(
        "retrieval", str(model), text=[str(world[0])], images=[str(world[1])], batch_tokens=150, device="cpu", **options
    )


def kept(folder: Path) -> np.ndarray:
    return np.concatenate([np.load(path) for path in sorted(folder.glob("scores_*.npy"))])


def test_each_pair_has_the_score_that_it_has_alone(model: Path, world: tuple[Path, Path], small_slices: None, tmp_path: Path) -> None:
    evaluated(model, world, scores=tmp_path)
    scores, corpus = kept(tmp_path), open_corpus("toy", [world[0]], [world[1]])
    pictures, own = pair_scores.pictures_of(corpus)
    assert scores.shape == (len(corpus), PICTURES) and len(list(tmp_path.glob("scores_*.npy"))) == 6
    assert pictures[own].tolist() == corpus.image_rows_NK[:, 0].tolist()
    loaded = load_downstream(UniterForRetrieval, model)
    for text, picture in ((0, 0), (7, 3), (27, 13), (12, 9)):
        batch = collate([matched_pair(Example(corpus, text, (int(pictures[picture]),)), None, Masking())])
        with torch.no_grad():
            assert scores[text, picture] == pytest.approx(loaded.ranks(batch)["scores"].item(), abs=1e-5)


def test_it_goes_on_where_it_was_stopped(
    model: Path, world: tuple[Path, Path], small_slices: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = evaluated(model, world)
    keep, times = pair_scores._keep, []

    def stopped(path: Path, scores: np.ndarray) -> None:
        if len(times) == 2:
            raise KeyboardInterrupt
        times.append(path)
        keep(path, scores)

    monkeypatch.setattr(pair_scores, "_keep", stopped)
    with pytest.raises(KeyboardInterrupt):
        evaluated(model, world, scores=tmp_path)
    written: list[str] = []
    monkeypatch.setattr(pair_scores, "_keep", lambda path, scores: (written.append(path.name), keep(path, scores)))
    assert evaluated(model, world, scores=tmp_path) == plain
    assert len(written) == 4 and not {path.name for path in times} & set(written)
    # Scored once, answered twice: predict finds what evaluate kept; a damaged slice is scored again.
    next(tmp_path.glob("scores_*05.npy")).write_bytes(b"no array")
    written.clear()
    predict("retrieval", str(model), tmp_path / "ranks.json", text=[str(world[0])], images=[str(world[1])], scores=tmp_path, device="cpu")
    assert written == ["scores_00000005.npy"]
    assert len(json.loads((tmp_path / "ranks.json").read_text())["texts_of_image"]) == PICTURES


def test_each_picture_is_read_once(model: Path, world: tuple[Path, Path], small_slices: None, monkeypatch: pytest.MonkeyPatch) -> None:
    read, rows = ImageDB.read_arrays, []
    monkeypatch.setattr(ImageDB, "read_arrays", lambda database, row, fields: (rows.append(row), read(database, row, fields))[1])
    evaluated(model, world)
    assert sorted(rows) == list(range(PICTURES))


def test_more_pictures_than_can_be_held_are_scored_in_blocks(
    model: Path, world: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluated(model, world, scores=tmp_path / "whole")
    of_picture = 6 * 32 * 4  # regions, hidden units, bytes
    monkeypatch.setattr(known_pictures, "STORE_BYTES", 5 * of_picture + 1)
    monkeypatch.setattr(pair_scores, "SLICE_PAIRS", 5 * 20)
    assert evaluated(model, world, scores=tmp_path / "blocks") == whole
    found = {path.name: np.load(path) for path in (tmp_path / "blocks").glob("scores_*.npy")}
    assert {name: scores.shape for name, scores in found.items()} == {
        f"scores_{text:08d}_{picture:08d}.npy": (texts, pictures)
        for text, texts in ((0, 20), (20, 8))
        for picture, pictures in ((0, 5), (5, 5), (10, 4))
    }
    together = np.block([[found[f"scores_{text:08d}_{picture:08d}.npy"] for picture in (0, 5, 10)] for text in (0, 20)])
    assert np.allclose(together, kept(tmp_path / "whole"), atol=1e-6)
    # What is there is not scored again, and a folder of whole slices is not taken for one of blocks.
    monkeypatch.setattr(finetuned, "know", lambda *_: pytest.fail("all scores are there"))
    assert evaluated(model, world, scores=tmp_path / "blocks") == whole
    with pytest.raises(SettingsDiffer, match="pictures_of_slices"):
        evaluated(model, world, scores=tmp_path / "whole")


def test_runs_of_pictures_fit_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_pictures, "STORE_BYTES", 100 * 32 * 4)
    scoring = Scoring(UniterForRetrieval(UniterConfig.preset("tiny", hidden_size=32)), Processes(0, 1, torch.device("cpu")), 100, 0)
    assert known_pictures.blocks_of(np.array([60, 40, 1, 99, 300, 5]), scoring) == [(0, 2), (2, 4), (4, 5), (5, 6)]


def test_it_says_how_far_it_is(
    model: Path,
    world: tuple[Path, Path],
    small_slices: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_SECONDS", 0.0)
    evaluated(model, world, scores=tmp_path / "scores")
    out, err = capsys.readouterr()
    assert out == "" and f"scoring: 392 of {2 * PICTURES * PICTURES} pairs" in err.splitlines()[-1]
    (tmp_path / "scores" / "scores_00000025.npy").unlink()
    evaluated(model, world, scores=tmp_path / "scores")
    lines = capsys.readouterr().err.splitlines()
    first, last = (int(line.split()[1]) for line in (lines[0], lines[-1]))
    assert 322 < first < last == 392  # the slice that was away is five texts of fourteen pictures


def test_scores_of_something_else_are_refused(model: Path, world: tuple[Path, Path], tmp_path: Path) -> None:
    evaluated(model, world, scores=tmp_path)
    with pytest.raises(SettingsDiffer, match='precision was "fp32", now "bf16"'):
        evaluated(model, world, scores=tmp_path, precision="bf16")
    with pytest.raises(BadInput, match="vqa scores none"):
        evaluate_finetuned("vqa", str(model), text=[str(world[0])], images=[str(world[1])], scores=tmp_path)


def test_pictures_stand_as_the_texts_name_them(world: tuple[Path, Path]) -> None:
    corpus = open_corpus("toy", [world[0]], [world[1]])
    backwards = corpus.take(np.arange(len(corpus))[::-1])
    pictures, own = pair_scores.pictures_of(backwards)
    assert own.tolist() == sorted(own.tolist())
    assert pictures[own].tolist() == backwards.image_rows_NK[:, 0].tolist() != sorted(backwards.image_rows_NK[:, 0].tolist())


def test_shares_of_several_processes_are_added() -> None:
    class Two(Processes):
        def gather(self, value: Any) -> list[Any]:
            return [value, value if isinstance(value, list) else 10 * value]

    def of_block(begin: int, end: int) -> pair_scores.Score:
        return lambda first, last: np.ones((last - first, end - begin), np.float32)

    made = pair_scores.in_slices(3, [(0, 2)], of_block, processes=Two(0, 2, torch.device("cpu")))
    assert made.tolist() == [[11, 11]] * 3


def test_two_processes_score_as_one(model: Path, world: tuple[Path, Path], tmp_path: Path) -> None:
    words = ["evaluate", "retrieval", "--from", str(model), "--text", str(world[0]), "--images", str(world[1]), "--device", "cpu", "--json"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "uniter.cli.train"]
    done = subprocess.run(
        [*launcher, *words, "--batch-tokens", "150", "--scores", str(tmp_path / "two")],
        capture_output=True, text=True, timeout=180, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one = evaluated(model, world, scores=tmp_path / "one")
    two = json.loads(done.stdout)
    assert two.pop("left_out") == one.pop("left_out") == {}
    assert two == pytest.approx(one)
    assert np.allclose(kept(tmp_path / "two"), kept(tmp_path / "one"), atol=1e-6)


def test_scores_belong_to_retrieval_only(model: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["evaluate", "pretrain", "--from", str(model), "--scores", str(tmp_path / "scores")])
    assert result.exit_code == 2 and "--scores keeps the pairs of `evaluate retrieval`" in result.stderr


def test_a_submission_goes_into_a_folder_that_is_there(model: Path, world: tuple[Path, Path], tmp_path: Path) -> None:
    asked = {"text": [str(world[0])], "images": [str(world[1])], "device": "cpu"}
    with pytest.raises(BadInput, match="nowhere is no folder"):
        predict("retrieval", str(model), tmp_path / "nowhere" / "ranks.json", **asked)
    (tmp_path / "answers.json").write_text('{"yes": 0}')
    with pytest.raises(BadInput, match="does not choose among named answers"):
        predict("retrieval", str(model), tmp_path / "ranks.json", answers=tmp_path / "answers.json", **asked)
    assert not (tmp_path / "ranks.json").exists()
