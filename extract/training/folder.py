"""The folder of a detector in training: claimed, check-pointed, logged, finished."""

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from uniter.datasets.errors import BadInput, SettingsDiffer
from uniter.datasets.storage.files import sha256_of, write_json
from uniter.extract.training.labelled_images import LabelledImages

log = logging.getLogger(__name__)

FORMAT_VERSION = 1


# ----------------------------------------------------------------------------------------------------------------- checkpoints


def save_checkpoint(
    out: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, validations: Sequence[Mapping[str, Any]]
) -> None:
    """Write `checkpoints/step-N/` aside, let it appear by rename, point `latest` to it, remove older ones."""
    folder = out / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"step-{step}"
    if not target.exists():
        partial = folder / f"step-{step}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, partial / "model.safetensors")
        moments = {
            f"{number}.{name}": value.contiguous()
            for number, values in optimizer.state_dict()["state"].items()
            for name, value in values.items()
            if isinstance(value, Tensor)
        }
        save_file(moments, partial / "optimizer.safetensors")
        write_json(partial / "state.json", {"step": step, "validations": list(validations)})
        for file in partial.iterdir():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        partial.rename(target)
    link = folder / "latest.tmp"
    link.unlink(missing_ok=True)
    link.symlink_to(target.name)
    link.replace(folder / "latest")
    for old in folder.glob("step-*"):
        if old != target:
            shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(out: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, list[dict[str, Any]]]:
    """Continue from the newest whole checkpoint: the number of finished updates, 0 where there is none; and the validations so far."""
    steps = [int(path.name[5:]) for path in (out / "checkpoints").glob("step-*") if path.name[5:].isdigit()]
    if not steps:
        return 0, []
    folder = out / "checkpoints" / f"step-{max(steps)}"
    try:
        model.load_state_dict(load_file(folder / "model.safetensors"))
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in load_file(folder / "optimizer.safetensors").items():
            number, _, part = name.partition(".")
            moments.setdefault(int(number), {})[part] = value
        optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return int(state["step"]), list(state["validations"])
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{folder} cannot be read ({' '.join(str(error).split())[:200]}); remove that folder to start anew") from error


class DetectorLog:
    """`log.jsonl` and TensorBoard events; what stands behind the checkpoint that a run continues from is cut off."""

    def __init__(self, out: Path, *, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        path = out / "log.jsonl"
        kept = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):
                    if json.loads(line)["step"] <= step:
                        kept.append(line + "\n")
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(path)
        self._file = path.open("a", encoding="utf-8")
        self._events = SummaryWriter(str(out), purge_step=step + 1 if step else None)

    def write(self, step: int, kind: str, figures: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, "kind": kind, **figures}) + "\n")
        self._file.flush()
        for name, value in figures.items():
            self._events.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        self._file.close()
        self._events.close()


def claim(out: Path, settings: Mapping[str, Any], *, overwrite: bool) -> None:
    """Write `settings.json`, or check that the one that is there says the same."""
    path = out / "settings.json"
    if overwrite:
        for name in ("settings.json", "detector.json", "model.safetensors", "config.yaml", "log.jsonl"):
            (out / name).unlink(missing_ok=True)
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
        for events in out.glob("events.out.tfevents.*"):
            events.unlink()
    if path.exists():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise BadInput(f"{path} is damaged ({error}); pass --overwrite to start anew") from error
        if found != settings:
            known = found if isinstance(found, dict) else {}
            differing = ", ".join(
                f"{name} {known.get(name)} there, {value} now" for name, value in settings.items() if known.get(name) != value
            )
            raise SettingsDiffer(f"{out} holds a run with other settings ({differing}); choose another --out or pass --overwrite")
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, settings)


def finish(out: Path, network: nn.Module, labelled: LabelledImages, *, attribute_names: Sequence[str], training: Mapping[str, Any]) -> None:
    """Write the weights and, last, `detector.json`: from then on the folder is a detector."""
    # The thumbnail layer and BatchNorm's count of batches matter to training only.
    tensors = {
        name: tensor.cpu().contiguous()
        for name, tensor in network.state_dict().items()
        if not name.startswith("roi_heads.box_predictor.thumbnail.") and not name.endswith(".num_batches_tracked")
    }
    temporary = out / "model.safetensors.tmp"
    save_file(tensors, temporary)
    temporary.replace(out / "model.safetensors")
    write_json(
        out / "detector.json",
        {
            **{"format": FORMAT_VERSION, "config": "config.yaml", "weights": "model.safetensors"},
            **{"sha256": sha256_of(out / "model.safetensors"), "class_names": list(labelled.class_names)},
            **{"attribute_names": list(attribute_names), "training": dict(training)},
        },
    )


def training_log(out: str | Path) -> Iterator[dict[str, Any]]:
    """The lines of a detector's `log.jsonl`."""
    for line in (Path(out) / "log.jsonl").read_text(encoding="utf-8").splitlines():
        yield json.loads(line)
