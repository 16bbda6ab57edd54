"""Training a Faster R-CNN on COCO's instances: Detectron2's network, matching and losses in a loop that can be killed at any time.

What is easy to get wrong: a detector for UNITER is more than its boxes. Its features are all that the model sees of a picture, and a
detector that is only asked for classes forgets what its classes do not need (a circle's colour). So the box predictor is also asked
for the attributes where they are annotated, as Bottom-Up-Attention's, and, with or without annotations, for a coarse thumbnail of its
region; the thumbnail layer is left out of the finished detector.

Every update is a function of (seed, number of the update) and of the weights before it; so a resumed run equals an unbroken one.

Imports Detectron2: load this module only where a detector is trained.
"""

import contextlib
import logging
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch.utils.data import DataLoader

from uniter.datasets.devices import usable_device
from uniter.datasets.errors import UniterError
from uniter.datasets.progress import Progress, duration
from uniter.datasets.runs.run_log import RunLog
from uniter.datasets.stopping import Stopped, leave_signals, told_to_stop
from uniter.extract.detector.protocol import is_out_of_memory
from uniter.extract.images.decoder_words import counted_decoder_words
from uniter.extract.training.batches import CACHE_BYTES, Batches, Item, input_bytes
from uniter.extract.training.beginnings import local_file
from uniter.extract.training.configs import Schedule, learning_rate_factor
from uniter.extract.training.folder import (
    CONFIG,
    content_of_photographs,
    figures_of,
    finish,
    load_checkpoint,
    save_checkpoint,
    training_folder,
)
from uniter.extract.training.plan import Choices, Plan, plan_training
from uniter.extract.training.running_mean import RunningMean

log = logging.getLogger(__name__)

CHECKPOINT_SECONDS = 300.0
"""What a kill may cost where updates are slow."""


# -------------------------------------------------------------------------------------------------------------------- the run


def train_detector(
    images: str | Path, annotations: str | Path, out: str | Path, choices: Choices | None = None, *, overwrite: bool = False
) -> dict[str, Any]:
    """Train a detector on COCO's instances; its folder is a `--detector` of `uniter-extract`. Repeating the call continues.

    Args:
        images: the folder in which the annotations' file names are found.
        annotations: COCO's instances JSON, or Visual Genome's objects.json where `choices.visual_genome` says so.
        out: the folder made; `detector.json`, written last, says that it is finished.
        choices: how; None: by defaults that learn.
        overwrite: train anew where the folder holds a training; what is there stays until the new detector is finished.

    Returns:
        The summary: counts, what was skipped, steps, and `ap`, `ap50` ... of the held-out part.

    Raises:
        BadInput: annotations, configuration, weights, a setting or the device cannot be used; or the folder is somebody else's.
        SettingsDiffer: the folder holds a training with other settings, or of other annotations or photographs.
        Stopped: SIGTERM or SIGINT came; a checkpoint was written.
        UniterError: the loss is no number any more, or another process trains in this folder.
    """
    images, annotations, out, choices = Path(images), Path(annotations), Path(out), choices or Choices()
    _refuse_several_processes()
    device = usable_device(choices.device)
    plan, network = plan_training(images, annotations, choices, device=device)
    photographs = content_of_photographs(images, [*plan.train.images, *plan.val.images])
    sources = (annotations, choices.val_annotations, choices.config, local_file(choices.from_weights))
    files = [file for file in sources if file is not None]
    files += choices.visual_genome.all() if choices.visual_genome is not None else []
    with training_folder(out, plan.settings, photographs=photographs, files=files, overwrite=overwrite) as claimed:
        if claimed.complete:
            log.info("%s is finished already", out)
            return {"out": str(out), **plan.described(), **figures_of(claimed.folder)}
        (claimed.folder / CONFIG).write_text(plan.cfg.dump(), encoding="utf-8")
        started = time.monotonic()
        validations, broken = _train(network, plan, claimed.folder, device)
        for number in sorted(broken):
            log.warning("left out: an image that cannot be decoded: %s", plan.train.images[number].path)
        if undecodable := len(broken) + int(validations[-1]["images_broken"]):
            plan.skipped["an image that cannot be decoded"] = undecodable
        figures = {name: value for name, value in validations[-1].items() if name not in ("step", "images_broken")}
        trained = {"steps": plan.steps, **figures}
        finish(claimed.folder, network, plan.train, attributes=plan.attributes, training=trained)
        claimed.publish()
    log.info("trained for %s", duration(time.monotonic() - started))
    return {"out": str(out), **plan.described(), **trained}


