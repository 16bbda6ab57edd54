"""Reading region databases: the golden sets, ours in every state, hostile values, processes."""

import contextlib
import dataclasses
import hashlib
import io
import json
import multiprocessing
import pickle
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lmdb
import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uniter.datasets.errors import BadInput
from uniter.datasets.image_db import ImageDB, MissingImage
from uniter.datasets.image_db.database import match_image_key, open_image_dbs
from uniter.datasets.image_db.published import Published, count_boxes
from uniter.datasets.image_db.records import ALL_FIELDS, decode_record, encode_record
from uniter.datasets.image_db.regions import RegionFeatures, normalised_boxes
from uniter.datasets.image_db.writing.units import UnitStore
from uniter.datasets.storage.array_codec import ALLOWED_TYPES, find_arrays, pack_arrays
from uniter.datasets.storage.npz import pack_npz, unpack_npz


def made_up_record(seed: int, *, regions: int = 7, width: int = 16, classes: int = 11) -> RegionFeatures:
    dice = np.random.default_rng(seed)
    size = (int(dice.integers(100, 900)), int(dice.integers(100, 900)))
    corners = np.sort(dice.random((regions, 2, 2), dtype=np.float32), axis=1).reshape(regions, 4) * np.float32([size[1], size[0]] * 2)
    labels = dice.random((regions, classes), dtype=np.float32)
    return RegionFeatures(
        features=dice.random((regions, width), dtype=np.float32) * 5,
        norm_bb=normalised_boxes(corners, size),
        conf=np.sort(dice.random(regions, dtype=np.float32))[::-1],
        boxes=corners,
        soft_labels=labels / labels.sum(axis=1, keepdims=True),
        size=size,
    )


def write_database(out: Path, keys: list[str], *, units: int = 2, finish: bool = True, header: Mapping[str, Any] | None = None) -> Path:
    store = UnitStore(out, settings={"made": "up"})
    for number in range(units):
        with store.unit(number) as writer:
            assert writer is not None
            for key in keys[number::units]:
                record = made_up_record(len(key) + sum(key.encode()))
                writer.put(key, encode_record(record, key=key), regions=len(record))
            writer.commit()
            if finish or number < units - 1:
                writer.complete()
    if finish:
        assert store.finish(
            units=units, header=header or {"feature_width": 16, "label_classes": 11, "class_names": [f"c{i}" for i in range(10)]}
        )
    return out


KEYS = [f"COCO_{index:03d}" for index in range(9)]


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_database(tmp_path_factory.mktemp("db") / "out.lmdb", KEYS)


# ------------------------------------------------------------------------------------------------------------------ golden sets


def _close(mine: Any, theirs: Any) -> None:
    np.testing.assert_allclose(np.asarray(mine, dtype=np.float64), theirs, rtol=2e-6, atol=1e-6)


def stated(database: ImageDB, key: str) -> int:
    """What UNITER's own reader calls the number of boxes, which can exceed the rows that there are."""
    (part,) = database._parts
    assert isinstance(part, Published)
    return part.stated(key)


def _cases(golden: Path) -> Iterator[tuple[str, Path, dict[str, Any]]]:
    expected = json.loads((golden / "expected.json").read_text())["img_db"]
    for tag, case in expected.items():
        if "args" in case:
            yield tag, golden / case["img_dir"], case


