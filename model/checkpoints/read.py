"""Reading and writing UNITER's weights: published `.pt` files, BERT's folders, our runs, folders for the hub.

What a reader would get wrong: a checkpoint is trusted for its numbers only. Nothing in it is executed, and the sizes of the model
follow from its tensors, not from the configuration beside it, which in published collections is often another model's.

A file that lacks some of our tensors, or has more, loads with a word in the log, as the published loader does; a tensor of the
wrong shape is an error.
"""

import logging
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from uniter.datasets.errors import BadInput
from uniter.datasets.network import hub_is_reachable
from uniter.datasets.text_db.vocabulary_files import TOKENIZER_FILE, VOCABULARY_FILE

log = logging.getLogger(__name__)

WEIGHTS_FILE, CONFIG_FILE, CARD_FILE = "model.safetensors", "config.json", "README.md"


FOLDER_WEIGHTS = (WEIGHTS_FILE, "pytorch_model.bin")


STATE_WRAPPERS = ("model_state", "model_state_dict", "state_dict", "model")


# Both names of a tied tensor: the second is the first one's alias.
TIED = {
    "cls.predictions.decoder.weight": "uniter.embeddings.word_embeddings.weight",
    "feat_regress.weight": "uniter.img_embeddings.img_linear.weight",
}


State = dict[str, Tensor]


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
    online = hub_is_reachable()
    try:
        cached_file(name, CONFIG_FILE, local_files_only=not online)
        for file in FOLDER_WEIGHTS:
            found = cached_file(name, file, _raise_exceptions_for_missing_entries=False, local_files_only=not online)
            if found is not None:
                # A vocabulary without the other file does not tell whether letters are lowered. `export_hub` writes both.
                lenient = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
                lenient["local_files_only"] = not online
                if cached_file(name, TOKENIZER_FILE, **lenient) is not None:
                    cached_file(name, VOCABULARY_FILE, **lenient)
                return Path(found)
    # OSError for most troubles; what lies below (its HTTP client) has classes of its own.
    except Exception as error:
        problem = error
    reason = _first_line(problem) if problem is not None else f"it holds neither {' nor '.join(FOLDER_WEIGHTS)}"
    reason = reason if online else "no network, and it is not in the cache"
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
