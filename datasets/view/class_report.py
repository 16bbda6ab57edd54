"""The page of one class: its regions over all photographs, the surest first, each cut out with what is around it.

What a reader would get wrong: a region is of the class that its detector finds likeliest, and how sure it is of that is the confidence that
the page of its photograph shows, so the same number stands on both pages.
"""

import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from uniter.datasets.errors import BadInput, UniterError, WrongUsage, unknown_name
from uniter.datasets.image_db import ImageDB
from uniter.datasets.image_db.records import ALL_FIELDS
from uniter.datasets.image_db.regions import RegionFeatures, pixel_boxes
from uniter.datasets.progress import Progress
from uniter.datasets.view.drawing import draw_box
from uniter.datasets.view.labels import RegionLabel, class_colour, known_classes, label_regions
from uniter.datasets.view.page import INDEX, PICTURES, render, report_folder, write_page
from uniter.datasets.view.photographs import Gallery, photograph, refuse_if_none_is_there
from uniter.datasets.view.pictures import ByteImage, resized, safe_name, write_picture

CUT_LONGEST = 360  # pixels of a region with what is around it
AROUND = 0.35  # of the box's longer side, on each side of it

_FIELDS = [name for name in ALL_FIELDS if name != "features"]
_Found = tuple[float, int, str, RegionLabel]
"""Confidence, minus its number among all that were met (so that the first of equals comes first), key, label."""


@dataclass
class ClassSummary:
    """What a page of one class shows.

    Attributes:
        page: the page.
        name: the class.
        found: its regions in the databases. images: in how many images they are.
        shown: those on the page. unreadable: damaged records, which were passed over.
    """

    page: Path
    name: str
    found: int = 0
    images: int = 0
    shown: int = 0
    unreadable: int = 0

    def as_dict(self) -> dict[str, Any]:
        """The summary of `uniter-view --class` as JSON."""
        return {"page": str(self.page), "class": self.name} | {
            count: getattr(self, count) for count in ("found", "images", "shown", "unreadable")
        }


def write_class_report(
    databases: Sequence[str | Path],
    out: str | Path,
    name: str,
    *,
    photographs: str | Path | None = None,
    limit: int = 100,
    allow_partial: bool = False,
) -> ClassSummary:
    """Draw the regions of one class, the surest first, on one page.

    Args:
        databases: paths, each anything that `ImageDB` reads.
        out: the report's folder, as for `write_region_report`.
        name: the class, by its name, or "class 17" where classes have no names; upper and lower case are one.
        photographs: the folder of the photographs; None draws the boxes on an empty canvas.
        limit: so many regions at most; 0 draws all.
        allow_partial: also look at unfinished databases.

    Raises:
        WrongUsage: the detector has no such class; the sentence names near ones.
        BadInput: the databases do not tell classes, no such database or folder, or `out` holds something else.
    """
    opened = ImageDB(list(databases), allow_partial=allow_partial)
    summary = ClassSummary(Path(out) / INDEX, _spelled(name, opened))
    gallery = Gallery(photographs, opened) if photographs is not None else None
    surest = _surest(opened, summary, limit)
    if gallery is not None and surest:
        refuse_if_none_is_there(gallery, [key for _, _, key, _ in surest])
    places = {(key, label.number): place for place, (_, _, key, label) in enumerate(surest)}
    cards: dict[int, Markup] = {}
    with (
        report_folder(Path(out), [*databases, *([photographs] if photographs is not None else [])]) as folder,
        Progress(len(surest), unit="regions", label="drawing") as progress,
    ):
        by_image = itertools.groupby(sorted(surest, key=lambda one: (one[2], one[3].number)), key=lambda one: one[2])
        for key, of_image in by_image:  # each photograph is read once
            regions = opened.read(key, fields=_FIELDS)
            image, size, notes = photograph(key, regions, gallery)
            notes = notes or (gallery.remarks(key) if gallery is not None else [])
            for _, _, _, label in of_image:
                place = places[key, label.number]
                file = f"{place:06d}-{safe_name(key)}.jpg"
                cut = _cut_out(image, regions, label)
                write_picture(folder / PICTURES / file, cut)
                cards[place] = _card(key, label, file, cut, size, notes)
                progress.update()
        summary.shown = len(cards)
        title = f"{summary.name}: {', '.join(Path(database).name for database in databases)}"
        values = {"name": summary.name, "summary": summary, "colour": class_colour(summary.name)[::-1]}
        write_page(folder / INDEX, "class.html", title=title, **values, cards=[cards[place] for place in sorted(cards)])
    return summary


def _spelled(name: str, database: ImageDB) -> str:
    """The class as the database spells it."""
    known = known_classes(database.class_names, database.label_classes)
    found = next((one for one in known if one.casefold() == name.strip().casefold()), None)
    if found is None:
        raise WrongUsage(unknown_name("class", name, known))
    return found


def _surest(database: ImageDB, summary: ClassSummary, limit: int) -> list[_Found]:
    """The surest regions of the class, surest first; all are counted."""

    def met() -> Iterator[_Found]:
        named = 0
        with Progress(len(database), unit="images", label=f"looking for {summary.name}", brief=True) as progress:
            for key in database.keys_list:
                progress.update()
                try:
                    regions = database.read(key, fields=_FIELDS)
                    labels = label_regions(regions, class_names=database.class_names, attribute_names=database.attribute_names)
                except UniterError:
                    summary.unreadable += 1
                    continue
                named += sum(label.name is not None for label in labels)
                mine = [label for label in labels if label.name == summary.name]
                summary.images += bool(mine)
                for label in mine:
                    summary.found += 1
                    yield label.confidence, -summary.found, key, label
        if not named and len(database) > summary.unreadable:
            raise BadInput("the regions of these databases have no classes, so none can be looked for; --key and --limit choose pictures")

    return sorted(met(), key=_strength, reverse=True) if limit <= 0 else heapq.nlargest(limit, met(), key=_strength)


def _strength(found: _Found) -> tuple[float, int]:
    return found[:2]


def _cut_out(image: ByteImage, regions: RegionFeatures, label: RegionLabel) -> ByteImage:
    """The region, outlined, with what is around it."""
    height, width = image.shape[:2]
    box = pixel_boxes(np.asarray(regions.norm_bb[label.number : label.number + 1], dtype=np.float32), (height, width))[0]
    x0, y0, x1, y1 = box.tolist()
    margin = AROUND * max(x1 - x0, y1 - y0, 16.0)
    left, top = max(int(x0 - margin), 0), max(int(y0 - margin), 0)
    right, bottom = min(int(x1 + margin) + 1, width), min(int(y1 + margin) + 1, height)
    cut = resized(image[top:bottom, left:right], CUT_LONGEST).copy()
    corners = (box - [left, top, left, top]) * (max(cut.shape[:2]) / max(bottom - top, right - left))
    most = [cut.shape[1] - 1, cut.shape[0] - 1] * 2
    draw_box(cut, np.clip(np.rint(corners), 0, most).astype(int), class_colour(label.name or ""))
    return cut


def _card(key: str, label: RegionLabel, file: str, cut: ByteImage, size: tuple[int, int] | None, notes: Sequence[str]) -> Markup:
    told = [f"region {label.number}", *([f"{size[1]} × {size[0]} pixels"] if size is not None else []), *notes]
    return render("region.html", key=key, label=label, file=file, height=cut.shape[0], width=cut.shape[1], notes=told)
