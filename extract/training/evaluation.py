"""Average precision of what the network finds, class by class, and the photographs on which it does worst.

COCO's; or Visual Genome's, as Bottom-Up-Attention reports it.
"""

import contextlib
import io
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
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
        figures: see the functions that make it.
        classes, worst: as in `HeldOut`.
        images: how many were looked at.
    """

    figures: dict[str, float]
    classes: list[ClassFigures]
    worst: list[HeldOutPicture]
    images: int

    def held_out(self, step: int) -> HeldOut:
        """The figures as `held_out.json` keeps them for `uniter-view`; `step` is the update they were measured after."""
        return HeldOut(step, self.images, CONFIDENCE, self.classes, self.worst)


def evaluate_boxes(
    model: nn.Module, labelled: LabelledImages, preparation: ShortestEdgePreparation, *, folder: Path, batch_size: int = 16
) -> Evaluation:
    """Evaluate the model's final (regressed, class-wise suppressed) detections by COCOeval.

    Args:
        folder: of the photographs; their names are told below it.

    Returns:
        Figures ap (0.50 to 0.95), ap50, ap75, ap_small, ap_medium, ap_large, as fractions of 1 (-1 where there is no such box), and
        images_broken.
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
    return _pictures(right, wrong, labelled, results, folder)


def _pictures(
    right: Counter[int], wrong: Counter[int], labelled: LabelledImages, results: list[dict[str, Any]], folder: Path
) -> list[HeldOutPicture]:
    """The photographs with most mistakes; `right` and `wrong` count each image id's boxes that are surer than `CONFIDENCE`."""
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


# Visual Genome

THRESHOLDS: Final = np.arange(50, 100, 5) / 100
"""Of intersection over union; the first one is Bottom-Up-Attention's."""


def evaluate_visual_genome(
    model: nn.Module, labelled: LabelledImages, preparation: ShortestEdgePreparation, *, folder: Path, batch_size: int = 16
) -> Evaluation:
    """Mean average precision over all classes as Bottom-Up-Attention reports it, see `visual_genome_precision`.

    Returns:
        Figures map50, map50_weighted, classes_without_boxes, images_broken.
    """
    results, broken = _detections(model, labelled, preparation, batch_size)
    figures, classes, right, wrong = visual_genome_precision(results, labelled)
    return Evaluation(
        {**figures, "images_broken": broken}, classes, _pictures(right, wrong, labelled, results, folder), len(labelled.images)
    )


def visual_genome_precision(
    results: Sequence[Mapping[str, Any]], labelled: LabelledImages
) -> tuple[dict[str, float], list[ClassFigures], Counter[int], Counter[int]]:
    """Pascal VOC's average precision (of 2010 and later) at an intersection over union above 0.5, widths counted inclusively.

    A class without boxes counts 0 in the mean, as it does there; `map50_weighted` weighs each class by its boxes.

    Args:
        results: COCO's rows.

    Returns:
        The figures; those of each class that has boxes, whose `ap` is the mean over `THRESHOLDS`; and how many boxes that are surer than
        `CONFIDENCE` are right and wrong, by image id.

    Source: bottom-up-attention, `lib/datasets/vg_eval.py` and `vg.py`. Differs from it: there detections are moved by a pixel against the
    boxes, and scores rounded to three places.
    """
    boxes: dict[int, dict[int, NDArray[np.float32]]] = {}
    for image in labelled.images:
        for number in np.unique(image.classes).tolist():
            boxes.setdefault(labelled.category_ids[number], {})[image.id] = image.boxes[image.classes == number]
    by_class: dict[int, list[Mapping[str, Any]]] = {}
    for row in results:
        by_class.setdefault(row["category_id"], []).append(row)
    classes, right, wrong = [], Counter[int](), Counter[int]()
    for category, name in zip(labelled.category_ids, labelled.class_names, strict=True):
        found = sorted(by_class.get(category, ()), key=lambda row: -row["score"])
        hits = _hits(found, boxes.get(category, {}))
        for row, hit in zip(found, hits[:, 0], strict=True):
            if row["score"] >= CONFIDENCE:
                (right if hit else wrong)[row["image_id"]] += 1
        if count := sum(map(len, boxes.get(category, {}).values())):
            precisions = _precisions(hits, count)
            classes.append(ClassFigures(name, count, float(precisions.mean()), float(precisions[0])))
    total = sum(row.boxes for row in classes)
    figures = {
        "map50": sum(row.ap50 for row in classes) / len(labelled.class_names),
        "map50_weighted": sum(row.ap50 * row.boxes for row in classes) / max(total, 1),
        "classes_without_boxes": len(labelled.class_names) - len(classes),
    }
    return figures, sorted(classes, key=lambda row: (-row.ap, -row.boxes, row.name)), right, wrong


def _hits(found: Sequence[Mapping[str, Any]], boxes: Mapping[int, NDArray[np.float32]]) -> NDArray[np.bool_]:
    """(D, T): which detections of a class, best first, are its image's best box, still free, at each of `THRESHOLDS`."""
    taken = {image: np.zeros((len(of_image), len(THRESHOLDS)), dtype=bool) for image, of_image in boxes.items()}
    hits = np.zeros((len(found), len(THRESHOLDS)), dtype=bool)
    for rank, row in enumerate(found):
        if row["image_id"] in boxes:
            overlaps = _inclusive_overlaps(row["bbox"], boxes[row["image_id"]])
            best = int(overlaps.argmax())
            above, free = overlaps[best] > THRESHOLDS, ~taken[row["image_id"]][best]
            hits[rank] = above & free
            taken[row["image_id"]][best] |= above
    return hits


def _precisions(hits: NDArray[np.bool_], total: int) -> NDArray[np.floating]:
    """(T,) areas under precision and recall, precision made to fall, of (D, T) hits among `total` boxes."""
    right = hits.cumsum(axis=0)
    precision = right / np.arange(1, len(hits) + 1)[:, None]
    envelope = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
    areas: NDArray[np.floating] = (np.diff(right / total, axis=0, prepend=0) * envelope).sum(axis=0)
    return areas


def _inclusive_overlaps(bbox: Sequence[float], others: NDArray[np.float32]) -> NDArray[np.floating]:
    """(N,) intersection over union of x, y, width, height with others (N, 4) x0 y0 x1 y1, pixels counted inclusively."""
    corner, side = np.array(bbox[:2]), np.array(bbox[2:])
    shared = np.maximum(np.minimum(corner + side, others[:, 2:]) - np.maximum(corner, others[:, :2]) + 1, 0).prod(axis=1)
    overlaps: NDArray[np.floating] = shared / ((side + 1).prod() + (others[:, 2:] - others[:, :2] + 1).prod(axis=1) - shared)
    return overlaps
