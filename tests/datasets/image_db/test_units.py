"""Laws of the write side: killed anywhere and repeated, by one process or several, the database is the same to the byte."""

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import lmdb
import numpy as np
import pytest

from uniter.datasets.errors import BadInput, SettingsDiffer, UniterError
from uniter.datasets.image_db.writing import unit_writer, units
from uniter.datasets.image_db.writing.side_files import read_failures
from uniter.datasets.image_db.writing.units import UnitStore
from uniter.datasets.storage.files import difference_in_words, first_phrases, sync, write_json
from uniter.datasets.storage.index_file import INDEX, KeyList, key_columns, map_arrays, save_arrays
from uniter.datasets.storage.lmdb_files import open_reader, put_all
from uniter.datasets.storage.lmdb_pages import check_data_file

UNITS, IMAGES, BATCH = 4, 12, 4


def value_of(key: str) -> bytes:
    dice = random.Random(key)
    return dice.randbytes(dice.randrange(1, 60_000))


def fails(key: str) -> bool:
    return key.endswith("7")


def build(out: Path, *, units: range | list[int] = range(UNITS), pause: float = 0.0, fail: bool = True) -> bool:
    """Write the database as an extraction would: unit by unit, batch by batch, going on with what is there."""
    store = UnitStore(out, settings={"detector": "made up", "batch": BATCH})
    for number in units:
        writer = store.unit(number)
        if writer is None:
            continue
        with writer:
            for start in range(0, IMAGES, BATCH):
                keys = [f"unit{number}/image{index:02d}" for index in range(start, start + BATCH)]
                if all(key in writer.done for key in keys):
                    continue
                for key in keys:
                    if key in writer.done:
                        continue
                    if fail and fails(key):
                        writer.fail(key, f"{key}.jpg", "cannot be decoded")
                    else:
                        writer.put(key, value_of(key), regions=len(key))
                time.sleep(pause)
                writer.commit()
            writer.complete()
    return store.finish(units=UNITS, header={"feature_width": 3})


def contents(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir()) if path.is_file()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "out"
    assert build(out)
    return out


@pytest.fixture
def unbroken(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "unbroken"))


def test_a_finished_database_holds_what_was_put_and_nothing_else(unbroken: Path) -> None:
    assert sorted(path.name for path in unbroken.iterdir()) == [
        "README.md", "data.mdb", "failures.jsonl", "header.json", INDEX, "settings.json",
    ]  # fmt: skip
    transaction = open_reader(unbroken).begin()
    stored = {bytes(key).decode(): bytes(value) for key, value in transaction.cursor()}
    wanted = {f"unit{unit}/image{index:02d}" for unit in range(UNITS) for index in range(IMAGES)}
    assert stored == {key: value_of(key) for key in wanted if not fails(key)}
    columns = map_arrays(unbroken / INDEX)
    assert list(KeyList(columns)) == sorted(stored)
    assert columns["region_counts"].tolist() == [len(key) for key in sorted(stored)]
    assert [row["key"] for row in read_failures(unbroken / "failures.jsonl")] == sorted(key for key in wanted if fails(key))
    header = json.loads((unbroken / "header.json").read_text())
    assert header["images"] == len(stored)
    assert header["failures"] == UNITS
    assert header["feature_width"] == 3


def test_units_in_any_order_give_the_same_bytes(unbroken: Path, tmp_path: Path) -> None:
    out = tmp_path / "shuffled"
    assert not build(out, units=[3, 1])
    assert not (out / "header.json").exists()
    assert build(out, units=[2, 0])
    assert contents(out) == contents(unbroken)


def test_a_unit_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    store = UnitStore(tmp_path / "out", settings={})
    with store.unit(0) as writer:
        assert writer is not None
        writer.put("a", b"1", regions=1)
        writer.commit()
        writer.put("b", b"2", regions=1)  # never committed
        assert store.finished_units() == set()
        assert store.unit(0) is None, "a second writer"
    with store.unit(0) as writer:
        assert writer is not None
        assert writer.done == {"a"}
        writer.complete()
    assert store.finished_units() == {0}
    assert store.unit(0) is None
    assert not store.finish(units=2, header={})
    assert not store.is_complete()


