"""Killed at any instant: the database opens, is never complete when it is not, and ends as an unbroken run's, byte for byte."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from uniter.datasets.errors import BadInput
from uniter.datasets.image_db import ImageDB
from uniter.extract.run.extraction import Stopped

Content = Callable[[Path], dict[str, Any]]
Photos = Callable[..., Path]
OPTIONS = {"batch_size": 3, "unit_images": 8, "workers": 2}


def begin(fake: ModuleType, photos: Path, out: Path, **options: Any) -> subprocess.Popen[str]:
    """An extraction in a process (group) of its own."""
    command = [sys.executable, str(fake.__file__), str(photos), str(out), json.dumps({**OPTIONS, **options})]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def ended(process: subprocess.Popen[str]) -> tuple[str, str]:
    stdout, stderr = process.communicate(timeout=600)
    return stdout, stderr


def summary_of(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The summary of a run that must succeed."""
    stdout, stderr = ended(process)
    assert process.returncode == 0, stderr
    summary: dict[str, Any] = json.loads(stdout)
    return summary


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    """Until the process under test has come so far, or has ended; imports take their time on a busy machine."""
    while not path.exists() and process.poll() is None:
        time.sleep(0.002)


def check_interrupted(out: Path, complete: dict[str, Any], content: Content) -> int:
    """The laws that hold after any kill; returns how many records are there already."""
    if not (out / "settings.json").exists():
        return 0
    if (out / "header.json").exists():
        assert content(out) == complete
        return len(complete["records"])
    with pytest.raises(BadInput, match="unfinished"):
        ImageDB(out)
    partial = ImageDB(out, allow_partial=True)
    for key in partial.keys_list:
        assert len(partial[key]) == 7
    return len(partial)


def kill_again_and_again(fake: ModuleType, photos: Path, folder: Path, content: Content, *, kills: int, seed: int) -> list[int]:
    whole = begin(fake, photos, folder / "whole")
    summary_of(whole)
    complete = content(folder / "whole")
    rng, out, seen = random.Random(seed), folder / "killed", []
    for _ in range(kills):
        if (out / "header.json").exists():
            break
        process = begin(fake, photos, out, seconds=0.004)
        wait_for(out / "units", process)
        time.sleep(rng.random() ** 2 * 0.25)
        os.killpg(process.pid, signal.SIGKILL)
        ended(process)
        seen.append(check_interrupted(out, complete, content))
    assert seen == sorted(seen), "a kill loses nothing that was committed"
    assert summary_of(begin(fake, photos, out))["complete"]
    assert content(out) == complete
    assert not (out / "units").exists()
    return seen


def test_killed_a_handful_of_times(make_photos: Photos, fake: ModuleType, content: Content, tmp_path: Path) -> None:
    photos = make_photos(100)
    (photos / "photo0033.jpg").write_text("broken")
    seen = kill_again_and_again(fake, photos, tmp_path, content, kills=5, seed=1)
    assert len(seen) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_thirty_times(make_photos: Photos, fake: ModuleType, content: Content, tmp_path: Path, seed: int) -> None:
    photos = make_photos(1500)
    (photos / "photo0033.jpg").write_text("broken")
    seen = kill_again_and_again(fake, photos, tmp_path, content, kills=40, seed=seed)
    assert len(seen) >= 30, "the run ended before it was killed often enough"


@pytest.mark.slow
def test_killed_while_it_is_finished(make_photos: Photos, fake: ModuleType, content: Content, tmp_path: Path) -> None:
    """No time goes into the images here: the kills fall into commits, the moves into data.mdb and the last steps."""
    photos = make_photos(60)
    summary_of(begin(fake, photos, tmp_path / "whole"))
    complete = content(tmp_path / "whole")
    rng, finished = random.Random(5), 0
    for attempt in range(30):
        out = tmp_path / f"out{attempt}"
        process = begin(fake, photos, out)
        wait_for(out / "settings.json", process)
        time.sleep(rng.random() * 0.35)
        os.killpg(process.pid, signal.SIGKILL)
        ended(process)
        finished += (out / "header.json").exists()
        check_interrupted(out, complete, content)
        assert summary_of(begin(fake, photos, out))["complete"]
        assert content(out) == complete
    assert finished < 30


