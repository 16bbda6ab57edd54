"""Where the golden arrays and the material beside the project are, and the made-up world that tests learn from."""

import importlib.util
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import HealthCheck, settings

HERE = Path(__file__).parent
SHARED = HERE.parent.parent / "shared"

# Generated tests that do not say how many: few, and the same ones, in the default run; HYPOTHESIS_PROFILE=many looks for faults.
_QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
settings.register_profile("few", max_examples=50, deadline=None, derandomize=True, database=None, suppress_health_check=_QUIET)
settings.register_profile(
    "many", max_examples=int(os.environ.get("HYPOTHESIS_EXAMPLES", "5000")), deadline=None, print_blob=True, suppress_health_check=_QUIET
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "few"))


def _golden(variable: str, name: str) -> Path:
    folder = Path(os.environ.get(variable, HERE / "golden" / name))
    assert folder.is_dir(), f"{variable} names {folder}, which is no folder"
    return folder


@pytest.fixture(scope="session")
def butd_golden() -> Path:
    return _golden("BUTD_GOLDEN", "butd")


@pytest.fixture(scope="session")
def uniter_golden() -> Path:
    return _golden("UNITER_GOLDEN", "uniter")


@pytest.fixture(scope="session")
def uniter_data_golden() -> Path:
    return _golden("UNITER_DATA_GOLDEN", "uniter-data")


@pytest.fixture(scope="session")
def uniter_tasks_golden() -> Path:
    return _golden("UNITER_TASKS_GOLDEN", "uniter-tasks")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The real photographs and features beside the project; tests that need them are skipped, visibly, where they are absent."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is absent: the real photographs and features are not part of the project")
    return SHARED


def _module(name: str) -> ModuleType:
    description = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert description is not None and description.loader is not None
    module = importlib.util.module_from_spec(description)
    description.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def made_up() -> ModuleType:
    """tests/made_up.py: `made_up.World().write(folder)` gives a text and a region database that belong together."""
    return _module("made_up")


@pytest.fixture(scope="session")
def fuzzing() -> ModuleType:
    """tests/fuzzing.py: damage for generated tests."""
    return _module("fuzzing")


@pytest.fixture(scope="session")
def browser() -> ModuleType:
    """tests/browser.py: a real browser, where Chromium is here (`CHROMIUM` is None where it is not)."""
    return _module("browser")


class SmallDisk:
    """A file system in memory that can be full; `path` is where it is mounted."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()

    def mount(self, kilobytes: int) -> None:
        """Begin with an empty disk of that size; the test is skipped, visibly, where mounting is not allowed."""
        self.unmount()
        options = ["-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(self.path)]
        try:
            done = subprocess.run(["mount", *options], capture_output=True, check=False)
        except FileNotFoundError:
            pytest.skip("there is no mount command here, so no disk can be filled")
        if done.returncode:
            pytest.skip("mounting a small disk is not allowed here (it needs root)")

    def grow(self) -> None:
        """Make room."""
        subprocess.run(["mount", "-o", "remount,size=64m", str(self.path)], check=True)

    def unmount(self) -> None:
        if self.path.is_mount():
            subprocess.run(["umount", "-l", str(self.path)], check=False)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """A disk that a test may fill up."""
    disk = SmallDisk(tmp_path / "disk")
    yield disk
    disk.unmount()
