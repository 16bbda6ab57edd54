"""What one does with whole databases: look at them, put them together, take them apart, keep what is good.

Region databases go through `UnitStore`, so a merge or repair that is killed goes on when it is repeated. Text databases of ours go
through `build_text_db`, so that the result is one of ours again: with its index, its vocabulary, and a header that says which lists of
images were kept out. Published text databases are written in UNITER's layout (an LMDB and JSON side files).
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from uniter.datasets.errors import BadInput, SettingsDiffer, UniterError, shown
from uniter.datasets.image_db import ImageDB
from uniter.datasets.image_db.database import children_of, kind_of
from uniter.datasets.image_db.records import encode_record
from uniter.datasets.image_db.writing.noted_photographs import NOT_KNOWN, Photograph
from uniter.datasets.image_db.writing.side_files import read_box_ids, write_box_ids
from uniter.datasets.image_db.writing.units import UnitStore
from uniter.datasets.maintenance.kinds import database_kind
from uniter.datasets.maintenance.published_texts import Text, side_files_of, stated_settings, write_published_texts
from uniter.datasets.progress import Progress
from uniter.datasets.storage.claims import MADE_FROM, refuse_source_inside, source_names
from uniter.datasets.storage.files import difference_in_words, read_json_object
from uniter.datasets.text_db.annotations.table import ANNOTATIONS
from uniter.datasets.text_db.building.build import build_text_db
from uniter.datasets.text_db.caption import Caption
from uniter.datasets.text_db.records import decode_text_record
from uniter.datasets.text_db.tokenizer import Tokenizer

_UNIT: Final = 512
_COUNTED: Final = re.compile(r"of [\d,]+ images")


_COUNTS: Final = ("format_version", "kind", "images", "regions", "failures", "units")


Record = tuple[str, bytes | BadInput, int]


"""A region record on its way: key, value, number of regions; or the reason why there is none."""


# -------------------------------------------------------------------------------------------------------- regions: write some


def records_of(database: ImageDB, keys: Iterable[str]) -> Iterator[Record]:
    """Records as ours keep them: those of ours byte for byte, published ones cut and packed anew."""
    with Progress(None, unit="images", label="copying", brief=True) as progress:
        for key in keys:
            regions = database[key]
            raw = database.raw_record(key)
            yield key, raw if raw is not None else encode_record(regions, key=key), len(regions)
            progress.update()


@dataclass(frozen=True)
class Written:
    """A region database that was written, or found.

    Attributes:
        images, regions: how many it holds.
        failures: the rows of its `failures.jsonl`.
        header: what it says of itself.
        already_complete: whether nothing was done.
    """

    images: int
    regions: int
    failures: list[dict[str, Any]]
    header: Mapping[str, Any]
    already_complete: bool


def write_regions(
    out: Path,
    records: Iterable[Record],
    *,
    settings: Mapping[str, Any],
    sources: Mapping[str, Path],
    header: Callable[[], Mapping[str, Any]],
    failures: Sequence[Mapping[str, Any]] = (),
    box_ids: Mapping[str, Sequence[Any]] | None = None,
    photographs: Callable[[str], Photograph] = lambda key: NOT_KNOWN,
    overwrite: bool = False,
) -> Written:
    """Write records in units; the same call again goes on where a killed one stopped, or finds the database complete.

    Args:
        records: not touched if the database is complete already.
        sources: what they are made from, see `claims.claim`.
        header: asked at the end for what the header says.
        failures: rows to be kept of images that are in none of the records.
        box_ids: the caller's ids of given boxes by key; those of the records written are kept.
        photographs: what is known of the photograph of each key.

    Raises:
        BadInput: there is not one record, or whatever the records raise: then nothing is left of what was begun.
    """
    store = UnitStore(out, settings=settings, sources=sources, overwrite=overwrite)
    complete = store.is_complete()
    if not complete:
        try:
            units = _write_units(store, records, failures, box_ids or {}, photographs)
            if not units:
                raise BadInput(f"there is not one good record to write to {out}")
            if not store.finish(units=units, header=header()):
                raise UniterError(f"{out} is being written by another process; wait for it, or choose another folder")
        except (BadInput, SettingsDiffer):
            store.claim.abandon()
            raise
    told = read_json_object(store.path / "header.json")
    return Written(int(told["images"]), int(told["regions"]), store.failures(), told, complete)


def _write_units(
    store: UnitStore,
    records: Iterable[Record],
    failures: Sequence[Mapping[str, Any]],
    box_ids: Mapping[str, Sequence[Any]],
    photographs: Callable[[str], Photograph],
) -> int:
    """Write all units that are not there yet, and the ids; how many there are."""
    units = 0
    kept: dict[str, Sequence[Any]] = {}
    stream = iter(records)
    while batch := list(itertools.islice(stream, _UNIT)):
        writer = store.unit(units)
        if writer is not None:
            with writer:
                for key, value, regions in batch:
                    if isinstance(value, BadInput):
                        writer.fail(key, key, str(value))
                    elif key not in writer.done:
                        writer.put(key, value, regions=regions, photograph=photographs(key))
                for row in failures if units == 0 else ():
                    if row["key"] not in writer.done:
                        writer.fail(str(row["key"]), str(row.get("path", "")), str(row.get("error", "")), retry=row.get("retry"))
                writer.complete()
        kept.update({key: box_ids[key] for key, _, _ in batch if key in box_ids})
        units += 1
    if units and not store.is_complete():
        write_box_ids(store.path, kept)
    return units


def refuse_overlap(out: Path, sources: Iterable[Path]) -> None:
    """BadInput if writing `out` would change one of the sources, or the next reading of it."""
    for source in sources:
        refuse_source_inside(out, source)
        if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
            raise BadInput(f"{out} lies inside the source {source}, and would be a part of it; choose another OUT")


def shared_header(headers: Sequence[Mapping[str, Any] | None], paths: Sequence[Path]) -> dict[str, Any]:
    """The header of databases put together: they must come from the same detector."""
    known = [(header, path) for header, path in zip(headers, paths, strict=True) if header is not None]
    if not known:
        return {}
    made = [provenance(header) for header, _ in known]
    if all(one.get("box_kind") == "given" for one in made) and len({str(one.get("selection")) for one in made}) > 1:
        # Given boxes come in one file for each part of a data set; only the rule has to be the same.
        made = [{**one, "selection": {**one["selection"], "boxes_sha256": "several files"}} for one in made]
    if len({str(one.get("lacks")) for one in made}) > 1:  # of how many images something is not known, is another number in each
        made = [{**one, "lacks": _COUNTED.sub("of some images", str(one["lacks"]))} if "lacks" in one else one for one in made]
    first = made[0]
    for other, (_, path) in zip(made[1:], known[1:], strict=True):
        phrases = difference_in_words(first, other)
        if phrases:
            raise SettingsDiffer(f"{path} was made otherwise than {known[0][1]} ({'; '.join(phrases[:5])}): they cannot be one database")
    return first


def box_ids_of(folders: Iterable[Path]) -> dict[str, list[Any]]:
    """The caller's ids of given boxes in several databases; of an image that is in several, those of the first."""
    together: dict[str, list[Any]] = {}
    for folder in folders:
        together = {**read_box_ids(folder), **together}
    return together


