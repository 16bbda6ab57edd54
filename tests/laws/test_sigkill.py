"""SIGKILL at random instants of what needs a network (extraction and trainings; the rest: test_killed.py): the same command given again
ends as an unbroken one, and nothing of others is touched.

    UNITER_KILLS=100 pytest -m slow tests/laws/test_sigkill.py

kills each three tenths so many times, for every kill costs the start of a process. Every second round begins anew in the place of an
earlier result (`--overwrite`, where the command has it): then what stands at OUT is the old result or the new one, whole, at any instant.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import identity_world as world
import numpy as np
import pytest
from safetensors.numpy import load_file

GOLDEN = Path(__file__).parent.parent / "golden" / "before_second_storey"
KILLS = int(os.environ.get("UNITER_KILLS", "4"))
FEW = max(1, round(0.3 * KILLS))  # of what needs a network


Words = tuple[object, ...]
Held = Callable[[Path], Mapping[str, Any]]


@dataclass(frozen=True)
class Killed:
    """A command that is killed.

    Attributes:
        sources: makes what the command reads, in a folder, of a version (0 or 1) that decides the contents.
        words: the command, from that folder and OUT.
        held: all that OUT holds.
        complete: the file that is written last, from OUT; None where a command (as pre-training) is complete by what it says.
        overwrite: whether it has --overwrite.
    """

    sources: Callable[[Path, int], None]
    words: Callable[[Path, Path], Words]
    held: Held
    complete: str | None = "header.json"
    overwrite: bool = True


# ------------------------------------------------------------------------------------------------------------- what a folder holds


def regions(out: Path) -> Mapping[str, Any]:
    header = json.loads((out / "header.json").read_text())
    counted = {name: header[name] for name in ("images", "failures")}
    return {**world.records(out), "failures": world.failures(out), "header": counted}


def tensors(file: Path) -> dict[str, bytes]:
    return {name: np.asarray(array).tobytes() for name, array in load_file(file).items()}


def detector(out: Path) -> Mapping[str, Any]:
    return {**tensors(out / "model.safetensors"), "log": losses(out)}


def trained_run(out: Path) -> Mapping[str, Any]:
    latest = out / "checkpoints" / "latest"
    return {**tensors(latest / "model.safetensors"), "log": losses(out), "step": latest.resolve().name}


def losses(run: Path) -> list[tuple[Any, ...]]:
    """Of each update in the log its number and its loss, the last word on each."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return sorted({(line["step"], line["loss"]) for line in lines if line["kind"] == "train"})


# ----------------------------------------------------------------------------------------------------------------- the commands


def photographs(folder: Path, version: int) -> None:
    world.photographs(folder / "photos", [f"{place:03d}" for place in range(24)], first=100 * version)


def pictures(folder: Path, version: int) -> None:
    words = ("--images", 6, "--held-out", 0, "--shapes", "circle,square", "--colours", "red,blue", "--seed", version)
    world.done("scenes", folder / "world", *words)


def learnt_from(folder: Path, version: int) -> None:
    """The texts, the regions and the run that were kept."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("regions.lmdb", "texts.db", "run"):
        shutil.copytree(GOLDEN / name, folder / name, symlinks=True)


NARROW = ("model.hidden_size=16", "model.num_hidden_layers=1", "model.num_attention_heads=2", "model.intermediate_size=32")
RUN = ("--steps", 24, "--seed", 7, "--device", "cpu", "--set", "checkpoint_every=4", "--set", "validate_every=12", "--set", "workers=0")
RUN = (*RUN, "--set", "batch_tokens=120", "--set", "tensorboard=false")
DETECTOR = (
    "MODEL.RESNETS.WIDTH_PER_GROUP=2", "MODEL.RESNETS.RES2_OUT_CHANNELS=8", "MODEL.RESNETS.STEM_OUT_CHANNELS=4",
    "MODEL.FPN.OUT_CHANNELS=8", "MODEL.ROI_BOX_HEAD.NUM_FC=1", "MODEL.ROI_BOX_HEAD.FC_DIM=16", "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION=3",
    "checkpoint_every=3",
)  # fmt: skip


def sets(assignments: tuple[str, ...]) -> Words:
    return tuple(word for assignment in assignments for word in ("--set", assignment))


def learns(given: Path, out: Path, task: Words, *more: object) -> Words:
    return ("train", *task, "--text", given / "texts.db", "--images", given / "regions.lmdb", "--out", out, *RUN, *more)


COMMANDS: dict[str, Killed] = {
    "extract": Killed(
        photographs,
        lambda given, out: ("extract", given / "photos", out, "--detector", GOLDEN / "detector", *world.DETECT, "--batch-size", 2),
        regions,
    ),
    "detector": Killed(
        pictures,
        lambda given, out: (
            "train", "detector", "--images", given / "world/images", "--annotations", given / "world/instances_train.json", "--out", out,
            "--model", "tiny", "--steps", 15, "--batch-size", 2, "--no-attributes", "--held-out", 0.3, "--workers", 0, *world.CPU,
            *sets(DETECTOR),
        ),
        detector,
        complete="detector.json",
    ),
    "pretrain": Killed(
        learnt_from, lambda given, out: learns(given, out, ("pretrain",), *sets(NARROW)), trained_run, complete=None, overwrite=False,
    ),
    "finetune": Killed(
        learnt_from,
        lambda given, out: learns(given, out, ("finetune", "retrieval"), "--from", given / "run"),
        trained_run,
        complete=None,
        overwrite=False,
    ),
}  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------- the killing


def begun(words: Words) -> subprocess.Popen[str]:
    module = f"uniter.cli.{str(words[0]).replace('-', '_')}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, words[1:])],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment,
    )  # fmt: skip


def wait_for_work(process: subprocess.Popen[str], folder: Path, known: set[Path]) -> None:
    """Until the command has written something, or has ended; imports take their time on a busy machine."""
    while process.poll() is None and set(folder.iterdir()) <= known and not any((folder / "out").glob("*")):
        time.sleep(0.002)


def digest(folder: Path) -> dict[str, str]:
    """What is to stay as it is: sources, and somebody else's files."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "lock.mdb":  # LMDB's readers are entered there
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


