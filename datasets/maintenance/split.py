"""`uniter-db split`: one database becomes several."""

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from uniter.datasets.errors import BadInput, SettingsDiffer, UniterError, WrongUsage, shown
from uniter.datasets.image_db import ImageDB
from uniter.datasets.image_db.database import kind_of_child
from uniter.datasets.image_db.parts import MAKING, PARTS, SWAPPING, parts_under_way
from uniter.datasets.image_db.writing.noted_photographs import NotedPhotographs
from uniter.datasets.image_db.writing.side_files import read_failures
from uniter.datasets.image_db.writing.units import REGIONS
from uniter.datasets.maintenance.copying import (
    are_our_texts,
    box_ids_of,
    folders_of,
    records_of,
    refuse_overlap,
    shared_header,
    write_regions,
    write_texts,
)
from uniter.datasets.maintenance.kinds import database_kind
from uniter.datasets.storage.claims import (
    NOTE,
    SETTINGS,
    Maker,
    aside_of,
    may_replace,
    plain,
    put_in_place,
    refuse_foreign,
    refuse_source_inside,
    source_names,
    standing_for,
)
from uniter.datasets.storage.files import read_json_object, remove, write_json
from uniter.datasets.storage.streams import lines_of
from uniter.datasets.text_db import TextDB
from uniter.datasets.text_db.building.folder import TEXTS

# ------------------------------------------------------------------------------------------------------------------ splitting


def split(source: Path, out: Path, *, by: str, overwrite: bool = False) -> dict[str, Any]:
    """Take a database apart into databases below `out`, which together read as the whole.

    Args:
        by: a number of equal parts (`out/part-0` …), or a file: one key a line (`out/listed`, `out/rest`), or a key and, after
            a tab, the name of its part. Texts go by their id, or by the image they are about.

    Raises:
        BadInput: the list is empty, or names nothing that is there.
    """
    lists = {"list": Path(by)} if Path(by).is_file() and not _is_number(by) else {}
    if database_kind(source).endswith("text"):
        refuse_overlap(out, [source])
        texts = TextDB(source)
        parts = _parts(texts.ids, by, lambda row: _as_tuple(texts.image_key(row)))
        _refuse_other_parts(out, parts)

        def write_part_of_texts(place: Path, name: str, overwrite: bool) -> bool:
            records = ((key, texts.raw_record(key)) for key in parts[name])
            part = f"{name} of {len(parts)}"
            return write_texts(place, records, [source], made_by=_SPLIT, part=part, lists=lists, overwrite=overwrite)[1]

        maker = TEXTS if are_our_texts([source]) else PUBLISHED_TEXTS
        return _told(out, "text", parts, _write_together(out, parts, maker, write_part_of_texts, lists, overwrite=overwrite))
    folders = folders_of(source)
    refuse_overlap(out, [source, *folders])
    images = ImageDB(source)
    parts = _parts(images.keys_list, by, lambda row: ())
    _refuse_other_parts(out, parts)
    header: dict[str, Any] = {"feature_width": images.feature_width, "label_classes": images.label_classes}
    header |= shared_header(images.headers, [source] * len(images.headers))
    box_ids, photographs = box_ids_of(folders), NotedPhotographs(folders)
    failures = _parts_of_failures([row for folder in folders for row in read_failures(folder / "failures.jsonl")], by, parts)

    def write_part(place: Path, name: str, overwrite: bool) -> bool:
        return write_regions(
            place,
            records_of(images, parts[name]),
            settings={"made_by": _SPLIT, "source": source.name, "part": name, "images": len(parts[name])},
            sources={**source_names(folders), **lists},
            header=lambda: header,
            failures=failures.get(name, ()),
            box_ids=box_ids,
            photographs=photographs.of,
            overwrite=overwrite,
        ).already_complete

    return _told(out, "regions", parts, _write_together(out, parts, REGIONS, write_part, lists, overwrite=overwrite))


def _told(out: Path, kind: str, parts: Mapping[str, Sequence[str]], complete: bool) -> dict[str, Any]:
    sizes = {name: len(chosen) for name, chosen in parts.items()}
    return {"out": str(out), "kind": kind, "parts": sizes, "already_complete": complete}


# ------------------------------------------------------------------------------------------------ all parts, or those that were there


PUBLISHED_TEXTS: Final = Maker("published text", NOTE, TEXTS.writes)
_MAKERS: Final = {maker.kind: maker for maker in (REGIONS, TEXTS, PUBLISHED_TEXTS)}

WritePart = Callable[[Path, str, bool], bool]
"""Writes a part (place, name, overwrite); whether it was there already, made from the same."""


