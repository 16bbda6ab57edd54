"""`uniter-db check --repair`: what is good is written anew."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from uniter.datasets.errors import BadInput, SettingsDiffer, UniterError
from uniter.datasets.image_db.records import encode_record
from uniter.datasets.image_db.writing.noted_photographs import NotedPhotographs
from uniter.datasets.image_db.writing.side_files import read_box_ids, read_failures
from uniter.datasets.maintenance.check_regions import examine_regions
from uniter.datasets.maintenance.check_report import CheckReport
from uniter.datasets.maintenance.check_texts import examine_text
from uniter.datasets.maintenance.copying import Record, folders_of, refuse_overlap, shared_header, write_regions, write_texts
from uniter.datasets.maintenance.kinds import database_kind
from uniter.datasets.progress import Progress
from uniter.datasets.storage.files import read_json
from uniter.datasets.storage.index_file import INDEX

_REPAIR: Final = "uniter-db check --repair"


def repair(source: Path, out: Path, report: CheckReport, *, overwrite: bool = False) -> dict[str, Any]:
    """Check `source` into `report` and write what is good of it to `out`, a complete database of ours (texts: UNITER's layout).

    Raises:
        SettingsDiffer: the databases in a folder are of different detectors or widths, or `out` was repaired from another source.
        BadInput: nothing good is left, or `out` holds something else.
    """
    refuse_overlap(out, [source])
    if database_kind(source).endswith("text"):
        if not (source / "data.mdb").exists():
            raise BadInput(f"{source} holds no data.mdb; there is nothing to repair")
        good = ((key, value) for key, value, _ in examine_text(source, report))
        try:
            texts, complete = write_texts(out, good, [source], made_by=_REPAIR, overwrite=overwrite)
        except BadInput:
            if report.good or not report.records:
                raise
            raise BadInput(f"{source} holds not one good text; there is nothing to repair") from None
        if complete:  # the report is of the source all the same
            for _ in examine_text(source, report):
                pass
        return {"out": str(out), "texts": texts, "already_complete": complete}
    folders = folders_of(source)
    header, failed, box_ids = _side_files(folders, report)
    photographs = _photographs(folders, report)
    records = _GoodRecords(folders, report)
    written = write_regions(
        out,
        iter(records),
        settings={"made_by": _REPAIR, "source": source.name},
        sources=_contents(folders),
        header=lambda: {**header, **records.widths, "repaired_from": source.name},
        failures=failed,
        box_ids=box_ids,
        photographs=photographs.of,
        overwrite=overwrite,
    )
    if written.already_complete:
        for _ in records:
            pass
    return {"out": str(out), "images": written.images, "already_complete": written.already_complete}


def _contents(folders: Sequence[Path]) -> dict[str, Path]:
    """What is looked at, as it lies there: an index says nothing of records that are damaged."""
    sources: dict[str, Path] = {}
    for number, folder in enumerate(folders, start=1):
        names = [name for name in ("data.mdb", INDEX) if (folder / name).is_file()]
        unfinished = (folder / "units").is_dir()
        sources |= {f"source {number}": folder} if unfinished else {f"source {number}, {name}": folder / name for name in names}
    return sources


def _side_files(folders: Sequence[Path], report: CheckReport) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, list[Any]]]:
    """Header, failures and ids of given boxes, as far as they can be read."""
    headers, failed = [], []
    box_ids: dict[str, list[Any]] = {}
    for folder in folders:
        try:
            stated = read_json(folder / "header.json")
            headers.append(stated if isinstance(stated, dict) else None)
            failed += read_failures(folder / "failures.jsonl")
        except (UniterError, FileNotFoundError):
            headers += [None] * (len(headers) < folders.index(folder) + 1)
        try:
            box_ids = {**read_box_ids(folder), **box_ids}
        except BadInput as error:
            report.notes.append(f"{error}; left out")
    header = shared_header(headers, folders)
    header.pop("repaired_from", None)
    return header, failed, box_ids


def _photographs(folders: Sequence[Path], report: CheckReport) -> NotedPhotographs:
    """What is known of the photographs, as far as it can be read."""
    readable = []
    for folder in folders:
        try:
            NotedPhotographs([folder])
            readable.append(folder)
        except BadInput as error:
            report.notes.append(f"{error}; what its photographs were is left out")
    return NotedPhotographs(readable)


class _GoodRecords:
    """The good records of databases that are to be one.

    Attributes:
        widths: what the header says of them; known once the first has gone by.
    """

    def __init__(self, folders: Sequence[Path], report: CheckReport) -> None:
        self._folders, self._report = folders, report
        self.widths: dict[str, int] = {}

    def __iter__(self) -> Iterator[Record]:
        with Progress(None, unit="records", label="repairing") as progress:
            for record in self._good():
                yield record
                progress.update()

    def _good(self) -> Iterator[Record]:
        first = self._folders[0] if self._folders else Path()
        for folder in self._folders:
            published = database_kind(folder) == "published regions"
            for key, value, regions in examine_regions(folder, self._report):
                labels = 0 if regions.soft_labels is None else regions.soft_labels.shape[1]
                widths = {"feature_width": regions.features.shape[1], "label_classes": labels}
                if not self.widths:
                    self.widths, first = widths, folder
                if widths != self.widths:
                    mine, other = (", ".join(f"{name} {width}" for name, width in one.items()) for one in (widths, self.widths))
                    raise SettingsDiffer(f"{folder} has {mine}; {first} {other}: they cannot be one database; repair them one by one")
                yield key, encode_record(regions, key=key) if published else value, len(regions)
