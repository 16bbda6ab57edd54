"""Moving units into data.mdb: in bounded transactions, at a cost that does not grow, killed anywhere, begun by an older version."""

import hashlib
import os
import random
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import pytest

from uniter.datasets.errors import BadInput
from uniter.datasets.image_db.writing import absorbing, units
from uniter.datasets.image_db.writing.units import UnitStore
from uniter.datasets.storage.files import write_json
from uniter.datasets.storage.lmdb_files import open_reader

UNITS, IMAGES = 7, 5


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three units a group, and a transaction ends amidst most units."""
    monkeypatch.setattr(absorbing, "GROUP", 3)
    monkeypatch.setattr(absorbing, "TRANSACTION_BYTES", 70_000)


def value_of(key: str) -> bytes:
    dice = random.Random(key)
    return dice.randbytes(dice.choice([200, 9_000, 40_000, 120_000]))


def build(out: Path, numbers: range | list[int] = range(UNITS), *, fail: bool = True) -> bool:
    store = UnitStore(out, settings={"made": "up"})
    for number in numbers:
        writer = store.unit(number)
        if writer is None:
            continue
        with writer:
            for key in (f"{number}/{image}" for image in range(IMAGES)):
                if key not in writer.done:
                    if fail and number % 2 and key.endswith("3"):
                        writer.fail(key, f"{key}.jpg", "cut off", retry=True)
                    else:
                        writer.put(key, value_of(key), regions=1)
                writer.commit()
            writer.complete()
    return store.finish(units=UNITS, header={})


def contents(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir()) if path.is_file()}


def records(out: Path) -> dict[str, bytes]:
    with open_reader(out).begin() as transaction:
        return {bytes(key).decode(): bytes(value) for key, value in transaction.cursor()}


@pytest.fixture
def unbroken(tmp_path: Path) -> Path:
    assert build(tmp_path / "unbroken")
    return tmp_path / "unbroken"


def in_child(work: Callable[[], Any], *, instant: int) -> int:
    """Do something in a child that is killed at the n-th commit, written note or deletion of absorbing; what it left with."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    seen = 0

    def dying(function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*values: Any, **words: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == instant:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*values, **words)

        return counted

    for place, name in ((absorbing, "_commit"), (absorbing, "write_standing"), (absorbing._Opened, "delete")):
        setattr(place, name, dying(getattr(place, name)))
    work()
    os._exit(0)


def test_killed_at_each_step_equals_unbroken(unbroken: Path, tmp_path: Path) -> None:
    for instant in range(1, 60, 4):
        out = tmp_path / f"out{instant}"
        status = in_child(lambda out=out: build(out), instant=instant)  # type: ignore[misc]
        if status == 0:
            assert instant > 15, "transactions are not cut"
            break
        # Killed a second time on the way back.
        in_child(lambda out=out: build(out), instant=1 + instant % 4)  # type: ignore[misc]
        assert build(out)
        assert contents(out) == contents(unbroken), instant


def test_units_in_any_order_by_turns(unbroken: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for numbers in ([6, 4], [2, 0, 1], [5]):
        assert not build(out, numbers)
    assert build(out)
    assert contents(out) == contents(unbroken)


@pytest.mark.parametrize("instant", [0, 3, 5, 6])
def test_failures_are_tried_again_wherever_the_work_stood(tmp_path: Path, instant: int) -> None:
    """Amidst a unit of which a part is in data.mdb, too."""
    out = tmp_path / "out"
    in_child(lambda: build(out), instant=instant)
    store = UnitStore(out, settings={"made": "up"})
    assert (store.forget_failures() != set()) or instant
    assert store.failures() == []
    in_child(lambda: build(out, fail=False), instant=instant)
    assert build(out, fail=False)
    assert records(out) == {f"{unit}/{image}": value_of(f"{unit}/{image}") for unit in range(UNITS) for image in range(IMAGES)}
    assert UnitStore(out, settings={"made": "up"}).failures() == []


def test_a_transaction_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    commit = absorbing._commit

    def counted(path: Path, piece: Any, number: int) -> None:
        sizes.append(sum(len(value) for _, value in piece))
        commit(path, piece, number)

    monkeypatch.setattr(absorbing, "_commit", counted)
    assert build(tmp_path / "out")
    assert len(sizes) > UNITS and max(sizes) < absorbing.TRANSACTION_BYTES + 120_000


def test_a_unit_costs_the_same_however_many_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in looks at the folders of units, of which a unit may cost no more than its group has."""
    looks: Counter[int] = Counter()
    at = 0
    for module in (units, absorbing):
        original = module.unit_folder

        def counted(path: Path, number: int, *, partial: bool = False, original: Callable[..., Path] = original) -> Path:
            looks[at] += 1
            return original(path, number, partial=partial)

        monkeypatch.setattr(module, "unit_folder", counted)
    store = UnitStore(tmp_path / "out", settings={})
    for at in range(60):
        with store.unit(at) as writer:  # type: ignore[union-attr]
            writer.put(f"{at:03d}", b"x", regions=1)
            writer.complete()
    assert max(looks[number] for number in range(40, 60)) <= max(looks[number] for number in range(20))


@pytest.mark.parametrize("committed", [False, True])
def test_what_an_older_version_left_unfinished_is_gone_on_with(unbroken: Path, tmp_path: Path, committed: bool) -> None:
    """It moved a unit in one transaction, deleted the unit's file, and noted in absorbing.json which it was about to move."""
    out = tmp_path / "out"
    store = UnitStore(out, settings={"made": "up"})
    store.absorb = lambda **_: None  # type: ignore[method-assign]
    for number in range(4):
        with store.unit(number) as writer:  # type: ignore[union-attr]
            for image in range(IMAGES):
                writer.put(f"{number}/{image}", value_of(f"{number}/{image}"), regions=1)
            writer.complete()
    moved = 0
    with lmdb.open(str(out), map_size=1 << 24) as target:
        for number in range(2 + committed):
            with target.begin(write=True) as transaction:
                for image in range(IMAGES):
                    transaction.put(f"{number}/{image}".encode(), value_of(f"{number}/{image}"))
            if number < 2:
                (out / "units" / f"{number:05d}" / "data.mdb").unlink()
                moved += IMAGES
    write_json(out / "units" / "absorbing.json", {"unit": 2, "entries": moved})
    assert build(out, fail=False)
    assert records(out) == {f"{unit}/{image}": value_of(f"{unit}/{image}") for unit in range(UNITS) for image in range(IMAGES)}


def test_a_file_that_was_replaced_is_found_out(tmp_path: Path) -> None:
    out = tmp_path / "out"
    build(out, range(6))
    (out / "data.mdb").unlink()
    with pytest.raises(BadInput, match="was a file replaced"):
        build(out)
