"""Which images pre-training must not see: the rules of pretrain-vl-data on a small world where each rule has its own image."""

import json
import pickle
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uniter.datasets.errors import BadInput
from uniter.datasets.storage.plain_pickle import load_plain_pickle
from uniter.datasets.text_db.caption import Caption
from uniter.datasets.text_db.captions.table import CAPTIONS
from uniter.datasets.text_db.exclusions import LISTS, Exclusion, exclusion_lists, forbidden_coco, kind_of_annotations

# COCO image n has the Flickr photo n + 9000. What each image is:
RESTVAL, TRAIN, KARPATHY_VAL, KARPATHY_TEST, REFER_VAL, REFER_TEST_A, REFER_TEST_B, REFERG_VAL, REFERG_TEST, FLICKR, VAL_AND_REFER = range(
    1, 12
)


@pytest.fixture
def world(tmp_path: Path) -> Path:
    def images(numbers: range) -> list[dict[str, Any]]:
        return [
            {"id": n, "file_name": f"COCO_{n:012d}.jpg", "flickr_url": f"http://farm1.staticflickr.com/5/{n + 9000}_ab_z.jpg"}
            for n in numbers
        ]

    (tmp_path / "instances_train2014.json").write_text(json.dumps({"images": images(range(1, 6)), "annotations": []}))
    (tmp_path / "instances_val2014.json").write_text(json.dumps({"annotations": [], "images": images(range(6, 12))}))
    splits = {RESTVAL: "restval", KARPATHY_VAL: "val", VAL_AND_REFER: "val", KARPATHY_TEST: "test"}
    karpathy = [{"filename": "x.jpg", "cocoid": n, "split": splits.get(n, "train"), "sentences": []} for n in range(1, 12)]
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": karpathy, "dataset": "coco"}))
    for part in ("train", "val", "test"):
        rows = [image for image in karpathy if image["split"].replace("restval", "train") == part]
        (tmp_path / f"karpathy_{part}_images.txt").write_text("".join(f"val2014/x.jpg {row['cocoid']}\n" for row in rows))
    refs = [(REFER_VAL, "val"), (REFER_TEST_A, "testA"), (REFER_TEST_B, "testB"), (TRAIN, "train"), (VAL_AND_REFER, "val")]
    (tmp_path / "refs(unc).p").write_bytes(
        pickle.dumps([{"image_id": n, "split": split, "sentences": ["a"]} for n, split in refs], protocol=2)
    )
    refs = [(REFERG_VAL, "val"), (REFERG_TEST, "test"), (TRAIN, "train")]
    (tmp_path / "refs(umd).p").write_bytes(pickle.dumps([{"image_id": n, "split": split} for n, split in refs], protocol=2))
    (tmp_path / "flickr_train.txt").write_text(f"{FLICKR + 9000}\n5555\n")
    (tmp_path / "flickr_test.txt").write_text("6666\n")
    data = [
        {"image_id": 101, "coco_id": None, "flickr_id": 5555},
        {"image_id": 102, "coco_id": KARPATHY_TEST, "flickr_id": None},
        {"image_id": 103, "coco_id": KARPATHY_VAL, "flickr_id": KARPATHY_VAL + 9000},
        {"image_id": 104, "coco_id": None, "flickr_id": 1},
        {"image_id": 105, "coco_id": TRAIN, "flickr_id": None},
    ]
    (tmp_path / "image_data.json").write_text(json.dumps(data))
    return tmp_path


def lists_of(world: Path) -> dict[str, Any]:
    return exclusion_lists(
        coco=[world / "instances_train2014.json", world / "instances_val2014.json"],
        karpathy=[world / "dataset_coco.json"],
        refcoco=[world / "refs(unc).p"],
        refcocog=[world / "refs(umd).p"],
        flickr30k=[world / "flickr_train.txt", world / "flickr_test.txt"],
        visual_genome=world / "image_data.json",
    )


