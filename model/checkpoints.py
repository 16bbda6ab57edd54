"""Reading and writing UNITER's weights: published `.pt` files, BERT's folders, our runs, folders for the hub.

What a reader would get wrong: a checkpoint is trusted for its numbers only. Nothing in it is executed, and the sizes of the model
follow from its tensors, not from the configuration beside it, which in published collections is often another model's.

A file that lacks some of our tensors, or has more, loads with a word in the log, as the published loader does; a tensor of the
wrong shape is an error.
"""

import dataclasses
import json
import logging
import os
import pickle
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from uniter.datasets.errors import BadInput
from uniter.datasets.text_db import read_json_object
from uniter.datasets.tokenizer import TOKENIZER_FILE, VOCABULARY_FILE, Tokenizer
from uniter.model.heads import UniterForPretraining
from uniter.model.uniter import UniterConfig

log = logging.getLogger(__name__)

WEIGHTS_FILE, CONFIG_FILE, CARD_FILE = "model.safetensors", "config.json", "README.md"
FOLDER_WEIGHTS = (WEIGHTS_FILE, "pytorch_model.bin")
STATE_WRAPPERS = ("model_state", "model_state_dict", "state_dict", "model")
# Both names of a tied tensor: the second is the first one's alias.
TIED = {
    "cls.predictions.decoder.weight": "uniter.embeddings.word_embeddings.weight",
    "feat_regress.weight": "uniter.img_embeddings.img_linear.weight",
}
HEAD_WIDTH = 64  # of the published models and of BERT; the tensors themselves do not tell
VOCABULARY_OF_BERT_BASE_CASED = 28996  # of all published models without words of their own

State = dict[str, Tensor]


def load_uniter(path_or_id: str | Path, *, config: UniterConfig | None = None) -> UniterForPretraining:
    """A pre-training model with the weights of a file, a folder or a hub id; in eval mode, on the CPU, float32.

    Args:
        path_or_id: a published `.pt` (flat, or wrapped as `{"model_state": ...}`), a `.safetensors` file, a folder of ours or of BERT
            (`config.json` beside `model.safetensors` or `pytorch_model.bin`), a run directory, or a hub id such as `bert-base-cased`.
        config: the sizes to insist on; otherwise they follow from the tensors and the configuration beside them.

    Raises:
        BadInput: there is no such file, it is not UNITER's or BERT's, it is damaged or hostile, or a tensor's shape does not fit.
    """
    weights = find_weights(path_or_id)
    state = read_state(weights)
    if config is None:
        config = infer_config(state, beside=weights)
    model = UniterForPretraining(config)
    load_state(model, state, source=str(path_or_id))
    return model.eval()


def find_weights(path_or_id: str | Path) -> Path:
    """The weights file that a path or hub id means.

    Raises:
        BadInput: there is none.
    """
    path = Path(path_or_id)
    if path.is_file():
        return path
    if path.is_dir():
        for folder in (path, path / "checkpoints" / "latest"):
            for name in FOLDER_WEIGHTS:
                if (folder / name).is_file():
                    return folder / name
        if (path / "checkpoints").is_dir():
            raise BadInput(f"run directory {path}: no checkpoint has been written yet; let the run go on until the first one")
        raise BadInput(
            f"folder {path} holds neither {' nor '.join(FOLDER_WEIGHTS)} nor a run's checkpoints; name the file or another folder"
        )
    name = str(path_or_id)
    if path.suffix in {".pt", ".pth", ".bin", ".safetensors"} or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise BadInput(f"no file or folder {name}; check the path")
    return _from_hub(name)


