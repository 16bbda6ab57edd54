"""How much of what people annotated a detector finds: the detector on board, or another, on any COCO-style set.

M is the share of the annotated boxes of at least 32 x 32 pixels in area (crowds left out) for which a kept region has an intersection
over union above 0.5 *and* the right best class, at the default selection (confidence above 0.2, 10 to 100 regions). It is what a model
that reads regions gets to see, and no average precision: more regions never lower it. AP50 is COCO's own, of the same regions, each
with its best class and its confidence.

    python benchmarks/on_board.py --images val2017/ --annotations instances_val2017.json
    python benchmarks/on_board.py --images photos/ --annotations held_out.json --detector detector/ --trained-on instances.json
"""

import argparse
import contextlib
import io
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from uniter.datasets.errors import BadInput
from uniter.datasets.image_db.regions import RegionFeatures
from uniter.extract import RegionExtractor
from uniter.extract.training.labelled_images import LabelledImage, LabelledImages, coco_ground_truth, read_labelled_images

LEAST_AREA = 32 * 32
LEAST_BOXES = 10  # of a class in --trained-on: what nobody was shown, nobody can know
AT_ONCE = 64  # photographs between two prints


def intersections_over_unions(left: NDArray[np.floating], right: NDArray[np.floating]) -> NDArray[np.float64]:
    """(N, M) of boxes (N, 4) and (M, 4), x0 y0 x1 y1."""
    corners = np.minimum(left[:, None, 2:], right[None, :, 2:]) - np.maximum(left[:, None, :2], right[None, :, :2])
    intersection = np.clip(corners, 0, None).prod(axis=2, dtype=np.float64)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(axis=1, dtype=np.float64) for boxes in (left, right)]
    union = areas[0][:, None] + areas[1][None] - intersection
    found: NDArray[np.float64] = intersection / np.maximum(union, 1e-9)
    return found


def best_classes(regions: RegionFeatures) -> NDArray[np.int64]:
    """The best class of each region, from 0, the background left out."""
    assert regions.soft_labels is not None
    return np.asarray(regions.soft_labels, dtype=np.float32)[:, 1:].argmax(axis=1)


def count_found(image: LabelledImage, regions: RegionFeatures, classes: NDArray[np.int64]) -> tuple[Counter[int], Counter[int], int]:
    """Annotated boxes that count, by class; those found with their class; and how many were found at all.

    Args:
        image: its classes as the detector numbers them.
        regions: what was kept of it.
        classes: the regions' best classes.
    """
    sides = image.boxes[:, 2:] - image.boxes[:, :2]
    counts = (sides.prod(axis=1) >= LEAST_AREA) & ~image.crowd
    boxes, wanted = image.boxes[counts], image.classes[counts]
    assert regions.boxes is not None
    hit = intersections_over_unions(boxes, np.asarray(regions.boxes, dtype=np.float32)) > 0.5
    right = (hit & (classes[None] == wanted[:, None])).any(axis=1)
    return Counter(wanted.tolist()), Counter(wanted[right].tolist()), int(hit.any(axis=1).sum())


def average_precision(labelled: LabelledImages, results: list[dict[str, Any]]) -> dict[str, float]:
    """AP and AP50 by COCOeval."""
    if not results:
        return {"ap": 0.0, "ap50": 0.0}
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = coco_ground_truth(labelled)
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {"ap": float(evaluation.stats[0]), "ap50": float(evaluation.stats[1])}


