"""What users had before the second storey opens, says the same and goes on: databases, a detector and a half-trained run on file.

At the level of commands and files, so that it holds whatever the code inside is called. What is kept and how it was made stands in
tests/golden/before_second_storey/README.md.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
from click import Command
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.numpy import load_file

from uniter.cli.db import main as db
from uniter.cli.extract import main as extract
from uniter.cli.train import main as train
from uniter.datasets.image_db import ImageDB
from uniter.datasets.text_db import TextDB

KEPT = Path(__file__).parent / "golden" / "before_second_storey"
EXPECTED: dict[str, Any] = json.loads((KEPT / "expected.json").read_text(encoding="utf-8"))
DATA = ("--text", "texts.db", "--images", "regions.lmdb")
GOES_ON = [
    "pretrain", *DATA, "--out", "run", "--steps", "8", "--seed", "7", "--device", "cpu",
    "--set", "checkpoint_every=2", "--set", "keep=1", "--set", "validate_every=4", "--set", "workers=0", "--set", "batch_tokens=120",
    "--set", "tensorboard=false", "--set", "model.hidden_size=16", "--set", "model.num_hidden_layers=1",
    "--set", "model.num_attention_heads=2", "--set", "model.intermediate_size=32", "--set", "model.max_position_embeddings=40",
]  # fmt: skip
EVALUATES = ["evaluate", "pretrain", "--from", "run", *DATA, "--device", "cpu", "--candidates", "6", "--json"]


FLOOR = 1e-5


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that may be written to, as the current folder: the run's settings name its databases relative to it."""
    folder = tmp_path / "kept"
    shutil.copytree(KEPT, folder, symlinks=True)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("UNITER_CACHE", str(tmp_path / "cache"))
    return folder


def run(command: Command, *words: object) -> str:
    result = CliRunner().invoke(command, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.stdout


def digest(database: Path) -> str:
    """SHA-256 of all keys and values of an LMDB, in the order of the keys."""
    found = hashlib.sha256()
    with lmdb.open(str(database), readonly=True, lock=False) as environment, environment.begin() as transaction:
        for key, value in transaction.cursor():
            found.update(len(key).to_bytes(8, "big") + key + len(value).to_bytes(8, "big") + value)
    return found.hexdigest()


def sums(weights: Path) -> dict[str, list[float]]:
    """The sum and the sum of the absolute values of every tensor."""
    tensors = load_file(weights)
    with safe_open(weights, "np") as file:  # tied tensors stood twice, and stand once under the one name since
        tensors |= {alias: tensors[name] for alias, name in (file.metadata() or {}).items() if name in tensors}
    return {name: [float(values.sum(dtype=np.float64)), float(np.abs(values).sum(dtype=np.float64))] for name, values in tensors.items()}


def measured(folder: Path) -> dict[str, Any]:
    """What expected.json holds, of a copy that is the current folder; its run goes on to the end."""
    half, regions = sums(folder / "run/checkpoints/latest/model.safetensors"), ImageDB(folder / "regions.lmdb")
    said = {
        "digests": {name: digest(folder / name) for name in ("regions.lmdb", "texts.db")},
        "regions": {
            key: [len(regions[key]), float(regions[key].features.sum(dtype=np.float64)), float(regions[key].norm_bb.sum(dtype=np.float64))]
            for key in sorted(regions)
        },
        "evaluation": json.loads(run(train, *EVALUATES)),
        "half": half,
    }
    run(train, *GOES_ON)
    return {**said, "end": sums(folder / "run/checkpoints/latest/model.safetensors")}


def test_the_databases_open_and_check_clean(kept: Path) -> None:
    for name, expected in EXPECTED["digests"].items():
        assert digest(kept / name) == expected, name
        run(db, "info", name)
    checked = json.loads(run(db, "check", "regions.lmdb", "texts.db", "--json"))
    assert checked["ok"] and checked["coverage"]["texts_with_image"] == 36
    regions, texts = ImageDB(kept / "regions.lmdb"), TextDB(kept / "texts.db")
    assert sorted(regions) == sorted(EXPECTED["regions"])
    for key, (count, features, boxes) in EXPECTED["regions"].items():
        found = regions[key]
        assert found.features.shape == (count, 16) and found.soft_labels is not None and found.soft_labels.shape == (count, 9)
        assert found.features.sum(dtype=np.float64) == pytest.approx(features, rel=1e-6)
        assert found.norm_bb.sum(dtype=np.float64) == pytest.approx(boxes, rel=1e-6)
        assert found.size == (128, 160) and found.boxes is not None
    assert len(texts) == 36


def test_the_run_evaluates_to_the_same_numbers(kept: Path) -> None:
    found = json.loads(run(train, *EVALUATES))
    for group, figures in EXPECTED["evaluation"].items():
        if not isinstance(figures, dict):
            assert found[group] == figures, group
            continue
        for name, figure in figures.items():
            assert found[group][name] == pytest.approx(figure, rel=1e-6, abs=1e-9), f"{group}.{name}"


def test_the_run_goes_on_to_its_end(kept: Path) -> None:
    latest = kept / "run" / "checkpoints" / "latest"
    assert latest.resolve().name == "step-4"
    same(sums(latest / "model.safetensors"), EXPECTED["half"], relative=0)
    run(train, *GOES_ON)
    assert latest.resolve().name == "step-8"
    same(sums(latest / "model.safetensors"), EXPECTED["end"], relative=1e-6)
    steps = [line["step"] for line in map(json.loads, (kept / "run" / "log.jsonl").read_text().splitlines()) if line["kind"] == "train"]
    assert steps == list(range(1, 9))


def same(found: dict[str, list[float]], expected: dict[str, list[float]], *, relative: float) -> None:
    assert sorted(found) == sorted(expected)
    for name, (total, absolute) in expected.items():
        # A sum of both signs is near zero: its error is measured by what was summed. The floor is for the keys' biases, whose
        # gradient is nothing but rounding (a soft-max does not see them), and so another one on every processor.
        tolerance = max(relative * absolute, FLOOR if relative else 0)
        assert found[name] == pytest.approx([total, absolute], rel=0, abs=tolerance), name
    whole = sum(absolute for _, absolute in expected.values())
    assert sum(total for total, _ in found.values()) == pytest.approx(
        sum(total for total, _ in expected.values()), rel=0, abs=relative * whole + 1e-9
    )


def test_the_detector_extracts(kept: Path) -> None:
    pytest.importorskip("detectron2")
    run(
        extract, "photographs", "again.lmdb", "--detector", "detector", "--min-boxes", 4, "--max-boxes", 8, "--conf-threshold", 0.05,
        "--device", "cpu", "--batch-size", 4,
    )  # fmt: skip
    before, again = ImageDB(kept / "regions.lmdb"), ImageDB(kept / "again.lmdb")
    assert sorted(again) == ["scene_000001", "scene_000002"]
    for key in again:
        # Half precision, and other processors round otherwise.
        np.testing.assert_allclose(again[key].features, before[key].features, atol=5e-3)
        np.testing.assert_allclose(again[key].norm_bb, before[key].norm_bb, atol=5e-3)
        np.testing.assert_allclose(again[key].conf, before[key].conf, atol=5e-3)
