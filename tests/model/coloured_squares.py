"""A world of coloured squares in which models learn in seconds, and a finder of squares that stands for a detector.

A photograph is three or four squares of different colours on white. A region's feature is its mean colour and its place; there is a
region of white ground too. Texts name colours that are there.
"""

import itertools
from collections.abc import Sequence

import cv2
import numpy as np

from uniter.datasets.image_db.regions import RegionFeatures, normalised_boxes
from uniter.datasets.text_db.tokenizer import Tokenizer
from uniter.datasets.text_db.vocabulary_files import SPECIALS

COLOURS = {"red": (0, 0, 255), "green": (0, 160, 0), "blue": (255, 0, 0), "yellow": (0, 220, 255), "black": (0, 0, 0)}
WORDS = (*COLOURS, "square", "squares", "the", "a", "and", "how", "many", "?", "is", "there", "are", "##ish")
VOCABULARY = (*SPECIALS, "!", *dict.fromkeys(WORDS))
ANSWERS = ("three", "four")
SIZE = (60, 80)  # height, width
PLACES = [(5 + 20 * row, 6 + 26 * column) for row, column in itertools.product(range(2), range(3))]
WIDTH = 8


def tokenizer() -> Tokenizer:
    return Tokenizer(VOCABULARY, name="colours", lowercase=False)


def photograph(colours: Sequence[str], seed: int) -> np.ndarray:
    """Squares of these colours at places that the seed decides; (60, 80, 3) uint8 BGR."""
    rng = np.random.default_rng(seed)
    image = np.full((*SIZE, 3), 255, dtype=np.uint8)
    for colour, place in zip(colours, rng.permutation(len(PLACES)), strict=False):
        y, x = PLACES[place]
        image[y : y + 16, x : x + 18] = COLOURS[colour]
    return image


def some_colours(seed: int) -> list[str]:
    rng = np.random.default_rng((seed, 7))
    return [str(colour) for colour in rng.permutation(list(COLOURS))[: 3 + seed % 2]]


def box_of(image: np.ndarray, colour: str) -> tuple[int, int, int, int]:
    """x0 y0 x1 y1 of the square of a colour, x1 and y1 exclusive."""
    y, x = np.nonzero((image == COLOURS[colour]).all(axis=2))
    return int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1


def find_squares(images: Sequence[object]) -> list[RegionFeatures]:
    """The squares of each photograph (a file, PNG, or pixels), from left to right, and the ground behind them."""
    return [_regions(image if isinstance(image, np.ndarray) else cv2.imread(str(image))) for image in images]


def _regions(image: np.ndarray) -> RegionFeatures:
    count, _, found, _ = cv2.connectedComponentsWithStats((image.min(axis=2) < 250).astype(np.uint8))
    boxes = sorted((int(x), int(y), int(x + w), int(y + h)) for x, y, w, h, _ in found[1:count])
    boxes.append((0, 0, SIZE[1], SIZE[0]))
    features = np.zeros((len(boxes), WIDTH), dtype=np.float16)
    soft_labels = np.full((len(boxes), 3), 0.05, dtype=np.float16)
    for row, (x0, y0, x1, y1) in enumerate(boxes):
        whole = row == len(boxes) - 1
        features[row, :3] = [1, 1, 1] if whole else image[y0:y1, x0:x1].mean(axis=(0, 1)) / 255
        features[row, 3] = whole
        soft_labels[row, 2 if whole else 1] = 0.9
    pixels = np.array(boxes, dtype=np.float32)
    confidence = np.full(len(boxes), 0.9, dtype=np.float16)
    return RegionFeatures(features, normalised_boxes(pixels, SIZE), confidence, pixels, soft_labels, SIZE)
