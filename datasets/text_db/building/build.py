"""Captions to a finished text database (the layout of `text_db.py`), in memory that does not grow with the number of captions.

The captions are read once. Their records go, sorted by id, into runs on disk that are then merged, because an LMDB filled in the order
of its keys is compact and touches one page at a time; what the side files and the index need is spooled beside them. All of it lies in
`OUT/building/` until the end. `settings.json` is written first and `header.json` last: a folder between the two opens nowhere as complete,
and the same command starts it anew.
"""

import contextlib
import errno
import gc
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from uniter.datasets.errors import BadInput, UniterError
from uniter.datasets.image_db.keys import key_maker
from uniter.datasets.progress import Progress
from uniter.datasets.storage.cards import CARD_FILE, has_foreign_readme, text_card
from uniter.datasets.storage.claims import MADE_FROM, Claim, Source, claim
from uniter.datasets.storage.files import sync, write_json
from uniter.datasets.text_db.building.folder import REMEMBERED, TEXTS, WORK, BuildReport, begin_anew, bring_up_to_date, tokenizer_content
from uniter.datasets.text_db.building.image_names import BY_TEMPLATE, FindImage, ImageNames, NamedImages
from uniter.datasets.text_db.building.merge_runs import merge_runs
from uniter.datasets.text_db.building.spool import BATCH, Length, Spool
from uniter.datasets.text_db.building.write_index import write_text_index
from uniter.datasets.text_db.caption import Caption
from uniter.datasets.text_db.database import TEXT_FORMAT
from uniter.datasets.text_db.tokenizer import Tokenizer

log = logging.getLogger(__name__)

SideFiles = Callable[[], Mapping[str, Any]]


def build_text_db(
    captions: Iterable[Caption],
    out: str | Path,
    *,
    tokenizer: Tokenizer,
    settings: Mapping[str, Any] | None = None,
    sources: Mapping[str, Source] | None = None,
    images: FindImage | None = None,
    key: str | None = None,
    folders_tell_apart: bool = True,
    source_counts: Counter[str] | None = None,
    lengths: Mapping[str, Length] | None = None,
    meta: Mapping[str, Any] | None = None,
    side_files: SideFiles | None = None,
    may_lack_text: bool = False,
    overwrite: bool = False,
) -> BuildReport:
    """Write a text database, or find it finished.

    Args:
        captions: the texts, in the order that their examples will have. Not touched if the database is complete already.
        settings: JSON; what else than the tokeniser and `key` decides what is written. Another run with others is refused.
        sources: what the captions are made from (`claims.claim`): "captions", "join", "images".
        images: from an image's name to (its key in the region databases, the rule it was found by), None if it is in none. Texts
            without an image are left out and counted.
        key: how an image's key is made from its name where `images` is None (`keys.key_maker`); "stem" by default.
        folders_tell_apart: names in different folders are of different images; refused where they have the same key.
        source_counts: what the source counts while it is read, such as "excluded"; goes into the report.
        lengths: what side files of lengths to write, by name, from the finished record; by default `id2len` of `input_ids`.
        meta: what meta.json says beside the tokeniser.
        side_files: the further JSON files of a task, by name; asked for once the texts are read.
        may_lack_text: an example may be a picture alone; otherwise texts of which nothing is left are passed over.
        overwrite: begin anew, beside what is there.

    Raises:
        SettingsDiffer: `out` holds a database made with other settings, or from other contents.
        BadInput: an id is unusable or used twice; no text is left; no image is in `images`; images of several folders share a key.
    """
    out = Path(out)
    find = images or _by_template(key or "stem")
    pieces = {"name": tokenizer.name, "sha256": tokenizer.sha256(), "lowercase": tokenizer.lowercase}
    wanted = {"format": TEXT_FORMAT, "key": key if images else key or "stem", "tokenizer": pieces, **(settings or {})}
    made_from = {**(sources or {}), "tokenizer": tokenizer_content(pieces)}
    if not overwrite:
        bring_up_to_date(out, wanted, made_from)
    claimed = claim(out, wanted, maker=TEXTS, sources=made_from, overwrite=overwrite, may_differ=REMEMBERED)
    with claimed.alone("building"):
        if claimed.complete:
            return BuildReport.of_complete(claimed.folder)
        with _abandoned_on_failure(claimed):
            work = begin_anew(claimed.folder)
            names = ImageNames(work, find)
            spool = Spool(work, claimed.folder, tokenizer, names, lengths or {"id2len": _length_of_input_ids}, may_lack_text=may_lack_text)
            counts = _read(captions, spool, Counter() if source_counts is None else source_counts, out, with_images=images is not None)
            report = _write(claimed.folder, spool, counts, folders_tell_apart=folders_tell_apart, with_images=images is not None)
            _write_meta(claimed.folder, tokenizer, meta or {}, side_files)
            _complete(claimed, report, examples=spool.kept)
        claimed.publish()
    return report


