"""What a fine-tuned model got right and wrong, as part of the page of its run: confusion, calibration, the hardest examples.

What a reader would get wrong: where there are more answers than a table has room for, the most frequent mistakes are listed instead of all
pairs; an example about two pictures shows them side by side, left and right as its text says.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from markupsafe import Markup

from uniter.datasets.image_db.photographs import Photographs
from uniter.datasets.image_db.regions import RegionFeatures
from uniter.datasets.view.charts import curves
from uniter.datasets.view.drawing import draw_regions
from uniter.datasets.view.labels import RegionLabel, label_regions
from uniter.datasets.view.page import PICTURES
from uniter.datasets.view.photographs import photograph
from uniter.datasets.view.pictures import resized, write_picture

MOST_COLUMNS: Final = 16  # of a table of confusion
MOST_MISTAKES: Final = 40
DRAWN: Final = 12  # regions of a picture of an example
SHOWN_LONGEST: Final = 700  # pixels of its longer side
_COLOURS: Final = {"as sure as right": "#98a2b3", "seen": "#2563eb"}


@dataclass(frozen=True)
class HardExample:
    """An example that surprised the model.

    Attributes:
        title: its id. text: what it says.
        said, truth: in words. note: e.g. how sure the model was.
        keys, regions: of each of its pictures.
        rows: rows of its picture that were said and that are right, where the answers are regions; None draws the most confident ones.
    """

    title: str
    text: str
    said: str
    truth: str
    note: str
    keys: Sequence[str]
    regions: Sequence[RegionFeatures]
    rows: tuple[Sequence[int], Sequence[int]] | None = None


@dataclass(frozen=True)
class Outcomes:
    """What became of a part.

    Attributes:
        title: what was measured on what, in a line.
        facts: figures in words, by name.
        pairs: how often each (truth, said) came, in words; nothing where answers are regions or scores.
        cells: (mean confidence, share right, examples) of each tenth of confidence that occurs.
        hardest: hardest first.
    """

    title: str
    facts: Mapping[str, str]
    pairs: Mapping[tuple[str, str], int] = field(default_factory=dict)
    cells: Sequence[tuple[float, float, int]] = ()
    hardest: Sequence[HardExample] = ()


def outcomes_values(outcomes: Outcomes, folder: Path, photographs: Photographs | None, class_names: Sequence[str] | None) -> dict[str, Any]:
    """Draw the examples' pictures into the report's folder; what `outcomes.html` says of it all."""
    labels = _labels(outcomes.pairs)
    mistakes = Counter({pair: count for pair, count in outcomes.pairs.items() if pair[0] != pair[1]})
    return {
        "title": outcomes.title,
        "facts": dict(outcomes.facts),
        "labels": labels if len(labels) <= MOST_COLUMNS else [],
        "rows": [(truth, [outcomes.pairs.get((truth, said), 0) for said in labels]) for truth in labels],
        "mistakes": [(truth, said, count) for (truth, said), count in mistakes.most_common(MOST_MISTAKES)],
        "cells": [(f"{sure:.2f}", f"{right:.2f}", f"{count:,}") for sure, right, count in outcomes.cells],
        "chart": _reliability(outcomes.cells) if outcomes.cells else None,
        "hardest": [_example(one, place, folder, photographs, class_names) for place, one in enumerate(outcomes.hardest)],
    }


def _labels(pairs: Mapping[tuple[str, str], int]) -> list[str]:
    """Every answer that is right or was said, the most frequent truths first."""
    truths: Counter[str] = Counter()
    for (truth, _), count in pairs.items():
        truths[truth] += count
    return [*(name for name, _ in truths.most_common()), *dict.fromkeys(said for _, said in pairs if said not in truths)]


def _reliability(cells: Sequence[tuple[float, float, int]]) -> Markup:
    lines = {"as sure as right": ([0.0, 1.0], [0.0, 1.0]), "seen": ([cell[0] for cell in cells], [cell[1] for cell in cells])}
    return curves(lines, colours=_COLOURS, title="share right by confidence (grey: as sure as right)", axis="confidence")


def _example(
    one: HardExample, place: int, folder: Path, photographs: Photographs | None, class_names: Sequence[str] | None
) -> dict[str, Any]:
    pictures, notes = [], [one.note]
    for side, (key, regions) in enumerate(zip(one.keys, one.regions, strict=True)):
        image, _, said = photograph(key, regions, photographs)
        image = resized(image, SHOWN_LONGEST)
        if one.rows is None:
            drawn = draw_regions(image, regions, label_regions(regions, class_names=class_names), most=DRAWN)
        else:
            drawn = draw_regions(image, *_pointed(regions, *one.rows))
        pictures.append((f"{PICTURES}/{place:03d}-{side}-000.jpg", key))
        write_picture(folder / pictures[-1][0], drawn)
        notes += said
    return {
        **{"title": one.title, "text": one.text, "said": one.said, "truth": one.truth},
        **{"notes": list(dict.fromkeys(note for note in notes if note)), "pictures": pictures},
    }


def _pointed(regions: RegionFeatures, said: Sequence[int], right: Sequence[int]) -> tuple[RegionFeatures, list[RegionLabel]]:
    """The regions that were said and that are right, so labelled."""
    rows = list(dict.fromkeys([*said, *right]))
    words = [" and ".join(word for word, members in (("said", said), ("right", right)) if row in members) for row in rows]
    return regions.rows(np.array(rows, dtype=np.int64)), [RegionLabel(row, word, 1.0) for row, word in zip(rows, words, strict=True)]
