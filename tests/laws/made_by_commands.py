"""Photographs, databases, detectors and runs as a stranger makes them: by commands and public names alone, whatever the code's layout.

Loaded by the files beside it as tests/conftest.py loads its modules.
"""

import json
import re
import subprocess
import sys
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import click
import cv2
import numpy as np
import pytest
from click.testing import CliRunner, Result
from numpy.typing import NDArray

from uniter.cli.build_db import main as build_db
from uniter.cli.db import main as db
from uniter.cli.extract import main as extract
from uniter.cli.train import main as train
from uniter.cli.view import main as view
from uniter.extract import Detector, extract_images

COMMANDS: dict[str, click.Command] = {"extract": extract, "build-db": build_db, "train": train, "db": db, "view": view}

# What a detector returns, as the protocol says it; so no module is named.
Prepared: Any = typing.get_type_hints(Detector.prepare)["return"]
Raw: Any = typing.get_args(typing.get_type_hints(Detector.detect)["return"])[0]

COLOURS = ("black", "blue", "green", "red", "white")


def run(command: str, *words: object) -> Result:
    """`run("db", "info", folder)` is `uniter-db info folder`, in this process."""
    return CliRunner().invoke(COMMANDS[command], [str(word) for word in words])


def done(command: str, *words: object) -> Result:
    """A command that must succeed."""
    result = run(command, *words)
    assert result.exit_code == 0, result.output
    return result


def refused(result: Result, *said: str, code: int | tuple[int, ...] = 1, besides: Sequence[str] = ()) -> None:
    """The command ended with that exit code, without a traceback, and named what is wrong; see `names`."""
    codes = (code,) if isinstance(code, int) else code
    assert not crashed(result), f"a crash is no refusal: {result.exception!r}\n{result.output}"
    assert result.exit_code in codes, f"exit code {result.exit_code}, expected one of {codes}\n{result.output}"
    names(result.output, *said, besides=besides)


def names(output: str, *said: str, besides: Sequence[str] = ()) -> None:
    """The output says each of these (any case; `a|b`: one of them), not merely within a folder's name or one of `besides`."""
    shown = re.sub(r"(?:/[^/\s'\"]+)+/", "", output)
    for words in besides:
        shown = shown.replace(words, "")
    for words in said:
        assert any(word.lower() in shown.lower() for word in words.split("|")), f"{words!r} is not said in\n{output}"


def crashed(result: Result) -> bool:
    """Whether an exception got through, or its traceback stands in the output."""
    return "Traceback" in result.output or (result.exception is not None and not isinstance(result.exception, SystemExit))


HEAD = f"""
import importlib.util, sys
description = importlib.util.spec_from_file_location("made_by_commands", {str(Path(__file__))!r})
made = importlib.util.module_from_spec(description)
sys.modules["made_by_commands"] = made
description.loader.exec_module(made)
"""


