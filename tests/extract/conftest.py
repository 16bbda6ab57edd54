"""A detector without a network and folders of small pictures."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import pytest

from uniter.datasets.image_db import ImageDB
from uniter.datasets.storage.lmdb_files import open_reader

FAKE = Path(__file__).with_name("fake_extraction.py")


def loaded(path: Path, name: str) -> ModuleType:
    """A file as a module of that name, known by it, so that what it defines can be pickled."""
    if name in sys.modules:
        return sys.modules[name]
    specification = importlib.util.spec_from_file_location(name, path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def fake() -> ModuleType:
    """The module `fake_extraction`; its `__file__` is the script that runs an extraction in a process of its own."""
    return loaded(FAKE, "fake_extraction")


@pytest.fixture(scope="session")
def generator(butd_golden: Path) -> ModuleType:
    """What draws the golden weights of Bottom-Up-Attention, and says them in every layout."""
    return loaded(butd_golden / "generator.py", "butd_generator")


@pytest.fixture(scope="session")
def writer() -> ModuleType:
    """What writes a .caffemodel."""
    return loaded(Path(__file__).parent / "weights" / "caffe_writer.py", "caffe_writer")


@pytest.fixture
def make_photos(tmp_path: Path) -> Callable[..., Path]:
    """`make_photos(count)`: a folder of that many small JPEGs of several sizes."""

    def make(count: int, name: str = "photos") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for number in range(count):
            rng = np.random.default_rng(number)
            small = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
            picture = cv2.resize(small, (40 + number % 7, 30 + number % 5), interpolation=cv2.INTER_CUBIC)
            cv2.imwrite(str(folder / f"photo{number:04d}.jpg"), picture)
        return folder

    return make


def database_content(path: Path) -> dict[str, Any]:
    """All that a database says, to compare two: records byte for byte, header, failures without folders."""
    with open_reader(path).begin() as transaction:
        records = {bytes(key): bytes(value) for key, value in transaction.cursor()}
    database = ImageDB(path)
    index = dict(zip(database.keys_list, database.region_counts.tolist(), strict=True))
    return {
        "records": records,
        "index": index,
        "header": (path / "header.json").read_bytes(),
        "settings": (path / "settings.json").read_bytes(),
        "failures": (path / "failures.jsonl").read_bytes(),
        "index.safetensors": (path / "index.safetensors").read_bytes(),
    }


@pytest.fixture(scope="session")
def content() -> Callable[[Path], dict[str, Any]]:
    return database_content
