"""Look through a database: what is damaged, what looks wrong, what is still good. Nothing in here hands a file to LMDB.

A record is good if it can be read, agrees with its checksum, and its numbers can be what they claim to be. `examine` yields the
good ones while it fills the report; `uniter-db check --repair` writes just those.

Works on region databases (ours, unfinished, published) and on text databases.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from uniter.datasets.image_db import ImageDB
from uniter.datasets.image_db.database import kind_of_child
from uniter.datasets.image_db.parts import SWAPPING, misfit_in_words, parts_under_way
from uniter.datasets.maintenance.check_regions import examine_regions
from uniter.datasets.maintenance.check_report import SHOWN, CheckReport
from uniter.datasets.maintenance.check_texts import examine_text
from uniter.datasets.maintenance.kinds import database_kind
from uniter.datasets.progress import Progress
from uniter.datasets.text_db import TextDB

# --------------------------------------------------------------------------------------------------------------------- together


def check_database(path: Path) -> CheckReport:
    """Read everything of one database (or folder of databases) and say what is wrong with it.

    Raises:
        BadInput: `path` is no database.
    """
    report = CheckReport(str(path))
    kind = database_kind(path)
    with Progress(None, unit="records", label=f"checking {path.name}") as progress:
        if kind == "folder of regions":
            report.kind = kind
            if (state := parts_under_way(path)) is not None:
                words = misfit_in_words(path, state)
                report.problem("parts", words) if state == SWAPPING else report.notes.append(words)
            for child in sorted(child for child in path.iterdir() if kind_of_child(child) and (child / "data.mdb").exists()):
                for _ in examine_regions(child, report):
                    progress.update()
            report.kind = kind
        else:
            examined: Iterable[Any] = examine_text(path, report) if kind.endswith("text") else examine_regions(path, report)
            for _ in examined:
                progress.update()
    if not report.records and not report.problems:
        report.notes.append(f"{path} is empty")
    return report


@dataclass
class Coverage:
    """How far texts and images go together.

    Attributes:
        texts, texts_with_image: examples in all, and those whose images are all there.
        images_named, images_found: different images that the texts name, and those that a region database holds.
        images_without_text: images of the region databases that no text names.
        missing: the first image keys that are in none.
    """

    texts: int
    texts_with_image: int
    images_named: int
    images_found: int
    images_without_text: int
    missing: list[str]


def check_coverage(texts: Sequence[TextDB], images: ImageDB) -> Coverage:
    """Compare the images that texts name with those that region databases hold."""
    total = covered = 0
    named, found = np.zeros(len(images), dtype=np.bool_), np.zeros(len(images), dtype=np.bool_)
    missing: set[str] = set()
    for database in texts:
        keys = database.image_keys
        rows = images.rows_of(keys)
        named |= images.named_in(keys)
        found[rows[rows >= 0]] = True  # once, where several databases hold the image
        missing.update(keys[row] for row in np.flatnonzero(rows < 0).tolist())
        total += len(database)
        covered += int((rows >= 0)[database.image_numbers].all(axis=1).sum()) if len(database) else 0
    there = int(found.sum())
    return Coverage(total, covered, there + len(missing), there, len(images) - int(named.sum()), sorted(missing)[:SHOWN])