def _write_together(out: Path, parts: Iterable[str], maker: Maker, write: WritePart, lists: Mapping[str, Path], *, overwrite: bool) -> bool:
    """Write all parts; those that are replaced are so together, once all others are whole beside them.

    What a reader would get wrong: while the parts in `out` do not fit together, it says so (`image_db.parts`): readers refuse it, and the
    next call puts it right before all else.

    Returns:
        Whether all were there already.
    """
    out, names = plain(out), list(parts)
    for name in names:
        if (out / name).is_symlink():  # a swap would rename the link, which is not ours
            raise BadInput(f"{out / name} is a link, and a part is written as a folder; remove the link, or choose another OUT")
    swapped = _swap_on(out)
    for name, source in ((name, source) for name in names for source in lists.values()):
        refuse_source_inside(out / name, source)
    if overwrite and swapped:  # killed with everything done, if it was this command
        with contextlib.suppress(SettingsDiffer):
            return _write_each(out, names, maker, write)
    if not overwrite or not any((out / name).exists() for name in names):
        return _write_each(out, names, maker, write)
    for name in names:
        _refuse_foreign(out / name, maker)
    aside = aside_of(out)
    for left in sorted(aside.iterdir()) if aside.is_dir() else ():  # of another splitting, which was killed
        if standing_for(left.name) not in names:
            _take_away(left)
    for name in names:
        try:
            write(aside / name, name, False)
        except SettingsDiffer:  # of an earlier attempt, with other contents
            write(aside / name, name, True)
    write_json(out / PARTS, {SWAPPING: names, "kind": maker.kind})
    _swap_on(out)
    return False


def _write_each(out: Path, names: Sequence[str], maker: Maker, write: WritePart) -> bool:
    """Write parts where they belong; until all are whole, `out` says that they are not."""
    missing = [name for name in names if not (out / name / maker.complete).is_file()]
    known = (out / PARTS).exists()
    if missing and not known:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / PARTS, {MAKING: names, "kind": maker.kind})
    try:
        there = [write(out / name, name, False) for name in names]
    except UniterError:
        if not known and not any((out / name).exists() for name in missing):  # nothing came of it
            (out / PARTS).unlink(missing_ok=True)
        raise
    (out / PARTS).unlink(missing_ok=True)
    return all(there)


def _swap_on(out: Path) -> bool:
    """Put parts that are whole in their places, as `out` says that it was begun; whether it was."""
    if parts_under_way(out) != SWAPPING:
        return False
    stated = read_json_object(out / PARTS)
    aside, maker = aside_of(out), _MAKERS[stated["kind"]]
    for name in stated[SWAPPING]:
        if name == Path(name).name:
            put_in_place(out / name, aside / name, maker)
    (out / PARTS).unlink()
    with contextlib.suppress(OSError):  # it holds what is not ours
        aside.rmdir()
    return True


def _refuse_foreign(folder: Path, maker: Maker) -> None:
    if maker is PUBLISHED_TEXTS:
        may_replace(folder, {}, sources={}, overwrite=True)
    else:
        refuse_foreign(folder, maker)


def _take_away(folder: Path) -> None:
    """Remove a part that was begun beside `out`, if it is one."""
    with contextlib.suppress(UniterError):
        if str(read_json_object(folder / (SETTINGS if (folder / SETTINGS).is_file() else NOTE)).get("made_by")) == _SPLIT:
            remove(folder)


_SPLIT: Final = "uniter-db split"


def _refuse_other_parts(out: Path, parts: Mapping[str, Any]) -> None:
    """BadInput if there are databases in `out` that are no parts of this splitting: together they would not be the whole."""
    there = [standing_for(child.name) for child in out.iterdir() if kind_of_child(child)] if out.is_dir() else []
    others = sorted(name for name in there if name not in parts)
    if others:
        raise BadInput(
            f"{out} holds the databases {', '.join(others[:4])}, which are no parts of this splitting: all in it are read as one; "
            "choose another OUT, or remove them"
        )


def _parts_of_failures(rows: Sequence[Mapping[str, Any]], by: str, parts: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """Part -> the failures that go with it: as the list says; else with the rest, or with the first part."""
    listed = {} if _is_number(by) else _listed(Path(by))
    together: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        part = next((listed[name] for name in (row["key"], str(row["key"]).removesuffix(".npz")) if name in listed), "rest")
        together.setdefault(part if part in parts else next(iter(parts)), []).append(row)
    return together


def _is_number(by: str) -> bool:
    return by.isascii() and by.isdigit() and len(by) <= 18


def _as_tuple(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value


def _parts(keys: Sequence[str], by: str, alias: Callable[[int], tuple[str, ...]]) -> dict[str, list[str]]:
    if _is_number(by):
        count = int(by)
        if not 1 <= count <= len(keys):
            raise WrongUsage(f"--by {count}: expected a number of parts from 1 to {len(keys):,}, the number of records")
        bounds = np.linspace(0, len(keys), count + 1).round().astype(int)
        width = len(str(count - 1))
        return {f"part-{part:0{width}d}": list(keys[int(bounds[part]) : int(bounds[part + 1])]) for part in range(count)}
    part_of = _listed(Path(by))
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


def _listed(path: Path) -> dict[str, str]:
    """Key -> part, from a list; "listed" where no part is named."""
    if not path.is_file():
        raise WrongUsage(f"--by {path}: expected a number of parts or a file that lists keys")
    part_of: dict[str, str] = {}
    for line in lines_of(path):
        key, _, part = line.partition("\t")
        if key.strip():
            part_of[key.strip()] = part.strip() or "listed"
    for part in set(part_of.values()):
        if part in (".", "..") or any(character in part for character in "/\\\0") or len(part.encode(errors="replace")) > 200:
            raise BadInput(f"--by {path}: {shown(part)} is no name of a part")
    return part_of
