"""A process that dies between the commit into OUT/data.mdb and the deletion of the unit that was moved there.

The unit's records are then in two places. The next run has to know that they were moved: it must neither move them again, which would
be refused as keys that come twice, nor lose them. Nothing of ours is replaced here, only what the standard library does to files.
"""

import hashlib
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import lmdb
import pytest

from uniter.datasets.image_db.writing.units import UnitStore
from uniter.datasets.storage.lmdb_files import open_reader

UNITS, IMAGES = 4, 6


def value_of(key: str) -> bytes:
    dice = random.Random(key)
    return dice.randbytes(dice.randrange(1, 9_000))


def keys_of(unit: int) -> list[str]:
    return [f"unit{unit}/image{index}" for index in range(IMAGES)]


def build(out: Path) -> bool:
    """Write what is missing, unit by unit."""
    store = UnitStore(out, settings={"detector": "made up"})
    for number in range(UNITS):
        writer = store.unit(number)
        if writer is None:
            continue
        with writer:
            for key in keys_of(number):
                if key not in writer.done:
                    writer.put(key, value_of(key), regions=len(key))
            if f"unit{number}/broken" not in writer.done:
                writer.fail(f"unit{number}/broken", "broken.jpg", "cannot be decoded")
            writer.complete()
    return store.finish(units=UNITS, header={"feature_width": 3})


def contents(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir()) if path.is_file()}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unbroken") / "out"
    assert build(out)
    return out


def is_of_a_unit(path: Path, number: int) -> bool:
    return path.name == "data.mdb" and path.parent.name == f"{number:05d}"


def stored_keys(out: Path) -> set[str]:
    """What the file holds, by LMDB alone."""
    with lmdb.open(str(out), readonly=True, lock=False) as environment, environment.begin() as transaction:
        return {bytes(key).decode() for key, _ in transaction.cursor()}


def killed_before_deleting(out: Path, number: int) -> None:
    done = subprocess.run([sys.executable, __file__, str(out), str(number)], timeout=120)
    assert done.returncode == -signal.SIGKILL, "the unit's file was never to be deleted"
    assert (out / "units" / f"{number:05d}" / "data.mdb").exists(), "killed too late: the unit is deleted"
    assert stored_keys(out) >= set(keys_of(number)), "killed too early: the unit is not committed"


@pytest.mark.parametrize("number", range(UNITS))
def test_killed_between_the_commit_and_the_deletion_of_a_unit(unbroken: Path, tmp_path: Path, number: int) -> None:
    out = tmp_path / "out"
    killed_before_deleting(out, number)
    assert build(out)
    assert contents(out) == contents(unbroken)
    transaction = open_reader(out).begin()
    stored = {bytes(key).decode(): bytes(value) for key, value in transaction.cursor()}
    assert stored == {key: value_of(key) for unit in range(UNITS) for key in keys_of(unit)}


def test_killed_there_again_and_again(unbroken: Path, tmp_path: Path) -> None:
    """The second resume counts too, and so does the next unit's."""
    out = tmp_path / "out"
    for number in (0, 0, 1, 1, 1, 3, 3):
        killed_before_deleting(out, number)
    assert build(out)
    assert contents(out) == contents(unbroken)


def main(out: Path, number: int) -> None:
    """Build, and die by SIGKILL at the moment when the file of that unit would be deleted."""
    unlink = os.unlink

    def dying(path: Any, **more: Any) -> None:
        if is_of_a_unit(Path(path), number):
            os.kill(os.getpid(), signal.SIGKILL)
        unlink(path, **more)

    os.unlink = dying  # Path.unlink comes by here too
    build(out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
