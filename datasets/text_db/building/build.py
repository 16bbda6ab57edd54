"""Captions to a finished text database (the layout of `text_db.py`), in memory that does not grow with the number of captions.

The captions are read once. Their records go, sorted by id, into runs on disk that are then merged, because an LMDB filled in the order
of its keys is compact and touches one page at a time; what the side files and the index need is spooled beside them. All of it lies in
`OUT/building/` until the end. `settings.json` is written first and `header.json` last: a folder between the two opens nowhere as complete,
and the same command starts it anew.
"""

import contextlib
import errno
import gc
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from uniter.datasets.errors import BadInput, UniterError
from uniter.datasets.image_db.keys import key_maker
from uniter.datasets.progress import Progress
from uniter.datasets.storage.cards import CARD_FILE, has_foreign_readme, text_card
from uniter.datasets.storage.files import sync_folder, write_json
from uniter.datasets.text_db.building.folder import BuildReport, clear, only_builder, prepare_folder
from uniter.datasets.text_db.building.merge_runs import merge_runs
from uniter.datasets.text_db.building.spool import BATCH, MatchImage, Spool
from uniter.datasets.text_db.building.write_index import write_text_index
from uniter.datasets.text_db.caption import Caption
from uniter.datasets.text_db.database import TEXT_FORMAT
from uniter.datasets.text_db.tokenizer import Tokenizer


def build_text_db(
    captions: Iterable[Caption],
    out: str | Path,
    *,
    tokenizer: Tokenizer,
    settings: Mapping[str, Any] | None = None,
    images: MatchImage | None = None,
    key: str = "stem",
    excluded: Callable[[Caption], bool] | None = None,
    source_counts: Counter[str] | None = None,
    lengths: Mapping[str, Callable[[Mapping[str, Any]], int]] | None = None,
    meta: Mapping[str, Any] | None = None,
    side_files: Callable[[], Mapping[str, Any]] | None = None,
    overwrite: bool = False,
) -> BuildReport:
    """Write a text database, or find it finished.

    Args:
        captions: the texts, in the order that their examples will have. Not touched if the database is complete already.
        out: the database's folder, made if it is not there.
        settings: JSON; what else than the tokeniser and `key` decides what is written. Another run with others is refused.
        images: from an image's name to (its key in the region databases, the rule it was found by), None if it is in none. Texts
            without an image are left out and counted.
        key: how an image's key is made from its name where `images` is None (`keys.key_maker`).
        excluded: true for texts whose image must not be seen; they are left out and counted.
        source_counts: what the source counts while it is read; goes into the report.
        lengths: what side files of lengths to write, by name, from the finished record; by default `id2len` of `input_ids`.
        meta: what meta.json says beside the tokeniser.
        side_files: the further JSON files of a task, by name; asked for once the texts are read.
        overwrite: begin anew whatever was there.

    Raises:
        SettingsDiffer: `out` holds a database made with other settings.
        BadInput: an id is unusable or used twice; no text is left; no image is in `images`.
    """
    folder = Path(out)
    wanted = {
        "format": TEXT_FORMAT,
        "kind": "text",
        "tokenizer": {"name": tokenizer.name, "sha256": tokenizer.sha256(), "lowercase": tokenizer.lowercase},
        "key": None if images is not None else key,
        **(settings or {}),
    }
    wanted = json.loads(json.dumps(wanted))  # as it will be read again: tuples are lists
    make_key = key_maker(key) if images is None else None
    with only_builder(folder):
        finished = prepare_folder(folder, wanted, overwrite=overwrite)
        if finished is not None:
            return finished
        try:
            return _build(
                captions,
                folder,
                spool_of=lambda work: Spool(
                    work, folder, tokenizer, images, make_key, lengths or {"id2len": _length_of_input_ids}, excluded
                ),
                finish=lambda: _write_meta(folder, tokenizer, meta or {}, side_files),
                source_counts=source_counts,
                wanted=wanted,
                with_images=images is not None,
            )
        except (UniterError, OSError) as error:
            # What cannot be built with these settings must not stand in the way of others. (A killed run leaves its settings.)
            clear(folder)
            (folder / "settings.json").unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # it holds files of somebody else
                folder.rmdir()
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UniterError(
                    f"the disk is full while building {folder}, of which nothing is kept; make room and run the same command again"
                ) from error
            raise


def _build(
    captions: Iterable[Caption],
    folder: Path,
    *,
    spool_of: Callable[[Path], "Spool"],
    finish: Callable[[], None],
    source_counts: Counter[str] | None,
    wanted: Mapping[str, Any],
    with_images: bool,
) -> BuildReport:
    work = folder / "building"
    work.mkdir()
    spool = spool_of(work)
    with _seldom_collected(), Progress(None, unit="captions", label="reading") as progress:
        source = iter(captions)
        while batch := list(islice(source, BATCH)):
            spool.add(batch)
            progress.update(len(batch))
    spool.close()
    counts = {**spool.counts(), **(source_counts or {})}
    if not spool.kept:
        raise BadInput(_nothing_left(counts, with_images, folder, spool.first_without_image))
    merge_runs(folder, spool)
    image_count, coverage = write_text_index(work, folder, spool)
    counts["duplicate"] = spool.duplicates()
    finish()
    shutil.rmtree(work)
    sync_folder(folder)
    report = BuildReport(counts, coverage if with_images else {}, image_count)
    header = {
        "format": TEXT_FORMAT,
        "kind": "text",
        "examples": spool.kept,
        "settings": wanted,
        "report": report.as_dict(),
        "software": f"uniter-toolkit {version('uniter-toolkit')}",
    }
    if not has_foreign_readme(folder):
        (folder / CARD_FILE).write_text(text_card(header), encoding="utf-8")
    write_json(folder / "header.json", header)
    return report


@contextlib.contextmanager
def _seldom_collected() -> Iterator[None]:
    """Look for cycles of garbage a hundred times less often: records make none, and the looking costs 15 % of the time."""
    usual = gc.get_threshold()
    gc.set_threshold(100_000, *usual[1:])
    try:
        yield
    finally:
        gc.set_threshold(*usual)


def _length_of_input_ids(record: Mapping[str, Any]) -> int:
    return len(record["input_ids"])


def _nothing_left(counts: Mapping[str, int], with_images: bool, folder: Path, image: str | None) -> str:
    if not counts["read"]:
        return "the source holds no captions; is it the right file, and the right --split?"
    if with_images and counts["without_image"]:
        return (
            f"of {counts['read']:,} texts, none is about an image of the region databases ({counts['without_image']:,} without an image, "
            f"{counts['excluded']:,} excluded, {counts['empty']:,} empty); do --images and the captions belong together? "
            f"The first wants {image!r}; `uniter-db info` shows how the keys of --images look"
        )
    return f"of {counts['read']:,} texts none is left ({counts['without_image']:,} without an image, {counts['excluded']:,} excluded, " + (
        f"{counts['empty']:,} empty); nothing was written to {folder}"
    )


def _write_meta(folder: Path, tokenizer: Tokenizer, more: Mapping[str, Any], side_files: Callable[[], Mapping[str, Any]] | None) -> None:
    # The pieces themselves lie beside it: a learned vocabulary is nowhere else, and `--tokenizer OTHER.db` takes it from here.
    with open(folder / "vocab.txt", "w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{piece}\n" for piece in tokenizer.vocabulary)
        file.flush()
        os.fsync(file.fileno())
    write_json(folder / "meta.json", {**more, **tokenizer.meta()})
    for name, value in (side_files() if side_files is not None else {}).items():
        write_json(folder / name, value)
