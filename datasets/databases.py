"""What one does with whole databases: look at them, put them together, take them apart, keep what is good.

Region databases go through `UnitStore`, so a merge or repair that is killed goes on when it is repeated. Text databases of ours go
through `build_text_db`, so that the result is one of ours again: with its index, its vocabulary, and a header that says which lists of
images were kept out. Published text databases are written in UNITER's layout (an LMDB and JSON side files).
"""

import contextlib
import itertools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import lmdb
import numpy as np
import orjson

from uniter.datasets.annotations import ANNOTATIONS
from uniter.datasets.build_text import TASK_FILES, build_text_db
from uniter.datasets.captions.caption import Caption
from uniter.datasets.captions.files import lines_of
from uniter.datasets.check import CheckReport, database_kind, examine_regions, examine_text
from uniter.datasets.errors import BadInput, SettingsDiffer, UniterError, shown
from uniter.datasets.image_db import ImageDB, encode_record, kind_of, kind_of_child
from uniter.datasets.lmdb_store import (
    UnitStore,
    difference_in_words,
    put_all,
    read_box_ids,
    read_failures,
    read_json,
    sync_folder,
    write_box_ids,
    write_json,
)
from uniter.datasets.text_db import LENGTHS, TextDB, decode_text_record
from uniter.datasets.tokenizer import Tokenizer

_UNIT: Final = 512
_REPAIR: Final = "uniter-db check --repair"
_COUNTS: Final = ("format_version", "kind", "images", "regions", "failures", "units")
Record = tuple[str, bytes, int]
"""A region record on its way: key, value, number of regions."""


# -------------------------------------------------------------------------------------------------------------------- looking


def describe(path: Path) -> dict[str, Any]:
    """What a database is and holds, as far as it can be read; damage is told under "error", never raised.

    Raises:
        BadInput: no database.
    """
    kind = database_kind(path)
    told: dict[str, Any] = {"path": str(path), "kind": kind, "complete": not kind.startswith("unfinished")}
    told["bytes"] = _bytes_below(path)
    try:
        told |= _describe_text(path) if kind.endswith("text") else _describe_regions(path, kind)
    except (UniterError, OSError, ValueError, KeyError, TypeError, lmdb.Error) as error:
        told["error"] = f"{error}; see `uniter-db check`"
    return told


def _bytes_below(path: Path) -> int:
    """The sizes of all files together; what is moved or removed meanwhile, by a command that is writing there, may be left out."""
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += Path(folder, name).stat().st_size
    return total


def _describe_regions(path: Path, kind: str) -> dict[str, Any]:
    told: dict[str, Any] = {}
    if kind == "unfinished regions":
        units = path / "units"
        names = [entry.name for entry in units.iterdir()] if units.is_dir() else []
        told["finished_units"] = sum(name.isdigit() for name in names)
        told["begun_units"] = sum(name.endswith(".partial") for name in names)
    database = ImageDB(path, allow_partial=True)
    counts = database.region_counts
    told["images"] = len(database)
    told["regions"] = int(counts.sum())
    if len(database):
        told["regions_per_image"] = {"mean": round(float(counts.mean()), 2), "min": int(counts.min()), "max": int(counts.max())}
        told["feature_width"] = database.feature_width
        told["label_classes"] = database.label_classes
        told["tasks_without_data"] = "none" if database.label_classes else "mrc and mrc-kl (no soft labels)"
        first = database[database.keys_list[0]]
        told["first_key"] = database.keys_list[0]
        told["fields"] = [name for name in _FIELDS if getattr(first, name) is not None]
    names_of_classes = database.class_names
    told["class_names"] = None if names_of_classes is None else len(names_of_classes)
    for name in ("detector", "weights_sha256", "box_kind", "selection", "converted_from", "software"):
        if database.header is not None and database.header.get(name) is not None:
            told[name] = database.header[name]
    told["failures"] = len(read_failures(path / "failures.jsonl"))
    return told


_FIELDS: Final = ("features", "norm_bb", "conf", "boxes", "size", "soft_labels", "attributes", "object_ids", "attribute_ids")


def _describe_text(path: Path) -> dict[str, Any]:
    database = TextDB(path, allow_partial=True)
    lengths = database.lengths
    told: dict[str, Any] = {"texts": len(database), "images": len(database.image_keys), "tokenizer": database.tokenizer_name}
    if len(database):
        told["word_pieces"] = {
            "mean": round(float(lengths.mean()), 2),
            "min": int(lengths.min()),
            "max": int(lengths.max()),
            "over_60": int((lengths > 60).sum()),
        }
        told["texts_per_image"] = round(len(database) / max(1, len(database.image_keys)), 2)
        told["first_id"] = database.ids[0]
        told["fields"] = sorted(database.record(0))
    if database.header is not None:
        settings = database.header.get("settings", {})
        told["task"], told["excluded_by"] = settings.get("task"), settings.get("exclude") or "no lists"
        told["report"] = database.header.get("report")
    return told


