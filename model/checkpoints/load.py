"""From a path to a model: the one place that knows which class a checkpoint holds."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from uniter.datasets.errors import BadInput
from uniter.datasets.storage.files import read_json_object
from uniter.datasets.text_db.tokenizer import Tokenizer
from uniter.datasets.text_db.vocabulary_files import VOCABULARY_FILE
from uniter.model.checkpoints.beside import VOCABULARY_OF_BERT_BASE_CASED, infer_config, tokenizer_beside, told_beside
from uniter.model.checkpoints.grow import listed, load_state, with_grown_tables
from uniter.model.checkpoints.read import TIED, WEIGHTS_FILE, State, find_weights, read_state
from uniter.model.heads.downstream import DownstreamModel, UniterForReferring, UniterForRetrieval, UniterForVqa
from uniter.model.heads.pretraining import UniterForPretraining
from uniter.model.settings.files import run_of
from uniter.model.uniter import UniterConfig, UniterModel

M = TypeVar("M", bound=DownstreamModel)


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


def load_downstream(kind: type[M], path_or_id: str | Path, *, config: UniterConfig | None = None, **sizes: Any) -> M:
    """The task's model from a pre-trained checkpoint (as published: tables grown, head fresh) or from a fine-tuned one.

    Args:
        kind: the task's class.
        path_or_id: anything that `load_uniter` understands.
        config: the sizes of the body; otherwise they follow from the checkpoint.
        sizes: further constructor arguments (`answers`, ...); they overrule what the checkpoint tells.

    Raises:
        BadInput: as `load_uniter`.
    """
    weights = find_weights(path_or_id)
    state = read_state(weights)
    model = kind(config or infer_config(state, beside=weights), **{**kind.sizes(state), **sizes})
    start_from(model, state, source=str(path_or_id))
    return model.eval()


def start_from(model: DownstreamModel, state: Mapping[str, Tensor], *, source: str) -> None:
    """Initialise as published from a pre-trained state dict, or restore a fine-tuned one."""
    load_state(model, with_grown_tables(model.begun(state), model, token_type_rows=model.token_type_rows), source=source)


def read_model(folder: str | Path, model: nn.Module) -> None:
    """Load what `write_model` wrote into a model of the same sizes; every tensor must be there.

    Raises:
        BadInput: the weights are damaged or are another model's.
    """
    state = read_state(Path(folder) / WEIGHTS_FILE)
    missing = [name for name in model.state_dict() if name not in state and TIED.get(name) not in state]
    if missing:
        raise BadInput(f"checkpoint {folder} lacks {listed(missing)}; it is another model's or damaged")
    load_state(model, state, source=str(folder))


@dataclass(frozen=True, slots=True)
class Checkpoint:
    source: str
    model: Any
    tokenizer: Tokenizer
    answers: Sequence[str] | None

    @property
    def body(self) -> UniterModel:
        body: UniterModel = self.model.uniter
        return body

    @property
    def config(self) -> UniterConfig:
        config: UniterConfig = self.model.config
        return config


# Which head makes a checkpoint what; the first that fits counts, because fine-tuned retrieval keeps the head of pre-training.
_HEADS: tuple[tuple[str, type[DownstreamModel] | type[UniterForPretraining]], ...] = (
    ("vqa_output.3.weight", UniterForVqa),
    ("re_output.", UniterForReferring),
    ("rank_output.weight", UniterForRetrieval),
    ("itm_output.weight", UniterForPretraining),
)


MADE_BY: dict[type, str] = {
    UniterForVqa: "uniter-train finetune vqa",
    UniterForReferring: "uniter-train finetune refcoco",
    UniterForRetrieval: "uniter-train finetune retrieval",
    UniterForPretraining: "uniter-train pretrain",
}


# --- checkpoints -----------------------------------------------------------------------------------------------------------------


def load_any(source: str, *, tokenizer: Tokenizer | None, answers: str | os.PathLike[str] | Sequence[str] | None) -> Checkpoint:
    weights = find_weights(source)
    state = read_state(weights)
    kind = next((kind for name, kind in _HEADS if any(key.startswith(name) for key in state)), None)
    if kind is None:
        raise BadInput(
            f"{source} has none of the heads that photographs are asked with (matching, retrieval, VQA, RefCOCO); "
            f"train it further: {MADE_BY[UniterForPretraining]} or uniter-train finetune"
        )
    model = _built(kind, state, weights, source)
    texts = _texts_of_run(weights)
    tokenizer = tokenizer or _tokenizer(source, model.config, weights, texts)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise BadInput(
            f"the tokenizer {tokenizer.name!r} has {tokenizer.vocab_size:,} word pieces, but {source} has {model.config.vocab_size:,}; "
            "use the tokenizer of its texts"
        )
    names = _answers(source, model.vqa_output[3].weight.shape[0], weights, texts, answers) if kind is UniterForVqa else None
    return Checkpoint(source, model, tokenizer, names)


def _built(kind: type[DownstreamModel] | type[UniterForPretraining], state: State, weights: Path, source: str) -> Any:
    config = infer_config(state, beside=weights)
    if issubclass(kind, DownstreamModel):
        model: Any = kind(config, **kind.sizes(state))
        start_from(model, state, source=source)
    else:
        model = kind(config)
        load_state(model, state, source=source)
    return model.eval()


def _texts_of_run(weights: Path) -> list[Path]:
    """The text databases of the run whose checkpoint this is, as far as they are found: as they were named, or beside the run."""
    found = run_of(weights)
    if found is None:
        return []
    run, settings = found
    named = [text for corpus in settings.corpora for text in corpus.text]
    return [place for text in named for place in (Path(text), run.parent / text) if place.is_dir()]


def _tokenizer(source: str, config: UniterConfig, weights: Path, texts: Sequence[Path]) -> Tokenizer:
    beside = tokenizer_beside(weights)
    if beside is not None:
        return beside
    for folder in texts:
        if (folder / VOCABULARY_FILE).is_file():
            return Tokenizer.load(folder)
    for folder in texts:
        meta = folder / "meta.json"
        named: Mapping[str, Any] = read_json_object(meta) if meta.is_file() else {}
        name = next((named[field] for field in ("bert", "toker", "tokenizer") if isinstance(named.get(field), str)), None)
        if name is not None:
            return Tokenizer.load(name)
    if config.vocab_size == VOCABULARY_OF_BERT_BASE_CASED:
        return Tokenizer.load()
    raise BadInput(
        f"{source} does not tell its tokenizer ({config.vocab_size:,} word pieces, and the texts of its run are not at hand); "
        "name it: a vocabulary file, or the text database it was trained on"
    )


def _answers(
    source: str, count: int, weights: Path, texts: Sequence[Path], given: str | os.PathLike[str] | Sequence[str] | None
) -> Sequence[str]:
    names: Sequence[str] | None = None
    if given is not None:
        names = _numbered(Path(given)) if isinstance(given, str | os.PathLike) else list(given)
    elif isinstance(known := told_beside(weights).get("answers"), list):
        names = [str(name) for name in known]
    else:
        table = next((folder / "ans2label.json" for folder in (weights.parent, *texts) if (folder / "ans2label.json").is_file()), None)
        names = None if table is None else _numbered(table)
    if names is None:
        raise BadInput(f"{source} does not tell the names of its {count:,} answers; give its ans2label.json")
    if len(names) != count:
        raise BadInput(f"{source} has {count:,} answers, but {len(names):,} names of answers were found; give its own ans2label.json")
    return names


def _numbered(path: Path) -> list[str]:
    """The answers of an `ans2label.json` by their number."""
    table = read_json_object(path)
    try:
        numbers = {name: int(number) for name, number in table.items()}
    except (TypeError, ValueError):
        numbers = {}
    if not numbers or sorted(numbers.values()) != list(range(len(numbers))):
        raise BadInput(f'{path} does not number answers from 0; expected an object such as {{"yes": 0, "no": 1}}')
    return sorted(numbers, key=numbers.__getitem__)
