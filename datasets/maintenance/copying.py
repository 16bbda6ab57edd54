"""What one does with whole databases: look at them, put them together, take them apart, keep what is good.

Region databases go through `UnitStore`, so a merge or repair that is killed goes on when it is repeated. Text databases of ours go
through `build_text_db`, so that the result is one of ours again: with its index, its vocabulary, and a header that says which lists of
images were kept out. Published text databases are written in UNITER's layout (an LMDB and JSON side files).
"""

import itertools
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import lmdb
import orjson

from uniter.datasets.errors import BadInput, SettingsDiffer, UniterError, shown
from uniter.datasets.image_db import ImageDB
from uniter.datasets.image_db.database import kind_of, kind_of_child
from uniter.datasets.image_db.records import encode_record
from uniter.datasets.image_db.writing.side_files import read_box_ids, write_box_ids
from uniter.datasets.image_db.writing.units import UnitStore
from uniter.datasets.maintenance.kinds import database_kind
from uniter.datasets.storage.claims import source_names
from uniter.datasets.storage.files import difference_in_words, read_json, sync, write_json
from uniter.datasets.storage.lmdb_files import put_all
from uniter.datasets.text_db.annotations.table import ANNOTATIONS
from uniter.datasets.text_db.building.build import build_text_db
from uniter.datasets.text_db.building.folder import TASK_FILES
from uniter.datasets.text_db.caption import Caption
from uniter.datasets.text_db.database import LENGTHS
from uniter.datasets.text_db.records import decode_text_record
from uniter.datasets.text_db.tokenizer import Tokenizer

_UNIT: Final = 512


_COUNTS: Final = ("format_version", "kind", "images", "regions", "failures", "units")


Record = tuple[str, bytes, int]


"""A region record on its way: key, value, number of regions."""


# -------------------------------------------------------------------------------------------------------- regions: write some


def records_of(database: ImageDB, keys: Iterable[str]) -> Iterator[Record]:
    """Records as ours keep them: those of ours byte for byte, published ones cut and packed anew."""
    for key in keys:
        regions = database[key]
        raw = database.raw_record(key)
        yield key, raw if raw is not None else encode_record(regions, key=key), len(regions)


def write_regions(
    out: Path,
    records: Iterable[Record],
    *,
    settings: Mapping[str, Any],
    header: Callable[[], Mapping[str, Any]],
    failures: Sequence[Mapping[str, Any]] = (),
    box_ids: Mapping[str, Sequence[Any]] | None = None,
    overwrite: bool = False,
) -> int:
    """Write records in units; the same call again goes on. Returns how many images the database holds.

    Args:
        header: asked at the end for what the header says.
        box_ids: the caller's ids of given boxes by key; those of the records written are kept.

    Raises:
        BadInput: there is not one record.
    """
    store = UnitStore(out, settings=settings, overwrite=overwrite)
    if not store.is_complete():
        units = 0
        kept: dict[str, Sequence[Any]] = {}
        stream = iter(records)
        while batch := list(itertools.islice(stream, _UNIT)):
            writer = store.unit(units)
            if writer is not None:
                with writer:
                    for key, value, regions in batch:
                        if key not in writer.done:
                            writer.put(key, value, regions=regions)
                    if units == 0:
                        for row in failures:
                            if row["key"] not in writer.done:
                                writer.fail(str(row["key"]), str(row.get("path", "")), str(row.get("error", "")))
                    writer.complete()
            kept.update({key: box_ids[key] for key, _, _ in batch if key in box_ids} if box_ids else {})
            units += 1
        if not units:
            raise BadInput(f"there is not one good record to write to {out}")
        if not store.is_complete():
            write_box_ids(out, kept)
        if not store.finish(units=units, header=header()):
            raise UniterError(f"{out} is being written by another process; wait for it, or choose another folder")
    return int(read_json(out / "header.json")["images"])


def shared_header(headers: Sequence[Mapping[str, Any] | None], paths: Sequence[Path]) -> dict[str, Any]:
    """The header of databases put together: they must come from the same detector."""
    known = [(header, path) for header, path in zip(headers, paths, strict=True) if header is not None]
    if not known:
        return {}
    made = [provenance(header) for header, _ in known]
    if all(one.get("box_kind") == "given" for one in made) and len({str(one.get("selection")) for one in made}) > 1:
        # Given boxes come in one file for each part of a data set; only the rule has to be the same.
        made = [{**one, "selection": {**one["selection"], "boxes_sha256": "several files"}} for one in made]
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
    return {name: value for name, value in header.items() if name not in (*_COUNTS, "software", "batch_size", "units_of")}


def folders_of(source: Path) -> list[Path]:
    """The databases that a path stands for: itself, or what a folder of databases holds."""
    if database_kind(source) != "folder of regions" or kind_of(source) == "split":
        return [source]
    return sorted(child for child in source.iterdir() if kind_of_child(child))


# ---------------------------------------------------------------------------------------------------------- texts: write some


Text = tuple[str, bytes]


"""A text on its way: id, record as stored."""


