"""A page to look at: the regions of a database on their photographs, or the curves of training runs.

The page opens from disk without a server and holds no script. Keys, class names, captions and messages come from other people's
files: every one of them goes through `html.escape` on its way into the page, and none becomes a file name.
"""

import html
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uniter.datasets.charts import LINE_COLOURS, curves, histogram
from uniter.datasets.drawing import (
    Photographs,
    RegionLabel,
    class_colour,
    draw_regions,
    draw_weights,
    empty_canvas,
    label_regions,
    read_photograph,
    resized,
    write_picture,
)
from uniter.datasets.errors import BadInput, UniterError
from uniter.datasets.image_db import ALL_FIELDS, ImageDB
from uniter.datasets.lmdb_store import read_failures
from uniter.datasets.progress import Progress
from uniter.datasets.regions import RegionFeatures

PICTURES_PER_PAGE = 100
PICTURE_LONGEST, THUMBNAIL_LONGEST, THUMBNAIL_BOXES = 1200, 560, 12
CONFIDENCES_FROM = 2000  # images whose confidences make the histogram
LISTED = 200  # rows of failures and missing photographs on the page
MARK = '<meta name="generator" content="uniter-view">'

Captions = Callable[[str], Sequence[str]]

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --paper: #fbfbfa; --faint: #667085; --line: #d9dde3; --card: #fff; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --paper: #14181f; --faint: #98a2b3; --line: #333c49; --card: #1b212b; } }
body { margin: 0 auto; max-width: 1500px; padding: 1.5rem; font: 15px/1.45 system-ui, sans-serif;
  color: var(--ink); background: var(--paper); }
