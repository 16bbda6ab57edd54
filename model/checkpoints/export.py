"""`uniter-train export`: UNITER's flat state dict, or a folder for the hub."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from uniter.datasets.errors import BadInput
from uniter.datasets.storage.files import complete_folder, read_json_object, write_json, written_aside
from uniter.datasets.text_db.tokenizer import Tokenizer
from uniter.datasets.text_db.vocabulary_files import VOCABULARY_FILE
from uniter.model.checkpoints.beside import vocabulary_name
from uniter.model.checkpoints.card import model_card, run_card
from uniter.model.checkpoints.load import kind_of
from uniter.model.checkpoints.read import CARD_FILE, read_state
from uniter.model.checkpoints.write import Weights, as_weights, write_weights

logger = logging.getLogger(__name__)


def export_published(model: nn.Module | Weights, path: str | Path) -> None:
    """Write the published layout: one flat `.pt` state dict, readable by UNITER's own PyTorch 1.1 too, and its configuration
    beside it under the same name ending in `.json`, its vocabulary in `-vocab.txt`. Complete or absent; earlier weights are replaced.

    Raises:
        BadInput: what is there under one of these names is no exported model's.
    """
    path, weights = Path(path), as_weights(model)
    _refuse_others(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path.with_suffix(".json"), {**weights.config.to_dict(), **weights.about})
    if weights.tokenizer is not None:
        with written_aside(path.with_name(vocabulary_name(path, lowercase=weights.tokenizer.lowercase))) as aside:
            weights.tokenizer.write_vocabulary(aside)
    with written_aside(path) as aside:
        torch.save(weights.published(), aside, _use_new_zipfile_serialization=False)


def _refuse_others(path: Path) -> None:
    """Raise BadInput where somebody else's files would be replaced."""
    config = path.with_suffix(".json")
    if path.exists():
        try:
            read_state(path)
        except BadInput as error:
            raise BadInput(f"{path} is there and holds no weights, so it is not overwritten; choose another name") from error
    beside = [config, *(path.with_name(vocabulary_name(path, lowercase=lowercase)) for lowercase in (False, True))]
    taken = next((other for other in beside if other.exists() and not path.exists()), None)
    if taken is None and config.exists() and "hidden_size" not in read_json_object(config):
        taken = config
    if taken is not None:
        raise BadInput(f"{taken} is there and belongs to no such weights, so it is not overwritten; choose another than {path.name}")


def export_hub(model: nn.Module | Weights, folder: str | Path, *, card: str | None = None) -> None:
    """Write a folder that `huggingface_hub` can share: safetensors, config, vocabulary, model card.

    Args:
        card: the text of `README.md`; by default `model_card(model)`.

    Raises:
        BadInput: the folder exists and holds another model.
    """
    weights = as_weights(model)
    with complete_folder(Path(folder), again=True) as aside:
        write_weights(aside, dataclasses.replace(weights, about={"model_type": "uniter", **weights.about}), once=True)
        (aside / CARD_FILE).write_text(card if card is not None else model_card(weights), encoding="utf-8")


def export_run(start: str, layout: str, out: Path, *, licence: str | None = None) -> dict[str, Any]:
    """Write a model, fine-tuned ones with their heads, as `published` (one flat .pt) or `hub` (a folder); returns the summary.

    Args:
        licence: for the card of `hub`.
    """
    if licence is not None and layout == "published":
        raise BadInput("--license goes into the card, which only --to hub writes; leave it out")
    weights = for_others(Weights.read(start))
    if weights.tokenizer is None:
        logger.warning("%s does not tell its vocabulary, so none is written; put the vocab.txt of its texts beside the weights", start)
    if layout == "published":
        export_published(weights, out)
    else:
        export_hub(weights, out, card=run_card(weights, start, licence=licence))
    vocabulary = None if weights.tokenizer is None else weights.tokenizer.name
    return {"from": start, "layout": layout, "parameters": weights.parameters(), "vocabulary": vocabulary}


def for_others(weights: Weights) -> Weights:
    """The weights with the name of their class, so that they load as what they are, and without paths of this machine."""
    kind, tokenizer = kind_of(weights.state, weights.about), weights.tokenizer
    path = Path("" if tokenizer is None else tokenizer.name)
    # A name on the hub has one slash at most and stands nowhere here.
    if tokenizer is not None and (path.is_absolute() or path.exists() or path.suffix in (".txt", ".json") or len(path.parts) > 2):
        plain = tokenizer.vocabulary[: len(tokenizer.vocabulary) - len(tokenizer.added)]
        name = path.resolve().parent.name if path.name == VOCABULARY_FILE else path.name
        tokenizer = Tokenizer(plain, name=name, lowercase=tokenizer.lowercase, added=tokenizer.added)
    return dataclasses.replace(weights, about={**weights.about, "architectures": [kind.__name__]}, tokenizer=tokenizer)