def test_golden_databases_read_as_the_original_does(uniter_data_golden: Path) -> None:
    tags = []
    for tag, folder, case in _cases(uniter_data_golden):
        tags.append(tag)
        rule = {name: case["args"][name] for name in ("conf_th", "max_bb", "min_bb", "num_bb")}
        wanted = folder / case["db"] if "db" in case else folder
        # The whole split folder chooses the plain variant; a compressed one is named itself.
        database = ImageDB(wanted if case["args"]["compress"] else folder, **rule)
        assert sorted(database.keys_list) == sorted(case["keys_record"])
        for key, item in case["items"].items():
            record = database[key]
            assert stated(database, key) == item["nbb_of_name"], (tag, key)
            assert len(record) == item["num_bb"] == database.region_counts[database.index_of(key)]
            features = record.features.astype(np.float32)
            assert list(features.shape) == item["feat_shape"]
            assert list(record.norm_bb.shape) == item["norm_bb_shape"]
            assert list(record.position.shape) == item["pos_shape"]
            _close(features.astype(np.float64).sum(), item["feat_sum"])
            _close((features.astype(np.float64) ** 2).sum(), item["feat_sq_sum"])
            _close(features[0, :8], item["feat_first8"])
            _close(features[-1, :4], item["feat_last_row_first4"])
            _close(record.position.astype(np.float64).sum(), item["pos_sum"])
            _close(record.position[0], item["pos_first"])
            _close(record.position[-1], item["pos_last"])
            if "error" in item["dump"]:
                continue  # the original fails on the stray `allow_pickle`; we are the ones who read it
            dump = item["dump"]
            assert record.soft_labels is not None
            assert list(record.soft_labels.shape) == dump["shapes"]["soft_labels"]
            labels = record.soft_labels.astype(np.float64)
            _close(labels.sum(), dump["soft_labels_sum"])
            _close(labels[0, :4], dump["soft_labels_first4"])
            best = record.best_objects()
            assert best is not None
            assert (best[0] + 1).tolist() == dump["soft_argmax_fg"]
            _close(record.conf.astype(np.float64).sum(), dump["conf_sum"])
            _close(record.conf[:3], dump["conf_first3"])
            assert record.boxes is None
            assert record.size is None
    assert len(tags) >= 8


def test_golden_stored_keys_are_found_by_walking_the_pages(uniter_data_golden: Path) -> None:
    for _, folder, case in _cases(uniter_data_golden):
        database = ImageDB(folder / case["db"]) if "db" in case else ImageDB(folder)
        assert sorted([*database.keys_list, "__keys__"]) == sorted(case["stored_keys"])


def test_golden_counts_of_boxes(uniter_data_golden: Path) -> None:
    for case in json.loads((uniter_data_golden / "expected.json").read_text())["compute_num_bb"]:
        if case["conf_th"] == -1:
            assert case["num_bb"] == min(case["max_bb"], max(case["min_bb"], len(case["conf"])))
        conf = np.array(case["conf"], dtype=case["dtype"])
        assert count_boxes(conf, conf_th=case["conf_th"], min_bb=case["min_bb"], max_bb=case["max_bb"]) == case["num_bb"]


def test_golden_records_with_the_stray_allow_pickle_are_read_whole(uniter_data_golden: Path) -> None:
    plain = ImageDB(uniter_data_golden / "img_db" / "scenes")
    folder = next((uniter_data_golden / "img_db_numpy126").glob("*/*"))
    stray = ImageDB(folder.parent if (folder / "data.mdb").exists() else folder)
    for key in plain:
        for name in ("features", "norm_bb", "conf", "soft_labels"):
            np.testing.assert_array_equal(getattr(plain[key], name), getattr(stray[key], name))


def test_golden_readers_of_the_task_set(uniter_tasks_golden: Path) -> None:
    expected = json.loads((uniter_tasks_golden / "expect_img.json").read_text())
    whole = np.load(uniter_tasks_golden / "expect_img_default.npz", allow_pickle=False)
    root = next(path for path in (uniter_tasks_golden / "img_db").iterdir() if path.is_dir())
    for reader, case in expected["readers"].items():
        rule = {name: case["args"][name] for name in ("conf_th", "max_bb", "min_bb", "num_bb")}
        folder = root
        if case["args"]["compress"]:
            folder = root / f"feat_th{rule['conf_th']}_max{rule['max_bb']}_min{rule['min_bb']}_compressed"
        database = ImageDB(folder, **rule)
        for key, item in case["images"].items():
            record = database[key]
            assert stated(database, key) == item["name2nbb"]
            assert len(record) == item["num_bb_returned"] == database.region_counts[database.index_of(key)]
            features = np.ascontiguousarray(record.features, dtype=np.float32)
            assert hashlib.sha1(features.tobytes()).hexdigest() == item["sha1_features_f32"]
            assert hashlib.sha1(np.ascontiguousarray(record.position).tobytes()).hexdigest() == item["sha1_pos7_f32"]
            if reader == "default":
                np.testing.assert_array_equal(features, whole[f"{key}|features"])
                np.testing.assert_array_equal(record.position, whole[f"{key}|pos7"])
                np.testing.assert_array_equal(record.soft_labels, whole[f"{key}|soft_labels"])
                np.testing.assert_array_equal(record.conf, whole[f"{key}|conf"].reshape(-1))


