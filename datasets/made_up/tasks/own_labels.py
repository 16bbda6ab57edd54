"""Tables as somebody has them of made-up scenes: a label a row, several, or a score.

{train,val}_one.csv      the text names a shape, the label is its colour
{train,val}_several.csv  no text, the labels are the colours of the picture
{train,val}_score.csv    no text, the score is the number of things
"""

import csv
from pathlib import Path

from uniter.datasets.made_up.tasks.telling import Parts, told_apart
from uniter.datasets.made_up.world import World

SEPARATOR = "|"


def write_own_labels(folder: Path, world: World, scenes: Parts, suffix: str, images: Path, seed: int) -> int:
    """Tables of one label, several labels and a score, CSV, for `--task classify`; returns how many examples there are."""
    total = 0
    for part, members in scenes.items():
        one, several, score = [], [], []
        for scene in members:
            name = f"{scene.key}{suffix}"
            one += [(name, f"the {thing.shape}", thing.colour) for thing in told_apart(scene.things, lambda one: one.shape)]
            several.append((name, SEPARATOR.join(sorted({thing.colour for thing in scene.things}))))
            score.append((name, len(scene.things)))
        _write(folder / f"{part}_one.csv", ("image", "text", "label"), one)
        _write(folder / f"{part}_several.csv", ("image", "label"), several)
        _write(folder / f"{part}_score.csv", ("image", "label"), score)
        total += len(one)
    return total


def _write(path: Path, header: tuple[str, ...], rows: list[tuple[str, str, str]] | list[tuple[str, str]] | list[tuple[str, int]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
