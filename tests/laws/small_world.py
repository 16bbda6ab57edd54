"""A made-up world with everything that follows from it, made by the commands alone and each part only when it is asked for.

Two detectors see it: `one`, which the models learn from, and others of the same feature width. Not collected; the tests of figures and of
training load it by path.
"""

import functools
import hashlib
import json
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from click import Command
from click.testing import CliRunner, Result
from safetensors.numpy import load_file, save_file

from uniter.cli.build_db import main as build_db
from uniter.cli.db import main as db
from uniter.cli.extract import main as extract
from uniter.cli.scenes import main as scenes
from uniter.cli.train import main as train

KEPT_DETECTOR = Path(__file__).parent.parent / "golden" / "before_second_storey" / "detector"
PICTURES, HELD_OUT = 24, 8
HEADS_OF_16 = ["model.hidden_size=64", "model.num_hidden_layers=1", "model.num_attention_heads=4", "model.intermediate_size=64"]
QUICK = ["batch_tokens=300", "tensorboard=false", "workers=0"]


def run(command: Command, *words: object) -> Result:
    """What a command says and how it ends, in this process and with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return CliRunner().invoke(command, [str(word) for word in words])
    finally:
        torch.set_num_threads(threads)


def succeed(command: Command, *words: object) -> Result:
    """A step on the way to what is tested: that it fails is no expected failure."""
    result = run(command, *words)
    if result.exit_code != 0:
        raise RuntimeError(f"uniter ... {' '.join(map(str, words))}: {result.output}") from result.exception
    return result


def refused(result: Result) -> str:
    """The sentence of a command that refuses as commands do: exit code 1 or 2, words on stderr and no traceback."""
    assert result.exit_code != 0, f"it went through: {result.output}"
    assert isinstance(result.exception, SystemExit), f"a crash is not a refusal: {result.exception!r}"
    assert result.exit_code in (1, 2) and "Traceback" not in result.stderr, result.output
    return result.stderr


def sets(assignments: list[str]) -> list[str]:
    return [word for assignment in assignments for word in ("--set", assignment)]


class SmallWorld:
    """Paths below `folder`; asking for one makes it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _made(self, name: str, make: Callable[[Path], object]) -> Path:
        path = self.folder / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            make(path)
        return path

    @cached_property
    def world(self) -> Path:
        """24 pictures, the last 8 of them held out, and the files of every task over them."""
        words = ["--images", PICTURES, "--held-out", HELD_OUT, "--seed", 1, "--captions", 2, "--tasks"]
        return self._made("world", lambda path: succeed(scenes, path, *words))

    @property
    def tasks(self) -> Path:
        return self.world / "tasks"

    def detector(self, name: str) -> Path:
        """`one`; `two`, with other weights; `five`, which also knows five classes only."""
        return self._made(f"detectors/{name}", lambda path: _write_detector(path, name))

    def regions(self, detector: str = "one", images: str = "images") -> Path:
        """The regions of `world/images` or of `world/tasks/nlvr2/images`, as a detector sees them."""
        selection = ["--min-boxes", 4, "--max-boxes", 8, "--conf-threshold", 0.05, "--batch-size", 8, "--device", "cpu"]
        source, name = self.world / images, images.replace("/", "-")
        return self._made(
            f"regions/{detector}-{name}.lmdb",
            lambda path: succeed(extract, source, path, "--detector", self.detector(detector), *selection),
        )

    def images_of(self, task: str) -> Path:
        """The regions of a task's pictures."""
        return self.regions(images="tasks/nlvr2/images" if task.startswith("nlvr2") else "images")

    @cached_property
    def half(self) -> Path:
        """The regions of every second picture."""
        keys = sorted(path.stem for path in (self.world / "images").iterdir())[::2]
        listed = self._made("every-second.txt", lambda path: path.write_text("\n".join(keys) + "\n"))
        return self._made("half", lambda path: succeed(db, "split", self.regions(), path, "--by", listed)) / "listed"

    @cached_property
    def captions(self) -> Path:
        """All captions of the training part, with a vocabulary of their own."""
        return self.texts("captions", self.world / "captions_train.json", "--tokenizer", "train:200")

    def texts(self, name: str, source: Path, *words: object) -> Path:
        """A text database of a source, in the captions' vocabulary unless another one is given."""
        more = words if "--tokenizer" in words else ("--tokenizer", self.captions, *words)
        return self._made(f"texts/{name}.db", lambda path: succeed(build_db, source, path, *more))

    def task(self, task: str, part: str) -> Path:
        """The `train` or `val` part of a task; `unlabelled`, the pictures of `val` without labels; `test`, the same of VQA without a
        list of answers either, as the documentation says that a test part is built."""
        labels = "train" if part == "train" else "val"
        if task == "vqa":
            answers = [] if part == "test" else [self._answers]
            joined = [*answers, *([self.vqa_file("annotations", labels)] if part == labels else [])]
            words = [word for file in joined for word in ("--join", file)]
            return self.texts(f"vqa-{part}", self.vqa_file("questions", labels), "--task", "vqa", "--key", "scene_{id:06d}", *words)
        source = self.lines(task, labels)
        if part != labels:
            source = self._made(f"unlabelled/{task}.jsonl", functools.partial(unlabelled, source))
        return self.texts(f"{task}-{part}", source, "--task", task)

    def lines(self, task: str, part: str) -> Path:
        """SNLI-VE's or NLVR2's file of a part, one object a line."""
        name = {"ve": "snli_ve_{}.jsonl", "nlvr2": "{}.json"}[task].format("train" if part == "train" else "dev")
        return self.tasks / {"ve": "snli_ve", "nlvr2": "nlvr2"}[task] / name

    @cached_property
    def _answers(self) -> Path:
        """The answers of the training part, however seldom."""
        annotated = json.loads(self.vqa_file("annotations", "train").read_text())["annotations"]
        answers = sorted({entry["multiple_choice_answer"] for entry in annotated})
        return self._made("answers.json", lambda path: path.write_text(json.dumps(answers)))

    def vqa_file(self, kind: str, part: str) -> Path:
        """`questions` or `annotations` of a part."""
        name = f"v2_OpenEnded_mscoco_{part}2014_questions" if kind == "questions" else f"v2_mscoco_{part}2014_annotations"
        return self.tasks / "vqa" / f"{name}.json"

    @cached_property
    def pretrained(self) -> Path:
        """Four updates of pre-training; 64 columns in heads of 16."""
        words = ["--text", self.captions, "--images", self.regions(), "--steps", 4, "--device", "cpu", *sets(QUICK + HEADS_OF_16)]
        return self._made("runs/pretrained", lambda path: succeed(train, "pretrain", "--out", path, *words))

    def finetuned(self, task: str) -> Path:
        """Two updates of fine-tuning the pre-trained run on a task."""
        command = self.finetuning(task, self.task(task.partition("-")[0], "train"))
        return self._made(f"runs/{task}", lambda path: succeed(train, *command, "--out", path))

    def finetuning(self, task: str, texts: Path, *, steps: int = 2) -> list[object]:
        """The command that fine-tunes the pre-trained run, without its --out."""
        words = ["finetune", task, "--from", self.pretrained, "--text", texts, "--images", self.images_of(task)]
        return [*words, "--steps", steps, "--device", "cpu", *sets(QUICK)]