def test_golden_uniter_value_is_packed_byte_for_byte(butd_golden: Path) -> None:
    stored = json.loads((butd_golden / "uniter_lmdb.json").read_text())
    name = next(key for key in stored if "feat_th" in key and "compressed" not in key and not key.endswith("__keys__"))
    value = next(butd_golden.glob("uniter*.msgpack")).read_bytes()
    assert hashlib.sha256(value).hexdigest() == stored[name]["sha256"]
    arrays = {
        field: np.ndarray(place.shape, place.dtype, buffer=value, offset=place.offset).copy() for field, place in find_arrays(value).items()
    }
    assert pack_arrays(arrays) == value


# -------------------------------------------------------------------------------------------------------------- published, more


def _publish(folder: Path, records: Mapping[str, RegionFeatures], *, keys: Any = ..., nbb: Any = ..., npz: bool = False) -> Path:
    """A published database, made here so that its side files can be left out or falsified."""
    leaf = folder / "feat_th0.2_max100_min10"
    leaf.mkdir(parents=True)
    with lmdb.open(str(leaf), map_size=1 << 24) as environment, environment.begin(write=True) as transaction:
        for key, record in records.items():
            arrays = {
                "features": record.features,
                "norm_bb": record.norm_bb,
                "conf": record.conf[:, None],
                "soft_labels": record.soft_labels,
            }
            halves = {name: np.asarray(array, dtype=np.float16) for name, array in arrays.items()}
            transaction.put(key.encode(), pack_npz(halves) if npz else pack_arrays(halves))
        if keys is not None:
            transaction.put(b"__keys__", json.dumps(list(records) if keys is ... else keys).encode())
    if nbb is not None:
        content = {key: max(10, len(record)) for key, record in records.items()} if nbb is ... else nbb
        (folder / "nbb_th0.2_max100_min10.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def records() -> dict[str, RegionFeatures]:
    return {f"img {index}/ü.npz": made_up_record(index, regions=4 * index + 1) for index in range(5)}


@pytest.mark.parametrize("keys", [..., None, [], ["something else.npz"]])
@pytest.mark.parametrize("npz", [False, True])
def test_keys_come_from_what_is_stored(tmp_path: Path, records: dict[str, RegionFeatures], keys: Any, npz: bool) -> None:
    database = ImageDB(_publish(tmp_path, records, keys=keys, npz=npz))
    assert sorted(database) == sorted(records)
    assert {key: len(database[key]) for key in database} == {key: len(record) for key, record in records.items()}
    with pytest.raises(MissingImage):
        database["__keys__"]


def test_a_missing_or_stale_nbb_json_gives_real_counts(tmp_path: Path, records: dict[str, RegionFeatures]) -> None:
    stale = dict.fromkeys(list(records)[:3], 15) | {"gone.npz": 3}
    database = ImageDB(_publish(tmp_path / "stale", records, nbb=stale))
    for key, record in records.items():
        number = stale.get(key, count_boxes(record.conf.astype(np.float16), conf_th=0.2, min_bb=10, max_bb=100))
        assert stated(database, key) == number
        assert database.region_counts[database.index_of(key)] == min(number, len(record)) == len(database[key])
    absent = ImageDB(_publish(tmp_path / "absent", records, nbb=None))
    for key, record in records.items():
        assert absent.region_counts[absent.index_of(key)] == min(len(record), stated(absent, key))
    with pytest.raises(BadInput, match="no object of numbers"):
        ImageDB(_publish(tmp_path / "broken", records, nbb=["a"]))


def test_ground_truth_and_detected_regions_read_as_a_pair(uniter_data_golden: Path) -> None:
    truth, detected = uniter_data_golden / "img_db" / "re_gt", uniter_data_golden / "img_db" / "re_det"
    shutil_names = {path.name for path in truth.iterdir()}
    leaf = next(name for name in shutil_names if name.startswith("feat_th") and "compressed" not in name)
    pair = ImageDB(f"{truth / leaf};{detected}")
    alone = ImageDB(detected)
    assert len(pair) == len(ImageDB(truth)) + len(alone)
    for key in alone:
        np.testing.assert_array_equal(pair[key].features, alone[key].features)


# -------------------------------------------------------------------------------------------------------------------------- ours


def test_a_record_survives_the_disk(database: Path) -> None:
    opened = ImageDB(database)
    assert list(opened) == sorted(KEYS)
    for key in KEYS:
        wanted, record = made_up_record(len(key) + sum(key.encode())), opened[key]
        np.testing.assert_array_equal(record.features, wanted.features.astype(np.float16))
        np.testing.assert_array_equal(record.norm_bb, wanted.norm_bb.astype(np.float16))
        np.testing.assert_array_equal(record.conf, wanted.conf.astype(np.float16))
        np.testing.assert_array_equal(record.soft_labels, wanted.soft_labels.astype(np.float16))  # type: ignore[union-attr]
        np.testing.assert_array_equal(record.boxes, wanted.boxes)
        assert record.size == wanted.size
        assert opened.region_counts[opened.index_of(key)] == len(record)
    assert (opened.feature_width, opened.label_classes) == (16, 11)
    assert opened.class_names is not None
    assert len(opened.class_names) == 10


def test_only_the_wanted_fields_come_and_as_views(database: Path) -> None:
    opened = ImageDB(database)
    record = opened.read(KEYS[0])
    assert record.soft_labels is None
    assert record.boxes is None
    assert not record.features.flags.writeable
    assert not record.features.flags.owndata
    assert opened.read(KEYS[0], fields=("norm_bb",)).features.shape == (len(record), 0)
    rows = [4, 1]
    whole, some = opened[KEYS[0]], opened.read(KEYS[0], fields=("soft_labels",), soft_label_rows=rows)
    np.testing.assert_array_equal(some.soft_labels, whole.soft_labels[rows])  # type: ignore[index]
    mask = np.arange(len(record)) % 2 == 0
    masked = opened.read(KEYS[0], fields=("soft_labels",), soft_label_rows=mask)
    np.testing.assert_array_equal(masked.soft_labels, whole.soft_labels[mask])  # type: ignore[index]


WANTED = ("features", "norm_bb", "soft_labels")


def _arrays_are_the_records(opened: ImageDB) -> None:
    assert len(opened)
    for row, key in enumerate(opened.keys_list):
        record = opened[key]
        for array, name in zip(opened.read_arrays(row, WANTED), WANTED, strict=True):
            np.testing.assert_array_equal(array, getattr(record, name))
            assert array.dtype == getattr(record, name).dtype
        assert [array.shape for array in opened.read_arrays(row)] == [record.features.shape, record.norm_bb.shape]


def test_bare_arrays_are_the_records(tmp_path: Path, database: Path) -> None:
    _arrays_are_the_records(ImageDB(database))
    more = write_database(tmp_path / "more", ["x1", "x2"])
    _arrays_are_the_records(open_image_dbs([more, database]))
    _arrays_are_the_records(ImageDB(write_database(tmp_path / "partial", ["y1", "y2"], finish=False), allow_partial=True))
    view = ImageDB(database).read_arrays(0)[0]
    assert not view.flags.writeable and not view.flags.owndata, "nothing is copied"


def test_golden_bare_arrays_of_published_databases(uniter_data_golden: Path) -> None:
    published = [path for path in (uniter_data_golden / "img_db").iterdir() if any(path.glob("feat_th*"))]
    assert published
    for path in published:
        _arrays_are_the_records(ImageDB(path))


def test_bare_arrays_that_a_record_has_not_are_left_out(tmp_path: Path) -> None:
    store = UnitStore(tmp_path / "db", settings={})
    with store.unit(0) as writer:
        assert writer is not None
        writer.put("a", encode_record(dataclasses.replace(made_up_record(1), soft_labels=None)), regions=7)
        writer.complete()
    store.finish(units=1, header={})
    assert len(ImageDB(tmp_path / "db").read_arrays(0, WANTED)) == 2


@pytest.mark.parametrize("name", WANTED)
def test_a_damaged_header_is_refused_though_records_of_its_layout_are_known(tmp_path: Path, database: Path, name: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(database, copy)
    content = (copy / "data.mdb").read_bytes()
    value = ImageDB(database).raw_record(KEYS[4])
    assert value is not None and value in content
    place = value.index(b"<f2", value.index(name.encode()))
    for damage, said in ((b"<f4", "of shape .* needs .* bytes but has"), (b"|O8", "has type")):
        (copy / "data.mdb").write_bytes(content.replace(value, value[:place] + damage + value[place + 3 :]))
        opened = ImageDB(copy)
        for row in range(len(KEYS)):  # all have one layout
            if row != 4:
                opened.read_arrays(row, WANTED)
        with pytest.raises(BadInput, match=rf"image 'COCO_004': array '{name}' {said}"):
            opened.read_arrays(4, WANTED)
        with pytest.raises(BadInput, match=rf"image 'COCO_004': array '{name}' {said}"):
            opened.read_row(4, fields=WANTED)


def test_views_outlive_the_database(database: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(database, copy)
    opened = ImageDB(copy)
    kept = [opened[key].features for key in KEYS]
    wanted = [array.copy() for array in kept]
    del opened
    shutil.rmtree(copy)
    lmdb_again = ImageDB(database)  # other mappings come and go
    del lmdb_again
    for array, copied in zip(kept, wanted, strict=True):
        np.testing.assert_array_equal(array, copied)


def test_a_missing_image_is_named(database: Path) -> None:
    with pytest.raises(MissingImage, match=r"image 'nobody' is not in .*out\.lmdb; was it extracted, and under this key\?"):
        ImageDB(database)["nobody"]
    with pytest.raises(KeyError):
        ImageDB(database).index_of("nobody")
    assert ImageDB(database).get("nobody") is None


def test_an_unfinished_database_is_refused_unless_asked_for(tmp_path: Path) -> None:
    out = write_database(tmp_path / "out", KEYS, units=3, finish=False)
    with pytest.raises(BadInput, match=r"is unfinished \(no header\.json\).*--allow-partial"):
        ImageDB(out)
    partial = ImageDB(out, allow_partial=True)
    assert sorted(partial) == sorted(KEYS)
    for key in KEYS:
        assert partial[key].size == made_up_record(len(key) + sum(key.encode())).size
        assert partial.region_counts[partial.index_of(key)] == len(partial[key])
    store = UnitStore(out, settings={"made": "up"})
    with store.unit(2) as writer:
        assert writer is not None
        writer.complete()
    assert store.finish(units=3, header={})
    assert [len(partial[key]) for key in KEYS] == [7] * len(KEYS), "what was open stays readable while the work goes on"


def test_units_absorbed_between_opening_and_reading(tmp_path: Path) -> None:
    out = tmp_path / "out"
    store = UnitStore(out, settings={})
    with store.unit(1) as writer:
        assert writer is not None
        writer.put("late", encode_record(made_up_record(1)), regions=7)
        writer.complete()
    partial = ImageDB(out, allow_partial=True)
    with store.unit(0) as writer:
        assert writer is not None
        writer.put("early", encode_record(made_up_record(2)), regions=7)
        writer.complete()
    store.absorb(units=2)  # both units move into data.mdb
    assert not list((out / "units").glob("*/data.mdb"))
    assert len(partial["late"]) == 7


def test_several_databases_read_as_one(tmp_path: Path, database: Path) -> None:
    write_database(tmp_path / "all" / "a", ["x1", "x2"])
    write_database(tmp_path / "all" / "b", ["x3", "x4"])
    folder = ImageDB(tmp_path / "all")
    assert list(folder) == ["x1", "x2", "x3", "x4"]
    together = open_image_dbs([tmp_path / "all", database])
    assert len(together) == 4 + len(KEYS)
    for row, key in enumerate(together.keys_list):
        assert together.index_of(key) == row
        assert together.keys_list[row] == key
        assert len(together[key]) == together.region_counts[row]
    assert together.class_names is not None
    with pytest.raises(IndexError):
        together.keys_list[len(together)]


def test_databases_of_different_detectors_are_not_read_as_one(tmp_path: Path) -> None:
    names = [f"c{number}" for number in range(10)]
    made = {"feature_width": 16, "label_classes": 11, "class_names": names}
    one = write_database(tmp_path / "one", KEYS[:4], header=made)
    for name, other, said in (
        ("width", {"feature_width": 32}, r"width has features 32 wide, .*one has features 16 wide: .* one detector"),
        ("count", {"label_classes": 12}, "count has 12 detector classes, .*one has 11 detector classes"),
        ("names", {"class_names": names[::-1]}, "names has other classes"),
    ):
        with pytest.raises(BadInput, match=said):
            open_image_dbs([one, write_database(tmp_path / name, KEYS[4:], header={**made, **other})])
    unlabelled = write_database(tmp_path / "unlabelled", KEYS[4:], header={"feature_width": 16, "label_classes": 0, "class_names": None})
    assert len(open_image_dbs([unlabelled, one])) == len(KEYS)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.parametrize("state", ["complete", "partial"])
def test_workers_of_every_start_method_can_read(tmp_path: Path, method: str, state: str) -> None:
    out = write_database(tmp_path / "out", KEYS, finish=state == "complete")
    opened = ImageDB(out, allow_partial=True)
    mine = [opened[key].features.copy() for key in KEYS]  # opened in the parent, too
    with multiprocessing.get_context(method).Pool(2) as pool:
        theirs = pool.map(opened.__getitem__, KEYS, chunksize=1)
    for wanted, record in zip(mine, theirs, strict=True):
        np.testing.assert_array_equal(record.features, wanted)


def test_a_pickle_carries_paths_not_keys(tmp_path: Path) -> None:
    out = write_database(tmp_path / "out", [f"a key that is rather long {index:05d}" for index in range(2000)])
    packed = pickle.dumps(ImageDB(out))
    assert len(packed) < 5000
    assert len(pickle.loads(packed)) == 2000


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("COCO_001", ("COCO_001", "exact")),
        ("train2014/COCO_001", ("COCO_001", "name")),
        ("COCO_001.jpg", ("COCO_001", "path")),
        ("train2014/COCO_001.jpg", ("COCO_001", "stem")),
        ("vg_7.jpg", ("vg_7.npz", "npz")),
        ("vg_7", ("vg_7.npz", "npz")),
        ("COCO_999.jpg", None),
    ],
)
def test_images_are_matched_by_the_rules_of_the_contract(tmp_path: Path, name: str, found: tuple[str, str] | None) -> None:
    write_database(tmp_path / "db", ["COCO_001", "vg_7.npz"])
    assert match_image_key(ImageDB(tmp_path / "db"), name) == found
    assert match_image_key([ImageDB(tmp_path / "db")], name) == found


def test_what_is_no_database_is_said(tmp_path: Path, database: Path) -> None:
    with pytest.raises(BadInput, match="is no region database"):
        ImageDB(tmp_path)
    with pytest.raises(BadInput, match="is no region database"):
        ImageDB(tmp_path / "nowhere")
    with pytest.raises(BadInput, match="no region database was named"):
        open_image_dbs([])
    copy = tmp_path / "newer"
    shutil.copytree(database, copy)
    header = json.loads((copy / "header.json").read_text())
    (copy / "header.json").write_text(json.dumps({**header, "format_version": 9}))
    with pytest.raises(BadInput, match="format version 9, expected 1"):
        ImageDB(copy)


def test_ten_thousand_keys_need_no_python_objects(tmp_path: Path) -> None:
    keys = [f"{index:06d}" for index in range(10_000)]
    store = UnitStore(tmp_path / "db", settings={})
    with store.unit(0) as writer:
        assert writer is not None
        value = encode_record(made_up_record(0, regions=1, width=1, classes=2))
        for key in keys:
            writer.put(key, value, regions=1)
        writer.complete()
    store.finish(units=1, header={})
    opened = ImageDB(tmp_path / "db")
    assert not isinstance(opened.keys_list, list)
    assert opened.keys_list[5000] == "005000"
    assert opened.index_of("009999") == 9999
    assert isinstance(opened.region_counts, np.ndarray)


# ------------------------------------------------------------------------------------------------------------------------ codec


@pytest.mark.parametrize("field", ["features", "norm_bb", "conf", "soft_labels"])
@pytest.mark.parametrize(("value", "reason"), [(np.nan, "NaN or infinity"), (np.inf, "NaN or infinity"), (1e6, "too large for float16")])
def test_numbers_that_cannot_be_stored_are_refused(field: str, value: float, reason: str) -> None:
    record = made_up_record(3)
    getattr(record, field).flat[1] = value
    with pytest.raises(BadInput, match=f"image 'x': {field} holds .*{reason}"):
        encode_record(record, key="x")


def test_optional_fields_come_back() -> None:
    base = made_up_record(3)
    record = RegionFeatures(
        features=base.features,
        norm_bb=base.norm_bb,
        conf=base.conf,
        attributes=np.full((7, 5), 0.2, np.float32),
        object_ids=np.arange(7),
        object_conf=np.linspace(0, 1, 7, dtype=np.float32),
        attribute_ids=np.arange(7)[::-1],
        attribute_conf=np.linspace(1, 0, 7, dtype=np.float32),
    )
    back = decode_record(encode_record(record), key="x")
    assert back.soft_labels is None
    assert back.size is None
    for name in ("object_ids", "object_conf", "attribute_ids", "attribute_conf"):
        np.testing.assert_array_equal(getattr(back, name), getattr(record, name))


def _array(**changes: Any) -> bytes:
    entry = {b"nd": True, b"type": "<f2", b"kind": b"", b"shape": [2, 3], b"data": b"\0" * 12}
    entry.update({key.encode(): value for key, value in changes.items()})
    return bytes(msgpack.packb({"features": entry}, use_bin_type=True))


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (_array(kind=b"O", type="|O", data=b"cos\nsystem\n(S'true'\ntR."), "Python objects"),
        (_array(kind=b"V", type=[["a", "<f2"]]), "structured type|Python objects"),
        (_array(type="|O"), "type '|O', expected one of"),
        (_array(type="<U9"), "type '<U9'"),
        (_array(type=">f2"), "type '>f2'"),
        (_array(shape=[2, 4]), "needs 16 bytes but has 12"),
        (_array(shape=[-2, -3]), "no shape or no data"),
        (_array(shape=[1 << 40, 1 << 40]), "no shape or no data"),
        (_array(shape=[1] * 9), "at most 4 numbers"),
        (_array(shape="23"), "no list"),
        (_array(data="text but long"), "needs 12 bytes but has 13"),
        (b"\xdf\xff\xff\xff\xff", "claims 4,294,967,295 arrays"),
        (b"\x81\xa1a\xdf\xff\xff\xff\xff", "cut off"),
        (b"\x81\xa8features\xc6\xff\xff\xff\xff", "cut off"),
        (_array()[:-5], "cut off"),
        (_array() + b"\0", "1 bytes too many"),
        (b"", "cut off or no msgpack"),
        (b"\x93\x01\x02\x03", "no msgpack map"),
        (b"\x81\xa1a" + b"\x91" * 5000 + b"\xc0", "no msgpack"),
        (b"\x81\xc7\x03\x05abc\xc0", "0xc7"),
    ],
)
def test_hostile_values_are_refused_with_a_sentence(value: bytes, reason: str) -> None:
    with pytest.raises(BadInput, match=reason.replace("|O", r"\|O") if "type '" in reason else reason):
        find_arrays(value)