def script(text: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own; `made` is this module there."""
    command = [sys.executable, "-c", HEAD + text, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)


# --- pictures --------------------------------------------------------------------------------------------------------------------


def picture(number: int, size: tuple[int, int] = (48, 64)) -> NDArray[np.uint8]:
    """A smooth picture of that (height, width), another one for each number."""
    coarse = np.random.default_rng(number).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return np.asarray(cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_CUBIC), dtype=np.uint8)


def photographs(folder: Path, count: int = 4, *, first: int = 0) -> Path:
    """`photo0000.jpg`, `photo0001.jpg`, ... in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        assert cv2.imwrite(str(folder / f"photo{number:04d}.jpg"), picture(number))
    return folder


# --- a detector without a network ------------------------------------------------------------------------------------------------


@dataclass
class FakeDetector:
    """Six regions of a picture, from its pixels; all that a run of extraction asks of a detector.

    Attributes:
        device: where it claims to compute.
        sure: probability of each region's class.
        before: called with the prepared pictures of each call of `detect`; it may raise.
        blank: features are zeros, which cost nothing to make.
        seen: pictures of each call of `detect`.
        told: its settings, where it stands for another detector.
    """

    device: str = "cpu"
    sure: float = 0.7
    feature_width: int = 8
    before: Callable[[Sequence[Any]], None] = lambda pictures: None
    blank: bool = False
    seen: list[int] = field(default_factory=list)
    name: str = "fake"
    class_names: tuple[str, ...] = COLOURS
    attribute_names: tuple[str, ...] = ()
    min_boxes: int = 2
    max_boxes: int = 6
    told: dict[str, Any] | None = None

    def settings(self) -> dict[str, Any]:
        return self.told or {"name": self.name, "weights": {"layout": "none", "sha256": "0" * 64}, "box_kind": "proposal"}

    def prepare(self, image: NDArray[np.uint8]) -> Any:
        height, width = image.shape[:2]
        small = cv2.resize(image, (16, 12), interpolation=cv2.INTER_AREA).astype(np.float32)
        return Prepared(pixels=small, scale=(16 / width, 12 / height), size=(height, width))

    def detect(self, images: Sequence[Any], *, boxes: Sequence[NDArray[np.floating]] | None = None) -> list[Any]:
        self.seen.append(len(images))
        self.before(images)
        found = []
        for image in images:
            height, width = image.size
            rng = np.random.default_rng(int(image.pixels.sum()))
            left, top = rng.random(6) * width / 2, rng.random(6) * height / 2
            corners = np.stack([left, top, left + width / 3, top + height / 3], axis=1).astype(np.float32)
            rest = (1 - self.sure) / len(self.class_names)
            odds = np.full((6, len(self.class_names) + 1), rest, np.float32)
            odds[np.arange(6), 1 + rng.integers(0, len(self.class_names), 6)] += self.sure - rest
            odds[:, 0] += 1 - odds.sum(axis=1)
            width = self.feature_width
            features = np.zeros((6, width), np.float32) if self.blank else rng.random((6, width), dtype=np.float32)
            found.append(Raw(boxes=corners, features=features, probabilities=odds))
        return found


@dataclass
class Outcome:
    """What came of an extraction: its summary or its error, and all it said."""

    summary: Any
    error: Exception | None
    output: str

    @property
    def complete(self) -> bool:
        return self.error is None and bool(self.summary.complete)


def attempt(images: Any, out: Path, detector: Any, caplog: pytest.LogCaptureFixture | None = None, **options: Any) -> Outcome:
    """`extract_images`, in small batches; an error of the toolkit's own is handed back, for any other is a crash."""
    if caplog is not None:
        caplog.clear()
    try:
        summary, error = extract_images(images, out, detector=detector, **{"batch_size": 2, **options}), None
    except Exception as caught:
        if not type(caught).__module__.startswith("uniter."):
            raise
        summary, error = None, caught
    output = "\n".join([*([caplog.text] if caplog is not None else []), str(error or "")])
    return Outcome(summary, error, output)


def keys_of(out: Path) -> set[str]:
    """The keys of a region database."""
    from uniter.datasets.image_db import ImageDB

    return set(map(str, ImageDB(out).keys_list))


def failures_of(out: Path) -> list[dict[str, Any]]:
    """The lines of its failures.jsonl."""
    path = out / "failures.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


# --- a small real detector, for the command --------------------------------------------------------------------------------------

CONFIGURATION = """
_BASE_: {base}
MODEL:
  RESNETS: {{DEPTH: 50, STEM_OUT_CHANNELS: 8, RES2_OUT_CHANNELS: 16, WIDTH_PER_GROUP: 4}}
  FPN: {{OUT_CHANNELS: 16}}
  ROI_BOX_HEAD: {{FC_DIM: 24}}
  ROI_HEADS: {{NUM_CLASSES: 80}}
  RPN: {{PRE_NMS_TOPK_TEST: 400, POST_NMS_TOPK_TEST: 40}}
INPUT: {{MIN_SIZE_TEST: 64, MAX_SIZE_TEST: 96}}
"""


def with_detector(folder: Path) -> list[str]:
    """Options of `uniter-extract` for a Detectron2 network so narrow that it answers at once; skipped where Detectron2 is not there."""
    zoo = pytest.importorskip("detectron2.model_zoo", reason="Detectron2 is brought by `uniter-extract --install-detectron2`")
    file = folder / "narrow.yaml"
    file.write_text(CONFIGURATION.format(base=zoo.get_config_file("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")))
    return ["--detector", str(file), "--weights", "random:1", "--device", "cpu"]


def records_of(out: Path) -> dict[str, bytes]:
    """Key -> record of a region database, as its file holds it."""
    import lmdb

    with lmdb.open(str(out), readonly=True, lock=False, create=False) as environment, environment.begin() as transaction:
        return {bytes(key).decode(): bytes(value) for key, value in transaction.cursor()}


def changed(source: Path, out: Path, change: Callable[[str, dict[bytes, Any]], None]) -> Path:
    """A database as UNITER's authors publish theirs, of the records of `source`, each after `change(key, msgpack map)`."""
    import lmdb
    import msgpack

    inner = out / "feat_th0.2_max100_min10"
    inner.mkdir(parents=True)
    records = {key: msgpack.unpackb(value, raw=True) for key, value in records_of(source).items()}
    with lmdb.open(str(inner), map_size=1 << 26, lock=False) as environment, environment.begin(write=True) as transaction:
        for key, record in records.items():
            change(key, record)
            transaction.put(key.encode(), msgpack.packb(record))
    counts = {key: record[b"features"][b"shape"][0] for key, record in records.items()}
    (out / "nbb_th0.2_max100_min10.json").write_text(json.dumps(counts))
    return out


T = TypeVar("T")


def memory_of(work: Callable[[], T]) -> tuple[T, int]:
    """What the work returns, and how many bytes this process held at most while it ran, beyond those before."""
    status = Path("/proc/self/status")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # `VmHWM`, the most memory held, counts anew from here
    except OSError:
        pytest.skip("the system does not tell how much memory a piece of work takes")

    def most() -> int:
        return next(int(line.split()[1]) << 10 for line in status.read_text().splitlines() if line.startswith("VmHWM"))

    before = most()
    return work(), most() - before
