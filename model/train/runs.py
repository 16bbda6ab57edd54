"""A run from its settings, whatever is trained: choose what was left open, resume, train.

Here the settings are unpacked; below, no function receives all of them. What differs between pre-training and a down-stream
task is a `Kind`.
"""

import contextlib
import dataclasses
import itertools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn

from uniter.datasets.corpus import Corpus, open_corpus
from uniter.datasets.errors import BadInput, SettingsDiffer
from uniter.datasets.image_db import open_image_dbs
from uniter.datasets.loader import Assembler, Mixture, Part
from uniter.datasets.samples import Masking
from uniter.datasets.tokenizer import ON_BOARD, VOCABULARY_FILE, Tokenizer
from uniter.model.attention import AttentionKernel
from uniter.model.checkpoints import find_weights, read_model, tokenizer_beside, write_model
from uniter.model.tasks import Task, special_tokens, vocabulary_of
from uniter.model.train import state
from uniter.model.train.config import CONFIG_FILE, CorpusSettings, TrainSettings, differences, read_settings, run_of, write_config
from uniter.model.train.distributed import Processes, processes
from uniter.model.train.log import RunLog
from uniter.model.train.loop import Learner, Recipe, train
from uniter.model.train.optim import AdamW, parameter_groups
from uniter.model.uniter import SelfAttention, UniterConfig, UniterModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Data:
    """The corpora of a run, opened: training and validation examples and the ratios of the tasks, by corpus name."""

    training: dict[str, Corpus]
    validation: dict[str, Corpus]
    tasks: dict[str, dict[str, float]]

    def size(self) -> tuple[int, float]:
        """Training examples, and the mean of their tokens."""
        examples = sum(len(corpus) for corpus in self.training.values())
        return examples, sum(float(corpus.lengths.sum()) for corpus in self.training.values()) / examples


@dataclass(frozen=True, slots=True)
class Kind:
    """What is particular to pre-training or to a down-stream task.

    Attributes:
        task: what the settings call it.
        open_data: opens the databases.
        complete: chooses the numbers that the settings leave open, for so many examples of so many tokens.
        build_model: in training mode, on the CPU.
        build_mixture: the tasks by part, and which batch comes when.
        validation_parts: what is validated.
        head: name prefix of a head that learns at a rate of its own.
        about: what else the checkpoint's config.json says.
    """

    task: str
    open_data: Callable[[TrainSettings], Data]
    complete: Callable[[TrainSettings, int, float, Processes], TrainSettings]
    build_model: Callable[[TrainSettings, Data], nn.Module]
    build_mixture: Callable[[TrainSettings, Data], tuple[list[Task], Mixture]]
    validation_parts: Callable[[TrainSettings, Data], list[tuple[Task, Part]]]
    head: str | None = None
    about: Callable[[Data], dict[str, Any]] = lambda data: {}


def start(settings: TrainSettings, run: Path, kind: Kind) -> dict[str, Any]:
    """Start a run in the folder `run`, or go on with the one that is there.

    Returns:
        The summary that the command prints.

    Raises:
        SettingsDiffer: the folder holds a run with other settings; the sentence names the differences.
        BadInput: databases or checkpoints do not fit.
    """
    with processes(settings.device) as everyone:
        if not everyone.writes:
            logging.getLogger().setLevel(logging.ERROR)
        return _start(settings, run, kind, everyone)


