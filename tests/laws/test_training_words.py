"""Training as a new user would: what is interrupted goes on, what is running is left alone, what is asked for wrongly is answered.

At the level of commands and files.
"""

import _thread
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import small_world as small

from uniter.cli.extract import main as extract
from uniter.cli.train import main as train
from uniter.datasets.image_db import ImageDB

TINY = [
    "MODEL.RESNETS.WIDTH_PER_GROUP=2", "MODEL.RESNETS.RES2_OUT_CHANNELS=8", "MODEL.RESNETS.STEM_OUT_CHANNELS=4",
    "MODEL.FPN.OUT_CHANNELS=8", "MODEL.ROI_BOX_HEAD.NUM_FC=1", "MODEL.ROI_BOX_HEAD.FC_DIM=16", "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION=3",
]  # fmt: skip


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """See small_world.py; its regions come from a detector."""
    pytest.importorskip("detectron2", reason="Detectron2 is brought by `uniter-extract --install-detectron2`")
    return small.small_world(tmp_path_factory.getbasetemp())


def pretraining(world: Any, out: Path, *more: object) -> list[object]:
    return ["pretrain", "--text", world.captions, "--images", world.regions(), "--out", out, *more]


def detector_training(world: Any, out: Path, *, steps: int) -> list[object]:
    words = ["detector", "--images", world.world / "images", "--annotations", world.world / "instances_train.json", "--out", out]
    words += [
        "--model",
        "tiny",
        "--no-attributes",
        "--batch-size",
        2,
        "--device",
        "cpu",
        "--workers",
        0,
        "--held-out",
        0.2,
        "--steps",
        steps,
    ]
    return [*words, *small.sets([*TINY, f"validate_every={steps}"])]


def updates(run: Path) -> list[int]:
    """The updates in a run's log, in its order; the last line may be half written."""
    log = run / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [line["step"] for line in found if line["kind"] == "train"]


# --- 29: interrupted, and two at once --------------------------------------------------------------------------------------------


def interrupted(words: list[object], run: Path, *, after: int) -> Any:
    """The command in this process, with Ctrl-C once its log has update number `after`."""
    ended = threading.Event()

    def watch() -> None:
        give_up = time.monotonic() + 60
        while not ended.wait(0.01):
            if max(updates(run), default=0) >= after or time.monotonic() > give_up:
                _thread.interrupt_main(signal.SIGINT)
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        return small.run(train, *words)
    finally:
        ended.set()
        watcher.join()


def test_an_interrupted_detector_goes_on_where_it_stopped(world: Any, tmp_path: Path) -> None:
    words, latest = detector_training(world, tmp_path, steps=100_000), tmp_path / "checkpoints" / "latest"
    result = interrupted(words, tmp_path, after=8)
    assert result.exit_code != 0 and isinstance(result.exception, SystemExit), result.output
    assert max(updates(tmp_path)) >= 8
    assert latest.exists(), f"nothing was saved, but it says: {result.stderr.splitlines()[-1]}"
    saved = int(latest.resolve().name.removeprefix("step-"))
    assert saved >= 8
    interrupted(words, tmp_path, after=saved + 3)
    assert int(latest.resolve().name.removeprefix("step-")) >= saved + 3
    assert updates(tmp_path) == list(range(1, len(updates(tmp_path)) + 1))