def test_the_lists(world: Path) -> None:
    lists = lists_of(world)
    assert tuple(lists) == LISTS
    assert lists == {
        "refer_val_coco_iids": [REFER_VAL, REFERG_VAL, VAL_AND_REFER],
        "refer_test_coco_iids": [REFER_TEST_A, REFER_TEST_B, REFERG_TEST],
        "flickr30k_coco_iids": [FLICKR],
        "flickr30k_vg_iids": [101],
        "karpathy_train_iids": sorted(set(range(1, 12)) - {KARPATHY_VAL, KARPATHY_TEST, VAL_AND_REFER}),
        "karpathy_val_iids": [KARPATHY_VAL, VAL_AND_REFER],
        "karpathy_test_iids": [KARPATHY_TEST],
        # Referring expressions' val and test, Karpathy's val and test, and all of Flickr30k.
        "excluded_flickr_url_ids": sorted(
            {"5555", "6666", str(FLICKR + 9000)}
            | {
                str(n + 9000)
                for n in (REFER_VAL, REFERG_VAL, VAL_AND_REFER, REFER_TEST_A, REFER_TEST_B, REFERG_TEST, KARPATHY_VAL, KARPATHY_TEST)
            }
        ),
    }
    assert forbidden_coco(lists) == {REFER_VAL, REFERG_VAL, VAL_AND_REFER, REFER_TEST_A, REFER_TEST_B, REFERG_TEST, FLICKR, KARPATHY_TEST}
    texts = exclusion_lists(karpathy=[world / f"karpathy_{part}_images.txt" for part in ("train", "val", "test")])
    assert all(texts[name] == lists[name] for name in LISTS if name.startswith("karpathy"))


def test_files_are_told_apart(world: Path) -> None:
    kinds = {path.name: kind_of_annotations(path) for path in sorted(world.iterdir())}
    assert kinds == {
        "dataset_coco.json": "karpathy",
        "flickr_test.txt": "flickr30k",
        "flickr_train.txt": "flickr30k",
        "image_data.json": "visual_genome",
        "instances_train2014.json": "coco",
        "instances_val2014.json": "coco",
        "karpathy_test_images.txt": "karpathy",
        "karpathy_train_images.txt": "karpathy",
        "karpathy_val_images.txt": "karpathy",
        "refs(umd).p": "refcoco",
        "refs(unc).p": "refcoco",
    }
    flickr = {"images": [{"filename": "1.jpg", "sentids": [0], "sentences": []}], "dataset": "flickr30k"}
    (world / "any name.json").write_text(json.dumps(flickr))
    assert kind_of_annotations(world / "any name.json") == "flickr30k"
    together = exclusion_lists(refcoco=[world / "refs(unc).p", world / "refs(umd).p"])
    assert together["refer_test_coco_iids"] == lists_of(world)["refer_test_coco_iids"]


def test_what_is_left_of_each_source(world: Path) -> None:
    (world / "excluded.json").write_text(json.dumps(lists_of(world)))
    exclusion = Exclusion([world / "excluded.json"])
    assert exclusion.knows_parts

    def kept(kind: str, document: Any) -> dict[str, str]:
        (world / "source.json").write_text(json.dumps(document))
        texts = CAPTIONS[kind](world / "source.json", split=None, join=(), counts=Counter())
        return {caption.id: exclusion.part(caption) for caption in texts if not exclusion(caption)}

    images = [{"id": n, "file_name": f"{n}.jpg"} for n in range(1, 12)]
    coco = {"images": images, "annotations": [{"id": n, "image_id": n, "caption": "a"} for n in range(1, 12)]}
    # Karpathy's validation image stays, as validation; the one that RefCOCO validates on does not.
    assert kept("coco", coco) == {str(RESTVAL): "train", str(TRAIN): "train", str(KARPATHY_VAL): "val"}
    regions = [{"id": n, "regions": [{"region_id": n, "phrase": "a"}]} for n in range(101, 106)]
    assert kept("vg", regions) == {"103": "val", "104": "train", "105": "train"}
    urls = [f"http://static.flickr.com/1/{photo}_x.jpg" for photo in (5555, KARPATHY_VAL + 9000, TRAIN + 9000, 77)]
    assert kept("sbu", {"image_urls": urls, "captions": ["a"] * 4}) == {"2": "train", "3": "train"}


