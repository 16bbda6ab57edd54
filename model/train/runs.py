"""A run from its settings, whatever is trained: choose what was left open, resume, train.

Here the settings are unpacked; below, no function receives all of them. What differs between pre-training and a down-stream
task is the value `Work`.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from uniter.datasets.batches.example import Masking
from uniter.datasets.batches.filling import Room, room_of
from uniter.datasets.errors import BadInput, SettingsDiffer, UniterError
from uniter.datasets.image_db.origin import RegionOrigin
from uniter.datasets.runs.run_log import RunLog
from uniter.datasets.storage.contents import content_of
from uniter.datasets.storage.index_file import INDEX
from uniter.datasets.storage.locks import only_writer
from uniter.datasets.text_db.tokenizer import Tokenizer
from uniter.model.checkpoints.beside import DETECTOR
from uniter.model.checkpoints.load import read_model
from uniter.model.checkpoints.write import write_model
from uniter.model.settings.files import CONFIG_FILE, differences, load_config, read_settings, write_config
from uniter.model.settings.settings import TrainSettings
from uniter.model.tasks.compiling import compiled_head
from uniter.model.train import state
from uniter.model.train.adversarial import with_divergence
from uniter.model.train.distributed import Processes, processes
from uniter.model.train.fit import check_detector, has_seen_regions, origin_of_start, remarks_on, tokenizer_of_texts
from uniter.model.train.loop import Learner, Recipe, train
from uniter.model.train.optim import AdamW, parameter_groups
from uniter.model.train.work import Data, Work
from uniter.model.uniter import UniterConfig, UniterModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Begun:
    """A run directory that nobody else writes to, and what is known before the data are opened.

    Attributes:
        run: the directory.
        settings: as asked; what was left open is as the run chose it, where there is one already.
        earlier: the settings of the run that is there; None of a new one.
        everyone: the processes that train it.
        alone: what keeps others away until the end.
    """

    run: Path
    settings: TrainSettings
    earlier: TrainSettings | None
    everyone: Processes
    alone: contextlib.ExitStack

    def detector(self, data: Data) -> RegionOrigin | None:
        """Whose regions the data hold, once it is known that they are those of the run and of what it starts from."""
        meant, start, corpora = self.settings.other_detector, self.settings.from_, [*data.training.values(), *data.validation.values()]
        if self.settings.detector is not None:
            source = str(self.run) if self.earlier is not None else "the detector that the settings name"
            check_detector(corpora, RegionOrigin.from_dict(self.settings.detector), source=source, meant=meant)
        if start is not None and self.earlier is None and has_seen_regions(start):
            return check_detector(corpora, origin_of_start(start), source=start, meant=meant)
        return check_detector(corpora, None, source=None, meant=meant)

    def remarks(self, data: Data) -> list[str]:
        """What is to be known of the regions, see `remarks_on`; of a run that goes on, too, as long as what it started from is there."""
        start = self.settings.from_
        known = None if start is None or (self.earlier is not None and not Path(start).exists()) else origin_of_start(start)
        return remarks_on([*data.training.values(), *data.validation.values()], known, source=start)

    def tokenizer(self, data: Data) -> Tokenizer | None:
        """What the texts were tokenised with, once it is known that they agree with each other and with what the run starts from."""
        return tokenizer_of_texts([*data.training.values(), *data.validation.values()], start=self.settings.from_)

    def claim(self) -> None:
        """Let nobody else train in the directory until this run ends.

        Raises:
            UniterError: somebody does, or has begun a run there since we looked.
        """
        _by_the_first(self.everyone, self._claim)

    def _claim(self) -> None:
        self.alone.enter_context(only_writer(self.run, doing="training in"))
        if self.earlier is None and (self.run / CONFIG_FILE).is_file():
            raise UniterError(f"another command has begun a run in {self.run} meanwhile; repeat this one to go on with it")


@contextlib.contextmanager
def begun(asked: TrainSettings, run: Path) -> Iterator[Begun]:
    """Begin a run in the folder `run`, or go on with the one that is there. Nothing is written before all is known to fit.

    Raises:
        SettingsDiffer: the folder holds a run with other settings; the sentence names the differences.
        BadInput: the folder holds other things.
        UniterError: another process trains in it.
    """
    with processes(asked.device) as everyone, contextlib.ExitStack() as alone:
        if not everyone.writes:
            logging.getLogger().setLevel(logging.ERROR)
        earlier = _earlier_settings(run)
        start = Begun(run, asked if earlier is None else _as_before(asked, earlier, run), earlier, everyone, alone)
        if earlier is not None:
            start.claim()
        yield start


def contents_of_data(data: Data, known: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What tells the contents of the databases, by path: of ours as `content_of` says it, of published ones the size.

    Args:
        known: what this function gave earlier.
    """
    found: dict[str, dict[str, Any]] = {}
    corpora = (*data.training.values(), *data.validation.values())
    # Each once: held-out pictures are in the databases of those that are trained on, and corpora share databases.
    for path in dict.fromkeys(path for corpus in corpora for path in (*(text.path for text in corpus.texts), *corpus.images.folders)):
        if (path / INDEX).is_file():
            found[str(path)] = content_of(path, known.get(str(path)))
        elif (path / "data.mdb").is_file():  # to read it all would take longer than many a run
            found[str(path)] = {"bytes": (path / "data.mdb").stat().st_size}
    return found


