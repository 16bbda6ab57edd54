"""What goes through a whole database holds a record at a time: five times as many records take no more memory."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from uniter.datasets.image_db import ImageDB, published
from uniter.datasets.image_db.records import encode_record
from uniter.datasets.image_db.regions import RegionFeatures
from uniter.datasets.image_db.writing.units import UnitStore
from uniter.datasets.maintenance.check import check_database
from uniter.datasets.maintenance.convert import convert
from uniter.datasets.view.region_report import write_region_report

FEW, MANY = 8, 40
RECORD_BYTES = 20 * 1024 * 2


def write_database(path: Path, records: int) -> Path:
    dice = np.random.default_rng(0)
    store = UnitStore(path, settings={})
    with store.unit(0) as writer:
        for number in range(records):
            corners = np.sort(dice.random((20, 2, 2), dtype=np.float32), axis=1).reshape(20, 4)
            features = dice.standard_normal((20, 1024)).astype(np.float16)
            norm_bb = np.concatenate([corners, corners[:, 2:] - corners[:, :2]], axis=1)
            record = RegionFeatures(features=features, norm_bb=norm_bb, conf=np.linspace(0.9, 0.3, 20, dtype=np.float32))
            writer.put(f"image{number:04d}", encode_record(record), regions=20)
        writer.complete()
    store.finish(units=1, header={"feature_width": 1024, "label_classes": 0})
    return path


def most_memory(work: Callable[[], object]) -> int:
    """Bytes that Python objects and arrays took at once."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", ["ours", "uniter", "uniter-compressed"])
def test_a_check_holds_no_database(kind: str, tmp_path: Path) -> None:
    taken = {}
    for records in (FEW, MANY):
        path = write_database(tmp_path / f"{records}.lmdb", records)
        if kind != "ours":
            convert(path, tmp_path / f"{records}-published", to=kind)
            path = next((tmp_path / f"{records}-published").glob("feat_*/data.mdb")).parent
        check_database(path)  # what is imported and remembered once
        taken[records] = most_memory(lambda path=path: check_database(path))
    assert taken[MANY] - taken[FEW] < 5 * RECORD_BYTES, taken


def test_a_page_of_all_pictures_holds_no_database(tmp_path: Path) -> None:
    taken = {}
    for records in (FEW, MANY):
        path = write_database(tmp_path / f"{records}.lmdb", records)
        taken[records] = most_memory(lambda path=path: write_region_report([path], tmp_path / f"{path.name}-report", limit=0))
    # A page of a hundred cards is in memory while it fills.
    assert taken[MANY] - taken[FEW] < 0.5 * (MANY - FEW) * RECORD_BYTES, taken


def test_opening_a_compressed_database_without_counts_unpacks_confidences_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(write_database(tmp_path / "ours.lmdb", FEW), tmp_path / "published", to="uniter-compressed")
    for stated in (tmp_path / "published").glob("nbb_*.json"):
        stated.unlink()
    unpacked: list[tuple[str, ...]] = []
    decode = published.decode
    monkeypatch.setattr(
        published, "decode", lambda value, *, fields, rows: (unpacked.append(fields), decode(value, fields=fields, rows=rows))[1]
    )
    database = ImageDB(next((tmp_path / "published").glob("feat_*/data.mdb")).parent)
    assert database.region_counts.tolist() == [20] * FEW == database.region_counts.tolist()
    assert unpacked == [("conf",)] * FEW, "each record once, however often the counts are asked for"
    assert len(database[database.keys_list[3]]) == 20 and len(unpacked) == FEW, "reading asks for no count again"