def _from_hub(name: str) -> Path:
    # Not at the top: it costs seconds that only downloads need. Its cache, tokens and offline mode are those the user already has.
    from transformers.utils.hub import cached_file

    problem: Exception | None = None
    try:
        cached_file(name, CONFIG_FILE)
        for file in FOLDER_WEIGHTS:
            found = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
            if found is not None:
                # A vocabulary without the other file does not tell whether letters are lowered. `export_hub` writes both.
                lenient = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
                if cached_file(name, TOKENIZER_FILE, **lenient) is not None:
                    cached_file(name, VOCABULARY_FILE, **lenient)
                return Path(found)
    # OSError for most troubles; what lies below (its HTTP client) has classes of its own.
    except Exception as error:
        problem = error
    reason = _first_line(problem) if problem is not None else f"it holds neither {' nor '.join(FOLDER_WEIGHTS)}"
    raise BadInput(
        f"{name!r} is no file or folder here and could not be had from the hub ({reason}); "
        "check the name and the network, or download it and give the folder"
    ) from problem


def _first_line(error: BaseException | None) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def read_state(path: str | Path) -> State:
    """The tensors of a weights file under our names; nothing in the file is executed.

    Published wrappers (`model_state`), `module.` prefixes, `gamma` and `beta`, and BERT's names are understood. Of a tied tensor
    that stands twice only the first name is kept.

    Raises:
        BadInput: the file is damaged, holds other things than tensors, or is neither UNITER's nor BERT's.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        try:
            values: Any = load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise BadInput(f"cannot read {path} as safetensors ({error}); is it complete? Copy or download it again") from error
    else:
        try:
            values = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise BadInput(
                f"{path} is damaged or holds other things than tensors; it was not read further and nothing in it was executed. "
                "Expected a state dict: save `model.state_dict()` and nothing else"
            ) from error
        # A truncated archive or a foreign file raises nearly anything.
        except Exception as error:
            raise BadInput(f"cannot read {path} as a PyTorch file ({_first_line(error)}); copy or download it again") from error
    for wrapper in STATE_WRAPPERS:
        if isinstance(values, Mapping) and isinstance(values.get(wrapper), Mapping):
            values = values[wrapper]
    if not isinstance(values, Mapping) or not values:
        raise BadInput(f"{path} holds a {type(values).__name__}, expected a state dict (names and tensors)")
    state = {our_name(str(name)): value for name, value in values.items() if isinstance(value, Tensor)}
    if not any(name.startswith("uniter.") for name in state):
        example = next(iter(values))
        raise BadInput(
            f"{path} is neither UNITER's nor BERT's: it holds {str(example)!r}, expected names such as 'uniter.encoder.layer.0...'"
        )
    _settle_ties(state, path)
    return state


_RENAMED = ((re.compile(r"\bgamma\b"), "weight"), (re.compile(r"\bbeta\b"), "bias"))
_BODY_OF_BERT = ("embeddings.", "encoder.", "pooler.")


def our_name(name: str) -> str:
    """The published UNITER name of a tensor: of BERT (with or without its `bert.`), of old TensorFlow norms, of DataParallel."""
    while name.startswith("module."):
        name = name.removeprefix("module.")
    for pattern, new in _RENAMED:
        name = pattern.sub(new, name)
    if name.startswith("bert."):
        return "uniter." + name.removeprefix("bert.")
    if name.startswith(_BODY_OF_BERT):
        return "uniter." + name
    # Newer BERTs keep the decoder's bias under both names.
    return "cls.predictions.bias" if name == "cls.predictions.decoder.bias" else name


def _settle_ties(state: State, path: Path) -> None:
    for alias, name in TIED.items():
        if alias not in state:
            continue
        copy = state.pop(alias)
        if name not in state:
            state[name] = copy
        elif not torch.equal(copy, state[name]):
            log.warning("%s: %s differs from %s, with which it is tied; the latter is taken", path, alias, name)


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
    return UniterConfig(**{**values, **sizes})


def configuration_beside(weights: Path) -> Path | None:
    """The configuration of a weights file: its own name ending in `.json`, else its folder's `config.json`."""
    return next((path for path in (weights.with_suffix(".json"), weights.parent / CONFIG_FILE) if path.is_file()), None)


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


