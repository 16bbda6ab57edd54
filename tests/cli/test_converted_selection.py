"""Which rows of sources with candidates `uniter-db convert` takes, where they have confidences and where none is known."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from uniter.cli.db import main

ROWS = 40


def write_npz(file: Path, confidences: np.ndarray | None) -> None:
    """As UNITER's extraction docker writes them: candidates, best first."""
    file.parent.mkdir(exist_ok=True)
    dice = np.random.default_rng(0)
    corners = np.sort(dice.random((ROWS, 2, 2)), axis=1).reshape(ROWS, 4)
    arrays = {
        "features": np.repeat(np.arange(ROWS), 4).reshape(ROWS, 4).astype(np.float16),
        "norm_bb": np.concatenate([corners, corners[:, 2:] - corners[:, :2]], axis=1).astype(np.float16),
        "soft_labels": np.full((ROWS, 5), 0.2, np.float16),
    }
    if confidences is not None:
        arrays["conf"] = confidences.reshape(ROWS, 1).astype(np.float16)
    np.savez(file, **arrays)  # type: ignore[arg-type]


def rows_taken(source: Path, out: Path, *options: str) -> int:
    result = CliRunner().invoke(main, ["convert", str(source), str(out), "--json", *options])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["images"] == 1
    return int(told["regions"])


KNOWN = np.where(np.arange(ROWS) < 15, 0.9, 0.1)
OPTIONS = ((), ("--min-boxes", "1"), ("--min-boxes", "20"), ("--max-boxes", "5"), ("--conf-threshold", "0.05"), ("--keep-all",))


@pytest.mark.parametrize(("options", "expected"), zip(OPTIONS, (15, 15, 20, 5, ROWS, ROWS), strict=True))
def test_known_confidences_choose(tmp_path: Path, options: tuple[str, ...], expected: int) -> None:
    write_npz(tmp_path / "in" / "a.npz", KNOWN)
    assert rows_taken(tmp_path / "in", tmp_path / "out", *options) == expected


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("confidences", [None, np.zeros(ROWS)], ids=["none", "all zero"])
def test_where_no_confidence_is_known_all_rows_stay(tmp_path: Path, confidences: np.ndarray | None, options: tuple[str, ...]) -> None:
    """They cannot tell which rows to leave out; to take the least number would lose regions without a word."""
    write_npz(tmp_path / "in" / "a.npz", confidences)
    assert rows_taken(tmp_path / "in", tmp_path / "out", *options) == ROWS


def test_one_row_with_a_confidence_is_enough_to_choose_by(tmp_path: Path) -> None:
    write_npz(tmp_path / "in" / "a.npz", np.where(np.arange(ROWS) < 1, 0.9, 0.0))
    assert rows_taken(tmp_path / "in", tmp_path / "out", "--min-boxes", "3") == 3


def test_a_number_of_boxes_chooses_without_confidences(tmp_path: Path) -> None:
    write_npz(tmp_path / "in" / "a.npz", np.zeros(ROWS))
    assert rows_taken(tmp_path / "in", tmp_path / "out", "--conf-threshold", "-1", "--num-boxes", "7") == 7