def test_other_entries_and_scalars_are_stepped_over() -> None:
    arrays = {"features": np.ones((2, 3), np.float16), "norm_bb": np.zeros((2, 6), np.float16)}
    packed = msgpack.unpackb(pack_arrays(arrays), raw=False, strict_map_key=False)
    packed["note"] = {"nested": [1, 2.5, None, "text", b"bytes"]}
    packed["allow_pickle"] = {b"nd": True, b"type": "|b1", b"kind": b"", b"shape": [], b"data": b"\1"}
    packed["scalar"] = {b"nd": False, b"type": "<f8", b"data": b"\0" * 8}
    packed["number"] = -7
    assert set(find_arrays(msgpack.packb(packed, use_bin_type=True))) == {"features", "norm_bb"}


def test_old_msgpack_with_raw_strings_is_read() -> None:
    entry = {"nd": True, "type": "<f2", "kind": "", "shape": (2, 3), "data": b"\1" * 12}
    assert find_arrays(msgpack.packb({"features": entry}, use_bin_type=False))["features"].shape == (2, 3)


def _npz(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return buffer.getvalue()


def _npy(header: str, data: bytes = b"") -> bytes:
    text = header.encode() + b" " * (63 - (10 + len(header)) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (_npz(a=_npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", b"cos\nsystem\n(S'true'\ntR.")), "never Python objects"),
        (_npz(a=_npy("{'descr': '<f2', 'fortran_order': False, 'shape': (1000000000000,), }")), "unpacks to more"),
        (_npz(a=_npy("{'descr': '<f2', 'fortran_order': False, 'shape': (4,), }", b"\0" * 6)), "needs 8 bytes"),
        (_npz(a=_npy("{'descr': '<f2', 'fortran_order': False, 'shape': (4,), }", b"\0" * 1_000_000)), "needs 8 bytes"),
        (
            _npz(a=_npy("{'descr': '<f2', 'fortran_order': False, 'shape': __import__('os').system('true'), }")),
            "no readable npz|damaged header",
        ),
        (_npz(a=b"\x93NUMPY\x03\x00" + b"\xff" * 8), "version"),
        (_npz(a=b"nothing"), "no readable npz"),
        (_npz(**{f"a{index}": b"" for index in range(70)}), "70 members"),
        (b"PK\x03\x04 and then nothing", "no readable npz"),
    ],
)
def test_hostile_npz_files_are_refused(value: bytes, reason: str) -> None:
    with pytest.raises(BadInput, match=reason):
        unpack_npz(value)


def test_a_zip_bomb_stops_at_the_limit() -> None:
    bomb = _npz(a=_npy("{'descr': '|u1', 'fortran_order': False, 'shape': (100000000,), }", b"\0" * 100_000_000))
    assert len(bomb) < 200_000
    with pytest.raises(BadInput, match="more than the allowed size"):
        unpack_npz(bomb, limit=1 << 20)


def test_fortran_order_and_stray_scalars_in_npz() -> None:
    buffer = io.BytesIO()
    np.savez(buffer, features=np.asfortranarray(np.arange(6.0).reshape(2, 3)), allow_pickle=np.array(True))
    arrays = unpack_npz(buffer.getvalue())
    assert list(arrays) == ["features"]
    np.testing.assert_array_equal(arrays["features"], np.arange(6.0).reshape(2, 3))


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=20),
        st.tuples(st.sampled_from(sorted(ALLOWED_TYPES)), st.lists(st.integers(0, 5), min_size=1, max_size=3)),
        max_size=6,
    )
)
def test_what_is_packed_is_found(layout: dict[str, tuple[str, list[int]]]) -> None:
    dice = np.random.default_rng(0)
    arrays = {
        name: np.frombuffer(dice.bytes(int(np.prod(shape)) * np.dtype(kind).itemsize), dtype=kind).reshape(shape)
        for name, (kind, shape) in layout.items()
    }
    value = pack_arrays(arrays)
    found = find_arrays(value)
    assert set(found) == set(arrays)
    for name, place in found.items():
        back = np.ndarray(place.shape, place.dtype, buffer=value, offset=place.offset)
        assert back.tobytes() == arrays[name].tobytes()
        assert back.shape == arrays[name].shape
    unpacked = unpack_npz(pack_npz(arrays)) if all("/" not in name and "\0" not in name and "\\" not in name for name in arrays) else {}
    for name, array in unpacked.items():
        assert array.tobytes() == arrays[name].tobytes()


