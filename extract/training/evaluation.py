"""COCO's average precision of what the network finds."""

import contextlib
import io
import logging
from typing import Any

import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

from uniter.datasets.errors import BadInput
from uniter.extract.detector.preparation import ShortestEdgePreparation
from uniter.extract.training.batches import channels_first, network_input
from uniter.extract.training.labelled_images import LabelledImages, coco_ground_truth

log = logging.getLogger(__name__)

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
