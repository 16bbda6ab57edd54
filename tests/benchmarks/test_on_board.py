"""The measure of detectors, against figures counted by hand."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from uniter.datasets.errors import BadInput
from uniter.datasets.image_db.regions import RegionFeatures, normalised_boxes
from uniter.extract.training.labelled_images import read_labelled_images

NAMES = ("cat", "dog", "person")


class Told:
    """Says of each photograph what it is told to."""

    class_names = NAMES

    def __init__(self, answers: dict[str, list[tuple[list[float], str, float]]]) -> None:
        self.answers = answers

    def __call__(self, paths: Sequence[Path]) -> list[RegionFeatures]:
        found = []
        for path in paths:
            answer = self.answers[path.name]
            boxes = np.array([box for box, _, _ in answer], dtype=np.float32)
            soft = np.zeros((len(answer), 4), dtype=np.float32)
            for row, (_, name, share) in zip(soft, answer, strict=True):
                row[1 + NAMES.index(name)] = share
            confidence = np.array([share for _, _, share in answer], dtype=np.float32)
            found.append(
                RegionFeatures(
                    np.zeros((len(answer), 2), np.float32), normalised_boxes(boxes, (200, 200)), confidence, boxes, soft, (200, 200)
                )
            )
        return found


@pytest.fixture
def annotated(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (200, 200)).save(tmp_path / name)
    boxes = [
        (1, 1, [0, 0, 100, 100], 0),  # a person, found
        (1, 2, [100, 100, 80, 80], 0),  # a cat, taken for a dog
        (1, 3, [0, 100, 10, 10], 0),  # too small to count
        (2, 1, [0, 0, 50, 50], 0),  # a person, not found
        (2, 3, [50, 50, 100, 100], 0),  # a unicorn, which the detector does not know
        (2, 1, [0, 0, 200, 200], 1),  # a crowd
    ]
    content = {
        "images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}],
        "categories": [{"id": 1, "name": "person"}, {"id": 2, "name": "cat"}, {"id": 3, "name": "unicorn"}],
        "annotations": [
            {"id": number, "image_id": image, "category_id": category, "bbox": box, "iscrowd": crowd}
            for number, (image, category, box, crowd) in enumerate(boxes)
        ],
    }
    (tmp_path / "instances.json").write_text(json.dumps(content))
    return tmp_path


def test_what_is_found_is_counted(script: Callable[[str], ModuleType], annotated: Path) -> None:
    said: Any = Told({
        "a.png": [([0, 0, 100, 95], "person", 0.9), ([102, 100, 180, 180], "dog", 0.6), ([0, 0, 20, 20], "cat", 0.1)],
        "b.png": [([0, 0, 90, 90], "person", 0.8), ([50, 50, 150, 150], "dog", 0.7)],
    })  # fmt: skip
    figures = script("on_board").measure(read_labelled_images(annotated, annotated / "instances.json"), said)
    assert (figures["photographs"], figures["boxes"], figures["persons"]) == (2, 4, 2)
    assert (figures["m"], figures["m_person"], figures["located"]) == (1 / 4, 1 / 2, 3 / 4)
    assert figures["classes_unknown"] == ["unicorn"] and figures["m_by_class"]["person"] == [1, 2]
    assert figures["regions_a_photograph"] == 2.5 and 0 < figures["ap50"] < 1
    of_frequent = script("on_board").of_frequent_classes
    assert of_frequent(figures["m_by_class"], annotated / "instances.json") == 0  # of no class there are ten


def test_a_detector_of_other_things_is_refused(script: Callable[[str], ModuleType], annotated: Path) -> None:
    said: Any = Told({})
    said.class_names = ("apple",)
    with pytest.raises(BadInput, match="knows none of the annotated classes"):
        script("on_board").measure(read_labelled_images(annotated, annotated / "instances.json"), said)
