"""`uniter-db merge`: several databases of one making become one."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from uniter.datasets.errors import BadInput, SettingsDiffer
from uniter.datasets.image_db import ImageDB
from uniter.datasets.image_db.records import encode_record
from uniter.datasets.image_db.writing.side_files import read_failures
from uniter.datasets.maintenance.copying import (
    Record,
    Text,
    box_ids_of,
    folders_of,
    records_of,
    shared_header,
    write_regions,
    write_texts,
)
from uniter.datasets.maintenance.kinds import database_kind
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
    if any(path.resolve() == out.resolve() for path in sources):
        raise BadInput(f"{out} is both a source and the target; choose another folder")
    if kinds == {True}:
        return _merge_texts(sources, out, overwrite=overwrite)
    folders = [folder for source in sources for folder in folders_of(source)]
    databases = [ImageDB(folder) for folder in folders]
    first = next((database for database in databases if len(database)), databases[0])
    for folder, database in zip(folders, databases, strict=True):
        widths = (database.feature_width, database.label_classes)
        if len(database) and widths != (first.feature_width, first.label_classes):
            mine = f"{folder} has features and labels {widths[0]} and {widths[1]} wide"
            raise SettingsDiffer(f"{mine}, {folders[0]} {first.feature_width} and {first.label_classes}: they cannot be one database")
    header = {"feature_width": first.feature_width, "label_classes": first.label_classes}
    header |= shared_header([database.header for database in databases], folders)
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
    images = write_regions(
        out, all_records(), settings=settings, header=lambda: header, failures=failed, box_ids=box_ids_of(folders), overwrite=overwrite
    )
    return {"out": str(out), "kind": "regions", "sources": len(sources), "images": images, "equal_records_dropped": doubled}


def _merge_texts(sources: Sequence[Path], out: Path, *, overwrite: bool) -> dict[str, Any]:
    databases = [TextDB(path) for path in sources]
    names = {database.tokenizer_name for database in databases}
    ranges = {database.meta.get("v_range") and tuple(database.meta["v_range"]) for database in databases}
    if len(names) != 1 or len(ranges) != 1:
        raise SettingsDiffer(f"the databases were made with different tokenizers ({', '.join(sorted(map(str, names)))})")

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

    kept = write_texts(out, each_once(), sources, made_by="uniter-db merge", overwrite=overwrite)
    return {"out": str(out), "kind": "text", "sources": len(sources), "texts": kept}