def load_state(model: nn.Module, state: Mapping[str, Tensor], *, source: str) -> None:
    """Copy tensors by name into a model, leniently: missing and unexpected names are logged, a wrong shape is an error.

    Args:
        model: any of our models; a tensor known under two names is found under either.
        state: tensors as `read_state` gives them.
        source: what to call the checkpoint in messages.

    Raises:
        BadInput: a tensor has another shape than the model's, or no name fits.
    """
    own = model.state_dict()
    wrong = [name for name in own if name in state and state[name].shape != own[name].shape]
    if wrong:
        name = wrong[0]
        others = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise BadInput(
            f"checkpoint {source}: {name} has shape {tuple(state[name].shape)}, but this model expects {tuple(own[name].shape)}{others}; "
            "use the configuration that the checkpoint was made with"
        )
    missing = [name for name in own if name not in state and not (name in TIED and TIED[name] in state)]
    unexpected = [name for name in state if name not in own]
    if len(missing) == len(own):
        raise BadInput(f"checkpoint {source} holds none of this model's tensors; expected names such as {next(iter(own))!r}")
    if missing:
        log.warning("checkpoint %s lacks %d tensors, which keep their initial values: %s", source, len(missing), _listed(missing))
    if unexpected:
        log.warning("checkpoint %s has %d tensors that this model does not use: %s", source, len(unexpected), _listed(unexpected))
    model.load_state_dict({name: value for name, value in state.items() if name in own}, strict=False)


def _listed(names: list[str], most: int = 6) -> str:
    return ", ".join(sorted(names)[:most]) + (", ..." if len(names) > most else "")


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
        return sum(tensor.numel() for tensor in self.state.values())


def _as_weights(model: nn.Module | Weights) -> Weights:
    return model if isinstance(model, Weights) else Weights.of(model)


def write_weights(folder: str | Path, weights: Weights) -> None:
    """Write `model.safetensors`, `config.json` and the vocabulary into an existing folder; weights and configuration are each
    complete or absent, weights first. Tied tensors stand under both names, so that any loader of the published names is served."""
    folder = Path(folder)
    # One memory block may stand under one name only in a safetensors file: aliases are copied.
    tensors = {name: tensor.clone() if name in TIED else tensor for name, tensor in weights.published().items()}
    with _complete_file(folder / WEIGHTS_FILE) as aside:
        save_file(tensors, aside, metadata={"format": "pt"})
    if weights.tokenizer is not None:
        weights.tokenizer.save(folder)
    with _complete_file(folder / CONFIG_FILE) as aside:
        aside.write_text(json.dumps({**weights.config.to_dict(), **weights.about}, indent=2) + "\n", encoding="utf-8")


def write_model(
    folder: str | Path, model: nn.Module, *, about: Mapping[str, Any] | None = None, tokenizer: Tokenizer | None = None
) -> None:
    """Write a model of ours into an existing folder, as `write_weights`.

    Args:
        about: more entries of `config.json` (a task's name, ...).
        tokenizer: of the texts it was trained on.
    """
    write_weights(folder, Weights.of(model, about=about, tokenizer=tokenizer))


def read_model(folder: str | Path, model: nn.Module) -> None:
    """Load what `write_model` wrote into a model of the same sizes; every tensor must be there.

    Raises:
        BadInput: the weights are damaged or are another model's.
    """
    state = read_state(Path(folder) / WEIGHTS_FILE)
    missing = [name for name in model.state_dict() if name not in state and TIED.get(name) not in state]
    if missing:
        raise BadInput(f"checkpoint {folder} lacks {_listed(missing)}; it is another model's or damaged")
    load_state(model, state, source=str(folder))


def save_checkpoint(folder: str | Path, model: nn.Module, *, about: Mapping[str, Any] | None = None) -> None:
    """Write a model into a new folder that appears complete or not at all.

    Raises:
        BadInput: the folder exists.
    """
    with _complete_folder(Path(folder)) as aside:
        write_model(aside, model, about=about)


