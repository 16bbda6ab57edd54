"""SNLI-VE, NLVR2 and retrieval."""

import json

import pytest

from uniter.datasets.errors import BadInput
from uniter.datasets.text_db import TextDB


def pair(label="entailment", **more):
    given = {
        "Flickr30K_ID": "4804607632",
        "pairID": "4804607632.jpg#0r1e",
        "gold_label": label,
        "sentence1": "p",
        "sentence2": "A dog runs.",
    }
    return {**given, **more}


def test_entailment_numbers_the_labels_as_published(read, write):
    lines = [pair(label, pairID=str(place)) for place, label in enumerate(("contradiction", "entailment", "neutral", "-"))]
    examples, counts = read("ve", write("snli_ve_dev.jsonl", lines, lines=True))
    assert [example.fields["target"] for example in examples] == [{"labels": [k], "scores": [1.0]} for k in range(3)]
    assert counts == {"without_gold_label": 1}
    assert (
        examples[0].text == "A dog runs." and examples[0].image == "4804607632.jpg" and examples[0].origins == (("flickr", "4804607632"),)
    )


def test_entailment_in_the_older_spelling_and_without_labels(read, write):
    old = {"Flikr30kID": "123.jpg", "sentence2": "A cat."}
    (example,), _ = read("ve", write("test.jsonl", [old], lines=True))
    assert (example.id, example.image, example.fields) == ("0", "123.jpg", {})


def test_the_command_finds_published_keys_and_keeps_the_labels(build, write, tmp_path):
    path = write("snli_ve_train.jsonl", [pair()], lines=True)
    result = build(path, tmp_path / "ve.db", "--task", "ve", "--key", "flickr30k_{id:012d}.npz")
    assert result.exit_code == 0, result.output
    assert TextDB(tmp_path / "ve.db").image_key(0) == "flickr30k_004804607632.npz"
    assert json.loads((tmp_path / "ve.db/ans2label.json").read_text()) == {"contradiction": 0, "entailment": 1, "neutral": 2}


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (pair("maybe"), "line 1 of .* has the gold_label 'maybe'; expected contradiction, entailment, neutral or -"),
        ({"sentence2": "x"}, "line 1 of .* has no Flickr30K_ID"),
        (pair(sentence2=" "), "line 1 of .* has the sentence2 ' '; expected a text"),
        ([1], "line 1 of .* is a JSON list; expected an object"),
    ],
)
def test_bad_pairs_are_answered_in_a_sentence(read, write, line, sentence):
    with pytest.raises(BadInput, match=sentence):
        read("ve", write("snli.jsonl", [line], lines=True))


def test_a_line_that_was_cut_off_is_named(read, write):
    path = write("snli.jsonl", [pair(), pair()], lines=True)
    path.write_text(path.read_text()[:-30])
    with pytest.raises(BadInput, match=r"line 2 of .* is not JSON .*was it cut off"):
        read("ve", path)


def statement(**more):
    return {"identifier": "dev-850-0-1", "sentence": "Two dogs.", "label": "True", "left_url": "x", **more}


def test_statements_name_their_two_pictures(read, write):
    lines = [statement(), statement(identifier="dev-850-0-2", label="False"), statement(identifier="dev-850-0-3")]
    del lines[2]["label"]
    examples, _ = read("nlvr2", write("dev.json", lines, lines=True))
    assert examples[0].image == ("dev-850-0-img0.png", "dev-850-0-img1.png")
    assert [example.fields["target"] for example in examples] == [1, 0, None]
    assert examples[0].fields == {**statement(), "target": 1}


@pytest.mark.parametrize("missing", ["nlvr2_dev-850-0-img1.npz", "dev-850-0-img1.png", "dev-850-0-img1"])
def test_statements_about_missing_pictures_are_left_out(read, write, missing):
    lines = [statement(), statement(identifier="dev-851-0-0")]
    examples, counts = read("nlvr2", write("dev.json", lines, lines=True), join=[write("missing.json", [missing])])
    assert [example.id for example in examples] == ["dev-851-0-0"] and counts == {"image_missing": 1}


def test_bad_statements_are_answered_in_a_sentence(read, write):
    path = write("dev.json", [statement(identifier="nodash")], lines=True)
    with pytest.raises(BadInput, match="has the identifier 'nodash'; expected"):
        read("nlvr2", path)
    with pytest.raises(BadInput, match="is no list of names"):
        read("nlvr2", write("dev.json", [statement()], lines=True), join=[write("missing.json", {"a": 1})])


def test_retrieval_reads_karpathys_parts(build, write, tmp_path):
    sentences = [{"raw": "A dog.", "tokens": ["a", "dog"], "sentid": 5}, {"raw": "A cat.", "sentid": 6}]
    image = {"filepath": "val2014", "filename": "COCO_val2014_000000000042.jpg", "cocoid": 42, "split": "test", "sentences": sentences}
    path = write("dataset_coco.json", {"dataset": "coco", "images": [image, {**image, "split": "val", "sentences": []}]})
    result = build(path, tmp_path / "itm.db", "--task", "retrieval", "--split", "test", "--key", "coco_{parent}_{id:012d}.npz")
    assert result.exit_code == 0, result.output
    database = TextDB(tmp_path / "itm.db")
    assert list(database.ids) == ["5", "6"]
    assert json.loads((tmp_path / "itm.db/img2txts.json").read_text()) == {"coco_val2014_000000000042.npz": ["5", "6"]}
