"""Are the photographs still those that the regions were taken from? Their bytes are read again and held against the checksums."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from uniter.datasets.errors import BadInput
from uniter.datasets.image_db import ImageDB
from uniter.datasets.image_db.writing.noted_photographs import NotedPhotographs
from uniter.datasets.progress import Progress
from uniter.datasets.storage.files import read_json_object

Found = tuple[str, str, Callable[[], bytes]]
"""A photograph that is there: its key, what messages call it, and what reads its bytes."""


@dataclass
class PhotographReport:
    """How photographs compare with those that regions were taken from.

    Attributes:
        same, changed: by their checksum.
        gone: images of the database whose photograph is not among those that are there.
        unknown: images of whose photographs the database has no checksum, though they are there.
        unreadable: there, and their bytes cannot be read.
        not_in_database: photographs that the database has no regions of.
        changed_names, unreadable_names: which ones, and of those that cannot be read why.
    """

    same: int = 0
    changed: int = 0
    gone: int = 0
    unknown: int = 0
    unreadable: int = 0
    not_in_database: int = 0
    changed_names: list[str] = field(default_factory=list)
    unreadable_names: list[str] = field(default_factory=list)

    @property
    def wrong(self) -> bool:
        """Whether photographs are known to be others, or could not be looked at."""
        return bool(self.changed or self.unreadable)


def check_photographs(databases: Sequence[Path], photographs: Iterable[Found], *, total: int | None = None) -> PhotographReport:
    """Read photographs again and compare them with what was read when their regions were extracted.

    Args:
        databases: region databases, each anything that `ImageDB` reads.
        photographs: those that are there, each key once.
        total: how many, for the progress.

    Raises:
        BadInput: none of them bears a key of the databases.
    """
    images = ImageDB(list(databases), allow_partial=True)
    noted = NotedPhotographs(images.folders)
    report, there, first = PhotographReport(), np.zeros(len(images), dtype=np.bool_), ""
    with Progress(total, unit="photographs", label="comparing") as progress:
        for key, path, read in photographs:
            progress.update()
            first = first or key
            if key not in images:
                report.not_in_database += 1
                continue
            there[images.index_of(key)] = _compare(path, read, noted.of(key).sha256, report)
    if len(images) and report.not_in_database and not there.any():
        raise BadInput(
            f"none of the photographs (such as {first!r}) bears a key of the database (such as {images.keys_list[0]!r}): are they the "
            "right ones? If they are called otherwise there, say how with --key, as for uniter-extract"
        )
    report.gone = sum(images.index_of(images.keys_list[row]) == row for row in np.flatnonzero(~there).tolist())  # each image once
    return report


def _compare(path: str, read: Callable[[], bytes], expected: bytes, report: PhotographReport) -> bool:
    """Look at one photograph; whether it is there."""
    if not expected:
        report.unknown += 1
        return True
    try:
        found = sha256(read()).digest()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except BadInput as error:  # empty, or cut off
        found, path = b"", f"{path}: {error}"
    except OSError as error:
        report.unreadable += 1
        report.unreadable_names.append(f"{path}: {error.strerror or error}")
        return True
    report.same += found == expected
    if found != expected:
        report.changed += 1
        report.changed_names.append(path)
    return True


def key_rule_of(databases: Sequence[Path]) -> str | None:
    """How the databases say that their images are called; None where they do not say, or not the same."""
    rules: set[Any] = set()
    for folder in ImageDB(list(databases), allow_partial=True).folders:
        rules.add(read_json_object(folder / "settings.json").get("key") if (folder / "settings.json").is_file() else None)
    (rule,) = rules if len(rules) == 1 else (None,)
    return rule if isinstance(rule, str) else None
