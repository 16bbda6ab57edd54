"""Every fault of an LMDB database is found, said, and leaves the rest readable; nothing crashes the process."""

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import lmdb
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from uniter.datasets.errors import BadInput, SettingsDiffer, UniterError
from uniter.datasets.image_db import ImageDB
from uniter.datasets.image_db.records import encode_record
from uniter.datasets.image_db.regions import RegionFeatures, normalised_boxes
from uniter.datasets.image_db.writing.units import UnitStore
from uniter.datasets.maintenance.check import check_coverage, check_database
from uniter.datasets.maintenance.check_regions import faults_of
from uniter.datasets.maintenance.check_report import CheckReport
from uniter.datasets.maintenance.describe import describe
from uniter.datasets.maintenance.kinds import database_kind
from uniter.datasets.maintenance.merge import merge
from uniter.datasets.maintenance.repair import repair
from uniter.datasets.maintenance.split import split
from uniter.datasets.storage.array_codec import pack_arrays
from uniter.datasets.storage.index_file import INDEX, map_arrays, save_arrays
from uniter.datasets.storage.lmdb_pages import Fault, PageFile
from uniter.datasets.text_db import TextDB
from uniter.datasets.text_db.building.build import build_text_db
from uniter.datasets.text_db.caption import Caption
from uniter.datasets.text_db.tokenizer import Tokenizer

IMAGES = 60
PADDING = "_" * 180  # long keys, so that the tree has several leaves


def key_of(number: int) -> str:
    return f"image{number:03d}{PADDING}"


def record_of(number: int, *, width: int = 600) -> RegionFeatures:
    dice = np.random.default_rng(number)
    size = (480, 640)
    corners = np.sort(dice.random((4, 2, 2), dtype=np.float32), axis=1).reshape(4, 4) * np.float32([640, 480] * 2)
    soft = dice.random((4, 9), dtype=np.float32)
    return RegionFeatures(
        features=dice.random((4, width), dtype=np.float32),
        norm_bb=normalised_boxes(corners, size),
        conf=np.sort(dice.random(4, dtype=np.float32))[::-1],
        boxes=corners,
        soft_labels=soft / soft.sum(axis=1, keepdims=True),
        size=size,
    )


def write(
    out: Path, numbers: range, *, header: dict[str, Any] | None = None, change: Callable[[RegionFeatures], None] | None = None
) -> Path:
    store = UnitStore(out, settings={"made": "up"})
    with store.unit(0) as writer:
        assert writer is not None
        for number in numbers:
            record = record_of(number)
            if change is not None and number == numbers[2]:
                change(record)
            writer.put(key_of(number), encode_record(record), regions=4)
        writer.fail("broken", "broken.jpg", "cannot be decoded")
        writer.complete()
    store.finish(units=1, header={"feature_width": 600, "label_classes": 9, "detector": "made up", **(header or {})})
    return out


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("check") / "whole.lmdb", range(IMAGES))


@pytest.fixture
def damaged(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "damaged.lmdb"))


