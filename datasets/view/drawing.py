"""Regions drawn on their photograph: numbered boxes with class names and confidences.

Number k on a picture is row k of the arrays, counted from 0. Boxes speak pixels of the *upright* image, so a photograph is turned
by its EXIF orientation before anything is drawn on it. Images are BGR, as OpenCV wants them. What a reader would get wrong: a record's
boxes are drawn from their fractions of the image, so a photograph of any scale will do.
"""

import re
from collections.abc import Sequence
from dataclasses import replace

import cv2
import numpy as np
from numpy.typing import NDArray

from uniter.datasets.image_db.regions import RegionFeatures, pixel_boxes
from uniter.datasets.view.labels import Colour, RegionLabel, class_colour
from uniter.datasets.view.pictures import ByteImage

_FONT = cv2.FONT_HERSHEY_SIMPLEX
_PADDING = 3  # pixels between a label's text and its edge


def draw_regions(
    image: ByteImage, regions: RegionFeatures, labels: Sequence[RegionLabel], *, most: int | None = None, text_height: int = 13
) -> ByteImage:
    """Draw numbered, named boxes; no label hides another.

    Args:
        image: (H, W, 3) uint8 BGR, upright, of any scale. Not modified.
        regions: N regions; their fractions of the image are drawn.
        labels: N labels, as `label_regions` makes them.
        most: draw only so many, the most confident ones; None draws all.
        text_height: pixels of a label's capital letters and their surroundings; 13 is readable on a screen.

    Returns:
        A new image of the same shape. A label that finds no room beside its box is shortened (without the confidence, then the
        number alone), then put at the nearest free place with a line to its box; on a picture full of labels it is left out.
    """
    height, width = image.shape[:2]
    picture = image.copy()
    order = np.argsort([-label.confidence for label in labels], kind="stable")[:most]
    boxes = pixel_boxes(np.asarray(regions.norm_bb, dtype=np.float32), (height, width))
    corners = np.clip(np.rint(boxes), 0, [width - 1, height - 1, width - 1, height - 1]).astype(int)
    colours = {int(k): class_colour(labels[k].name or "") for k in order}
    for k in order[::-1]:  # the most confident ones last, on top
        draw_box(picture, corners[k], colours[int(k)])
    wordings = [labels[k].shortened() for k in order]
    for k, found in zip(order, _places(wordings, corners[order], (height, width), text_height), strict=True):
        if found is not None:
            _draw_label(picture, *found, corners[k], colours[int(k)], text_height)
    return picture


def draw_box(picture: ByteImage, corners: NDArray[np.integer], colour: Colour) -> None:
    """Draw one box, outlined in black so that it stands out from any photograph, into the picture itself.

    Args:
        picture: (H, W, 3) uint8 BGR. Modified.
        corners: (4,) x0 y0 x1 y1, whole pixels within the picture.
    """
    x0, y0, x1, y1 = (int(value) for value in corners)
    cv2.rectangle(picture, (x0, y0), (x1, y1), (0, 0, 0), 3, cv2.LINE_AA)
    cv2.rectangle(picture, (x0, y0), (x1, y1), colour, 2, cv2.LINE_AA)


def draw_weights(image: ByteImage, regions: RegionFeatures, labels: Sequence[RegionLabel], weights: NDArray[np.floating]) -> ByteImage:
    """Light up the regions by their weights (attention, a row of a transport plan); the heaviest are outlined and named: three at
    most, and none that weighs less than a tenth of the first.

    Args:
        image: (H, W, 3) uint8 BGR, upright, of any scale. Not modified.
        regions, labels: N of each, as for `draw_regions`.
        weights: (N,) not negative; the greatest is shown as full light, whatever it is.
    """
    height, width = image.shape[:2]
    light = np.zeros((height, width), dtype=np.float32)
    boxes = np.rint(pixel_boxes(np.asarray(regions.norm_bb, dtype=np.float32), (height, width))).astype(int)
    corners = np.clip(boxes, 0, [width - 1, height - 1, width - 1, height - 1])
    most = max(float(np.max(weights, initial=0.0)), 1e-12)
    for (x0, y0, x1, y1), weight in zip(corners.tolist(), weights.tolist(), strict=True):
        inside = light[y0 : y1 + 1, x0 : x1 + 1]
        np.maximum(inside, weight / most, out=inside)
    picture = np.rint(image * (0.25 + 0.75 * light)[:, :, None]).astype(np.uint8)
    heaviest = np.argsort(-np.asarray(weights), kind="stable")[:3]
    heaviest = heaviest[np.asarray(weights)[heaviest] >= 0.1 * most]
    named = [replace(labels[k], confidence=float(weights[k])) for k in heaviest]
    return draw_regions(picture, regions.rows(heaviest), named, text_height=16)


