"""Training a Faster R-CNN on COCO's instances: Detectron2's network, matching and losses in a loop that can be killed at any time.

What is easy to get wrong: a detector for UNITER is more than its boxes. Its features are all that the model sees of a picture, and a
detector that is only asked for classes forgets what its classes do not need (a circle's colour). So the box predictor is also asked
for the attributes where they are annotated, as Bottom-Up-Attention's, and, with or without annotations, for a coarse thumbnail of its
region; the thumbnail layer is left out of the finished detector.

Every update is a function of (seed, number of the update) and of the weights before it; so a resumed run equals an unbroken one.

Imports Detectron2: load this module only where a detector is trained.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch.utils.data import DataLoader

from uniter.datasets.errors import BadInput, UniterError, unknown_name
from uniter.datasets.progress import Progress, duration
from uniter.datasets.storage.files import sha256_of
from uniter.extract.detector.configuration import merged_config, read_config
from uniter.extract.detector.preparation import ShortestEdgePreparation
from uniter.extract.training.batches import CACHE_BYTES, Batches, Item, input_bytes
from uniter.extract.training.configs import MODELS, Schedule, configured, learning_rate_factor
from uniter.extract.training.evaluation import evaluate_boxes
from uniter.extract.training.folder import FORMAT_VERSION, DetectorLog, claim, finish, load_checkpoint, save_checkpoint
from uniter.extract.training.labelled_images import parts_of, read_labelled_images
from uniter.extract.training.predictor import build_network, start_from

log = logging.getLogger(__name__)

# -------------------------------------------------------------------------------------------------------------------- the run


def train_detector(
    images: str | Path,
    annotations: str | Path,
    out: str | Path,
    *,
    model: str = "tiny",
    config: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    from_weights: str | Path | None = None,
    val_annotations: str | Path | None = None,
    held_out: float = 0.1,
    attributes: bool = True,
    steps: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    checkpoint_every: int = 100,
    validate_every: int | None = None,
    seed: int = 0,
    device: str | None = None,
    workers: int | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Train a detector on COCO's instances; its folder is a `--detector` of `uniter-extract`. Repeating the call continues.

    Args:
        images: the folder in which the annotations' file names are found.
        annotations: COCO's instances JSON.
        out: the folder made; `detector.json`, written last, says that it is finished.
        model: "tiny" (minutes on two cores) or "r101-c4" (Bottom-Up-Attention's size; a GPU's work).
        config: a Detectron2 YAML of plain values that replaces the model's own configuration.
        overrides: single settings of Detectron2's by their dotted names.
        from_weights: a weight file to start from; what fits by name and shape is taken.
        val_annotations: held-out annotations of photographs in the same folder; otherwise `held_out` (a fraction) of the images are kept
            for validation, at most 500.
        attributes: learn attributes where they are annotated.
        steps, batch_size, learning_rate: None chooses what learns on such data; the rate is for the whole batch.
        checkpoint_every, validate_every: updates between them; validation falls on a third and two thirds and the end by default.
        device: None takes a GPU where there is one.
        workers: processes that decode; none where all photographs fit into memory.
        overwrite: start anew where the folder holds another run.

    Returns:
        The summary: counts, what was skipped, steps, and `ap`, `ap50` ... of the held-out part.

    Raises:
        BadInput: annotations, configuration or weights cannot be used.
        SettingsDiffer: the folder holds a run with other settings.
        UniterError: the loss is no number any more, or the device is not there.
    """
    if model not in MODELS:
        raise UniterError(unknown_name("model", model, MODELS))
    if not 0 < held_out < 1:
        raise BadInput(f"--held-out {held_out}: expected a fraction between 0 and 1")
    out, annotations = Path(out), Path(annotations)
    labelled = read_labelled_images(images, annotations)
    train, val, skipped = parts_of(labelled, images, val_annotations, held_out=held_out, seed=seed)
    attribute_count = len(labelled.attribute_names) if attributes else 0
    make_config, schedule = MODELS[model]
    cfg = configured(make_config(train) if config is None else merged_config(read_config(Path(config)), path=Path(config)), overrides)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.WEIGHTS = len(labelled.class_names), ""
    batch_size = batch_size or min(schedule.batch_size, len(train.images))
    steps = steps or int(np.clip(round(schedule.epochs * len(train.images) / batch_size), schedule.least_steps, schedule.most_steps))
    learning_rate = learning_rate or schedule.learning_rate * (batch_size / 16 if schedule.optimizer == "sgd" else 1)
    validate_every = validate_every or max(math.ceil(steps / 3), 1)
    settings = {
        **{"format": FORMAT_VERSION, "model": model, "annotations": annotations.name, "annotations_sha256": sha256_of(annotations)},
        **{"val_annotations_sha256": sha256_of(Path(val_annotations)) if val_annotations else None, "held_out": held_out},
        **{"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate, "attributes": attribute_count > 0, "seed": seed},
        **{"validate_every": validate_every, "from": sha256_of(Path(from_weights)) if from_weights else None},
        **{"config_sha256": hashlib.sha256(cfg.dump().encode()).hexdigest()},
    }
    claim(out, settings, overwrite=overwrite)
    described = {
        **{"train_images": len(train.images), "train_boxes": sum(len(image.boxes) for image in train.images)},
        **{"val_images": len(val.images), "classes": len(labelled.class_names), "attributes": attribute_count, "skipped": skipped},
    }
    if (out / "detector.json").exists():
        log.info("%s is finished already", out)
        trained = json.loads((out / "detector.json").read_text(encoding="utf-8"))["training"]
        return {"out": str(out), **described, **trained}
    (out / "config.yaml").write_text(cfg.dump(), encoding="utf-8")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        placed = torch.device(device)
        torch.zeros(1, device=placed)
    except (RuntimeError, AssertionError) as error:
        raise UniterError(
            f"--device {device} cannot be used here ({str(error).splitlines()[0]}); expected cpu, or cuda where there is a GPU"
        ) from error
    cfg.MODEL.DEVICE = device
    network = build_network(cfg, classes=len(labelled.class_names), attributes=attribute_count, seed=seed)
    if from_weights:
        start_from(network, Path(from_weights))
    network.to(memory_format=torch.channels_last)  # a fifth less time on a CPU, the same values but for rounding
    optimizer = _optimizer(network, schedule, learning_rate)
    preparation = ShortestEdgePreparation(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, cfg.INPUT.FORMAT)
    started = time.monotonic()
    done, validations = load_checkpoint(out, network, optimizer)
    if done:
        log.info("continuing after update %d of %d", done, steps)
    log.info(
        "%d images with %d boxes of %d classes%s, %d held out; %d updates of %d images at %s pixels",
        *(len(train.images), described["train_boxes"], len(labelled.class_names)),
        *(f" and {attribute_count} attributes" if attribute_count else "", len(val.images), steps, batch_size, cfg.INPUT.MIN_SIZE_TEST),
    )
    cached = sum(input_bytes(image, preparation) for image in train.images) <= CACHE_BYTES
    batches = Batches(train.images, preparation, batch_size=batch_size, attributes=attribute_count, seed=seed, cache=cached)
    count_workers = workers if workers is not None else 0 if cached else min(os.cpu_count() or 1, 8)
    loader = DataLoader(batches, batch_size=None, sampler=range(done, steps), num_workers=count_workers)
    journal = DetectorLog(out, step=done)
    broken: set[int] = set()
    network.train()
    try:
        with (
            fitting_threads(network, placed),
            EventStorage(done),
            Progress(steps, unit="updates", label="training the detector", done=done) as progress,
        ):
            for step, batch in enumerate(loader, start=done + 1):
                broken.update(number for item in batch for number in item["broken"])
                rate = learning_rate * learning_rate_factor(step - 1, steps=steps, warmup=schedule.warmup)
                losses = _update(network, optimizer, batch, rate=rate, seed=(seed << 32) + step)
                if not math.isfinite(losses["loss"]):
                    raise UniterError(
                        f"the loss is {losses['loss']} at update {step}; start anew with a lower --learning-rate than {learning_rate}"
                    )
                journal.write(step, "train", {**losses, "learning_rate": rate})
                progress.update(loss=losses["loss"])
                if step % validate_every == 0 or step == steps:
                    figures = evaluate_boxes(network, val, preparation)
                    validations.append({"step": step, **figures})
                    journal.write(step, "validation", figures)
                    log.info("update %d: AP %.3f, AP50 %.3f on %d held-out images", step, figures["ap"], figures["ap50"], len(val.images))
                if step % checkpoint_every == 0 or step == steps:
                    save_checkpoint(out, step, network, optimizer, validations)
    finally:
        journal.close()
    for number in sorted(broken):
        log.warning("left out: an image that cannot be decoded: %s", train.images[number].path)
    undecodable = len(broken) + int(validations[-1]["images_broken"])
    if undecodable:
        skipped["an image that cannot be decoded"] = undecodable
    trained = {"steps": steps, **{name: value for name, value in validations[-1].items() if name not in ("step", "images_broken")}}
    finish(out, network, labelled, attribute_names=labelled.attribute_names[:attribute_count], training=trained)
    log.info("trained for %s", duration(time.monotonic() - started))
    return {"out": str(out), **described, **trained}


NARROW = 10_000_000  # parameters


@contextlib.contextmanager
def fitting_threads(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Compute a narrow detector with half of the cores.

    Its operations are so short that threads mostly wait for each other. On two cores that nobody else used, two threads took 0.25 s an
    update and one 0.40 s; with two busy programs beside them, two threads took 6.4 s and one 0.64 s.
    """
    before = torch.get_num_threads()
    if device.type == "cpu" and sum(parameter.numel() for parameter in network.parameters()) < NARROW:
        torch.set_num_threads(max(before // 2, 1))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _optimizer(network: nn.Module, schedule: Schedule, learning_rate: float) -> torch.optim.Optimizer:
    matrices = [parameter for parameter in network.parameters() if parameter.requires_grad and parameter.ndim > 1]
    vectors = [parameter for parameter in network.parameters() if parameter.requires_grad and parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": schedule.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    if schedule.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=learning_rate, momentum=0.9)
    return torch.optim.AdamW(groups, lr=learning_rate)


def _update(network: nn.Module, optimizer: torch.optim.Optimizer, batch: list[Item], *, rate: float, seed: int) -> dict[str, float]:
    """One update; the losses by name, their sum as `loss`."""
    torch.manual_seed(seed)  # Detectron2 samples anchors and proposals from the global state
    losses: dict[str, Tensor] = network(batch)
    total = torch.stack(list(losses.values())).sum()
    optimizer.zero_grad(set_to_none=True)
    total.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_([parameter for group in optimizer.param_groups for parameter in group["params"]], 10.0)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    return {"loss": float(total.detach()), **{name: float(value.detach()) for name, value in losses.items()}}
