"""VQA: the usual table of answers, soft scores, the official normalisation, Visual Genome's questions."""

import json

import pytest

from uniter.datasets.errors import BadInput
from uniter.datasets.text_db import TextDB
from uniter.datasets.text_db.annotations.answers import normalise_answer
from uniter.datasets.text_db.annotations.vqa import answer_table, side_files, soft_scores


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("The Dog.", "dog"),
        ("two", "2"),
        ("none", "0"),
        ("dont know", "don't know"),
        ("Yes!", "yes"),
        ("1,000", "1000"),
        ("t-shirt", "t shirt"),
        ("t-shirt, blue", "t shirt blue"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("3.5", "3.5"),
        ("an apple\n", "apple"),
        ("somebody'd", "somebodyd"),
        ("  a ", ""),
    ],
)
def test_normalisation_as_the_official_evaluation(answer, normal):
    assert normalise_answer(answer) == normal


def test_answers_stay_from_nine_questions_on_most_frequent_first():
    given = ["Yes"] * 20 + ["yes."] + ["a dog"] * 9 + ["cat"] * 9 + ["rare"] * 8 + ["the"] * 30
    assert answer_table(given) == {"yes": 0, "cat": 1, "dog": 2}


@pytest.mark.parametrize(("people", "score"), [(1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_soft_scores(people, score):
    answers = ["Red"] * people + ["rare"] * (10 - people)
    assert soft_scores(answers, {"blue": 0, "red": 1}) == {"labels": [1], "scores": [score]}


def test_one_answer_alone_is_right():
    assert soft_scores(["red"], {"red": 4}) == {"labels": [4], "scores": [1.0]}
    assert soft_scores(["rare"], {"red": 4}) == {"labels": [], "scores": []}


def question(number, image=9, text="What is it?"):
    return {"question_id": number, "image_id": image, "question": text}


def annotation(number, *answers, best=None):
    return {
        "question_id": number,
        "image_id": 9,
        "multiple_choice_answer": best or answers[0],
        "answers": [{"answer": answer, "answer_id": place} for place, answer in enumerate(answers, start=1)],
    }


@pytest.fixture
def files(write):
    questions = write("v2_questions.json", {"info": {}, "data_subtype": "train2014", "questions": [question(n) for n in range(1, 13)]})
    ten = ["dog"] * 7 + ["cat"] * 3
    annotations = write(
        "v2_annotations.json", {"info": {}, "annotations": [annotation(n, *ten) for n in range(1, 12)] + [annotation(12, "emu")]}
    )
    return questions, annotations


def test_questions_with_annotations(read, files):
    examples, counts = read("vqa", files[0], join=[files[1]])
    assert len(examples) == 12 and counts == {"without_known_answer": 1}
    first = examples[0]
    assert (first.id, first.image, first.text) == ("1", "train2014/COCO_train2014_000000000009.jpg", "What is it?")
    assert first.origins == (("coco", "9"),)
    assert first.fields == {"question_id": 1, "question": "What is it?", "target": {"labels": [0], "scores": [1.0]}}
    assert examples[-1].fields["target"] == {"labels": [], "scores": []}
    assert side_files([files[0]], split=None, join=[files[1]]) == {"ans2label.json": {"dog": 0}}


def test_a_given_table_is_used(read, write, files):
    for given in (["cat", "dog"], {"dog": 1, "cat": 0}):
        examples, _ = read("vqa", files[0], join=[files[1], write("answers.json", given)])
        assert examples[0].fields["target"] == {"labels": [0, 1], "scores": [0.9, 1.0]}


def test_test_questions_have_no_target(read, write):
    path = write("q.json", {"data_subtype": "test-dev2015", "questions": [question(5)]})
    examples, _ = read("vqa", path)
    assert "target" not in examples[0].fields
    assert examples[0].image == "test2015/COCO_test2015_000000000009.jpg"


def test_the_part_may_stand_behind_the_questions(read, write):
    path = write("q.json", {"questions": [question(5)], "data_subtype": "val2014"})
    assert read("vqa", path)[0][0].image == "val2014/COCO_val2014_000000000009.jpg"


def test_visual_genome_questions_in_both_layouts(read, write):
    answers = write("answers.json", ["dog", "grass"])
    same = write("vg_questions.json", {"questions": [question(7, image=2)]})
    joined = write("vg_annotations.json", {"annotations": [annotation(7, "the dog")]})
    own = write("question_answers.json", [{"id": 2, "qas": [{"qa_id": 7, "image_id": 2, "question": "What is it?", "answer": "Dog."}]}])
    first, second = read("vqa", same, join=[joined, answers])[0][0], read("vqa", own, join=[answers])[0][0]
    assert first == second
    assert first.image == "2.jpg" and first.origins == (("vg", "2"),) and first.fields["target"] == {"labels": [0], "scores": [1.0]}


def test_the_command_keeps_the_answers_beside_the_database(build, files, tmp_path):
    result = build(files[0], tmp_path / "vqa.db", "--task", "vqa", "--join", files[1])
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "vqa.db/ans2label.json").read_text()) == {"dog": 0}
    assert TextDB(tmp_path / "vqa.db")["3"]["target"] == {"labels": [0], "scores": [1.0]}


@pytest.mark.parametrize(
    ("document", "sentence"),
    [
        ({"annotations": []}, "is no file of questions"),
        ({"questions": []}, "holds no questions"),
        ({"questions": [{"question_id": 1, "image_id": 2}]}, "question 0 of .* has the question None; expected a text"),
        ({"questions": [{"question_id": 1, "image_id": "x", "question": "?"}]}, "has the image_id 'x'; expected a whole number"),
        ({"questions": [3]}, "question 0 of .* is a JSON int; expected an object"),
    ],
)
def test_bad_questions_are_answered_in_a_sentence(read, write, document, sentence):
    with pytest.raises(BadInput, match=sentence):
        read("vqa", write("q.json", document))


def test_bad_companions_are_answered_in_a_sentence(read, write, files):
    with pytest.raises(BadInput, match=r"question 13\) has no annotation in"):
        read("vqa", write("q.json", {"questions": [question(13)]}), join=[files[1]])
    with pytest.raises(BadInput, match="is no table of answers"):
        read("vqa", files[0], join=[files[1], write("a.json", {"dog": 5})])
    with pytest.raises(BadInput, match="lists an answer twice"):
        read("vqa", files[0], join=[files[1], write("a.json", ["dog", "dog"])])
    with pytest.raises(BadInput, match="no answer occurs more than 8 times among the 1"):
        read("vqa", write("q.json", {"questions": [question(1)]}), join=[write("few.json", {"annotations": [annotation(1, "dog")]})])
    with pytest.raises(BadInput, match="leave --split away"):
        read("vqa", files[0], split="train")
    cut = files[1].with_name("cut.json")
    cut.write_text(files[1].read_text()[:300])
    with pytest.raises(BadInput, match=r"cut\.json ends or breaks in the middle"):
        read("vqa", files[0], join=[cut])
