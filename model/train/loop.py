"""The only training loop.

An update: the task drawn for its number, its micro-batches forward and backward, one sum over all processes, one step. All
that is random is a function of the seed and of the update's number: the task, the batches, the masks, and dropout, whose
generator is set anew for each micro-batch. So a resumed run equals an unbroken one, and two processes equal one that
accumulates twice as long.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from uniter.datasets.batches.collate import PackedBatch
from uniter.datasets.batches.loader import Assembler, MicroBatch, load
from uniter.datasets.batches.order import generator
from uniter.datasets.batches.plans import Mixture, Part, Plan
from uniter.datasets.errors import UniterError
from uniter.datasets.progress import Progress
from uniter.datasets.stopping import Stopped, told_to_stop
from uniter.datasets.storage.run_log import RunLog
from uniter.model import losses
from uniter.model.tasks.task import Task
from uniter.model.train import state
from uniter.model.train.distributed import Processes
from uniter.model.train.optim import clear_gradients, clip_gradients, learning_rate, set_learning_rate
from uniter.model.train.scoring import validate

logger = logging.getLogger(__name__)

Normalisation = Literal["global-mean", "published"]


class NotFinite(UniterError):
    """A loss or gradient became infinite or no number."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """The numbers of a run; see config.py for what each means."""

    steps: int
    accumulation: int
    learning_rate: float
    warmup_steps: int
    clip: float
    normalisation: Normalisation
    unused_gradients: Literal["none", "zero"]
    precision: str
    seed: int
    validate_every: int
    checkpoint_every: int
    keep: int
    stop_after: int | None = None


@dataclass(frozen=True, slots=True)
class Learner:
    """What learns, and on what.

    Attributes:
        model: on the processes' device.
        optimizer: over its parameters.
        tasks: by the number of the mixture's part.
        mixture: which batch comes when. assembler: makes it.
        validation: parts to validate on, with their tasks.
        workers: processes that make batches.
        write_model: writes weights and model configuration into a folder.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    tasks: Sequence[Task]
    mixture: Mixture
    assembler: Assembler
    validation: Sequence[tuple[Task, Part]]
    workers: int
    write_model: Callable[[Path], None]


@dataclass(slots=True)
class _Window:
    """What an update's micro-batches on this process gave; numbers stay on the device until the update is done."""

    rows: int = 0
    examples: int = 0
    tokens: int = 0
    waited: float = 0.0
    sums: dict[str, list[Tensor]] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    per_batch: list[tuple[Plan, list[str], dict[str, Tensor]]] = field(default_factory=list)  # not the batches: they are large

    def add(self, name: str, total: Tensor, count: float) -> None:
        self.sums.setdefault(name, []).append(total.detach())
        self.counts[name] = self.counts.get(name, 0.0) + count


