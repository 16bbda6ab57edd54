"""The only training loop.

An update: the task drawn for its number, its micro-batches forward and backward, one sum over all processes, one step. All
that is random is a function of the seed and of the update's number: the task, the batches, the masks, and dropout, whose
generator is set anew for each micro-batch. So a resumed run equals an unbroken one, and two processes equal one that
accumulates twice as long.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from uniter.datasets.batches.collate import PackedBatch
from uniter.datasets.batches.example import Masking
from uniter.datasets.batches.filling import Room, only_real
from uniter.datasets.batches.loader import Assembler, MicroBatch, load, on_device
from uniter.datasets.batches.order import generator
from uniter.datasets.batches.plans import Mixture, Part
from uniter.datasets.devices import computing_in
from uniter.datasets.progress import Progress
from uniter.datasets.runs.run_log import RunLog
from uniter.datasets.runs.step_folders import BEST, CHECKPOINTS
from uniter.datasets.stopping import Stopped, told_to_stop
from uniter.model import losses
from uniter.model.heads.pretraining import Outputs
from uniter.model.settings.settings import AdversarialSettings
from uniter.model.tasks.task import Head, Task
from uniter.model.train import adversarial, state
from uniter.model.train.best import Figures, rank_of, relative_loss, remember_validations
from uniter.model.train.distributed import Processes
from uniter.model.train.finite import PerBatch, check_finite
from uniter.model.train.optim import AdamW, begin_with_zero_gradients, clear_gradients, clip_gradients, learning_rate, set_learning_rate
from uniter.model.train.scoring import Scoring, validate

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Recipe:
    """The numbers of a run; see config.py for what each means."""

    steps: int
    accumulation: int
    learning_rate: float
    warmup_steps: int
    clip: float
    normalisation: losses.Normalisation
    unused_gradients: Literal["none", "zero"]
    precision: str
    seed: int
    validate_every: int
    checkpoint_every: int
    keep: int
    look_every: int = 1
    stop_after: int | None = None
    adversarial: AdversarialSettings | None = None
    processes: int | None = None
    patience: int | None = None


@dataclass(frozen=True, slots=True)
class Learner:
    """What learns, and on what.

    Attributes:
        model: on the processes' device.
        optimizer: over its parameters.
        tasks: by the number of the mixture's part.
        mixture: which batch comes when.
        masking: chances of words and regions to be hidden.
        validation: parts to validate on, with their tasks.
        workers: processes that make batches.
        write_model: writes weights and model configuration into a folder.
        heads: of the tasks, as they are called (compiled or not). rooms: of the parts, up to which their batches are filled; none: not.
    """

    model: nn.Module
    optimizer: AdamW
    tasks: Sequence[Task]
    mixture: Mixture
    masking: Masking
    validation: Sequence[tuple[Task, Part]]
    workers: int
    write_model: Callable[[Path], None]
    heads: Sequence[Head]
    rooms: Sequence[Room | None] = ()


@dataclass(slots=True)
class _Window:
    """What an update's micro-batches on this process gave; numbers stay on the device until somebody looks at them."""

    rows: int = 0
    examples: int = 0
    tokens: int = 0
    computed: int = 0  # tokens and ghosts
    waited: float = 0.0
    sums: dict[str, list[Tensor]] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    per_batch: list[PerBatch] = field(default_factory=list)

    def add(self, name: str, total: Tensor, count: float) -> None:
        self.sums.setdefault(name, []).append(total.detach())
        self.counts[name] = self.counts.get(name, 0.0) + count


@dataclass(frozen=True, slots=True)
class _Made:
    """An update that was made; what came of it is still on the device.

    Attributes:
        step, part, rate: its number, that of its part in the mixture, and the learning rate.
        window: what this process's micro-batches gave.
        names: of the terms and metrics.
        totals: over all processes rows, examples, tokens, computed rows, who was told to stop, the counts by name, the sums by name; then
            the gradient's norm.
    """

    step: int
    part: int
    rate: float
    window: _Window
    names: Sequence[str]
    totals: Tensor


