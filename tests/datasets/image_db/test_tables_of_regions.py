"""Regions and texts in parquet, which `datasets.load_dataset` opens, and in plain `.npy` files."""

import json
import os
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from uniter.datasets.errors import BadInput
from uniter.datasets.image_db import ImageDB
from uniter.datasets.image_db.formats import npy, parquet
from uniter.datasets.image_db.formats.table import read_items, recognise
from uniter.datasets.image_db.regions import RegionFeatures
from uniter.datasets.maintenance.convert import convert
from uniter.datasets.maintenance.convert_texts import convert_texts
from uniter.datasets.text_db import TextDB
from uniter.datasets.text_db.captions.table import CAPTIONS, detect


@pytest.fixture
def world(made_up: ModuleType, tmp_path: Path) -> tuple[Path, Path]:
    texts, images = made_up.World().write(tmp_path, pictures=40)
    return texts, images


def test_a_table_of_regions_holds_all_of_a_record(world: tuple[Path, Path], tmp_path: Path) -> None:
    _, images = world
    convert(images, tmp_path / "r.parquet", to="parquet")
    convert(tmp_path / "r.parquet", tmp_path / "back.lmdb")
    mine, wanted = ImageDB(tmp_path / "back.lmdb"), ImageDB(images)
    assert list(mine.keys_list) == list(wanted.keys_list)
    for key in wanted:
        assert mine.raw_record(key) == wanted.raw_record(key)


def test_ids_of_classes_and_what_is_unknown_go_along(tmp_path: Path) -> None:
    one = RegionFeatures(
        features=np.float16([[1, 2], [3, 4]]), norm_bb=np.float16([[0, 0, 1, 1, 1, 1]] * 2), conf=np.float32([0.5, 0.25]),
        object_ids=np.array([3, 1]), object_conf=np.float32([0.5, 0.25]), attribute_ids=np.array([-1, 2]),
        attribute_conf=np.float32([0, 1]),
    )  # fmt: skip
    bare = replace(one, object_ids=None, object_conf=None, attribute_ids=None, attribute_conf=None, size=(4, 5))
    parquet.write(tmp_path / "t.parquet", [("a", one), ("b", bare), ("empty", bare.rows(slice(0)))])
    found = dict(read_items(tmp_path / "t.parquet"))
    assert isinstance(found["a"], RegionFeatures) and found["a"].attribute_ids is not None
    assert found["a"].attribute_ids.tolist() == [-1, 2] and found["a"].size is None and found["a"].boxes is None
    assert isinstance(found["b"], RegionFeatures) and found["b"].object_ids is None and found["b"].size == (4, 5)
    assert isinstance(found["empty"], RegionFeatures) and len(found["empty"]) == 0
    skipped: list[str] = []
    wider = replace(one, features=np.ones((2, 3)))
    huge = replace(one, features=np.full((2, 2), 1e6))
    items = [("a", one), ("w", wider), ("h", huge)]
    parquet.write(tmp_path / "u.parquet", items, skip=lambda key, _, error: skipped.append(f"{key}: {error}"))
    assert len(skipped) == 2 and "the first image's (2, 0, 0)" in skipped[0] and "too large for float16" in skipped[1]