def _places(
    texts: Sequence[Sequence[str]], boxes: NDArray[np.integer], size: tuple[int, int], text_height: int
) -> list[tuple[str, NDArray[np.integer]] | None]:
    """For each box the text that found room and its rectangle (4,) x0 y0 x1 y1 in pixels, exclusive at the end; the first choose first.

    `texts` are each box's wordings, longest first; `boxes` (N, 4) pixels x0 y0 x1 y1; `size` is (height, width).
    """
    placed = np.zeros((0, 4), dtype=int)
    places: list[tuple[str, NDArray[np.integer]] | None] = []
    for wordings, box in zip(texts, boxes, strict=True):
        found = _find_room(wordings, box, size, placed, text_height)
        places.append(found)
        if found is not None:
            placed = np.concatenate([placed, found[1][None]])
    return places


def _scale(text_height: int) -> float:
    return text_height / 30.0  # Hershey's simplex capitals are about 21 pixels high at scale 1; the rest is air


def _find_room(
    wordings: Sequence[str], box: NDArray[np.integer], size: tuple[int, int], placed: NDArray[np.integer], text_height: int
) -> tuple[str, NDArray[np.integer]] | None:
    height, width = size
    for near in (True, False):
        for text in wordings:
            (text_width, _), _ = cv2.getTextSize(_drawable(text), _FONT, _scale(text_height), 1)
            label_width, label_height = text_width + 2 * _PADDING, text_height + 2
            if label_width > width or label_height > height:
                continue
            tops = _beside(box, label_width, label_height) if near else _anywhere(box, label_width, label_height, size)
            tops = np.clip(tops, 0, [width - label_width, height - label_height])
            places = np.concatenate([tops, tops + np.array([label_width, label_height])], axis=1)
            hidden = (
                (places[:, None, 0] < placed[None, :, 2])
                & (placed[None, :, 0] < places[:, None, 2])
                & (places[:, None, 1] < placed[None, :, 3])
                & (placed[None, :, 1] < places[:, None, 3])
            ).any(axis=1)
            if not hidden.all():
                return text, places[int(np.argmin(hidden))]
    return None


def _beside(box: NDArray[np.integer], label_width: int, label_height: int) -> NDArray[np.integer]:
    """Left upper corners of places at the box's edges, best first: its corners, then along its upper, left, right, lower edge."""
    x0, y0, x1, y1 = (int(value) for value in box)
    right, bottom = max(x0, x1 - label_width), max(y0, y1 - label_height)
    corners = [
        (x0, y0 - label_height),
        (x0, y0),
        (x0, bottom),
        (x0, y1),
        (right, y0),
        (right, y0 - label_height),
        (right, bottom),
        (right, y1),
    ]
    step = max(4, label_height // 2)
    across, down = range(x0, right + 1, step), range(y0, bottom + 1, step)
    edges = [(x, y0 - label_height) for x in across] + [(x, y0) for x in across] + [(x0, y) for y in down] + [(right, y) for y in down]
    edges += [(x, bottom) for x in across] + [(x, y1) for x in across]
    return np.array(corners + edges, dtype=int)


def _anywhere(box: NDArray[np.integer], label_width: int, label_height: int, size: tuple[int, int]) -> NDArray[np.integer]:
    height, width = size
    grid_x, grid_y = np.meshgrid(
        np.arange(0, max(1, width - label_width + 1), 6), np.arange(0, max(1, height - label_height + 1), max(4, label_height // 2))
    )
    tops = np.stack([grid_x.ravel(), grid_y.ravel()], axis=1)
    middle = tops + np.array([label_width // 2, label_height // 2])
    nearest = np.clip(middle, box[:2], box[2:])
    ordered: NDArray[np.integer] = tops[np.argsort(((middle - nearest) ** 2).sum(axis=1), kind="stable")]
    return ordered


def _draw_label(
    picture: ByteImage, text: str, place: NDArray[np.integer], box: NDArray[np.integer], colour: Colour, text_height: int
) -> None:
    x0, y0, x1, y1 = (int(value) for value in place)
    touches = x0 <= box[2] + 1 and box[0] - 1 <= x1 and y0 <= box[3] + 1 and box[1] - 1 <= y1
    if not touches:
        middle = ((x0 + x1) // 2, (y0 + y1) // 2)
        edge = (int(np.clip(middle[0], box[0], box[2])), int(np.clip(middle[1], box[1], box[3])))
        cv2.line(picture, middle, edge, colour, 1, cv2.LINE_AA)
    cv2.rectangle(picture, (x0, y0), (x1 - 1, y1 - 1), colour, cv2.FILLED)
    blue, green, red = colour
    ink = (0, 0, 0) if 0.114 * blue + 0.587 * green + 0.299 * red > 120 else (255, 255, 255)
    baseline = y1 - max(2, round(text_height * 0.3))
    cv2.putText(picture, _drawable(text), (x0 + _PADDING, baseline), _FONT, _scale(text_height), ink, 1, cv2.LINE_AA)


def _drawable(text: str) -> str:
    """OpenCV's font holds ASCII only; other letters become a question mark (the page beside the picture has them all)."""
    return re.sub(r"[^ -~]", "?", text)
