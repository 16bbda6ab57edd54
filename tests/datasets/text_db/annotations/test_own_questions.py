"""One's own questions and answers, and the rule that says which answers are learnt."""

import json
import logging

import pytest

from uniter.datasets.errors import BadInput
from uniter.datasets.text_db import TextDB
from uniter.datasets.text_db.annotations.table import ANNOTATIONS


def answers_of(folder):
    return json.loads((folder / "ans2label.json").read_text())


def test_all_answers_of_a_table_are_learnt_unless_a_number_is_given(tmp_path, build, caplog):
    path = tmp_path / "qa.csv"
    path.write_text("image,question,answer\n" + "".join(f"{n}.jpg,what is {n}?,{'dog' if n < 3 else f'thing {n}'}\n" for n in range(20)))
    assert build(path, tmp_path / "all.db", "--task", "vqa").exit_code == 0
    assert len(answers_of(tmp_path / "all.db")) == 18 and answers_of(tmp_path / "all.db")["dog"] == 0
    assert TextDB(tmp_path / "all.db").record(0)["target"] == {"labels": [0], "scores": [1.0]}
    with caplog.at_level(logging.WARNING):
        result = build(path, tmp_path / "one.db", "--task", "vqa", "--answers-more-than", 2, "--json")
    assert json.loads(result.output.strip().splitlines()[-1])["texts"]["without_known_answer"] == 17
    assert answers_of(tmp_path / "one.db") == {"dog": 0}
    assert (
        "1 of 18 answers are learnt, those of more than 2 questions each; 17 of 20 questions have another one"
        in caplog.text + result.output
    )


def test_answers_of_several_people_and_of_nobody(tmp_path, write, build):
    rows = [{"image": "a.jpg", "question": "who?", "answers": ["A dog", "dog", "cat"], "id": 7}, {"image": "b.jpg", "question": "what?"}]
    path = write("qa.jsonl", rows, lines=True)
    assert build(path, tmp_path / "qa.db", "--task", "vqa", "--join", write("answers.json", ["cat", "dog"])).exit_code == 0
    database = TextDB(tmp_path / "qa.db")
    assert list(database.ids) == ["7", "1"] and "target" not in database.record(1)
    assert database.record(0)["target"] == {"labels": [0, 1], "scores": [0.3, 0.6]}
    (tmp_path / "bars.csv").write_text("image,question,answer\na.jpg,who?,dog;dog;cat\n")
    assert build(tmp_path / "bars.csv", tmp_path / "bars.db", "--task", "vqa", "--label-separator", ";").exit_code == 0
    assert answers_of(tmp_path / "bars.db") == {"dog": 0}, "the most common answer of each question"


def test_the_rule_of_published_annotations_can_be_set(tmp_path, write, build):
    questions = write("q.json", {"questions": [{"question_id": n, "image_id": n, "question": "What is it?"} for n in range(4)]})
    annotations = write("a.json", {"annotations": [{"question_id": n, "multiple_choice_answer": "dog"} for n in range(4)]})
    result = build(questions, tmp_path / "o.db", "--task", "vqa", "--join", annotations)
    assert result.exit_code == 1 and "no answer occurs more than 8 times among the 4 of" in result.output
    assert "--answers-more-than" in result.output
    assert build(questions, tmp_path / "o.db", "--task", "vqa", "--join", annotations, "--answers-more-than", 3).exit_code == 0
    assert answers_of(tmp_path / "o.db") == {"dog": 0}


@pytest.mark.parametrize(
    ("options", "joined", "said"),
    [
        ({"label_separator": "|"}, False, "--label-separator is for a table of your own"),
        ({"answers_more_than": 3}, False, "chooses among the answers of annotations, but no annotations are joined"),
        ({"answers_more_than": 3}, True, "but the answers are those of .*answers.json; leave it away"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(options, joined, said, tmp_path, write):
    path = write("q.json", {"questions": [{"question_id": 1, "image_id": 1, "question": "What is it?"}]})
    join = [write("answers.json", ["dog"])] if joined else []
    row = ANNOTATIONS["vqa"].with_options("vqa", options, [path])
    with pytest.raises(BadInput, match=said):
        list(row.read(path, split=None, join=join, counts={}))


def test_a_table_without_questions_is_refused(tmp_path, build):
    (tmp_path / "qa.csv").write_text("image,label\na.jpg,dog\n")
    result = build(tmp_path / "qa.csv", tmp_path / "o.db", "--task", "vqa")
    assert result.exit_code == 1 and "has no question column (it has: image, label)" in result.output
