"""Average precision of what the network finds: COCO's, and Visual Genome's as Bottom-Up-Attention reports it."""

import contextlib
import io
import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

from uniter.datasets.errors import BadInput
from uniter.extract.detector.preparation import ShortestEdgePreparation
from uniter.extract.training.batches import channels_first, network_input
from uniter.extract.training.labelled_images import LabelledImages, coco_ground_truth

log = logging.getLogger(__name__)

# ------------------------------------------------------------------------------------------------------------------ evaluation


class Detection(NamedTuple):
    """One detection: its image's number in `LabelledImages.images`, its class from 0, its box x0 y0 x1 y1 in image pixels, its score."""

    image: int
    number: int
    box: tuple[float, float, float, float]
    score: float


def detections(
    model: nn.Module, labelled: LabelledImages, preparation: ShortestEdgePreparation, *, batch_size: int = 16
) -> tuple[list[Detection], int]:
    """The model's final (regressed, class-wise suppressed) detections in all images, and how many of those could not be decoded."""
    was_training = model.training
    model.eval()
    found: list[Detection] = []
    broken = 0
    try:
        for first in range(0, len(labelled.images), batch_size):
            items, members = [], []
            for number, image in enumerate(labelled.images[first : first + batch_size], start=first):
                try:
                    pixels, _ = network_input(image, preparation)
                except (BadInput, OSError):
                    broken += 1
                    continue
                items.append({"image": channels_first(pixels), "height": image.size[0], "width": image.size[1]})
                members.append(number)
            if not items:
                continue
            with torch.no_grad():
                outputs = model(items)
            for number, output in zip(members, outputs, strict=True):
                seen = output["instances"].to("cpu")
                rows = zip(seen.pred_classes.tolist(), seen.pred_boxes.tensor.tolist(), seen.scores.tolist(), strict=True)
                found += [Detection(number, kind, tuple(box), score) for kind, box, score in rows]
    finally:
        model.train(was_training)
    return found, broken


def evaluate_boxes(model: nn.Module, labelled: LabelledImages, preparation: ShortestEdgePreparation) -> dict[str, float]:
    """Box average precision of the model's detections by COCOeval.

    Returns:
        ap (0.50 to 0.95), ap50, ap75, ap_small, ap_medium, ap_large, as fractions of 1 (-1 where there is no such box), and images_broken.
    """
    found, broken = detections(model, labelled, preparation)
    results = []
    for one in found:
        x0, y0, x1, y1 = one.box
        image_id, category = labelled.images[one.image].id, labelled.category_ids[one.number]
        results.append({"image_id": image_id, "category_id": category, "bbox": [x0, y0, x1 - x0, y1 - y0], "score": one.score})
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


# Visual Genome


def evaluate_visual_genome(model: nn.Module, labelled: LabelledImages, preparation: ShortestEdgePreparation) -> dict[str, float]:
    """Mean average precision over all classes as Bottom-Up-Attention reports it, see `visual_genome_precision`.

    Returns:
        map50, map50_weighted, classes_without_boxes, images_broken.
    """
    found, broken = detections(model, labelled, preparation)
    return {**visual_genome_precision(found, labelled), "images_broken": broken}


def visual_genome_precision(found: Sequence[Detection], labelled: LabelledImages) -> dict[str, float]:
    """Pascal VOC's average precision (of 2010 and later) at an intersection over union above 0.5, widths counted inclusively.

    A class without boxes counts 0 in the mean, as it does there; `map50_weighted` weighs each class by its boxes.

    Source: bottom-up-attention, `lib/datasets/vg_eval.py` and `vg.py`. Differs from it: there detections are moved by a pixel against the
    boxes, and scores rounded to three places.
    """
    count = len(labelled.class_names)
    boxes: list[dict[int, NDArray[np.float32]]] = [{} for _ in range(count)]
    for row, image in enumerate(labelled.images):
        for number in np.unique(image.classes).tolist():
            boxes[number][row] = image.boxes[image.classes == number]
    by_class: list[list[Detection]] = [[] for _ in range(count)]
    for one in found:
        by_class[one.number].append(one)
    precisions = np.array([_class_precision(by_class[number], boxes[number]) for number in range(count)])
    totals = np.array([sum(map(len, of_class.values())) for of_class in boxes])
    weighted = float((precisions * totals).sum() / max(totals.sum(), 1))
    return {"map50": float(precisions.mean()), "map50_weighted": weighted, "classes_without_boxes": int((totals == 0).sum())}


def _class_precision(found: Sequence[Detection], boxes: Mapping[int, NDArray[np.float32]]) -> float:
    """Average precision of one class; boxes (N, 4) by image."""
    total = sum(map(len, boxes.values()))
    if not total or not found:
        return 0.0
    taken = {row: np.zeros(len(of_image), dtype=bool) for row, of_image in boxes.items()}
    right = np.zeros(len(found))
    for rank, one in enumerate(sorted(found, key=lambda one: -one.score)):
        if one.image not in boxes:
            continue
        overlaps = _inclusive_overlaps(np.array(one.box), boxes[one.image])
        best = int(overlaps.argmax())
        if overlaps[best] > 0.5 and not taken[one.image][best]:
            taken[one.image][best], right[rank] = True, 1
    hits = right.cumsum()
    recall, precision = hits / total, hits / np.arange(1, len(found) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(recall, prepend=0) * envelope).sum())


def _inclusive_overlaps(box: NDArray[np.floating], others: NDArray[np.float32]) -> NDArray[np.floating]:
    """(N,) intersection over union of a box (4,) with others (N, 4), widths counted inclusively."""
    shared = np.maximum(np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2]) + 1, 0).prod(axis=1)
    area = (box[2:] - box[:2] + 1).prod() + (others[:, 2:] - others[:, :2] + 1).prod(axis=1)
    overlaps: NDArray[np.floating] = shared / (area - shared)
    return overlaps
