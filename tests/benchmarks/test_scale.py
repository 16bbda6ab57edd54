"""The benchmark of the cost of units runs, and what it prints is what was asked for."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


def test_it_prints_the_cost_of_a_unit(script: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script("scale").main(["--units", "3,9", "--rounds", "1", "--json", "--folder", str(tmp_path)])
    told = json.loads(capsys.readouterr().out)
    assert set(told["seconds_a_unit"]) == set(told["serial_seconds_a_unit"]) == {"3", "9"}
    assert all(0 < told["serial_seconds_a_unit"][units] < told["seconds_a_unit"][units] for units in ("3", "9"))
    assert not list(tmp_path.iterdir())


def test_several_processes_one_of_them_killed(script: Callable[[str], ModuleType], tmp_path: Path) -> None:
    told = script("scale").main(["--units", "60", "--processes", "3", "--kill", "--folder", str(tmp_path)])
    assert told["60"]["processes"] == 3 and told["60"]["seconds"] > 0