def test_a_unit_that_another_process_holds_is_refused(tmp_path: Path) -> None:
    store = UnitStore(tmp_path / "out", settings={})
    code = f"""
        import time
        from uniter.datasets.image_db.writing.units import UnitStore
        with UnitStore({str(store.path)!r}, settings={{}}).unit(0) as writer:
            print("mine", flush=True)
            time.sleep(60)
    """
    other = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == b"mine\n"
        assert store.unit(0) is None
        assert store.unit(1) is not None
    finally:
        other.kill()
        other.wait()
    with store.unit(0) as writer:
        assert writer is not None


def run_until_done(out: Path, *, kills: int, processes: int, seed: int) -> int:
    """Start `build` in processes, kill them at random moments until so many kills are done, then let it finish."""
    dice = random.Random(seed)
    done = 0
    command = [sys.executable, __file__, str(out)]
    while done < kills:
        group = [subprocess.Popen(command) for _ in range(processes)]
        time.sleep(dice.uniform(0.15, 0.7))
        for process in group:
            if process.poll() is None:
                process.send_signal(dice.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))
                done += 1
        codes = [process.wait(timeout=120) for process in group]
        assert all(code <= 0 for code in codes), "a run failed by itself"
        if (out / "header.json").exists():
            break
    return done


def assert_survives_kills(unbroken: Path, out: Path, *, kills: int, processes: int, seed: int) -> None:
    run_until_done(out, kills=kills, processes=processes, seed=seed)
    assert build(out)
    assert contents(out) == contents(unbroken)