def _start(asked: TrainSettings, run: Path, kind: Kind, everyone: Processes) -> dict[str, Any]:
    earlier = _earlier_settings(run)
    settings = asked if earlier is None else _as_before(asked, earlier, run)
    data = kind.open_data(settings)
    settings = kind.complete(settings, *data.size(), everyone)
    tokenizer = tokenizer_of_texts([*data.training.values(), *data.validation.values()], start=settings.from_)
    model = kind.build_model(settings, data).to(everyone.device)
    _set_attention(model, settings.attention, everyone.device)
    data = _that_fit(data, model)
    tasks, mixture = kind.build_mixture(settings, data)
    optimizer = AdamW(
        parameter_groups(
            model,
            weight_decay=settings.optimizer.weight_decay,
            head=kind.head,
            head_rate_multiplier=settings.optimizer.head_rate_multiplier or 1.0,
        ),
        lr=1.0,  # set before every update
        betas=settings.optimizer.betas,
        eps=settings.optimizer.epsilon,
    )
    if everyone.writes and earlier is None:
        # Not before all is known to fit: what was refused leaves no run in the way of the mended command.
        run.mkdir(parents=True, exist_ok=True)
        write_config(run / CONFIG_FILE, settings)
    everyone.wait_for_all()
    progressed = state.resume(run, model=model, optimizer=optimizer, read_model=lambda folder: read_model(folder, model))
    accumulation = settings.accumulation or 1
    if progressed is None:
        progressed = state.Progressed(seed=settings.seed)
        everyone.copy_from_first(parameter.data for parameter in model.parameters())
    else:
        logger.info("resuming after update %s", f"{progressed.step:,}")
        accumulation = _accumulation_of_resumed(progressed, everyone.world)
        if accumulation != settings.accumulation:
            logger.info("an update keeps its %d micro-batches: %d on each of %d", progressed.micro_batches, accumulation, everyone.world)
    about = {"task": kind.task, **kind.about(data)}
    masking = Masking(settings.masking.words, settings.masking.regions)
    learner = Learner(
        model=model,
        optimizer=optimizer,
        tasks=tasks,
        mixture=mixture,
        assembler=Assembler(mixture.parts, settings.seed, masking),
        validation=kind.validation_parts(settings, data),
        workers=_workers(settings, everyone),
        write_model=lambda folder: write_model(folder, model, about=about, tokenizer=tokenizer),
    )
    _say_what_is_trained(settings, data, model, progressed, everyone)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_fitting_threads(learner.model, everyone.device))
        log = None
        if everyone.writes:
            writing = RunLog(run, step=progressed.step, tensorboard=settings.tensorboard, wandb_project=settings.wandb_project)
            log = stack.enter_context(writing)
        recipe = _recipe(settings, accumulation)
        summary = train(learner, recipe, run=run, log=log, progressed=progressed, processes=everyone)
    return {"run": str(run), **summary}


SPLIT_FROM_WIDTH = 256  # hidden columns


