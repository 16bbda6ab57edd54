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
import io
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from uniter.datasets.errors import BadInput, SettingsDiffer, UniterError, unknown_name
from uniter.datasets.lmdb_store import write_json
from uniter.datasets.progress import Progress, duration
from uniter.extract.assembly import ATTRIBUTE_WIDTH, EMBEDDING_WIDTH
from uniter.extract.images import decode_image
from uniter.extract.labelled_images import LabelledImage, LabelledImages, coco_ground_truth, read_labelled_images
from uniter.extract.network import add_attribute_branch
from uniter.extract.preparation import ShortestEdgePreparation
from uniter.extract.recipes import merged_config, read_config
from uniter.extract.weight_files import sha256_of
from uniter.extract.weights import load_weight_file

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
THUMBNAIL = 4  # pixels a side
CACHE_BYTES = 1 << 30
MOST_HELD_OUT = 500
Item = dict[str, Any]


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


TINY = Schedule("adamw", batch_size=16, learning_rate=1e-3, weight_decay=0.05, warmup=50, epochs=10, least_steps=600, most_steps=20_000)
# Detectron2's rates are for 16 images; the command divides them for smaller batches.
FULL = Schedule("sgd", batch_size=2, learning_rate=0.02, weight_decay=1e-4, warmup=1000, epochs=12, least_steps=1000, most_steps=720_000)


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


def r101_c4_config(labelled: LabelledImages) -> CfgNode:
    """Detectron2's Faster R-CNN R101-C4, with BatchNorm that is trained, since there are no ImageNet weights to freeze."""
    cfg = merged_config(read_config(Path(model_zoo.get_config_file("COCO-Detection/faster_rcnn_R_101_C4_3x.yaml"))), path=Path("R101-C4"))
    cfg.MODEL.RESNETS.NORM, cfg.MODEL.BACKBONE.FREEZE_AT = "BN", 0
    cfg.MODEL.PIXEL_STD = [58.0, 57.0, 57.0]
    return cfg


MODELS = {"tiny": (tiny_config, TINY), "r101-c4": (r101_c4_config, FULL)}


def learning_rate_factor(step: int, *, steps: int, warmup: int) -> float:
    """Linear warm-up over `warmup` updates (at most a tenth of all), then half a cosine down to 2 %; `step` counts from 0."""
    warmup = max(min(warmup, steps // 10), 1)
    return min((step + 1) / warmup, 1.0) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(step / max(steps, 1), 1.0))))


# ------------------------------------------------------------------------------------------------------------------ predictor


class TrainedPredictor(FastRCNNOutputLayers):  # type: ignore[misc]
    """Detectron2's box predictor, with the losses of attributes and thumbnails beside those of classes and boxes."""

    attributes = 0
    _features: Tensor

    def add_branches(self, *, classes: int, width: int, attributes: int) -> None:
        """Add what Detectron2's predictor lacks: (width,) features to (3 * THUMBNAIL ** 2,) pixels, and the attribute branch if any."""
        self.attributes = attributes
        self.thumbnail = nn.Linear(width, 3 * THUMBNAIL**2)
        if attributes:
            shapes = {
                "cls_embedding.weight": (classes + 1, EMBEDDING_WIDTH),
                "fc_attr.weight": (ATTRIBUTE_WIDTH, width + EMBEDDING_WIDTH),
                "attr_score.weight": (attributes + 1, ATTRIBUTE_WIDTH),
            }
            add_attribute_branch(self, shapes)
            nn.init.normal_(self.cls_embedding.weight, std=0.1)

    def forward(self, features: Tensor) -> Any:
        self._features = features.flatten(start_dim=1)
        return super().forward(features)

    def losses(self, predictions: Any, proposals: list[Any]) -> dict[str, Tensor]:
        """Detectron2's losses, `loss_thumbnail` (mean squared error) and `loss_attribute` (soft-max cross-entropy, weight 0.5)."""
        found: dict[str, Tensor] = super().losses(predictions, proposals)
        classes = torch.cat([proposal.gt_classes for proposal in proposals])
        foreground = classes < self.num_classes
        thumbnails = torch.cat([proposal.gt_thumbnails for proposal in proposals])[foreground]
        # A sum over none is 0 and keeps the graph, where a mean would be nan.
        error = F.mse_loss(self.thumbnail(self._features[foreground]), thumbnails, reduction="sum")
        found["loss_thumbnail"] = error / max(thumbnails.numel(), 1)
        if self.attributes:
            targets = torch.cat([proposal.gt_attributes for proposal in proposals]).clone()
            targets[~foreground] = 0
            targets[~foreground, -1] = 1
            known = targets.sum(dim=1) > 0  # boxes without annotated attributes say nothing
            embedded = self.cls_embedding(classes[known])
            hidden = torch.relu(self.fc_attr(torch.cat([self._features[known], embedded], dim=1)))
            shares = F.log_softmax(self.attr_score(hidden), dim=1)
            found["loss_attribute"] = -0.5 * (targets[known] * shares).sum() / max(int(known.sum()), 1)
        return found


