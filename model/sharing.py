"""Loading and sharing a model by its class: `from_pretrained`, `save_pretrained`, `push_to_hub`.

What a checkpoint is, the heads do not know; `model/checkpoints/load.py` hands the ways in when it is imported, which the package does.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

from torch import nn


class Ways(Protocol):
    """How a model is read, written and uploaded."""

    def read(self, kind: type[nn.Module], path_or_id: str | Path, **sizes: Any) -> nn.Module:
        """A model of a class from a run, a file, a folder or a hub id; `sizes` are those of a new head."""

    def write(self, model: nn.Module, folder: str | Path, *, about: Mapping[str, Any], licence: str | None) -> None:
        """Write a folder that others can load, with a card."""

    def upload(self, model: nn.Module, repo_id: str, *, about: Mapping[str, Any], licence: str | None, private: bool | None) -> str:
        """Write it to the hub; the address of the repository."""


class Shared(nn.Module):
    """A model that can be loaded by its class and handed on."""

    ways: ClassVar[Ways]

    @classmethod
    def from_pretrained(cls, path_or_id: str | Path, **sizes: Any) -> Self:
        """A model of this class with the weights of a file, a folder, a run or a hub id; in eval mode, on the CPU, float32.

        What the checkpoint does not hold (the head, of a pre-trained one) is new, and said in the log. Nothing in it is executed.

        Args:
            path_or_id: whatever `uniter.model.load` takes, which also tells tokenizer, answers and detector.
            sizes: further constructor arguments (`answers=3`, how many, of VQA ...); they overrule what the checkpoint tells.

        Raises:
            BadInput: there is no such file, it is damaged, or not UNITER's or BERT's.
        """
        model = cls.ways.read(cls, path_or_id, **sizes)
        assert isinstance(model, cls)
        return model

    def save_pretrained(self, folder: str | Path, *, licence: str | None = None, **about: Any) -> None:
        """Write a new folder with safetensors, configuration, vocabulary and card, which holds no code.

        Args:
            licence: an identifier such as "mit", for the card; None: not stated.
            about: more entries of the configuration (`task`, `answers` ...), which overrule those of the checkpoint it was loaded from.

        Raises:
            BadInput: the folder exists.
        """
        self.ways.write(self, folder, about=about, licence=licence)

    def push_to_hub(self, repo_id: str, *, licence: str | None = None, private: bool | None = None, **about: Any) -> str:
        """Upload what `save_pretrained` writes, as the user who is logged in to the hub; returns the address.

        Args:
            repo_id: "name/model"; made if it is not there.
            private: whether only its owner sees a new one; None: as the owner's settings say.

        Raises:
            BadInput: the hub refused, or cannot be reached.
        """
        return self.ways.upload(self, repo_id, about=about, licence=licence, private=private)
