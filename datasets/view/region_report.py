"""The page of a region database: its regions drawn on their photographs, captions, histograms, failures.

What a reader would get wrong: a key never becomes the name of a file (only letters, digits, "._-" of it do, behind a number), and what is
damaged or missing is shown and counted, while the page goes on. Only photographs of which not one is there are refused.
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from uniter.datasets.errors import UniterError, WrongUsage
from uniter.datasets.image_db import ImageDB
from uniter.datasets.image_db.records import ALL_FIELDS
from uniter.datasets.progress import Progress
from uniter.datasets.storage.streams import json_lines
from uniter.datasets.view.charts import histogram
from uniter.datasets.view.drawing import draw_regions
from uniter.datasets.view.labels import class_colour, label_regions
from uniter.datasets.view.page import INDEX, PICTURES, render, report_folder, write_page
from uniter.datasets.view.photographs import THUMBNAIL_BOXES, THUMBNAIL_LONGEST, Gallery, photograph, refuse_if_none_is_there
from uniter.datasets.view.pictures import resized, safe_name, write_picture

log = logging.getLogger(__name__)

PICTURES_PER_PAGE = 100
LISTED = 200  # failures, damaged records and missing photographs on the index page
CONFIDENCES_FROM = 2000  # images whose confidences make the histogram

SHOWN_PAGES = 5  # on either side of the page at hand, in its list of pages

Captions = Callable[[str], Sequence[str]]


class FirstOnes(list[str]):
    """The first `LISTED` of many keys, and how many there are in `total`: a page of millions of pictures lists no more."""

    total = 0

    def add(self, key: str) -> None:
        """One more."""
        self.total += 1
        if len(self) < LISTED:
            self.append(key)


@dataclass
class ViewSummary:
    """What a page of regions shows.

    Attributes:
        page: the index page.
        images: how many the databases hold; pictures: how many are shown.
        without_photograph: the first keys shown without their photograph (none was given, found, or readable), and how many.
        unreadable: the first keys whose record is damaged, and how many.
        failures: rows of the databases' failures.jsonl.
        captioned: pictures with at least one caption.
    """

    page: Path
    images: int = 0
    pictures: int = 0
    without_photograph: FirstOnes = field(default_factory=FirstOnes)
    unreadable: FirstOnes = field(default_factory=FirstOnes)
    failures: int = 0
    captioned: int = 0

    def as_dict(self) -> dict[str, Any]:
        """The summary of `uniter-view` as JSON: counts instead of the keys."""
        counts = {"without_photograph": self.without_photograph.total, "unreadable": self.unreadable.total}
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
        BadInput: no such database, no such folder of photographs or none of theirs in it, `out` holds something else, or one of `keys`
            is in no database.
    """
    opened = ImageDB(list(databases), allow_partial=allow_partial)
    found = Gallery(photographs, opened) if photographs is not None else None
    for key in keys:
        if key not in opened:
            raise WrongUsage(f"image {key!r} is in none of the databases; keys are shown by `uniter-db info`")
    chosen: Sequence[str] = list(keys) or _evenly(opened.keys_list, limit)
    if found is not None and chosen:
        refuse_if_none_is_there(found, chosen)
    summary = ViewSummary(page=Path(out) / INDEX, images=len(opened))
    failures = _failures(databases, summary)
    classes: Counter[str] = Counter()
    title = ", ".join(Path(database).name for database in databases)
    with report_folder(Path(out), [*databases, *([photographs] if photographs is not None else [])]) as folder:
        pages = _Pages(folder, -(-len(chosen) // PICTURES_PER_PAGE), title)
        with Progress(len(chosen), unit="pictures", label="drawing") as progress:
            for number, key in enumerate(chosen):
                card = _card(opened, key, number, folder, found, captions, most_boxes, summary, classes)
                if card is not None:
                    pages.add(number // PICTURES_PER_PAGE, card)
                    summary.pictures += 1
                progress.update()
        pages.finish(_front(opened, databases, summary, failures, classes, with_photographs=found is not None))
    if found is not None and summary.pictures and summary.without_photograph.total == summary.pictures:
        log.warning("not one picture is drawn on its photograph: each card of %s says why", summary.page)
    return summary


def _failures(databases: Sequence[str | Path], summary: ViewSummary) -> list[dict[str, Any]]:
    """The first rows of failures.jsonl below the databases, their own and those of their units; all are counted."""
    first: list[dict[str, Any]] = []
    for database in map(Path, databases):
        try:
            for path in sorted(database.rglob("failures.jsonl")):
                for _, row in json_lines(path):
                    summary.failures += 1
                    if len(first) < LISTED:
                        first.append(row)
        except (UniterError, OSError) as error:
            summary.failures += 1
            first.append({"key": "failures.jsonl", "path": str(database), "error": str(error)})
    return first


def _evenly(keys: Sequence[str], limit: int) -> Sequence[str]:
    """`limit` of the keys at equal distances, all where there are no more or `limit` is 0."""
    if limit <= 0 or len(keys) <= limit:
        return keys
    return [keys[int(place)] for place in np.linspace(0, len(keys) - 1, limit).astype(int)]


def _card(
    database: ImageDB,
    key: str,
    number: int,
    folder: Path,
    photographs: Gallery | None,
    captions: Captions | None,
    most_boxes: int | None,
    summary: ViewSummary,
    classes: Counter[str],
) -> Markup | None:
    """Draw one image's pictures and say what is known of it; None where its record is damaged."""
    try:
        regions = database.read(key, fields=[name for name in ALL_FIELDS if name != "features"])
        labels = label_regions(regions, class_names=database.class_names, attribute_names=database.attribute_names)
    except UniterError:
        summary.unreadable.add(key)
        return None
    classes.update(label.name for label in labels if label.name is not None)
    image, size, notes = photograph(key, regions, photographs)
    if notes:
        summary.without_photograph.add(key)
    elif photographs is not None:
        notes = photographs.remarks(key)
    name = f"{number:06d}-{safe_name(key)}.jpg"
    whole = draw_regions(image, regions, labels, most=most_boxes, text_height=15)
    thumbnail = draw_regions(resized(image, THUMBNAIL_LONGEST), regions, labels, most=min(THUMBNAIL_BOXES, most_boxes or THUMBNAIL_BOXES))
    write_picture(folder / PICTURES / name, whole)
    write_picture(folder / PICTURES / f"small-{name}", thumbnail, quality=84)
    texts = list(captions(key)) if captions is not None else []
    summary.captioned += bool(texts)
    if size is not None:
        notes = [f"{size[1]} × {size[0]} pixels", *notes]
    boxes, form = (regions.boxes, ".0f") if regions.boxes is not None else (regions.norm_bb[:, :4], ".3f")
    return render(
        "card.html",
        **{"key": key, "file": name, "height": thumbnail.shape[0], "width": thumbnail.shape[1]},
        regions=len(regions),
        notes=notes,
        captions=texts,
        unit="in pixels" if regions.boxes is not None else "as fractions",
        attributes=any(label.attribute is not None for label in labels),
        rows=[
            {"label": label, "colour": class_colour(label.name or "")[::-1], "box": " ".join(format(float(side), form) for side in box)}
            for label, box in zip(labels, boxes, strict=True)
        ],
    )


def _front(
    database: ImageDB,
    paths: Sequence[str | Path],
    summary: ViewSummary,
    failures: Sequence[Mapping[str, Any]],
    classes: Counter[str],
    *,
    with_photographs: bool,
) -> dict[str, Any]:
    """What stands above the pictures of the index page: facts, charts, failures, what is missing."""
    counts = np.asarray(database.region_counts)
    most = int(counts.max(initial=1))
    sampled = _confidences(database)
    facts = [("database", str(path)) for path in paths]
    facts += [("images", f"{summary.images:,}"), ("regions", f"{int(counts.sum(dtype=np.int64)):,}")]
    shown = f"{summary.pictures:,} of {summary.images:,}" + (", evenly spaced" if summary.pictures < summary.images else "")
    facts += [("pictures", shown), ("feature width", str(database.feature_width))]
    headers = [header for header in database.headers if header is not None]
    for header in headers:
        facts += [(name.replace("_", " "), _fact(header[name])) for name in _HEADER_FACTS if header.get(name) is not None]
    if classes:
        facts.append(("most frequent classes shown", ", ".join(f"{name} ({count})" for name, count in classes.most_common(15))))
    return {
        "facts": facts,
        "random": any("random" in json.dumps(header.get("weights") or header.get("detector") or "") for header in headers),
        "charts": [
            histogram(
                counts, title=f"boxes per image ({len(counts):,} images)", axis="boxes", low=0, high=most + 1, bins=min(most + 1, 51)
            ),
            histogram(
                sampled[0], title=f"confidence ({sampled[1]:,} of {len(counts):,} images)", axis="confidence", low=0, high=1, bins=40
            ),
        ],
        "photographs": with_photographs,
        "without_photograph": summary.without_photograph,
        "unreadable": summary.unreadable,
        "failed": summary.failures,
        "failures": [{name: str(row.get(name, "")) for name in ("key", "path", "error")} for row in failures],
    }


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


def _confidences(database: ImageDB) -> tuple[NDArray[np.float32], int]:
    """Confidences of up to `CONFIDENCES_FROM` images, evenly spaced, and of how many."""
    parts: list[NDArray[np.float32]] = []
    for key in _evenly(database.keys_list, CONFIDENCES_FROM):
        try:
            parts.append(np.asarray(database.read(key, fields=("conf",)).conf, dtype=np.float32))
        except UniterError:
            continue
    return np.concatenate([np.zeros(0, np.float32), *parts]), len(parts)


class _Pages:
    """The pages of a report, written as they fill up; the index last: then the report is whole.

    Args:
        folder: where they are written.
        count: how many there will be.
        title: of all of them.
    """

    def __init__(self, folder: Path, count: int, title: str) -> None:
        self._folder, self._title = folder, title
        self._names = [INDEX, *(f"page-{number}.html" for number in range(2, count + 1))]
        self._first: list[Markup] = []
        self._cards: list[Markup] = []
        self._at = 0

    def add(self, page: int, card: Markup) -> None:
        """One more card, for a page not before the last one's."""
        self._turn_to(page)
        (self._cards if page else self._first).append(card)

    def finish(self, front: Mapping[str, Any]) -> None:
        """Write what is left, and the index with what stands above its pictures."""
        self._turn_to(len(self._names))
        self._write(0, self._first, front)

    def _turn_to(self, page: int) -> None:
        while self._at < page:
            if self._at:
                self._write(self._at, self._cards, None)
            self._cards, self._at = [], self._at + 1

    def _write(self, page: int, cards: Sequence[Markup], front: Mapping[str, Any] | None) -> None:
        near = range(max(0, page - SHOWN_PAGES), min(len(self._names), page + SHOWN_PAGES + 1))
        shown = sorted({0, *near, len(self._names) - 1})
        pages = [(number + 1, self._names[number], number > 0 and number - 1 not in shown) for number in shown]
        values = {"title": self._title, "pages": pages, "here": self._names[page], "cards": cards, "listed": LISTED}
        write_page(self._folder / self._names[page], "regions.html", **values, front=front)