@contextlib.contextmanager
def _fitting_threads(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Compute a narrow model with one thread: its operations are too short to be shared (measured on two cores: 16 updates a
    second instead of 9), and on a busy machine threads that wait for each other lose far more.
    """
    before = torch.get_num_threads()
    config = getattr(model, "config", None)
    if device.type == "cpu" and isinstance(config, UniterConfig) and config.hidden_size < SPLIT_FROM_WIDTH:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def with_validation(wanted: CorpusSettings, corpus: Corpus, settings: TrainSettings, options: dict[str, Any]) -> tuple[Corpus, Corpus]:
    """The training part of a corpus and what is validated: its validation databases, or pictures that are held out."""
    if wanted.validation_text:
        held_out = open_corpus(
            wanted.name,
            wanted.validation_text,
            wanted.validation_images or wanted.images,
            max_text_length=-1,
            image_options=options,
        )
    else:
        pictures = len(set(corpus.image_rows_NK[:, 0].tolist()))
        if pictures < 3:
            raise BadInput(
                f"corpus {wanted.name!r} has {pictures} pictures, too few to hold one out; give validation_text or more pictures"
            )
        count = settings.validation_pictures or min(max(pictures // 20, 2), 1000)
        corpus, held_out = corpus.hold_out(min(count, pictures - 2), seed=settings.seed)
        if not len(corpus):
            raise BadInput(f"corpus {wanted.name!r}: all texts are about the pictures to hold out; give validation_text or more pictures")
    return corpus, held_out.sample_of(settings.validation_examples, seed=settings.seed)


def _set_attention(model: nn.Module, kernel: AttentionKernel, device: torch.device) -> None:
    body = model.get_submodule("uniter")
    assert isinstance(body, UniterModel)
    body.attention_kernel = kernel
    if kernel != "varlen":
        return
    if device.type != "cuda":
        raise BadInput(f"attention: varlen needs a GPU, and this run is on {device}; leave attention out")
    logger.warning("attention: varlen drops no attention probabilities; all other dropout stays")
    for module in model.modules():
        if isinstance(module, SelfAttention):
            module.dropout.p = 0.0


def _that_fit(data: Data, model: nn.Module) -> Data:
    """The data without validation texts that are longer than the model's positions.

    Raises:
        BadInput: a text to train on is, or all validation texts are; better now than in the middle of the run.
    """
    config = getattr(model, "config", None)
    assert isinstance(config, UniterConfig)
    positions = config.max_position_embeddings
    for corpus in data.training.values():
        longest, most = int(corpus.text_lengths_N.max()), positions - special_tokens(corpus)
        if longest > most:
            raise BadInput(
                f"a text of {longest} word pieces does not fit the model's {positions} positions; "
                f"set max_text_length to {most} or less, which leaves longer ones out"
            )
    validation = {}
    for name, corpus in data.validation.items():
        fitting = np.flatnonzero(corpus.text_lengths_N <= positions - special_tokens(corpus))
        if not len(fitting):
            raise BadInput(f"corpus {name!r}: all validation texts are longer than the model's {positions} positions; give shorter ones")
        if len(fitting) < len(corpus):
            logger.warning(
                "corpus %s: %d validation texts are longer than the model's positions and left out", name, len(corpus) - len(fitting)
            )
        validation[name] = corpus.take(fitting)
    return dataclasses.replace(data, validation=validation)


def tokenizer_of_texts(corpora: Iterable[Corpus], *, start: str | None = None) -> Tokenizer | None:
    """What the texts were tokenised with; None where they do not tell (published databases that name another than BERT-cased).

    Args:
        corpora: must agree; one may have words of a task behind the others' vocabulary.
        start: the checkpoint that will read them, which must agree as well where it tells its vocabulary.

    Raises:
        BadInput: two of them differ: the numbers of the word pieces would mean different words.
    """
    own: dict[str, Tokenizer] = {}
    for text in (text for corpus in corpora for text in corpus.texts):
        if (text.path / VOCABULARY_FILE).is_file():
            own[str(text.path)] = Tokenizer.load(text.path)
        elif text.tokenizer_name in ON_BOARD:
            own[str(text.path)] = Tokenizer.load(text.tokenizer_name)
    if start is not None and (of_start := tokenizer_beside(find_weights(start))) is not None:
        own[start] = of_start
    names = sorted(own, key=lambda name: own[name].vocab_size)
    for smaller, larger in itertools.pairwise(names):
        one, other = own[smaller], own[larger]
        if one.vocabulary != other.vocabulary[: len(one.vocabulary)] or one.lowercase != other.lowercase:
            raise BadInput(
                f"{smaller} has other word pieces ({one.name}, {one.vocab_size:,}) than {larger} ({other.name}, {other.vocab_size:,}); "
                f"build the texts with one tokeniser: uniter-build-db --tokenizer {larger if start is None else find_weights(start).parent}"
            )
    return own[names[-1]] if names else None


def regions_to_read(images: Sequence[str], *preferred: Mapping[str, Any]) -> dict[str, Any]:
    """Which rows are taken from published region databases: the first selection that all of them have, else the reader's own.

    Ours hold their selection, so that any fits.
    """
    for selection in preferred:
        with contextlib.suppress(BadInput):
            open_image_dbs(list(images), **selection)
            return dict(selection)
    return {}


def regions_of_run(start: str) -> list[dict[str, Any]]:
    """The rows that a run was trained with; none where `start` is no run, nor one of its checkpoints."""
    found = run_of(find_weights(start)) if Path(start).exists() else None  # what is not here may be on the hub: no run
    return [] if found is None else [found[1].regions.model_dump()]


def check_fit(config: UniterConfig, corpus: Corpus, *, source: str) -> None:
    """Raise BadInput unless a model of these sizes can read the corpus."""
    width, vocabulary = corpus.images.feature_width, vocabulary_of(corpus)
    if config.image_feature_size != width:
        raise BadInput(f"region features are {width} wide, but {source} was trained on {config.image_feature_size}; use its detector")
    if config.vocab_size < vocabulary:
        raise BadInput(f"the texts were built with {vocabulary:,} word pieces, but {source} has {config.vocab_size:,}; use its tokenizer")


def _recipe(settings: TrainSettings, accumulation: int) -> Recipe:
    chosen = settings.optimizer
    assert settings.steps and chosen.learning_rate and chosen.warmup_steps is not None and settings.validate_every
    return Recipe(
        steps=settings.steps,
        accumulation=accumulation,
        learning_rate=chosen.learning_rate,
        warmup_steps=chosen.warmup_steps,
        clip=-1.0 if chosen.clip is None else chosen.clip,
        normalisation=settings.normalisation,
        unused_gradients=chosen.unused_gradients,
        precision=settings.precision,
        seed=settings.seed,
        validate_every=settings.validate_every,
        checkpoint_every=settings.checkpoint_every or settings.validate_every,
        keep=settings.keep,
        stop_after=settings.stop_after,
    )


def _earlier_settings(run: Path) -> TrainSettings | None:
    path = run / CONFIG_FILE
    if path.is_file():
        return read_settings(yaml.safe_load(path.read_text(encoding="utf-8")), source=str(path))
    # A command that was killed while it wrote its settings has not begun a run.
    if run.is_dir() and any(path.name != f".{CONFIG_FILE}.incoming" for path in run.iterdir()):
        raise BadInput(f"{run} is not empty and no run of uniter-train (it holds no {CONFIG_FILE}); give another --out")
    return None


def _as_before(asked: TrainSettings, earlier: TrainSettings, run: Path) -> TrainSettings:
    """What was left open is as the run chose it; what was said must be what the run was started with."""
    merged = _fill(asked.model_dump(mode="json", by_alias=True), earlier.model_dump(mode="json", by_alias=True))
    settings = read_settings(merged, source="the repeated command")
    changed = differences(earlier, settings)
    if changed:
        raise SettingsDiffer(f"{run} holds a run with other settings ({'; '.join(changed)}); repeat its command or give another --out")
    return settings


def _fill(value: Any, earlier: Any) -> Any:
    if isinstance(value, dict) and isinstance(earlier, dict):
        # Corpora that name no tasks keep naming none; everything else that is open is as it was.
        return {key: _fill(inner, earlier.get(key)) if key not in STAYS_OPEN else inner for key, inner in value.items()}
    return earlier if value is None else value


STAYS_OPEN = {"stop_after", "device", "workers", "wandb_project", "tasks"}


def _accumulation_of_resumed(progressed: state.Progressed, world: int) -> int:
    """As many micro-batches an update as before, shared by however many processes there are now."""
    accumulation, rest = divmod(progressed.micro_batches, world)
    if rest:
        raise BadInput(
            f"the run makes an update of {progressed.micro_batches} micro-batches, which {world} processes cannot share evenly; "
            "resume with a number of processes that divides it"
        )
    return accumulation


def _workers(settings: TrainSettings, everyone: Processes) -> int:
    if settings.workers is not None:
        return settings.workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # Without a GPU the cores are busy with the model; one worker hides the reading and costs little.
    return min(max((cores - here) // here, 1), 8) if everyone.device.type == "cuda" else 0


def _say_what_is_trained(settings: TrainSettings, data: Data, model: nn.Module, progressed: state.Progressed, everyone: Processes) -> None:
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    for name, corpus in data.training.items():
        logger.info(
            "corpus %s: %s examples, %s held out for validation; tasks %s",
            name,
            f"{len(corpus):,}",
            f"{len(data.validation[name]):,}",
            ", ".join(f"{task} {ratio:g}" for task, ratio in data.tasks[name].items()),
        )
    logger.info(
        "model: %.1f million parameters on %s x %d, %s; %s updates of %d x %d micro-batches of %s tokens, learning rate %.3g",
        millions,
        everyone.device,
        everyone.world,
        settings.precision,
        f"{settings.steps:,}",
        settings.accumulation,
        everyone.world,
        f"{settings.batch_tokens:,}",
        settings.optimizer.learning_rate,
    )
