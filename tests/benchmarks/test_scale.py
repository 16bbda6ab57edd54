"""The benchmark of the cost of units runs, and what it prints is what was asked for."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "scale.py"


def test_it_prints_the_cost_of_a_unit(script: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script("scale").main(["--units", "3,9", "--rounds", "1", "--json", "--folder", str(tmp_path)])
    told = json.loads(capsys.readouterr().out)
    assert set(told["seconds_a_unit"]) == set(told["serial_seconds_a_unit"]) == {"3", "9"}
    assert all(0 < told["serial_seconds_a_unit"][units] < told["seconds_a_unit"][units] for units in ("3", "9"))
    assert not list(tmp_path.iterdir())


def test_several_processes_one_of_them_killed(tmp_path: Path) -> None:
    """In a process of its own: it forks, and by now this one may have threads that hold locks."""
    words = ["--units", "60", "--processes", "3", "--kill", "--json", "--folder", str(tmp_path)]
    done = subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["60"]["processes"] == 3 and told["60"]["seconds"] > 0
