"""From a path to a model and what belongs to it: the one place that knows what a checkpoint is."""

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from uniter.datasets.errors import BadInput
from uniter.datasets.image_db.origin import RegionOrigin
from uniter.datasets.storage.files import read_json_object
from uniter.datasets.text_db.tokenizer import Tokenizer
from uniter.datasets.text_db.vocabulary_files import VOCABULARY_FILE
from uniter.model.checkpoints.beside import DETECTOR, VOCABULARY_OF_BERT_BASE_CASED, infer_config, tokenizer_beside, told_beside
from uniter.model.checkpoints.grow import listed, load_state, with_grown_tables
from uniter.model.checkpoints.read import TIED, WEIGHTS_FILE, State, find_weights, read_state
from uniter.model.heads.classification import UniterForClassification
from uniter.model.heads.downstream import WORDS, DownstreamModel, UniterForReferring, UniterForRetrieval, UniterForVcr, UniterForVqa
from uniter.model.heads.nlvr2 import UniterForNlvr2Paired, UniterForNlvr2PairedAttention, UniterForNlvr2Triplet
from uniter.model.heads.pretraining import UniterForPretraining
from uniter.model.settings.files import run_of
from uniter.model.uniter import UniterConfig, UniterModel

M = TypeVar("M", bound=DownstreamModel)

ANSWERS = "ans2label.json"


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
    model: UniterForPretraining = _built(UniterForPretraining, read_state(weights), weights, str(path_or_id), config)[0]
    return model


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
    model: M = _built(kind, read_state(weights), weights, str(path_or_id), config, **sizes)[0]
    return model


def start_from(model: DownstreamModel, state: Mapping[str, Tensor], *, source: str) -> list[str]:
    """Initialise as published from a pre-trained state dict, or restore a fine-tuned one; returns the tensors that keep their values."""
    return load_state(model, with_grown_tables(model.begun(state), model, token_type_rows=model.token_type_rows), source=source)


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


@dataclass(frozen=True, repr=False)
class Checkpoint:
    """What a path or hub id stands for.

    Attributes:
        source: the path or id, as it was given.
        weights: the file with its tensors.
        model: in eval mode, on the CPU, float32.
        fresh: the model's tensors that the checkpoint does not hold; their values are random.
        answers: what a model that answers questions says, by number; None where nothing tells, and of any other model.
        task: what it was trained for, as its own configuration says; None where it does not (published files).
        detector: whose regions it learnt from; None where it does not say (published files, older runs).
        given: the tokenizer that the caller named.
    """

    source: str
    weights: Path
    model: Any
    fresh: tuple[str, ...]
    answers: Sequence[str] | None
    task: str | None
    detector: RegionOrigin | None
    given: Tokenizer | None = None

    def __repr__(self) -> str:
        numbers = sum(tensor.numel() for tensor in self.model.parameters()) / 1e6
        answers = "" if self.answers is None else f", {len(self.answers):,} answers"
        return f"<{type(self.model).__name__} from {self.source}, {numbers:.1f} million parameters{answers}>"

    @property
    def body(self) -> UniterModel:
        """The model without its heads."""
        body: UniterModel = self.model.uniter
        return body

    @property
    def config(self) -> UniterConfig:
        """The sizes of the model."""
        config: UniterConfig = self.model.config
        return config

    @functools.cached_property
    def tokenizer(self) -> Tokenizer | None:
        """Of its texts; None where nothing tells. Looked for when it is asked for: it may be on the hub.

        Raises:
            BadInput: it has more word pieces than the model.
        """
        found = self.given or _tokenizer(self.config, self.weights)
        if found is not None and found.vocab_size > self.config.vocab_size:
            raise BadInput(
                f"the tokenizer {found.name!r} has {found.vocab_size:,} word pieces, but {self.source} has {self.config.vocab_size:,}; "
                "use the tokenizer of its texts"
            )
        return found


def load(
    path_or_id: str | Path,
    kind: type[DownstreamModel] | type[UniterForPretraining] | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    answers: str | os.PathLike[str] | Sequence[str] | None = None,
    **sizes: Any,
) -> Checkpoint:
    """A model with all that belongs to it.

    Args:
        path_or_id: anything that `load_uniter` understands, and fine-tuned models.
        kind: the class to build; None: what the checkpoint says it is, by its configuration or its heads.
        tokenizer: of its texts, where nothing else is to be asked; else what lies beside the weights, or the texts of its run.
        answers: the answers by number, or an `ans2label.json`; else what its configuration says, or a file beside it or in its texts.
        sizes: further constructor arguments of a down-stream model (`answers`, ...); they overrule what the checkpoint tells.

    Raises:
        BadInput: as `load_uniter`; or the answers are more or fewer than the model's.
    """
    source, weights = str(path_or_id), find_weights(path_or_id)
    state, told = read_state(weights), told_beside(weights)
    model, fresh = _built(kind or kind_of(state, told), state, weights, source, None, **sizes)
    named = None
    if isinstance(model, UniterForVqa | UniterForClassification) and model.answer_count:
        named = _answers(model.answer_count, source, weights, told, answers)
    task = told.get("task")
    origin = RegionOrigin.from_dict(told.get(DETECTOR))
    return Checkpoint(source, weights, model, tuple(fresh), named, task if isinstance(task, str) else None, origin, tokenizer)


