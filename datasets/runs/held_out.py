"""What a detector in training found on the photographs held out: `OUT/held_out.json`, written at its last validation.

    {"step", "images", "confidence", "classes": [{"name", "boxes", "ap", "ap50"}], "worst": [{"file", "size", "missed", "wrong",
     "annotated": [{"box", "name"}], "found": [{"box", "name", "confidence"}]}]}

Boxes are x0 y0 x1 y1 in pixels of the upright image, sizes are (height, width).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from uniter.datasets.errors import BadInput
from uniter.datasets.storage.files import read_json_object, write_json

HELD_OUT_FILE: Final = "held_out.json"

Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class ClassFigures:
    """How well one class is found: how many boxes of it are annotated, and its average precision (COCO's, and at IoU 0.5)."""

    name: str
    boxes: int
    ap: float
    ap50: float


@dataclass(frozen=True, slots=True)
class FoundBox:
    """A box with its class; `confidence` is 1 for an annotated one."""

    box: Box
    name: str
    confidence: float = 1.0


@dataclass(frozen=True, slots=True)
class HeldOutPicture:
    """A photograph held out: how many annotated boxes were missed, how many found ones are wrong, and all of them."""

    file: str
    size: tuple[int, int]
    missed: int
    wrong: int
    annotated: Sequence[FoundBox]
    found: Sequence[FoundBox]


@dataclass(frozen=True, slots=True)
class HeldOut:
    """All that the page of a detector's training shows.

    Attributes:
        step: after which update; images: how many photographs are held out.
        confidence: from which on a box counts as found.
        classes: those of which a box is annotated, by falling AP.
        worst: the photographs with most mistakes for their boxes, worst first.
    """

    step: int
    images: int
    confidence: float
    classes: Sequence[ClassFigures]
    worst: Sequence[HeldOutPicture]

    def write(self, run: Path) -> None:
        """Write it into a training's folder, where `read_held_out` finds it."""
        write_json(run / HELD_OUT_FILE, asdict(self))


def read_held_out(run: Path) -> HeldOut | None:
    """What stands in the folder of a training; None where it is no detector's, or has had no validation at its end yet.

    Raises:
        BadInput: the file is damaged.
    """
    path = run / HELD_OUT_FILE
    if not path.is_file():
        return None
    content = read_json_object(path)
    try:
        return HeldOut(
            int(content["step"]),
            int(content["images"]),
            float(content["confidence"]),
            [ClassFigures(str(row["name"]), int(row["boxes"]), float(row["ap"]), float(row["ap50"])) for row in content["classes"]],
            [_picture(row) for row in content["worst"]],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{path} is damaged ({error!r}); the training that wrote it writes it again once the file is gone") from error


def _picture(row: Mapping[str, Any]) -> HeldOutPicture:
    height, width = row["size"]
    if min(height, width) < 1:
        raise ValueError(f"a size of {height} x {width}")
    boxes = [[_box(found) for found in row[name]] for name in ("annotated", "found")]
    return HeldOutPicture(str(row["file"]), (int(height), int(width)), int(row["missed"]), int(row["wrong"]), *boxes)


def _box(row: Mapping[str, Any]) -> FoundBox:
    x0, y0, x1, y1 = map(float, row["box"])
    return FoundBox((x0, y0, x1, y1), str(row["name"]), float(row["confidence"]))
