"""VCR: tags as new word pieces, targets, lengths, the annotated boxes."""

import json

import pytest

from uniter.datasets.errors import BadInput
from uniter.datasets.text_db import TextDB
from uniter.datasets.text_db.annotations.vcr import TAG_WORDS, tag_of
from uniter.datasets.text_db.tokenizer import Tokenizer


def row(number=0, **more):
    given = {
        "annot_id": f"train-{number}",
        "img_fn": "lsmdc_1/1054_Harry@0.jpg",
        "metadata_fn": "lsmdc_1/1054_Harry@0.json",
        "objects": ["person", "person", "diningtable", "spaceship"],
        "question": ["Why", "is", [0, 1], "at", [2], "?"],
        "answer_choices": [["He", "is", "."], [[3], "."], ["No", "."], ["Yes", "it", "is", "."]],
        "rationale_choices": [["A", "."], ["B", "b", "."], ["C", "."], ["D", "."]],
        "answer_label": 3,
        "rationale_label": 1,
    }
    return {**given, **more}


def test_there_are_eighty_one_different_tags():
    assert len(TAG_WORDS) == len(set(TAG_WORDS)) == 81
    assert (TAG_WORDS[0], TAG_WORDS[79], TAG_WORDS[80]) == ("[[person]]", "[[toothbrush]]", "[[object]]")
    assert (
        tag_of("fire hydrant") == "[[fire_hydrant]]" and tag_of("diningtable") == "[[dining_table]]" and tag_of("spaceship") == "[[object]]"
    )


def test_texts_with_tags(read, write):
    (example,), _ = read("vcr", write("train.jsonl", [row()], lines=True))
    assert example.text == "Why is [[person]] and [[person]] at [[dining_table]] ?"
    assert example.texts["input_ids_as"] == ["He is .", "[[object]] .", "No .", "Yes it is ."]
    assert example.image == ("vcr_gt_train/1054_Harry@0.jpg", "vcr_train/1054_Harry@0.jpg")
    assert (example.fields["qa_target"], example.fields["qar_target"]) == (3, 1)


def test_the_test_part_has_no_labels(read, write):
    blind = row(annot_id="test-4")
    del blind["answer_label"], blind["rationale_label"]
    (example,), _ = read("vcr", write("test.jsonl", [blind], lines=True))
    assert (example.fields["qa_target"], example.fields["qar_target"]) == (-1, -1)
    assert example.image[0].startswith("vcr_gt_test/")


def test_the_database_holds_tags_behind_the_vocabulary_and_both_lengths(build, write, tmp_path):
    out = tmp_path / "vcr.db"
    result = build(write("train.jsonl", [row(), row(1)], lines=True), out, "--task", "vcr", "--key", "{parent}_{stem}.npz")
    assert result.exit_code == 0, result.output
    plain, database = Tokenizer.load(), TextDB(out)
    record = database["train-0"]
    person, table = plain.vocab_size, plain.vocab_size + TAG_WORDS.index("[[dining_table]]")
    assert record["input_ids"] == [
        *plain.encode("Why is"),
        person,
        *plain.encode("and"),
        person,
        *plain.encode("at"),
        table,
        *plain.encode("?"),
    ]
    assert record["input_ids_as"][1] == [plain.vocab_size + 80, *plain.encode(".")]
    assert [len(ids) for ids in record["input_ids_rs"]] == [2, 3, 2, 2]
    assert record["img_fname"] == ["vcr_gt_train_1054_Harry@0.npz", "vcr_train_1054_Harry@0.npz"]
    question = len(record["input_ids"])
    assert json.loads((out / "id2len_qa.json").read_text())["train-0"] == question + 4
    assert json.loads((out / "id2len_qar.json").read_text())["train-0"] == question + 4 + 3
    assert database.v_range == plain.v_range, "no tag replaces a word at random"
    assert (out / "vocab.txt").read_text().splitlines()[person] == "[[person]]"


def test_annotated_boxes_for_the_extractor(build, write, tmp_path):
    metadata = {"boxes": [[1, 2, 11, 22, 0.9], [0, 0, 5, 5, 1], [3, 3, 4, 9, 1], [1, 1, 2, 2, 1]], "height": 40, "width": 50, "names": []}
    write("vcr1images/lsmdc_1/1054_Harry@0.json", metadata)
    path = write("train.jsonl", [row(), row(1)], lines=True)
    result = build(path, tmp_path / "vcr.db", "--task", "vcr", "--join", tmp_path / "vcr1images")
    assert result.exit_code == 0, result.output
    boxes = json.loads((tmp_path / "vcr.db/boxes.json").read_text())
    assert boxes["images"] == [{"id": 0, "file_name": "lsmdc_1/1054_Harry@0.jpg", "height": 40, "width": 50}]
    assert boxes["annotations"][0] == {"id": 0, "image_id": 0, "bbox": [1, 2, 10, 20]} and len(boxes["annotations"]) == 4


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"question": ["Why", [4]]}, r"the question of line 1 of .* refers to \[4\] where the picture has 4 objects"),
        ({"question": "Why?"}, "expected a list of words and lists of object numbers"),
        ({"answer_choices": [["a"]]}, "line 1 of .* has 1 answer_choices; expected 4"),
        ({"answer_label": 4}, "has the answer_label 4; expected 0 to 3"),
        ({"objects": None}, "has the objects None; expected a list"),
        ({"annot_id": ""}, "has the annot_id ''; expected a text"),
    ],
)
def test_bad_rows_are_answered_in_a_sentence(read, write, change, sentence):
    with pytest.raises(BadInput, match=sentence):
        read("vcr", write("train.jsonl", [row(**change)], lines=True))


def test_metadata_outside_the_folder_are_refused(build, write, tmp_path):
    write("vcr1images/other.json", {})
    path = write("train.jsonl", [row(metadata_fn="../secret.json")], lines=True)
    result = build(path, tmp_path / "vcr.db", "--task", "vcr", "--join", tmp_path / "vcr1images")
    assert result.exit_code == 1 and "expected a name below the folder" in result.stderr