def build_network(cfg: CfgNode, *, classes: int, attributes: int, seed: int) -> nn.Module:
    """Detectron2's model of this configuration with `TrainedPredictor` as its box predictor; weights drawn from the seed."""
    torch.manual_seed(seed)  # Detectron2 initialises from the global state
    try:
        model = build_model(cfg)
    except (KeyError, AssertionError, ValueError, RuntimeError, TypeError, AttributeError, IndexError) as error:
        raise BadInput(f"Detectron2 cannot build this configuration ({error}); what was changed in it?") from error
    width = model.roi_heads.box_predictor.cls_score.in_features
    predictor = TrainedPredictor(cfg, ShapeSpec(channels=width, height=1, width=1))
    predictor.add_branches(classes=classes, width=width, attributes=attributes)
    model.roi_heads.box_predictor = predictor.to(cfg.MODEL.DEVICE)
    network: nn.Module = model
    return network


# --------------------------------------------------------------------------------------------------------------------- batches


class Batches(Dataset[list[Item]]):
    """Item `step` is the batch of that update: which images, which of them mirrored, follows from (seed, step) alone.

    An image that cannot be decoded after all is replaced by the next one; its number stands in `broken` of the item that met it.
    """

    def __init__(
        self,
        images: Sequence[LabelledImage],
        preparation: ShortestEdgePreparation,
        *,
        batch_size: int,
        attributes: int,
        seed: int,
        cache: bool,
    ) -> None:
        self.images, self.preparation, self.batch_size, self.attributes, self.seed = images, preparation, batch_size, attributes, seed
        self._cache: dict[int, tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32]]] | None = {} if cache else None
        self._orders: dict[int, NDArray[np.int64]] = {}

    def __getitem__(self, step: int) -> list[Item]:
        flips = np.random.default_rng([self.seed, 1, step]).random(self.batch_size) < 0.5
        return [self._item(self._number(step * self.batch_size + place), bool(flips[place])) for place in range(self.batch_size)]

    def _number(self, position: int) -> int:
        """Which image stands at this place of the endless sequence of shuffled epochs."""
        epoch, place = divmod(position, len(self.images))
        if epoch not in self._orders:
            self._orders = {epoch: np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.images))}
        return int(self._orders[epoch][place])

    def _item(self, number: int, flip: bool) -> Item:
        broken = []
        for attempt in range(len(self.images)):
            tried = (number + attempt) % len(self.images)
            try:
                pixels, boxes, thumbnails = self._load(tried)
                break
            except (BadInput, OSError):
                broken.append(tried)
        else:
            raise BadInput("none of the training images can be decoded; are the files damaged?")
        image = self.images[tried]
        if flip:
            pixels, boxes = pixels[:, ::-1], boxes.copy()
            boxes[:, [0, 2]] = pixels.shape[1] - boxes[:, [2, 0]]
            thumbnails = thumbnails[:, :, :, ::-1]
        instances = Instances(pixels.shape[:2])
        trained = ~image.crowd
        instances.gt_boxes = Boxes(torch.from_numpy(boxes[trained]))
        instances.gt_classes = torch.from_numpy(image.classes[trained])
        instances.gt_thumbnails = torch.from_numpy(np.ascontiguousarray(thumbnails[trained])).flatten(start_dim=1)
        if self.attributes:
            targets = torch.zeros((len(image.boxes), self.attributes + 1))
            for row, numbers in enumerate(image.attributes):
                targets[row, list(numbers)] = 1 / max(len(numbers), 1)
            instances.gt_attributes = targets[torch.from_numpy(trained)]
        return {"image": _channels_first(pixels), "height": image.size[0], "width": image.size[1], "instances": instances, "broken": broken}

    def _load(self, number: int) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32]]:
        """Network input (h, w, 3) uint8, boxes in its pixels (N, 4), and thumbnails of the boxes (N, 3, THUMBNAIL, THUMBNAIL)."""
        if self._cache is not None and number in self._cache:
            return self._cache[number]
        image = self.images[number]
        pixels, scale = _network_input(image, self.preparation)
        boxes = image.boxes * np.array([*scale, *scale], dtype=np.float32)
        thumbnails = (
            np.stack([thumbnail(pixels, box) for box in boxes]) if len(boxes) else np.zeros((0, 3, THUMBNAIL, THUMBNAIL), np.float32)
        )
        loaded = pixels, boxes, thumbnails
        if self._cache is not None:
            self._cache[number] = loaded
        return loaded