# Which head makes a checkpoint what; the first that fits counts, because fine-tuned retrieval keeps the head of pre-training.
_HEADS: tuple[tuple[str, type[DownstreamModel] | type[UniterForPretraining]], ...] = (
    ("vqa_output.", UniterForVqa),
    ("label_output.", UniterForClassification),
    ("re_output.", UniterForReferring),
    ("vcr_output.", UniterForVcr),
    ("attn_pool.", UniterForNlvr2PairedAttention),
    ("nlvr2_output.", UniterForNlvr2Paired),
    ("rank_output.", UniterForRetrieval),
    ("", UniterForPretraining),
)


def kind_of(state: Mapping[str, Tensor], told: Mapping[str, Any]) -> type[DownstreamModel] | type[UniterForPretraining]:
    """The class of a checkpoint: as its configuration says, else by its heads; without any (BERT) that of pre-training."""
    named = told.get("architectures")
    by_name = {kind.__name__: kind for _, kind in _HEADS} | {UniterForNlvr2Triplet.__name__: UniterForNlvr2Triplet}
    for name in named if isinstance(named, list) else []:
        if name in by_name:
            return by_name[name]
    kind = next(kind for head, kind in _HEADS if any(name.startswith(head) for name in state))
    if kind is UniterForNlvr2Paired and state["nlvr2_output.weight"].shape[1] == state[WORDS].shape[1]:
        return UniterForNlvr2Triplet  # both pictures in one sequence, which has one state
    return kind


def _built(
    kind: type[DownstreamModel] | type[UniterForPretraining], state: State, weights: Path, source: str, config: UniterConfig | None,
    **sizes: Any,
) -> tuple[Any, list[str]]:  # fmt: skip
    """The model, in eval mode, and those of its tensors that the state does not hold."""
    config = config or infer_config(state, beside=weights)
    if issubclass(kind, DownstreamModel):
        downstream = kind(config, **{**kind.sizes(state), **sizes})
        return downstream.eval(), start_from(downstream, state, source=source)
    model = kind(config)
    return model.eval(), load_state(model, state, source=source)


def _texts_of_run(weights: Path) -> list[Path]:
    """The text databases of the run whose checkpoint this is, as far as they are found: as they were named, or beside the run."""
    found = run_of(weights)
    if found is None:
        return []
    run, settings = found
    named = [text for corpus in settings.corpora for text in corpus.text]
    return [place for text in named for place in (Path(text), run.parent / text) if place.is_dir()]


def _tokenizer(config: UniterConfig, weights: Path) -> Tokenizer | None:
    beside = tokenizer_beside(weights)
    if beside is not None:
        return beside
    texts = _texts_of_run(weights)
    for folder in texts:
        if (folder / VOCABULARY_FILE).is_file():
            return Tokenizer.load(folder)
    for folder in texts:
        meta = folder / "meta.json"
        named: Mapping[str, Any] = read_json_object(meta) if meta.is_file() else {}
        name = next((named[field] for field in ("bert", "toker", "tokenizer") if isinstance(named.get(field), str)), None)
        if name is not None:
            return Tokenizer.load(name)
    return Tokenizer.load() if config.vocab_size == VOCABULARY_OF_BERT_BASE_CASED else None


def _answers(
    count: int, source: str, weights: Path, told: Mapping[str, Any], given: str | os.PathLike[str] | Sequence[str] | None
) -> Sequence[str] | None:
    names: Sequence[str] | None = None
    if given is not None:
        names = numbered(Path(given)) if isinstance(given, str | os.PathLike) else list(given)
    elif isinstance(known := told.get("answers"), list):
        names = [str(name) for name in known]
    else:
        folders = (weights.parent, *_texts_of_run(weights))
        table = next((folder / ANSWERS for folder in folders if (folder / ANSWERS).is_file()), None)
        names = None if table is None else numbered(table)
    if names is not None and len(names) != count:
        raise BadInput(f"{source} has {count:,} answers, but {len(names):,} names of answers were found; give its own {ANSWERS}")
    return names


def numbered(path: Path) -> list[str]:
    """The answers of an `ans2label.json` by their number.

    Raises:
        BadInput: it does not number them from 0 on.
    """
    table = read_json_object(path)
    try:
        numbers = {name: int(number) for name, number in table.items()}
    except (TypeError, ValueError):
        numbers = {}
    if not numbers or sorted(numbers.values()) != list(range(len(numbers))):
        raise BadInput(f'{path} does not number answers from 0; expected an object such as {{"yes": 0, "no": 1}}')
    return sorted(numbers, key=numbers.__getitem__)
