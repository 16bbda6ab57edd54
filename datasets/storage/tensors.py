"""Tensors written as safetensors, whole or not at all, and readable by whomever other files of ours are readable by."""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from uniter.datasets.storage.files import written_aside


def write_tensors(path: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file.

    Args:
        path: the file; what is there is replaced once the new one is whole.
        tensors: on any device; no two of them may share memory.
        metadata: texts for the file's header.
    """
    with written_aside(path) as aside:
        aside.touch()
        mode = aside.stat().st_mode & 0o777  # as the umask says
        save_file(
            {name: tensor.detach().contiguous() for name, tensor in tensors.items()}, aside, metadata=dict(metadata) if metadata else None
        )
        aside.chmod(mode)  # safetensors puts a file of its own in its place, which only its owner can read
