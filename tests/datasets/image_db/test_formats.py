"""Every pair of formats composes to the same record on what both hold; broken and hostile files are said, not believed."""

import base64
import contextlib
import io
import json
import os
import pickle
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import h5py
import lmdb
import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from uniter.datasets.errors import BadInput, UniterError
from uniter.datasets.image_db import ImageDB
from uniter.datasets.image_db.formats.records import ImageSizes, Selection
from uniter.datasets.image_db.formats.table import FORMATS, read_items, recognise
from uniter.datasets.image_db.records import encode_record
from uniter.datasets.image_db.regions import RegionFeatures, normalised_boxes
from uniter.datasets.maintenance import copying
from uniter.datasets.maintenance.convert import Encoded, convert
from uniter.datasets.maintenance.copying import write_regions
from uniter.datasets.storage.array_codec import find_arrays
from uniter.datasets.storage.claims import note_of

# Those of other projects' code, which ask for numbers as ids or for captions, have tests of their own in `formats/`.
FILES = [name for name, form in FORMATS.items() if form.layout is None]
KEYS = ["COCO_train2014_000000000009", "42", "vg ü 7"]
# What each format keeps of a record, beside features and boxes.
HOLDS = {
    "lmdb": {"soft_labels", "conf", "class_ids", "size"},
    "uniter": {"soft_labels", "conf"},
    "uniter-compressed": {"soft_labels", "conf"},
    "npz": {"soft_labels", "conf"},
    "butd-tsv": {"size"},
    "lxmert-tsv": {"size", "class_ids"},
    "hdf5": {"size"},
    "hdf5-36": {"size"},
    "hdf5-volta": {"size", "class_ids"},
    "npy": {"size"},
    "parquet": {"soft_labels", "conf", "class_ids", "size"},
}


def held_by(*names: str) -> set[str]:
    """What is left of a record that went through these formats one after another."""
    held = {"soft_labels", "conf", "size"}
    classes = True
    for name in names:
        held &= HOLDS[name]
        classes = classes and ("class_ids" in HOLDS[name] or "soft_labels" in held)
    return held | ({"classes"} if classes else set())


def record_of(key: str, *, regions: int = 6, labels: bool = True) -> RegionFeatures:
    dice = np.random.default_rng(sum(key.encode()))
    size = (int(dice.integers(200, 640)), int(dice.integers(200, 640)))
    corners = np.sort(dice.random((regions, 2, 2), dtype=np.float32), axis=1).reshape(regions, 4) * np.float32([size[1], size[0]] * 2)
    soft = dice.random((regions, 9), dtype=np.float32) ** 4
    return RegionFeatures(
        features=dice.random((regions, 12), dtype=np.float32).astype(np.float16).astype(np.float32),
        norm_bb=normalised_boxes(corners, size),
        conf=np.sort(0.3 + 0.6 * dice.random(regions, dtype=np.float32))[::-1],
        boxes=corners,
        soft_labels=soft / soft.sum(axis=1, keepdims=True) if labels else None,
        size=size,
    )


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for key in KEYS:
        size = record_of(key).size
        assert size is not None
        Image.new("RGB", (size[1], size[0])).save(folder / f"{key}.jpg")
    return folder


def write(out: Path, name: str, *, labels: bool = True, keys: list[str] = KEYS) -> Path:
    """The made-up records in a format, by way of our own database."""
    start = ours(out.with_name(f"{out.name}.start"), ((key, record_of(key, labels=labels)) for key in keys))
    convert(start, out, to=name)
    return out


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("formats")
    return {name: write(root / f"made.{name}", name) for name in FILES}


def items_of(path: Path, source: str | None = None) -> dict[str, RegionFeatures]:
    found: dict[str, RegionFeatures] = {}
    for key, regions in read_items(path, source=source):
        assert isinstance(regions, RegionFeatures), regions
        found[key.removesuffix(".npz")] = regions
    return found


def assert_same(mine: RegionFeatures, wanted: RegionFeatures, held: set[str]) -> None:
    np.testing.assert_allclose(mine.features, wanted.features, rtol=1e-3)
    np.testing.assert_allclose(mine.norm_bb, wanted.norm_bb, atol=6e-4)
    assert wanted.size is not None
    if mine.boxes is not None:
        np.testing.assert_allclose(mine.boxes, wanted.boxes, atol=6e-4 * max(wanted.size))
    if "size" in held:
        assert mine.size == wanted.size
    if "conf" in held:
        np.testing.assert_allclose(mine.conf, wanted.conf, rtol=1e-3)
    if "soft_labels" in held:
        np.testing.assert_allclose(mine.soft_labels, wanted.soft_labels, atol=6e-4)  # type: ignore[arg-type]
    else:
        assert mine.soft_labels is None, "soft labels must not be invented"
    best, best_wanted = mine.best_objects(), wanted.best_objects()
    if "classes" in held:
        assert best is not None
        assert best_wanted is not None
        np.testing.assert_array_equal(best[0], best_wanted[0])
        np.testing.assert_allclose(best[1], best_wanted[1], atol=6e-4)
    else:
        assert best is None


