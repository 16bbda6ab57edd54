"""The benchmarks are scripts: loaded by path."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """`script("retrieval")`: benchmarks/retrieval.py as a module."""

    def load(name: str) -> ModuleType:
        description = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
        assert description is not None and description.loader is not None
        module = importlib.util.module_from_spec(description)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        description.loader.exec_module(module)
        return module

    return load


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """A script chooses the number of threads of its process, which is this one."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