def export_published(model: nn.Module | Weights, path: str | Path) -> None:
    """Write the published layout: one flat `.pt` state dict, readable by UNITER's own PyTorch 1.1 too, and its configuration
    beside it under the same name ending in `.json`, its vocabulary in `-vocab.txt`. Complete or absent; an existing file is replaced."""
    path, weights = Path(path), _as_weights(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _complete_file(path.with_suffix(".json")) as aside:
        aside.write_text(json.dumps({**weights.config.to_dict(), **weights.about}, indent=2) + "\n", encoding="utf-8")
    if weights.tokenizer is not None:
        with _complete_file(path.with_name(vocabulary_name(path, lowercase=weights.tokenizer.lowercase))) as aside:
            weights.tokenizer.write_vocabulary(aside)
    with _complete_file(path) as aside:
        torch.save(weights.published(), aside, _use_new_zipfile_serialization=False)


def export_hub(model: nn.Module | Weights, folder: str | Path, *, card: str | None = None) -> None:
    """Write a folder that `huggingface_hub` can share: safetensors, config, vocabulary, model card.

    Args:
        card: the text of `README.md`; by default `model_card(model)`.

    Raises:
        BadInput: the folder exists.
    """
    weights = _as_weights(model)
    with _complete_folder(Path(folder)) as aside:
        write_weights(aside, dataclasses.replace(weights, about={"model_type": "uniter", **weights.about}))
        (aside / CARD_FILE).write_text(card if card is not None else model_card(weights), encoding="utf-8")


def model_card(
    model: nn.Module | Weights, *, name: str = "UNITER", trained_on: str | None = None, results: Mapping[str, float] | None = None
) -> str:
    """The model card: what it is, its sizes, how to load it, and what is known of its training.

    Args:
        trained_on: a sentence about the data; None is said as not recorded.
        results: figures to show, by name.
    """
    weights = _as_weights(model)
    config, tokenizer = weights.config, weights.tokenizer
    sizes = {
        "parameters": f"{weights.parameters() / 1e6:.1f} million",
        "layers, hidden size, heads": f"{config.num_hidden_layers}, {config.hidden_size}, {config.num_attention_heads}",
        "vocabulary": f"{config.vocab_size:,} word pieces" + (f" ({tokenizer.name})" if tokenizer is not None else ""),
        "region features": f"{config.image_feature_size} wide",
        "detector classes": f"{config.label_classes:,} with background",
    }
    lines = ["---", "library_name: uniter-toolkit", "tags:", "- uniter", "- vision-and-language", "---", "", f"# {name}", ""]
    lines += ["An image-text encoder in the architecture of UNITER (Chen et al., ECCV 2020): word pieces and detected regions"]
    lines += ["in one BERT encoder.", ""]
    lines += ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in sizes.items()), ""]
    lines += ["```python", "from uniter.model import load_uniter", 'model = load_uniter("this/folder")', "```", ""]
    lines += ["## Training data", "", trained_on or "Not recorded.", ""]
    if results:
        lines += ["## Results", "", "| measure | value |", "|---|---|", *(f"| {key} | {value:.4g} |" for key, value in results.items()), ""]
    lines += [
        "## Limits",
        "",
        "The model repeats what its captions and its detector's classes say of people and places; it was not checked",
    ]
    lines += ["for any use that concerns persons.", ""]
    return "\n".join(lines)


@contextmanager
def _complete_file(path: Path) -> Iterator[Path]:
    """A path to write to; its content appears under `path` by rename once it is durable."""
    aside = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        yield aside
        _make_durable(aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    _make_durable(path.parent)


@contextmanager
def _complete_folder(path: Path) -> Iterator[Path]:
    """A folder to fill; it appears as `path` by rename."""
    if path.exists():
        raise BadInput(f"{path} exists already; name a new folder or remove that one")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}-{os.getpid()}")
    aside.mkdir()
    try:
        yield aside
        for file in aside.iterdir():
            _make_durable(file)
        aside.rename(path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    _make_durable(path.parent)


def _make_durable(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