def _by_template(key: str) -> FindImage:
    make = key_maker(key)
    return lambda name: (make(name), BY_TEMPLATE)


def _length_of_input_ids(record: Mapping[str, Any]) -> int:
    return len(record["input_ids"])


@contextlib.contextmanager
def _abandoned_on_failure(claimed: Claim) -> Iterator[None]:
    """What cannot be built with these settings must not stand in the way of others. (A killed run leaves its settings.)"""
    try:
        yield
    except (UniterError, OSError) as error:
        claimed.abandon()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UniterError(
                f"the disk is full while building {claimed.out}, of which nothing is kept; make room and run the same command again"
            ) from error
        raise


def _read(captions: Iterable[Caption], spool: Spool, source_counts: Mapping[str, int], out: Path, *, with_images: bool) -> dict[str, int]:
    """All captions into the spool; what was counted. BadInput if nothing is left of them."""
    with _seldom_collected(), Progress(None, unit="captions", label="reading") as progress:
        source = iter(captions)
        while batch := list(islice(source, BATCH)):
            spool.add(batch)
            progress.update(len(batch))
    spool.close()
    counts = {**spool.counts(), **source_counts}
    counts["read"] += counts["excluded"]
    if not spool.kept:
        raise BadInput(_nothing_left(counts, with_images, out, spool.first_without_image))
    return counts


def _write(folder: Path, spool: Spool, counts: dict[str, int], *, folders_tell_apart: bool, with_images: bool) -> BuildReport:
    """The LMDB and the index from what was spooled; the spool goes."""
    work = folder / WORK
    images = NamedImages(work)
    if folders_tell_apart:
        counts["names_sharing_a_key"] = images.names_sharing_a_key(np.fromfile(work / "images", np.int32))
    merge_runs(folder, spool)
    image_count = write_text_index(work, folder, spool, images)
    counts["duplicate"] = spool.duplicates()
    shutil.rmtree(work)
    return BuildReport(counts, images.found_by(spool.images.rules) if with_images else {}, image_count)


def _complete(claimed: Claim, report: BuildReport, *, examples: int) -> None:
    """The card, and the header: from here on the database opens."""
    header = {
        "format": TEXT_FORMAT,
        "kind": TEXTS.kind,
        "examples": examples,
        "settings": {name: value for name, value in claimed.settings.items() if name != MADE_FROM},
        "made_from": {
            source: {name: value for name, value in content.items() if name != "modified"}
            for source, content in claimed.settings[MADE_FROM].items()
        },
        "report": report.as_dict(),
        "software": f"uniter-toolkit {version('uniter-toolkit')}",
    }
    if not has_foreign_readme(claimed.out):
        (claimed.folder / CARD_FILE).write_text(text_card(header), encoding="utf-8")
    sync(claimed.folder)
    write_json(claimed.folder / TEXTS.complete, header)
    if report.counts["names_sharing_a_key"]:
        log.warning(
            "%s names of images share their key with another one (such as 1.jpg and 1.png): their texts are about one image",
            f"{report.counts['names_sharing_a_key']:,}",
        )


@contextlib.contextmanager
def _seldom_collected() -> Iterator[None]:
    """Look for cycles of garbage a hundred times less often: records make none, and the looking costs 15 % of the time."""
    usual = gc.get_threshold()
    gc.set_threshold(100_000, *usual[1:])
    try:
        yield
    finally:
        gc.set_threshold(*usual)


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


def _write_meta(folder: Path, tokenizer: Tokenizer, more: Mapping[str, Any], side_files: SideFiles | None) -> None:
    # The pieces themselves lie beside it: a learned vocabulary is nowhere else, and `--tokenizer OTHER.db` takes it from here.
    tokenizer.write_vocabulary(folder / "vocab.txt")
    sync(folder / "vocab.txt")
    write_json(folder / "meta.json", {**more, **tokenizer.meta()})
    for name, value in (side_files() if side_files is not None else {}).items():
        write_json(folder / name, value)
