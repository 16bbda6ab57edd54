"""The networks that can be trained, and their schedules."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from numpy.typing import NDArray

from uniter.extract.detector.configuration import merged_config, read_config
from uniter.extract.detector.lite import lite_config
from uniter.extract.training.labelled_images import LabelledImages

# ------------------------------------------------------------------------------------------------------------- configurations


@dataclass(frozen=True)
class Schedule:
    """How a kind of detector is trained unless told otherwise."""

    optimizer: str  # "adamw" or "sgd"
    batch_size: int
    learning_rate: float
    weight_decay: float
    warmup: int
    epochs: float
    least_steps: int
    most_steps: int
    crop: int | None = None  # pixels a side of random square crops
    running_mean: float = 0.0  # how much of the weights' running mean stays at each update; 0: the last weights are taken
    backbone_rate: float = 1.0  # times the learning rate, for the backbone below the pyramid
    of_images: int = 16  # the batch that an "sgd" learning rate is for; it is divided for smaller ones
    drops_at: float | None = None  # of all updates, where the rate falls to a tenth; None: half a cosine


TINY = Schedule("adamw", batch_size=16, learning_rate=1e-3, weight_decay=0.05, warmup=50, epochs=10, least_steps=600, most_steps=20_000)


LITE = Schedule(
    "adamw", batch_size=8, learning_rate=5e-4, weight_decay=0.03, warmup=100, epochs=30, least_steps=400, most_steps=20_000,
    crop=256, running_mean=0.998, backbone_rate=0.15,
)  # fmt: skip


# Detectron2's rates are for 16 images; the command divides them for smaller batches.
FULL = Schedule("sgd", batch_size=2, learning_rate=0.02, weight_decay=1e-4, warmup=1000, epochs=12, least_steps=1000, most_steps=720_000)


# Bottom-Up-Attention's own: `solver.prototxt` of ResNet-101/faster_rcnn_end2end_final, one image on each of eight GPUs, 380,000 updates.
VISUAL_GENOME = Schedule(
    "sgd", batch_size=8, learning_rate=0.001, weight_decay=5e-4, warmup=1, epochs=31, least_steps=1000, most_steps=380_000, of_images=8,
    drops_at=350 / 380,
)  # fmt: skip


def schedule_of(model: str, labelled: LabelledImages) -> Schedule:
    """How a kind of detector is trained on such images unless told otherwise."""
    return VISUAL_GENOME if labelled.as_visual_genome and model == "r101-c4" else MODELS[model][1]


def tiny_config(labelled: LabelledImages) -> CfgNode:
    """A narrow ResNet-50 with a feature pyramid, of which one level (stride 8) is used: learns a made-up world in minutes on two cores.

    The input's size and the anchors follow from the annotated boxes: the median one gets some 30 pixels a side, and the smallest tenth at
    least 14, where the photographs have so many.
    """
    cfg = get_cfg()
    model = cfg.MODEL
    model.BACKBONE.NAME, model.BACKBONE.FREEZE_AT = "build_resnet_fpn_backbone", 0
    resnets = model.RESNETS
    resnets.DEPTH, resnets.NORM, resnets.STRIDE_IN_1X1 = 50, "BN", False
    resnets.STEM_OUT_CHANNELS, resnets.WIDTH_PER_GROUP, resnets.RES2_OUT_CHANNELS = 32, 16, 64
    resnets.OUT_FEATURES = model.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    model.FPN.OUT_CHANNELS, model.FPN.NORM = 96, "BN"
    model.PIXEL_STD = [58.0, 57.0, 57.0]
    model.RPN.IN_FEATURES = model.ROI_HEADS.IN_FEATURES = ["p3"]
    model.RPN.BATCH_SIZE_PER_IMAGE = 64
    model.RPN.PRE_NMS_TOPK_TRAIN = model.RPN.PRE_NMS_TOPK_TEST = 300
    model.RPN.POST_NMS_TOPK_TRAIN = model.RPN.POST_NMS_TOPK_TEST = 100
    model.ROI_HEADS.NAME, model.ROI_HEADS.BATCH_SIZE_PER_IMAGE = "StandardROIHeads", 32
    head = model.ROI_BOX_HEAD
    head.NAME, head.NUM_FC, head.FC_DIM, head.POOLER_RESOLUTION, head.POOLER_SAMPLING_RATIO = "FastRCNNConvFCHead", 2, 256, 7, 1

    shorter = np.array([min(image.size) for image in labelled.images])
    width_height = np.concatenate([image.boxes[:, 2:] - image.boxes[:, :2] for image in labelled.images])
    of_shorter = np.concatenate([np.full(len(image.boxes), min(image.size)) for image in labelled.images])
    relative = np.sqrt(width_height.prod(axis=1)) / of_shorter
    wanted = max(30 / np.median(relative), 14 / np.quantile(relative, 0.1))
    usual = float(np.median(shorter))
    if 0.75 <= wanted / usual <= 1.35:
        wanted = usual  # resizing by so little would only blur
    least = int(np.clip(round(wanted), 96, 320))
    elongation = max(max(image.size) / min(image.size) for image in labelled.images)
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (least,), least
    cfg.INPUT.MAX_SIZE_TRAIN = cfg.INPUT.MAX_SIZE_TEST = round(least * min(elongation, 3.0)) + 1
    model.ANCHOR_GENERATOR.SIZES = [fitted_anchors(relative * least)]
    model.ANCHOR_GENERATOR.ASPECT_RATIOS = [fitted_ratios(width_height[:, 1] / width_height[:, 0])]
    return cfg


def fitted_anchors(sides: NDArray[np.floating]) -> list[float]:
    """Three to six anchor sizes, a constant factor apart, from the twentieth smallest to the twentieth largest of the box sides."""
    low, high = (max(float(value), 4.0) for value in np.quantile(sides, [0.05, 0.95]))
    middle = math.sqrt(low * high)
    spread = max(high / low, 1.6)
    count = int(np.clip(math.ceil(math.log(spread) / math.log(1.7)) + 1, 3, 6))
    return [round(float(side), 1) for side in np.geomspace(middle / math.sqrt(spread), middle * math.sqrt(spread), count)]


def fitted_ratios(ratios: NDArray[np.floating]) -> list[float]:
    """Three anchor ratios (height / width): the middle one, and a low and a high one at least 1.4 times apart from it."""
    low, middle, high = (float(value) for value in np.quantile(ratios, [0.1, 0.5, 0.9]))
    middle = float(np.clip(middle, 0.2, 5.0))
    return [round(float(np.clip(value, 0.1, 10.0)), 2) for value in (min(low, middle / 1.4), middle, max(high, middle * 1.4))]


def on_board_config(labelled: LabelledImages) -> CfgNode:
    """The detector on board, of which the training begins; its inputs and anchors are those of photographs."""
    return lite_config(len(labelled.class_names))


def r101_c4_config(labelled: LabelledImages) -> CfgNode:
    """Detectron2's Faster R-CNN R101-C4, with BatchNorm that is trained, since there are no ImageNet weights to freeze."""
    cfg = merged_config(read_config(Path(model_zoo.get_config_file("COCO-Detection/faster_rcnn_R_101_C4_3x.yaml"))), path=Path("R101-C4"))
    cfg.MODEL.RESNETS.NORM, cfg.MODEL.BACKBONE.FREEZE_AT = "BN", 0
    cfg.MODEL.PIXEL_STD = [58.0, 57.0, 57.0]
    if labelled.as_visual_genome:  # `faster_rcnn_end2end_resnet.yml`
        cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TEST = (600,), 600, 1000, 1000
        cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE, cfg.MODEL.ROI_HEADS.POSITIVE_FRACTION = 64, 0.5
        cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE = 64
        # As many detections as its evaluation looks at, however weak.
        cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST, cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST, cfg.TEST.DETECTIONS_PER_IMAGE = 0.0, 0.3, 400
    return cfg


MODELS = {"lite": (on_board_config, LITE), "tiny": (tiny_config, TINY), "r101-c4": (r101_c4_config, FULL)}


def learning_rate_factor(step: int, *, steps: int, warmup: int, drops_at: float | None = None) -> float:
    """What the learning rate is multiplied by at an update; `step` counts from 0.

    Linear warm-up over `warmup` updates (at most a tenth of all), then half a cosine down to 2 %; or, with `drops_at`, 1 up to that share
    of the updates and a tenth afterwards.
    """
    warmup = max(min(warmup, steps // 10), 1)
    share = min(step / max(steps, 1), 1.0)
    falling = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)) if drops_at is None else (1.0 if share < drops_at else 0.1)
    return min((step + 1) / warmup, 1.0) * falling