def write_texts(
    out: Path, texts: Iterable[Text], sources: Sequence[Path], *, made_by: str, part: str | None = None, overwrite: bool
) -> int:
    """Write a text database of the same kind as its sources: ours again, with index and header, or in UNITER's layout.

    Returns:
        How many texts it holds.
    """
    if not all((source / "settings.json").exists() and (source / "vocab.txt").exists() for source in sources):
        return _write_published_texts(out, texts, sources, overwrite=overwrite)
    stated = [stated_settings(source) for source in sources]
    lists = [{tuple(row) for row in settings.get("exclude", {}).items()} for settings in stated]
    settings = {
        "made_by": made_by,
        "part": part,
        "task": stated[0].get("task"),
        # What every one of the sources kept out is kept out of the whole.
        "exclude": dict(sorted(set.intersection(*lists))),
        "sources": [{"name": source.name, "settings": its} for source, its in zip(sources, stated, strict=True)],
    }
    task = ANNOTATIONS.get(str(settings["task"]))
    report = build_text_db(
        (_as_caption(key, decode_text_record(value, example=key)) for key, value in texts),
        out,
        tokenizer=Tokenizer.load(sources[0]),
        settings=settings,
        sources=source_names(sources),
        images=lambda key: (key, "exact"),
        lengths=None if task is None else task.lengths,
        meta={name: value for name, value in stated_settings(sources[0], "meta.json").items() if name in ("task", "annotations")}
        | {"output": out.name},
        side_files=lambda: _side_files(sources),
        overwrite=overwrite,
    )
    return report.counts["kept"]


def _as_caption(key: str, record: dict[str, Any]) -> Caption:
    """A record as it came out of its source; what it holds is stored as it is."""
    image, text = record.get("img_fname"), record.get("sent")
    if not isinstance(image, str):
        if not isinstance(image, list) or not all(isinstance(name, str) for name in image):
            raise BadInput(f"text {key!r} is about {shown(image)}; expected the key of an image, or of several; see `uniter-db check`")
        image = tuple(image)
    return Caption(key, image, text if isinstance(text, str) else None, fields=record)


def stated_settings(source: Path, name: str = "settings.json") -> dict[str, Any]:
    """A JSON object beside a text database; an empty one if it cannot be read."""
    try:
        stated = read_json(source / name)
    except (FileNotFoundError, BadInput):
        return {}
    return stated if isinstance(stated, dict) else {}


def _side_files(sources: Sequence[Path]) -> dict[str, Any]:
    """The task's files of the sources as one: equal ones are kept, lists (RefCOCO's) put together without repetition.

    Raises:
        SettingsDiffer: they are others, so that labels would mean other things.
    """
    together: dict[str, Any] = {}
    for name in TASK_FILES:
        values = [read_json(source / name) for source in sources if (source / name).exists()]
        if values and all(value == values[0] for value in values):
            together[name] = values[0]
        elif values and all(isinstance(value, list) for value in values):
            rows = {orjson.dumps(row, option=orjson.OPT_SORT_KEYS): row for value in values for row in value}
            together[name] = list(rows.values())
        elif values:
            raise SettingsDiffer(
                f"{', '.join(str(source / name) for source in sources)} differ; texts of other labels cannot be one database"
            )
    return together


def _write_published_texts(out: Path, texts: Iterable[Text], sources: Sequence[Path], *, overwrite: bool) -> int:
    """Write a text database in UNITER's layout; what meta.json and RefCOCO's side files say is taken from the sources."""
    if out.exists() and any(out.iterdir()) and not (overwrite and (out / "data.mdb").is_file()):
        raise BadInput(f"{out} is there already; choose another folder" + ("" if overwrite else ", or --overwrite"))
    if any(source.resolve().is_relative_to(out.resolve()) for source in sources):
        raise BadInput(f"{out} holds the source, and would be replaced; choose another folder")
    temporary, old = out.with_name(f"{out.name}.tmp"), out.with_name(f"{out.name}.old.tmp")
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    stated = [_stated_lengths(source) for source in sources]
    lengths: dict[str, dict[str, int]] = {}
    images: dict[str, Any] = {}
    texts_of: dict[str, list[str]] = {}
    environment = lmdb.open(str(temporary), map_size=1 << 26, lock=False, max_spare_txns=0)
    try:
        pending: list[tuple[bytes, bytes]] = []
        for key, value in texts:
            record = decode_text_record(value, example=key)
            for name in LENGTHS:
                found = next((tables[name][key] for tables in stated if key in tables.get(name, {})), None)
                if found is None and name == "id2len" and not any(stated):
                    found = len(record.get("input_ids", ()))
                if found is not None:
                    lengths.setdefault(name, {})[key] = found
            image = record.get("img_fname")
            if image is not None:
                images[key] = image
                for name in [image] if isinstance(image, str) else image:
                    texts_of.setdefault(name, []).append(key)
            pending.append((key.encode(), value))
            if len(pending) == 4096:
                put_all(environment, pending)
                pending = []
        put_all(environment, pending)
    finally:
        environment.close()
    if not lengths and not images:
        shutil.rmtree(temporary)
        raise BadInput(f"there is not one good text to write to {out}")
    for name, table in lengths.items():
        write_json(temporary / f"{name}.json", table)
    write_json(temporary / "txt2img.json", images)
    write_json(temporary / "img2txts.json", texts_of)
    for name, value in _side_files(sources).items():
        write_json(temporary / name, value)
    if (sources[0] / "vocab.txt").exists():
        shutil.copyfile(sources[0] / "vocab.txt", temporary / "vocab.txt")
    write_json(temporary / "meta.json", next((meta for source in sources if (meta := stated_settings(source, "meta.json"))), {}))
    if out.exists():
        out.rename(old)  # not removed in place: half of it could still open
    temporary.rename(out)
    sync(out.parent)
    shutil.rmtree(old, ignore_errors=True)
    return len(images) or max(map(len, lengths.values()))


def _stated_lengths(source: Path) -> dict[str, dict[str, int]]:
    """The length tables of a text database, as far as they can be read."""
    tables = {}
    for name in LENGTHS:
        try:
            table = read_json(source / f"{name}.json")
        except (FileNotFoundError, BadInput):
            continue
        if isinstance(table, dict):
            tables[name] = {key: length for key, length in table.items() if type(length) is int}
    return tables