def test_sigterm_finishes_the_batch(make_photos: Photos, fake: ModuleType, content: Content, tmp_path: Path) -> None:
    photos = make_photos(40)
    process = begin(fake, photos, tmp_path / "out", seconds=0.05)
    wait_for(tmp_path / "out" / "units" / "00000.partial" / "data.mdb", process)
    time.sleep(0.2)
    process.terminate()
    stdout, stderr = ended(process)
    assert process.returncode == 1 and "the same command continues it" in stdout, stderr
    done = len(ImageDB(tmp_path / "out", allow_partial=True))
    assert 0 < done < 40 and (done % 8) % 3 == 0, "whole batches only"
    summary_of(begin(fake, photos, tmp_path / "out"))
    summary_of(begin(fake, photos, tmp_path / "whole"))
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_two_writers_on_one_output(make_photos: Photos, fake: ModuleType, content: Content, tmp_path: Path) -> None:
    photos = make_photos(60)
    both = [begin(fake, photos, tmp_path / "out", seconds=0.01) for _ in range(2)]
    summaries = [summary_of(process) for process in both]
    assert sum(summary["extracted"] for summary in summaries) == 60, "nothing twice"
    assert any(summary["complete"] for summary in summaries)
    summary_of(begin(fake, photos, tmp_path / "whole"))
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_three_shards_at_once(make_photos: Photos, fake: ModuleType, content: Content, tmp_path: Path) -> None:
    photos = make_photos(70)
    shards = [begin(fake, photos, tmp_path / "out", shard=[index, 3], seconds=0.005) for index in range(3)]
    summaries = [summary_of(process) for process in shards]
    assert sum(summary["extracted"] for summary in summaries) == 70
    assert any(summary["complete"] for summary in summaries)
    summary_of(begin(fake, photos, tmp_path / "whole"))
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_disk_that_fills_up_in_mid_run(make_photos: Photos, fake: ModuleType, content: Content, tmp_path: Path) -> None:
    """RLIMIT_FSIZE stands for the disk: writes beyond it fail as ENOSPC does."""
    photos = make_photos(100)

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (90_000, 90_000))

    command = [sys.executable, str(fake.__file__), str(photos), str(tmp_path / "out"), json.dumps(OPTIONS)]
    process = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True, check=False, timeout=120)
    assert process.returncode == 1
    last = process.stderr.strip().splitlines()[-1]
    assert last.startswith("uniter.datasets.errors.UniterError: ") and "what was committed is kept" in last
    with pytest.raises(BadInput, match="unfinished"):
        ImageDB(tmp_path / "out")
    assert summary_of(begin(fake, photos, tmp_path / "out"))["complete"]
    summary_of(begin(fake, photos, tmp_path / "whole"))
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def fill_a_disk(
    disk: Any,
    fake: ModuleType,
    photos: Path,
    whole: dict[str, Any],
    content: Content,
    *,
    kilobytes: int,
    said: str = "the disk is full while",
) -> int:
    """One run on a disk that is too small, or is not, and its repetition once there is room; the exit code of the first."""
    disk.mount(kilobytes)
    out = disk.path / "out"
    process = begin(fake, photos, out, check_space=False)
    _, stderr = ended(process)
    if process.returncode:
        last = stderr.strip().splitlines()[-1]
        assert process.returncode == 1, "no signal: LMDB's lock file is mapped memory, which a full disk takes away"
        assert last.startswith("uniter.datasets.errors.UniterError: ") and said in last and last.endswith("run the same command again")
        assert not (out / "header.json").exists()
        if (out / "settings.json").exists():
            looked = [sys.executable, "-m", "uniter.cli.db", "info", str(out)]
            subprocess.run(looked, check=True, capture_output=True, timeout=600)  # what is there can be looked at
    disk.grow()
    assert summary_of(begin(fake, photos, out))["complete"]
    assert content(out) == whole
    return process.returncode