def thumbnail(pixels: NDArray[np.uint8], box: NDArray[np.float32]) -> NDArray[np.float32]:
    """What a region looks like, coarsely: (3, THUMBNAIL, THUMBNAIL) float32, grey 0, black and white at -1 and 1."""
    height, width = pixels.shape[:2]
    x0, y0 = (int(np.clip(math.floor(value), 0, limit - 1)) for value, limit in zip(box[:2], (width, height), strict=True))
    x1, y1 = max(math.ceil(box[2]), x0 + 1), max(math.ceil(box[3]), y0 + 1)
    region = np.ascontiguousarray(pixels[y0:y1, x0:x1])
    small = cv2.resize(region, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA)
    return np.ascontiguousarray(small.astype(np.float32).transpose(2, 0, 1) / 127.5 - 1)


def _network_input(image: LabelledImage, preparation: ShortestEdgePreparation) -> tuple[NDArray[np.uint8], tuple[float, float]]:
    decoded = decode_image(image.path.read_bytes())
    if decoded.shape[:2] != image.size:
        raise BadInput(f"{image.path}: {decoded.shape[:2]} pixels where its header says {image.size}")
    prepared = preparation(decoded)
    return prepared.pixels.astype(np.uint8, copy=False), prepared.scale


def _channels_first(pixels: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


# ------------------------------------------------------------------------------------------------------------------ evaluation


def evaluate_boxes(
    model: nn.Module, labelled: LabelledImages, preparation: ShortestEdgePreparation, *, batch_size: int = 16
) -> dict[str, float]:
    """Box average precision of the model's final (regressed, class-wise suppressed) detections by COCOeval.

    Returns:
        ap (0.50 to 0.95), ap50, ap75, ap_small, ap_medium, ap_large, as fractions of 1 (-1 where there is no such box), and images_broken.
    """
    was_training = model.training
    model.eval()
    results: list[dict[str, Any]] = []
    broken = 0
    try:
        for first in range(0, len(labelled.images), batch_size):
            items, members = [], []
            for image in labelled.images[first : first + batch_size]:
                try:
                    pixels, _ = _network_input(image, preparation)
                except (BadInput, OSError):
                    broken += 1
                    continue
                items.append({"image": _channels_first(pixels), "height": image.size[0], "width": image.size[1]})
                members.append(image)
            if not items:
                continue
            with torch.no_grad():
                outputs = model(items)
            for image, output in zip(members, outputs, strict=True):
                found = output["instances"].to("cpu")
                for box, score, number in zip(
                    found.pred_boxes.tensor.tolist(), found.scores.tolist(), found.pred_classes.tolist(), strict=True
                ):
                    bbox = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
                    results.append({"image_id": image.id, "category_id": labelled.category_ids[number], "bbox": bbox, "score": score})
    finally:
        model.train(was_training)
    names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
    if not results:
        return {**dict.fromkeys(names, 0.0), "images_broken": broken}
    truth = COCO()
    truth.dataset = coco_ground_truth(labelled)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    for line in printed.getvalue().splitlines():
        if line.startswith(" Average Precision"):
            log.info("%s", line.strip())
    return {**{name: float(value) for name, value in zip(names, evaluation.stats, strict=False)}, "images_broken": broken}


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
    train, val, skipped = _parts(labelled, images, val_annotations, held_out=held_out, seed=seed)
    attribute_count = len(labelled.attribute_names) if attributes else 0
    make_config, schedule = MODELS[model]
    cfg = _configured(make_config(train) if config is None else merged_config(read_config(Path(config)), path=Path(config)), overrides)
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
    _claim(out, settings, overwrite=overwrite)
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
        _start_from(network, Path(from_weights))
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
    cached = sum(_input_bytes(image, preparation) for image in train.images) <= CACHE_BYTES
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
    _finish(out, network, labelled, attribute_names=labelled.attribute_names[:attribute_count], training=trained)
    log.info("trained for %s", duration(time.monotonic() - started))
    return {"out": str(out), **described, **trained}


def _parts(
    labelled: LabelledImages, images: str | Path, val_annotations: str | Path | None, *, held_out: float, seed: int
) -> tuple[LabelledImages, LabelledImages, dict[str, int]]:
    """The images to train on (those with boxes) and those held out; what was skipped in both."""
    skipped = dict(labelled.skipped)
    if val_annotations:
        val = read_labelled_images(images, val_annotations)
        if val.class_names != labelled.class_names or val.category_ids != labelled.category_ids:
            raise BadInput(f"{val_annotations} has other categories than the training annotations; expected the same ids and names")
        for reason, count in val.skipped.items():
            skipped[reason] = skipped.get(reason, 0) + count
        members = labelled.images
    else:
        order = np.random.default_rng([seed, 2]).permutation(len(labelled.images))
        count = min(max(round(held_out * len(labelled.images)), 1), MOST_HELD_OUT)
        val = _with_images(labelled, [labelled.images[number] for number in sorted(order[:count])])
        members = [labelled.images[number] for number in sorted(order[count:])]
    with_boxes = [image for image in members if (~image.crowd).any()]
    if len(with_boxes) < len(members):
        skipped["a training image without boxes"] = len(members) - len(with_boxes)
    if not with_boxes:
        raise BadInput("no training image has a box that can be used; expected at least one besides the held-out images")
    return _with_images(labelled, with_boxes), val, skipped


def _with_images(labelled: LabelledImages, images: list[LabelledImage]) -> LabelledImages:
    return LabelledImages(images, labelled.class_names, labelled.category_ids, labelled.attribute_names)


def _configured(cfg: CfgNode, overrides: Mapping[str, Any] | None) -> CfgNode:
    for name, value in (overrides or {}).items():
        try:
            cfg.merge_from_list([name, value])
        except (KeyError, AssertionError, ValueError, TypeError, AttributeError) as error:
            raise BadInput(f"--set {name}={value}: Detectron2 has no such setting or expects another kind of value ({error})") from error
    cfg.MODEL.DEVICE = "cpu"
    return cfg


def _claim(out: Path, settings: Mapping[str, Any], *, overwrite: bool) -> None:
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


def _start_from(network: nn.Module, path: Path) -> None:
    """Copy what fits by name and shape from a weight file of any known layout; nothing in the file is executed."""
    tensors = load_weight_file(path).tensors
    own = network.state_dict()
    fitting = {name: tensor for name, tensor in tensors.items() if name in own and own[name].shape == tensor.shape}
    if not fitting:
        raise BadInput(f"{path}: none of its {len(tensors)} tensors fits this detector by name and shape; is it of another architecture?")
    network.load_state_dict({name: tensor.to(own[name].dtype) for name, tensor in fitting.items()}, strict=False)
    log.info("%d of the detector's %d tensors start from %s", len(fitting), len(own), path)


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


def _input_bytes(image: LabelledImage, preparation: ShortestEdgePreparation) -> int:
    height, width = preparation.network_size(*image.size)
    return 3 * height * width


def _finish(
    out: Path, network: nn.Module, labelled: LabelledImages, *, attribute_names: Sequence[str], training: Mapping[str, Any]
) -> None:
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
