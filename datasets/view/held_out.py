"""What a detector in training found on the photographs held out, drawn beside what is annotated."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from uniter.datasets.image_db.photographs import Photographs
from uniter.datasets.image_db.regions import RegionFeatures, normalised_boxes
from uniter.datasets.runs.held_out import FoundBox, HeldOut, HeldOutPicture
from uniter.datasets.view.drawing import draw_regions
from uniter.datasets.view.labels import RegionLabel
from uniter.datasets.view.page import PICTURES
from uniter.datasets.view.photographs import photograph
from uniter.datasets.view.pictures import ByteImage, resized, write_picture

_LONGEST = 640  # pixels of each half
_GAP = 8


def draw_held_out(name: str, place: int, training: HeldOut, folder: Path, photographs: Photographs | None) -> dict[str, Any]:
    """Draw the worst photographs of a training; what the template says of it.

    Args:
        name, place: the training's, and where it stands among others.
        folder: the report's.
        photographs: those held out; None draws on empty canvases.
    """
    pictures = []
    for number, picture in enumerate(training.worst):
        image, _, notes = photograph(picture.file, _regions(picture, ()), photographs)
        small = resized(image, _LONGEST)
        halves = [_drawn(small, picture, boxes) for boxes in (picture.annotated, picture.found)]
        gap = np.full((small.shape[0], _GAP, 3), 255, dtype=np.uint8)
        drawn = f"{PICTURES}/held-out-{place}-{number:03d}.jpg"
        write_picture(folder / drawn, np.concatenate([halves[0], gap, halves[1]], axis=1))
        said = [f"{len(picture.annotated)} annotated", f"{picture.missed} missed", f"{picture.wrong} wrong", *notes]
        pictures.append({"file": picture.file, "drawn": drawn, "notes": said})
    told = {"step": training.step, "images": training.images, "confidence": training.confidence, "classes": training.classes}
    return {"name": name, **told, "pictures": pictures}


def _drawn(image: ByteImage, picture: HeldOutPicture, boxes: Sequence[FoundBox]) -> ByteImage:
    labels = [RegionLabel(number, box.name, box.confidence) for number, box in enumerate(boxes)]
    return draw_regions(image, _regions(picture, boxes), labels)


def _regions(picture: HeldOutPicture, boxes: Sequence[FoundBox]) -> RegionFeatures:
    """Boxes as regions without features: what is drawn are their places."""
    corners = np.array([box.box for box in boxes], dtype=np.float32).reshape(-1, 4)
    confidences = np.array([box.confidence for box in boxes], dtype=np.float32)
    nothing = np.zeros((len(boxes), 0), dtype=np.float32)
    return RegionFeatures(features=nothing, norm_bb=normalised_boxes(corners, picture.size), conf=confidences, size=picture.size)