def test_the_table_and_this_test_know_the_same_formats() -> None:
    assert set(FILES) == set(HOLDS)


@pytest.mark.parametrize("name", FILES)
def test_every_format_is_recognised_and_has_an_inverse(name: str, written: dict[str, Path]) -> None:
    assert recognise(written[name]) == ("uniter" if name == "uniter-compressed" else name)
    found = items_of(written[name])
    assert set(found) == set(KEYS)
    for key, regions in found.items():
        assert_same(regions, record_of(key), held_by(name))


@pytest.mark.parametrize("first", FILES)
@pytest.mark.parametrize("second", FILES)
def test_every_pair_composes(first: str, second: str, written: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = convert(written[first], out, to=second, images=pictures)
    assert report.images == len(KEYS)
    assert not report.skipped
    held = held_by(first, second) | ({"size"} & HOLDS[second])  # --images brings sizes
    assert report.soft_labels == ("soft_labels" in held)
    assert ("MRC-KL" in report.lacks) == ("soft_labels" not in held)
    for key, regions in items_of(out).items():
        if second == "lmdb" and first in ("uniter", "uniter-compressed", "npz"):
            assert regions.boxes is not None
        assert_same(regions, record_of(key), held)


def test_sizes_are_asked_for_where_they_are_needed(written: dict[str, Path], tmp_path: Path, pictures: Path) -> None:
    with pytest.raises(BadInput, match=r"needs pixels but the size of the image is not known; pass --images FOLDER"):
        convert(written["npz"], tmp_path / "out.tsv", to="butd-tsv")
    (tmp_path / "few").mkdir()
    shutil.copy(pictures / "42.jpg", tmp_path / "few" / "42.JPG")
    report = convert(written["npz"], tmp_path / "out.tsv", to="butd-tsv", images=tmp_path / "few")
    assert (report.images, len(report.skipped)) == (1, 2)
    assert "holds no picture of it" in report.skipped[0]["error"]


def test_sizes_are_of_the_upright_picture(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=exif)
    (tmp_path / "b.jpg").write_bytes(b"<html>")
    sizes = ImageSizes(tmp_path)
    assert sizes.find("a.npz") == (30, 20)
    assert sizes.find("b") is None
    assert sizes.find("c") is None


def test_class_ids_are_minus_one_where_no_class_is_known(tmp_path: Path) -> None:
    from uniter.datasets.image_db.formats import tsv

    caffe = write(tmp_path / "plain.tsv", "butd-tsv", labels=False)
    convert(caffe, tmp_path / "x.tsv", to="lxmert-tsv")
    columns = (tmp_path / "x.tsv").read_bytes().splitlines()[0].split(b"\t")
    ids = np.frombuffer(base64.b64decode(columns[tsv.LXMERT_COLUMNS.index("objects_id")]), dtype=np.int64)
    assert (ids == -1).all()
    assert next(iter(items_of(tmp_path / "x.tsv").values())).object_ids is None


def test_a_conversion_that_was_killed_goes_on(written: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "_UNIT", 1)
    unbroken = tmp_path / "unbroken"
    convert(written["lxmert-tsv"], unbroken)
    out = tmp_path / "out"
    real, calls = encode_record, 0

    def dying(*args: Any, **kwargs: Any) -> bytes:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr("uniter.datasets.maintenance.convert.encode_record", dying)
    with pytest.raises(KeyboardInterrupt):
        convert(written["lxmert-tsv"], out)
    with pytest.raises(BadInput, match="unfinished"):
        ImageDB(out)
    again = convert(written["lxmert-tsv"], out)
    assert not again.already_complete
    assert convert(written["lxmert-tsv"], out) == replace(again, already_complete=True), "nothing to do, and the same report"
    assert (out / "data.mdb").read_bytes() == (unbroken / "data.mdb").read_bytes()


def test_the_real_photographs(shared: Path, tmp_path: Path) -> None:
    source = shared / "data" / "coco10" / "train2014_obj36.tsv"
    report = convert(source, tmp_path / "coco10.lmdb")
    assert (report.source, report.images, report.regions) == ("lxmert-tsv", 10, 360)
    database = ImageDB(tmp_path / "coco10.lmdb")
    assert database.class_names is not None
    best = database["COCO_train2014_000000084002"].best_objects()
    assert best is not None
    assert "bed" in {database.class_names[index] for index in best[0]}
    everything = set()
    for key in database:
        record = database[key]
        assert record.size is not None
        assert record.boxes is not None
        objects = record.best_objects()
        assert objects is not None
        everything |= {database.class_names[index] for index in objects[0]}
        path = shared / "data" / "coco10" / f"{key}.jpg"
        with Image.open(path) as image:
            assert (image.height, image.width) == record.size
    assert {"bed", "ski", "fire truck"} <= everything | {"fire truck"}
    convert(tmp_path / "coco10.lmdb", tmp_path / "back.tsv", to="lxmert-tsv")
    for (key, mine), (_, theirs) in zip(sorted(items_of(tmp_path / "back.tsv").items()), sorted(items_of(source).items()), strict=True):
        np.testing.assert_array_equal(mine.boxes, theirs.boxes, err_msg=key)
        np.testing.assert_array_equal(mine.object_ids, theirs.object_ids)
        np.testing.assert_array_equal(mine.object_conf, theirs.object_conf)
        np.testing.assert_array_equal(mine.attribute_ids, theirs.attribute_ids)
        np.testing.assert_array_equal(mine.features, theirs.features.astype(np.float16))


# ---------------------------------------------------------------------------------------------------------------- golden writer


@pytest.mark.parametrize("compressed", [False, True])
def test_golden_npz_folders_become_what_the_original_converter_makes(uniter_data_golden: Path, tmp_path: Path, compressed: bool) -> None:
    seen = 0
    for source in sorted(path for path in (uniter_data_golden / "npz_in").iterdir() if path.is_dir()):
        original = uniter_data_golden / "img_db" / source.name
        name = "feat_th0.2_max100_min10" + ("_compressed" if compressed else "")
        if not (original / name).exists():
            continue
        report = convert(source, tmp_path / source.name, to="uniter-compressed" if compressed else "uniter")
        nbb = "nbb_th0.2_max100_min10.json"
        rows = {key: len(regions) for key, regions in ImageDB(original / name, conf_th=-1, num_bb=1000).items()}
        # Theirs states the lower bound for images that have fewer regions, of which their own reader dies.
        wanted = {key: min(count, rows[key]) for key, count in json.loads((original / nbb).read_text()).items()}
        assert json.loads((tmp_path / source.name / nbb).read_text()) == wanted
        with (
            lmdb.open(str(original / name), readonly=True, lock=False) as theirs,
            lmdb.open(str(tmp_path / source.name / name), readonly=True, lock=False) as mine,
            theirs.begin() as their_records,
            mine.begin() as my_records,
        ):
            assert [key for key, _ in my_records.cursor()] == [key for key, _ in their_records.cursor()]
            assert json.loads(my_records.get(b"__keys__")) == sorted(json.loads(their_records.get(b"__keys__")))
            for key, value in their_records.cursor():
                if key == b"__keys__" or compressed:
                    continue
                wanted, got = find_arrays(value), find_arrays(my_records.get(key))
                assert wanted.keys() == got.keys()
                for field, place in wanted.items():
                    theirs_array = np.ndarray(place.shape, place.dtype, buffer=value, offset=place.offset)
                    mine_array = np.ndarray(got[field].shape, got[field].dtype, buffer=my_records.get(key), offset=got[field].offset)
                    np.testing.assert_array_equal(mine_array.reshape(theirs_array.shape), theirs_array)
                    assert mine_array.dtype == theirs_array.dtype
                seen += 1
        assert report.images + len(report.skipped) == len(list(source.glob("*.npz")))
    assert seen or compressed


def test_golden_all_and_numbers_of_boxes_are_chosen_by_options(uniter_data_golden: Path, tmp_path: Path) -> None:
    source = uniter_data_golden / "npz_in" / "scenes"
    rows = {
        key: len(regions) for key, regions in read_items(source, selection=Selection(keep_all=True)) if isinstance(regions, RegionFeatures)
    }
    convert(source, tmp_path / "all", to="uniter", selection=Selection(keep_all=True))
    assert (tmp_path / "all" / "all" / "data.mdb").exists()
    whole = ImageDB(tmp_path / "all", conf_th=-1, num_bb=1000)
    assert {key: len(whole[key]) for key in whole} == rows
    convert(source, tmp_path / "five", to="uniter", selection=Selection(conf_th=-1, num_bb=5))
    five = ImageDB(tmp_path / "five", conf_th=-1, num_bb=5)
    assert {key: len(five[key]) for key in five} == {key: min(5, count) for key, count in rows.items()}


# ---------------------------------------------------------------------------------------------------------------- broken, hostile


def rewrite(path: Path, **columns: bytes) -> Path:
    from uniter.datasets.image_db.formats.tsv import LXMERT_COLUMNS

    lines = path.read_bytes().splitlines()
    first = lines[0].split(b"\t")
    for name, value in columns.items():
        first[LXMERT_COLUMNS.index(name)] = value
    path.write_bytes(b"\n".join([b"\t".join(first), *lines[1:]]) + b"\n")
    return path


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("features", b"!!!!", "features is no base64"),
        ("features", b"AAAA", "no whole number of float32 columns"),
        ("boxes", base64.b64encode(b"\0" * 4 * 6 * 3), r"shape \(6, 3\)"),
        ("num_boxes", b"-1", "num_boxes is '-1', expected a number"),
        ("num_boxes", b"99999", "expected 1 to 10,000"),
        ("num_boxes", b"5", "no whole number"),
        ("img_h", b"0", "its size is"),
        ("img_w", b"12x", "expected a number"),
        ("objects_id", base64.b64encode(np.full(6, 1 << 40).tobytes()), "no class numbers"),
    ],
)
def test_a_broken_row_is_skipped_and_named(written: dict[str, Path], tmp_path: Path, column: str, value: bytes, reason: str) -> None:
    path = rewrite(Path(shutil.copy(written["lxmert-tsv"], tmp_path / "in.tsv")), **{column: value})
    report = convert(path, tmp_path / "out.lmdb")
    assert report.images == len(KEYS) - 1
    with pytest.raises(BadInput, match=reason):
        raise BadInput(report.skipped[0]["error"])
    assert "line 1, image" in report.skipped[0]["error"]
    rows = [json.loads(line) for line in (tmp_path / "out.lmdb" / "failures.jsonl").read_text().splitlines()]
    assert [row["key"] for row in rows] == [report.skipped[0]["key"]]