def train(
    learner: Learner, recipe: Recipe, *, run: Path, log: RunLog | None, progressed: state.Progressed, processes: Processes
) -> dict[str, Any]:
    """Train from `progressed` to the last update (or `stop_after`), in place.

    Returns:
        A summary: steps, examples, tokens, the latest validation figures by part, and how long it took.

    Raises:
        NotFinite: with step, task, terms and example ids. The last checkpoint is untouched.
        Stopped: SIGTERM or SIGINT came; a checkpoint was written.
    """
    model, mixture, world = learner.model, learner.mixture, processes.world
    last = min(recipe.steps, recipe.stop_after or recipe.steps)
    taken = [progressed.taken.get(part.name, 0) for part in mixture.parts]
    plans = mixture.plans(
        taken, first_step=progressed.step + 1, last_step=last, accumulation=recipe.accumulation, rank=processes.rank, world=world
    )
    batches = load(learner.assembler, plans, workers=learner.workers, pin_memory=processes.device.type == "cuda")
    figures: dict[str, dict[str, float]] = {}
    began = time.monotonic()
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    progress = Progress(recipe.steps, unit="updates", label="training", done=progressed.step) if processes.writes else None
    shown: dict[str, float] = {}
    with told_to_stop() as told:
        while progressed.step < last:
            started = time.monotonic()
            step = progressed.step + 1
            part = mixture.part_at(step)
            window = _backward(learner, recipe, batches, part=part, processes=processes)
            names = sorted(window.sums)
            rows, examples, tokens, stop, *totals = processes.total(
                [window.rows, window.examples, window.tokens, float(told[0] if told else 0)]
                + _numbers([torch.stack(window.sums[name]).double().sum() for name in names])
                + [window.counts[name] for name in names]
            )
            sums, counts = totals[: len(names)], totals[len(names) :]
            processes.sum_gradients(parameters)
            _normalise(parameters, 1 / world if recipe.normalisation == "published" else 1 / max(rows, 1.0))
            norm = float(clip_gradients(parameters, recipe.clip))
            means = {name: total / max(count, 1.0) for name, total, count in zip(names, sums, counts, strict=True)}
            _check_finite(means, norm, window, learner.assembler, step=step, part=mixture.parts[part].name, processes=processes)
            rate = learning_rate(step, base=recipe.learning_rate, warmup_steps=recipe.warmup_steps, total_steps=recipe.steps)
            set_learning_rate(learner.optimizer, rate)
            learner.optimizer.step()
            clear_gradients(learner.optimizer, recipe.unused_gradients)

            progressed.step = step
            name = mixture.parts[part].name
            progressed.taken[name] = progressed.taken.get(name, 0) + recipe.accumulation * world
            progressed.examples += int(examples)
            progressed.tokens += int(tokens)
            seconds = max(time.monotonic() - started, 1e-9)
            task = learner.tasks[part]
            loss = sum(means[key] * task.weights.get(key.removeprefix("loss_"), 1.0) for key in names if key.startswith("loss_"))
            shown[name] = loss if name not in shown else 0.9 * shown[name] + 0.1 * loss
            if log is not None:
                log.write(
                    step,
                    "train",
                    {
                        "part": name,
                        "loss": loss,
                        **{f"{name}/{key}": value for key, value in {"loss": loss, **means}.items()},
                        "learning_rate": rate,
                        "grad_norm": norm,
                        "examples": int(examples),
                        "tokens": int(tokens),
                        "tokens_per_second": tokens / seconds,
                        # Nothing is padded; what remains is how full the batches are.
                        "padding_share": 0.0,
                        "budget_fill": tokens / (mixture.budget * recipe.accumulation * world),
                        "data_wait_share": min(window.waited / seconds, 1.0),
                        "seconds": seconds,
                    },
                )
            if progress is not None:
                progress.update(1, **{"tokens/s": tokens / seconds, **shown})
            ends = step == last
            if learner.validation and (step % recipe.validate_every == 0 or step == recipe.steps):
                figures = _validate_all(learner, recipe, processes=processes)
                _note_validation(figures, progressed, log)
            if stop or ends or step % recipe.checkpoint_every == 0:
                _checkpoint(learner, recipe, run, progressed, log, processes)
            if stop and not ends:
                if progress is not None:
                    progress.close()
                number = int(max(processes.gather(told[0] if told else 0)))
                raise Stopped.after(step, recipe.steps, number)
    if progress is not None:
        progress.close()
    return {
        "steps": progressed.step,
        "of_steps": recipe.steps,
        "examples": progressed.examples,
        "tokens": progressed.tokens,
        "seconds": round(time.monotonic() - began, 1),
        "validation": figures,
    }


def _backward(learner: Learner, recipe: Recipe, batches: Iterator[MicroBatch], *, part: int, processes: Processes) -> _Window:
    """This process's micro-batches of one update: gradients add up in the parameters, sums and counts in the window.

    Under global-mean the gradients are those of sums over rows; they are divided once, by the rows of all processes.
    """
    task, device = learner.tasks[part], processes.device
    window = _Window()
    for _ in range(recipe.accumulation):
        waiting = time.monotonic()
        made = next(batches)
        window.waited += time.monotonic() - waiting
        assert made.plan.part == part
        # Dropout is a function of (seed, update, micro-batch), whichever process computes it.
        torch.manual_seed(int(generator(recipe.seed, "dropout", made.plan.step, made.plan.number).integers(2**62)))
        batch = made.batch.to(device, non_blocking=True)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=recipe.precision == "bf16"):
            outputs = task.head(learner.model, batch)
            terms = task.losses(outputs, batch.targets)
        _loss(terms, task, recipe.normalisation).backward()  # type: ignore[no-untyped-call]
        window.rows += next(iter(terms.values())).shape[0]
        window.examples += len(made.batch)
        window.tokens += made.batch.tokens
        with torch.no_grad():
            for name, term in terms.items():
                total, count = losses.sum_and_count(term, "elements" if task.reduction == "elements" else "rows")
                window.add(f"loss_{name}", total, count)
            for name, values in task.metric(outputs, batch.targets).items():
                window.add(name, values.sum(), len(values))
        sums = {name: term.detach().sum() for name, term in terms.items()}
        window.per_batch.append((made.plan, made.batch.example_ids, sums))
    return window


