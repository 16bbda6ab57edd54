"""Referring expressions: pickles that run nothing, the plain JSON, the order of the annotations."""

import json
import pickle
import tracemalloc

import numpy as np
import pytest

from uniter.datasets.errors import BadInput
from uniter.datasets.storage.plain_pickle import load_plain_pickle

INSTANCES = {
    "images": [{"id": 42, "file_name": "COCO_train2014_000000000042.jpg", "height": 100, "width": 200, "license": 1}],
    "annotations": [
        {"id": 7, "image_id": 42, "bbox": [1, 2, 30, 40], "category_id": 1, "area": 1200, "iscrowd": 0, "segmentation": []},
        {"id": 3, "image_id": 42, "bbox": [5.5, 6, 10, 10], "category_id": 1, "area": 100, "iscrowd": 0},
    ],
    "categories": [{"id": 1, "name": "dog"}],
}


def ref(number=1, split="train", annotation=3, image=42):
    sentences = [
        {"sent_id": 10 * number + k, "sent": text, "raw": text.upper(), "tokens": text.split()}
        for k, text in enumerate(("left dog", "dog"))
    ]
    given = {"ref_id": number, "ann_id": annotation, "image_id": image, "split": split, "sentences": sentences, "category_id": 1}
    return {**given, "sent_ids": [10 * number, 10 * number + 1]}


@pytest.fixture
def instances(write):
    return write("instances.json", INSTANCES)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_sentences_of_a_pickle_are_examples(read, instances, tmp_path, protocol):
    path = tmp_path / "refs(unc).p"
    path.write_bytes(pickle.dumps([ref(), ref(2, "val")], protocol))
    examples, counts = read("refcoco", path, split="train", join=[instances])
    assert [example.id for example in examples] == ["10", "11"] and counts == {"refs_of_other_parts": 1}
    identity = {"sent_id": 10, "sent": "left dog", "ref_id": 1, "ann_id": 3, "image_id": 42, "bbox": [5.5, 6, 10, 10]}
    assert examples[0].fields == identity
    assert examples[0].image == "COCO_train2014_000000000042.jpg" and examples[0].origins == (("coco", "42"),)
    assert len(read("refcoco", path, split="train,val", join=[instances])[0]) == 4


def test_the_plain_json_forms_say_the_same(read, write, instances, tmp_path):
    (tmp_path / "refs.p").write_bytes(pickle.dumps([ref()]))
    wanted = read("refcoco", tmp_path / "refs.p", join=[instances])
    assert read("refcoco", write("a.json", [ref()]), join=[instances]) == wanted
    assert read("refcoco", write("b.json", {"refs": [ref()]}), join=[instances]) == wanted
    assert read("refcoco", write("c.json", {"refs": [ref()], **INSTANCES})) == wanted


def test_the_order_of_rows_is_the_files_or_the_given_one(build, write, instances, tmp_path):
    refs = write("refs.json", [ref()])
    order = write("order.json", {"iid_to_ann_ids": {"42": [3, 7], "99": [1]}})
    for name, join, wanted in (("own", [instances], [7, 3]), ("given", [instances, order], [3, 7])):
        words = [word for path in join for word in ("--join", path)]
        result = build(refs, tmp_path / name, "--task", "refcoco", *words)
        assert result.exit_code == 0, result.output
        images = json.loads((tmp_path / name / "images.json").read_text())
        assert images == [{"id": 42, "file_name": "COCO_train2014_000000000042.jpg", "ann_ids": wanted, "height": 100, "width": 200}]
        assert [row["id"] for row in json.loads((tmp_path / name / "annotations.json").read_text())] == [7, 3]
        assert json.loads((tmp_path / name / "refs.json").read_text()) == [ref()]


class Runs:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (exec, (f"open({str(self.path)!r}, 'w').write('ran')",))


