"""What a run leaves to be read: `log.jsonl`, TensorBoard events, on request Weights & Biases.

One line an update, one a validation. After a resume the lines behind the checkpoint are cut off and written again, so that
the file equals an unbroken run's (but for what the clock says).
"""

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from uniter.datasets.errors import BadInput

LOG_FILE, WANDB_FILE = "log.jsonl", "wandb.json"


class RunLog:
    """Writes one run's log; only the first process makes one.

    Args:
        run: the run directory.
        step: the update that the run stands after; what the log says of later ones is cut off.
        tensorboard: write events too.
        wandb_project: also send the figures to this Weights & Biases project.
    """

    def __init__(self, run: Path, *, step: int, tensorboard: bool = True, wandb_project: str | None = None) -> None:
        path = run / LOG_FILE
        _cut(path, step)
        self._file = path.open("a", encoding="utf-8", buffering=1)  # whoever looks sees whole lines
        self._events = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(run), purge_step=step + 1 if step else None)
        self._wandb = _open_wandb(wandb_project, run) if wandb_project else None

    def write(self, step: int, kind: str, figures: Mapping[str, Any]) -> None:
        """Append one line: {"step", "kind", ...figures}; numbers also go to the curves under the figure's name."""
        self._file.write(json.dumps({"step": step, "kind": kind, **figures}) + "\n")
        numbers = {name: value for name, value in figures.items() if isinstance(value, int | float) and not isinstance(value, bool)}
        if self._events is not None:
            for name, value in numbers.items():
                self._events.add_scalar(f"{kind}/{name}", value, step)
        if self._wandb is not None:
            self._wandb.log({f"{kind}/{name}": value for name, value in numbers.items()}, step=step)

    def flush(self) -> None:
        """Make durable what was written: called before each checkpoint, so that no checkpoint is ahead of its log."""
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._events is not None:
            self._events.flush()

    def close(self) -> None:
        """Close the file, and what TensorBoard and wandb were told."""
        self._file.close()
        if self._events is not None:
            self._events.close()
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def read_log(run: Path) -> list[dict[str, Any]]:
    """All whole lines of a run's log."""
    path = run / LOG_FILE
    if not path.is_file():
        raise BadInput(f"{run} holds no {LOG_FILE}; is it a run directory of uniter-train?")
    return [line for _, line in _whole_lines(path.read_bytes())]


def _cut(path: Path, step: int) -> None:
    """Drop all behind the last line of an update up to `step` (a killed run may have written on, or half a line)."""
    if not path.exists():
        return
    end = 0
    for line_end, line in _whole_lines(path.read_bytes()):
        if line.get("step", 0) > step:
            break
        end = line_end
    with path.open("r+b") as file:
        file.truncate(end)


def _whole_lines(content: bytes) -> list[tuple[int, dict[str, Any]]]:
    """(where the line ends, the line) until the first that is cut off."""
    lines, end = [], 0
    for raw in content.splitlines(keepends=True):
        end += len(raw)
        try:
            line = json.loads(raw)
        except ValueError:
            break
        if not raw.endswith(b"\n") or not isinstance(line, dict):
            break
        lines.append((end, line))
    return lines


def _open_wandb(project: str, run: Path) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise BadInput("wandb_project is set, but wandb is not installed; pip install 'uniter-toolkit[wandb]' or leave it out") from error
    # The same run there, however often the command is repeated here.
    known = run / WANDB_FILE
    if not known.is_file():
        known.write_text(json.dumps({"id": secrets.token_hex(4)}), encoding="utf-8")
    return wandb.init(project=project, dir=str(run), name=run.name, id=json.loads(known.read_text(encoding="utf-8"))["id"], resume="allow")
