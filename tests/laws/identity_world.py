"""What the tests of identity and of loss are made with: small sources as other people write them, commands, and a small real detector.

Only the commands, the files they write and the names of the contract are used, so that these tests outlive any layout of the code. Loaded
by the test files beside it (`world`, one module for all of them in a process).
"""

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import click
import numpy as np
from click.testing import CliRunner, Result
from PIL import Image

from uniter.cli.build_db import main as build_db
from uniter.cli.db import main as db
from uniter.cli.extract import main as extract
from uniter.cli.scenes import main as scenes
from uniter.cli.train import main as train
from uniter.cli.view import main as view
from uniter.datasets.image_db import ImageDB
from uniter.datasets.text_db import TextDB

COMMANDS: dict[str, click.Command] = {"build-db": build_db, "db": db, "extract": extract, "scenes": scenes, "train": train, "view": view}
CPU = ("--device", "cpu")
SIZES = ("hidden_size=16", "num_hidden_layers=1", "num_attention_heads=2", "intermediate_size=16")
TINY = (*(word for size in SIZES for word in ("--set", f"model.{size}")), "--set", "tensorboard=false", "--set", "batch_tokens=100", *CPU)
WORDS = ("a", "red", "blue", "green", "cat", "dog", "on", "the", "grass")
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


# ------------------------------------------------------------------------------------------------------------------ commands


def run(command: str, *words: object) -> Result:
    """`run("db", "info", folder)` is `uniter-db info folder`, in this process."""
    return CliRunner().invoke(COMMANDS[command], [str(word) for word in words])


def done(command: str, *words: object) -> Result:
    """A command that only prepares: where it fails, the test is wrong, and no mark hides it."""
    result = run(command, *words)
    if result.exit_code != 0:
        raise RuntimeError(f"{command} {' '.join(map(str, words))}: exit code {result.exit_code}\n{result.output}") from result.exception
    return result


def accepted(result: Result, *said: str) -> Result:
    """Exit code 0, and the output names each of `said` (any case; `a|b`: one of them)."""
    assert result.exit_code == 0, f"exit code {result.exit_code}, expected 0\n{result.output}"
    for words in said:
        assert says(result.output, words), f"{words!r} is not said in\n{result.output}"
    return result


def summary(command: str, *words: object) -> dict[str, Any]:
    """The same with `--json`: what it prints."""
    told: dict[str, Any] = json.loads(done(command, *words, "--json").stdout)
    return told


def refused(result: Result, *said: str, code: int = 1) -> None:
    """That exit code, no crash, and one line that begins with "error: " and names each of `said` (any case; `a|b`: one of them)."""
    assert result.exit_code == code, f"exit code {result.exit_code}, expected {code}\n{result.output}"
    assert isinstance(result.exception, SystemExit) and "Traceback" not in result.output, f"{result.exception!r}\n{result.output}"
    sentence = result.stderr.strip().splitlines()[-1]
    assert sentence.startswith("error: "), result.output
    for words in said:
        assert says(sentence, words), f"{words!r} is not said in\n{sentence}"


def says(text: str, words: str) -> bool:
    """Whether one of `a|b` is in the text, in any case. Of absolute paths the last name counts only: pytest's folders bear tests' names."""
    plain = re.sub(r"(?<![\w.])/\S*/", "", text).lower()
    return any(word.lower() in plain for word in words.split("|"))


def tree(folder: Path) -> dict[str, bytes | str]:
    """All that lies below a folder, to see that it is untouched: files' bytes, links' targets, folders as "folder"."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[name] = str(path.readlink()) if path.is_symlink() else "folder" if path.is_dir() else path.read_bytes()
    return found


def differences(before: Mapping[str, bytes | str], after: Mapping[str, bytes | str]) -> list[str]:
    """Names that went, came or changed."""
    return sorted(name for name in {*before, *after} if before.get(name) != after.get(name))


def records(path: Path) -> dict[str, tuple[bytes, ...]]:
    """All that a region database holds, by key, whatever its layout: the bytes of every array."""
    database = ImageDB(path)
    fields = ("features", "norm_bb", "conf", "soft_labels", "boxes", "size")
    found = {}
    for key in database.keys_list:
        regions = database[key]
        values = (getattr(regions, field) for field in fields)
        found[str(key)] = tuple(b"" if value is None else np.asarray(value).tobytes() for value in values)
    return found


def texts(path: Path) -> dict[str, tuple[int, ...]]:
    """The word pieces of every text of a text database, by id."""
    database = TextDB(path)
    return {str(name): tuple(database[name]["input_ids"]) for name in database.ids}


def failures(path: Path) -> list[dict[str, Any]]:
    """The rows of a database's failures.jsonl; none where there is no file."""
    file = path / "failures.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