def measure(labelled: LabelledImages, extractor: RegionExtractor) -> dict[str, Any]:
    """All figures of a detector on these photographs."""
    numbers = {name: number for number, name in enumerate(extractor.class_names)}
    unknown = [name for name in labelled.class_names if name not in numbers]
    if len(unknown) == len(labelled.class_names):
        raise BadInput(f"the detector knows none of the annotated classes ({', '.join(unknown[:3])} ...)")
    wanted, right, located, regions_kept = Counter[str](), Counter[str](), 0, 0
    results: list[dict[str, Any]] = []
    ids = {numbers[name]: category for name, category in zip(labelled.class_names, labelled.category_ids, strict=True) if name in numbers}
    # Classes that the detector does not know count as not found.
    as_detector = np.array([numbers.get(name, -1 - place) for place, name in enumerate(labelled.class_names)], dtype=np.int64)
    by_number = dict(zip(as_detector.tolist(), labelled.class_names, strict=True))
    seconds = 0.0
    for first in range(0, len(labelled.images), AT_ONCE):
        images = labelled.images[first : first + AT_ONCE]
        started = time.monotonic()
        found = extractor([image.path for image in images])
        seconds += time.monotonic() - started
        for image, regions in zip(images, found, strict=True):
            classes = best_classes(regions)
            renumbered = LabelledImage(
                image.id, image.path, image.size, image.boxes, as_detector[image.classes], image.attributes, image.crowd
            )
            counted, correct, anywhere = count_found(renumbered, regions, classes)
            wanted.update({by_number[number]: count for number, count in counted.items()})
            right.update({by_number[number]: count for number, count in correct.items()})
            located += anywhere
            regions_kept += len(classes)
            assert regions.boxes is not None
            for box, score, number in zip(regions.boxes.tolist(), regions.conf.tolist(), classes.tolist(), strict=True):
                if number in ids:
                    bbox = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
                    results.append({"image_id": image.id, "category_id": ids[number], "bbox": bbox, "score": score})
    boxes = sum(wanted.values())
    return {
        **{"photographs": len(labelled.images), "boxes": boxes, "m": sum(right.values()) / max(boxes, 1)},
        **{"m_person": right["person"] / max(wanted["person"], 1), "persons": wanted["person"], "located": located / max(boxes, 1)},
        **average_precision(labelled, results),
        **{"regions_a_photograph": regions_kept / len(labelled.images), "photographs_a_second": len(labelled.images) / seconds},
        **{"classes_unknown": unknown, "m_by_class": {name: [right[name], count] for name, count in wanted.most_common()}},
    }


def of_frequent_classes(m_by_class: Mapping[str, Sequence[int]], trained_on: Path) -> float:
    """M over the classes of which the training had enough boxes."""
    content = json.loads(trained_on.read_bytes())
    names = {category["id"]: category["name"] for category in content["categories"]}
    boxes = Counter(names[annotation["category_id"]] for annotation in content["annotations"])
    counted = [figures for name, figures in m_by_class.items() if boxes[name] >= LEAST_BOXES]
    return sum(right for right, _ in counted) / max(sum(count for _, count in counted), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="the folder of the photographs")
    parser.add_argument("--annotations", type=Path, required=True, help="COCO's instances JSON; photographs without boxes are left out")
    parser.add_argument("--detector", default="on-board", help="as for uniter-extract (default: on-board)")
    parser.add_argument("--weights", help="as for uniter-extract")
    parser.add_argument("--device", default=None, help="cpu, cuda ... (default: a GPU where there is one)")
    parser.add_argument("--batch-size", type=int, help="photographs that run together (default: fitted to the machine)")
    parser.add_argument("--trained-on", type=Path, help="COCO's instances JSON; M also over the classes with ten boxes or more there")
    parser.add_argument("--json", action="store_true", help="print one JSON object with the figures by class")
    arguments = parser.parse_args()
    read = read_labelled_images(arguments.images, arguments.annotations)
    annotated = [image for image in read.images if len(image.boxes)]
    labelled = LabelledImages(annotated, read.class_names, read.category_ids, read.attribute_names, read.skipped)
    extractor = RegionExtractor(arguments.detector, weights=arguments.weights, device=arguments.device, batch_size=arguments.batch_size)
    figures = measure(labelled, extractor)
    if arguments.trained_on is not None:
        figures["m_frequent"] = of_frequent_classes(figures["m_by_class"], arguments.trained_on)
    if arguments.json:
        print(json.dumps(figures, indent=1))
        return
    print(
        f"{figures['photographs']} photographs, {figures['boxes']} boxes of at least 32 x 32 pixels, {figures['persons']} of them persons"
    )
    for name, title in (
        ("m", "M: found, with the right class"),
        ("m_person", "M of persons"),
        ("m_frequent", f"M of classes with {LEAST_BOXES} boxes"),
        ("located", "found, with whatever class"),
        ("ap50", "AP50"),
        ("ap", "AP"),
        ("regions_a_photograph", "regions a photograph"),
        ("photographs_a_second", "photographs a second"),
    ):
        if name in figures:
            print(f"  {title:<32} {figures[name]:8.3f}")


if __name__ == "__main__":
    main()