def test_killed_and_repeated_it_equals_an_unbroken_run(unbroken: Path, tmp_path: Path) -> None:
    assert_survives_kills(unbroken, tmp_path / "killed", kills=4, processes=1, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_thirty_kills(unbroken: Path, tmp_path: Path, processes: int) -> None:
    total = 0
    for attempt in range(60):
        out = tmp_path / f"killed{attempt}"
        total += run_until_done(out, kills=6, processes=processes, seed=attempt)
        assert build(out)
        assert contents(out) == contents(unbroken)
        if total >= 30:
            return
    pytest.fail(f"only {total} kills hit")


@pytest.mark.parametrize("moment", range(12))
def test_dying_at_each_step_of_absorbing_and_finishing(
    unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    """Not random: the process dies at the n-th rename, deletion or folder sync of the end."""
    out = tmp_path / "dying"
    store = UnitStore(out, settings={"detector": "made up", "batch": BATCH})
    build(out, units=[1, 2, 3])
    steps = 0

    class Died(BaseException):
        pass

    real = sync

    def dying(folder: Path) -> None:
        nonlocal steps
        steps += 1
        if steps == moment:
            raise Died
        real(folder)

    for module in (units, unit_writer):
        monkeypatch.setattr(module, "sync", dying)
    with pytest.raises(Died) if moment else pytest.MonkeyPatch.context():
        build(out)
        if moment > steps:
            raise Died
    monkeypatch.undo()
    assert not store.is_complete() or contents(out).keys() >= {"data.mdb", INDEX, "failures.jsonl"}
    assert build(out)
    assert contents(out) == contents(unbroken)


def test_other_settings_are_refused_in_words(unbroken: Path) -> None:
    with pytest.raises(SettingsDiffer, match=r"batch was 4, now 8; extra was absent, now true"):
        UnitStore(unbroken, settings={"detector": "made up", "batch": 8, "extra": True})
    assert UnitStore(unbroken, settings={"detector": "made up", "batch": BATCH}).is_complete()
    fresh = UnitStore(unbroken, settings={"batch": 8}, overwrite=True)
    assert not fresh.is_complete()
    assert fresh.finished_units() == set()
    assert (unbroken / "header.json").exists(), "what is overwritten stays until the new one is complete"
    assert fresh.finish(units=0, header={}) and fresh.path == unbroken
    assert json.loads((unbroken / "header.json").read_text())["images"] == 0


def test_a_file_system_without_hard_links_will_do(unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    assert build(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(unbroken)


def test_a_foreign_database_is_not_written_into(tmp_path: Path) -> None:
    lmdb.open(str(tmp_path / "foreign"), map_size=1 << 20).close()
    with pytest.raises(BadInput, match="did not make"):
        UnitStore(tmp_path / "foreign", settings={})


def test_difference_in_words() -> None:
    assert difference_in_words({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}}) == ["a.b was 1, now 3", "c was 2, now absent"]
    assert difference_in_words({"a": [1]}, {"a": [1]}) == []
    assert first_phrases(["a", "b", "c", "d"]) == "a; b; c; d" and first_phrases(["a", "b", "c", "d", "e", "f"]) == "a; b; c; d; and 2 more"


@pytest.mark.parametrize(
    ("key", "sentence"),
    [("", "has 0 bytes"), ("x" * 512, "has 512 bytes"), ("ü" * 256, "has 512 bytes"), ("\ud800", "no valid Unicode")],
)
def test_keys_that_lmdb_cannot_hold(tmp_path: Path, key: str, sentence: str) -> None:
    with UnitStore(tmp_path / "out", settings={}).unit(0) as writer:
        assert writer is not None
        with pytest.raises(BadInput, match=sentence):
            writer.put(key, b"", regions=0)
        writer.fail(key, "some file", "its key is impossible")
        writer.put("a b/ü", b"1", regions=1)
        with pytest.raises(BadInput, match="already written"):
            writer.put("a b/ü", b"2", regions=1)
        writer.complete()
    assert [row["error"] for row in UnitStore(tmp_path / "out", settings={}).failures()] == ["its key is impossible"]


def test_the_map_grows(tmp_path: Path) -> None:
    store = UnitStore(tmp_path / "out", settings={})
    value = os.urandom(3 << 20)
    with store.unit(0) as writer:
        assert writer is not None
        for index in range(14):  # 42 MiB in one transaction; the map begins with 16
            writer.put(f"{index}", value, regions=1)
        writer.complete()
    assert store.finish(units=1, header={})
    assert open_reader(store.path).stat()["entries"] == 14
    assert (store.path / "data.mdb").stat().st_size < 46 << 20, "the file must have its real size"


def test_a_full_disk_is_said_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = UnitStore(tmp_path / "out", settings={})
    with store.unit(0) as writer:
        assert writer is not None
        writer.put("a", b"1", regions=1)
        writer.commit()
        writer.put("b", b"2", regions=1)
        real = writer._unit

        class FullDisk:
            environment = type(
                "E", (), {"begin": staticmethod(lambda **_: (_ for _ in ()).throw(lmdb.DiskError("No space left on device")))}
            )
            records = summaries = failures = None

        writer._unit = FullDisk()  # type: ignore[assignment]
        with pytest.raises(UniterError, match=r"the disk is full.*make room and run the same command again"):
            writer.commit()
        writer._unit = real
    with store.unit(0) as writer:
        assert writer is not None
        assert writer.done == {"a"}

    def no_room(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(unit_writer, "save_unit_index", no_room)
    with store.unit(0) as writer:
        assert writer is not None
        with pytest.raises(UniterError, match="the disk is full"):
            writer.complete()
    monkeypatch.undo()
    with store.unit(0) as writer:
        assert writer is not None
        writer.complete()
    assert store.finish(units=1, header={})


@pytest.mark.skipif(os.geteuid() != 0 or not Path("/proc/mounts").exists(), reason="mounting a small disk needs root")
def test_a_really_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        store = UnitStore(disk / "out", settings={})
        with store.unit(0) as writer:
            assert writer is not None
            writer.put("small", b"1" * 1000, regions=1)
            writer.commit()
            writer.put("large", os.urandom(12 << 20), regions=1)
            with pytest.raises(UniterError, match="the disk is full"):
                writer.commit()
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        with store.unit(0) as writer:
            assert writer is not None
            assert writer.done == {"small"}
            writer.put("large", b"2", regions=1)
            writer.complete()
        assert store.finish(units=1, header={})
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


def test_failed_images_can_be_tried_again(unbroken: Path) -> None:
    store = UnitStore(unbroken, settings={"detector": "made up", "batch": BATCH})
    before = store.failures()
    assert len(before) == UNITS
    assert store.forget_failures() == set(range(UNITS))
    assert not store.is_complete()
    assert store.failures() == []
    assert build(unbroken, fail=False)
    assert store.failures() == []
    transaction = open_reader(unbroken).begin()
    assert transaction.stat()["entries"] == UNITS * IMAGES
    for unit in range(UNITS):
        assert bytes(transaction.get(f"unit{unit}/image07".encode())) == value_of(f"unit{unit}/image07")
        assert bytes(transaction.get(f"unit{unit}/image06".encode())) == value_of(f"unit{unit}/image06")
    columns = map_arrays(unbroken / INDEX)
    assert len(KeyList(columns)) == UNITS * IMAGES


def test_forgetting_failures_of_an_unfinished_database(tmp_path: Path) -> None:
    out = tmp_path / "out"
    build(out, units=[0, 2])
    store = UnitStore(out, settings={"detector": "made up", "batch": BATCH})
    assert len(store.failures()) == 2
    assert store.forget_failures() == {0, 2}
    assert store.failures() == []
    with store.unit(2) as writer:
        assert writer is not None
        assert len(writer.done) == IMAGES - 1
    assert build(out, fail=False)
    assert open_reader(out).stat()["entries"] == UNITS * IMAGES


@pytest.mark.parametrize("column", [None, "units", "checksums"])
def test_failures_that_do_not_fit_the_index_are_not_forgotten(unbroken: Path, column: str | None) -> None:
    if column is None:
        rows = (unbroken / "failures.jsonl").read_bytes().splitlines(keepends=True)
        (unbroken / "failures.jsonl").write_bytes(b"".join(rows[1:]))
    else:
        columns = dict(map_arrays(unbroken / INDEX))
        save_arrays(unbroken / INDEX, {name: array for name, array in columns.items() if name != column})
    before = contents(unbroken)
    store = UnitStore(unbroken, settings={"detector": "made up", "batch": BATCH})
    with pytest.raises(BadInput, match="was it edited" if column is None else f"has no column {column}"):
        store.forget_failures()
    assert contents(unbroken) == before


def test_nothing_to_forget_leaves_a_complete_database_alone(tmp_path: Path) -> None:
    build(tmp_path / "out", fail=False)
    before = contents(tmp_path / "out")
    assert UnitStore(tmp_path / "out", settings={"detector": "made up", "batch": BATCH}).forget_failures() == set()
    assert contents(tmp_path / "out") == before


def test_an_image_in_two_units_is_refused(tmp_path: Path) -> None:
    store = UnitStore(tmp_path / "out", settings={})
    for number in range(2):
        with store.unit(number) as writer:
            assert writer is not None
            writer.put("same", bytes([number]), regions=1)
            writer.complete()
    with pytest.raises(BadInput, match=r"'same' of unit 1 .* was already written by another"):
        store.finish(units=2, header={})


def test_a_shorter_input_than_before_is_said(tmp_path: Path) -> None:
    build(tmp_path / "out", units=[0, 3])
    store = UnitStore(tmp_path / "out", settings={"detector": "made up", "batch": BATCH})
    with pytest.raises(BadInput, match="holds unit 3, but the work has 2 units"):
        store.finish(units=2, header={})


def test_one_environment_serves_all_who_open_it(unbroken: Path) -> None:
    first = open_reader(unbroken)
    assert open_reader(unbroken) is first
    other = unbroken.with_name("linked")
    other.symlink_to(unbroken)
    assert open_reader(other) is first


@pytest.mark.parametrize("cut", [0, 100, 5000, -4096])
def test_a_file_that_was_cut_off_is_refused_not_mapped(unbroken: Path, cut: int) -> None:
    data = unbroken / "data.mdb"
    data.write_bytes(data.read_bytes()[:cut])
    with pytest.raises(BadInput, match="cut off"):
        open_reader(unbroken)


def test_a_file_of_another_format_is_named(unbroken: Path) -> None:
    data = unbroken / "data.mdb"
    good = data.read_bytes()
    data.write_bytes(good[:20] + b"\x02\0\0\0" + good[24:])
    with pytest.raises(BadInput, match="format version 2, expected version 1"):
        check_data_file(data)
    data.write_bytes(b"\0" * 16 + b"\0" * 8 + good[16:24] + good[32:])
    with pytest.raises(BadInput, match="version 3"):
        check_data_file(data)
    data.write_bytes(b"<html>" * 4000)
    with pytest.raises(BadInput, match=r"no LMDB file|damaged"):
        check_data_file(data)
    data.unlink()
    with pytest.raises(BadInput, match=r"holds no data\.mdb"):
        check_data_file(data)


def test_json_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": "ü"})
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("power cut")))
    with pytest.raises(OSError, match="power cut"):
        write_json(path, {"b": 2})
    assert json.loads(path.read_text()) == {"a": "ü"}


def test_an_index_is_mapped_and_its_keys_are_found(tmp_path: Path) -> None:
    keys = sorted({f"key{index * 7919 % 100_003}".encode() for index in range(5000)})
    counts = np.arange(len(keys), dtype=np.int32)
    save_arrays(tmp_path / "index", {**key_columns(keys), "region_counts": counts})
    columns = map_arrays(tmp_path / "index")
    listed = KeyList(columns)
    assert list(listed) == [key.decode() for key in keys]
    assert all(listed.find(key.decode()) == row for row, key in enumerate(keys))
    assert listed.find("absent") == -1
    assert listed[-1] == keys[-1].decode()
    assert listed[1:3] == [key.decode() for key in keys[1:3]]
    assert columns["region_counts"].tolist() == counts.tolist()
    with pytest.raises(IndexError):
        listed[len(keys)]


def test_an_index_is_a_safetensors_file(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    arrays = {"b": np.arange(6, dtype=np.int64).reshape(2, 3), "a": np.array([1, 2], dtype=np.uint8), "empty": np.zeros((0, 2), np.float32)}
    save_arrays(tmp_path / "x.safetensors", arrays)
    loaded, mapped = load_file(tmp_path / "x.safetensors"), map_arrays(tmp_path / "x.safetensors")
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded[name], array)
        np.testing.assert_array_equal(mapped[name], array)


def test_a_damaged_index_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "index"
    save_arrays(path, {"a": np.arange(100, dtype=np.int64)})
    good = path.read_bytes()
    for damaged in (b"", good[:6], good[:-8], good[:8] + b"{" * 50 + good[58:], b"\xff" * 8 + good[8:], good.replace(b"I64", b"Q99")):
        path.write_bytes(damaged)
        with pytest.raises(BadInput, match="damaged"):
            map_arrays(path)


if __name__ == "__main__":
    build(Path(sys.argv[1]), pause=0.05)


def test_many_values_are_put_though_the_map_is_small(tmp_path: Path) -> None:
    environment = lmdb.open(str(tmp_path / "db"), map_size=1 << 16)
    put_all(environment, [(b"%d" % number, bytes(1 << 12)) for number in range(100)])
    assert environment.stat()["entries"] == 100
    environment.close()
    readonly = lmdb.open(str(tmp_path / "db"), readonly=True)
    with pytest.raises(UniterError, match=r"writing .*db failed: .*; make room"):
        put_all(readonly, [(b"key", b"value")])