@dataclass(frozen=True, slots=True)
class _Update:
    """An update that was made: what all processes together know of it.

    Attributes:
        step: its number. name: its part's.
        loss: the terms weighted as in training. means: of each term and metric.
        rate, norm: learning rate, and the gradient's norm before it was clipped.
        examples, tokens: what it was made of. padding: the share of ghosts in what was computed.
        stop: a process was told to stop.
        seconds: how long it took. waited: for its batches, here.
    """

    step: int
    name: str
    loss: float
    means: dict[str, float]
    rate: float
    norm: float
    examples: int
    tokens: int
    padding: float
    stop: bool
    seconds: float
    waited: float

    def logged(self, budget: int) -> dict[str, Any]:
        """The figures of its line in the log; `budget` is what its batches hold at most."""
        return {
            "part": self.name,
            "loss": self.loss,
            **{f"{self.name}/{key}": value for key, value in {"loss": self.loss, **self.means}.items()},
            "learning_rate": self.rate,
            "grad_norm": self.norm,
            "examples": self.examples,
            "tokens": self.tokens,
            "tokens_per_second": self.tokens / self.seconds,
            "padding_share": self.padding,
            "budget_fill": self.tokens / budget,
            "data_wait_share": min(self.waited / self.seconds, 1.0),
            "seconds": self.seconds,
        }


def train(
    learner: Learner, recipe: Recipe, *, run: Path, log: RunLog | None, progressed: state.Progressed, processes: Processes
) -> dict[str, Any]:
    """Train from `progressed` to the last update (or `stop_after`, or until patience is at its end), in place.

    Returns:
        A summary: steps, examples, tokens, the latest validation figures by part, how long it took; `best`, if patience ended it.

    Raises:
        NotFinite: with step, task, terms and example ids. The last checkpoint is untouched.
        Stopped: SIGTERM or SIGINT came; a checkpoint was written.
    """
    mixture, world = learner.mixture, processes.world
    last = min(recipe.steps, recipe.stop_after or recipe.steps)
    taken = [progressed.taken.get(part.name, 0) for part in mixture.parts]
    loaded = load(
        mixture, learner.masking, taken, first_step=progressed.step + 1, last_step=last, accumulation=recipe.accumulation,
        rank=processes.rank, world=world, workers=learner.workers, pin_memory=processes.device.type == "cuda", rooms=learner.rooms,
    )  # fmt: skip
    batches = on_device(loaded, processes.device)
    figures: Figures = {}
    began = settled = time.monotonic()
    learner.model.train()
    learner.optimizer.unusable = torch.zeros((), device=processes.device)
    if recipe.unused_gradients == "zero":
        begin_with_zero_gradients(learner.optimizer)
    remember_validations(run, progressed, learner.validation, processes)
    progress = Progress(recipe.steps, unit="updates", label="training", done=progressed.step) if processes.writes else None
    shown: dict[str, float] = {}
    made: list[_Made] = []
    if (progressed.step >= last or out_of_patience(progressed, recipe)) and processes.writes:
        logger.info("%s is already trained, to update %s of %s: nothing is left to do", run, f"{progressed.step:,}", f"{recipe.steps:,}")
    with told_to_stop() as told:
        while progressed.step < last and not out_of_patience(progressed, recipe):
            made.append(_update(learner, recipe, batches, progressed=progressed, told=told, processes=processes))
            step = progressed.step
            validating = bool(learner.validation) and (step % recipe.validate_every == 0 or step == recipe.steps)
            saving = step == last or step % recipe.checkpoint_every == 0
            if not (validating or saving or step % recipe.look_every == 0):
                continue
            updates = _looked_at(made, learner, progressed, since=settled, processes=processes)
            made, settled = [], time.monotonic()
            _tell(updates, shown, log, progress, budget=mixture.budget * recipe.accumulation * world)
            best, stop = False, updates[-1].stop
            if validating:
                figures = _validate_all(learner, recipe, processes=processes)
                best = _note_validation(figures, learner, progressed, log)
            # What is best has a checkpoint, wherever they are due.
            if best or stop or saving or out_of_patience(progressed, recipe):
                _checkpoint(learner, recipe, run, progressed, log, processes)
            if stop and step < last:
                if progress is not None:
                    progress.close()
                number = int(max(processes.gather(told[0] if told else 0)))
                raise Stopped.after(step, recipe.steps, number)
            settled = time.monotonic()
    if progress is not None:
        progress.close()
    return {
        "steps": progressed.step,
        "of_steps": recipe.steps,
        "examples": progressed.examples,
        "tokens": progressed.tokens,
        "seconds": round(time.monotonic() - began, 1),
        "validation": figures,
        **_ended_early(progressed, recipe, run, processes),
    }


def _ended_early(progressed: state.Progressed, recipe: Recipe, run: Path, processes: Processes) -> dict[str, Any]:
    """What the summary of a run says that patience ended; said in the log, too."""
    if progressed.best is None or not out_of_patience(progressed, recipe):
        return {}
    step = progressed.best[2]
    if processes.writes:
        logger.info("no better validation since update %s: the run ends, and its best is %s", f"{step:,}", run / CHECKPOINTS / BEST)
    return {"best": step}


