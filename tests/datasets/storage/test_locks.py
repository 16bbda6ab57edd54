"""Who writes a folder alone, and what is done on a system without POSIX's locks (Windows), which is played here by hiding `fcntl`."""

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np

from uniter.datasets.errors import UniterError
from uniter.datasets.storage.locks import is_held_here, only_writer


def test_one_thread_of_a_process_writes_a_folder_another_is_refused(tmp_path: Path) -> None:
    met: list[str] = []

    def second() -> None:
        try:
            with only_writer(tmp_path / "out", doing="building"):
                met.append("both")
        except UniterError as error:
            met.append(str(error))

    with only_writer(tmp_path / "out"):
        assert is_held_here(tmp_path / "out")
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        (tmp_path / "out").rename(tmp_path / "elsewhere")
        assert is_held_here(tmp_path / "elsewhere")
    assert "another process is building" in met[0]
    assert not is_held_here(tmp_path / "elsewhere")
    second()
    assert met[1] == "both"


PLAYED = """
import os, sys
import torch  # which asks for the platform's name
sys.modules["fcntl"] = None
for name in ("O_DIRECTORY", "O_NONBLOCK", "O_CLOEXEC", "pread", "register_at_fork", "fork"):
    delattr(os, name)
"""

READ_AND_WRITE = """
from pathlib import Path
import numpy as np
from uniter.datasets.image_db import ImageDB
from uniter.datasets.maintenance.check import check_database
from uniter.datasets.maintenance.convert import convert
from uniter.datasets.storage.locks import file_lock, is_held_here, only_writer
from uniter.datasets.errors import UniterError

source, out = Path(sys.argv[1]), Path(sys.argv[2])
convert(source, out)
database = ImageDB(out)
assert len(database) == 2 and database["cat.npz"].features.shape == (3, 4)
report = check_database(out)
assert report.good == 2 and not report.problems, report
with only_writer(out):
    assert is_held_here(out)
    try:
        with only_writer(out):
            raise AssertionError("two writers")
    except UniterError as error:
        print(error)
with file_lock(out / "lock", wait=False) as mine:
    assert mine
    with file_lock(out / "lock", wait=False) as too:
        assert not too
"""


def test_without_posix_databases_are_written_read_and_checked(tmp_path: Path) -> None:
    source = tmp_path / "npz"
    source.mkdir()
    for name in ("cat", "dog"):
        boxes = np.tile(np.float16([0.25, 0.25, 0.75, 0.75, 0.5, 0.5]), (3, 1))
        arrays = {"features": np.ones((3, 4), np.float16), "norm_bb": boxes, "conf": np.ones((3, 1), np.float16)}
        np.savez(source / f"{name}.npz", **arrays, soft_labels=np.full((3, 9), 1 / 9, np.float16))
    words = [sys.executable, "-c", PLAYED + READ_AND_WRITE, str(source), str(tmp_path / "out.lmdb")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "another process is writing" in done.stdout
    assert done.stderr.count("do not run two writers on one folder") == 1


def test_nothing_needs_posix_to_be_imported() -> None:
    modules = ("cli.start", "model", "model.train.runs", "extract", "datasets.image_db", "datasets.text_db")
    imports = "\n".join(f"import uniter.{module}" for module in modules)
    done = subprocess.run([sys.executable, "-c", f"{PLAYED}\n{imports}"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