GOOD_VALUE = encode_record(made_up_record(5, regions=3, width=4, classes=5))
GOOD_NPZ = pack_npz({"features": np.ones((3, 4), np.float16), "norm_bb": np.ones((3, 6), np.float16), "conf": np.ones((3, 1), np.float16)})


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_fuzzed_values_are_read_or_refused(data: st.DataObject) -> None:
    value = bytearray(data.draw(st.sampled_from([GOOD_VALUE, GOOD_NPZ])))
    for _ in range(data.draw(st.integers(1, 6))):
        what = data.draw(st.sampled_from(["flip", "cut", "insert", "repeat"]))
        place = data.draw(st.integers(0, max(0, len(value) - 1)))
        if what == "flip" and value:
            value[place] ^= data.draw(st.integers(1, 255))
        elif what == "cut":
            del value[place : place + data.draw(st.integers(1, 40))]
        elif what == "insert":
            value[place:place] = data.draw(st.binary(min_size=1, max_size=9))
        else:
            value[place:place] = value[place : place + 30]
    try:
        record = decode_record(bytes(value), key="fuzzed")
    except BadInput as error:
        assert "'fuzzed'" in str(error)
        return
    assert len(record.norm_bb) == len(record.features) == len(record.conf)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes_are_read_or_refused(value: bytes) -> None:
    with contextlib.suppress(BadInput):
        decode_record(value, key="random")


def test_all_fields_are_fields_of_the_record() -> None:
    assert set(ALL_FIELDS) == set(RegionFeatures.__dataclass_fields__)