def out_of_patience(progressed: state.Progressed, recipe: Recipe) -> bool:
    """Whether as many validations in a row as the recipe bears were no better than the best one; told by their updates alone, so that a
    run that is repeated knows it as well."""
    if recipe.patience is None or progressed.best is None or progressed.step >= recipe.steps:
        return False
    return progressed.step // recipe.validate_every - progressed.best[2] // recipe.validate_every >= recipe.patience


def _tell(updates: Sequence[_Update], shown: dict[str, float], log: RunLog | None, progress: Progress | None, *, budget: int) -> None:
    """Write updates into the log and show them; `shown` are the parts' losses, smoothed."""
    for update in updates:
        shown[update.name] = 0.9 * shown.get(update.name, update.loss) + 0.1 * update.loss
        if log is not None:
            log.write(update.step, "train", update.logged(budget))
        if progress is not None:
            progress.update(1, **{"tokens/s": update.tokens / update.seconds, **shown})


def _update(
    learner: Learner,
    recipe: Recipe,
    batches: Iterator[MicroBatch],
    *,
    progressed: state.Progressed,
    told: Sequence[int],
    processes: Processes,
) -> _Made:
    """Make the next update: gradients of all processes, one step of the optimizer; `progressed` stands behind it afterwards.

    Nothing is read from the device. Where a number is not finite the device itself leaves the weights as they are, here and in all
    updates to come; whoever looks at the numbers next ends the run.
    """
    mixture, world = learner.mixture, processes.world
    step = progressed.step + 1
    part = mixture.part_at(step)
    parameters = [parameter for parameter in learner.model.parameters() if parameter.requires_grad]
    window = _backward(learner, recipe, batches, part=part, processes=processes)
    names = sorted(window.sums)
    totals = processes.total(
        [window.rows, window.examples, window.tokens, window.computed, float(bool(told)), *(window.counts[key] for key in names)],
        torch.stack([torch.stack(window.sums[key]).double().sum() for key in names]),
    )
    processes.sum_gradients(parameters)
    if recipe.normalisation == "global-mean":
        _normalise(parameters, (1 / totals[0].clamp(min=1)).float())
    elif (averaged := recipe.processes or world) > 1:
        _normalise(parameters, torch.full((), 1 / averaged, device=totals.device))
    norm = clip_gradients(parameters, recipe.clip)
    totals = torch.cat([totals, norm.double().view(1)])
    assert learner.optimizer.unusable is not None
    learner.optimizer.unusable.copy_(torch.maximum(learner.optimizer.unusable, (~torch.isfinite(totals).all()).float()))
    rate = learning_rate(step, base=recipe.learning_rate, warmup_steps=recipe.warmup_steps, total_steps=recipe.steps)
    set_learning_rate(learner.optimizer, rate)
    learner.optimizer.step()
    clear_gradients(learner.optimizer, recipe.unused_gradients)
    progressed.step = step
    name = mixture.parts[part].name
    progressed.taken[name] = progressed.taken.get(name, 0) + recipe.accumulation * world
    return _Made(step, part, rate, window, names, totals)


def _looked_at(
    made: Sequence[_Made], learner: Learner, progressed: state.Progressed, *, since: float, processes: Processes
) -> list[_Update]:
    """What came of some updates, with one wait for the device; `progressed` counts their examples and tokens.

    Args:
        since: when the first of them began.

    Raises:
        NotFinite: of the first of them whose numbers are not.
    """
    assembler = Assembler(learner.mixture.parts, learner.mixture.seed, learner.masking)
    numbers = iter(torch.cat([one.totals for one in made]).tolist())
    seconds = max(time.monotonic() - since, 1e-9) / len(made)
    updates = []
    for one in made:
        task, name = learner.tasks[one.part], learner.mixture.parts[one.part].name
        _, examples, tokens, computed, stop = (next(numbers) for _ in range(5))
        counts = {key: next(numbers) for key in one.names}
        means = {key: next(numbers) / max(counts[key], 1.0) for key in one.names}
        norm = next(numbers)
        check_finite(means, norm, one.window.per_batch, assembler, step=one.step, part=name, processes=processes)
        loss = sum(means[key] * task.weights.get(key.removeprefix("loss_"), 1.0) for key in one.names if key.startswith("loss_"))
        progressed.examples += int(examples)
        progressed.tokens += int(tokens)
        waited = one.window.waited
        made_of = int(examples), int(tokens), 1 - tokens / computed
        updates.append(_Update(one.step, name, loss, means, one.rate, norm, *made_of, bool(stop), seconds, waited))
    return updates


