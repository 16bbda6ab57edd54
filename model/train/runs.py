"""A run from its settings, whatever is trained: choose what was left open, resume, train.

Here the settings are unpacked; below, no function receives all of them. What differs between pre-training and a down-stream
task is a `Kind`.
"""

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from uniter.datasets.batches.example import Masking
from uniter.datasets.batches.loader import Assembler
from uniter.datasets.errors import BadInput, SettingsDiffer
from uniter.datasets.storage.run_log import RunLog
from uniter.model.attention import AttentionKernel
from uniter.model.checkpoints.load import read_model
from uniter.model.checkpoints.write import write_model
from uniter.model.settings.files import CONFIG_FILE, differences, read_settings, write_config
from uniter.model.settings.settings import TrainSettings
from uniter.model.train import state
from uniter.model.train.distributed import Processes, processes
from uniter.model.train.fit import that_fit, tokenizer_of_texts
from uniter.model.train.kind import Data, Kind
from uniter.model.train.loop import Learner, Recipe, train
from uniter.model.train.optim import AdamW, parameter_groups
from uniter.model.uniter import SelfAttention, UniterConfig, UniterModel

logger = logging.getLogger(__name__)


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
    data = that_fit(data, model)
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