def test_tables_that_others_wrote_anew_are_read_and_broken_ones_said(world: tuple[Path, Path], tmp_path: Path) -> None:
    convert(world[1], tmp_path / "r.parquet", to="parquet")
    table = pq.read_table(tmp_path / "r.parquet")
    plain = pa.Table.from_pylist(table.to_pylist())  # lists of lists of double
    pq.write_table(plain, tmp_path / "plain.parquet")
    wanted = dict(read_items(tmp_path / "r.parquet"))
    for key, regions in read_items(tmp_path / "plain.parquet"):
        first = wanted[key]
        assert isinstance(regions, RegionFeatures) and isinstance(first, RegionFeatures)
        np.testing.assert_array_equal(regions.features, first.features)
        np.testing.assert_array_equal(regions.soft_labels, first.soft_labels)  # type: ignore[arg-type]
    rows = table.slice(0, 4).to_pylist()
    rows[0]["features"][1] = rows[0]["features"][1][:-1]
    rows[1]["norm_bb"] = None
    rows[2]["conf"] = rows[2]["conf"][:-1]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "broken.parquet")
    broken = dict(read_items(tmp_path / "broken.parquet"))
    assert [isinstance(regions, BadInput) for regions in broken.values()] == [True, True, True, False]
    assert "the rows of features are 31 to 32 wide" in str(next(iter(broken.values())))
    pq.write_table(pa.table({"image": ["a"], "caption": ["b"]}), tmp_path / "captions.parquet")
    with pytest.raises(BadInput, match=r"is a table without the column key \(it has: image, caption\); expected regions of images"):
        list(read_items(tmp_path / "captions.parquet"))
    content = (tmp_path / "r.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(content[: len(content) // 2])
    with pytest.raises(BadInput, match="is no readable parquet file"):
        list(read_items(tmp_path / "cut.parquet"))


def test_a_table_of_texts_is_read_as_captions_again(world: tuple[Path, Path], tmp_path: Path) -> None:
    texts = TextDB(world[0])
    report = convert_texts(world[0], tmp_path / "t.parquet", to="parquet")
    assert report.texts == len(texts) and report.notes == [] and (tmp_path / "t.parquet.made_by.json").is_file()
    assert convert_texts(world[0], tmp_path / "t.parquet", to="parquet").already_complete
    rows = pq.read_table(tmp_path / "t.parquet").to_pylist()
    for row, example in zip(rows, texts.ids, strict=True):
        record = texts[example]
        assert row == {
            "id": example, "image": record["img_fname"], "caption": record["sent"], "input_ids": record["input_ids"], "fields": None,
        }  # fmt: skip
    assert detect(tmp_path / "t.parquet") == "parquet"
    found = CAPTIONS["parquet"](tmp_path / "t.parquet", split=None, join=(), counts={})
    assert [(one.id, one.image, one.text) for one in found] == [(row["id"], row["image"], row["caption"]) for row in rows]


def test_texts_of_a_task_keep_their_fields(made_up: ModuleType, tmp_path: Path) -> None:
    world = made_up.World()
    world.write(tmp_path)
    path = world.write_task(tmp_path, "nlvr2", count=12)
    convert_texts(path, tmp_path / "t.parquet", to="parquet")
    for row in pq.read_table(tmp_path / "t.parquet").to_pylist():
        record = TextDB(path)[row["id"]]
        assert row["image"] == record["img_fname"] and json.loads(row["fields"]) == {"target": record["target"]}


def test_load_dataset_opens_both(world: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With Hugging Face's own reader, where it is installed (or in the folder that UNITER_HF_DATASETS names)."""
    monkeypatch.syspath_prepend(os.environ.get("UNITER_HF_DATASETS", ""))
    datasets = pytest.importorskip("datasets", reason="Hugging Face's datasets is not installed; UNITER_HF_DATASETS names a folder with it")
    if not hasattr(datasets, "load_dataset"):
        pytest.skip("Hugging Face's datasets is not installed")
    convert(world[1], tmp_path / "r.parquet", to="parquet")
    convert_texts(world[0], tmp_path / "t.parquet", to="parquet")
    cache = str(tmp_path / "cache")
    regions = datasets.load_dataset("parquet", data_files=str(tmp_path / "r.parquet"), split="train", cache_dir=cache)
    texts = datasets.load_dataset("parquet", data_files=str(tmp_path / "t.parquet"), split="train", cache_dir=cache)
    wanted = ImageDB(world[1])
    for row in regions.with_format("numpy"):
        record = wanted[str(row["key"])]
        np.testing.assert_array_equal(np.stack(row["features"]), record.features)
        np.testing.assert_array_equal(np.stack(row["boxes"]), record.boxes)
    assert texts["caption"][0] == TextDB(world[0]).record(0)["sent"]
    # And what it writes of them is read again.
    regions.to_parquet(str(tmp_path / "again.parquet"))
    assert recognise(tmp_path / "again.parquet") == "parquet"
    again = dict(read_items(tmp_path / "again.parquet"))
    assert all(isinstance(one, RegionFeatures) and np.array_equal(one.features, wanted[key].features) for key, one in again.items())


def test_npy_files_are_plain_arrays_with_boxes(world: tuple[Path, Path], tmp_path: Path) -> None:
    convert(world[1], tmp_path / "out", to="npy")
    wanted = ImageDB(world[1])
    for line in (tmp_path / "out" / "images.jsonl").read_text().splitlines():
        row = json.loads(line)
        record = wanted[row["key"]]
        features, boxes = (np.load(tmp_path / "out" / name / f"{row['file']}.npy") for name in ("features", "boxes"))
        assert features.dtype == boxes.dtype == np.float32
        np.testing.assert_array_equal(features, record.features.astype(np.float32))
        np.testing.assert_array_equal(boxes, record.boxes)
        assert (row["height"], row["width"], row["regions"]) == (*record.size, len(record))  # type: ignore[misc]
    assert recognise(tmp_path / "out") == "npy" and convert(world[1], tmp_path / "out", to="npy").already_complete


def test_hostile_npy_folders_run_nothing_and_leave_nothing_outside(world: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(world[1], out, to="npy")
    first, second, third, *_ = [json.loads(line) for line in (out / "images.jsonl").read_text().splitlines()]
    np.save(out / "features" / f"{first['file']}.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    content = (out / "boxes" / f"{second['file']}.npy").read_bytes()
    (out / "boxes" / f"{second['file']}.npy").write_bytes(content[:-8])
    lines = [first, second, {**third, "file": "../../secret"}]
    (out / "images.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    found = [regions for _, regions in read_items(out)]
    assert all(isinstance(regions, BadInput) for regions in found)
    assert "cannot be read" in str(found[0]) and "cannot be read" in str(found[1]) and "lies outside" in str(found[2])
    record = ImageDB(world[1])[first["key"]]
    skipped: list[str] = []
    items = [("../x", record), ("a", record), ("a.npz", record), ("x" * 300, record)]
    npy.write(tmp_path / "new", items, skip=lambda key, _, error: skipped.append(str(error)))
    assert [line.split("key")[0] for line in skipped][:1] == [""] and len(skipped) == 3
    assert sorted(path.name for path in (tmp_path / "new").rglob("*.npy")) == ["a.npy", "a.npy"] and not (tmp_path / "x.npy").exists()