def _backward(learner: Learner, recipe: Recipe, batches: Iterator[MicroBatch], *, part: int, processes: Processes) -> _Window:
    """This process's micro-batches of one update: gradients add up in the parameters, sums and counts in the window.

    Under global-mean the gradients are those of sums over rows; they are divided once, by the rows of all processes.
    """
    task, window = learner.tasks[part], _Window()
    for _ in range(recipe.accumulation):
        waiting = time.monotonic()
        made = next(batches)
        window.waited += time.monotonic() - waiting
        assert made.plan.part == part
        # Dropout is a function of (seed, update, micro-batch), whichever process computes it.
        torch.manual_seed(int(generator(recipe.seed, "dropout", made.plan.step, made.plan.number).integers(2**62)))
        outputs, targets, loss = _forward_backward(task, learner.heads[part], learner.model, made.batch, recipe)
        window.rows += loss.rows
        window.examples += len(made.batch)
        window.tokens += made.batch.tokens
        window.computed += made.batch.rows
        with torch.no_grad():
            for name, (total, count) in loss.sums.items():
                window.add(f"loss_{name}", total, count)
            for name, values in task.metric(outputs, targets).items():
                window.add(name, values.sum(), len(values))
        window.per_batch.append((made.plan, made.batch.example_ids, {name: total for name, (total, _) in loss.sums.items()}))
    return window


def _forward_backward(task: Task, head: Head, model: nn.Module, batch: PackedBatch, recipe: Recipe) -> tuple[Outputs, Outputs, losses.Loss]:
    """Add a micro-batch's gradients to the parameters; what the head said and the targets, both without ghosts, and the loss."""
    computing = partial(computing_in, recipe.precision, batch.input_ids_T.device)
    if recipe.adversarial is not None:
        return adversarial.forward_backward(
            task, head, model, batch, recipe.adversarial, normalisation=recipe.normalisation, computing=computing
        )
    with computing():
        outputs, targets = only_real(head(model, task.narrowed(model, batch)), batch)
        terms = task.losses(outputs, targets)
    loss = losses.of(terms, weights=task.weights, reduction=task.reduction, normalisation=recipe.normalisation)
    loss.number.backward()  # type: ignore[no-untyped-call]
    return outputs, targets, loss


def _normalise(parameters: Sequence[Tensor], factor: Tensor) -> None:
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, factor)


def _validate_all(learner: Learner, recipe: Recipe, *, processes: Processes) -> Figures:
    examples = sum(len(part.corpus) for _, part in learner.validation)
    scoring = Scoring(learner.model, processes, learner.mixture.budget, recipe.seed, learner.masking, precision=recipe.precision)
    with scoring.shown(examples, unit="examples", label="validating", brief=True) as scoring:
        return {part.name: validate(scoring, task, part) for task, part in learner.validation}


def _note_validation(figures: Figures, learner: Learner, progressed: state.Progressed, log: RunLog | None) -> bool:
    """Log a validation; True if it is the best so far."""
    if progressed.first is None:
        progressed.first = {name: values["loss"] for name, values in figures.items()}
    found = rank_of(figures, learner.validation, progressed.first)
    best = progressed.best is None or found < progressed.best[:2]
    if best:
        progressed.best = (*found, progressed.step)
    if log is not None:
        flat = {f"{part}/{name}": value for part, values in figures.items() for name, value in values.items()}
        loss = sum(values["loss"] for values in figures.values()) / len(figures)
        log.write(progressed.step, "validation", {"loss": loss, "relative_loss": relative_loss(figures, progressed.first), **flat})
        shown = "; ".join(
            f"{part} " + " ".join(f"{name} {value:.4g}" for name, value in values.items() if not name.startswith("loss_"))
            for part, values in figures.items()
        )
        logger.info("validation after update %s: %s", f"{progressed.step:,}", shown)
    return best


def _checkpoint(
    learner: Learner, recipe: Recipe, run: Path, progressed: state.Progressed, log: RunLog | None, processes: Processes
) -> None:
    progressed.micro_batches = recipe.accumulation * processes.world
    progressed.seed = recipe.seed
    if processes.writes:
        if log is not None:
            log.flush()
        state.save(run, progressed, write_model=learner.write_model, model=learner.model, optimizer=learner.optimizer, keep=recipe.keep)
    # Nobody is ahead of a checkpoint: a process that fails afterwards fails behind it.
    processes.wait_for_all()