def _check_contents(progressed: state.Progressed, data: Data, run: Path) -> None:
    """Let the run remember what its databases hold; raise SettingsDiffer where it learnt from other contents before."""
    now, changed = contents_of_data(data, progressed.contents), []
    for name, content in now.items():
        before = progressed.contents.get(name, content)
        if any(before[field] != content[field] for field in ("index", "sha256", "bytes") if field in before and field in content):
            changed.append(name)
    if changed:
        named = ", ".join(changed[:3]) + (" ..." if len(changed) > 3 else "")
        raise SettingsDiffer(f"{run} has learnt from other contents of {named}; bring them back, or give another --out")
    progressed.contents |= now


def _by_the_first(everyone: Processes, act: Callable[[], None]) -> None:
    """Let the first process do it alone; if that fails, all of them fail."""
    error: UniterError | None = None
    if everyone.writes:
        try:
            act()
        except UniterError as caught:
            error = caught
    if problem := everyone.gather("" if error is None else str(error))[0]:
        raise error or UniterError(problem)


def learn(start: Begun, work: Work, *, tokenizer: Tokenizer | None, detector: RegionOrigin | None) -> dict[str, Any]:
    """Train to the end, or to `stop_after`, from where the run is.

    Args:
        tokenizer: of the texts; it is written into each checkpoint.
        detector: whose regions they are; it is, too.

    Returns:
        The summary that the command prints.
    """
    everyone, run, model = start.everyone, start.run, work.model.to(start.everyone.device)
    remarks = start.remarks(work.data)
    settings = _with_detector(work.settings, detector)
    _set_computing(model, settings, everyone.device)
    optimizer = AdamW(
        parameter_groups(
            model,
            weight_decay=settings.optimizer.weight_decay,
            head=work.head,
            head_rate_multiplier=settings.optimizer.head_rate_multiplier or 1.0,
        ),
        lr=1.0,  # set before every update
        betas=settings.optimizer.betas,
        eps=settings.optimizer.epsilon,
    )
    if start.earlier is None:
        start.claim()
    if everyone.writes and (start.earlier is None or (detector is not None and start.earlier.detector is None)):
        # An older run is stamped with what is known of its regions now.
        write_config(run / CONFIG_FILE, settings if start.earlier is None else _with_detector(start.earlier, detector))
    everyone.wait_for_all()
    progressed = state.resume(run, model=model, optimizer=optimizer, read_model=lambda folder: read_model(folder, model))
    accumulation = _accumulation(settings, start, progressed)
    if progressed is None:
        progressed = state.Progressed(seed=settings.seed)
        everyone.copy_from_first(parameter.data for parameter in model.parameters())
    else:
        logger.info("resuming after update %s", f"{progressed.step:,}")
    _by_the_first(everyone, lambda: _check_contents(progressed, work.data, run))
    about = {"task": settings.task, **work.about, **({} if detector is None else {DETECTOR: detector.to_dict()})}
    masking = Masking(settings.masking.words, settings.masking.regions)
    learner = Learner(
        model=model,
        optimizer=optimizer,
        tasks=[with_divergence(task, settings.adversarial) for task in work.tasks],
        mixture=work.mixture,
        masking=masking,
        validation=work.validation,
        workers=everyone.fitting_workers() if settings.workers is None else settings.workers,
        write_model=lambda folder: write_model(folder, model, about=about, tokenizer=tokenizer),
        heads=[compiled_head(task) if settings.compile and task.compiles else task.head for task in work.tasks],
        rooms=_rooms(work) if settings.compile else (),
    )
    _say_what_is_trained(settings, work.data, model, everyone)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_fitting_threads(learner.model, everyone.device))
        stack.enter_context(_products_in_tf32(settings.precision in ("tf32", "bf16") and everyone.device.type == "cuda"))
        log = None
        if everyone.writes:
            writing = RunLog(run, step=progressed.step, tensorboard=settings.tensorboard, wandb_project=settings.wandb_project)
            log = stack.enter_context(writing)
        recipe = _recipe(settings, accumulation, everyone.device)
        summary = train(learner, recipe, run=run, log=log, progressed=progressed, processes=everyone)
    return {"run": str(run), **summary, **({"remarks": remarks} if remarks else {})}


def _with_detector(settings: TrainSettings, detector: RegionOrigin | None) -> TrainSettings:
    return settings if detector is None else settings.model_copy(update={"detector": detector.to_dict()})


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


