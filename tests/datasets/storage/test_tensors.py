"""Tensors on disk: whole or not at all, and readable by whom the umask lets read."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from uniter.datasets.storage.tensors import write_tensors


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_umask_says_who_may_read(mask: int, mode: int, tmp_path: Path, umask: None) -> None:
    os.umask(mask)
    write_tensors(tmp_path / "w.safetensors", {"a": torch.ones(2)})
    assert (tmp_path / "w.safetensors").stat().st_mode & 0o777 == mode


def test_what_is_written_is_read(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.tensor(3), "c": torch.nn.Parameter(torch.ones(1, 2, 3, 4))}
    tensors["c"].data = tensors["c"].data.to(memory_format=torch.channels_last)
    write_tensors(tmp_path / "w.safetensors", tensors, metadata={"format": "pt"})
    found = load_file(tmp_path / "w.safetensors")
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_what_fails_leaves_what_was_there(tmp_path: Path) -> None:
    write_tensors(tmp_path / "w.safetensors", {"a": torch.ones(2)})
    shared = torch.zeros(4)
    with pytest.raises(RuntimeError):
        write_tensors(tmp_path / "w.safetensors", {"a": shared, "b": shared})
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]
    assert torch.equal(load_file(tmp_path / "w.safetensors")["a"], torch.ones(2))
