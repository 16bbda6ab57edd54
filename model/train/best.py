"""Which of a run's validations is the best.

A down-stream model is judged by its task's metric; where that is equal, by the loss. A pre-trained one is judged by the loss of each of its
tasks relative to the run's first validation, averaged: a nat of masked words and the squared error of a feature are not to be added.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from uniter.datasets.batches.plans import Part
from uniter.datasets.runs.run_log import LOG_FILE, read_log
from uniter.datasets.runs.step_folders import BEST, CHECKPOINTS, checkpoint_path, checkpoint_steps, point
from uniter.model.tasks.task import Task
from uniter.model.train.distributed import Processes
from uniter.model.train.state import Progressed

Figures = dict[str, dict[str, float]]
"""Of a validation: part -> name -> value."""


def rank_of(figures: Figures, validated: Sequence[tuple[Task, Part]], first: Mapping[str, float]) -> tuple[float, float]:
    """Two numbers by which validations of a run are compared, the smaller the better.

    Args:
        figures: of the validation.
        validated: its parts with their tasks.
        first: the loss of each part in the run's first validation.
    """
    loss = relative_loss(figures, first)
    metrics = []
    for task, part in validated:
        if task.finetuning is not None and task.finetuning.best_by in figures[part.name]:
            metrics.append(figures[part.name][task.finetuning.best_by])
    return (-sum(metrics) / len(metrics), loss) if metrics else (loss, loss)


def relative_loss(figures: Figures, first: Mapping[str, float]) -> float:
    """The parts' losses relative to those of the first validation, averaged; 1 is as bad as then."""
    shares = [values["loss"] / max(first[name], 1e-12) for name, values in figures.items() if name in first]
    return sum(shares) / max(len(shares), 1)


def remember_validations(run: Path, progressed: Progressed, validated: Sequence[tuple[Task, Part]], processes: Processes) -> None:
    """Let a run of before its checkpoints knew of the first validation know it from its log, and the best checkpoint that is there."""
    if progressed.first is None and progressed.step and processes.writes and (run / LOG_FILE).is_file():
        kept = checkpoint_steps(run)
        for line in read_log(run):
            figures = _figures(line, validated)
            if line.get("kind") != "validation" or not figures:
                continue
            if progressed.first is None:
                progressed.first = {name: values["loss"] for name, values in figures.items()}
            found = (*rank_of(figures, validated, progressed.first), int(line["step"]))
            if line["step"] in kept and (progressed.best is None or found[:2] < progressed.best[:2]):
                progressed.best = found
        if progressed.best is not None:
            point(run / CHECKPOINTS / BEST, checkpoint_path(run, progressed.best[2]).name)
    (progressed.first, progressed.best) = processes.gather((progressed.first, progressed.best))[0]


def _figures(line: Mapping[str, Any], validated: Sequence[tuple[Task, Part]]) -> Figures:
    """What a line of the log says of the parts, where it says something of all."""
    found = {
        part.name: {key.removeprefix(f"{part.name}/"): value for key, value in line.items() if key.startswith(f"{part.name}/")}
        for _, part in validated
    }
    return found if all("loss" in values for values in found.values()) else {}
