"""The folder in which a text database is built: ours, alone in it, and begun anew where unfinished."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uniter.datasets.errors import BadInput, SettingsDiffer, UniterError
from uniter.datasets.storage.cards import CARD_FILE, has_foreign_readme
from uniter.datasets.storage.files import difference_in_words, read_json_object, sync_folder, write_json
from uniter.datasets.storage.index_file import INDEX

OURS = (
    "data.mdb",
    "lock.mdb",
    "meta.json",
    "id2len.json",
    "id2len_qa.json",
    "id2len_qar.json",
    "txt2img.json",
    "img2txts.json",
    "vocab.txt",
    INDEX,
)


TASK_FILES = (
    "ans2label.json",
    "refs.json",
    "images.json",
    "annotations.json",
    "categories.json",
    "boxes.json",
)  # may lie there of an earlier task


@dataclass
class BuildReport:
    """What became of the texts.

    Attributes:
        counts: read, kept, empty, longer_than_60, longer_than_512, duplicate, special_words, without_image, excluded, and what the
            source counted of its own (images_without_caption ...). "longer", "duplicate" and "special_words" are kept.
        coverage: of `--images`: by rule, how many images were found by it; `missing` how many by none.
        images: how many different images the kept texts are about.
        already_complete: nothing was done, the finished database was there.
    """

    counts: dict[str, int]
    coverage: dict[str, int]
    images: int
    already_complete: bool = False

    def as_dict(self) -> dict[str, Any]:
        return {"texts": self.counts, "images": self.images, "coverage": self.coverage, "already_complete": self.already_complete}


# The folder: who may write, and what stands there already.


@contextlib.contextmanager
def only_builder(folder: Path) -> Iterator[None]:
    """Hold the folder against another build; a killed process gives it back."""
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{folder} is a file; expected a folder for the text database, or none")
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UniterError(f"another process is building {folder}; wait for it, or choose another OUT") from None
        yield
    finally:
        os.close(handle)


def prepare_folder(folder: Path, wanted: dict[str, Any], *, overwrite: bool) -> BuildReport | None:
    settings, header = folder / "settings.json", folder / "header.json"
    _drop_unfinished(folder)
    if settings.is_file() and not overwrite:
        there = read_json_object(settings)
        if phrases := difference_in_words(there, wanted):
            raise SettingsDiffer(
                f"{folder} was made with other settings ({'; '.join(phrases)}); give the same ones, choose another OUT, or pass --overwrite"
            )
        if header.is_file():
            report = read_json_object(header).get("report", {})
            return BuildReport(report.get("texts", {}), report.get("coverage", {}), report.get("images", 0), already_complete=True)
    elif not settings.is_file() and any(folder.iterdir()) and not overwrite:
        raise BadInput(f"{folder} holds files that are no text database of ours; choose another OUT, or pass --overwrite")
    clear(folder)
    write_json(settings, wanted)
    return None


def clear(folder: Path) -> None:
    """Take away everything of a database but its settings."""
    (folder / "header.json").unlink(missing_ok=True)  # first: from here on it is not complete
    sync_folder(folder)
    for name in (*OURS, *TASK_FILES):
        (folder / name).unlink(missing_ok=True)
    if not has_foreign_readme(folder):
        (folder / CARD_FILE).unlink(missing_ok=True)
    shutil.rmtree(folder / "building", ignore_errors=True)
    _drop_unfinished(folder)


def _drop_unfinished(folder: Path) -> None:
    """Remove what writes left that were killed, or found the disk full."""
    for name in ("settings.json", "header.json", *OURS, *TASK_FILES):
        for unfinished in folder.glob(f"{name}.*.tmp"):
            unfinished.unlink()