# ------------------------------------------------------------------------------------------------------- sources, made by hand


def npz_folder(folder: Path, names: Iterable[str], *, seed: int = 0, width: int = 8, regions: int = 3, broken: Sequence[str] = ()) -> Path:
    """A folder of .npz files as UNITER's docker writes them: four arrays an image; `broken` ones are no npz."""
    folder.mkdir(parents=True, exist_ok=True)
    for place, name in enumerate(names):
        rng = np.random.default_rng((seed, place))
        corners = np.sort(rng.random((regions, 2, 2)), axis=1).reshape(regions, 4)
        sides = corners[:, 2:] - corners[:, :2]
        soft = rng.random((regions, 5)) + 0.1
        arrays = {
            "norm_bb": np.concatenate([corners, sides], axis=1),
            "features": rng.random((regions, width)),
            "conf": np.linspace(0.9, 0.5, regions)[:, None],
            "soft_labels": soft / soft.sum(axis=1, keepdims=True),
        }
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        np.savez(folder / f"{name}.npz", **{field: array.astype(np.float16) for field, array in arrays.items()})
    for name in broken:
        (folder / f"{name}.npz").write_bytes(b"no npz")
    return folder


def region_database(folder: Path, names: Iterable[str], *, seed: int = 0, again: bool = False, **shape: Any) -> Path:
    """`folder`, a region database of ours: such .npz files converted. `again` replaces the one that is there."""
    source = folder.with_name(f"{folder.name}-npz")
    shutil.rmtree(source, ignore_errors=True)
    done("db", "convert", npz_folder(source, names, seed=seed, **shape), folder, *(("--overwrite",) if again else ()))
    return folder


def caffe_tsv(file: Path, names: Iterable[str], *, seed: int = 0) -> Path:
    """Caffe's TSV of two regions an image."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for place, name in enumerate(names):
        features = np.random.default_rng((seed, place)).random((2, 4), dtype=np.float32)
        boxes = np.array([[1, 2, 30, 40], [5, 6, 70, 60]], dtype=np.float32)
        coded = [base64.b64encode(array.tobytes()).decode() for array in (boxes, features)]
        lines.append("\t".join((name, "100", "80", "2", *coded)) + "\n")
    file.write_text("".join(lines))
    return file


def captions_file(file: Path, names: Iterable[str], *, text: str = "a red cat on the grass") -> Path:
    """JSONL of one caption for each image."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"id": f"t{place}", "image": name, "caption": text}) for place, name in enumerate(names)]
    file.write_text("\n".join(lines) + "\n")
    return file


def vocabulary_file(file: Path, words: Sequence[str] = WORDS) -> Path:
    """A WordPiece vocabulary: BERT's special pieces, "!", and these words."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join((*SPECIALS, "!", *words)) + "\n")
    return file


def photograph(file: Path, shade: int, size: tuple[int, int] = (96, 128)) -> Path:
    """A picture of (height, width) that is another one for each shade."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(shade)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    small.resize((size[1], size[0]), Image.Resampling.BICUBIC).save(file, quality=90)
    return file


def photographs(folder: Path, names: Iterable[str], *, first: int = 0) -> Path:
    """`folder` with a JPEG of each name."""
    for place, name in enumerate(names, start=first):
        photograph(folder / f"{name}.jpg", place)
    return folder


