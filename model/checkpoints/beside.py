"""What lies beside published weights: configuration, vocabulary, tokenizer."""

import dataclasses
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from uniter.datasets.errors import BadInput
from uniter.datasets.storage.files import read_json_object
from uniter.datasets.text_db.tokenizer import Tokenizer
from uniter.datasets.text_db.vocabulary_files import VOCABULARY_FILE
from uniter.model.checkpoints.read import CONFIG_FILE
from uniter.model.uniter import PRESETS, UniterConfig

log = logging.getLogger(__name__)

DETECTOR = "detector"  # the entry of a configuration that says whose regions the model learnt from

HEAD_WIDTH = 64  # of the published models and of BERT; the tensors themselves do not tell


VOCABULARY_OF_BERT_BASE_CASED = 28996  # of all published models without words of their own


def infer_config(state: Mapping[str, Tensor], *, beside: Path | None = None) -> UniterConfig:
    """The sizes of the model that these tensors belong to.

    What tensors do not tell (number of heads, dropout, activation) is taken from a configuration beside the file:
    `config.json`, or the file's own name ending in `.json`. Without one, heads are 64 wide.

    Raises:
        BadInput: the word embeddings or the encoder are missing, or the number of heads cannot be known.
    """
    values: dict[str, Any] = {}
    path = None if beside is None else configuration_beside(beside)
    if path is not None:
        values = UniterConfig.from_json(path).to_dict()
    sizes: dict[str, int] = {}
    for name, field, dimension in (
        ("uniter.embeddings.word_embeddings.weight", "vocab_size", 0),
        ("uniter.embeddings.word_embeddings.weight", "hidden_size", 1),
        ("uniter.embeddings.position_embeddings.weight", "max_position_embeddings", 0),
        ("uniter.embeddings.token_type_embeddings.weight", "type_vocab_size", 0),
        ("uniter.encoder.layer.0.intermediate.dense.weight", "intermediate_size", 0),
        ("uniter.img_embeddings.img_linear.weight", "image_feature_size", 1),
        ("region_classifier.net.3.weight", "label_classes", 0),
    ):
        if name in state and state[name].ndim > dimension:
            sizes[field] = state[name].shape[dimension]
    if values and values["hidden_size"] != sizes.get("hidden_size"):
        log.warning("%s: the configuration beside it is another model's (hidden size %d); it is not used", beside, values["hidden_size"])
        values = {}
    layers = {int(match[1]) for name in state if (match := re.match(r"uniter\.encoder\.layer\.(\d+)\.", name))}
    for missing in {"hidden_size", "intermediate_size"} - sizes.keys():
        raise BadInput(f"{beside or 'the checkpoint'}: no tensor tells the {missing}; it is no whole UNITER or BERT, export it again")
    sizes["num_hidden_layers"] = max(layers) + 1
    if "num_attention_heads" not in values:
        if sizes["hidden_size"] % HEAD_WIDTH:
            raise BadInput(
                f"{beside or 'the checkpoint'}: hidden size {sizes['hidden_size']} does not tell the number of attention heads; "
                f"put the model's {CONFIG_FILE} beside the file"
            )
        values["num_attention_heads"] = sizes["hidden_size"] // HEAD_WIDTH
        published = [size["hidden_size"] for size in PRESETS.values() if size["hidden_size"] == HEAD_WIDTH * size["num_attention_heads"]]
        if sizes["hidden_size"] not in published:
            log.warning("%s: nothing tells its number of attention heads; they are taken to be %d columns wide", beside, HEAD_WIDTH)
    return UniterConfig(**{**values, **sizes})


def configuration_beside(weights: Path) -> Path | None:
    """The configuration of a weights file: its own name ending in `.json`, else its folder's `config.json`; of a run of UNITER's own
    scripts, which keep weights in `ckpt/`, the `log/model.json` beside that folder."""
    places = [weights.with_suffix(".json"), weights.parent / CONFIG_FILE]
    if weights.parent.name == "ckpt":
        places.append(weights.parent.parent / "log" / "model.json")
    return next((path for path in places if path.is_file()), None)


def told_beside(weights: str | Path) -> dict[str, Any]:
    """What the configuration beside a weights file tells besides sizes: the task, the names of its answers. Empty where nothing does.

    Raises:
        BadInput: the configuration is damaged.
    """
    path = configuration_beside(Path(weights))
    sizes = {field.name for field in dataclasses.fields(UniterConfig)}
    return {} if path is None else {name: value for name, value in read_json_object(path).items() if name not in sizes}


def tokenizer_beside(weights: str | Path) -> Tokenizer | None:
    """The tokeniser that lies beside a weights file: of an exported `model.pt` its `model-vocab.txt`, else its folder's own."""
    weights = Path(weights)
    for name in (vocabulary_name(weights, lowercase=lowercase) for lowercase in (False, True)):
        if (weights.parent / name).is_file():
            return Tokenizer.load(weights.parent / name)
    if (weights.parent / VOCABULARY_FILE).is_file() or (weights.parent / "tokenizer.json").is_file():
        return Tokenizer.load(weights.parent)
    return None


def tokenizer_of(weights: str | Path, vocabulary_size: int) -> Tokenizer | None:
    """The tokeniser of a model: what lies beside its weights, or BERT's where the number of word pieces is that of BERT-cased."""
    found = tokenizer_beside(weights)
    if found is None and vocabulary_size == VOCABULARY_OF_BERT_BASE_CASED:
        return Tokenizer.load()
    return found


def vocabulary_name(path: Path, *, lowercase: bool) -> str:
    """The vocabulary file of a flat weights file, beside it; as everywhere, "uncased" in its name says that letters are lowered."""
    return f"{path.stem}-{'uncased-' if lowercase else ''}{VOCABULARY_FILE}"