# -------------------------------------------------------------------------------------------------------- regions: write some


def _records_of(database: ImageDB, keys: Iterable[str]) -> Iterator[Record]:
    """Records as ours keep them: those of ours byte for byte, published ones cut and packed anew."""
    for key in keys:
        regions = database[key]
        raw = database.raw_record(key)
        yield key, raw if raw is not None else encode_record(regions, key=key), len(regions)


def _write_regions(
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


def _shared_header(headers: Sequence[Mapping[str, Any] | None], paths: Sequence[Path]) -> dict[str, Any]:
    """The header of databases put together: they must come from the same detector."""
    known = [(header, path) for header, path in zip(headers, paths, strict=True) if header is not None]
    if not known:
        return {}
    made = [_provenance(header) for header, _ in known]
    if all(one.get("box_kind") == "given" for one in made) and len({str(one.get("selection")) for one in made}) > 1:
        # Given boxes come in one file for each part of a data set; only the rule has to be the same.
        made = [{**one, "selection": {**one["selection"], "boxes_sha256": "several files"}} for one in made]
    first = made[0]
    for other, (_, path) in zip(made[1:], known[1:], strict=True):
        phrases = difference_in_words(first, other)
        if phrases:
            raise SettingsDiffer(f"{path} was made otherwise than {known[0][1]} ({'; '.join(phrases[:5])}): they cannot be one database")
    return first


def _box_ids_of(folders: Iterable[Path]) -> dict[str, list[Any]]:
    """The caller's ids of given boxes in several databases; of an image that is in several, those of the first."""
    together: dict[str, list[Any]] = {}
    for folder in folders:
        together = {**read_box_ids(folder), **together}
    return together


def _provenance(header: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in header.items() if name not in (*_COUNTS, "software", "batch_size", "units_of")}


# -------------------------------------------------------------------------------------------------------------------- merging


def merge(sources: Sequence[Path], out: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Put several databases of one kind together into one.

    The same key twice is fine if the records are equal, an error that names both if they are not. Failures whose image
    another source has are dropped.

    Raises:
        SettingsDiffer: region databases of different detectors.
        BadInput: different kinds, a key with two different records, an unfinished or damaged source.
    """
    kinds = {database_kind(path).endswith("text") for path in sources}
    if len(kinds) != 1:
        raise BadInput("text and region databases cannot be merged into one")
    if any(path.resolve() == out.resolve() for path in sources):
        raise BadInput(f"{out} is both a source and the target; choose another folder")
    if kinds == {True}:
        return _merge_texts(sources, out, overwrite=overwrite)
    folders = [folder for source in sources for folder in _folders_of(source)]
    databases = [ImageDB(folder) for folder in folders]
    first = next((database for database in databases if len(database)), databases[0])
    for folder, database in zip(folders, databases, strict=True):
        widths = (database.feature_width, database.label_classes)
        if len(database) and widths != (first.feature_width, first.label_classes):
            mine = f"{folder} has features and labels {widths[0]} and {widths[1]} wide"
            raise SettingsDiffer(f"{mine}, {folders[0]} {first.feature_width} and {first.label_classes}: they cannot be one database")
    header = {"feature_width": first.feature_width, "label_classes": first.label_classes}
    header |= _shared_header([database.header for database in databases], folders)
    doubled = 0

    def all_records() -> Iterator[Record]:
        nonlocal doubled
        for number, database in enumerate(databases):
            for record in _records_of(database, database.keys_list):
                earlier = next((before for before in databases[:number] if record[0] in before), None)
                if earlier is None:
                    yield record
                    continue
                doubled += 1
                if encode_record(earlier[record[0]]) != encode_record(database[record[0]]):
                    raise BadInput(
                        f"image {record[0]!r} is in {earlier.path} and in {database.path} with different regions; split one first"
                    )

    failed = [row for folder in folders for row in read_failures(folder / "failures.jsonl")]
    failed = [row for row in failed if not any(row["key"] in database for database in databases)]
    settings = {
        "made_by": "uniter-db merge",
        "sources": [path.name for path in sources],
        "images": [len(database) for database in databases],
    }
    images = _write_regions(
        out, all_records(), settings=settings, header=lambda: header, failures=failed, box_ids=_box_ids_of(folders), overwrite=overwrite
    )
    return {"out": str(out), "kind": "regions", "sources": len(sources), "images": images, "equal_records_dropped": doubled}


def _merge_texts(sources: Sequence[Path], out: Path, *, overwrite: bool) -> dict[str, Any]:
    databases = [TextDB(path) for path in sources]
    names = {database.tokenizer_name for database in databases}
    ranges = {database.meta.get("v_range") and tuple(database.meta["v_range"]) for database in databases}
    if len(names) != 1 or len(ranges) != 1:
        raise SettingsDiffer(f"the databases were made with different tokenizers ({', '.join(sorted(map(str, names)))})")

    def each_once() -> Iterator[_Text]:
        for number, database in enumerate(databases):
            for example in database.ids:
                earlier = next((before for before in range(number) if example in databases[before]), None)
                if earlier is None:
                    yield example, database.raw_record(example)
                elif databases[earlier][example] != database[example]:
                    raise BadInput(
                        f"text {example!r} is in {sources[earlier]} and in {sources[number]} and differs; give the texts other ids"
                    )

    kept = _write_texts(out, each_once(), sources, made_by="uniter-db merge", overwrite=overwrite)
    return {"out": str(out), "kind": "text", "sources": len(sources), "texts": kept}


def _folders_of(source: Path) -> list[Path]:
    """The databases that a path stands for: itself, or what a folder of databases holds."""
    if database_kind(source) != "folder of regions" or kind_of(source) == "split":
        return [source]
    return sorted(child for child in source.iterdir() if kind_of_child(child))


# ------------------------------------------------------------------------------------------------------------------ splitting


def split(source: Path, out: Path, *, by: str, overwrite: bool = False) -> dict[str, Any]:
    """Take a database apart into databases below `out`, which together read as the whole.

    Args:
        by: a number of equal parts (`out/part-0` …), or a file: one key a line (`out/listed`, `out/rest`), or a key and, after
            a tab, the name of its part. Texts go by their id, or by the image they are about.

    Raises:
        BadInput: the list is empty, or names nothing that is there.
    """
    text = database_kind(source).endswith("text")
    if text:
        texts = TextDB(source)
        parts = _parts(texts.ids, by, lambda row: _as_tuple(texts.image_key(row)))
    else:
        images = ImageDB(source)
        parts = _parts(images.keys_list, by, lambda row: ())
        header: dict[str, Any] = {"feature_width": images.feature_width, "label_classes": images.label_classes}
        header |= _shared_header(images.headers, [source] * len(images.headers))
        box_ids = _box_ids_of(_folders_of(source))
    for name, chosen in parts.items():
        if text:
            records = ((key, texts.raw_record(key)) for key in chosen)
            _write_texts(out / name, records, [source], made_by="uniter-db split", part=f"{name} of {len(parts)}", overwrite=overwrite)
        else:
            settings = {"made_by": "uniter-db split", "source": source.name, "part": name, "images": len(chosen)}
            _write_regions(
                out / name, _records_of(images, chosen), settings=settings, header=lambda: header, box_ids=box_ids, overwrite=overwrite
            )
    told = {name: len(chosen) for name, chosen in parts.items()}
    return {"out": str(out), "kind": "text" if text else "regions", "parts": told}


def _as_tuple(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value


def _parts(keys: Sequence[str], by: str, alias: Callable[[int], tuple[str, ...]]) -> dict[str, list[str]]:
    if by.isascii() and by.isdigit() and len(by) <= 18:
        count = int(by)
        if not 1 <= count <= len(keys):
            raise BadInput(f"--by {count}: expected a number of parts from 1 to {len(keys):,}, the number of records")
        bounds = np.linspace(0, len(keys), count + 1).round().astype(int)
        width = len(str(count - 1))
        return {f"part-{part:0{width}d}": list(keys[int(bounds[part]) : int(bounds[part + 1])]) for part in range(count)}
    path = Path(by)
    if not path.is_file():
        raise BadInput(f"--by {by}: expected a number of parts or a file that lists keys")
    part_of: dict[str, str] = {}
    for line in lines_of(path):
        key, _, part = line.partition("\t")
        if key.strip():
            part_of[key.strip()] = part.strip() or "listed"
    for part in set(part_of.values()):
        if part in (".", "..") or any(character in part for character in "/\\\0") or len(part.encode(errors="replace")) > 200:
            raise BadInput(f"--by {by}: {shown(part)} is no name of a part")
    parts: dict[str, list[str]] = {}
    found = 0
    for row, key in enumerate(keys):
        names = (key, key.removesuffix(".npz"), *alias(row))
        part = next((part_of[name] for name in names if name in part_of), "")
        found += bool(part)
        parts.setdefault(part or "rest", []).append(key)
    if not found:
        raise BadInput(
            f"none of the {len(part_of):,} keys of {by} is in the database; its keys look like {keys[0]!r}"
            if len(keys)
            else "the database is empty; there is nothing to split"
        )
    return parts


# --------------------------------------------------------------------------------------------------------------------- repair


def repair(source: Path, out: Path, report: CheckReport, *, overwrite: bool = False) -> dict[str, Any]:
    """Check `source` into `report` and write what is good of it to `out`, a complete database of ours (texts: UNITER's layout).

    Raises:
        BadInput: nothing good is left.
    """
    if out.resolve() == source.resolve():
        raise BadInput(f"--repair {out}: expected another folder than the damaged one")
    begun = (out / "settings.json").exists()
    if not overwrite and ((out / "header.json").exists() or (begun and _stated(out).get("made_by") != _REPAIR)):
        raise BadInput(f"--repair {out}: a database is there already; choose another folder, or --overwrite")
    if begun:
        overwrite = True  # killed before: looked through anew, the source may have changed
    if database_kind(source).endswith("text"):
        if not (source / "data.mdb").exists():
            raise BadInput(f"{source} holds no data.mdb; there is nothing to repair")
        good = ((key, value) for key, value, _ in examine_text(source, report))
        try:
            texts = _write_texts(out, good, [source], made_by=_REPAIR, overwrite=overwrite)
        except BadInput:
            if report.good:
                raise
            raise BadInput(f"{source} holds not one good text; there is nothing to repair") from None
        return {"out": str(out), "texts": texts}
    folders = _folders_of(source)
    header: dict[str, Any] = {}
    failed: list[dict[str, Any]] = []
    for folder in folders:
        try:
            stated = read_json(folder / "header.json")
            header = _provenance(stated) if isinstance(stated, dict) else header
            failed += read_failures(folder / "failures.jsonl")
        except (UniterError, FileNotFoundError):
            continue
    box_ids: dict[str, list[Any]] = {}
    for folder in folders:
        try:
            box_ids = {**read_box_ids(folder), **box_ids}
        except BadInput as error:
            report.notes.append(f"{error}; left out")
    widths: dict[str, int] = {}

    def good_records() -> Iterator[Record]:
        for folder in folders:
            published = database_kind(folder) == "published regions"
            for key, value, regions in examine_regions(folder, report):
                widths.setdefault("feature_width", regions.features.shape[1])
                widths.setdefault("label_classes", 0 if regions.soft_labels is None else regions.soft_labels.shape[1])
                yield key, encode_record(regions, key=key) if published else value, len(regions)

    settings = {"made_by": _REPAIR, "source": source.name}
    header["repaired_from"] = source.name
    images = _write_regions(
        out, good_records(), settings=settings, header=lambda: {**header, **widths}, failures=failed, box_ids=box_ids,
        overwrite=overwrite,
    )  # fmt: skip
    return {"out": str(out), "images": images}


# ---------------------------------------------------------------------------------------------------------- texts: write some


_Text = tuple[str, bytes]
"""A text on its way: id, record as stored."""


def _write_texts(
    out: Path, texts: Iterable[_Text], sources: Sequence[Path], *, made_by: str, part: str | None = None, overwrite: bool
) -> int:
    """Write a text database of the same kind as its sources: ours again, with index and header, or in UNITER's layout.

    Returns:
        How many texts it holds.
    """
    if not all((source / "settings.json").exists() and (source / "vocab.txt").exists() for source in sources):
        return _write_published_texts(out, texts, sources, overwrite=overwrite)
    stated = [_stated(source) for source in sources]
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
        images=lambda key: (key, "exact"),
        lengths=None if task is None else task.lengths,
        meta={name: value for name, value in _stated(sources[0], "meta.json").items() if name in ("task", "annotations")}
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


def _stated(source: Path, name: str = "settings.json") -> dict[str, Any]:
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


def _write_published_texts(out: Path, texts: Iterable[_Text], sources: Sequence[Path], *, overwrite: bool) -> int:
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
    write_json(temporary / "meta.json", next((meta for source in sources if (meta := _stated(source, "meta.json"))), {}))
    if out.exists():
        out.rename(old)  # not removed in place: half of it could still open
    temporary.rename(out)
    sync_folder(out.parent)
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