@contextlib.contextmanager
def _products_in_tf32(wanted: bool) -> Iterator[None]:
    """Let what stays float32 be multiplied in TF32 while a run trains that may (under bf16 everything else is less exact still)."""
    before = torch.get_float32_matmul_precision()
    if wanted:
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _set_computing(model: nn.Module, settings: TrainSettings, device: torch.device) -> None:
    kernel = settings.attention
    body = model.get_submodule("uniter")
    assert isinstance(body, UniterModel)
    body.attention_kernel, body.encoder.recompute = kernel, settings.recompute
    if kernel != "auto" and device.type != "cuda":
        raise BadInput(f"attention: {kernel} is a kernel of GPUs, and this run is on {device}; leave attention out")
    if settings.precision == "tf32" and device.type != "cuda":
        raise BadInput(f"precision: tf32 is a way of GPUs, and this run is on {device}; leave precision out")


def _rooms(work: Work) -> list[Room | None]:
    """Up to which sizes the batches of each part are filled, where its head is compiled."""
    parts = zip(work.tasks, work.mixture.parts, strict=True)
    return [room_of(part, budget=work.mixture.budget) if task.compiles else None for task, part in parts]


LOOK_EVERY = 20  # updates, on a GPU: while the host waits for a number, the device runs out of work


def _recipe(settings: TrainSettings, accumulation: int, device: torch.device) -> Recipe:
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
        precision=settings.precision or "fp32",
        seed=settings.seed,
        validate_every=settings.validate_every,
        checkpoint_every=settings.checkpoint_every or settings.validate_every,
        keep=settings.keep,
        look_every=settings.look_every or (LOOK_EVERY if device.type == "cuda" else 1),
        stop_after=settings.stop_after,
        adversarial=settings.adversarial,
        processes=settings.processes,
        patience=settings.patience,
    )


def _earlier_settings(run: Path) -> TrainSettings | None:
    path = run / CONFIG_FILE
    if path.is_file():
        return read_settings(load_config(str(path)), source=str(path))
    # A command that was killed while it wrote its settings has not begun a run.
    if run.is_dir() and any(path.name != f".{CONFIG_FILE}.incoming" for path in run.iterdir()):
        raise BadInput(f"{run} is not empty and no run of uniter-train (it holds no {CONFIG_FILE}); give another --out")
    return None


def _as_before(asked: TrainSettings, earlier: TrainSettings, run: Path) -> TrainSettings:
    """What was left open is as the run chose it; what was said must be what the run was started with."""
    before = earlier.model_dump(mode="json", by_alias=True)
    merged = _fill(asked.model_dump(mode="json", by_alias=True), before)
    # Compared before it is validated: together with what the run chose, another setting may be impossible for a reason nobody gave.
    changed = differences(before, merged)
    if changed:
        raise SettingsDiffer(f"{run} holds a run with other settings ({'; '.join(changed)}); repeat its command or give another --out")
    return read_settings(merged, source="the repeated command")


def _fill(value: Any, earlier: Any) -> Any:
    if isinstance(value, dict) and isinstance(earlier, dict):
        # Corpora that name no tasks keep naming none; everything else that is open is as it was.
        return {key: _fill(inner, earlier.get(key)) if key not in STAYS_OPEN else inner for key, inner in value.items()}
    return earlier if value is None else value


STAYS_OPEN = {"stop_after", "device", "workers", "wandb_project", "tasks"}


def _accumulation(settings: TrainSettings, start: Begun, progressed: state.Progressed | None) -> int:
    """Micro-batches of an update on each process: as asked of a new run; of one that goes on, as many together as before.

    Raises:
        SettingsDiffer: another number was asked for.
    """
    asked, earlier, world = settings.accumulation or 1, start.earlier, start.everyone.world
    begun = _share(asked, settings.processes, world)
    accumulation = begun if progressed is None else _accumulation_of_resumed(progressed, world)
    if earlier is not None and asked not in (earlier.accumulation or 1, accumulation):
        before = earlier.accumulation if progressed is None else progressed.micro_batches
        raise SettingsDiffer(
            f"{start.run} makes its updates of {before} micro-batches, and accumulation: {asked} on {world} process(es) would change that; "
            "leave accumulation out, or give another --out"
        )
    if accumulation != asked:
        logger.info("an update keeps its %d micro-batches: %d on each of %d", accumulation * world, accumulation, world)
    return accumulation


def _share(accumulation: int, processes: int | None, world: int) -> int:
    """Micro-batches of each of `world` processes, where so many processes of the settings have `accumulation` each."""
    share, rest = divmod(accumulation * (processes or world), world)
    if rest:
        raise BadInput(
            f"an update is of {processes} x {accumulation} micro-batches (processes, accumulation), which {world} processes cannot share "
            "evenly; train with a number of processes that divides it"
        )
    return share


def _accumulation_of_resumed(progressed: state.Progressed, world: int) -> int:
    """As many micro-batches an update as before, shared by however many processes there are now."""
    accumulation, rest = divmod(progressed.micro_batches, world)
    if rest:
        raise BadInput(
            f"the run makes an update of {progressed.micro_batches} micro-batches, which {world} processes cannot share evenly; "
            "resume with a number of processes that divides it"
        )
    return accumulation


def _say_what_is_trained(settings: TrainSettings, data: Data, model: nn.Module, everyone: Processes) -> None:
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
