"""The cache of regions when several threads of a process use it at once: LMDB opens a file only once in a process."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest

from uniter.datasets.errors import BadInput, UniterError
from uniter.datasets.image_db.records import encode_record
from uniter.datasets.image_db.regions import RegionFeatures
from uniter.extract.region_cache import RegionCache

THREADS, ROUNDS = 4, 5


def record_of(number: int) -> RegionFeatures:
    box = np.array([[0.1, 0.1, 0.5, 0.5, 0.4, 0.4]], np.float32)
    return RegionFeatures(features=np.full((1, 4), number, np.float32), norm_bb=box, conf=np.ones(1, np.float32))


@pytest.fixture
def slow_opening(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening takes so long that two threads which do not wait for each other meet in it for certain."""
    real: Callable[..., Any] = lmdb.open

    def slow(*arguments: Any, **more: Any) -> Any:
        environment = real(*arguments, **more)
        time.sleep(0.005)
        return environment

    monkeypatch.setattr(lmdb, "open", slow)


@pytest.mark.usefixtures("slow_opening")
@pytest.mark.parametrize("shared", [True, False], ids=["one object", "an object for each thread"])
def test_threads_that_read_and_write_at_once_wait_for_each_other(tmp_path: Path, shared: bool) -> None:
    one = RegionCache(tmp_path / "kept", {"detector": "made up"})
    start = threading.Barrier(THREADS)

    def work(thread: int) -> list[float]:
        cache = one if shared else RegionCache(tmp_path / "kept", {"detector": "made up"})
        start.wait(timeout=60)
        read = []
        for turn in range(ROUNDS):
            number = thread * ROUNDS + turn
            cache.put({f"key{number}": encode_record(record_of(number))})
            read.append(float(cache.get([f"key{number}"])[f"key{number}"].features[0, 0]))
        return read

    with ThreadPoolExecutor(THREADS) as pool:
        read = [number for numbers in pool.map(work, range(THREADS)) for number in numbers]
    assert read == list(range(THREADS * ROUNDS))
    keys = [f"key{number}" for number in range(THREADS * ROUNDS)]
    kept = one.get([*keys, "absent"])
    assert {key: float(regions.features[0, 0]) for key, regions in kept.items()} == dict(zip(keys, range(len(keys)), strict=True))


@pytest.mark.usefixtures("slow_opening")
def test_threads_with_caches_of_different_settings_do_not_meet(tmp_path: Path) -> None:
    def work(thread: int) -> int:
        cache = RegionCache(tmp_path / "kept", {"detector": thread})
        cache.put({"key": encode_record(record_of(thread))})
        return int(cache.get(["key"])["key"].features[0, 0])

    with ThreadPoolExecutor(THREADS) as pool:
        assert list(pool.map(work, range(THREADS))) == list(range(THREADS))
    assert len(list((tmp_path / "kept").iterdir())) == THREADS


def test_a_failure_does_not_keep_the_others_waiting(tmp_path: Path) -> None:
    broken, whole = (RegionCache(tmp_path / "kept", {"detector": name}) for name in ("broken", "whole"))
    (broken.path / "data.mdb").write_bytes(bytes(3 * 4096))
    with pytest.raises((BadInput, UniterError), match=r"data\.mdb"):
        broken.get(["key"])
    done = threading.Event()
    threading.Thread(target=lambda: (whole.put({"key": encode_record(record_of(1))}), done.set()), daemon=True).start()
    assert done.wait(timeout=30)
    assert len(whole.get(["key"])) == 1
