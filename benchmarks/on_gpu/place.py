"""A checkout that is not installed, on whatever Python there is, as the package `uniter`.

Call `put_in_place` before anything of `uniter` is imported. What a reader would get wrong: a library that is absent here is replaced by a
stand-in, so that files which only mention it can be imported. Nothing is ever computed with a stand-in: each section says what it needs
(`Section.needs` in gpu.py) and is left out where that is absent.
"""

import datetime
import hashlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import re
import sys
import tempfile
import types
import typing
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = ("cv2", "h5py", "ijson", "jinja2", "lmdb", "lz4", "markupsafe", "msgpack", "orjson", "PIL", "pycocotools", "pydantic", "pytest",
             "safetensors", "tokenizers", "tqdm", "yaml")  # fmt: skip


class _AnyClass(type):
    def __getattr__(cls, name: str) -> typing.Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _absent(name)


class _Absent(metaclass=_AnyClass):
    """Stands for whatever an absent library would have: can be named, inherited from, and used as a decorator."""

    def __init__(self, *values: object, **words: object) -> None: ...

    def __init_subclass__(cls, **words: object) -> None: ...

    def __call__(self, *values: typing.Any, **words: typing.Any) -> typing.Any:
        return values[0] if len(values) == 1 and callable(values[0]) else self

    def __getattr__(self, name: str) -> typing.Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _absent(name)

    def __class_getitem__(cls, _: object) -> type:
        return cls


def _absent(name: str) -> type:
    # A class, since names of classes stand in annotations and `except` clauses.
    return _AnyClass(name, (_Absent, Exception) if name.endswith(("Error", "Exception")) else (_Absent,), {})


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names: Sequence[str]) -> None:
        self._names = set(names)

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] in self._names else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__getattr__ = _module_attribute  # type: ignore[method-assign]
        return module

    def exec_module(self, module: types.ModuleType) -> None: ...


def _module_attribute(name: str) -> typing.Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return _absent(name)


def put_in_place(*, hide: Sequence[str] = ()) -> list[str]:
    """Make this checkout importable as `uniter`; returns which of the libraries it uses are absent here.

    Args:
        hide: libraries that are to count as absent, to try that out.
    """
    package = types.ModuleType("uniter")
    package.__path__ = [str(ROOT)]  # uniter.extract is ROOT/extract
    sys.modules["uniter"] = package
    absent = [name for name in LIBRARIES if name in hide or importlib.util.find_spec(name) is None]
    if absent:
        finder = _StandIns(absent)
        for name in [name for name in sys.modules if name.split(".")[0] in absent]:
            del sys.modules[name]
        sys.meta_path.insert(0, finder)
        # Without its door, which leads to settings and checkpoints and so to most libraries.
        model = types.ModuleType("uniter.model")
        model.__path__ = [str(ROOT / "model")]
        sys.modules["uniter.model"] = model
    _older_python()
    _version()
    return absent


def _older_python() -> None:
    """The few names that Python 3.10 lacks."""
    if sys.version_info >= (3, 11):  # noqa: UP036 - the toolkit asks for it, a machine with a GPU may have an older one
        return
    if not hasattr(typing, "Self"):
        typing.Self = typing.Any  # type: ignore[misc]
    if not hasattr(datetime, "UTC"):
        datetime.UTC = datetime.timezone.utc  # type: ignore[misc] # noqa: UP017
    if not hasattr(hashlib, "file_digest"):

        def file_digest(file: typing.Any, name: str) -> typing.Any:
            found = hashlib.new(name)
            for piece in iter(lambda: file.read(1 << 20), b""):
                found.update(piece)
            return found

        hashlib.file_digest = file_digest


def _version() -> None:
    """Say the version where the distribution is not installed: databases that are written here ask for it."""
    try:
        importlib.metadata.version("uniter-toolkit")
    except importlib.metadata.PackageNotFoundError:
        said = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
        version = said[1] if said else "0"
        folder = Path(tempfile.mkdtemp(prefix="uniter-version-"))
        (folder / f"uniter_toolkit-{version}.dist-info").mkdir()
        told = f"Metadata-Version: 2.1\nName: uniter-toolkit\nVersion: {version}\n"
        (folder / f"uniter_toolkit-{version}.dist-info" / "METADATA").write_text(told, encoding="utf-8")
        sys.path.append(str(folder))
