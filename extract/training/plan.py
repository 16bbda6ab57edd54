"""What is to be trained, all of it decided before a folder is touched: the labelled images, the configuration, the schedule."""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from torch import nn

from uniter.datasets.errors import BadInput, WrongUsage, unknown_name
from uniter.datasets.storage.files import sha256_of
from uniter.extract.detector.configuration import checked_config, merged_config, read_config
from uniter.extract.detector.preparation import ShortestEdgePreparation
from uniter.extract.training.beginnings import Beginning, begin, find_beginning, follow_weights
from uniter.extract.training.configs import MODELS, Schedule, schedule_of
from uniter.extract.training.evaluation import Evaluation, evaluate_boxes, evaluate_visual_genome
from uniter.extract.training.ignored import IgnoredRegions
from uniter.extract.training.labelled_images import LabelledImages, parts_of, read_labelled_images
from uniter.extract.training.predictor import SOFT_WEIGHT, build_network
from uniter.extract.training.settings import configured, refuse_settings_in_vain, watched
from uniter.extract.training.visual_genome import VisualGenomeFiles, read_visual_genome, visual_genome_parts

FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """How a detector is trained.

    Attributes:
        model: "lite" (the detector on board: photographs, on two cores), "tiny" (made-up worlds, minutes on two cores) or "r101-c4"
            (Bottom-Up-Attention's size; a GPU's work).
        config: a Detectron2 YAML of plain values that replaces the model's own configuration.
        overrides: single settings of Detectron2's by their dotted names.
        from_weights: what to begin from, see `beginnings.find_beginning`; None: on-board's weights where its backbone is trained.
        running_mean: how much of the weights' running mean stays at each update, which is what is validated and written; 0: none is kept.
        soft_weight: of the loss of `class_probabilities`; None: 2.
        val_annotations: held-out annotations of photographs in the same folder; otherwise `held_out` (a fraction) of the images are kept
            for validation, at most 500.
        attributes: learn attributes where they are annotated.
        visual_genome: the annotations are Visual Genome's objects.json, and these the files beside it; None: they are COCO's instances.
        steps, batch_size, learning_rate: None chooses what learns on such data; the rate is for the whole batch.
        checkpoint_every: updates between checkpoints; five minutes are never exceeded, whatever it says.
        validate_every: updates between validations; None: at a third, at two thirds and at the end.
        seed: decides weights, batches and samples.
        device: None takes a GPU where there is one.
        workers: processes that decode; None: none where all photographs fit into memory.
    """

    model: str = "lite"
    config: str | Path | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    from_weights: str | Path | None = None
    val_annotations: str | Path | None = None
    held_out: float = 0.1
    attributes: bool = True
    visual_genome: VisualGenomeFiles | None = None
    running_mean: float | None = None
    soft_weight: float | None = None
    steps: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    checkpoint_every: int = 100
    validate_every: int | None = None
    seed: int = 0
    device: str | None = None
    workers: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """A training with nothing left open.

    Attributes:
        images: the folder of the photographs.
        train, val: the images to learn from, and those held out.
        skipped: what was left out of both: reason -> how many.
        cfg: Detectron2's configuration, as it is written beside the weights.
        attributes: how many the detector learns.
        evaluate: what the held-out images are judged by.
        settings: all that decides the weights, as `settings.json` says it, but for the photographs.
        The others: see `Choices`.
    """

    images: Path
    train: LabelledImages
    val: LabelledImages
    skipped: dict[str, int]
    cfg: CfgNode
    schedule: Schedule
    attributes: int
    evaluate: Callable[..., Evaluation]
    steps: int
    batch_size: int
    learning_rate: float
    checkpoint_every: int
    validate_every: int
    running_mean: float
    seed: int
    workers: int | None
    settings: dict[str, Any]

    @property
    def preparation(self) -> ShortestEdgePreparation:
        """From an upright image to the network's input, in training as later in the detector."""
        return ShortestEdgePreparation(self.cfg.INPUT.MIN_SIZE_TEST, self.cfg.INPUT.MAX_SIZE_TEST, self.cfg.INPUT.FORMAT)

    def described(self) -> dict[str, Any]:
        """The first lines of the summary."""
        return {
            **{"train_images": len(self.train.images), "train_boxes": sum(len(image.boxes) for image in self.train.images)},
            **{"val_images": len(self.val.images), "classes": len(self.train.class_names), "attributes": self.attributes},
            "skipped": self.skipped,
        }