def _refuse_several_processes() -> None:
    if (world := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise UniterError(
            f"torchrun started {world} processes, and a detector is trained by one, on one GPU or on the CPU; "
            "run the command without torchrun"
        )


def _train(network: nn.Module, plan: Plan, folder: Path, device: torch.device) -> tuple[list[dict[str, Any]], set[int]]:
    """Train from the last checkpoint to the end, in place; the network is left with the running mean of its weights, if one is kept.

    Returns:
        The validations, each with its "step", and the numbers of the training images that could not be decoded.
    """
    network.to(memory_format=torch.channels_last)  # a fifth less time on a CPU, the same values but for rounding
    network.train()
    optimizer = _optimizer(network, plan.schedule, plan.learning_rate)
    mean = RunningMean(network, plan.running_mean)
    done, validations, broken = load_checkpoint(folder, network, optimizer, mean)
    _say(plan, done)
    with (
        told_to_stop() as told,
        counted_decoder_words(),
        _memory_said(plan),
        fitting_threads(network, device),
        EventStorage(done),
        RunLog(folder, step=done) as journal,
        Progress(plan.steps, unit="updates", label="training the detector", done=done) as progress,
    ):
        _say_how_long(network, plan, done)
        saved = time.monotonic()
        for step, batch in enumerate(_batches(plan, done), start=done + 1):
            if isinstance(batch, UniterError):
                raise batch
            broken.update(number for item in batch for number in item["broken"])
            rate = plan.learning_rate * learning_rate_factor(
                step - 1, steps=plan.steps, warmup=plan.schedule.warmup, drops_at=plan.schedule.drops_at
            )
            losses = _update(network, optimizer, batch, rate=rate, seed=(plan.seed << 32) + step)
            if not math.isfinite(losses["loss"]):
                raise UniterError(
                    f"the loss is {losses['loss']} at update {step}; start anew with a lower --learning-rate than {plan.learning_rate}"
                )
            mean.take(network, step)
            journal.write(step, "train", {**losses, "learning_rate": rate})
            progress.update(loss=losses["loss"])
            ends = step == plan.steps
            if step % plan.validate_every == 0 or ends:
                with mean.in_place(network):
                    evaluation = plan.evaluate(network, plan.val, plan.preparation, folder=plan.images)
                figures = evaluation.figures
                validations.append({"step": step, **figures})
                journal.write(step, "validation", figures)
                evaluation.held_out(step).write(folder)
                first = ", ".join(f"{name.replace('map', 'mAP').replace('ap', 'AP')} {figures[name]:.3f}" for name in list(figures)[:2])
                log.info("update %d: %s on %d held-out images", step, first, len(plan.val.images))
            if ends or told or step % plan.checkpoint_every == 0 or time.monotonic() - saved > CHECKPOINT_SECONDS:
                journal.flush()
                save_checkpoint(folder, step, network, optimizer, mean, validations=validations, broken=sorted(broken))
                saved = time.monotonic()
            if told and not ends:
                raise Stopped.after(step, plan.steps, told[0])
    if mean.tensors:
        network.load_state_dict(mean.tensors)
    return validations, broken


@contextlib.contextmanager
def _memory_said(plan: Plan) -> Iterator[None]:
    """Memory that does not suffice, in words."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UniterError(
            f"memory does not suffice for updates of {plan.batch_size} images at {plan.preparation.shortest} pixels; train with a smaller "
            "--batch-size or INPUT.MIN_SIZE_TEST, which is another training and needs another --out"
        ) from error


def _say(plan: Plan, done: int) -> None:
    """What is trained on what, before it begins."""
    if done:
        log.info("continuing after update %d of %d", done, plan.steps)
    counts = plan.described()
    log.info(
        "%d images with %d boxes of %d classes%s, %d held out; %d updates of %d images at %s pixels",
        *(counts["train_images"], counts["train_boxes"], counts["classes"]),
        f" and {plan.attributes} attributes" if plan.attributes else "",
        *(counts["val_images"], plan.steps, plan.batch_size, plan.preparation.shortest),
    )


MANY_UPDATES = 50


def _say_how_long(network: nn.Module, plan: Plan, done: int) -> None:
    """How long the updates will take, by one that is computed and not made; a few updates are sooner made than foretold."""
    if plan.steps - done <= MANY_UPDATES:
        return
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}  # BatchNorm would count it
    batches = _dataset(plan, cached=False)
    seconds = 0.0
    for _ in range(2):  # the first one also lays out memory
        started = time.monotonic()
        batch = batches[done]
        if isinstance(batch, UniterError):
            return  # said when its turn comes
        torch.manual_seed(plan.seed)
        losses: dict[str, Tensor] = network(batch)
        torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
        network.zero_grad(set_to_none=True)
        seconds = time.monotonic() - started
    for name, buffer in network.named_buffers():
        buffer.copy_(buffers[name])
    left = plan.steps - done
    log.info("about %s for %d updates on this machine as it is now; `--steps 150` is enough for a look", duration(seconds * left), left)


def _dataset(plan: Plan, *, cached: bool) -> Batches:
    return Batches(
        plan.train.images, plan.preparation, batch_size=plan.batch_size, attributes=plan.attributes, seed=plan.seed, cache=cached,
        crop=plan.schedule.crop,
    )  # fmt: skip


def _batches(plan: Plan, done: int) -> DataLoader[list[Item] | UniterError]:
    """The batches of the updates after `done`."""
    cached = sum(input_bytes(image, plan.preparation) for image in plan.train.images) <= CACHE_BYTES
    batches = _dataset(plan, cached=cached)
    workers = plan.workers if plan.workers is not None else 0 if cached else min(os.cpu_count() or 1, 8)
    numbers = range(done, plan.steps)
    return DataLoader(batches, batch_size=None, sampler=numbers, num_workers=workers, worker_init_fn=leave_signals)


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
    trained = [(name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad]
    body = [name for name, _ in trained if name.startswith("backbone.bottom_up.") and schedule.backbone_rate != 1]
    groups: list[dict[str, Any]] = []
    for share, names in ((1.0, {name for name, _ in trained} - set(body)), (schedule.backbone_rate, set(body))):
        members = [parameter for name, parameter in trained if name in names]
        for parameters, decay in (
            ([parameter for parameter in members if parameter.ndim > 1], schedule.weight_decay),
            ([parameter for parameter in members if parameter.ndim <= 1], 0.0),
        ):
            if names:
                groups.append({"params": parameters, "weight_decay": decay, "share": share})
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
        group["lr"] = rate * group["share"]
    optimizer.step()
    return {"loss": float(total.detach()), **{name: float(value.detach()) for name, value in losses.items()}}