class Killing:
    """One command, killed again and again.

    Args:
        folder: where all of it lies: sources of both versions, and OUT.
    """

    def __init__(self, row: Killed, folder: Path, *, seed: int) -> None:
        self.row, self.rng = row, random.Random(seed)
        self.given = folder / "given"
        row.sources(self.given, 0)
        self.place = folder / "there"
        self.place.mkdir()
        (self.place / "somebody.txt").write_text("somebody's work\n")
        (self.place / "out.notes").mkdir()
        (self.place / "out.notes" / "notes.txt").write_text("beside OUT, and of a name like it\n")
        self.out = self.place / "out"
        self.beside = set(self.place.iterdir())
        self.others = {**digest(self.given), **digest(self.place)}
        self.words = row.words(self.given, self.out)
        began = time.monotonic()
        process = begun(self.words)
        wait_for_work(process, self.place, self.beside)
        self.start = time.monotonic() - began
        _, said = process.communicate(timeout=600)
        assert process.returncode == 0 and "Traceback" not in said, said
        self.work = time.monotonic() - began - self.start
        self.whole = row.held(self.out)
        self.old: Mapping[str, Any] | None = None
        self.kept = folder / "old"
        if row.overwrite:
            row.sources(folder / "given-1", 1)
            world.run(*row.words(folder / "given-1", self.kept))
            self.old = row.held(self.kept)
            assert self.old != self.whole

    def times(self, kills: int) -> None:
        """Kill it so many times, and let it end now and then."""
        done, rounds = 0, 0
        while done < kills:
            shutil.rmtree(self.out)
            over = self.old is not None and rounds % 2 == 1
            if over:
                shutil.copytree(self.kept, self.out, symlinks=True)
            most = min(kills - done, self.rng.randint(1, 3))
            for _ in range(most):
                done += self.once(over)
            self.to_the_end(over)
            rounds += 1
            assert rounds < 20 * kills, "it ends before it is killed"

    def command(self, over: bool) -> Words:
        return (*self.words, "--overwrite") if over else self.words

    def once(self, over: bool) -> bool:
        """Whether the kill hit it."""
        process = begun(self.command(over))
        if over:
            time.sleep(self.start * self.rng.uniform(0.8, 1.0))
        else:
            wait_for_work(process, self.place, self.beside)
        time.sleep(self.rng.uniform(0, self.work))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        _, said = process.communicate(timeout=600)
        assert "Traceback" not in said, said
        assert {**digest(self.given), **self.of_others()} == self.others, "a file of somebody else's was touched"
        self.is_never_half(over)
        return process.returncode == -signal.SIGKILL

    def of_others(self) -> dict[str, str]:
        ours = ("out/", "out.overwriting/", "out.replaced/", ".out")
        return {name: value for name, value in digest(self.place).items() if not name.startswith(ours)}

    def is_never_half(self, over: bool) -> None:
        """What says that it is complete is so."""
        if self.row.complete is None:
            return
        if (self.out / self.row.complete).is_file():
            assert self.row.held(self.out) in (self.whole, self.old)
        elif over:  # the instant between two renames
            assert not self.out.exists() and self.row.held(self.out.with_name("out.replaced")) == self.old

    def to_the_end(self, over: bool) -> None:
        process = begun(self.command(over))
        _, said = process.communicate(timeout=600)
        assert process.returncode == 0 and "Traceback" not in said, said
        assert self.row.held(self.out) == self.whole, "it differs from an unbroken command's"
        assert set(self.place.iterdir()) == {*self.beside, self.out}, "what was begun is left behind"
        assert {**digest(self.given), **self.of_others()} == self.others


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_many_kills(name: str, tmp_path: Path) -> None:
    pytest.importorskip("detectron2", reason="Detectron2 is brought by `uniter-extract --install-detectron2`")
    Killing(COMMANDS[name], tmp_path, seed=KILLS).times(FEW)