def touch_all(folder: Path) -> None:
    """Give every file below a new time and no new content, as a copy does."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            os.utime(path)


# ------------------------------------------------------------------------------------------------------------- detectors, runs


@dataclass(frozen=True)
class Trained:
    """Photographs, two detectors of equal width, the regions that each found, texts, and a run that learnt from the first's.

    Attributes:
        images: the folder of photographs, six of them.
        instances: COCO's annotations of them.
        detectors: two folders made by `uniter-train detector`.
        regions: a region database of each detector.
        texts: captions with a vocabulary of their own.
        run: pre-trained for two updates on `texts` and `regions[0]`.
    """

    images: Path
    instances: Path
    detectors: tuple[Path, Path]
    regions: tuple[Path, Path]
    texts: Path
    run: Path


DETECT = (*CPU, "--min-boxes", 2, "--max-boxes", 4)


@cache
def trained(folder: Path) -> Trained:
    """Made once below pytest's own folder, in some seconds; nothing in it is to be changed."""
    out = folder / "identity-world"
    images = out / "world" / "images"
    instances = out / "world" / "instances_train.json"
    done("scenes", out / "world", "--images", 6, "--held-out", 0, "--captions", 2, "--shapes", "circle,square", "--colours", "red,blue")
    detectors, regions = [], []
    for seed, name in enumerate(("first", "second")):
        detectors.append(out / name)
        regions.append(out / f"{name}.lmdb")
        train_detector(images, instances, detectors[-1], "--seed", seed)
        done("extract", images, regions[-1], "--detector", detectors[-1], *DETECT)
    captions = out / "world" / "captions_train.json"
    done("build-db", captions, out / "texts.db", "--images", regions[0], "--tokenizer", "train:120")
    pretrain(out / "run", text=out / "texts.db", images=regions[0])
    both = (detectors[0], detectors[1]), (regions[0], regions[1])
    return Trained(images, instances, *both, out / "texts.db", out / "run")


def train_detector(images: Path, instances: Path, out: Path, *words: object) -> Result:
    """One update of the smallest detector; under a second."""
    sizes = ("--model", "tiny", "--steps", 1, "--batch-size", 1, "--no-attributes", *CPU)
    return done("train", "detector", "--images", images, "--annotations", instances, "--out", out, *sizes, *words)


def pretrain(out: Path, *words: object, text: Path, images: Path, steps: int = 2) -> Result:
    """A run of the smallest model."""
    return done("train", "pretrain", "--text", text, "--images", images, "--out", out, "--steps", steps, *TINY, *words)


# --------------------------------------------------------------------------------------------------------------- killed commands

_KILLED = """
import os, signal, sys
folder, instant, least, arguments = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
seen = 0
CHANGES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate"}

def size():
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(root, name)).st_blocks * 512
            except FileNotFoundError:
                pass
    return total

def watch(event, values):
    global seen
    if event not in CHANGES or not values or not isinstance(values[0], (str, bytes, os.PathLike)):
        return
    if event == "open" and not (values[2] or 0) & (os.O_WRONLY | os.O_RDWR):
        return
    path = os.path.abspath(os.fsdecode(values[0]))
    if path.startswith(folder) and (not least or size() >= least):
        seen += 1
        if seen == instant:
            os.kill(os.getpid(), signal.SIGKILL)

import importlib
main = importlib.import_module("uniter.cli." + arguments[0].replace("-", "_")).main
sys.addaudithook(watch)
try:
    main(arguments[1:], standalone_mode=False)
finally:
    print("changes", seen, flush=True)
"""


def changes(folder: Path, command: str, *words: object) -> int:
    """Run a command in a process of its own and count the changes of files at and below `folder` that Python makes in it."""
    finished = _watched(folder, 0, 0, command, *words)
    assert finished.returncode == 0, finished.stderr
    return int(finished.stdout.split()[-1])


def killed(folder: Path, instant: int, command: str, *words: object, least: int = 0) -> bool:
    """The same, killed by SIGKILL just before change number `instant` (from 1); whether it lived so long.

    Args:
        least: changes count from when the folder holds so many bytes.
    """
    return _watched(folder, instant, least, command, *words).returncode == -signal.SIGKILL


def _watched(folder: Path, instant: int, least: int, command: str, *words: object) -> subprocess.CompletedProcess[str]:
    call = [sys.executable, "-c", _KILLED, str(folder), str(instant), str(least), command, *map(str, words)]
    return subprocess.run(call, capture_output=True, text=True, check=False, timeout=120)