class Builds:
    """Through a class that is allowed by name only as an array."""

    def __reduce__(self):
        return (np.ndarray, (3,), {"x": 1})


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_hostile_pickles_run_nothing(read, instances, tmp_path, protocol):
    victim = tmp_path / "victim"
    path = tmp_path / "refs(unc).p"
    path.write_bytes(pickle.dumps([ref(), Runs(victim)], protocol))
    with pytest.raises(
        BadInput, match=r"refs\(unc\)\.p is no pickle of plain lists and maps \(it names .*exec, and nothing in a file may run"
    ):
        read("refcoco", path, join=[instances])
    assert not victim.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"cos\nsystem\n(S'true'\ntR.",
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cnumpy\nload\n(S'x'\ntR.",
        b"cnumpy.core.multiarray\n_reconstruct.__globals__\n.",
        b"c_codecs\nlookup\n(S'rot13'\ntR.",
        b"cuniter.datasets.storage.plain_pickle\nload_plain_pickle\n(S'x'\ntR.",
        b"(lp0\n",
        b"",
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"Pother\n.",
        b"cposix\nsystem\n(Vtrue\ntR.",
        b"(cos\nsystem\nVtrue\no.",
        b"(Vtrue\nios\nsystem\n.",
        b"\x80\x02cos\nsystem\n(Vtrue\nt\x81.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93(\x8c\x04truetR.",
        b"\x80\x04\x8c\x08builtins\x8c\x0cgetattr.__x__\x93.",
        b"\x80\x02\x82\x01.",  # an extension of copyreg's
        b"c__builtin__\nset\n(S'ab'\ntR.",
        # what is changed is a stand-in itself, or a map, by its attributes
        b"ccollections\nOrderedDict\n(tR.",
        b"cnumpy.core.multiarray\n_reconstruct\n}Vx\nI1\nsb.",
        b"}}Vx\nI1\nsb.",
        # an array of ten billion zeros, and one whose shape is not its content's
        b"cnumpy.core.multiarray\n_reconstruct\n(tR(I1\n(I10000000000\ntcnumpy\ndtype\n(Vi1\ntRI00\nL10000000000L\ntb.",
        b"cnumpy.core.multiarray\n_reconstruct\n(tR(I1\n(I10000000000\ntcnumpy\ndtype\n(Vi1\ntRI00\nVab\ntb.",
        b"cnumpy\ndtype\n(VO\ntR.",
        b"cnumpy\ndtype\n(V" + b"i1," * 5000 + b"i1\ntR.",
        b"(lp0\ng0\na.",  # a list that holds itself
        b"\x80\x02" + b")" + b"\x85" * 200_000 + b".",  # tuples in tuples
        b"\x80\x02})" + b"\x85" * 200_000 + b"I1\ns.",  # and as the name of something: their hash alone ended the process
        b"\x80\x04\x8f()" + b"\x85" * 200_000 + b"\x90.",
    ],
)
def test_broken_and_hostile_bytes_are_a_sentence(tmp_path, content):
    (tmp_path / "bad.p").write_bytes(content)
    with pytest.raises(BadInput, match=r"bad\.p is no pickle of plain lists and maps"):
        load_plain_pickle(tmp_path / "bad.p")


def test_a_memo_of_a_thousand_million_places_takes_no_memory(tmp_path):
    """Twelve bytes for which the interpreter's own unpickler clears gigabytes."""
    path = tmp_path / "refs.p"
    for place in (b"p1000000000\n", b"r\xff\xff\xff\x7f"):
        path.write_bytes(b"]" + place + b".")
        tracemalloc.start()
        try:
            assert load_plain_pickle(path) == []
            assert tracemalloc.get_traced_memory()[1] < 1 << 20
        finally:
            tracemalloc.stop()


