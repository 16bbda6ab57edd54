"""Average precision of what the network finds: COCO's, class by class, with the photographs on which it does worst; and Visual Genome's as
Bottom-Up-Attention reports it.
"""

import contextlib
import io
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

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
        figures: ap (0.50 to 0.95), ap50, ap75, ap_small, ap_medium, ap_large, as fractions of 1 (-1 where there is no such box), and
            images_broken.
        classes, worst: as in `HeldOut`; none of a training that is judged as Visual Genome's.
        images: how many were looked at.
    """

    figures: dict[str, float]
    classes: list[ClassFigures]
    worst: list[HeldOutPicture]
    images: int

    def held_out(self, step: int) -> HeldOut:
        return HeldOut(step, self.images, CONFIDENCE, self.classes, self.worst)


class Evaluator(Protocol):
    """How the images held out are judged; `folder` is that of the photographs."""

    def __call__(self, model: nn.Module, labelled: LabelledImages, preparation: ShortestEdgePreparation, *, folder: Path) -> Evaluation: ...


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


def evaluate_boxes(model: nn.Module, labelled: LabelledImages, preparation: ShortestEdgePreparation, *, folder: Path) -> Evaluation:
    """Box average precision of the model's detections by COCOeval.

    Args:
        folder: of the photographs; their names are told below it.
    """
    found, broken = detections(model, labelled, preparation)
    results = []
    for one in found:
        x0, y0, x1, y1 = one.box
        image_id, category = labelled.images[one.image].id, labelled.category_ids[one.number]
        results.append({"image_id": image_id, "category_id": category, "bbox": [x0, y0, x1 - x0, y1 - y0], "score": one.score})
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


# Visual Genome


def evaluate_visual_genome(model: nn.Module, labelled: LabelledImages, preparation: ShortestEdgePreparation, *, folder: Path) -> Evaluation:
    """Mean average precision over all classes as Bottom-Up-Attention reports it, see `visual_genome_precision`.

    Its figures are map50, map50_weighted, classes_without_boxes, images_broken.
    """
    found, broken = detections(model, labelled, preparation)
    return Evaluation({**visual_genome_precision(found, labelled), "images_broken": broken}, [], [], len(labelled.images))


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