def provenance(header: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same of databases that are put together: neither by which version, nor on which device they were made."""
    return {name: value for name, value in header.items() if name not in (*_COUNTS, "software", "batch_size", "device", "units_of")}


def folders_of(source: Path) -> list[Path]:
    """The databases that a path stands for: itself, or what a folder of databases holds."""
    if database_kind(source) != "folder of regions" or kind_of(source) == "split":
        return [source]
    return children_of(source)


# ---------------------------------------------------------------------------------------------------------- texts: write some


def are_our_texts(sources: Sequence[Path]) -> bool:
    """Whether text databases are written as ours; else, as soon as one of them is published, in UNITER's layout."""
    return all((source / "settings.json").exists() and (source / "vocab.txt").exists() for source in sources)


def write_texts(
    out: Path,
    texts: Iterable[Text],
    sources: Sequence[Path],
    *,
    made_by: str,
    part: str | None = None,
    lists: Mapping[str, Path] | None = None,
    overwrite: bool,
) -> tuple[int, bool]:
    """Write a text database of the same kind as its sources: ours again, with index and header, or in UNITER's layout.

    Args:
        texts: not touched if the database is complete already.
        lists: what else decides which texts are taken: files.

    Returns:
        How many texts it holds, and whether it was complete already.
    """
    refuse_overlap(out, sources)
    contents = {**source_names(sources), **(lists or {})}
    if not are_our_texts(sources):
        settings = {"made_by": made_by, "part": part}
        return write_published_texts(out, texts, sources, settings=settings, contents=contents, overwrite=overwrite)
    # Contents are compared by `contents`: the times of files in them are no setting.
    stated = [{name: value for name, value in stated_settings(source).items() if name != MADE_FROM} for source in sources]
    kept_out = [{tuple(row) for row in settings.get("exclude", {}).items()} for settings in stated]
    stated_by_all: dict[str, Any] = {
        "made_by": made_by,
        "part": part,
        "task": stated[0].get("task"),
        # What every one of the sources kept out is kept out of the whole.
        "exclude": dict(sorted(set.intersection(*kept_out))),
        "sources": [{"name": source.name, "settings": its} for source, its in zip(sources, stated, strict=True)],
    }
    task = ANNOTATIONS.get(str(stated_by_all["task"]))
    report = build_text_db(
        (_as_caption(key, decode_text_record(value, example=key)) for key, value in texts),
        out,
        tokenizer=Tokenizer.load(sources[0]),
        settings=stated_by_all,
        sources=contents,
        images=lambda key: (key, "exact"),
        lengths=None if task is None else task.lengths,
        meta={name: value for name, value in stated_settings(sources[0], "meta.json").items() if name in ("task", "annotations")}
        | {"output": out.name},
        side_files=lambda: side_files_of(sources),
        may_lack_text=task is not None and task.may_lack_text,
        overwrite=overwrite,
    )
    return report.counts["kept"], report.already_complete


def _as_caption(key: str, record: dict[str, Any]) -> Caption:
    """A record as it came out of its source; what it holds is stored as it is."""
    image, text = record.get("img_fname"), record.get("sent")
    if not isinstance(image, str):
        if not isinstance(image, list) or not all(isinstance(name, str) for name in image):
            raise BadInput(f"text {key!r} is about {shown(image)}; expected the key of an image, or of several; see `uniter-db check`")
        image = tuple(image)
    return Caption(key, image, text if isinstance(text, str) else None, fields=record)
