"""The page of training runs: curves of their logs, and what a model's words attend to.

What a reader would get wrong: a figure is what one kind of log line calls it ("train loss"); runs that have it lie over one another in
one chart, so a run without it is no mistake. Weights (attention, transport) come as they are; the pictures show them relative to the
greatest of each word.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from uniter.datasets.errors import BadInput
from uniter.datasets.image_db.photographs import Photographs
from uniter.datasets.image_db.regions import RegionFeatures
from uniter.datasets.runs.held_out import HeldOut
from uniter.datasets.view.charts import LINE_COLOURS, curves
from uniter.datasets.view.drawing import draw_regions, draw_weights
from uniter.datasets.view.held_out import draw_held_out
from uniter.datasets.view.labels import label_regions
from uniter.datasets.view.outcomes import Outcomes, outcomes_values
from uniter.datasets.view.page import INDEX, PICTURES, report_folder, write_page
from uniter.datasets.view.photographs import photograph, refuse_if_none_is_there
from uniter.datasets.view.pictures import resized, write_picture

_Figures = dict[str, dict[str, tuple[list[float], list[float]]]]  # of each figure each run's updates and values


@dataclass
class RunsSummary:
    """What a page of curves shows: the page, and for each run its last update and how many lines its log has; how many curves, and pairs or
    hard examples."""

    page: Path
    runs: dict[str, dict[str, int]]
    curves: int
    pairs: int = 0
    held_out_pictures: int = 0

    def as_dict(self) -> dict[str, Any]:
        """The summary of `uniter-view RUN` as JSON."""
        counts = {"curves": self.curves, "pairs": self.pairs, "held_out_pictures": self.held_out_pictures}
        return {"page": str(self.page), "runs": self.runs, **counts}


@dataclass(frozen=True)
class LookedAt:
    """A text and a picture, and what a model's words do with the picture's regions.

    Attributes:
        title: of the pair, e.g. the example's id.
        key: the image.
        words: T tokens.
        regions: R regions.
        maps: by name (T, R) weights, e.g. attention and a transport plan; one picture is drawn for each word.
        note: a sentence, e.g. how well the two match.
    """

    title: str
    key: str
    words: Sequence[str]
    regions: RegionFeatures
    maps: Mapping[str, NDArray[np.floating]]
    note: str


def write_runs_report(
    runs: Mapping[str, Iterable[Mapping[str, Any]]],
    out: str | Path,
    *,
    looks: Iterable[LookedAt] = (),
    held_out: Mapping[str, HeldOut] | None = None,
    outcomes: Outcomes | None = None,
    photographs: str | Path | None = None,
    class_names: Sequence[str] | None = None,
    sources: Sequence[str | Path] = (),
) -> RunsSummary:
    """Curves of one or several training runs, a chart for each figure of their logs, runs over one another; of detectors' trainings also
    the average precision of each class and the photographs held out on which they did worst.

    Args:
        runs: for each run's name the lines of its log: {"step": int, "kind": str, figure: number, ...}; nested maps are figures with a dot.
        out: the report's folder, as for `write_region_report`.
        looks: pairs of text and picture that a model looked at; they stand before the curves.
        held_out: by a run's name what it found on the photographs held out.
        outcomes: what a fine-tuned run got right and wrong; they stand before the curves.
        photographs: the folder of the pictures' photographs.
        class_names: of the regions, counted from 0 without background.
        sources: the files and folders that runs and looks come from, which `out` must not hold.

    Raises:
        BadInput: no run has a line yet, `out` holds something else, or not one picture has its photograph in that folder.
    """
    figures, summary = _figures(runs)
    colours = {name: LINE_COLOURS[place % len(LINE_COLOURS)] for place, name in enumerate(runs)}
    found = Photographs(photographs) if photographs is not None else None
    pairs = list(looks)
    trainings = held_out or {}
    shown = [pair.key for pair in pairs] + [picture.file for training in trainings.values() for picture in training.worst]
    shown += [key for one in (outcomes.hardest if outcomes is not None else ()) for key in one.keys]
    if found is not None and shown:
        refuse_if_none_is_there(found, shown)
    kinds: dict[str, list[Markup]] = {figure.split(" ")[0]: [] for figure in figures}
    for figure, lines in sorted(figures.items(), key=_losses_first):
        kinds[figure.split(" ")[0]].append(curves(lines, colours=colours, title=figure))
    with report_folder(Path(out), [*sources, *([photographs] if photographs is not None else [])]) as folder:
        write_page(
            folder / INDEX,
            "runs.html",
            title=", ".join(runs),
            runs=[{"name": name, "colour": colours[name], **row} for name, row in summary.items()],
            looks=[_look(pair, place, folder, found, class_names) for place, pair in enumerate(pairs)],
            outcomes=outcomes_values(outcomes, folder, found, class_names) if outcomes is not None else None,
            trainings=[draw_held_out(name, place, training, folder, found) for place, (name, training) in enumerate(trainings.items())],
            kinds=list(kinds.items()),
        )
    drawn = sum(len(training.worst) for training in trainings.values())
    looked_at = len(pairs) + (len(outcomes.hardest) if outcomes is not None else 0)
    return RunsSummary(Path(out) / INDEX, summary, len(figures), looked_at, drawn)


def _figures(runs: Mapping[str, Iterable[Mapping[str, Any]]]) -> tuple[_Figures, dict[str, dict[str, int]]]:
    """The points of every figure of every run, and how long each run is; BadInput where there is none yet."""
    figures: _Figures = {}
    summary: dict[str, dict[str, int]] = {}
    for name, lines in runs.items():
        summary[name] = {"lines": 0, "last_update": 0}
        for line in lines:
            step = line.get("step")
            if not isinstance(step, int | float) or isinstance(step, bool):
                continue
            summary[name]["lines"] += 1
            summary[name]["last_update"] = max(summary[name]["last_update"], int(step))
            kind = str(line.get("kind", ""))
            for figure, value in _numbers(line):
                steps, values = figures.setdefault(f"{kind} {figure}".strip(), {}).setdefault(name, ([], []))
                steps.append(float(step))
                values.append(value)
    if not figures:
        raise BadInput(
            f"the logs of {', '.join(runs) or 'no run'} hold no line with a step and a number yet; let the run do its first update"
        )
    return figures, summary


def _look(pair: LookedAt, place: int, folder: Path, photographs: Photographs | None, class_names: Sequence[str] | None) -> dict[str, Any]:
    """Draw a pair's pictures, one for each word of each map; what the template says of them."""
    image, _, notes = photograph(pair.key, pair.regions, photographs)
    labels = label_regions(pair.regions, class_names=class_names)
    small = resized(image, 300)
    picture = f"{PICTURES}/{place:03d}.jpg"
    write_picture(folder / picture, draw_regions(image, pair.regions, labels, text_height=15))
    maps = []
    for number, (name, weights_TR) in enumerate(pair.maps.items()):
        words = []
        for token, (word, weights) in enumerate(zip(pair.words, weights_TR, strict=True)):
            words.append((f"{PICTURES}/{place:03d}-{number}-{token:03d}.jpg", word))
            write_picture(folder / words[-1][0], draw_weights(small, pair.regions, labels, weights), quality=80)
        maps.append((name, words))
    return {"title": pair.title, "words": " ".join(pair.words), "notes": [pair.note, *notes], "picture": picture, "maps": maps}


def _losses_first(item: tuple[str, Any]) -> tuple[bool, bool, str]:
    return "loss" not in item[0], "acc" not in item[0], item[0]


def _numbers(line: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for name, value in line.items():
        if not prefix and name in ("step", "kind"):
            continue
        if isinstance(value, Mapping):
            found += _numbers(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append((f"{prefix}{name}", float(value)))
    return found
