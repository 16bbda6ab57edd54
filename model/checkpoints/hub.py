"""What `from_pretrained`, `save_pretrained` and `push_to_hub` do: the ways that `model/sharing.py` waits for."""

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from uniter.datasets.errors import BadInput
from uniter.model.checkpoints.beside import DETECTOR, tokenizer_of, told_beside
from uniter.model.checkpoints.card import model_card
from uniter.model.checkpoints.export import export_hub, for_others
from uniter.model.checkpoints.load import load_downstream, load_uniter
from uniter.model.checkpoints.read import find_weights
from uniter.model.checkpoints.write import Weights
from uniter.model.heads.downstream import DownstreamModel
from uniter.model.sharing import Shared


class Checkpoints:
    """By our checkpoints. What a model was loaded from is remembered, so that answers, detector and vocabulary are handed on."""

    def read(self, kind: type[Any], path_or_id: str | Path, **sizes: Any) -> nn.Module:
        """What `from_pretrained` of a class gives.

        Args:
            kind: the class.
            path_or_id: a run, a file, a folder or a hub id.
            sizes: of a new head, such as `answers`; BadInput where the class takes them from the checkpoint.
        """
        if issubclass(kind, DownstreamModel):
            model: nn.Module = load_downstream(kind, path_or_id, **sizes)
        elif sizes:
            raise BadInput(f"{kind.__name__} takes all its sizes from the checkpoint; leave {', '.join(sizes)} out")
        else:
            model = load_uniter(path_or_id)
        model.__dict__["loaded_from"] = find_weights(path_or_id)
        return model

    def write(self, model: nn.Module, folder: str | Path, *, about: Mapping[str, Any], licence: str | None) -> None:
        """What `save_pretrained` does: a folder with safetensors, config, vocabulary and card."""
        weights = _weights(model, about)
        export_hub(weights, folder, card=model_card(weights, name=Path(folder).name, licence=licence))

    def upload(self, model: nn.Module, repo_id: str, *, about: Mapping[str, Any], licence: str | None, private: bool | None) -> str:
        """What `push_to_hub` does; the address of the repository."""
        # Not at the top: only uploads need it.
        import huggingface_hub

        weights = _weights(model, about)
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "model"
            export_hub(weights, folder, card=model_card(weights, name=repo_id, place=repo_id, licence=licence))
            try:
                hub = huggingface_hub.HfApi()
                address = hub.create_repo(repo_id, private=private, exist_ok=True)
                hub.upload_folder(repo_id=repo_id, folder_path=folder)
            # Its HTTP client has errors of its own beside OSError and ValueError.
            except Exception as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise BadInput(
                    f"{repo_id!r} could not be uploaded to the hub ({reason}); log in (hf auth login) and check the name"
                ) from error
        return str(address)


def _weights(model: nn.Module, about: Mapping[str, Any]) -> Weights:
    source = model.__dict__.get("loaded_from")
    if source is None or not Path(source).is_file():
        return for_others(Weights.of(model, about=about))
    own, told = Weights.of(model), told_beside(source)
    if told.get("architectures", own.about["architectures"]) != own.about["architectures"]:
        # Another class was its start (a pre-trained one, of a new head): its task is not this one's, but the regions are.
        told = {key: value for key, value in told.items() if key == DETECTOR}
    told = {**told, **own.about, **about}
    return for_others(dataclasses.replace(own, about=told, tokenizer=tokenizer_of(source, own.config.vocab_size)))


Shared.ways = Checkpoints()