def plan_training(images: Path, annotations: Path, choices: Choices, *, device: torch.device) -> tuple[Plan, nn.Module]:
    """Decide everything, and build the network: what can be refused is refused here.

    Raises:
        BadInput: annotations, configuration or weights cannot be used, or a setting would change nothing.
        UniterError: there is no such model.
    """
    if choices.model not in MODELS:
        raise WrongUsage(unknown_name("model", choices.model, MODELS))
    if not 0 < choices.held_out < 1:
        raise BadInput(f"--held-out {choices.held_out}: expected a fraction between 0 and 1")
    train, val, skipped = _labelled_parts(images, annotations, choices)
    attributes = len(train.attribute_names) if choices.attributes else 0
    if choices.soft_weight is not None and all(image.soft is None for image in train.images):
        raise BadInput(
            f"--set soft_weight={choices.soft_weight}: no box of {annotations} has class_probabilities, so it would change nothing"
        )
    cfg, network, beginning = _network(choices, train, attributes, device)
    schedule = schedule_of(choices.model, train)
    batch_size = choices.batch_size or min(schedule.batch_size, len(train.images))
    steps = round(schedule.epochs * len(train.images) / batch_size)
    steps = choices.steps or int(np.clip(steps, schedule.least_steps, schedule.most_steps))
    learning_rate = choices.learning_rate or schedule.learning_rate * (
        batch_size / schedule.of_images if schedule.optimizer == "sgd" else 1
    )
    validate_every = choices.validate_every or max(math.ceil(steps / 3), 1)
    running_mean = schedule.running_mean if choices.running_mean is None else choices.running_mean
    if not 0 <= running_mean < 1:
        raise BadInput(f"--set running_mean={running_mean}: expected a share of 0 (none) to less than 1, such as 0.998")
    settings = {
        **{"format": FORMAT_VERSION, "model": choices.model, "annotations": annotations.name, "annotations_sha256": sha256_of(annotations)},
        **{"val_annotations_sha256": _sha256(choices.val_annotations), "held_out": choices.held_out},
        **{"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate, "attributes": attributes > 0, "seed": choices.seed},
        **{"validate_every": validate_every, "from": beginning.weights.sha256 if beginning else None},
        **({"running_mean": running_mean} if running_mean else {}),
        **({"soft_weight": choices.soft_weight} if choices.soft_weight is not None else {}),
        **(choices.visual_genome.settings() if choices.visual_genome is not None else {}),
        **{"config_sha256": hashlib.sha256(cfg.dump().encode()).hexdigest()},
    }
    plan = Plan(
        images=images,
        train=train,
        val=val,
        skipped=skipped,
        cfg=cfg,
        schedule=schedule,
        attributes=attributes,
        evaluate=evaluate_visual_genome if train.as_visual_genome else evaluate_boxes,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        checkpoint_every=choices.checkpoint_every,
        validate_every=validate_every,
        running_mean=running_mean,
        seed=choices.seed,
        workers=choices.workers,
        settings=settings,
    )
    return plan, network


def _labelled_parts(images: Path, annotations: Path, choices: Choices) -> tuple[LabelledImages, LabelledImages, dict[str, int]]:
    """The images to train on, those held out, and what was left out."""
    chosen = choices.visual_genome
    if chosen is None:
        labelled = read_labelled_images(images, annotations)
        return parts_of(labelled, images, choices.val_annotations, held_out=choices.held_out, seed=choices.seed)
    if choices.val_annotations is not None:
        raise BadInput("--val-annotations are COCO's; of Visual Genome, --split or --held-out says what is held out")
    labelled = read_visual_genome(images, annotations, chosen)
    return visual_genome_parts(labelled, images, chosen, held_out=choices.held_out, seed=choices.seed)


def _network(choices: Choices, train: LabelledImages, attributes: int, device: torch.device) -> tuple[CfgNode, nn.Module, Beginning | None]:
    """The configuration and the network made by it, on the device, with the weights that it begins from."""
    make_config, _ = MODELS[choices.model]
    path = None if choices.config is None else Path(choices.config)
    own = make_config(train)
    plain = own if path is None else merged_config(read_config(path), path=path)
    beginning = find_beginning(choices.from_weights, configured(plain.clone(), choices.overrides))
    if beginning is not None and path is None and choices.model == "r101-c4":
        follow_weights(own, beginning)
    asked = configured(plain.clone(), choices.overrides)
    cfg = checked_config(asked.clone(), path="--set")
    cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE = len(train.class_names), "", "cpu"
    placed = cfg.clone()
    placed.MODEL.DEVICE = str(device)
    read: set[str] = set()
    network = build_network(
        watched(placed, read),
        attributes=attributes,
        seed=choices.seed,
        soft_weight=SOFT_WEIGHT if choices.soft_weight is None else choices.soft_weight,
        published=train.as_visual_genome,
    )
    refuse_settings_in_vain(asked, cfg, read, own=own, path=path)
    if beginning is not None:
        begin(network, beginning, train.class_names)
    if any(image.crowd.any() for image in train.images) or MODELS[choices.model][1].crop is not None:
        IgnoredRegions(network)
    return cfg, network, beginning


def _sha256(path: str | Path | None) -> str | None:
    return None if path is None else sha256_of(Path(path))
