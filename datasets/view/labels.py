"""Labels of regions: which words and which colour stand for one.

What a reader would get wrong: class names are counted without the background, the distributions of a record with it in column 0.
"""

import colorsys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from uniter.datasets.image_db.regions import RegionFeatures
from uniter.datasets.vocabulary import visual_genome_attributes, visual_genome_objects

Colour = tuple[int, int, int]

# An attribute is named before the class from this probability on; Bottom-Up-Attention's own demonstration draws it so.
ATTRIBUTE_SHOWN_FROM = 0.1
_LEAST_LUMINANCE = 0.55


@dataclass(frozen=True, slots=True)
class RegionLabel:
    """What is known of one region: its row number, class, confidence and attribute (None where unknown)."""

    number: int
    name: str | None
    confidence: float
    attribute: str | None = None
    attribute_confidence: float = 0.0

    @property
    def words(self) -> str:
        """The class with its attribute in front of it where that is likely, "" where no class is known."""
        if self.name is None:
            return ""
        if self.attribute is not None and self.attribute_confidence > ATTRIBUTE_SHOWN_FROM:
            return f"{self.attribute} {self.name}"
        return self.name

    def shortened(self) -> tuple[str, ...]:
        """The label's text, longest first: number, words and confidence; number and words; the number alone."""
        if not self.words:
            return (f"{self.number}: {self.confidence:.2f}", str(self.number))
        return (f"{self.number} {self.words} {self.confidence:.2f}", f"{self.number} {self.words}", str(self.number))


def label_regions(
    regions: RegionFeatures, *, class_names: Sequence[str] | None = None, attribute_names: Sequence[str] | None = None
) -> list[RegionLabel]:
    """Name each region's best class, and its best attribute where the record has attributes.

    Args:
        regions: N regions.
        class_names: names by class, counted from 0 without the background; None: Visual Genome's 1,600 where the record fits them.
        attribute_names: the same for attributes; None: Visual Genome's 400 where the record fits them.

    Returns:
        N labels, in row order. A class without a name is called "class 17"; where regions were given and not detected (all
        confidences 0), the class's probability stands for the confidence.
    """
    confidences = np.asarray(regions.conf, dtype=np.float32).reshape(-1)
    names: list[str | None] = [None] * len(regions)
    best = regions.best_objects()
    if best is not None:
        width = regions.soft_labels.shape[1] - 1 if regions.soft_labels is not None else None
        known = _fitting(class_names, visual_genome_objects(), width)
        names = [_name(int(index), known, "class") for index in best[0]]
        if not confidences.any():
            confidences = np.asarray(best[1], dtype=np.float32)
    attributes: list[tuple[str | None, float]] = [(None, 0.0)] * len(regions)
    if regions.attributes is not None and regions.attributes.shape[1] > 1:
        foreground = np.asarray(regions.attributes[:, 1:], dtype=np.float32)
        known = _fitting(attribute_names, visual_genome_attributes(), foreground.shape[1])
        attributes = [(_name(int(row.argmax()), known, "attribute"), float(row.max())) for row in foreground]
    elif regions.attribute_ids is not None:
        known = _fitting(attribute_names, visual_genome_attributes(), None)
        probabilities = regions.attribute_conf if regions.attribute_conf is not None else np.ones(len(regions), dtype=np.float32)
        attributes = [(_name(int(i), known, "attribute"), float(p)) for i, p in zip(regions.attribute_ids, probabilities, strict=True)]
    return [
        RegionLabel(number, name, float(confidence), *attribute)
        for number, (name, confidence, attribute) in enumerate(zip(names, confidences, attributes, strict=True))
    ]


def known_classes(class_names: Sequence[str] | None, label_classes: int) -> list[str]:
    """All names that `label_regions` can give to a class of a database.

    Args:
        class_names: as the database has them, without the background.
        label_classes: columns of its soft labels, the background's among them; 0: it has none.
    """
    width = label_classes - 1 if label_classes > 0 else None
    known = _fitting(class_names, visual_genome_objects(), width)
    return [_name(index, known, "class") for index in range(len(known) if width is None else width)]


def _fitting(given: Sequence[str] | None, visual_genome: Sequence[str], width: int | None) -> Sequence[str]:
    if given:
        return given
    return visual_genome if width in (None, len(visual_genome)) else ()


def _name(index: int, names: Sequence[str], kind: str) -> str:
    return names[index] if 0 <= index < len(names) else f"{kind} {index}"


def class_colour(name: str) -> Colour:
    """A bright BGR colour that depends on the name alone: one class has one colour on every picture of every run."""
    spread = zlib.crc32(name.encode("utf-8"))
    red, green, blue = colorsys.hsv_to_rgb((spread % 360) / 360, 0.65 + (spread >> 10) % 4 * 0.1, 0.85 + (spread >> 20) % 3 * 0.07)
    # Pure blue is nearly as dark as black: mixed with white until it stands out from shadows, and black letters from it.
    luminance = 0.299 * red + 0.587 * green + 0.114 * blue
    white = max(0.0, (_LEAST_LUMINANCE - luminance) / (1 - luminance))
    red, green, blue = (part + white * (1 - part) for part in (red, green, blue))
    return round(blue * 255), round(green * 255), round(red * 255)