def unlabelled(source: Path, path: Path, *, every: int = 1) -> None:
    """Write a task's lines without the label, or with `every` 2 every second one without."""
    lines = [json.loads(line) for line in source.read_text().splitlines()]
    for line in lines[::every]:
        for name in ("label", "gold_label", "annotator_labels"):
            line.pop(name, None)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _write_detector(path: Path, name: str) -> None:
    shutil.copytree(KEPT_DETECTOR, path)
    if name == "one":
        return
    weights = load_file(path / "model.safetensors")
    described: dict[str, Any] = json.loads((path / "detector.json").read_text())
    rng = np.random.default_rng(0)
    hidden = weights["roi_heads.box_head.fc1.weight"]
    weights["roi_heads.box_head.fc1.weight"] = (hidden + 0.1 * rng.standard_normal(hidden.shape)).astype(np.float32)
    if name == "five":
        for layer, rows in (("cls_score", [0, 1, 2, 3, 4, 8]), ("bbox_pred", list(range(5 * 4)))):
            for kind in ("weight", "bias"):
                key = f"roi_heads.box_predictor.{layer}.{kind}"
                weights[key] = np.ascontiguousarray(weights[key][rows])
        described["class_names"] = described["class_names"][:5]
        config = path / "config.yaml"
        config.write_text(config.read_text().replace("NUM_CLASSES: 8\n", "NUM_CLASSES: 5\n"))
    save_file(weights, path / "model.safetensors")
    described["sha256"] = hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()
    (path / "detector.json").write_text(json.dumps(described))


@functools.cache
def small_world(base: Path) -> SmallWorld:
    """One for all tests of a process; `base` is pytest's folder of this session."""
    return SmallWorld(base / "small-world")