h1 { margin: 0 0 .3rem; font-size: 1.6rem; }
h2 { margin: 2rem 0 .6rem; font-size: 1.2rem; }
h3 { margin: 0; font-size: .95rem; overflow-wrap: anywhere; }
p, ul, ol { margin: .3rem 0; } ul { padding-left: 1.1rem; font-size: .93rem; } a { color: inherit; } .faint { color: var(--faint); }
.note { border-left: 4px solid #d97706; padding: .2rem .8rem; margin: .8rem 0; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(430px, 1fr)); gap: 1.2rem; align-items: start; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px; overflow: hidden; }
figure img { display: block; width: 100%; height: auto; max-height: 460px; object-fit: contain; background: #8884; }
figcaption { padding: .6rem .9rem .8rem; }
table { border-collapse: collapse; width: 100%; font-size: .86rem; } th { text-align: left; color: var(--faint); font-weight: 500; }
th, td { padding: .15rem .6rem .15rem 0; border-bottom: 1px solid var(--line); overflow-wrap: anywhere; vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.swatch { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .45em; vertical-align: -.05em; }
.words { display: grid; grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)); gap: .6rem; margin-bottom: 1rem; }
.words figcaption { padding: .2rem .6rem .3rem; font-weight: 600; } body > h3 { margin-top: 1.4rem; } body > h3 + p { font-size: 1.05rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(400px, 1fr)); gap: 1rem; } .facts { max-width: 60rem; }
svg.chart { width: 100%; background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
.bar { fill: #3b82f6; }
.grid { stroke: var(--line); } .tick { font-size: 11px; fill: var(--faint); }
.chart-title { font-size: 13px; font-weight: 600; fill: var(--ink); }
details > summary { cursor: pointer; color: var(--faint); margin-top: .3rem; } nav { margin: 1rem 0; } nav a, nav b { margin-right: .6rem; }
"""


@dataclass
class ViewSummary:
    """What a page of regions shows.

    Attributes:
        page: the index page.
        images: how many the databases hold; pictures: how many are shown.
        without_photograph: keys shown without their photograph (none was given, found, or readable).
        unreadable: keys whose record is damaged.
        failures: rows of the databases' failures.jsonl.
        captioned: pictures with at least one caption.
    """

    page: Path
    images: int = 0
    pictures: int = 0
    without_photograph: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    failures: int = 0
    captioned: int = 0

    def as_dict(self) -> dict[str, Any]:
        counts = {"without_photograph": len(self.without_photograph), "unreadable": len(self.unreadable)}
        return {
            "page": str(self.page),
            "images": self.images,
            "pictures": self.pictures,
            **counts,
            "failures": self.failures,
            "with_captions": self.captioned,
        }


def write_region_report(
    databases: Sequence[str | Path],
    out: str | Path,
    *,
    photographs: str | Path | None = None,
    captions: Captions | None = None,
    limit: int = 100,
    keys: Sequence[str] = (),
    most_boxes: int | None = None,
    allow_partial: bool = False,
) -> ViewSummary:
    """Draw the regions of a database (or several) on their photographs, with an index page.

    Args:
        databases: paths, each anything that `ImageDB` reads.
        out: the report's folder; an earlier report there is replaced, anything else refused.
        photographs: the folder of the photographs; None draws the boxes on an empty canvas.
        captions: from an image key to its captions.
        limit: so many pictures, evenly spaced over all keys; 0 draws all.
        keys: draw these images instead.
        most_boxes: draw only so many boxes a picture, the most confident ones; the tables list all.
        allow_partial: also look at unfinished databases.

    Raises:
        BadInput: no such database, no such folder of photographs, `out` holds something else, or one of `keys` is in no database.
    """
    opened = ImageDB(list(databases), allow_partial=allow_partial)
    found = Photographs(photographs) if photographs is not None else None
    for key in keys:
        if key not in opened:
            raise BadInput(f"image {key!r} is in none of the databases; keys are shown by `uniter-db info`")
    folder = _fresh_folder(Path(out))
    summary = ViewSummary(page=folder / "index.html", images=len(opened))
    failures = [row for database in databases for row in _failures(Path(database))]
    summary.failures = len(failures)
    chosen = list(keys) or _evenly(opened.keys_list, limit)
    cards: list[str] = []
    classes: Counter[str] = Counter()
    with Progress(len(chosen), unit="pictures", label="drawing") as progress:
        for number, key in enumerate(chosen):
            card = _card(opened, key, number, folder, found, captions, most_boxes, summary, classes)
            if card is not None:
                cards.append(card)
            progress.update()
    summary.pictures = len(cards)
    front = _front(opened, databases, summary, failures, classes, found)
    _write_pages(folder, cards, front, title=", ".join(Path(database).name for database in databases))
    return summary


def _fresh_folder(folder: Path) -> Path:
    """The report's folder, emptied of an earlier report."""
    index = folder / "index.html"
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{folder} is a file; choose another --out")
    if folder.is_dir() and any(folder.iterdir()):
        if not index.is_file() or MARK not in index.read_text(encoding="utf-8", errors="replace")[:1000]:
            raise BadInput(f"{folder} holds files that are no report of uniter-view; choose another --out")
        shutil.rmtree(folder / "pictures", ignore_errors=True)
        for page in folder.glob("page-*.html"):
            page.unlink()
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    # Already marked: a report that was interrupted can be written again.
    index.write_text(f"<!doctype html>{MARK}<p>This report is not finished.</p>", encoding="utf-8")
    return folder


def _failures(database: Path) -> list[dict[str, Any]]:
    """Rows of failures.jsonl below a database: its own, and those of its units."""
    try:
        return [row for path in sorted(database.rglob("failures.jsonl")) for row in read_failures(path) if isinstance(row, dict)]
    except (UniterError, OSError) as error:
        return [{"key": "failures.jsonl", "path": str(database), "error": str(error)}]


def _evenly(keys: Sequence[str], limit: int) -> list[str]:
    """`limit` of the keys at equal distances, all where there are no more or `limit` is 0."""
    if limit <= 0 or len(keys) <= limit:
        return list(keys)
    return [keys[int(place)] for place in np.linspace(0, len(keys) - 1, limit).astype(int)]


def _card(
    database: ImageDB,
    key: str,
    number: int,
    folder: Path,
    photographs: Photographs | None,
    captions: Captions | None,
    most_boxes: int | None,
    summary: ViewSummary,
    classes: Counter[str],
) -> str | None:
    """Draw one image's pictures and say what is known of it; None where its record is damaged."""
    try:
        regions = database.read(key, fields=[name for name in ALL_FIELDS if name != "features"])
        labels = label_regions(regions, class_names=database.class_names, attribute_names=database.attribute_names)
    except UniterError:
        summary.unreadable.append(key)
        return None
    classes.update(label.name for label in labels if label.name is not None)
    image, size, notes = _photograph(key, regions, photographs)
    if notes:
        summary.without_photograph.append(key)
    name = f"{number:06d}-{re.sub(r'[^A-Za-z0-9._-]+', '_', key)[:80].strip('.')}.jpg"
    whole = draw_regions(image, regions, labels, most=most_boxes, text_height=15)
    thumbnail = draw_regions(resized(image, THUMBNAIL_LONGEST), regions, labels, most=min(THUMBNAIL_BOXES, most_boxes or THUMBNAIL_BOXES))
    write_picture(folder / "pictures" / name, whole)
    write_picture(folder / "pictures" / f"small-{name}", thumbnail, quality=84)
    texts = list(captions(key)) if captions is not None else []
    summary.captioned += bool(texts)
    if size is not None:
        notes = [f"{size[1]} × {size[0]} pixels", *notes]
    return _figure(key, name, thumbnail.shape, regions, labels, texts, notes)


def _photograph(
    key: str, regions: RegionFeatures, photographs: Photographs | None
) -> tuple[NDArray[np.uint8], tuple[int, int] | None, list[str]]:
    """The picture to draw on, the image's size where it is known, and what is to be said where it is not the photograph."""
    path = photographs.find(key) if photographs is not None else None
    if path is not None:
        try:
            image, size = read_photograph(path, longest=2 * PICTURE_LONGEST)
        except BadInput as error:
            return empty_canvas(regions.size, longest=PICTURE_LONGEST), regions.size, [str(error)]
        if regions.size is None or _same_shape(size, regions.size):
            return resized(image, PICTURE_LONGEST), size, []
        height, width = regions.size
        sentence = f"the photograph {path.name} is {size[1]} × {size[0]}, the regions are of an image of {width} × {height}: another one?"
        return empty_canvas(regions.size, longest=PICTURE_LONGEST), regions.size, [sentence]
    sentence = "no photographs were given" if photographs is None else "no photograph of this name"
    return empty_canvas(regions.size, longest=PICTURE_LONGEST), regions.size, [sentence]


def _same_shape(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two sizes are the same picture, perhaps at different scales."""
    return abs(one[0] / one[1] - other[0] / other[1]) < 0.02 * max(one[0] / one[1], 0.02)


def _figure(
    key: str,
    name: str,
    shape: tuple[int, ...],
    regions: RegionFeatures,
    labels: Sequence[RegionLabel],
    captions: Sequence[str],
    notes: Sequence[str],
) -> str:
    attributes = any(label.attribute is not None for label in labels)
    heads = ['<th class="number">number</th><th>class</th><th class="number">confidence</th>']
    if attributes:
        heads.append('<th>attribute</th><th class="number">probability</th>')
    heads.append('<th class="number">box</th>')
    rows = []
    boxes, unit = (regions.boxes, ".0f") if regions.boxes is not None else (regions.norm_bb[:, :4], ".3f")
    for label, box in zip(labels, boxes, strict=True):
        blue, green, red = class_colour(label.name or "")
        swatch = f'<span class="swatch" style="background:rgb({red},{green},{blue})"></span>'
        cells = [f'<td class="number">{label.number}</td><td>{swatch}{html.escape(label.name or "–")}</td>']
        cells.append(f'<td class="number">{label.confidence:.3f}</td>')
        if attributes:
            cells.append(f'<td>{html.escape(label.attribute or "–")}</td><td class="number">{label.attribute_confidence:.3f}</td>')
        cells.append(f'<td class="number">{" ".join(format(float(value), unit) for value in box)}</td>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    texts = "".join(f"<li>{html.escape(text)}</li>" for text in captions)
    where = " in pixels" if regions.boxes is not None else " as fractions"
    return (
        f'<figure><a href="pictures/{name}"><img loading="lazy" src="pictures/small-{name}" width="{shape[1]}" height="{shape[0]}" '
        f'alt="regions of {html.escape(key)}"></a><figcaption><h3>{html.escape(key)}</h3>'
        f'<p class="faint">{html.escape(" · ".join([f"{len(regions)} regions", *notes]))}</p>'
        + (f"<ul>{texts}</ul>" if texts else "")
        + f"<details><summary>all regions (boxes x0 y0 x1 y1{where})</summary><table><thead><tr>{''.join(heads)}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></details></figcaption></figure>"
    )


def _front(
    database: ImageDB,
    paths: Sequence[str | Path],
    summary: ViewSummary,
    failures: Sequence[Mapping[str, Any]],
    classes: Counter[str],
    photographs: Photographs | None,
) -> str:
    """The head of the index page: facts, charts, failures, what is missing."""
    counts = np.asarray(database.region_counts)
    most = int(counts.max(initial=1))
    sampled = _confidences(database)
    charts = [
        histogram(counts, title=f"boxes per image ({len(counts):,} images)", axis="boxes", low=0, high=most + 1, bins=min(most + 1, 51)),
        histogram(sampled[0], title=f"confidence ({sampled[1]:,} of {len(counts):,} images)", axis="confidence", low=0, high=1, bins=40),
    ]
    facts = [("database", str(path)) for path in paths]
    facts += [("images", f"{summary.images:,}"), ("regions", f"{int(counts.sum(dtype=np.int64)):,}")]
    shown = f"{summary.pictures:,} of {summary.images:,}" + (", evenly spaced" if summary.pictures < summary.images else "")
    facts += [("pictures", shown), ("feature width", str(database.feature_width))]
    for header in database.headers:
        facts += [
            (name.replace("_", " "), _fact(header[name])) for name in _HEADER_FACTS if header is not None and header.get(name) is not None
        ]
    if classes:
        facts.append(("most frequent classes shown", ", ".join(f"{name} ({count})" for name, count in classes.most_common(15))))
    table = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in facts)
    parts = [f'<table class="facts">{table}</table>']
    if any("random" in json.dumps(header.get("weights") or header.get("detector") or "") for header in database.headers if header):
        parts.append('<p class="note">The detector had random weights: its classes and confidences mean nothing.</p>')
    parts.append(f'<h2>Histograms</h2><div class="charts">{"".join(charts)}</div>')
    if summary.without_photograph and photographs is not None:
        parts.append(_listing(f"{len(summary.without_photograph):,} pictures without their photograph", summary.without_photograph))
    elif photographs is None:
        parts.append('<p class="note">No photographs were given: boxes are drawn on empty canvases. Pass --images FOLDER.</p>')
    if summary.unreadable:
        parts.append(_listing(f"{len(summary.unreadable):,} damaged records (see uniter-db check)", summary.unreadable))
    if failures:
        rows = "".join(
            "<tr>" + "".join(f"<td>{html.escape(str(row.get(name, '')))}</td>" for name in ("key", "path", "error")) + "</tr>"
            for row in failures[:LISTED]
        )
        more = f'<p class="faint">and {len(failures) - LISTED:,} more</p>' if len(failures) > LISTED else ""
        parts.append(
            f"<h2>{len(failures):,} images failed</h2><table><thead><tr><th>key</th><th>file</th><th>error</th></tr></thead>"
            f"{rows}</table>{more}"
        )
    return "".join(parts)


_HEADER_FACTS = (
    "detector",
    "weights",
    "box_kind",
    "selection",
    "class_names_from",
    "converted_from",
    "software",
    "software_version",
)


def _fact(value: Any) -> str:
    if isinstance(value, Mapping):
        value = ", ".join(f"{str(name).replace('_', ' ')}: {_fact(part)}" for name, part in value.items())
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 400 else text[:397] + "..."


def _listing(heading: str, keys: Sequence[str]) -> str:
    more = f", and {len(keys) - LISTED:,} more" if len(keys) > LISTED else ""
    return f'<p class="note"><b>{html.escape(heading)}:</b> {html.escape(", ".join(keys[:LISTED]))}{more}</p>'


def _confidences(database: ImageDB) -> tuple[NDArray[np.float32], int]:
    """Confidences of up to `CONFIDENCES_FROM` images, evenly spaced, and of how many."""
    parts: list[NDArray[np.float32]] = []
    for key in _evenly(database.keys_list, CONFIDENCES_FROM):
        try:
            parts.append(np.asarray(database.read(key, fields=("conf",)).conf, dtype=np.float32))
        except UniterError:
            continue
    return np.concatenate([np.zeros(0, np.float32), *parts]), len(parts)


def _write_pages(folder: Path, cards: Sequence[str], front: str, *, title: str) -> None:
    groups = [cards[start : start + PICTURES_PER_PAGE] for start in range(0, len(cards), PICTURES_PER_PAGE)] or [[]]
    names = ["index.html", *(f"page-{number}.html" for number in range(2, len(groups) + 1))]
    for place, group in reversed(list(enumerate(groups))):  # the index last: then the report is whole
        links = [f"<b>{n + 1}</b>" if n == place else f'<a href="{name}">{n + 1}</a>' for n, name in enumerate(names)]
        navigation = f"<nav>pages: {''.join(links)}</nav>" if len(names) > 1 else ""
        body = (front if place == 0 else "") + f'<h2>Pictures</h2>{navigation}<div class="gallery">{"".join(group)}</div>{navigation}'
        (folder / names[place]).write_text(_page(title, body), encoding="utf-8")


def _page(title: str, body: str) -> str:
    # Lone halves of surrogate pairs (JSON and file names can hold them) cannot be written as UTF-8.
    shown = html.escape(title)
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">{MARK}'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"script-src 'none'; object-src 'none'; base-uri 'none'\">"
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{shown}</title><style>{_STYLE}</style></head>'
        f"<body><h1>{shown}</h1>{body}</body></html>"
    )
    return page.encode("utf-8", "replace").decode("utf-8")


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
    folder = _fresh_folder(Path(out))
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
    (folder / "index.html").write_text(_page(", ".join(runs), "".join(body)), encoding="utf-8")
    return RunsSummary(folder / "index.html", summary, len(figures), len(pairs))


def _look(pair: LookedAt, place: int, folder: Path, photographs: Photographs | None, class_names: Sequence[str] | None) -> str:
    image, _, notes = _photograph(pair.key, pair.regions, photographs)
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