def test_a_disk_that_is_really_full(small_disk: Any, make_photos: Photos, fake: ModuleType, content: Content, tmp_path: Path) -> None:
    photos = make_photos(60)
    small_disk.mount(4)
    summary_of(begin(fake, photos, tmp_path / "whole"))
    whole = content(tmp_path / "whole")
    for kilobytes in (4, 112, 200):
        assert fill_a_disk(small_disk, fake, photos, whole, content, kilobytes=kilobytes) == 1


@pytest.mark.slow
def test_disks_of_many_sizes(small_disk: Any, make_photos: Photos, fake: ModuleType, content: Content, tmp_path: Path) -> None:
    """Full at the settings, a unit's first pages, a commit, an index, the move into data.mdb, the header."""
    photos = make_photos(60)
    small_disk.mount(4)
    summary_of(begin(fake, photos, tmp_path / "whole"))
    whole = content(tmp_path / "whole")
    for kilobytes in range(4, 800, 12):
        if fill_a_disk(small_disk, fake, photos, whole, content, kilobytes=kilobytes) == 0:
            break
    assert 200 < kilobytes < 700  # up to the first disk that holds it all
    assert fill_a_disk(small_disk, fake, photos, whole, content, kilobytes=kilobytes + 40) == 0


def test_killed_while_it_overwrites(
    make_photos: Photos, fake: ModuleType, content: Content, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any of its deletions and renames: the old database is there or the new one, and the repetition ends with the new one."""
    photos, out = make_photos(10), tmp_path / "out"
    old, new = {**OPTIONS, "max_boxes": 5}, {**OPTIONS, "overwrite": True}
    wholes = []
    for name, options in (("old", old), ("new", OPTIONS)):
        fake.extract_images(photos, tmp_path / name, detector=fake.FakeDetector(), **options)
        wholes.append(content(tmp_path / name))
    changes = {name: getattr(Path, name) for name in ("unlink", "rename")}

    class Died(BaseException):
        pass

    for survivors in range(0, 200, 3):
        fake.extract_images(photos, out, detector=fake.FakeDetector(), **{**old, "overwrite": (out / "header.json").exists()})
        left = survivors

        def dying(name: str) -> Callable[..., Any]:
            def change(path: Path, *arguments: Any, **named: Any) -> Any:
                nonlocal left
                left -= 1
                if left < 0:
                    raise Died
                return changes[name](path, *arguments, **named)

            return change

        with monkeypatch.context() as patch:
            for name in changes:
                patch.setattr(Path, name, dying(name))
            try:
                fake.extract_images(photos, out, detector=fake.FakeDetector(), **new)
            except Died:
                pass
            else:
                assert survivors > 5 and content(out) == wholes[1]
                return
        if out.exists():
            assert content(out) in wholes
        fake.extract_images(photos, out, detector=fake.FakeDetector(), **new)
        assert content(out) == wholes[1]
    pytest.fail("it never came to its end")


@pytest.mark.parametrize("damage", ["cut", "page"])
def test_a_unit_that_a_broken_disk_damaged_is_done_again(
    make_photos: Photos, fake: ModuleType, content: Content, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    photos, out = make_photos(30), tmp_path / "out"
    stop = threading.Event()
    with pytest.raises(Stopped):
        fake.extract_images(photos, out, detector=StoppingDetector(fake, stop), stop=stop, **OPTIONS)
    data = out / "units" / "00001.partial" / "data.mdb"
    stored = data.read_bytes()
    if damage == "cut":
        data.write_bytes(stored[:-4096])
    else:
        data.write_bytes(stored[: 2 * 4096] + b"\xff" * (len(stored) - 2 * 4096))
    fake.extract_images(photos, out, detector=fake.FakeDetector(), **OPTIONS)
    assert f"{data} is damaged" in caplog.text and "its images are done again" in caplog.text
    fake.extract_images(photos, tmp_path / "whole", detector=fake.FakeDetector(), **OPTIONS)
    assert content(out) == content(tmp_path / "whole")


def StoppingDetector(fake: ModuleType, stop: threading.Event) -> Any:
    """Asks for a stop in its fifth batch, which is in the middle of the second unit."""
    detector = fake.FakeDetector()
    detect = detector.detect

    def counting(images: Any, **more: Any) -> Any:
        if len(detector.batches) == 4:
            stop.set()
        return detect(images, **more)

    detector.detect = counting
    return detector
