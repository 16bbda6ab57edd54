"""What is hidden from the model, and which picture a text is paired with: every draw of the pre-training tasks.

Each function takes its random generator and draws in the published order, so that the same generator state gives the
masks that the original code gives. A region or word is always masked: a mask without a target would teach nothing.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NOT_PREDICTED = -1


def mask_words(
    input_ids: Sequence[int], rng: random.Random, *, mask_id: int, v_range: tuple[int, int], probability: float = 0.15
) -> tuple[list[int], list[int]]:
    """Choose words to predict: of those 80 % become [MASK], 10 % a random word piece, 10 % stay.

    Args:
        input_ids: word pieces without [CLS] and [SEP], at least one. Not modified.
        rng: decides; one draw a word, one more for each random replacement.
        mask_id: id of [MASK].
        v_range: the random replacements, from the first id up to but without the second.
        probability: chance of each word to be predicted.

    Returns:
        The ids that the model reads, and the ids to be predicted with -1 where nothing is; both as long as `input_ids`.

    Raises:
        ValueError: there is no word.

    Source: UNITER, section 3.2; draws in the order of ChenRocks/UNITER `data/mlm.py`.
    """
    if not input_ids:
        raise ValueError("there is no word to mask")
    read, wanted = list(input_ids), [NOT_PREDICTED] * len(input_ids)
    chosen = False
    for position, word in enumerate(input_ids):
        draw = rng.random()
        if draw >= probability:
            continue
        chosen = True
        wanted[position] = word
        draw /= probability
        if draw < 0.8:
            read[position] = mask_id
        elif draw < 0.9:
            read[position] = rng.choice(range(*v_range))
    if not chosen:
        read[0], wanted[0] = mask_id, input_ids[0]
    return read, wanted


def mask_regions(count: int, rng: random.Random, *, probability: float = 0.15) -> NDArray[np.bool_]:
    """Choose regions whose features are hidden, at least one.

    Args:
        count: regions of the image, at least one.
        rng: decides; one draw a region, one more if none was chosen.
        probability: chance of each region.

    Returns:
        (count,) bool, True where hidden.

    Raises:
        ValueError: there is no region.

    Source: UNITER, section 3.2; draws in the order of ChenRocks/UNITER `data/mrm.py`.
    """
    if count < 1:
        raise ValueError("there is no region to mask")
    draw = rng.random
    rows = [row for row in range(count) if draw() < probability] or [rng.choice(range(count))]
    hidden = bytearray(count)  # for so few rows quicker than indexing an array
    for row in rows:
        hidden[row] = 1
    return np.frombuffer(hidden, dtype=np.bool_)


@dataclass(frozen=True, slots=True)
class Pairing:
    """Which picture each example is shown with during one epoch.

    Attributes:
        images: (N,) int32, the row of the image shown with each example.
        matched: (N,) bool, True where it is the example's own.
    """

    images: NDArray[np.int32]
    matched: NDArray[np.bool_]


def true_pairs(own_images: NDArray[np.int32]) -> Pairing:
    """Every text with its own picture. own_images: (N,) int32."""
    return Pairing(own_images, np.ones(len(own_images), dtype=np.bool_))


def random_pairs(own_images: NDArray[np.int32], rng: np.random.Generator, *, negative_probability: float = 0.5) -> Pairing:
    """Pairs for image-text matching: with `negative_probability` another picture, uniform over the corpus' other pictures.

    Only the picture is ever replaced (`Differs from the paper:` which replaces either; the published code does as we do).

    Args:
        own_images: (N,) int32, the row of each example's own image.
        rng: decides.
        negative_probability: chance of each example to be shown another picture.

    Raises:
        ValueError: there is only one picture, so none can be another one.
    """
    pool = np.unique(own_images)
    if len(pool) < 2:
        raise ValueError("matching needs at least two different pictures")
    matched = rng.random(len(own_images)) >= negative_probability
    # Drawn from one picture fewer; draws from the own one onwards are moved up by one: uniform over the others, no redrawing.
    own = np.searchsorted(pool, own_images)
    other = rng.integers(0, len(pool) - 1, size=len(own_images))
    other += other >= own
    return Pairing(np.where(matched, own_images, pool[other]).astype(np.int32), matched)


def published_pairs(
    own_images: Sequence[int], rng: random.Random, numpy_rng: np.random.RandomState, *, negative_probability: float = 0.5
) -> Pairing:
    """The same draw in the order of the published code: labels first, then one picture for each mismatched example, redrawn while
    it is the example's own.

    The pool is sorted; the published one is in the order of a set of strings, which differs from run to run.

    Args, Raises: as `random_pairs`.

    Source: ChenRocks/UNITER `data/itm.py`.
    """
    pool = sorted(set(own_images))
    if len(pool) < 2:
        raise ValueError("matching needs at least two different pictures")
    labels = numpy_rng.choice([0, 1], size=len(own_images), p=[negative_probability, 1 - negative_probability])
    images = []
    for own, label in zip(own_images, labels, strict=True):
        image = own
        while label == 0 and image == own:
            image = rng.sample(pool, 1)[0]
        images.append(image)
    return Pairing(np.array(images, dtype=np.int32), labels.astype(np.bool_))
