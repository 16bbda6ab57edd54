"""`uniter-build-db` killed at random times, and on disks that are too small: no half database opens, and a repetition finishes it."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from uniter.datasets.errors import BadInput
from uniter.datasets.text_db import TextDB


def captions_file(path: Path, count: int) -> Path:
    rng = random.Random(3)
    words = ["a", "red", "green", "disc", "square", "left", "right", "of", "near"]
    lines = [json.dumps({"image": f"{n // 3:06d}.jpg", "caption": " ".join(rng.choices(words, k=9))}) for n in range(count)]
    path.write_text("\n".join(lines))
    return path


def build(captions: Path, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "uniter.cli.build_db", str(captions), str(out)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finished(captions: Path, out: Path) -> tuple[int, str]:
    process = build(captions, out)
    _, stderr = process.communicate(timeout=600)
    return process.returncode, stderr


def contents(folder: Path) -> dict[str, bytes]:
    """All files; meta.json without the path of the database."""
    files = {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    meta = json.loads(files["meta.json"])
    return {**files, "meta.json": json.dumps({name: value for name, value in meta.items() if name != "output"}).encode()}


@pytest.mark.slow
def test_thirty_kills(tmp_path: Path) -> None:
    captions, out = captions_file(tmp_path / "captions.jsonl", 30_000), tmp_path / "out"
    start = time.monotonic()
    assert finished(captions, tmp_path / "unbroken")[0] == 0
    whole, wanted = time.monotonic() - start, contents(tmp_path / "unbroken")
    rng, kills, completed, resumed_over = random.Random(7), 0, 0, set()
    while kills < 30:
        assert completed < 60, "the builds are over before they are killed"
        if out.exists():
            resumed_over.add(frozenset(path.name for path in out.iterdir()))
        process = build(captions, out)
        time.sleep(rng.random() * whole)
        process.send_signal(rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))
        process.communicate(timeout=600)
        kills += process.returncode < 0
        if (out / "header.json").exists():
            assert contents(out) == wanted
            shutil.rmtree(out)
            completed += 1
        elif out.exists():
            with pytest.raises(BadInput):
                TextDB(out)
    assert len(resumed_over) > 1, "all kills fell into the same moment"
    assert finished(captions, out)[0] == 0
    assert contents(out) == wanted and len(TextDB(out)) == 30_000


def test_a_full_disk(small_disk: Any, tmp_path: Path) -> None:
    """Full while the captions are read, while they are merged, and while the index is written."""
    captions = captions_file(tmp_path / "captions.jsonl", 4000)
    small_disk.mount(4)
    assert finished(captions, tmp_path / "unbroken")[0] == 0
    wanted = contents(tmp_path / "unbroken")
    for kilobytes in (4, 900, 1400):
        small_disk.mount(kilobytes)
        out = small_disk.path / "out"
        code, stderr = finished(captions, out)
        last = stderr.splitlines()[-1]
        assert code == 1 and "the disk is full" in last and last.endswith("run the same command again")
        assert "Traceback" not in stderr and not out.exists()
        small_disk.grow()
        assert finished(captions, out)[0] == 0
        assert contents(out) == wanted