def test_a_file_that_was_cut_off_gives_what_is_whole(written: dict[str, Path], tmp_path: Path) -> None:
    content = written["lxmert-tsv"].read_bytes()
    (tmp_path / "cut.tsv").write_bytes(content[:-100])
    report = convert(tmp_path / "cut.tsv", tmp_path / "out.lmdb")
    assert (report.images, len(report.skipped)) == (len(KEYS) - 1, 1)


def test_an_image_that_comes_twice_is_taken_once(written: dict[str, Path], tmp_path: Path) -> None:
    content = written["lxmert-tsv"].read_bytes()
    (tmp_path / "twice.tsv").write_bytes(content + content.splitlines(keepends=True)[0])
    report = convert(tmp_path / "twice.tsv", tmp_path / "out.lmdb")
    assert "comes twice" in report.skipped[0]["error"]
    assert len(ImageDB(tmp_path / "out.lmdb")) == len(KEYS)


@pytest.mark.parametrize("content", [b"", b"a\tb\tc\n", b"\x89HDF\r\n\x1a\n and no more", b"PK\x03\x04", os.urandom(500)])
def test_what_is_of_no_known_format_is_said(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "in").write_bytes(content)
    with pytest.raises(BadInput):
        convert(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out" / "header.json").exists()


def test_unknown_names_and_places(tmp_path: Path, written: dict[str, Path]) -> None:
    with pytest.raises(BadInput, match="unknown format 'lxmert'; did you mean 'lxmert-tsv'"):
        convert(written["npz"], tmp_path / "out", to="lxmert")
    with pytest.raises(BadInput, match="does not exist"):
        convert(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(BadInput, match="both source and target"):
        convert(written["lmdb"], written["lmdb"])
    with pytest.raises(BadInput, match="holds neither a database nor"):
        convert(tmp_path, tmp_path / "out")
    target = tmp_path / "there.tsv"
    target.write_text("precious")
    with pytest.raises(BadInput, match="is there already"):
        convert(written["lxmert-tsv"], target, to="lxmert-tsv")
    assert target.read_text() == "precious"


class Bomb:
    def __reduce__(self) -> Any:
        return os.mkdir, ("executed",)


def test_a_hostile_pickle_of_image_ids_is_refused(written: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path(shutil.copy(written["hdf5"], tmp_path / "train.hdf5"))
    with h5py.File(path, "r+") as file:
        del file["image_ids"]
    beside = tmp_path / "train_imgid2idx.pkl"
    with pytest.raises(BadInput, match=r"holds no image ids: expected train_imgid2idx\.pkl beside it"):
        list(read_items(path))
    beside.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(BadInput, match="nothing in a file may run code"):
        list(read_items(path))
    assert not (tmp_path / "executed").exists()
    beside.write_bytes(pickle.dumps({1: 0, 2: 7}))
    with pytest.raises(BadInput, match="no map from image id to a row below 3"):
        list(read_items(path))
    beside.write_bytes(pickle.dumps({9: 0, 42: 1, "x": 2}, protocol=2))
    assert [key for key, _ in read_items(path)] == ["9", "42", "x"]


def test_hdf5_links_to_other_files_are_not_followed(written: dict[str, Path], tmp_path: Path) -> None:
    path = Path(shutil.copy(written["hdf5"], tmp_path / "train.hdf5"))
    with h5py.File(path, "r+") as file:
        del file["image_bb"]
        file["image_bb"] = h5py.ExternalLink(str(written["hdf5"]), "image_bb")
    with pytest.raises(BadInput, match="is a link to another place"):
        list(read_items(path))


def test_hdf5_positions_outside_the_file_are_named(written: dict[str, Path], tmp_path: Path) -> None:
    path = Path(shutil.copy(written["hdf5"], tmp_path / "train.hdf5"))
    with h5py.File(path, "r+") as file:
        file["pos_boxes"][1] = [3, 4000]
    broken = [regions for _, regions in read_items(path) if isinstance(regions, BadInput)]
    assert len(broken) == 1
    assert "pos_boxes says rows 3 to 4000" in str(broken[0])


def test_fixed_hdf5_needs_equal_numbers(tmp_path: Path, written: dict[str, Path]) -> None:
    from uniter.datasets.image_db.formats.hdf5 import write_fixed

    items = [("a", record_of("a", regions=3)), ("b", record_of("b", regions=4))]
    with pytest.raises(BadInput, match="'b' has 4 regions but the first has 3; use --to hdf5"):
        write_fixed(tmp_path / "x.h5", items)
    assert not (tmp_path / "x.h5").exists()


def test_keys_that_would_leave_the_folder_are_refused(tmp_path: Path) -> None:
    from uniter.datasets.image_db.formats import npz, tsv

    with pytest.raises(BadInput, match="outside"):
        npz.write(tmp_path / "folder", [("../evil", record_of("a"))])
    assert not (tmp_path / "evil.npz").exists()
    with pytest.raises(BadInput, match="tab or line break"):
        tsv.write_caffe(tmp_path / "x.tsv", [("a\tb", record_of("a"))])


def _sources(written: dict[str, Path]) -> Iterator[tuple[str, Path]]:
    for name in ("npz", "butd-tsv", "lxmert-tsv", "hdf5", "hdf5-36", "hdf5-volta", "uniter", "lmdb"):
        path = written[name]
        files = sorted(file for file in path.rglob("*") if file.is_file() and file.name != "lock.mdb") if path.is_dir() else [path]
        for file in files:
            yield name, file


# These write and convert whole files: a quarter of the usual number.
SOME = settings(max_examples=settings().max_examples // 4)


def read_or_refused(path: Path, data: st.DataObject) -> None:
    """Every image is regions or a sentence, and what was read can be converted or is refused."""
    with contextlib.suppress(UniterError):
        for key, regions in read_items(path):
            assert isinstance(key, str)
            assert isinstance(regions, RegionFeatures | BadInput)
    to = data.draw(st.sampled_from(["lmdb", "uniter", "npz", "lxmert-tsv", "hdf5", "hdf5-volta"]))
    out = path.parent / f"out-{to}"
    try:
        report = convert(path, out, to=to)
        assert report.images == len(items_of(out)) > 0
    except UniterError as error:
        assert 20 < len(str(error)) < 2000


@SOME
@given(data=st.data())
def test_fuzzed_files_are_read_or_refused(
    written: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, fuzzing: ModuleType, data: st.DataObject
) -> None:
    name, file = data.draw(st.sampled_from(list(_sources(written))), label="file")
    content = fuzzing.damaged(data, file.read_bytes(), near=4096)
    root = tmp_path_factory.mktemp("fuzz")
    if written[name].is_dir():
        copy = Path(shutil.copytree(written[name], root / written[name].name))
        (copy / file.relative_to(written[name])).write_bytes(content)
    else:
        copy = root / file.name
        copy.write_bytes(content)
    read_or_refused(copy, data)
    shutil.rmtree(root, ignore_errors=True)


@st.composite
def arrays(draw: st.DrawFn) -> Any:
    """What could stand where an array is expected, of sizes near the right ones."""
    shape = tuple(draw(st.lists(st.sampled_from([0, 1, 2, 3, 4, 6, 9, 12, 18]), max_size=3)))
    kind = draw(st.sampled_from(["<f2", "<f4", "<f8", "<i4", "<i8", "|u1", "|b1", ">f4", "|S3", "<c8"]))
    array = np.zeros(shape, kind)
    if kind[1] != "S":
        array[...] = draw(st.sampled_from([0, 1, 3, 200, -1, 60000])) if kind != "|u1" else 3
        if kind[1] == "f" and array.size and draw(st.booleans()):
            array.flat[draw(st.integers(0, array.size - 1))] = draw(st.sampled_from([np.nan, np.inf, -5, 0.5, 1e-8]))
    return array


@pytest.mark.parametrize("name", ["hdf5", "hdf5-36", "hdf5-volta"])
@SOME
@given(data=st.data())
def test_fuzzed_hdf5_contents_are_read_or_refused(
    written: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    root = tmp_path_factory.mktemp("fuzz")
    copy = Path(shutil.copy(written[name], root / "made.hdf5"))
    with h5py.File(copy, "r+") as file:
        for _ in range(data.draw(st.integers(1, 2))):
            places: list[str] = []
            file.visit(places.append)
            if not places:
                break
            place = data.draw(st.sampled_from(places))
            what = data.draw(st.sampled_from(["array", "array", "gone", "group", "text", "link", "itself", "claim"]))
            del file[place]
            if what == "array":
                file[place] = data.draw(arrays())
            elif what == "group":
                file.create_group(place)
            elif what == "text":
                file[place] = data.draw(st.sampled_from(["x", ["a", "b", "c"], b"\xff\xfe"]))
            elif what == "link":
                file[place] = h5py.SoftLink("/nowhere")
            elif what == "itself":
                file[place] = h5py.SoftLink(f"/{place}")
            elif what == "claim":  # a dataset of which nothing is stored
                shape = data.draw(st.sampled_from([(1 << 40,), (1 << 40, 2), (1 << 33, 4), (1 << 20, 100, 2048), (3, 10_000, 65_536)]))
                file.create_dataset(place, shape=shape, dtype="<f4", chunks=(1,) * (len(shape) - 1) + (2,))
    read_or_refused(copy, data)
    shutil.rmtree(root, ignore_errors=True)


@pytest.mark.parametrize("how", ["npz", "published", "compressed", "ours"])
@SOME
@given(data=st.data())
def test_fuzzed_records_are_read_or_refused(
    written: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, how: str, data: st.DataObject
) -> None:
    """Arrays of other shapes and types in one of the records, and side files that say other things."""
    root = tmp_path_factory.mktemp("fuzz")
    source = {"npz": "npz", "published": "uniter", "compressed": "uniter-compressed", "ours": "lmdb"}[how]
    copy = Path(shutil.copytree(written[source], root / "copy"))
    record = record_of(KEYS[0])
    fields: dict[str, Any] = {"features": record.features, "norm_bb": record.norm_bb, "conf": record.conf[:, None]}
    fields |= {"soft_labels": record.soft_labels, "boxes": record.boxes, "size": np.array(record.size, np.int32)}
    for _ in range(data.draw(st.integers(1, 3))):
        fields[data.draw(st.sampled_from([*fields, "object_ids", "attributes", "allow_pickle", "other"]))] = data.draw(arrays())
    fields = {name: array for name, array in fields.items() if data.draw(st.integers(0, 9))}
    if how in ("npz", "compressed"):
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **fields)
        value = buffer.getvalue()
    else:
        packed = {
            name: {b"nd": True, b"type": array.dtype.str, b"kind": b"", b"shape": list(array.shape), b"data": array.tobytes()}
            for name, array in fields.items()
        }
        value = msgpack.packb(packed, use_bin_type=True)
    if how == "npz":
        (copy / f"{KEYS[0]}.npz").write_bytes(value)
    else:
        folder = next(path.parent for path in copy.rglob("data.mdb"))
        with lmdb.open(str(folder), map_size=1 << 24, sync=False) as environment, environment.begin(write=True) as transaction:
            key = next(iter(transaction.cursor()))[0]
            transaction.put(key, value)
            if data.draw(st.booleans()) and how != "ours":
                transaction.put(b"__keys__", data.draw(st.sampled_from([b"", b"[1]", b'["a"]', b"{}", b"\xff"])))
        for side in copy.glob("nbb_*.json"):
            counts = json.loads(side.read_text())
            counts[data.draw(st.sampled_from([*counts, "gone.npz"]))] = data.draw(
                st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just([])
            )
            side.write_text(json.dumps(counts))
    read_or_refused(copy, data)
    shutil.rmtree(root, ignore_errors=True)


@SOME
@given(data=st.data())
def test_fuzzed_rows_of_tsv_are_read_or_refused(
    written: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    root = tmp_path_factory.mktemp("fuzz")
    path = Path(shutil.copy(written["lxmert-tsv"], root / "in.tsv"))
    columns = data.draw(
        st.lists(st.sampled_from(["img_id", "img_h", "num_boxes", "objects_id", "attrs_conf", "boxes", "features"]), max_size=3)
    )
    values = {
        name: base64.b64encode(data.draw(arrays()).tobytes())
        if data.draw(st.booleans())
        else data.draw(st.sampled_from([b"", b"0", b"-1", b"1", b"\xff", b"99999999999999999999", b"6 ", b"\xc2\xb2", b"nan"]))
        for name in columns
    }
    read_or_refused(rewrite(path, **values), data)
    shutil.rmtree(root, ignore_errors=True)


# ----------------------------------------------------------------------------------------------------------- what cannot be written


def ours(out: Path, items: Iterable[tuple[str, RegionFeatures]]) -> Path:
    records = Encoded(items)
    write_regions(out, records, settings={}, sources={}, header=lambda: records.widths)
    return out


def test_images_that_a_format_cannot_hold_are_skipped_and_the_rest_is_written(tmp_path: Path) -> None:
    source = ours(tmp_path / "in.lmdb", [("a/b", record_of("a")), ("tab\there", record_of("b")), ("plain", record_of("c"))])
    for to, skipped in (("hdf5-volta", ["a/b"]), ("butd-tsv", ["tab\there"]), ("lxmert-tsv", ["tab\there"]), ("hdf5", []), ("npz", [])):
        report = convert(source, tmp_path / f"out-{to}", to=to)
        assert [row["key"] for row in report.skipped] == skipped, to
        assert report.images == 3 - len(skipped) == len(items_of(tmp_path / f"out-{to}"))
    only = ours(tmp_path / "only.lmdb", [("a/b", record_of("a"))])
    with pytest.raises(BadInput, match=r"no image could be written to .*: key 'a/b' holds '/'"):
        convert(only, tmp_path / "none.hdf5", to="hdf5-volta")
    assert not list(tmp_path.glob("none*"))


def test_large_numbers_are_skipped_where_the_target_has_halves(written: dict[str, Path], tmp_path: Path) -> None:
    features = np.full((6, 12), 1e5, np.float32)
    path = rewrite(Path(shutil.copy(written["lxmert-tsv"], tmp_path / "in.tsv")), features=base64.b64encode(features.tobytes()))
    for to in ("lmdb", "uniter", "npz"):
        report = convert(path, tmp_path / to, to=to)
        assert (report.images, len(report.skipped)) == (len(KEYS) - 1, 1)
        assert "float16" in report.skipped[0]["error"]
    assert convert(path, tmp_path / "out.h5", to="hdf5").images == len(KEYS), "floats of 32 bits hold it"


def test_records_without_soft_labels_do_not_mix_with_others(tmp_path: Path) -> None:
    out = ours(tmp_path / "mixed.lmdb", [("a", record_of("a")), ("b", record_of("b", labels=False))])
    failures = (out / "failures.jsonl").read_text()
    assert "features and soft labels are 12 and 0 wide, the first image's 12 and 9" in failures
    assert list(ImageDB(out)) == ["a"]


def test_pictures_are_optional_where_pixels_are_not_needed(written: dict[str, Path], tmp_path: Path, pictures: Path) -> None:
    (tmp_path / "few").mkdir()
    shutil.copy(pictures / "42.jpg", tmp_path / "few" / "42.jpg")
    report = convert(written["npz"], tmp_path / "out.lmdb", images=tmp_path / "few")
    assert (report.images, report.skipped) == (len(KEYS), [])
    assert {key: regions.size is not None for key, regions in items_of(tmp_path / "out.lmdb").items()} == {key: key == "42" for key in KEYS}


def test_what_is_there_stays_unless_it_is_to_be_replaced(written: dict[str, Path], tmp_path: Path) -> None:
    for to in FILES:
        out = tmp_path / to
        convert(written["lmdb"], out, to=to)
        before = sorted((file.relative_to(out), file.stat().st_size) for file in out.rglob("*")) if out.is_dir() else out.stat().st_size
        source = ours(tmp_path / f"other-{to}", [("other", record_of("other"))])
        with pytest.raises(UniterError, match=r"is there already|other settings"):
            convert(source, out, to=to)
        after = sorted((file.relative_to(out), file.stat().st_size) for file in out.rglob("*")) if out.is_dir() else out.stat().st_size
        assert before == after
        convert(source, out, to=to, overwrite=True)
        assert set(items_of(out)) == {"other"}
        assert not list(tmp_path.rglob("*.tmp"))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"dear")
    (tmp_path / "photo.jpg").write_bytes(b"dear")
    for to in FILES:
        for overwrite in (False, True):
            name = "photos" if to.endswith("tsv") or to.startswith(("hdf5", "parquet")) else "photo.jpg"
            with pytest.raises((UniterError, OSError), match=r"is a folder|is a file|is there already|exists|Not a directory"):
                convert(written["lmdb"], tmp_path / name, to=to, overwrite=overwrite)
    assert (tmp_path / "photos" / "a.jpg").exists() and (tmp_path / "photo.jpg").read_bytes() == b"dear"
    with pytest.raises(BadInput, match="is or holds the source"):
        convert(tmp_path / "npz", tmp_path, to="npz", overwrite=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    convert(written["lmdb"], tmp_path / "link", to="npz")
    assert (tmp_path / "link").is_symlink() and any((tmp_path / "elsewhere").glob("*.npz"))
    (tmp_path / "npz" / "thesis.txt").write_text("dear")
    with pytest.raises(BadInput, match=r"holds other files than \.npz"):
        convert(written["lmdb"], tmp_path / "npz", to="npz", overwrite=True)
    assert (tmp_path / "npz" / "thesis.txt").exists()


def test_arrays_of_which_only_the_size_is_stored_are_refused(written: dict[str, Path], tmp_path: Path) -> None:
    path = Path(shutil.copy(written["hdf5"], tmp_path / "claims.hdf5"))
    with h5py.File(path, "r+") as file:
        del file["pos_boxes"]
        file.create_dataset("pos_boxes", shape=(1 << 40, 2), dtype="<i8", chunks=(1024, 2))
    with pytest.raises(BadInput, match="but only 0 are stored"):
        list(read_items(path))


@pytest.mark.parametrize("to", ["uniter", "uniter-compressed", "npz", "butd-tsv", "hdf5", "hdf5-volta"])
def test_what_others_made_is_not_replaced_and_what_we_made_is_known(written: dict[str, Path], tmp_path: Path, to: str) -> None:
    out = tmp_path / "out"
    report = convert(written["lmdb"], out, to=to)
    place = FORMATS[to].place(out, Selection())
    note = note_of(place)
    assert json.loads(note.read_text())["made_by"] == "uniter-db convert"
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert convert(written["lmdb"], out, to=to) == replace(report, already_complete=True)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    if to.startswith("uniter"):
        with lmdb.open(str(place), readonly=True, lock=False) as environment:  # as its own readers open it
            assert environment.stat()["entries"] == report.images + 1
    note.unlink()
    for overwrite in (False, True):
        with pytest.raises(BadInput, match="is not known to be made by this command"):
            convert(written["lmdb"], out, to=to, overwrite=overwrite)
    assert {path: content for path, content in before.items() if path != note} == {
        path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()
    }


def test_a_failing_overwrite_leaves_the_file_and_what_is_known_of_it(written: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out.tsv"
    convert(written["lmdb"], out, to="butd-tsv")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    source = ours(tmp_path / "other", [("tab\there", record_of("a"))])
    with pytest.raises(BadInput, match="no image could be written"):
        convert(source, out, to="butd-tsv", overwrite=True)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}


NAMES_OF_CLASSES = ["cat, tom", "dog", "cup", "hat", "car", "bus", "bed", "sky"]


def test_names_of_classes_can_be_given_where_a_source_has_numbers_only(written: dict[str, Path], tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("\n".join(NAMES_OF_CLASSES) + "\n\n")
    with pytest.raises(BadInput, match=r"pass --class-names FILE"):
        convert(written["lmdb"], tmp_path / "none", to="vinvl_predictions")
    convert(written["lmdb"], tmp_path / "predictions", to="vinvl_predictions", class_names=names)
    database = convert(written["uniter"], tmp_path / "named.lmdb", class_names=names)
    assert database.images == len(KEYS)
    named = ImageDB(tmp_path / "named.lmdb")
    assert named.class_names == ("cat", *NAMES_OF_CLASSES[1:])
    assert (named.header or {})["class_names_from"] == "given: names.txt"
    best = named[f"{KEYS[0]}.npz"].best_objects()
    assert best is not None
    rows = [line.split("\t") for line in (tmp_path / "predictions" / "predictions.tsv").read_text().splitlines()]
    said = {row[0]: [one["class"] for one in json.loads(row[1])["objects"]] for row in rows}
    assert said[KEYS[0]] == [("cat", *NAMES_OF_CLASSES[1:])[number] for number in best[0]]


def test_another_list_of_names_is_other_content(written: dict[str, Path], tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("\n".join(NAMES_OF_CLASSES))
    convert(written["uniter"], tmp_path / "out.lmdb", class_names=names)
    assert convert(written["uniter"], tmp_path / "out.lmdb", class_names=names).already_complete
    names.write_text("\n".join(reversed(NAMES_OF_CLASSES)))
    with pytest.raises(UniterError, match="class_names"):
        convert(written["uniter"], tmp_path / "out.lmdb", class_names=names)


@pytest.mark.parametrize(
    ("content", "to", "sentence"),
    [
        ("cat\ndog\n", "lmdb", "knows 8 classes, .*names.txt names 2"),
        ("\n".join([*NAMES_OF_CLASSES, "sun"]), "lmdb", "knows 8 classes, .*names.txt names 9"),
        ("", "lmdb", "no list of class names: it is empty"),
        ("cat\n\ndog\n", "lmdb", "line 2 is empty"),
        ('["cat"]', "lmdb", "but JSON"),
        ("\n".join(NAMES_OF_CLASSES), "npz", "--class-names has no meaning here, since npz holds no class names"),
    ],
)
def test_names_that_cannot_be_meant_are_refused(written: dict[str, Path], tmp_path: Path, content: str, to: str, sentence: str) -> None:
    names = tmp_path / "names.txt"
    names.write_text(content)
    with pytest.raises(BadInput, match=sentence):
        convert(written["uniter"], tmp_path / "out", to=to, class_names=names)
    assert not (tmp_path / "out").exists() or not (tmp_path / "out" / "header.json").exists()


def test_a_database_that_names_its_classes_takes_no_others(tmp_path: Path, written: dict[str, Path]) -> None:
    names = tmp_path / "names.txt"
    names.write_text("\n".join(NAMES_OF_CLASSES))
    convert(written["uniter"], tmp_path / "named.lmdb", class_names=names)
    with pytest.raises(BadInput, match="names its 8 classes itself"):
        convert(tmp_path / "named.lmdb", tmp_path / "again.lmdb", class_names=names)
