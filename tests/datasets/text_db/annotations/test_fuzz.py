"""Damaged annotation files and their companions: examples, or an error of ours with a sentence; what was read can be built."""

import json
import pickle
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uniter.datasets.errors import UniterError
from uniter.datasets.text_db.annotations.table import ANNOTATIONS
from uniter.datasets.text_db.building.build import build_text_db
from uniter.datasets.text_db.tokenizer import Tokenizer

INSTANCES = {
    "images": [{"id": 42, "file_name": "COCO_train2014_000000000042.jpg", "height": 100, "width": 200}],
    "annotations": [
        {"id": 7, "image_id": 42, "bbox": [1, 2, 30, 40], "category_id": 1, "area": 1200, "iscrowd": 0, "segmentation": []},
        {"id": 3, "image_id": 42, "bbox": [5.5, 6, 10, 10], "category_id": 1, "area": 100, "iscrowd": 0},
    ],
    "categories": [{"id": 1, "name": "dog"}],
}
SENTENCES = [{"sent_id": 10, "sent": "left dog", "raw": "Left", "tokens": ["left"]}, {"sent_id": 11, "sent": "dog"}]
REFS = [{"ref_id": 1, "ann_id": 3, "image_id": 42, "split": "train", "sentences": SENTENCES, "category_id": 1, "sent_ids": [10, 11]}]
VCR = {
    "annot_id": "train-0",
    "img_fn": "lsmdc_1/1054_Harry@0.jpg",
    "metadata_fn": "lsmdc_1/1054_Harry@0.json",
    "objects": ["person", "spaceship"],
    "question": ["Why", "is", [0, 1], "?"],
    "answer_choices": [["He", "."], [[1], "."], ["No", "."], ["Yes", "."]],
    "rationale_choices": [["A", "."], ["B", "."], ["C", "."], ["D", "."]],
    "answer_label": 3,
    "rationale_label": 1,
}
QUESTIONS = {"data_subtype": "train2014", "questions": [{"question_id": n, "image_id": 9, "question": "What is it?"} for n in (1, 2)]}
ANSWERS = {
    "annotations": [
        {"question_id": n, "multiple_choice_answer": "dog", "answers": [{"answer": "dog", "answer_id": 1}, {"answer": "a cat"}]}
        for n in (1, 2)
    ]
}
GENOME = [{"id": 2, "qas": [{"qa_id": 7, "image_id": 2, "question": "What is it?", "answer": "Dog."}]}]
PAIRS = [
    {"Flickr30K_ID": "4705552913", "gold_label": "neutral", "sentence2": "Two women.", "pairID": "4705552913.jpg#2r1n"},
    {"Flickr30K_ID": "4705552914", "gold_label": "-", "sentence2": "Two men.", "pairID": "4705552914.jpg#2r1n"},
]
STATEMENTS = [
    {"identifier": "dev-850-0-0", "sentence": "Two dogs.", "label": "True", "validation": {"1": "True"}},
    {"identifier": "dev-850-1-0", "sentence": "One dog.", "label": "False", "synset": "dog"},
]
KARPATHY = {
    "images": [{"filename": "a.jpg", "filepath": "val2014", "split": "test", "cocoid": 3, "sentences": [{"raw": "A man.", "sentid": 7}]}],
    "dataset": "coco",
}
GQA = {n: {"question": "Is it?", "imageId": "7", "answer": answer} for n, answer in (("1", "yes"), ("2", "no"))}
OWN = [{"image": "a.jpg", "text": "a dog", "label": "dog"}, {"image": "b.jpg", "label": ["cat"]}, {"img": "c.jpg", "label": 1}]
OWN_QUESTIONS = [{"image": "a.jpg", "question": "who?", "answer": "dog"}, {"image": "b.jpg", "question": "who?", "answers": ["a", "b"]}]
# By name: (task, the file, whether it is one value a line, its companions).
FILES = {
    "vqa": ("vqa", QUESTIONS, False, {"annotations.json": ANSWERS, "answers.json": ["dog", "cat"]}),
    "vqa of Visual Genome": ("vqa", GENOME, False, {"answers.json": {"dog": 0, "cat": 1}}),
    "vqa of one's own": ("vqa", OWN_QUESTIONS, True, {}),
    "gqa": ("gqa", GQA, False, {"val.json": {"3": {"question": "Who?", "imageId": "n1", "answer": "girl"}}}),
    "classify": ("classify", OWN[:1] + OWN[2:], True, {}),
    "classify with a list": ("classify", OWN[1:2], True, {"labels.json": ["cat", "dog"]}),
    "ve": ("ve", PAIRS, True, {}),
    "nlvr2": ("nlvr2", STATEMENTS, True, {"missing.json": ["nlvr2_dev-850-1-img0.npz"]}),
    "retrieval": ("retrieval", KARPATHY, False, {}),
    "refcoco": ("refcoco", REFS, False, {"instances.json": INSTANCES, "order.json": {"iid_to_ann_ids": {"42": [3, 7]}}}),
    "refcoco in one": ("refcoco", {"refs": REFS, **INSTANCES}, False, {}),
    "vcr": ("vcr", [VCR], True, {"vcr1images/lsmdc_1/1054_Harry@0.json": {"boxes": [[1, 2, 3, 4, 0.9]] * 2, "width": 9, "height": 9}}),
}


