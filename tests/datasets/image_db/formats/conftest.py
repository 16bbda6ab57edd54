"""Where the golden layouts are."""

import functools
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from uniter.datasets.maintenance.convert import Encoded
from uniter.datasets.maintenance.copying import write_regions

SHARED = Path(__file__).parents[5] / "shared" / "golden" / "formats"


@pytest.fixture(scope="session")
def formats_golden() -> Path:
    """The folder that FORMATS_GOLDEN names, or the one beside the project; skipped, visibly, only where neither is there."""
    named = os.environ.get("FORMATS_GOLDEN")
    folder = Path(named) if named else SHARED
    if named is None and not folder.is_dir():
        pytest.skip(f"{folder} is absent: the golden layouts are not part of the project")
    assert folder.is_dir(), f"FORMATS_GOLDEN names {folder}, which is no folder"
    return folder


@pytest.fixture(scope="session")
def files() -> ModuleType:
    """golden_files.py beside this: the truth, and files as plain values."""
    description = importlib.util.spec_from_file_location("golden_files", Path(__file__).parent / "golden_files.py")
    assert description is not None and description.loader is not None
    module = importlib.util.module_from_spec(description)
    sys.modules["golden_files"] = module  # where dataclasses look for it
    description.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def database(files: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A region database of ours of a truth, made once for each way it is asked for."""

    @functools.cache
    def make(truth: Path, *, labels: bool = True, gqa: bool = False) -> Path:
        out = tmp_path_factory.mktemp("ours") / "ours.lmdb"
        known = files.Truth(truth)
        records = Encoded((image.gqa if gqa else image.stem, image.record(labels=labels)) for image in known.images)
        told = {"class_names": list(known.class_names), "detector": "made up", "weights_sha256": "0" * 64, "box_kind": "proposal"}
        write_regions(out, records, settings={}, sources={}, header=lambda: {**records.widths, **told})
        return out

    return make
