"""Tensors written as safetensors, whole or not at all, and readable by whomever other files of ours are readable by."""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from uniter.datasets.errors import BadInput
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
        if metadata and len(metadata) > 1:
            _sort_metadata(aside)
        aside.chmod(mode)  # safetensors puts a file of its own in its place, which only its owner can read


def _sort_metadata(path: Path) -> None:
    """The texts of the header in the order of their names: safetensors writes them in another one each time, and the same tensors shall
    give the same bytes.
    """
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        content = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(content) <= length:  # as long as before, but for the spaces that fill it up
            file.seek(8)
            file.write(content.ljust(length))


def read_torch(path: Path) -> Any:
    """What `torch.save` wrote, if it is tensors and plain containers: nothing of it is executed.

    Raises:
        BadInput: it holds anything else, or is damaged.
    """
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format before zip files cannot be mapped
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except pickle.UnpicklingError as error:
        reason = " ".join(str(error).split())
        found = reason.partition("Unsupported ")[2] or reason
        raise BadInput(f"{path} holds something else than tensors and plain lists, which could run code ({found[:160]})") from None
    except Exception as error:  # a damaged file can raise nearly anything
        raise BadInput(
            f"{path} is no file of tensors that can be read ({' '.join(str(error).split())[:160] or type(error).__name__})"
        ) from None


def read_plain_tensors(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays by name of a dictionary of tensors that `torch.save` wrote; errors as of `read_torch`."""
    found = read_torch(path)
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise BadInput(f"{path} holds no dictionary of tensors")
    return {str(name): tensor.numpy() for name, tensor in found.items()}
