"""Weights and model folders, complete or absent."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

from uniter.datasets.storage.files import complete_folder, write_json
from uniter.datasets.storage.tensors import write_tensors
from uniter.datasets.text_db.tokenizer import Tokenizer
from uniter.model.checkpoints.beside import infer_config, tokenizer_of, told_beside
from uniter.model.checkpoints.read import CONFIG_FILE, TIED, WEIGHTS_FILE, State, find_weights, read_state
from uniter.model.uniter import UniterConfig


@dataclasses.dataclass(frozen=True, slots=True)
class Weights:
    """A checkpoint, whatever heads it has, ready to be written.

    Attributes:
        state: every tensor once.
        config: its sizes.
        about: what else its configuration tells (a task's name, the names of its answers).
        tokenizer: of its texts, None where nobody knows.
    """

    state: Mapping[str, Tensor]
    config: UniterConfig
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tokenizer: Tokenizer | None = None

    @classmethod
    def of(cls, model: nn.Module, *, about: Mapping[str, Any] | None = None, tokenizer: Tokenizer | None = None) -> Self:
        """Those of a model of ours, which carries its configuration."""
        config = getattr(model, "config", None)
        assert isinstance(config, UniterConfig), "only UNITER models, which carry their configuration, can be written"
        state = {name: tensor for name, tensor in model.state_dict().items() if name not in TIED}
        return cls(state, config, {"architectures": [type(model).__name__], **(about or {})}, tokenizer)

    @classmethod
    def read(cls, path_or_id: str | Path) -> Self:
        """Those of whatever `load_uniter` takes, and of fine-tuned models."""
        weights = find_weights(path_or_id)
        state = read_state(weights)
        config = infer_config(state, beside=weights)
        return cls(state, config, told_beside(weights), tokenizer_of(weights, config.vocab_size))

    def published(self) -> State:
        """All tensors, on the host, under all their published names; tied ones share their memory."""
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state.items()}
        # An alias stands where its head does: a fine-tuned model has none of pre-training's.
        for alias, head in (("cls.predictions.decoder.weight", "cls.predictions.bias"), ("feat_regress.weight", "feat_regress.bias")):
            if head in state:
                state[alias] = state[TIED[alias]]
        return state

    def parameters(self) -> int:
        """How many numbers the tensors of `state` hold together."""
        return sum(tensor.numel() for tensor in self.state.values())


def as_weights(model: nn.Module | Weights) -> Weights:
    """Weights as they are, or those of a model."""
    return model if isinstance(model, Weights) else Weights.of(model)


def write_weights(folder: str | Path, weights: Weights, *, once: bool = False) -> None:
    """Write `model.safetensors`, `config.json` and the vocabulary into an existing folder; weights and configuration are each
    complete or absent, weights first.

    Args:
        once: a tied tensor stands under its first name only, and the file's metadata tell the other, where the safetensors library looks
            for it; otherwise under both, so that any loader of the published names is served.
    """
    folder = Path(folder)
    published = weights.published()
    told = {name: TIED[name] for name in published if name in TIED} if once else {}
    # One memory block may stand under one name only in a safetensors file: aliases are copied.
    tensors = {name: tensor.clone() if name in TIED else tensor for name, tensor in published.items() if name not in told}
    write_tensors(folder / WEIGHTS_FILE, tensors, metadata={"format": "pt", **told})
    if weights.tokenizer is not None:
        weights.tokenizer.save(folder)
    write_json(folder / CONFIG_FILE, {**weights.config.to_dict(), **weights.about})


def write_model(
    folder: str | Path, model: nn.Module, *, about: Mapping[str, Any] | None = None, tokenizer: Tokenizer | None = None
) -> None:
    """Write a model of ours into an existing folder, as `write_weights`.

    Args:
        about: more entries of `config.json` (a task's name, ...).
        tokenizer: of the texts it was trained on.
    """
    write_weights(folder, Weights.of(model, about=about, tokenizer=tokenizer))


def save_checkpoint(folder: str | Path, model: nn.Module, *, about: Mapping[str, Any] | None = None) -> None:
    """Write a model into a new folder that appears complete or not at all.

    Raises:
        BadInput: the folder exists.
    """
    with complete_folder(Path(folder)) as aside:
        write_model(aside, model, about=about)
