"""COCO's average precision of what the network finds, class by class, and the photographs on which it does worst."""

import contextlib
import io
import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

from uniter.datasets.errors import BadInput
from uniter.datasets.runs.held_out import ClassFigures, FoundBox, HeldOut, HeldOutPicture
from uniter.extract.detector.preparation import ShortestEdgePreparation
from uniter.extract.training.batches import channels_first, network_input
from uniter.extract.training.labelled_images import LabelledImage, LabelledImages, coco_ground_truth

log = logging.getLogger(__name__)

CONFIDENCE: Final = 0.2
"""From here on a box counts as found where mistakes are counted: the threshold of the default selection."""

WORST: Final = 24
"""So many photographs are kept to be looked at."""

_NAMES: Final = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A validation.

    Attributes:
        figures: ap (0.50 to 0.95), ap50, ap75, ap_small, ap_medium, ap_large, as fractions of 1 (-1 where there is no such box), and
            images_broken.
        classes, worst: as in `HeldOut`.
        images: how many were looked at.
    """

    figures: dict[str, float]
    classes: list[ClassFigures]
    worst: list[HeldOutPicture]
    images: int

    def held_out(self, step: int) -> HeldOut:
        return HeldOut(step, self.images, CONFIDENCE, self.classes, self.worst)


def evaluate_boxes(
    model: nn.Module, labelled: LabelledImages, preparation: ShortestEdgePreparation, *, folder: Path, batch_size: int = 16
) -> Evaluation:
    """Evaluate the model's final (regressed, class-wise suppressed) detections by COCOeval.

    Args:
        folder: of the photographs; their names are told below it.
    """
    results, broken = _detections(model, labelled, preparation, batch_size)
    truth = COCO()
    truth.dataset = coco_ground_truth(labelled)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        truth.createIndex()
        # loadRes refuses an empty list: a box of no area at confidence 0 is nothing found.
        nothing = {"image_id": labelled.images[0].id, "category_id": labelled.category_ids[0], "bbox": [0, 0, 0, 0], "score": 0.0}
        evaluation = COCOeval(truth, truth.loadRes(results or [nothing]), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    if results:
        for line in printed.getvalue().splitlines():
            if line.startswith(" Average Precision"):
                log.info("%s", line.strip())
    stats = {name: float(value) if results else 0.0 for name, value in zip(_NAMES, evaluation.stats, strict=False)}
    worst = _worst(evaluation, labelled, results, folder)
    return Evaluation({**stats, "images_broken": broken}, _by_class(evaluation, labelled), worst, len(labelled.images))


def _detections(
    model: nn.Module, labelled: LabelledImages, preparation: ShortestEdgePreparation, batch_size: int
) -> tuple[list[dict[str, Any]], int]:
    """COCO's result rows of all photographs, and how many of these could not be read."""
    was_training = model.training
    model.eval()
    results: list[dict[str, Any]] = []
    broken = 0
    try:
        for first in range(0, len(labelled.images), batch_size):
            items, members = [], []
            for image in labelled.images[first : first + batch_size]:
                try:
                    pixels, _ = network_input(image, preparation)
                except (BadInput, OSError):
                    broken += 1
                    continue
                items.append({"image": channels_first(pixels), "height": image.size[0], "width": image.size[1]})
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
    return results, broken


def _by_class(evaluation: COCOeval, labelled: LabelledImages) -> list[ClassFigures]:
    """The figures of the classes that are annotated; `precision` is (IoU thresholds, recalls, classes, areas, most detections)."""
    precision = np.asarray(evaluation.eval["precision"])[:, :, :, 0, -1]
    boxes: Counter[int] = Counter()
    for image in labelled.images:
        boxes.update(image.classes[~image.crowd].tolist())
    # COCOeval sorts the category ids
    order = {category: place for place, category in enumerate(evaluation.params.catIds)}
    found = []
    for number, count in boxes.items():
        of_class = precision[:, :, order[labelled.category_ids[number]]]
        figures = [float(part[part > -1].mean()) if (part > -1).any() else 0.0 for part in (of_class, of_class[0])]
        found.append(ClassFigures(labelled.class_names[number], count, *figures))
    return sorted(found, key=lambda row: (-row.ap, -row.boxes, row.name))


def _worst(evaluation: COCOeval, labelled: LabelledImages, results: list[dict[str, Any]], folder: Path) -> list[HeldOutPicture]:
    """The photographs whose boxes are found worst at IoU 0.5, by F1 of what is surer than `CONFIDENCE`."""
    right: Counter[int] = Counter()
    wrong: Counter[int] = Counter()
    whole = list(evaluation.params.areaRng[0])
    for row in evaluation.evalImgs:
        if row is None or list(row["aRng"]) != whole:
            continue
        for score, match, ignored in zip(row["dtScores"], row["dtMatches"][0], row["dtIgnore"][0], strict=True):
            if score >= CONFIDENCE and not ignored:
                (right if match else wrong)[row["image_id"]] += 1
    found: dict[int, list[FoundBox]] = {}
    names = dict(zip(labelled.category_ids, labelled.class_names, strict=True))
    for result in sorted(results, key=lambda result: -result["score"]):
        if result["score"] >= CONFIDENCE:
            x, y, width, height = (round(value, 1) for value in result["bbox"])
            box = FoundBox((x, y, x + width, y + height), names[result["category_id"]], round(result["score"], 3))
            found.setdefault(result["image_id"], []).append(box)

    def mistakes(image: LabelledImage) -> tuple[float, int]:
        boxes, good, bad = int((~image.crowd).sum()), right[image.id], wrong[image.id]
        return (2 * good / max(boxes + good + bad, 1), -(boxes - good + bad))

    pictures = []
    for image in sorted((image for image in labelled.images if not image.crowd.all() or wrong[image.id]), key=mistakes)[:WORST]:
        annotated = [
            FoundBox((x0, y0, x1, y1), labelled.class_names[number])
            for (x0, y0, x1, y1), number, crowd in zip(image.boxes.tolist(), image.classes.tolist(), image.crowd.tolist(), strict=True)
            if not crowd
        ]
        missed = len(annotated) - right[image.id]
        name = image.path.relative_to(folder).as_posix()
        pictures.append(HeldOutPicture(name, image.size, missed, wrong[image.id], annotated, found.get(image.id, [])))
    return pictures