def test_lists_that_leave_nothing_out_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A plain list that names no image is spelt otherwise than the texts; lists of several sources may name none of one."""
    captions = [Caption("1", "b.jpg", "a"), Caption("2", "c.jpg", "a")]
    (tmp_path / "list.txt").write_text("B.png\nC.png\n")
    (tmp_path / "b.txt").write_text("b\nd\n")
    (tmp_path / "lists.json").write_text(json.dumps({"karpathy_test_iids": [7]}))
    counts: Counter[str] = Counter()
    with pytest.raises(BadInput, match=r"none of the 2 entries of list\.txt is an image of these texts, .* called like 'b\.jpg'"):
        list(Exclusion([tmp_path / "b.txt", tmp_path / "list.txt"]).leave_out(captions, counts))
    assert [caption.id for caption in Exclusion([tmp_path / "b.txt"]).leave_out(captions, counts)] == ["2"] and counts["excluded"] == 1
    assert not caplog.records
    assert len(list(Exclusion([tmp_path / "lists.json"]).leave_out(captions, counts))) == 2
    assert "lists.json names none of the images of these texts (1 ids)" in caplog.text


def test_plain_lists(tmp_path: Path) -> None:
    captions = [
        Caption("1", "train2014/COCO_train2014_000000000009.jpg", "a", (("coco", "9"),)),
        Caption("2", "b.jpg", "a", (("coco", "10"),)),
        Caption("3", ("left.jpg", "right.jpg"), "a"),
        Caption("4", "000000012", "a"),
    ]

    def left(content: str, name: str = "list.txt") -> list[str]:
        (tmp_path / name).write_text(content)
        exclusion = Exclusion([tmp_path / name])
        assert not exclusion.knows_parts and len(exclusion.hashes[name]) == 64
        return [caption.id for caption in captions if not exclusion(caption)]

    assert left("9\n\n") == ["2", "3", "4"]
    assert left("\ufeff000000000010\r\n") == ["1", "3", "4"]
    assert left("b.jpg\nright\nCOCO_train2014_000000000009\n") == ["4"]
    assert left("train2014/COCO_train2014_000000000009.jpg 10\n") == ["3", "4"]
    assert left("12\n") == ["1", "2", "3"]
    assert left('[9, "b"]', "list.json") == ["3", "4"]
    with pytest.raises(BadInput, match=r"list\.txt is empty; expected ids or images' names"):
        left("")


def test_images_with_names_of_coco_are_known_in_every_source(world: Path) -> None:
    """Somebody's own JSONL about COCO's images must not bring the test images back."""
    (world / "excluded.json").write_text(json.dumps(lists_of(world)))
    exclusion = Exclusion([world / "excluded.json"])
    rows = [f"val2014/COCO_val2014_{KARPATHY_TEST:012d}.jpg", f"coco_train2014_{TRAIN:012d}.npz", f"coco_val2014_{FLICKR:012d}.npz"]
    rows += [f"{KARPATHY_TEST}.jpg", f"COCO_val2014_{KARPATHY_TEST:012d}7.jpg"]
    (world / "mine.jsonl").write_text("".join(json.dumps({"image": name, "caption": "a"}) + "\n" for name in rows))
    texts = CAPTIONS["jsonl"](world / "mine.jsonl", split=None, join=(), counts=Counter())
    assert [exclusion(caption) for caption in texts] == [True, False, True, False, False]


def test_messages(world: Path) -> None:
    for name, content, message in (
        ("a.json", '{"a": [1]}', "holds none of refer_val_coco_iids"),
        ("b.json", '{"karpathy_test_iids": 3}', "karpathy_test_iids of .* is no list of ids"),
        ("c.json", "[1, ", "is not JSON .* cut off"),
        ("d.json", "[[1]]", "is no list of ids"),
    ):
        (world / name).write_text(content)
        with pytest.raises(BadInput, match=message):
            Exclusion([world / name])
    with pytest.raises(BadInput, match=r"is not there; `uniter-build-db exclude` makes one"):
        Exclusion([world / "nowhere.json"])
    with pytest.raises(BadInput, match="lists no images; expected COCO's"):
        exclusion_lists(coco=[world / "refs.json"] if (world / "refs.json").write_text("{}") else [])
    (world / "bad.json").write_text('{"images": [{"split": "dev", "cocoid": 1}]}')
    with pytest.raises(BadInput, match="is of the split 'dev'; expected train, restval, val or test"):
        exclusion_lists(karpathy=[world / "bad.json"])
    (world / "bad.json").write_text('{"images": [{"split": [], "cocoid": 1}]}')
    with pytest.raises(BadInput, match=r"is of the split \[\]; expected train"):
        exclusion_lists(karpathy=[world / "bad.json"])
    with pytest.raises(BadInput, match="does not say which part it is"):
        exclusion_lists(karpathy=[world / "flickr.txt"])
    (world / "refs.json").write_text('[{"split": "val"}]')
    with pytest.raises(BadInput, match=r"the image_id of entry 0 of .* is None; expected a whole number"):
        exclusion_lists(refcoco=[world / "refs.json"])


class Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_a_pickle_runs_nothing(tmp_path: Path) -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "refs.p").write_bytes(pickle.dumps([{"image_id": 1, "split": "val", "evil": Hostile(tmp_path / "touched")}], protocol))
        with pytest.raises(BadInput, match="nothing in a file may run code"):
            exclusion_lists(refcoco=[tmp_path / "refs.p"])
        assert not (tmp_path / "touched").exists()
        plain = [{"image_id": 1, "split": "val", "x": [1.5, None, True, ("a", "ü")]}]
        (tmp_path / "plain.p").write_bytes(pickle.dumps(plain, protocol))
        assert load_plain_pickle(tmp_path / "plain.p") == plain
    for content in (b"", b"hello", b"\x80\x05", pickle.dumps([1])[:-1]):
        (tmp_path / "bad.p").write_bytes(content)
        with pytest.raises(BadInput, match="is no pickle of plain lists and maps"):
            load_plain_pickle(tmp_path / "bad.p")


def test_golden_refer_pickle(uniter_data_golden: Path) -> None:
    refs = load_plain_pickle(uniter_data_golden / "ann" / "refs(unc).p")
    assert {ref["split"] for ref in refs} and all(isinstance(ref["image_id"], int) for ref in refs)
    lists = exclusion_lists(refcoco=[uniter_data_golden / "ann" / "refs(unc).p"])
    wanted = {ref["image_id"] for ref in refs if ref["split"] in ("testA", "testB", "test")}
    assert lists["refer_test_coco_iids"] == sorted(wanted)


# ------------------------------------------------------------------------------------------------------------------------ fuzzing

IMAGES = [{"id": 1, "file_name": "a.jpg", "flickr_url": "http://farm1.staticflickr.com/5/9001_ab_z.jpg"}]
REFS = [{"image_id": 1, "split": "testA", "sentences": ["a"]}, {"image_id": 2, "split": "val"}]
SPLITS = [{"filename": "9001.jpg", "cocoid": 1, "split": "test", "sentences": []}, {"filename": "b.jpg", "cocoid": 2, "split": "restval"}]
SOURCES: dict[str, tuple[str, Any]] = {
    "coco": ("instances.json", {"images": IMAGES, "annotations": []}),
    "karpathy": ("dataset_coco.json", {"images": SPLITS, "dataset": "coco"}),
    "refcoco": ("refs.json", REFS),
    "flickr30k": ("dataset_flickr30k.json", {"images": SPLITS, "dataset": "flickr30k"}),
    "visual_genome": ("image_data.json", [{"image_id": 101, "coco_id": None, "flickr_id": 9001}, {"image_id": 1, "coco_id": 7}]),
}


@pytest.mark.parametrize("kind", [*SOURCES, "refs.p", "photo ids", "karpathy_test_images.txt", "lists"])
@given(data=st.data())
def test_fuzzed_annotations_make_lists_or_an_error_of_ours(tmp_path: Path, fuzzing: ModuleType, kind: str, data: st.DataObject) -> None:
    if kind in SOURCES:
        name, document = SOURCES[kind]
        changed = data.draw(st.booleans(), label="values")
        content = (
            fuzzing.as_json(fuzzing.with_another_value(data, document)) if changed else fuzzing.damaged(data, fuzzing.as_json(document))
        )
    elif kind == "refs.p":
        name, content = "refs.p", fuzzing.damaged(data, pickle.dumps(REFS, protocol=data.draw(st.sampled_from([0, 2, 4]))))
    elif kind == "lists":
        lists = {name: [1, 2, "9001"] for name in LISTS}
        name, content = "lists.json", fuzzing.as_json(fuzzing.with_another_value(data, data.draw(st.sampled_from([lists, [1, "a.jpg"]]))))
        content = content if data.draw(st.booleans()) else fuzzing.damaged(data, content)
    else:
        name = "karpathy_test_images.txt" if kind.startswith("karpathy") else "train.txt"
        content = fuzzing.damaged(data, b"val2014/x.jpg 391895\n" * 3 if kind.startswith("karpathy") else b"9001\n9002\n")
    path = tmp_path / name
    path.write_bytes(content)
    try:
        if kind == "lists":
            (tmp_path / "lists").write_bytes(content)
        else:
            found = kind_of_annotations(path)
            given_files: Any = path if found == "visual_genome" else [path]
            lists = exclusion_lists(**{found: given_files})
            assert tuple(lists) == LISTS
            (tmp_path / "lists").write_text(json.dumps(lists))
        exclusion = Exclusion([tmp_path / "lists"])
        for caption in (Caption("1", "train2014/a.jpg", "a", (("coco", "1"),)), Caption("2", ("a", "b"), None, (("flickr", "9001"),))):
            assert exclusion(caption) in (True, False)
            assert exclusion.part(caption) in ("train", "val")
    except BadInput as error:
        assert 20 < len(str(error)) < 2000
