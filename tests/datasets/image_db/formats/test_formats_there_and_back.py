"""Every layout of other projects' code to ours and back: the same on what it holds. What cannot be written is said, in words."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from uniter.cli.db import main
from uniter.datasets.errors import BadInput
from uniter.datasets.image_db import ImageDB
from uniter.datasets.image_db.formats.projects import layout as layout_file
from uniter.datasets.image_db.formats.projects.layout import CAPTIONS, NUMBERS, SPLITS, THIRTY_SIX, Known, read_all, split_in, write_all
from uniter.datasets.image_db.formats.projects.rows import LAYOUTS
from uniter.datasets.image_db.formats.records import refuse
from uniter.datasets.image_db.formats.table import FORMATS, HOLDABLE, format_named, listed, recognise
from uniter.datasets.image_db.regions import RegionFeatures, normalised_boxes
from uniter.datasets.maintenance.convert import Encoded, convert
from uniter.datasets.maintenance.copying import write_regions
from uniter.datasets.storage.claims import note_of
from uniter.datasets.vocabulary import visual_genome_objects

ROOT = Path(__file__).parents[4]
NAMES = ["thing one", "thing, two", "ünd drei", "four", "five"]
CAPTION = 'A dog \t and  a cat, "quoted".'


@st.composite
def images(draw: st.DrawFn, name: str) -> dict[str, RegionFeatures]:
    """Some images that the layout can hold, of any sizes and widths; halves, as our database keeps them."""
    layout = LAYOUTS[name]
    dice = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    width, labels = draw(st.integers(1, 9)), draw(st.booleans())
    found: dict[str, RegionFeatures] = {}
    for number in draw(st.lists(st.integers(0, 10**8), min_size=1, max_size=3, unique=True)):
        count = 36 if THIRTY_SIX in layout.needs else draw(st.integers(1, 5))
        size = draw(st.integers(1, 900)), draw(st.integers(1, 900))
        corners = np.sort(dice.random((count, 2, 2), dtype=np.float32), axis=1).reshape(count, 4)
        boxes = (corners * np.float32([size[1], size[0]] * 2)).astype(np.float32)
        boxes[0] = [0, 0, size[1], size[0]]
        soft = dice.random((count, len(NAMES) + 1), dtype=np.float32) ** 3
        soft = (soft / soft.sum(axis=1, keepdims=True)).astype(np.float16)
        conf = dice.random(count, dtype=np.float32).astype(np.float16).astype(np.float32)
        ids = dice.integers(0, len(NAMES), count)
        record = RegionFeatures(
            features=(dice.random((count, width), dtype=np.float32) * 100 + 1).astype(np.float16),
            norm_bb=normalised_boxes(boxes, size),
            conf=conf,
            boxes=boxes,
            size=size,
        )
        attributes = {"attribute_ids": dice.integers(0, 9, count), "attribute_conf": conf[::-1].copy()}
        classes = {"soft_labels": soft} if labels else {"object_ids": ids, "object_conf": conf}
        key = str(number) if NUMBERS in layout.needs else f"COCO_val2014_{number:012d}"
        found[key] = dataclasses.replace(record, **classes, **attributes)  # type: ignore[arg-type]
    return found


def known_to(name: str) -> Known:
    known = Known(class_names=list(NAMES), split="val2014" if NUMBERS in LAYOUTS[name].needs else None)
    if CAPTIONS in LAYOUTS[name].needs:
        known.captions = lambda key: [f"{CAPTION} {number}" for number in range(5)]
    return known


def assert_kept(name: str, mine: RegionFeatures, wanted: RegionFeatures, known: Known) -> None:
    holds = LAYOUTS[name].holds
    np.testing.assert_array_equal(mine.features, wanted.features)
    if "boxes" in holds:
        np.testing.assert_array_equal(mine.boxes, wanted.boxes)
    if "sizes" in holds:
        assert mine.size == wanted.size
        np.testing.assert_allclose(mine.norm_bb, wanted.norm_bb, atol=3e-6)
    if "soft labels" in holds and wanted.soft_labels is not None and name != "vlbert_zip":
        assert mine.soft_labels is not None
        np.testing.assert_allclose(mine.soft_labels, wanted.soft_labels, atol=2e-3 if name.startswith("mmf") else 0)
    best, best_wanted = mine.best_objects(), wanted.best_objects()
    if (
        "classes" in holds
        and (wanted.soft_labels is None or name != "vlbert_zip")
        and not (name == "xmodaler" and wanted.soft_labels is None)
    ):
        if name == "m2" and wanted.soft_labels is None:
            return
        if name == "vlbert_zip":
            return
        assert best is not None and best_wanted is not None
        names = known.class_names or NAMES
        assert [names[number] for number in best[0]] == [NAMES[number] for number in best_wanted[0]]
    if "attributes" in holds:
        np.testing.assert_array_equal(mine.attribute_ids, wanted.attribute_ids)
        np.testing.assert_allclose(mine.attribute_conf, wanted.attribute_conf)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", LAYOUTS)
@settings(max_examples=max(6, settings().max_examples // 8))
@given(data=st.data())
def test_formats_to_a_layout_and_back_are_the_same(name: str, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    records = data.draw(images(name))
    if name == "xmodaler":
        records = {
            key: one for key, one in records.items() if (one.soft_labels is None) == (next(iter(records.values())).soft_labels is None)
        }
    out = tmp_path_factory.mktemp("there") / "out"
    write_all(LAYOUTS[name], out, records.items(), known_to(name), {}, refuse)
    assert recognise(out) == name or (name == "openvqa_vqa" and any(one.features.shape[1] == len(one) for one in records.values()))
    known = Known()
    back = dict(read_all(LAYOUTS[name], out, known))
    assert set(back) == set(records)
    for key, regions in back.items():
        assert isinstance(regions, RegionFeatures), regions
        if name == "xmodaler" and records[key].soft_labels is None:
            np.testing.assert_array_equal(regions.features, records[key].features)
            continue
        assert_kept(name, regions, records[key], known)


# --------------------------------------------------------------------------------------------------------- what cannot be written


def ours(out: Path, *keys: str, regions: int = 36, size: tuple[int, int] | None = (480, 640), labels: bool = True) -> Path:
    corners = np.float32([[0, 0, 1, 1]] * regions)
    record = RegionFeatures(
        features=np.ones((regions, 4), np.float32),
        norm_bb=np.concatenate([corners, corners[:, 2:] - corners[:, :2]], axis=1),
        conf=np.ones(regions, np.float32),
        boxes=None if size is None else corners * np.float32([size[1], size[0]] * 2),
        size=size,
        soft_labels=np.full((regions, 6), 1 / 6, np.float32) if labels else None,
    )
    records = Encoded((key, record) for key in keys)
    told = {"class_names": NAMES, "detector": "made up", "weights_sha256": "1" * 64, "box_kind": "proposal", "selection": {"kept": 36}}
    write_regions(out, records, settings={}, sources={}, header=lambda: {**records.widths, **told})
    return out


def test_formats_name_the_option_that_is_missing(tmp_path: Path) -> None:
    source = ours(tmp_path / "stems.lmdb", "COCO_train2014_000000000009")
    for name, layout in LAYOUTS.items():
        if NUMBERS in layout.needs:
            with pytest.raises(BadInput, match=r"pass --key '\{id\}'"):
                convert(source, tmp_path / "out", to=name)
        if CAPTIONS in layout.needs:
            with pytest.raises(BadInput, match="pass --captions FILE"):
                convert(source, tmp_path / "out", to=name)
        if SPLITS in layout.needs:
            with pytest.raises(BadInput, match=r"pass --split NAME|pass --captions FILE"):
                convert(ours(tmp_path / f"of-{name}.lmdb", "9"), tmp_path / "out", to=name)
        if CAPTIONS not in (*layout.needs, *layout.takes):
            with pytest.raises(BadInput, match=r"--captions has no meaning here"):
                convert(source, tmp_path / "out", to=name, captions=tmp_path)
    assert not (tmp_path / "out").exists()


def test_formats_of_36_regions_cut_more_and_refuse_fewer(tmp_path: Path) -> None:
    source = ours(tmp_path / "forty.lmdb", "COCO_val2014_000000000001", "COCO_train2014_000000000002", regions=40)
    report = convert(source, tmp_path / "cut", to="vlt5-h5")
    assert (report.images, report.said) == (2, ["images cut to their first 36 regions: 2"])
    assert sorted(path.name for path in (tmp_path / "cut").glob("*.h5")) == ["train2014_obj36.h5", "val2014_obj36.h5"]
    few = ours(tmp_path / "ten.lmdb", "COCO_val2014_000000000001", regions=10)
    with pytest.raises(BadInput, match=r"has 10 regions, and this layout holds 36 of every image; extract with --num-boxes 36"):
        convert(few, tmp_path / "few", to="butd_vqa", key="{id}")
    assert not (tmp_path / "few").exists()


def test_formats_without_boxes_or_sizes_say_so(tmp_path: Path) -> None:
    captions = tmp_path / "captions.jsonl"
    captions.write_text("".join(json.dumps({"image": "COCO_val2014_000000000001.jpg", "caption": f"text {n}"}) + "\n" for n in range(6)))
    source = ours(tmp_path / "one.lmdb", "COCO_val2014_000000000001")
    there = convert(source, tmp_path / "scan", to="scan", captions=captions)
    assert there.said == ["images of whose captions the first 5 were taken: 1"]
    assert (tmp_path / "scan" / "dev_caps.txt").read_text() == "".join(f"text {number}\n" for number in range(5))
    report = convert(tmp_path / "scan", tmp_path / "back.lmdb")
    assert "boxes (of 1 images: the source has none, and a model reads zeros)" in report.lacks
    with pytest.raises(BadInput, match=r"the source does not say where the regions are|size of the image is not known"):
        convert(tmp_path / "back.lmdb", tmp_path / "vilbert", to="vilbert_lmdb", key="{id}")
    convert(source, tmp_path / "m2", to="m2", key="{id}")
    report = convert(tmp_path / "m2", tmp_path / "m2.lmdb")
    assert "positions (of 1 images, whose sizes are not known: pass --images FOLDER)" in report.lacks
    assert ImageDB(tmp_path / "m2.lmdb")["1"].boxes is not None


def test_formats_keep_where_they_come_from(tmp_path: Path) -> None:
    source = ours(tmp_path / "one.lmdb", "COCO_val2014_000000000001")
    for name in ("vilbert_lmdb", "butd-tsv", "uniter"):
        out = tmp_path / f"out-{name}"
        convert(source, out, to=name, key="{id}")
        note = next(path for path in (note_of(out), *out.glob("*/made_by.json")) if path.is_file())
        told = json.loads(note.read_text())["provenance"]
        assert (told["detector"], told["weights_sha256"], told["box_kind"], told["selection"]) == (
            "made up",
            "1" * 64,
            "proposal",
            {"kept": 36},
        )
        assert told["software"].startswith("uniter-toolkit ")
        answer = CliRunner().invoke(main, ["info", str(out), "--json"])
        assert answer.exit_code == 0, answer.output
        shown = json.loads(answer.stdout)["databases"][0]
        assert (shown["images"], shown["regions"], shown["detector"], shown["box_kind"]) == (1, 36, "made up", "proposal"), name
        convert(out, tmp_path / f"back-{name}.lmdb")
        assert ImageDB(tmp_path / f"back-{name}.lmdb").header["weights_sha256"] == "1" * 64  # type: ignore[index]


def test_formats_written_again_are_complete_and_others_files_stay(tmp_path: Path) -> None:
    source = ours(tmp_path / "one.lmdb", "COCO_val2014_000000000001")
    out = tmp_path / "out"
    first = convert(source, out, to="milvlg")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert convert(source, out, to="milvlg") == dataclasses.replace(first, already_complete=True)
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    convert(source, out, to="milvlg", overwrite=True)
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    (out / "thesis.txt").write_text("dear")
    with pytest.raises(BadInput, match=r"holds thesis\.txt, which is no part of this layout"):
        convert(source, out, to="milvlg", overwrite=True)
    assert (out / "thesis.txt").exists()


def _killed_in_the_middle(source: Path, out: Path, name: str, **how: Any) -> None:
    """Convert in another process, which ends without another word when it has two images to write."""
    child = os.fork()
    if child == 0:
        real, calls = layout_file._prepared, iter(range(100))

        def ending(*words: Any) -> Any:
            return os._exit(9) if next(calls) == 2 else real(*words)

        layout_file._prepared = ending
        try:
            convert(source, out, to=name, **how)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("name", LAYOUTS)
def test_formats_killed_and_repeated_equal_unbroken(name: str, tmp_path: Path) -> None:
    source = ours(tmp_path / "ours.lmdb", *(f"COCO_val2014_{number:012d}" for number in range(1, 5)))
    how: dict[str, Any] = {"key": "{id}"} if NUMBERS in LAYOUTS[name].needs else {}
    if CAPTIONS in LAYOUTS[name].needs:
        how["captions"] = tmp_path / "captions.jsonl"
        rows = [{"image": f"{number}.jpg", "caption": f"text {text}"} for number in range(1, 5) for text in range(5)]
        how["captions"].write_text("".join(json.dumps(row) + "\n" for row in rows))
    unbroken, out = tmp_path / "unbroken", tmp_path / "out"
    report = convert(source, unbroken, to=name, **how)
    _killed_in_the_middle(source, out, name, **how)
    assert not out.exists(), "a folder is there whole or not at all"
    assert convert(source, out, to=name, **how) == report
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")], "what the killed one left is cleared away"
    theirs, mine = ({path.relative_to(root): path for path in root.rglob("*") if path.is_file()} for root in (unbroken, out))
    assert mine.keys() == theirs.keys()
    for place, path in theirs.items():
        assert mine[place].read_bytes() == path.read_bytes(), place
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    _killed_in_the_middle(source, out, name, overwrite=True, **how)
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}, "nothing goes before its successor is whole"


@pytest.mark.parametrize("name", ["butd-tsv", "lxmert-tsv", "hdf5", "milvlg", "vilbert_lmdb"])
def test_formats_of_several_files_are_read_as_one(name: str, tmp_path: Path) -> None:
    for part in range(2):
        out = (
            tmp_path
            / "parts"
            / (f"part.{name.rpartition('-')[2]}.{part}" if "tsv" in name else f"part{part}{'.hdf5' if name == 'hdf5' else ''}")
        )
        convert(ours(tmp_path / f"{part}.lmdb", str(2 * part), str(2 * part + 1)), out, to=name)
    assert recognise(tmp_path / "parts") == name
    convert(tmp_path / "parts", tmp_path / "whole.lmdb")
    assert sorted(key[-1] for key in ImageDB(tmp_path / "whole.lmdb")) == ["0", "1", "2", "3"]


@pytest.mark.parametrize("key", ["../evil", "/tmp/evil", "a\0b", "x" * 300])
def test_formats_never_write_outside_their_folder(key: str, tmp_path: Path) -> None:
    record = ImageDB(ours(tmp_path / "one.lmdb", "a"))["a"]
    for name in ("milvlg", "mmf_npy", "xmodaler", "openvqa_gqa"):
        with pytest.raises(BadInput):
            write_all(LAYOUTS[name], tmp_path / "in" / name, [(key, record)], Known(split="val"), {}, refuse)
    assert sorted(path.name for path in tmp_path.iterdir()) in (["in", "one.lmdb"], ["one.lmdb"])


# ------------------------------------------------------------------------------------------------------------------- the table


def test_formats_are_listed_and_the_page_shows_the_list() -> None:
    answer = CliRunner().invoke(main, ["convert", "--list"])
    assert answer.exit_code == 0
    assert answer.stdout == listed() + "\n"
    assert listed() in (ROOT / "docs" / "databases.md").read_text(), "copy the output of `uniter-db convert --list` into docs/databases.md"
    assert all(f"| `{name}` |" in answer.stdout for name in FORMATS)
    assert {one for form in FORMATS.values() for one in form.holds} <= set(HOLDABLE)
    rows = json.loads(CliRunner().invoke(main, ["convert", "--list", "--json"]).stdout)["formats"]
    assert [row["format"] for row in rows] == list(FORMATS)


def test_formats_are_named_with_hyphens_or_underscores(tmp_path: Path) -> None:
    assert [format_named(name) for name in ("m2", "vlt5-h5", "vlt5_h5", "butd_tsv", "hdf5_36", "uniter_compressed")] == [
        *("m2", "vlt5_h5", "vlt5_h5", "butd-tsv", "hdf5-36", "uniter-compressed")
    ]
    source = ours(tmp_path / "one.lmdb", "COCO_val2014_000000000001")
    answer = CliRunner().invoke(main, ["convert", str(source), str(tmp_path / "out"), "--to", "openvqa-vqa", "--json"])
    assert answer.exit_code == 0, answer.output
    assert json.loads(answer.stdout)["target"] == "openvqa_vqa"
    answer = CliRunner().invoke(main, ["convert", str(source), str(tmp_path / "x"), "--to", "openvqa"])
    assert answer.exit_code == 2 and "did you mean" in answer.output
    assert CliRunner().invoke(main, ["convert", str(source)]).exit_code == 2


@pytest.mark.parametrize(
    ("key", "split"),
    [
        ("COCO_train2014_000000000009", "train2014"),
        ("coco_val2014_000000000009.npz", "val2014"),
        ("val2014/COCO_val2014_000000000001", "val2014"),
        ("train-12-0-img0", "train"),
        ("training_1", None),
        ("2354786", None),
    ],
)
def test_formats_read_the_part_from_the_key(key: str, split: Any) -> None:
    assert split_in(key) == split


def test_formats_with_names_number_them_as_they_come() -> None:
    known = Known()
    assert known.numbers_of(["zebra crossing at night", "cat", "zebra crossing at night"]).tolist() == [0, 1, 0]
    assert known.numbers_of(["dog", "cat"]).tolist() == [2, 1]
    assert known.class_names == ["zebra crossing at night", "cat", "dog"]
    genome = Known()
    first = genome.numbers_of(["dog", "cat"]).tolist()
    assert [visual_genome_objects()[number] for number in first] == ["dog", "cat"]
    more = genome.numbers_of(["no class of theirs", "dog"]).tolist()
    assert more == [1600, first[0]] and genome.class_names[1600] == "no class of theirs"
