"""A complete region database that grows, is mended unit by unit, or is overwritten by several processes at once."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from uniter.datasets.errors import SettingsDiffer, UniterError
from uniter.datasets.image_db.writing.side_files import read_failures
from uniter.datasets.image_db.writing.units import UnitStore
from uniter.datasets.storage.lmdb_files import open_reader

BEGUN, GROWN = {"images": {"count": 9}, "detector": "made up"}, {"images": {"count": 15}, "detector": "made up"}


def opened(out: Path, settings: dict[str, Any], **words: Any) -> UnitStore:
    return UnitStore(out, settings=settings, may_differ=("images",), **words)


def fill(store: UnitStore, units: range, *, fail: bool = True, pause: float = 0.0) -> bool:
    """Three images a unit, the last of which fails with the mark that mending its file can mend it."""
    for number in units:
        writer = store.unit(number)
        if writer is not None:
            with writer:
                for image in range(3):
                    key = f"{number}-{image}"
                    if key not in writer.done:
                        if image == 2 and fail:
                            writer.fail(key, f"{key}.jpg", "cut off", retry=True if number % 2 == 1 else None)
                        else:
                            writer.put(key, key.encode() * 100, regions=number + 1)
                    time.sleep(pause)
                    writer.commit()
                writer.complete()
    return store.finish(units=units.stop, header={"feature_width": 3})


def held(out: Path) -> tuple[dict[str, bytes], list[dict[str, Any]], dict[str, Any]]:
    with open_reader(out).begin() as transaction:
        records = {bytes(key).decode(): bytes(value) for key, value in transaction.cursor()}
    return records, read_failures(out / "failures.jsonl"), json.loads((out / "header.json").read_text())


def grow(out: Path, *, pause: float = 0.0) -> None:
    """A command that finds three units in its folder and has two more to do."""
    store = opened(out, GROWN)
    store.extend(GROWN)
    assert store.settings["images"] == {"count": 15}
    fill(store, range(5), pause=pause)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    assert fill(opened(tmp_path / "out", BEGUN), range(3))
    return tmp_path / "out"


def test_what_was_there_stays_and_what_is_new_comes_to_it(out: Path, tmp_path: Path) -> None:
    before, rows, _ = held(out)
    assert [row.get("retry") for row in rows] == [None, True, None]
    store = opened(out, GROWN)
    assert store.is_complete() and store.settings["images"] == {"count": 9}
    assert sorted(store.keys()) == [(unit, f"{unit}-{image}", image < 2) for unit in range(3) for image in range(3)]
    grow(out)
    after, failed, header = held(out)
    assert {key: after[key] for key in before} == before and set(after) - set(before) == {"3-0", "3-1", "4-0", "4-1"}
    assert failed[:3] == rows and header["images"] == 10 and header["failures"] == 5 and header["units"] == 5
    whole = {path.name: path.read_bytes() for path in out.iterdir()}
    grow(out)
    assert whole == {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(SettingsDiffer, match="detector was"):
        opened(out, {**GROWN, "detector": "another"})
    fill(opened(tmp_path / "at once", GROWN), range(5))
    assert held(tmp_path / "at once")[:2] == (after, failed)


def test_an_unfinished_database_is_not_extended(tmp_path: Path) -> None:
    store = opened(tmp_path / "out", BEGUN)
    with store.unit(0) as writer:
        assert writer is not None
        writer.put("a", b"1", regions=1)
        writer.commit()
    with pytest.raises(UniterError, match="is unfinished; finish it with the images that it was begun for"):
        opened(tmp_path / "out", GROWN).extend(GROWN)
    assert opened(tmp_path / "out", GROWN).settings["images"] == {"count": 9}


@pytest.mark.parametrize("processes", [1, 3])
def test_killed_while_it_grows_equals_unbroken(out: Path, tmp_path: Path, processes: int) -> None:
    unbroken = shutil.copytree(out, tmp_path / "unbroken")
    begun = shutil.copytree(out, tmp_path / "begun")
    grow(unbroken)
    dice = random.Random(processes)
    context = multiprocessing.get_context("fork")
    for _ in range(2):
        shutil.rmtree(out)
        shutil.copytree(begun, out)
        for _ in range(3):
            group = [context.Process(target=grow, args=(out,), kwargs={"pause": 0.01}) for _ in range(processes)]
            for process in group:
                process.start()
            time.sleep(dice.uniform(0.01, 0.2))
            for process in group:
                if process.pid is not None and process.is_alive():
                    os.kill(process.pid, signal.SIGKILL)
                process.join()
        grow(out)
        assert held(out) == held(unbroken)
        assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in unbroken.iterdir())


@pytest.mark.parametrize("unfinished", [False, True])
def test_one_unit_is_mended_alone(tmp_path: Path, unfinished: bool) -> None:
    """Those rows only that say so; the others stay failures, and no record is written again."""
    out = tmp_path / "out"
    assert fill(opened(out, BEGUN), range(3)) is True
    if unfinished:
        opened(out, GROWN).extend(GROWN)
    store = opened(out, GROWN)
    assert store.forget_failures(lambda row: bool(row.get("retry"))) == {1}
    assert [row["key"] for row in store.failures()] == ["0-2", "2-2"]
    if unfinished:
        fill(opened(out, GROWN), range(5), fail=False)
        assert [row["key"] for row in held(out)[1]] == ["0-2", "2-2"] and "1-2" in held(out)[0]
        return
    fill(opened(out, BEGUN), range(3), fail=False)
    records, failed, header = held(out)
    assert [row["key"] for row in failed] == ["0-2", "2-2"] and "1-2" in records and header["images"] == 7
    assert opened(out, BEGUN).forget_failures(lambda row: bool(row.get("retry"))) == set()


def _overwrite(out: Path, seconds: float) -> None:
    store = UnitStore(out, settings={"new": True}, overwrite=True)
    fill(store, range(4), fail=False, pause=seconds)


@pytest.mark.parametrize("killed", [False, True])
def test_overwriting_by_several_processes_ends_in_one_database(out: Path, tmp_path: Path, killed: bool) -> None:
    """They share the units; the old database stands until the new one is whole, and nothing lies beside it then."""
    context = multiprocessing.get_context("fork")
    group = [context.Process(target=_overwrite, args=(out, 0.01)) for _ in range(3)]
    for process in group:
        process.start()
    if killed:
        time.sleep(0.1)
        assert group[0].pid is not None
        os.kill(group[0].pid, signal.SIGKILL)
    for process in group:
        process.join(60)
    assert [process.exitcode for process in group[killed:]] == [0] * (3 - killed)
    if killed and (tmp_path / "out.overwriting").exists():  # its unit is still to be done
        assert held(out)[2]["units"] == 3
        _overwrite(out, 0)
    elif killed and (tmp_path / "out.replaced").exists():  # it was the last, and was killed while it took the old one away
        assert held(out)[2]["units"] == 4
        _overwrite(out, 0)
    assert held(out)[2]["units"] == 4 and len(held(out)[0]) == 12
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_an_older_version_was_clearing_is_begun_anew(out: Path) -> None:
    (out / "overwriting").touch()
    store = opened(out, BEGUN)
    assert not store.is_complete() and fill(store, range(3), fail=False)
    assert held(out)[2]["failures"] == 0 and not (out / "overwriting").exists()
