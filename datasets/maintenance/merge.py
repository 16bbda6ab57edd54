"""`uniter-db merge`: several databases of one making become one."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from uniter.datasets.errors import BadInput, SettingsDiffer
from uniter.datasets.image_db import ImageDB
from uniter.datasets.image_db.records import encode_record
from uniter.datasets.image_db.writing.noted_photographs import NotedPhotographs
from uniter.datasets.image_db.writing.side_files import read_failures
from uniter.datasets.maintenance.copying import (
    Record,
    box_ids_of,
    folders_of,
    records_of,
    refuse_overlap,
    shared_header,
    write_regions,
    write_texts,
)
from uniter.datasets.maintenance.kinds import database_kind
from uniter.datasets.maintenance.published_texts import Text, stated_settings
from uniter.datasets.storage.claims import source_names
from uniter.datasets.text_db import TextDB

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
    if kinds == {True}:
        return _merge_texts(sources, out, overwrite=overwrite)
    folders = [folder for source in sources for folder in folders_of(source)]
    refuse_overlap(out, [*folders, *sources])
    databases = [ImageDB(folder) for folder in folders]
    header = {**_shared_widths(databases, folders), **shared_header([database.header for database in databases], folders)}
    doubled = 0

    def all_records() -> Iterator[Record]:
        nonlocal doubled
        for number, database in enumerate(databases):
            for record in records_of(database, database.keys_list):
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
    written = write_regions(
        out,
        all_records(),
        settings=settings,
        sources=source_names(folders),
        header=lambda: header,
        failures=failed,
        box_ids=box_ids_of(folders),
        photographs=NotedPhotographs(folders).of,
        overwrite=overwrite,
    )
    told = {"out": str(out), "kind": "regions", "sources": len(sources), "images": written.images, "equal_records_dropped": doubled}
    return {**told, "already_complete": written.already_complete}


def _shared_widths(databases: Sequence[ImageDB], folders: Sequence[Path]) -> dict[str, int]:
    """The widths of all that hold anything; SettingsDiffer if there are several."""
    first = next((database for database in databases if len(database)), databases[0])
    for folder, database in zip(folders, databases, strict=True):
        widths = (database.feature_width, database.label_classes)
        if len(database) and widths != (first.feature_width, first.label_classes):
            mine = f"{folder} has features and labels {widths[0]} and {widths[1]} wide"
            raise SettingsDiffer(f"{mine}, {folders[0]} {first.feature_width} and {first.label_classes}: they cannot be one database")
    return {"feature_width": first.feature_width, "label_classes": first.label_classes}


def _merge_texts(sources: Sequence[Path], out: Path, *, overwrite: bool) -> dict[str, Any]:
    databases = [TextDB(path) for path in sources]
    _refuse_other_tokenizers(databases, sources)

    def each_once() -> Iterator[Text]:
        for number, database in enumerate(databases):
            for example in database.ids:
                earlier = next((before for before in range(number) if example in databases[before]), None)
                if earlier is None:
                    yield example, database.raw_record(example)
                elif databases[earlier][example] != database[example]:
                    raise BadInput(
                        f"text {example!r} is in {sources[earlier]} and in {sources[number]} and differs; give the texts other ids"
                    )

    kept, complete = write_texts(out, each_once(), sources, made_by="uniter-db merge", overwrite=overwrite)
    return {"out": str(out), "kind": "text", "sources": len(sources), "texts": kept, "already_complete": complete}


def _refuse_other_tokenizers(databases: Sequence[TextDB], sources: Sequence[Path]) -> None:
    """SettingsDiffer if the same number means other word pieces: by the vocabulary's contents or, where those are unknown, by name."""
    stated = [stated_settings(source).get("tokenizer") for source in sources]
    contents = [(one.get("sha256"), one.get("lowercase")) if isinstance(one, dict) else (None, None) for one in stated]
    if all(sha256 is not None for sha256, _ in contents):
        different = len(set(contents)) > 1
    else:
        ranges = {database.meta.get("v_range") and tuple(database.meta["v_range"]) for database in databases}
        different = len({database.tokenizer_name for database in databases}) > 1 or len(ranges) > 1
    if different:
        names = ", ".join(sorted({str(database.tokenizer_name) for database in databases}))
        raise SettingsDiffer(f"the databases were made with different tokenizers or vocabularies ({names}): build their texts with one")
