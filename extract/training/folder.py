"""The folder of a detector in training: claimed, check-pointed, finished.

OUT/settings.json, config.yaml, log.jsonl, held_out.json, checkpoints/step-N/, and at the end model.safetensors and detector.json
"""

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from uniter.datasets.errors import BadInput
from uniter.datasets.runs.held_out import HELD_OUT_FILE
from uniter.datasets.runs.run_log import LOG_FILE
from uniter.datasets.runs.step_folders import CHECKPOINTS, checkpoint_path, checkpoint_steps, write_step
from uniter.datasets.storage.claims import Claim, Maker, claim, refuse_source_inside
from uniter.datasets.storage.files import read_json_object, sha256_of, write_json
from uniter.datasets.storage.locks import only_writer
from uniter.datasets.storage.tensors import write_tensors
from uniter.extract.training.labelled_images import LabelledImage, LabelledImages
from uniter.extract.training.plan import FORMAT_VERSION
from uniter.extract.training.running_mean import RunningMean

CONFIG: Final = "config.yaml"
WEIGHTS: Final = "model.safetensors"
DESCRIPTION: Final = "detector.json"
DETECTOR = Maker("a detector", DESCRIPTION, (CONFIG, WEIGHTS, LOG_FILE, HELD_OUT_FILE, CHECKPOINTS, "events.out.tfevents.*"))


@contextlib.contextmanager
def training_folder(
    out: Path,
    settings: Mapping[str, Any],
    *,
    photographs: Mapping[str, Any],
    files: Sequence[str | Path],
    overwrite: bool,
) -> Iterator[Claim]:
    """Claim the folder and be the only one who trains in it.

    Args:
        out: the folder as the user names it.
        settings: all that decides the weights, but for the photographs.
        photographs: see `content_of_photographs`.
        files: what is read besides; none of it may lie in `out`.
        overwrite: train anew, beside what is there.

    Raises:
        SettingsDiffer: it holds a training with other settings or of other photographs.
        BadInput: it holds something else.
        UniterError: another process trains there.
    """
    for file in files:
        refuse_source_inside(out, Path(file))
    with contextlib.ExitStack() as held:
        if out.is_dir():  # before anything of what another training left is taken away
            held.enter_context(only_writer(out, doing="training"))
            yield claim(out, settings, maker=DETECTOR, sources={"images": photographs}, overwrite=overwrite)
        else:
            claimed = claim(out, settings, maker=DETECTOR, sources={"images": photographs}, overwrite=overwrite)
            held.enter_context(only_writer(claimed.folder, doing="training"))
            yield claimed


def content_of_photographs(folder: Path, images: Sequence[LabelledImage]) -> dict[str, Any]:
    """What `claims.content_of` says of a folder, of the photographs that are used alone: their names and sizes."""
    digest = hashlib.sha256()
    for path in sorted(image.path for image in images):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\n".encode(errors="surrogateescape"))
    return {"name": folder.name, "names_and_sizes": digest.hexdigest()}


# ----------------------------------------------------------------------------------------------------------------- checkpoints


def save_checkpoint(
    out: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    mean: RunningMean,
    *,
    validations: Sequence[Mapping[str, Any]],
    broken: Sequence[int],
) -> None:
    """Write the checkpoint of an update in the place of the one before."""

    def fill(folder: Path) -> None:
        write_tensors(folder / "model.safetensors", model.state_dict())
        moments = {
            f"{number}.{name}": value
            for number, values in optimizer.state_dict()["state"].items()
            for name, value in values.items()
            if isinstance(value, Tensor)
        }
        write_tensors(folder / "optimizer.safetensors", moments)
        if mean.tensors:
            write_tensors(folder / "mean.safetensors", mean.tensors)
        write_json(folder / "state.json", {"step": step, "validations": list(validations), "broken": list(broken)})

    write_step(out, step, fill, keep=1)


def load_checkpoint(
    out: Path, model: nn.Module, optimizer: torch.optim.Optimizer, mean: RunningMean
) -> tuple[int, list[dict[str, Any]], set[int]]:
    """Continue from the newest checkpoint.

    Returns:
        The number of finished updates, 0 where there is no checkpoint; the validations so far; the images that could not be decoded.
    """
    steps = checkpoint_steps(out)
    if not steps:
        return 0, [], set()
    folder = checkpoint_path(out, steps[-1])
    try:
        model.load_state_dict(load_file(folder / "model.safetensors"))
        if mean.tensors:
            mean.load(load_file(folder / "mean.safetensors"))
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in load_file(folder / "optimizer.safetensors").items():
            number, _, part = name.partition(".")
            moments.setdefault(int(number), {})[part] = value
        optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
        state = read_json_object(folder / "state.json")
        return int(state["step"]), list(state["validations"]), set(state.get("broken", ()))
    except (BadInput, OSError, SafetensorError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{folder} cannot be read ({' '.join(str(error).split())[:200]}); remove that folder to start anew") from error


# ------------------------------------------------------------------------------------------------------------------ at the end


def finish(out: Path, network: nn.Module, labelled: LabelledImages, *, attributes: int, training: Mapping[str, Any]) -> None:
    """Write the weights and, last, `detector.json`: from then on the folder is a detector."""
    # The thumbnail layer and BatchNorm's count of batches matter to training only.
    tensors = {
        name: tensor
        for name, tensor in network.state_dict().items()
        if not name.startswith("roi_heads.box_predictor.thumbnail.") and not name.endswith(".num_batches_tracked")
    }
    write_tensors(out / WEIGHTS, tensors)
    write_json(
        out / DESCRIPTION,
        {
            **{"format": FORMAT_VERSION, "config": CONFIG, "weights": WEIGHTS},
            **{"sha256": sha256_of(out / WEIGHTS), "class_names": list(labelled.class_names)},
            **{"attribute_names": list(labelled.attribute_names[:attributes]), "training": dict(training)},
        },
    )


def figures_of(out: Path) -> dict[str, Any]:
    """What a finished detector's training came to."""
    figures = read_json_object(out / DESCRIPTION).get("training")
    return dict(figures) if isinstance(figures, dict) else {}
