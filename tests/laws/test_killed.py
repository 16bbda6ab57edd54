"""Killed at any instant and repeated, a command ends as if it had never been killed, and nothing of others is touched.

`UNITER_KILLS` says how often each command is killed: a few times in the default run, a hundred times now and then. Half of the kills come
just before a change of the files, the other half at any time.
"""

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import identity_world as world
import pytest

from uniter.datasets.errors import BadInput
from uniter.datasets.image_db import ImageDB
from uniter.datasets.image_db.database import kind_of_child
from uniter.datasets.text_db import TextDB

KILLS = int(os.environ.get("UNITER_KILLS", "4"))
CHANGES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link"}
Words = tuple[object, ...]


def regions(folder: Path, *, seed: int = 0, count: int = 600) -> Path:
    """A region database of ours, of two units, with a failure."""
    return world.region_database(folder, [f"{place:04d}" for place in range(count)], seed=seed, regions=1, width=2, broken=["y"])


def convert(folder: Path, seed: int) -> Words:
    names = [f"{place:04d}" for place in range(600)]
    return "db", "convert", world.npz_folder(folder / f"npz-{seed}", names, seed=seed, regions=1, width=2, broken=["y"]), folder / "out"


def merge(folder: Path, seed: int) -> Words:
    first, second = regions(folder / f"in-{seed}", seed=seed), folder / f"other-{seed}"
    world.region_database(second, [f"other{place}" for place in range(40)], seed=seed, regions=1, width=2)
    return "db", "merge", first, second, folder / "out"


def split(folder: Path, seed: int) -> Words:
    return "db", "split", regions(folder / f"in-{seed}", seed=seed), folder / "out", "--by", 2


def repair(folder: Path, seed: int) -> Words:
    return "db", "check", regions(folder / f"in-{seed}", seed=seed), "--repair", folder / "out"


def published(folder: Path, seed: int) -> Words:
    return "db", "convert", regions(folder / f"in-{seed}", seed=seed, count=300), folder / "out", "--to", "uniter"


def build_db(folder: Path, seed: int) -> Words:
    captions = world.captions_file(
        folder / f"{seed}.jsonl", [f"{place}.jpg" for place in range(300)], text=f"a {world.WORDS[1 + seed]} cat"
    )
    return "build-db", captions, folder / "out", "--tokenizer", world.vocabulary_file(folder / "vocab.txt")


COMMANDS: dict[str, Callable[[Path, int], Words]] = {
    "convert": convert, "merge": merge, "split": split, "repair": repair, "convert to UNITER's": published, "build-db": build_db,
}  # fmt: skip


def held(out: Path) -> Mapping[str, Any]:
    """All that can be read there, and the failures; nothing where there is nothing complete."""
    if not out.exists():
        return {}
    folders = [out] if kind_of_child(out) else [path for path in sorted(out.iterdir()) if kind_of_child(path)]
    found: dict[str, Any] = {}
    for folder in folders:
        # Between two renames the old folder stands, whole, under another name; the same command again puts that right.
        name = folder.name.removesuffix(".uniter-old.tmp")
        if (folder / "txt2img.json").exists():
            found[name] = {str(one): tuple(TextDB(folder)[one]["input_ids"]) for one in TextDB(folder).ids}
        elif (folder / "header.json").exists() or not (folder / "settings.json").exists():
            database = ImageDB(folder)
            found[name] = {str(key): database[key].features.tobytes() for key in database}, world.failures(folder)
    return found


def said_to_be_no_whole(out: Path) -> bool:
    """Whether readers, `info` and `check` say of the parts of a splitting that they do not fit together at this moment."""
    told = [world.run("db", what, out, "--json") for what in ("info", "check")]
    if "which do not fit together" not in told[0].output:
        return False
    assert all(one.exit_code == 1 and "do not fit together" in one.output for one in told)
    with pytest.raises(BadInput, match="do not fit together"):
        ImageDB(out)
    return True


def in_child(words: Words, watched: Path, *, instant: int = 0, seconds: float = 0.0) -> tuple[int, int]:
    """Run a command in a forked process that is killed before change number `instant`, or after so many seconds.

    Returns:
        What `waitpid` says, and how many changes there were (-1 where it was killed).
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        seen = 0

        def watch(event: str, values: tuple[Any, ...]) -> None:
            nonlocal seen
            if event in CHANGES and values and isinstance(values[0], str | bytes | os.PathLike):
                if event == "open" and not (values[2] or 0) & (os.O_WRONLY | os.O_RDWR):
                    return
                if os.fsdecode(values[0]).startswith(str(watched)):
                    seen += 1
                    if seen == instant:
                        os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        code = world.run(*words).exit_code
        os.write(writing, str(seen).encode())
        os._exit(code)
    os.close(writing)
    if seconds:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    told = os.read(reading, 20)
    os.close(reading)
    return status, int(told or -1)


def beside(out: Path) -> set[str]:
    return {path.name for path in out.parent.iterdir()}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_and_repeated_equals_unbroken(command: str, overwrite: bool, tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    out = there / "out"
    old: Mapping[str, Any] = {}
    words = COMMANDS[command](there, 0)
    if overwrite:
        world.done(*words)
        (out / "notes.txt").write_text("somebody's")
        old = held(out)
        words = (*COMMANDS[command](there, 1), "--overwrite")
        shutil.copytree(out, tmp_path / "old")
    names = beside(out) | {"out"}
    start = time.monotonic()
    status, changes = in_child(words, out)
    seconds = time.monotonic() - start
    assert status == 0
    new = held(out)
    assert new and new != old
    dice = random.Random(command)
    for number in range(KILLS):
        shutil.rmtree(out)
        if overwrite:
            shutil.copytree(tmp_path / "old", out)
        for _ in range(dice.choice([1, 1, 2])):
            how = {"instant": dice.randint(1, changes)} if number % 2 == 0 else {"seconds": dice.uniform(0.001, seconds)}
            in_child(words, out, **how)  # type: ignore[arg-type]
            if overwrite and out.exists() and not said_to_be_no_whole(out):
                assert held(out) in (old, new), how
        repeated = world.run(*words)
        assert repeated.exit_code == 0 and "Traceback" not in repeated.output, (how, repeated.output)
        assert held(out) == new, how
        assert not overwrite or (out / "notes.txt").read_text() == "somebody's", how
        assert beside(out) == names, how
