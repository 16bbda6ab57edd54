"""GQA's questions as published: ids and images are texts, the answers are those of the balanced train and val questions."""

import json

import pytest

from uniter.datasets.errors import BadInput
from uniter.datasets.text_db import TextDB

TRAIN = {
    "02930152": {"question": "Is the sky dark?", "imageId": "2354786", "answer": "yes", "fullAnswer": "Yes.", "isBalanced": True},
    "07333408": {"question": "What is on the wall?", "imageId": "2375429", "answer": "pipe", "groups": {"global": None}},
    "07333405": {"question": "Is the pipe red?", "imageId": "2375429", "answer": "yes"},
}
VAL = {"05451384": {"question": "Who is it?", "imageId": "n161313", "answer": "girl"}}


def test_the_answers_are_those_of_all_files(tmp_path, write, build):
    write("train_balanced_questions.json", TRAIN)
    val = write("val_balanced_questions.json", VAL)
    assert build(f"{tmp_path}/{{train,val}}_balanced_questions.json", tmp_path / "gqa.db", "--task", "gqa").exit_code == 0
    database = TextDB(tmp_path / "gqa.db")
    assert list(database.ids) == [*TRAIN, *VAL] and list(database.image_keys) == ["2354786", "2375429", "n161313"]
    table = json.loads((tmp_path / "gqa.db" / "ans2label.json").read_text())
    assert table == {"yes": 0, "girl": 1, "pipe": 2}
    assert database.record(1)["target"] == {"labels": [2], "scores": [1.0]} and database.record(1)["answer"] == "pipe"
    # The train part alone, with the answers of val; and val with the list.
    assert build(tmp_path / "train_balanced_questions.json", tmp_path / "train.db", "--task", "gqa", "--join", val).exit_code == 0
    assert json.loads((tmp_path / "train.db" / "ans2label.json").read_text()) == table
    assert build(val, tmp_path / "val.db", "--task", "gqa", "--join", tmp_path / "gqa.db" / "ans2label.json").exit_code == 0
    assert TextDB(tmp_path / "val.db").record(0)["target"]["labels"] == [1]


def test_a_part_without_answers_and_answers_that_are_not_known(write, read):
    asked = write("test.json", {"1": {"question": "Is it?", "imageId": "7"}})
    examples, _ = read("gqa", asked)
    assert "target" not in examples[0].fields and examples[0].origins == (("vg", "7"),)
    examples, counts = read("gqa", write("val.json", VAL), join=[write("answers.json", ["yes"])])
    assert examples[0].fields["target"] == {"labels": [], "scores": []} and counts["without_known_answer"] == 1


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ([1], "is no file of GQA's questions; expected {question id: question}"),
        ({}, "holds no questions"),
        ({"1": 7}, "question '1' of .*json is a JSON int; expected an object"),
        ({"1": {"question": "Is it?"}}, "has the imageId None; expected a text"),
        ({"1": {"imageId": "7", "question": ""}}, "has the question ''; expected a text"),
    ],
)
def test_what_is_no_gqa_is_said(document, said, write, read):
    with pytest.raises(BadInput, match=said):
        read("gqa", write("questions.json", document))