def _loss(terms: Mapping[str, Tensor], task: Task, normalisation: Normalisation) -> Tensor:
    """What one micro-batch differentiates: the published mean, or under global-mean the sum over rows of each row's share."""
    if normalisation == "published":
        return losses.training_loss(terms, weights=task.weights, reduction=task.reduction)
    rows = {name: term.shape[0] for name, term in terms.items()}
    if len(set(rows.values())) != 1:
        raise ValueError(f"the terms of a task must have equally many rows, got {rows}")
    per_row = {
        name: term.flatten(1).mean(dim=1) if term.dim() > 1 and task.reduction == "elements" else term for name, term in terms.items()
    }
    return losses.training_loss(per_row, weights=task.weights, reduction="sum")


def _normalise(parameters: Sequence[Tensor], factor: float) -> None:
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if factor != 1 and gradients:
        torch._foreach_mul_(gradients, factor)


def _numbers(tensors: Sequence[Tensor]) -> list[float]:
    """Many 0-d tensors as numbers with one wait for the device."""
    values: list[float] = torch.stack(list(tensors)).tolist()
    return values


def _check_finite(
    means: Mapping[str, float], norm: float, window: _Window, assembler: Assembler, *, step: int, part: str, processes: Processes
) -> None:
    """Stop the run, on every process, before a step with infinite or undefined numbers is taken."""
    values = torch.tensor([*means.values(), norm], dtype=torch.float64)
    if bool(torch.isfinite(values).all()):
        return
    here: list[tuple[list[str], list[str], list[str]]] = []
    for plan, ids, sums in window.per_batch:
        terms = [name for name, total in sums.items() if not bool(torch.isfinite(total))]
        if terms:
            # The batch is a function of its plan: made once more, to look for what is wrong with it.
            here.append((terms, ids, _examples_with_bad_features(assembler[plan].batch)))
    found = [entry for one in processes.gather(here) for entry in one]
    if not found:
        raise NotFinite(
            f"update {step}, {part}: the gradient's norm is {norm} although every loss is finite; lower optimizer.learning_rate, "
            "or train in fp32"
        )
    terms = sorted({name for names, _, _ in found for name in names})
    ids = [name for _, names, _ in found for name in names]
    bad = [name for _, _, names in found for name in names]
    blamed = f"; features that are no finite numbers: {_some(bad)}" if bad else ""
    raise NotFinite(
        f"update {step}, {part}: {', '.join(terms)} is not finite (examples {_some(ids)}{blamed}); nothing was updated. "
        f"{'Check the region databases with uniter-db check' if bad else 'Lower optimizer.learning_rate, or train in fp32'}"
    )


def _examples_with_bad_features(batch: PackedBatch) -> list[str]:
    """The ids of the examples whose features are not finite (of tasks with one sequence an example)."""
    if len(batch.region_counts_B) != len(batch.example_ids):
        return []
    finite_R = torch.isfinite(batch.features_RD).all(dim=1)
    for name in ("features", "soft_labels"):
        if name in batch.targets and batch.masked_regions_R is not None:
            finite_R[batch.masked_regions_R] &= torch.isfinite(batch.targets[name]).all(dim=1)
    parts = torch.split(finite_R, batch.region_counts_B.tolist())
    return [name for name, rows in zip(batch.example_ids, parts, strict=True) if not bool(rows.all())]


def _some(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _validate_all(learner: Learner, recipe: Recipe, *, processes: Processes) -> dict[str, dict[str, float]]:
    figures = {}
    for task, part in learner.validation:
        figures[part.name] = validate(
            learner.model,
            task,
            part,
            budget=learner.mixture.budget,
            seed=recipe.seed,
            masking=learner.assembler.masking,
            processes=processes,
            precision=recipe.precision,
            workers=0,
        )
    return figures


def _note_validation(figures: Mapping[str, Mapping[str, float]], progressed: state.Progressed, log: RunLog | None) -> None:
    loss = sum(part["loss"] for part in figures.values()) / len(figures)
    if progressed.best is None or loss < progressed.best[0]:
        progressed.best = (loss, progressed.step)
    if log is not None:
        flat = {f"{part}/{name}": value for part, values in figures.items() for name, value in values.items()}
        log.write(progressed.step, "validation", {"loss": loss, **flat})
    shown = "; ".join(
        f"{part} " + " ".join(f"{name} {value:.4g}" for name, value in values.items() if not name.startswith("loss_"))
        for part, values in figures.items()
    )
    if log is not None:
        logger.info("validation after update %s: %s", f"{progressed.step:,}", shown)


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
