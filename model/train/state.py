"""Checkpoints: complete or absent, safetensors and JSON only, the newest few and the best kept.

A checkpoint is written aside, made durable, and appears by rename; so a folder `step-N` is complete whatever killed the run.
No random state is saved because there is none: every draw is a function of the seed and of the update's number (loop.py).
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from uniter.datasets.errors import BadInput
from uniter.datasets.runs.step_folders import checkpoint_path, checkpoint_steps, write_step
from uniter.datasets.storage.tensors import write_tensors

STATE_FILE, OPTIMIZER_FILE = "state.json", "optimizer.safetensors"


@dataclass(slots=True)
class Progressed:
    """How far a run is: all that a resume needs beside weights and optimizer.

    Attributes:
        step: finished updates.
        taken: micro-batches taken from each part's stream, by the part's name.
        micro_batches: micro-batches of one update, of all processes together.
        examples, tokens: what the run has trained on so far.
        first: the loss of each part in the run's first validation, None before it.
        best: of the best validation so far the two numbers it is judged by (best.py) and its step, None before the first.
        seed: the run's seed.
        contents: what its databases hold, by path; empty in older runs.
    """

    step: int = 0
    taken: dict[str, int] = field(default_factory=dict)
    micro_batches: int = 1
    examples: int = 0
    tokens: int = 0
    first: dict[str, float] | None = None
    best: tuple[float, float, int] | None = None
    seed: int = 0
    contents: dict[str, dict[str, Any]] = field(default_factory=dict)


def save(
    run: Path,
    progressed: Progressed,
    *,
    write_model: Callable[[Path], None],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    keep: int,
) -> Path:
    """Write the checkpoint of `progressed.step`, point `latest` to it, remove old ones.

    Args:
        run: the run directory.
        progressed: how far the run is.
        write_model: writes weights and configuration into a folder.
        model, optimizer: the optimizer's state is saved by the model's parameter names.
        keep: how many of the newest checkpoints stay; the best one stays besides.
    """

    def fill(folder: Path) -> None:
        write_model(folder)
        tensors, numbers = optimizer_state(model, optimizer)
        write_tensors(folder / OPTIMIZER_FILE, tensors)
        (folder / STATE_FILE).write_text(json.dumps({**asdict(progressed), "optimizer": numbers}, indent=1), encoding="utf-8")

    best = progressed.best is not None and progressed.best[2] == progressed.step
    return write_step(run, progressed.step, fill, keep=keep, best=best)


def resume(run: Path, *, model: nn.Module, optimizer: torch.optim.Optimizer, read_model: Callable[[Path], None]) -> Progressed | None:
    """Load the newest checkpoint into model and optimizer; None if there is none yet.

    Raises:
        BadInput: the checkpoint does not fit the model.
    """
    steps = checkpoint_steps(run)
    if not steps:
        return None
    path = checkpoint_path(run, steps[-1])
    read_model(path)
    progressed, numbers = read_state(path)
    try:
        tensors = load_file(path / OPTIMIZER_FILE)
    except (OSError, SafetensorError) as error:
        raise BadInput(
            f"checkpoint {path}: cannot read {OPTIMIZER_FILE} ({error}); remove this folder to resume from the one before"
        ) from error
    restore_optimizer(model, optimizer, tensors, numbers, path)
    return progressed


def read_state(path: Path) -> tuple[Progressed, dict[str, dict[str, float]]]:
    """A checkpoint's `state.json`: how far it is, and the optimizer's numbers."""
    try:
        values = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        numbers = values.pop("optimizer")
        best = values.pop("best")
        # Of older runs it is a mean of losses and a step: what is best is told anew (best.py).
        return Progressed(**values, best=(best[0], best[1], best[2]) if best is not None and "first" in values else None), numbers
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(
            f"checkpoint {path}: cannot read {STATE_FILE} ({error}); remove this folder to resume from the one before"
        ) from error


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, dict[str, float]]]:
    """The optimizer's state by parameter name: tensors as `name|key`, and numbers as {name: {key: number}}."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, float]] = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}|{key}"] = value.detach().cpu().contiguous()
            else:
                numbers.setdefault(name, {})[key] = value
    return tensors, numbers


def restore_optimizer(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, Mapping[str, float]],
    path: Path,
) -> None:
    """The inverse of `optimizer_state`."""
    parameters = dict(model.named_parameters())
    for name, values in numbers.items():
        if name in parameters:
            optimizer.state[parameters[name]].update(values)
    for joint, tensor in tensors.items():
        name, key = joint.rsplit("|", 1)
        parameter = parameters.get(name)
        if parameter is None or (tensor.ndim and tensor.shape != parameter.shape):
            raise BadInput(f"checkpoint {path}: its optimizer state has {name!r} of shape {tuple(tensor.shape)}, which this model has not")
        # 0-d counters stay on the host, as torch's own optimizers keep them.
        optimizer.state[parameter][key] = tensor.to(parameter.device) if tensor.ndim else tensor
