"""What a check found, and how it is told."""

import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from uniter.datasets.errors import BadInput, UniterError
from uniter.datasets.storage.index_file import INDEX
from uniter.datasets.storage.lmdb_pages import Fault, PageFile, Place, check_data_file

SHOWN: Final = 20


@dataclass
class CheckReport:
    """What `check` found.

    Attributes:
        path, kind: "regions", "published regions", "unfinished regions", "text" or "published text".
        records, good: how many were found, and how many of them are good.
        problems: kind of problem -> how often. Any problem fails the check.
        examples: the first of them as sentences.
        notes: what is unusual but does no harm.
    """

    path: str
    kind: str = ""
    records: int = 0
    good: int = 0
    problems: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def problem(self, kind: str, sentence: str) -> None:
        """Count a problem; the first ones are kept as sentences."""
        self.problems[kind] += 1
        if len(self.examples) < SHOWN:
            self.examples.append(sentence)

    def note_once(self, sentence: str) -> None:
        """A note that many records may give rise to."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "path": self.path,
            "kind": self.kind,
            "records": self.records,
            "good": self.good,
            "problems": dict(self.problems),
            "examples": self.examples,
            "notes": self.notes,
        }


# -------------------------------------------------------------------------------------------------------------------- structure


def records_of(
    path: Path, report: CheckReport, table: bytes | None = None, place_of: Callable[[bytes], int | None] = lambda key: None
) -> Iterator[tuple[bytes, bytes]]:
    """Every record that the pages still yield, its key and bytes; faults go into the report.

    Args:
        place_of: where the index says that the value of a key begins; a reader goes by it.
    """
    data = path / "data.mdb"
    whole = True
    try:
        check_data_file(data)
    except BadInput as error:
        report.problem("file", str(error))
        whole = False
    try:
        pages = PageFile(data, whole=whole)
    except (UniterError, OSError) as error:
        if whole:
            report.problem("file", f"{data} cannot be read ({error})")
        return
    with pages:
        found = 0
        for item in pages.records(table):
            if isinstance(item, Fault):
                report.problem("pages", f"{data}: {item.words}")
                continue
            value = pages.value(item)
            if value is None:
                report.problem("pages", f"{data}: the value of key {shown_first(item.key)} lies beyond the end of the file")
                continue
            found += 1
            if place_of(item.key) not in (None, item.offset):
                report.problem("index", f"{path / INDEX}: {shown_first(item.key)} lies elsewhere in data.mdb than the index says")
            yield item.key, value
        if table is None and whole and found < pages.entries:
            report.problem("pages", f"{data}: its header counts {pages.entries:,} records but {found:,} can be reached")


def salvaged(path: Path, checksums: Mapping[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Records that no longer hang on the tree but whose checksum confirms them."""
    try:
        pages = PageFile(path / "data.mdb", whole=False)
    except (UniterError, OSError):
        return
    with pages:
        wanted = dict(checksums)
        for place in pages.stray_leaves():
            checksum = wanted.get(place.key)
            if checksum is None:
                continue
            value = pages.value(Place(place.key, place.offset, place.size))
            if value is not None and zlib.crc32(value) == checksum:
                del wanted[place.key]
                yield place.key, value


def shown_first(key: bytes) -> str:
    """A key as a report shows it: 80 bytes at most, whatever they are."""
    return repr(key[:80].decode(errors="replace"))
