"""How every command begins and ends: as a module, under Ctrl-C while it is being imported, and with nobody reading what it prints."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parents[1] / "golden" / "before_second_storey"
COMMANDS = ("app", "build_db", "db", "extract", "scenes", "train", "view")
NO_COMMANDS = {"__init__", "common", "start"}
MODULES = sorted(path.stem for path in (Path(__file__).parents[2] / "cli").glob("*.py") if path.stem not in NO_COMMANDS)


def script(command: str, *words: object) -> list[str]:
    """What the console script of a command does, in a process of its own."""
    return [sys.executable, "-c", f"import sys; from uniter.cli.start import {command}; sys.exit({command}())", *map(str, words)]


@pytest.mark.parametrize("module", MODULES)
def test_every_module_is_a_command(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", f"uniter.cli.{module}", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("Usage:"), done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_while_a_command_is_imported_is_one_line(command: str) -> None:
    """The signal comes when Python begins to import the command's first library, which is after what no program can catch."""
    code = (
        "import os, signal, sys\n"
        "def told(event, values):\n"
        "    if event == 'import' and values[0] == 'click': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.addaudithook(told)\n"
        f"from uniter.cli.start import {command}\n{command}()\n"
    )
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "error: interrupted\n")


def test_ctrl_c_later_is_one_line_too(tmp_path: Path) -> None:
    working = subprocess.Popen(script("scenes", tmp_path / "out", "--images", 5000), stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "out" / "images").is_dir():
        time.sleep(0.01)
    working.send_signal(signal.SIGINT)
    _, said = working.communicate(timeout=60)
    assert working.returncode == 1
    assert said == "error: interrupted; the same command continues where it stopped\n"


def test_under_nohup_ctrl_c_stays_ignored(tmp_path: Path) -> None:
    words = script("scenes", tmp_path / "out", "--images", 2, "--held-out", 0)
    ignoring = subprocess.Popen(words, stdout=subprocess.PIPE, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    time.sleep(0.1)
    ignoring.send_signal(signal.SIGINT)
    ignoring.communicate(timeout=60)
    assert ignoring.returncode == 0


@pytest.mark.parametrize("both", [False, True], ids=["stdout", "stdout and stderr"])
def test_a_reader_who_leaves_is_no_error(both: bool) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        words = script("db", "info", GOLDEN / "regions.lmdb")
        done = subprocess.run(words, stdout=writing, stderr=writing if both else subprocess.PIPE, text=True)
    finally:
        os.close(writing)
    assert done.returncode == 141
    assert not done.stderr


def test_of_other_libraries_only_warnings_are_shown(tmp_path: Path) -> None:
    code = (
        "import logging, sys, click\n"
        "from uniter.cli.common import common_options\n"
        "@click.command()\n@common_options\n"
        "def main(as_json):\n"
        "    for name in ('torch._dynamo', 'uniter.extract'):\n"
        "        logging.getLogger(name).info('told by ' + name)\n"
        "        logging.getLogger(name).warning('warned by ' + name)\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines() == ["warned by torch._dynamo", "told by uniter.extract", "warned by uniter.extract"]


def test_what_is_read_to_its_end_is_all_there() -> None:
    done = subprocess.run(script("db", "info", GOLDEN / "regions.lmdb", "--json"), capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)
