"""`uniter-db check --repair`: what is good is written anew."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from uniter.datasets.errors import BadInput, UniterError
from uniter.datasets.image_db.records import encode_record
from uniter.datasets.image_db.writing.side_files import read_box_ids, read_failures
from uniter.datasets.maintenance.check_regions import examine_regions
from uniter.datasets.maintenance.check_report import CheckReport
from uniter.datasets.maintenance.check_texts import examine_text
from uniter.datasets.maintenance.copying import Record, folders_of, provenance, stated_settings, write_regions, write_texts
from uniter.datasets.maintenance.kinds import database_kind
from uniter.datasets.storage.files import read_json

_REPAIR: Final = "uniter-db check --repair"


# --------------------------------------------------------------------------------------------------------------------- repair


def repair(source: Path, out: Path, report: CheckReport, *, overwrite: bool = False) -> dict[str, Any]:
    """Check `source` into `report` and write what is good of it to `out`, a complete database of ours (texts: UNITER's layout).

    Raises:
        BadInput: nothing good is left.
    """
    if out.resolve() == source.resolve():
        raise BadInput(f"--repair {out}: expected another folder than the damaged one")
    begun = (out / "settings.json").exists()
    if not overwrite and ((out / "header.json").exists() or (begun and stated_settings(out).get("made_by") != _REPAIR)):
        raise BadInput(f"--repair {out}: a database is there already; choose another folder, or --overwrite")
    if begun:
        overwrite = True  # killed before: looked through anew, the source may have changed
    if database_kind(source).endswith("text"):
        if not (source / "data.mdb").exists():
            raise BadInput(f"{source} holds no data.mdb; there is nothing to repair")
        good = ((key, value) for key, value, _ in examine_text(source, report))
        try:
            texts = write_texts(out, good, [source], made_by=_REPAIR, overwrite=overwrite)
        except BadInput:
            if report.good:
                raise
            raise BadInput(f"{source} holds not one good text; there is nothing to repair") from None
        return {"out": str(out), "texts": texts}
    folders = folders_of(source)
    header: dict[str, Any] = {}
    failed: list[dict[str, Any]] = []
    for folder in folders:
        try:
            stated = read_json(folder / "header.json")
            header = provenance(stated) if isinstance(stated, dict) else header
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
    images = write_regions(
        out, good_records(), settings=settings, header=lambda: {**header, **widths}, failures=failed, box_ids=box_ids,
        overwrite=overwrite,
    )  # fmt: skip
    return {"out": str(out), "images": images}