@pytest.fixture
def held() -> Iterator[Any]:
    """`held(words, run)`: the command in a process of its own, brought to a standstill in the middle of its updates."""
    started: list[subprocess.Popen[bytes]] = []

    def hold(words: list[object], run: Path) -> None:
        command = [sys.executable, "-m", "uniter.cli.train", *map(str, words)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        started.append(process)
        give_up = time.monotonic() + 120
        while not updates(run):
            if process.poll() is not None or time.monotonic() > give_up:
                process.kill()
                raise RuntimeError(f"no update came: {process.communicate()[0].decode()}")
            time.sleep(0.01)
        process.send_signal(signal.SIGSTOP)

    yield hold
    for process in started:
        process.kill()  # of a stopped process, too
        process.communicate()


def test_a_second_pretraining_leaves_the_first_ones_folder_alone(world: Any, tmp_path: Path, held: Any) -> None:
    words = pretraining(world, tmp_path, "--steps", 2000, "--device", "cpu", *small.sets(small.QUICK + small.HEADS_OF_16))
    held(words, tmp_path)
    before = (tmp_path / "log.jsonl").read_bytes()
    # Where nothing holds it back, it ends by itself.
    sentence = small.refused(small.run(train, *words, "--set", "stop_after=4"))
    assert str(tmp_path) in sentence
    assert (tmp_path / "log.jsonl").read_bytes() == before


def test_a_second_detector_leaves_the_first_ones_folder_alone(world: Any, tmp_path: Path, held: Any) -> None:
    words = detector_training(world, tmp_path, steps=50)
    held(words, tmp_path)
    before = (tmp_path / "log.jsonl").read_bytes()
    sentence = small.refused(small.run(train, *words))
    assert str(tmp_path) in sentence
    assert (tmp_path / "log.jsonl").read_bytes() == before and not (tmp_path / "detector.json").exists()


# --- 34: words ---------------------------------------------------------------------------------------------------------------------


def test_batches_that_hold_no_example_are_refused(world: Any, tmp_path: Path) -> None:
    chosen = ["batch_tokens=3", "stop_after=1", "tensorboard=false", "workers=0"]
    sentence = small.refused(small.run(train, *pretraining(world, tmp_path / "run", "--device", "cpu", *small.sets(chosen))))
    assert re.search("batch.tokens", sentence) and not (tmp_path / "run").exists()


def test_a_device_that_is_not_there_is_refused(world: Any, tmp_path: Path) -> None:
    words = ("--steps", 1, "--device", "cpu:7", *small.sets(small.QUICK + small.HEADS_OF_16))
    assert "cpu:7" in small.refused(small.run(train, *pretraining(world, tmp_path / "run", *words)))


def test_another_start_is_answered_by_its_own_name(world: Any) -> None:
    words = ("--steps", 4, "--device", "cpu", "--from", world.finetuned("ve"), *small.sets(small.QUICK))
    sentence = small.refused(small.run(train, *pretraining(world, world.pretrained, *words)))
    assert str(world.pretrained) in sentence and re.search(r"\bfrom\b", sentence)
    assert not re.search(r"model:|--model\b|leave one of the two out", sentence)


@pytest.mark.parametrize("command", ["pretrain", "evaluate"])
def test_swapped_databases_are_called_swapped(world: Any, command: str, tmp_path: Path) -> None:
    task = ["pretrain", "--out", tmp_path / "run"] if command == "pretrain" else ["evaluate", "pretrain", "--from", world.pretrained]
    sentence = small.refused(small.run(train, *task, "--text", world.regions(), "--images", world.captions))
    assert "--text" in sentence and "--images" in sentence and "None" not in sentence


def test_another_list_is_answered_with_what_differs(world: Any, tmp_path: Path) -> None:
    results = []
    for number in (1, 2):
        listed = tmp_path / f"{number}.txt"
        listed.write_text(f"{world.world / 'images' / f'scene_00000{number}.jpg'}\n")
        words = ("--detector", world.detector("one"), "--device", "cpu", "--batch-size", 4)
        results.append(small.run(extract, listed, tmp_path / "out.lmdb", *words))
    first, second = results
    assert first.exit_code == 0, first.output
    assert "1 then, 1 now" not in second.output
    # Whether it is done as well or refused: a count does not tell what differs.
    if second.exit_code == 0:
        assert "scene_000002" in ImageDB(tmp_path / "out.lmdb")
    else:
        assert "scene_000002" in small.refused(second)