def content_of(fuzzing, document, lines):
    return b"\n".join(map(fuzzing.as_json, document)) if lines else fuzzing.as_json(document)


@pytest.fixture(scope="module")
def pieces():
    return Tokenizer.load()


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=settings().max_examples // 3)  # each builds a database
@given(data=st.data())
def test_fuzzed_annotations_are_examples_or_an_error_of_ours(tmp_path_factory, fuzzing, pieces, name, data):
    task, document, lines, companions = FILES[name]
    contents = {"file": content_of(fuzzing, document, lines), **{path: json.dumps(value).encode() for path, value in companions.items()}}
    chosen = data.draw(st.sampled_from(["file", *contents]), label="damaged")
    if data.draw(st.booleans(), label="values"):
        whole = {"file": document, **companions}[chosen]
        changed = fuzzing.with_another_value(data, whole)
        contents[chosen] = content_of(fuzzing, changed, lines and chosen == "file")
    else:
        contents[chosen] = fuzzing.damaged(data, contents[chosen])
    folder = tmp_path_factory.mktemp("fuzz")  # readers remember companions by path and size
    for path, content in contents.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    join = [folder / "vcr1images"] if task == "vcr" else [folder / path for path in companions]
    read_and_build(task, folder, join, pieces)


@settings(max_examples=settings().max_examples // 3)  # each builds a database
@given(data=st.data())
def test_fuzzed_pickles_of_refs_are_examples_or_an_error_of_ours(tmp_path_factory, fuzzing, pieces, data):
    folder = tmp_path_factory.mktemp("fuzz")
    content = pickle.dumps(REFS, protocol=data.draw(st.sampled_from([0, 2, 4])))
    (folder / "file").write_bytes(fuzzing.damaged(data, content))
    (folder / "instances.json").write_text(json.dumps(INSTANCES))
    read_and_build("refcoco", folder, [folder / "instances.json"], pieces)


def read_and_build(task, folder, join, pieces):
    row = ANNOTATIONS[task]
    try:
        examples = list(row.read(folder / "file", split=None, join=join, counts=Counter()))
        for example in examples:
            assert isinstance(example.id, str) and (example.text is None or isinstance(example.text, str))
        report = build_text_db(
            examples,
            folder / "db",
            tokenizer=pieces.with_words(row.added_words),
            lengths=row.lengths,
            side_files=lambda: row.side_files([folder / "file"], split=None, join=join),
        )
        assert report.counts["kept"] > 0
    except UniterError as error:
        assert 20 < len(str(error)) < 2000