def test_bytes_that_only_claim_to_be_many_take_no_memory(tmp_path):
    """BYTEARRAY8, a length, and nothing: the unpickler clears what the length says."""
    path = tmp_path / "refs.p"
    path.write_bytes(b"\x80\x05\x96" + (1 << 30).to_bytes(8, "little") + b".")
    tracemalloc.start()
    try:
        with pytest.raises(BadInput, match="is no pickle of plain lists and maps"):
            load_plain_pickle(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("innermost", [["x"], "x" * 100, np.zeros(20)])
def test_files_that_unfold_without_measure_are_refused(read, instances, tmp_path, innermost):
    value = innermost
    for _ in range(60):
        value = [value, value]
    path = tmp_path / "refs(unc).p"
    path.write_bytes(pickle.dumps([{**ref(), "more": value}], 2))
    with pytest.raises(BadInput, match=r"refs\(unc\)\.p is no pickle of plain lists and maps: its [\d,]+ bytes unfold to \d"):
        read("refcoco", path, join=[instances])
    # One long text that many refs share is the same in another form.
    path.write_bytes(pickle.dumps(["x" * 1_000_000] * 1_000, 2))
    with pytest.raises(BadInput, match="unfold to 1e\\+09 values and characters"):
        load_plain_pickle(path)


def test_an_oversized_file_is_not_read(tmp_path):
    with open(tmp_path / "refs.p", "wb") as file:
        file.truncate(3 << 30)
    with pytest.raises(BadInput, match=r"refs\.p is 3,221 MB, expected a pickle of at most 268"):
        load_plain_pickle(tmp_path / "refs.p")


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_plain_data_is_read_as_it_was_written(tmp_path, protocol):
    shared = ["a", "b"]
    value = {
        "lists": [shared, shared, [], [[]]],
        "maps": {1: {}, 2.5: None, None: True, b"bytes": False, "ü": "日本"},
        "numbers": [0, -1, 255, 70_000, 1 << 40, 1 << 300, 1e-300, float("inf")],
        "others": ((), (1,), (1, 2), (1, 2, 3), tuple(range(9)), b"x" * 300, "y" * 300),
    }
    if protocol >= 4:  # before, a set is written with the name of its class
        value |= {"sets": [set(), {1, "a"}, frozenset({2})]}
    (tmp_path / "plain.p").write_bytes(pickle.dumps(value, protocol))
    assert load_plain_pickle(tmp_path / "plain.p") == value


def test_texts_of_python_2_are_texts(tmp_path):
    (tmp_path / "old.p").write_bytes(b"\x80\x02]q\x00(U\x03manq\x01X\x05\x00\x00\x00womanq\x02U\x01\xe9T\x02\x00\x00\x00okS'it'\ne.")
    assert load_plain_pickle(tmp_path / "old.p") == ["man", "woman", "é", "ok", "it"]


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_arrays_of_numbers_are_admitted_and_others_not(tmp_path, protocol):
    path = tmp_path / "arrays.p"
    arrays = [np.arange(6, dtype=">i4").reshape(2, 3), np.asfortranarray(np.eye(2)), np.array([True]), np.float32(2.5), np.int64(-3)]
    path.write_bytes(pickle.dumps({"a": arrays}, protocol))
    read_back = load_plain_pickle(path)["a"]
    for ours, theirs in zip(read_back, arrays, strict=True):
        assert np.array_equal(ours, theirs)
    assert isinstance(read_back[3], float) and isinstance(read_back[4], int)
    path.write_bytes(pickle.dumps([np.array([ref()], dtype=object)], protocol))
    assert load_plain_pickle(path) == [[ref()]]  # an array of plain things is the list of them
    for bad in (np.array([ref(), Builds()], dtype=object), np.array(["text"]), Builds()):
        path.write_bytes(pickle.dumps([bad], protocol))
        with pytest.raises(BadInput):
            load_plain_pickle(path)


def test_arrays_become_lists_in_the_database(read, instances, tmp_path):
    (tmp_path / "refs.p").write_bytes(pickle.dumps([{**ref(), "box": np.array([1.0, 2.0])}]))
    assert len(read("refcoco", tmp_path / "refs.p", join=[instances])[0]) == 2


@pytest.mark.parametrize(
    ("refs", "sentence"),
    [
        ([], "holds no list of referring expressions"),
        ([ref(annotation=8)], "refers to annotation 8 of image 42, which the instances do not hold"),
        ([ref(image=43)], "refers to annotation 3 of image 43"),
        ([{"split": "train"}], "has the image_id None; expected an id"),
        ([{**ref(), "sentences": "x"}], "has the sentences 'x'; expected a list"),
    ],
)
def test_bad_refs_are_answered_in_a_sentence(read, write, instances, refs, sentence):
    with pytest.raises(BadInput, match=sentence):
        read("refcoco", write("refs.json", refs), join=[instances])


def test_bad_companions_are_answered_in_a_sentence(read, write, instances):
    refs = write("refs.json", [ref()])
    with pytest.raises(BadInput, match=r"needs one instances\.json with --join"):
        read("refcoco", refs)
    with pytest.raises(BadInput, match=r"orders 1 annotations of image 42, the instances hold 2"):
        read("refcoco", refs, join=[instances, write("order.json", {"42": [3]})])
    with pytest.raises(BadInput, match="did you mean 'train'"):
        read("refcoco", refs, split="trian", join=[instances])
    broken = {**INSTANCES, "annotations": [{"id": 1, "image_id": 42, "bbox": [1, 2]}]}
    with pytest.raises(BadInput, match=r"annotation 1 of .* has the bbox \[1, 2\]"):
        read("refcoco", refs, join=[write("broken.json", broken)])