def pages_of_kind(data: Path, flag: int) -> list[int]:
    content = data.read_bytes()
    return [page for page in range(2, len(content) // 4096) if content[page * 4096 + 10] == flag and content[page * 4096 + 11] == 0]


def test_a_whole_database_is_clean(whole: Path) -> None:
    report = check_database(whole)
    assert (report.kind, report.records, report.good) == ("regions", IMAGES, IMAGES)
    assert not report.problems
    assert not report.notes


def test_the_walk_sees_what_lmdb_sees(whole: Path) -> None:
    with (
        PageFile(whole / "data.mdb") as pages,
        lmdb.open(str(whole), readonly=True, lock=False) as environment,
        environment.begin() as reader,
    ):
        found = list(pages.records())
        assert not [item for item in found if isinstance(item, Fault)]
        assert [(item.key, pages.value(item)) for item in found if not isinstance(item, Fault)] == list(reader.cursor())
        assert pages.entries == IMAGES


def test_golden_databases_are_clean(uniter_data_golden: Path, uniter_tasks_golden: Path) -> None:
    seen = 0
    for root in (uniter_data_golden, uniter_tasks_golden):
        for data in sorted(root.rglob("data.mdb")):
            report = check_database(data.parent)
            assert not report.problems, (data, report.examples)
            assert report.good == report.records > 0
            seen += 1
    assert seen > 5


def flip(data: Path, place: int) -> None:
    content = bytearray(data.read_bytes())
    content[place] ^= 0x40
    data.write_bytes(content)


def good_after_repair(source: Path, out: Path) -> set[str]:
    report = CheckReport("")
    repair(source, out, report)
    again = check_database(out)
    assert not again.problems, again.examples
    database, original = ImageDB(out), {key_of(number): record_of(number) for number in range(IMAGES)}
    for key in database:
        np.testing.assert_array_equal(database[key].features, original[key].features.astype(np.float16))
    return set(database)


def test_a_flipped_bit_in_a_value(damaged: Path, tmp_path: Path) -> None:
    page = pages_of_kind(damaged / "data.mdb", 0x04)[3]
    flip(damaged / "data.mdb", page * 4096 + 2000)
    report = check_database(damaged)
    assert dict(report.problems) == {"checksum": 1}
    assert "differs from its checksum" in report.examples[0]
    assert report.good == IMAGES - 1
    assert len(good_after_repair(damaged, tmp_path / "repaired")) == IMAGES - 1


def test_a_damaged_leaf_page(damaged: Path, tmp_path: Path) -> None:
    page = pages_of_kind(damaged / "data.mdb", 0x02)[0]
    content = bytearray((damaged / "data.mdb").read_bytes())
    content[page * 4096 : page * 4096 + 16] = os.urandom(16)
    (damaged / "data.mdb").write_bytes(content)
    report = check_database(damaged)
    assert report.problems["pages"] >= 1
    assert 0 < report.good < IMAGES
    assert report.problems["lost"] == IMAGES - report.good
    assert len(good_after_repair(damaged, tmp_path / "repaired")) == report.good


def test_a_damaged_root_still_yields_what_checksums_confirm(damaged: Path, tmp_path: Path) -> None:
    page = pages_of_kind(damaged / "data.mdb", 0x01)[-1]
    content = bytearray((damaged / "data.mdb").read_bytes())
    content[page * 4096 : page * 4096 + 64] = b"\xff" * 64
    (damaged / "data.mdb").write_bytes(content)
    report = check_database(damaged)
    assert report.problems["salvaged"] == IMAGES
    assert good_after_repair(damaged, tmp_path / "repaired") == {key_of(number) for number in range(IMAGES)}


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_truncated_file(damaged: Path, tmp_path: Path, share: float) -> None:
    data = damaged / "data.mdb"
    os.truncate(data, int(data.stat().st_size * share))
    report = check_database(damaged)
    assert report.problems["file"] == 1
    assert "it was cut off" in report.examples[0]
    with pytest.raises(BadInput, match="cut off"):
        ImageDB(damaged)[key_of(0)]
    if report.good:
        assert len(good_after_repair(damaged, tmp_path / "repaired")) == report.good
    told = describe(damaged)
    assert "cut off" in told["error"]


def test_a_file_of_another_format_version(damaged: Path) -> None:
    data = damaged / "data.mdb"
    content = bytearray(data.read_bytes())
    content[20] = content[4096 + 20] = 3
    data.write_bytes(content)
    report = check_database(damaged)
    assert "format version 3" in report.examples[0]


@pytest.mark.parametrize("name", [INDEX, "header.json", "failures.jsonl", "settings.json", "data.mdb"])
@pytest.mark.parametrize("how", ["absent", "garbage", "empty"])
def test_side_files_that_are_absent_or_garbage(damaged: Path, name: str, how: str) -> None:
    path = damaged / name
    path.unlink()
    if how != "absent":
        path.write_bytes(b"\x00garbage" * 2000 if how == "garbage" else b"")
    report = check_database(damaged)
    describe(damaged)
    if name == "data.mdb":
        assert report.good == 0
        assert report.problems
    elif name in (INDEX, "settings.json") or (name == "header.json" and how != "absent"):
        assert report.problems
        assert report.good == IMAGES
    elif name == "header.json":
        assert report.kind == "unfinished regions"


def test_an_index_that_points_elsewhere_is_found(damaged: Path) -> None:
    columns = {name: array.copy() for name, array in map_arrays(damaged / INDEX).items()}
    columns["offsets"][50] += 4096
    save_arrays(damaged / INDEX, columns)
    report = check_database(damaged)
    assert dict(report.problems) == {"index": 1}
    assert "lies elsewhere in data.mdb" in report.examples[0]
    columns["offsets"][50] = 1 << 40
    save_arrays(damaged / INDEX, columns)
    with pytest.raises(BadInput, match="outside the file"):
        ImageDB(damaged)[key_of(50)]


def test_a_database_copied_by_lmdb_itself_is_read(whole: Path, tmp_path: Path) -> None:
    """`mdb_copy -c` moves every value; the reader sees that its index no longer holds."""
    copy = tmp_path / "copied.lmdb"
    shutil.copytree(whole, copy)
    (copy / "data.mdb").unlink()
    with lmdb.open(str(whole), readonly=True, lock=False) as environment:
        environment.copy(str(copy), compact=True)
    database = ImageDB(copy)
    for number in (0, 5, IMAGES - 1):
        np.testing.assert_array_equal(database[key_of(number)].features, record_of(number).features.astype(np.float16))
    assert not check_database(copy).problems


@pytest.mark.parametrize("kind", ["regions", "text"])
def test_keys_of_an_index_that_are_no_text(damaged: Path, tmp_path: Path, kind: str) -> None:
    path = damaged if kind == "regions" else captions_db(tmp_path / "texts.db", range(9))
    columns = {name: array.copy() for name, array in map_arrays(path / INDEX).items()}
    columns["key_bytes" if kind == "regions" else "ids.key_bytes"][0] = 0xFF
    save_arrays(path / INDEX, columns)
    with pytest.raises(BadInput, match="which is no UTF-8"):
        list(ImageDB(path) if kind == "regions" else TextDB(path))
    assert check_database(path).problems


@pytest.mark.parametrize("column", ["image_numbers", "image_examples", "image_keys.hashes"])
def test_an_index_of_texts_that_refers_to_nothing_is_told(tmp_path: Path, column: str) -> None:
    path = captions_db(tmp_path / "texts.db", range(9))
    columns = {name: array.copy() for name, array in map_arrays(path / INDEX).items()}
    columns[column][1] = 1 << 30
    save_arrays(path / INDEX, columns)
    assert set(check_database(path).problems) == {"index"}
    repair(path, tmp_path / "good.db", CheckReport(""))
    assert not check_database(tmp_path / "good.db").problems


def test_an_index_without_a_column_is_refused_in_a_sentence(damaged: Path) -> None:
    columns = dict(map_arrays(damaged / INDEX))
    for name in ("region_counts", "hashes"):
        save_arrays(damaged / INDEX, {other: array for other, array in columns.items() if other != name})
        with pytest.raises(BadInput, match=f"has no column {name}"):
            ImageDB(damaged)


def test_repair_leaves_what_another_command_has_begun(damaged: Path, tmp_path: Path) -> None:
    store = UnitStore(tmp_path / "out", settings={"made": "up"})
    with store.unit(0) as writer:
        assert writer is not None
        writer.put("a", encode_record(record_of(1)), regions=4)
        writer.commit()
    with pytest.raises(SettingsDiffer, match="was begun with other settings"):
        repair(damaged, tmp_path / "out", CheckReport(""))
    assert "a" in ImageDB(tmp_path / "out", allow_partial=True)
    assert repair(damaged, tmp_path / "out", CheckReport(""), overwrite=True)["images"] == IMAGES


def test_leftover_lock_files_are_noted(damaged: Path) -> None:
    (damaged / "lock.mdb").write_bytes(b"\0" * 8192)
    report = check_database(damaged)
    assert not report.problems
    assert "lock.mdb is left over" in report.notes[0]


def test_an_unfinished_database_is_checked_as_far_as_it_goes(tmp_path: Path) -> None:
    store = UnitStore(tmp_path / "out", settings={})
    with store.unit(0) as writer:
        assert writer is not None
        writer.put("a", encode_record(record_of(1)), regions=4)
        writer.commit()
    report = check_database(tmp_path / "out")
    assert (report.kind, report.records, report.good) == ("unfinished regions", 1, 1)
    assert "is unfinished" in report.notes[0]
    assert describe(tmp_path / "out")["begun_units"] == 1


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(seed=st.integers(0, 1 << 30), count=st.integers(1, 40), cut=st.booleans())
def test_whatever_is_damaged_checking_ends_and_good_is_good(
    whole: Path, tmp_path_factory: pytest.TempPathFactory, seed: int, count: int, cut: bool
) -> None:
    root = tmp_path_factory.mktemp("fuzz")
    copy = Path(shutil.copytree(whole, root / "copy"))
    dice = random.Random(seed)
    content = bytearray((copy / "data.mdb").read_bytes())
    important = [page * 4096 for flag in (1, 2) for page in pages_of_kind(copy / "data.mdb", flag)] + [0, 4096]
    for _ in range(count):
        start = dice.choice(important) if dice.random() < 0.7 else dice.randrange(len(content) // 4096) * 4096
        content[min(len(content) - 1, start + dice.randrange(4096))] = dice.randrange(256)
    if cut:
        del content[dice.randrange(len(content)) :]
    (copy / "data.mdb").write_bytes(content)
    report = check_database(copy)
    assert report.good <= IMAGES
    out = root / "out"
    try:
        repair(copy, out, CheckReport(""))
        for key in (database := ImageDB(out)):
            np.testing.assert_array_equal(database[key].features, record_of(int(key[5:8])).features.astype(np.float16))
        assert len(database) == report.good
    except BadInput as error:
        assert "not one good record" in str(error)
        assert report.good == 0
    shutil.rmtree(root)


READ_EVERYTHING = """
import sys
from uniter.datasets.image_db import ImageDB
from uniter.datasets.errors import UniterError
for path in sys.argv[1:]:
    try:
        database = ImageDB(path)
        for key in database.keys_list:
            try:
                database[key].features.sum()
            except UniterError:
                pass
    except UniterError as error:
        assert str(error)
"""


def test_reading_a_damaged_file_does_not_kill_the_process(whole: Path, tmp_path: Path) -> None:
    """The reader trusts LMDB after a look at the header; what LMDB itself refuses comes as our error."""
    dice = random.Random(5)
    copies = []
    for number in range(12):
        copy = tmp_path / f"copy{number}"
        shutil.copytree(whole, copy)
        data = copy / "data.mdb"
        content = bytearray(data.read_bytes())
        for flag in (1, 2):
            for page in pages_of_kind(data, flag):
                content[page * 4096 + dice.randrange(4096)] ^= 1 << dice.randrange(8)
        data.write_bytes(content)
        copies.append(str(copy))
    done = subprocess.run([sys.executable, "-c", READ_EVERYTHING, *copies], capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()


# ----------------------------------------------------------------------------------------------------------------------- numbers


def _set(name: str, place: Any, value: float) -> Callable[[RegionFeatures], None]:
    def change(record: RegionFeatures) -> None:
        getattr(record, name)[place] = value

    return change


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (_set("norm_bb", (1, 2), 1.2), "box", "outside the image"),
        (_set("norm_bb", (1, 4), 0.9), "box", "are its boxes x, y, width, height"),
        (_set("boxes", (1, 2), 900), "box", "outside its 640x480 pixels"),
        (_set("boxes", (1, 0), 1), "box", "do not fit norm_bb"),
        (_set("conf", 0, 1.5), "confidence", "confidences from"),
        (_set("soft_labels", (2, 3), 0.9), "probabilities", "instead of 1"),
        (_set("soft_labels", (2, 3), -0.1), "probabilities", "instead of 1"),
    ],
)
def test_numbers_that_cannot_be_are_said(tmp_path: Path, change: Callable[[RegionFeatures], None], kind: str, words: str) -> None:
    out = write(tmp_path / "odd.lmdb", range(10), change=change)
    report = check_database(out)
    assert set(report.problems) == {kind}
    assert any(words in sentence for sentence in report.examples)
    assert "image 'image002" in report.examples[0]
    assert report.good == 9


def test_faults_of_single_records() -> None:
    record = record_of(0)
    assert faults_of(record) == []
    assert faults_of(record.rows(slice(0)))[0][0] == "no regions"
    record.features[1, 1] = np.nan
    assert faults_of(record) == [("not finite", "has NaN or infinity in features")]
    swapped = record_of(1)
    swapped.norm_bb[:, 2:4] = swapped.norm_bb[:, :2] - 0.0
    swapped.norm_bb[:, 4:6] = 0
    assert "x1 <= x0" in faults_of(swapped)[0][1]


# --------------------------------------------------------------------------------------------------------------------- published


def publish(root: Path, *, keys: Any = None, nbb: Any = None) -> Path:
    leaf = root / "feat_th0.2_max100_min10"
    leaf.mkdir(parents=True)
    names = [f"image{number}.npz" for number in range(3)]
    with lmdb.open(str(leaf), map_size=1 << 24) as environment, environment.begin(write=True) as transaction:
        for number, name in enumerate(names):
            record = record_of(number)
            arrays = {"features": record.features, "norm_bb": record.norm_bb, "conf": record.conf[:, None]}
            transaction.put(name.encode(), pack_arrays({field: array.astype(np.float16) for field, array in arrays.items()}))
        if keys is not False:
            transaction.put(b"__keys__", json.dumps(names if keys is None else keys).encode())
    if nbb is not False:
        (root / "nbb_th0.2_max100_min10.json").write_text(json.dumps(dict.fromkeys(names, 10) if nbb is None else nbb))
    return leaf


@pytest.mark.parametrize(
    ("changes", "problem", "note"),
    [
        ({}, None, None),
        ({"keys": False}, None, "__keys__ is absent"),
        ({"keys": ["image0.npz", "gone.npz"]}, "1 listed but absent, 2 stored but not listed", None),
        ({"keys": {"not": "a list"}}, "no JSON list", None),
        ({"nbb": False}, None, "is absent; the numbers of boxes are counted"),
        ({"nbb": {"image0.npz": 10, "gone.npz": 4}}, "is stale: 1 of its names are not stored, 2 stored ones have no number", None),
        ({"nbb": dict.fromkeys([f"image{number}.npz" for number in range(3)], 50)}, "is stale: it says 50 boxes", None),
        ({"nbb": ["what"]}, "no object of numbers", None),
    ],
)
def test_side_files_of_published_databases(tmp_path: Path, changes: dict[str, Any], problem: str | None, note: str | None) -> None:
    report = check_database(publish(tmp_path / "split", **changes))
    assert report.good == 3
    assert bool(report.problems) == (problem is not None), report.examples
    if problem is not None:
        assert any(problem in sentence for sentence in report.examples)
    if note is not None:
        assert any(note in sentence for sentence in report.notes)


# -------------------------------------------------------------------------------------------------------------------------- text


def text_golden(golden: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(golden / "txt_db" / "pretrain_toy_train.db", tmp_path / "text.db"))


def test_golden_text_with_lost_and_altered_records(uniter_data_golden: Path, tmp_path: Path) -> None:
    path = text_golden(uniter_data_golden, tmp_path)
    ids = list(TextDB(path).ids)
    with lmdb.open(str(path), map_size=1 << 24) as environment, environment.begin(write=True) as transaction:
        transaction.delete(ids[0].encode())
        transaction.put(ids[1].encode(), b"\x04\x22\x4d\x18 not lz4")
        transaction.put(b"unknown", bytes(transaction.get(ids[2].encode())))
    lengths = json.loads((path / "id2len.json").read_text())
    (path / "id2len.json").write_text(json.dumps({**lengths, ids[3]: 99}))
    report = check_database(path)
    # 'unknown' is counted as an index problem, the unreadable one as lost besides.
    assert report.problems == {"record": 1, "lost": 2, "index": 1, "text": 1}
    repair(path, tmp_path / "good.db", CheckReport(""))
    good = TextDB(tmp_path / "good.db")
    assert set(good.ids) == set(ids) - {ids[0], ids[1], ids[3]}
    assert not check_database(tmp_path / "good.db").problems


def test_golden_coverage_of_texts_and_images(uniter_data_golden: Path) -> None:
    texts = TextDB(uniter_data_golden / "txt_db" / "pretrain_toy_train.db")
    images = ImageDB(uniter_data_golden / "img_db" / "scenes")
    coverage = check_coverage([texts], images)
    named = set(texts.image_keys)
    assert coverage.texts == len(texts)
    assert coverage.images_named == len(named)
    assert coverage.images_found == len(named & set(images))
    assert coverage.images_without_text == len(set(images) - named)
    wanted = sum(texts.image_key(row) in images for row in range(len(texts)))
    assert coverage.texts_with_image == wanted
    assert set(coverage.missing) <= named - set(images)


def captions_db(out: Path, numbers: range, **more: Any) -> Path:
    """A text database of ours; ids are numbers, each image has three texts."""
    texts = [Caption(str(number), f"{number // 3}.jpg", f"Picture {number} of a dog .", fields={"number": number}) for number in numbers]
    settings = {"task": "captions", "split": None, "exclude": {}, **more.pop("settings", {})}
    build_text_db(texts, out, tokenizer=Tokenizer.load(), settings=settings, meta={"task": "captions"}, **more)
    return out


def records_of(path: Path) -> dict[str, Any]:
    database = TextDB(path)
    return {example: {**database[example], "length": int(database.lengths[row])} for row, example in enumerate(database.ids)}


def test_a_flipped_bit_in_a_text_is_found(tmp_path: Path) -> None:
    path = captions_db(tmp_path / "texts.db", range(200))
    assert not check_database(path).problems
    before = records_of(path)
    data = path / "data.mdb"
    content = bytearray(data.read_bytes())
    place = content.index(b"Picture 77")
    content[place] ^= 0x20  # "picture": as long, as readable, and wrong
    data.write_bytes(content)
    report = check_database(path)
    assert report.problems["record"] == 1 and "ERROR_contentChecksum_invalid" in report.examples[0]
    assert (report.records, report.good) == (200, 199)
    with pytest.raises(BadInput, match="text record '77' is damaged"):
        TextDB(path)["77"]
    repair(path, tmp_path / "good.db", CheckReport(""))
    assert database_kind(tmp_path / "good.db") == "text"
    del before["77"]
    assert records_of(tmp_path / "good.db") == before
    assert not check_database(tmp_path / "good.db").problems
    report = CheckReport("")
    assert repair(path, tmp_path / "good.db", report)["already_complete"] and report.problems


@pytest.mark.parametrize("name", ["id2len.json", "txt2img.json", "img2txts.json"])
@pytest.mark.parametrize("how", ["other", "less", "cut", "gone", "list"])
def test_side_files_of_texts_that_say_something_else(tmp_path: Path, name: str, how: str) -> None:
    path = captions_db(tmp_path / "texts.db", range(9))
    stated = json.loads((path / name).read_text())
    first = next(iter(stated))
    if how == "gone":
        (path / name).unlink()
    elif how == "cut":
        (path / name).write_bytes((path / name).read_bytes()[:-9])
    elif how == "list":
        (path / name).write_text("[]")
    else:
        changed = {**stated, first: 7} if how == "other" else {key: value for key, value in stated.items() if key != first}
        (path / name).write_text(json.dumps(changed))
    report = check_database(path)
    assert report.problems == {"side file": 1} and name in report.examples[0]
    assert report.good == 9
    repair(path, tmp_path / "good.db", CheckReport(""))
    assert not check_database(tmp_path / "good.db").problems


def test_texts_of_ours_stay_ours_when_split_and_merged(tmp_path: Path) -> None:
    excluded = {"excluded.json": "0" * 64}
    source = captions_db(tmp_path / "texts.db", range(40), settings={"exclude": excluded})
    told = split(source, tmp_path / "parts", by="3")
    assert sum(told["parts"].values()) == 40
    parts = sorted((tmp_path / "parts").iterdir())
    for part in parts:
        header = json.loads((part / "header.json").read_text())
        assert header["settings"]["exclude"] == excluded and not check_database(part).problems
    assert merge(parts, tmp_path / "again.db")["texts"] == 40
    assert records_of(tmp_path / "again.db") == records_of(source)
    assert TextDB(tmp_path / "again.db").meta == {**TextDB(source).meta, "output": "again.db"}
    assert (tmp_path / "again.db" / "img2txts.json").read_bytes() == (source / "img2txts.json").read_bytes()
    header = json.loads((tmp_path / "again.db" / "header.json").read_text())
    assert header["settings"]["exclude"] == excluded and [one["name"] for one in header["settings"]["sources"]] == [p.name for p in parts]
    # A list counts only if every source was built with it.
    other = captions_db(tmp_path / "other.db", range(30, 50))
    assert merge([source, other], tmp_path / "both.db")["texts"] == 50
    assert json.loads((tmp_path / "both.db" / "header.json").read_text())["settings"]["exclude"] == {}
    build_text_db([Caption("31", "x.jpg", "another")], tmp_path / "clash.db", tokenizer=Tokenizer.load())
    with pytest.raises(BadInput, match=r"text '31' is in .*texts.db and in .*clash.db and differs"):
        merge([source, tmp_path / "clash.db"], tmp_path / "out.db")
    assert not (tmp_path / "out.db").exists()


def test_side_files_of_tasks_are_merged_or_refused(tmp_path: Path) -> None:
    def with_files(name: str, numbers: range, answers: dict[str, int], refs: list[Any]) -> Path:
        return captions_db(tmp_path / name, numbers, side_files=lambda: {"ans2label.json": answers, "refs.json": refs})

    dogs, same = (
        with_files("dogs.db", range(4), {"dog": 0}, [{"a": 1}]),
        with_files("same.db", range(4, 8), {"dog": 0}, [{"a": 1}, {"a": 2}]),
    )
    merge([dogs, same], tmp_path / "both.db")
    assert json.loads((tmp_path / "both.db" / "ans2label.json").read_text()) == {"dog": 0}
    assert json.loads((tmp_path / "both.db" / "refs.json").read_text()) == [{"a": 1}, {"a": 2}]
    with pytest.raises(SettingsDiffer, match="texts of other labels cannot be one database"):
        merge([dogs, with_files("cats.db", range(8, 12), {"cat": 0}, [])], tmp_path / "out.db")


@pytest.fixture(scope="module")
def databases(tmp_path_factory: pytest.TempPathFactory, uniter_data_golden: Path) -> Path:
    """A small database of each kind."""
    root = tmp_path_factory.mktemp("databases")
    captions_db(root / "texts.db", range(30))
    write(root / "regions.lmdb", range(6))
    shutil.copytree(next(iter(sorted((uniter_data_golden / "txt_db").glob("pretrain*")))), root / "published.db")
    shutil.copytree(uniter_data_golden / "img_db" / "scenes", root / "scenes")
    return root


@pytest.mark.parametrize("name", ["texts.db", "regions.lmdb", "published.db", "scenes"])
@settings(max_examples=settings().max_examples // 4)
@given(data=st.data())
def test_fuzzed_databases_are_told_and_repaired_or_refused(
    databases: Path, tmp_path_factory: pytest.TempPathFactory, fuzzing: ModuleType, name: str, data: st.DataObject
) -> None:
    """Any file of it damaged or gone: no other exception than ours, and what is repaired has no problems."""
    root = tmp_path_factory.mktemp("fuzz")
    copy, out = Path(shutil.copytree(databases / name, root / name)), root / "out"
    for file in data.draw(st.lists(st.sampled_from(sorted(path for path in copy.rglob("*") if path.is_file())), min_size=1, max_size=2)):
        content = file.read_bytes() if file.exists() else b""
        what = data.draw(st.sampled_from(["damaged", "damaged", "json", "gone"]))
        if what == "gone":
            file.unlink(missing_ok=True)
        elif what == "json" or file.suffix == ".json":
            file.write_bytes(fuzzing.as_json(data.draw(fuzzing.VALUES)) if what == "json" else fuzzing.damaged(data, content))
        else:
            changed = bytearray(content)
            for place in data.draw(st.lists(st.integers(0, max(0, len(content) - 1)), max_size=20)):
                changed[place : place + 1] = bytes([data.draw(st.integers(0, 255))])
            file.write_bytes(changed[: data.draw(st.integers(0, len(changed)))] if data.draw(st.booleans()) else changed)

    def read() -> None:
        database: TextDB | ImageDB = TextDB(copy) if name.endswith(".db") else ImageDB(copy)
        for key in list(database)[:8]:
            with contextlib.suppress(UniterError):
                database[key]

    def repaired() -> None:
        repair(copy, out, CheckReport(""))
        assert check_database(out).problems == {}

    told = [lambda: check_database(copy), lambda: describe(copy), read, repaired]
    for attempt in (*told, lambda: split(copy, out, by="2"), lambda: merge([copy], out)):
        with contextlib.suppress(UniterError):
            attempt()
        shutil.rmtree(out, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------------- merging, splitting


def same_records(one: Path, other: Path) -> None:
    mine, theirs = ImageDB(one), ImageDB(other)
    assert list(mine) == sorted(theirs)
    for key in mine:
        assert mine.raw_record(key) == theirs.raw_record(key)


@pytest.mark.parametrize("count", ["1", "7"])
def test_what_is_split_merges_to_the_same(whole: Path, tmp_path: Path, count: str) -> None:
    told = split(whole, tmp_path / "parts", by=count)
    assert sum(told["parts"].values()) == IMAGES
    assert max(told["parts"].values()) - min(told["parts"].values()) <= 1
    same_records(whole, tmp_path / "parts")
    merge([tmp_path / "parts"], tmp_path / "again")
    same_records(tmp_path / "again", whole)
    header, original = (json.loads((path / "header.json").read_text()) for path in (tmp_path / "again", whole))
    assert {**header, "failures": 1} == original
    assert not check_database(tmp_path / "again").problems


def test_splitting_by_lists(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "keys.txt").write_text(f"{key_of(3)}\n{key_of(5)}\nnobody\n")
    assert split(whole, tmp_path / "a", by=str(tmp_path / "keys.txt"))["parts"] == {"listed": 2, "rest": IMAGES - 2}
    (tmp_path / "parts.tsv").write_text("".join(f"{key_of(number)}\t{'val' if number % 3 else 'train'}\n" for number in range(IMAGES)))
    assert split(whole, tmp_path / "b", by=str(tmp_path / "parts.tsv"))["parts"] == {"train": 20, "val": 40}
    key = key_of(1).encode()
    for text, words in (
        (b"nobody\n", "none of the 1 keys"),
        (b"caf\xe9\n", "none of the 1 keys"),
        (key + b"\t../evil\n", "no name of a part"),
        (key + b"\ta\0b\n", "no name of a part"),
        (key + b"\t" + b"x" * 300, "no name of a part"),
    ):
        (tmp_path / "keys.txt").write_bytes(text)
        with pytest.raises(BadInput, match=words):
            split(whole, tmp_path / "c", by=str(tmp_path / "keys.txt"))
    (tmp_path / "crlf.txt").write_bytes(b"\xef\xbb\xbf" + key + b"\r\n")
    assert split(whole, tmp_path / "d", by=str(tmp_path / "crlf.txt"))["parts"]["listed"] == 1
    for by in ("0", "1000", "nowhere.txt", "²", "9" * 30):
        with pytest.raises(BadInput, match=f"--by {by}"):
            split(whole, tmp_path / "c", by=by)


def test_golden_texts_split_and_merge(uniter_data_golden: Path, tmp_path: Path) -> None:
    source = uniter_data_golden / "txt_db" / "pretrain_toy_train.db"
    original = TextDB(source)
    split(source, tmp_path / "parts", by="3")
    merge(sorted((tmp_path / "parts").iterdir()), tmp_path / "again.db")
    again = TextDB(tmp_path / "again.db")
    assert {key: again[key] for key in again.ids} == {key: original[key] for key in original.ids}
    assert {key: int(again.lengths[again.index_of(key)]) for key in again.ids} == {
        key: int(original.lengths[original.index_of(key)]) for key in original.ids
    }
    assert again.meta == original.meta
    (tmp_path / "keys.txt").write_text(f"{original.image_keys[0]}\n")
    told = split(source, tmp_path / "by_image", by=str(tmp_path / "keys.txt"))
    assert told["parts"]["listed"] == len(original.images()[original.image_keys[0]])


def test_merging_what_does_not_belong_together(whole: Path, tmp_path: Path, uniter_data_golden: Path) -> None:
    other = write(tmp_path / "other", range(90, 95), header={"detector": "another"})
    with pytest.raises(SettingsDiffer, match='detector was "made up", now "another"'):
        merge([whole, other], tmp_path / "out")
    with pytest.raises(BadInput, match="text and region databases"):
        merge([whole, uniter_data_golden / "txt_db" / "pretrain_toy_train.db"], tmp_path / "out")
    texts = [
        uniter_data_golden / "txt_db" / name
        for name in ("nlvr2_dev.db", "nlvr2_dev_uncased.db")
        if (uniter_data_golden / "txt_db" / name).exists()
    ]
    if len(texts) == 2:
        with pytest.raises(SettingsDiffer, match="different tokenizers"):
            merge(texts, tmp_path / "out")
    with pytest.raises(BadInput, match="is or holds the source"):
        merge([whole], whole)
    assert not (tmp_path / "out" / "header.json").exists()


def test_golden_published_texts_replace_nothing_but_a_database(uniter_data_golden: Path, tmp_path: Path) -> None:
    texts = next(iter(sorted((uniter_data_golden / "txt_db").glob("pretrain*"))))
    source = Path(shutil.copytree(texts, tmp_path / "all" / "texts.db"))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"dear")
    with pytest.raises(BadInput, match="photos is there already, and is not known to be made by this command"):
        merge([source], tmp_path / "photos", overwrite=True)
    assert (tmp_path / "photos" / "a.jpg").read_bytes() == b"dear"
    (tmp_path / "all" / "data.mdb").write_bytes(b"")
    with pytest.raises(BadInput, match="holds the source"):
        merge([source], tmp_path / "all", overwrite=True)
    for _ in range(2):
        assert merge([source], tmp_path / "again.db", overwrite=True)["texts"] == len(TextDB(source))


def test_merging_overlapping_databases(whole: Path, tmp_path: Path) -> None:
    overlapping = write(tmp_path / "overlapping", range(50, 70))
    told = merge([whole, overlapping], tmp_path / "out")
    assert (told["images"], told["equal_records_dropped"]) == (70, 10)
    different = write(tmp_path / "different", range(40, 50), change=_set("features", (0, 0), 0.123))
    with pytest.raises(BadInput, match=r"'image042_+' is in .*whole.* and in .*different.* with different regions"):
        merge([whole, different], tmp_path / "out2")


def test_a_merge_that_was_killed_goes_on(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from uniter.datasets.maintenance import copying as databases

    monkeypatch.setattr(databases, "_UNIT", 8)
    merge([whole], tmp_path / "unbroken")
    real, calls = UnitStore.unit, 0

    def dying(self: UnitStore, number: int) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return real(self, number)

    monkeypatch.setattr(UnitStore, "unit", dying)
    with pytest.raises(KeyboardInterrupt):
        merge([whole], tmp_path / "out")
    merge([whole], tmp_path / "out")
    assert (tmp_path / "out" / "data.mdb").read_bytes() == (tmp_path / "unbroken" / "data.mdb").read_bytes()


def test_kinds(whole: Path, tmp_path: Path, uniter_data_golden: Path) -> None:
    assert database_kind(whole) == "regions"
    assert database_kind(uniter_data_golden / "txt_db" / "pretrain_toy_train.db") == "published text"
    assert database_kind(uniter_data_golden / "img_db" / "scenes") == "folder of regions"
    with pytest.raises(UniterError, match="is no database"):
        database_kind(tmp_path)
    with pytest.raises(UniterError, match="is no folder"):
        database_kind(tmp_path / "x")
