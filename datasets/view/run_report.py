"""The page of a training run: curves, and what the model attends to."""

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uniter.datasets.errors import BadInput
from uniter.datasets.image_db.photographs import Photographs
from uniter.datasets.image_db.regions import RegionFeatures
from uniter.datasets.view.charts import LINE_COLOURS, curves
from uniter.datasets.view.drawing import draw_regions, draw_weights
from uniter.datasets.view.labels import label_regions
from uniter.datasets.view.page import fresh_folder, page_of
from uniter.datasets.view.photographs import photograph
from uniter.datasets.view.pictures import resized, write_picture

# ---------------------------------------------------------------------------------------------------------------------- runs


@dataclass
class RunsSummary:
    """What a page of curves shows: the page, and for each run its last update and how many lines its log has; how many curves and pairs."""

    page: Path
    runs: dict[str, dict[str, int]]
    curves: int
    pairs: int = 0

    def as_dict(self) -> dict[str, Any]:
        return {"page": str(self.page), "runs": self.runs, "curves": self.curves, "pairs": self.pairs}


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
    photographs: str | Path | None = None,
    class_names: Sequence[str] | None = None,
) -> RunsSummary:
    """Curves of one or several training runs, a chart for each figure of their logs, runs over one another.

    Args:
        runs: for each run's name the lines of its log: {"step": int, "kind": str, figure: number, ...}; nested maps are figures with a dot.
        out: the report's folder, as for `write_region_report`.
        looks: pairs of text and picture that a model looked at; they stand before the curves.
        photographs: the folder of the pictures' photographs.
        class_names: of the regions, counted from 0 without background.

    Raises:
        BadInput: no run has a line yet, or `out` holds something else.
    """
    figures: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
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
    folder = fresh_folder(Path(out))
    colours = {name: LINE_COLOURS[place % len(LINE_COLOURS)] for place, name in enumerate(runs)}
    rows = "".join(
        f'<tr><td><span class="swatch" style="background:{colours[name]}"></span>{html.escape(name)}</td>'
        f'<td class="number">{row["last_update"]:,}</td><td class="number">{row["lines"]:,}</td></tr>'
        for name, row in summary.items()
    )
    heads = '<th>run</th><th class="number">last update</th><th class="number">lines</th>'
    body = [f'<table class="facts"><thead><tr>{heads}</tr></thead>{rows}</table>']
    found = Photographs(photographs) if photographs is not None else None
    pairs = [_look(pair, place, folder, found, class_names) for place, pair in enumerate(looks)]
    if pairs:
        words = "Each small picture belongs to the word below it: the brighter a region, the more weight; the heaviest are named."
        body += [f"<h2>What words look at</h2><p>{words}</p>", *pairs]
    for kind in dict.fromkeys(figure.split(" ")[0] for figure in figures):
        charts = [
            curves(lines, colours=colours, title=figure)
            for figure, lines in sorted(figures.items(), key=_losses_first)
            if figure.split(" ")[0] == kind
        ]
        body.append(f'<h2>{html.escape(kind)}</h2><div class="charts">{"".join(charts)}</div>')
    (folder / "index.html").write_text(page_of(", ".join(runs), "".join(body)), encoding="utf-8")
    return RunsSummary(folder / "index.html", summary, len(figures), len(pairs))


def _look(pair: LookedAt, place: int, folder: Path, photographs: Photographs | None, class_names: Sequence[str] | None) -> str:
    image, _, notes = photograph(pair.key, pair.regions, photographs)
    labels = label_regions(pair.regions, class_names=class_names)
    small = resized(image, 300)
    write_picture(folder / "pictures" / f"{place:03d}.jpg", draw_regions(image, pair.regions, labels, text_height=15))
    rows = []
    for number, (name, weights_TR) in enumerate(pair.maps.items()):
        cells = []
        for token, (word, weights) in enumerate(zip(pair.words, weights_TR, strict=True)):
            file = f"pictures/{place:03d}-{number}-{token:03d}.jpg"
            write_picture(folder / file, draw_weights(small, pair.regions, labels, weights), quality=80)
            cells.append(f'<figure><img loading="lazy" src="{file}" alt=""><figcaption>{html.escape(word)}</figcaption></figure>')
        rows.append(f'<p class="faint">{html.escape(name)}</p><div class="words">{"".join(cells)}</div>')
    sentence = " · ".join([pair.note, *notes])
    return (
        f'<h3><a href="pictures/{place:03d}.jpg">{html.escape(pair.title)}</a></h3><p>{html.escape(" ".join(pair.words))}</p>'
        f'<p class="faint">{html.escape(sentence)}</p>{"".join(rows)}'
    )


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
