"""Tables of one's own labels: CSV, TSV, JSONL, parquet; one label, several, a score; hateful memes' JSONL as it is."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from uniter.datasets.errors import BadInput
from uniter.datasets.text_db import TextDB
from uniter.datasets.text_db.annotations.table import ANNOTATIONS

ROWS = [
    {"image": "a.jpg", "text": "a dog", "label": "dog"},
    {"image": "b.jpg", "text": "", "label": "cat"},
    {"image": "c.jpg", "text": "two", "label": "dog"},
    {"image": "d.jpg", "text": "none", "label": None},
]


def table(tmp_path, layout, rows=ROWS):
    path = tmp_path / f"pairs.{layout}"
    if layout == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif layout == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif layout == "json":
        path.write_text(json.dumps(rows))
    else:
        mark = {"csv": ",", "tsv": "\t"}[layout]
        cells = [list(rows[0]), *([str("" if value is None else value) for value in row.values()] for row in rows)]
        path.write_text("".join(mark.join(row) + "\n" for row in cells))
    return path


@pytest.mark.parametrize("layout", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_every_layout_says_the_same(layout, tmp_path, build):
    result = build(table(tmp_path, layout), tmp_path / "out.db", "--task", "classify", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["texts"]["without_label"] == 1
    database = TextDB(tmp_path / "out.db")
    assert [database.record(number).get("target") for number in range(4)] == [
        {"labels": [1], "scores": [1.0]}, {"labels": [0], "scores": [1.0]}, {"labels": [1], "scores": [1.0]}, None,
    ]  # fmt: skip
    assert database.lengths.tolist()[1] == 0, "a picture alone"
    assert json.loads((tmp_path / "out.db" / "ans2label.json").read_text()) == {"cat": 0, "dog": 1}
    assert json.loads((tmp_path / "out.db" / "labels.json").read_text()) == {"kind": "one"}


def test_hateful_memes_as_it_is(tmp_path, write, build):
    rows = [{"id": 42953, "img": "img/42953.png", "label": 0, "text": "its their character"}]
    rows += [{"id": 8291, "img": "img/08291.png", "label": 1, "text": "putting bows"}]
    train = write("train.jsonl", rows, lines=True)
    test = write("test.jsonl", [{"id": 16395, "img": "img/16395.png", "text": "handjobs sold separately"}], lines=True)
    for path in (train, test):
        assert build(path, path.with_suffix(".db"), "--task", "classify").exit_code == 0
    database = TextDB(train.with_suffix(".db"))
    assert list(database.ids) == ["42953", "8291"] and list(database.image_keys) == ["42953", "08291"]
    assert [database.record(number)["target"]["labels"] for number in (0, 1)] == [[0], [1]]
    assert "target" not in TextDB(test.with_suffix(".db")).record(0)
    assert not (test.with_suffix(".db") / "ans2label.json").exists()


def test_several_labels_and_scores(tmp_path, write, build, read):
    (tmp_path / "several.csv").write_text("image,label\na.jpg,dog|cat\nb.jpg,cat\n")
    (tmp_path / "score.csv").write_text("image,label\na.jpg,1.5\nb.jpg,-2\n")
    lists = write("lists.jsonl", [{"image": "a.jpg", "labels": ["dog", "cat"]}, {"image": "b.jpg", "labels": []}], lines=True)
    for path, options, kind in (
        (tmp_path / "several.csv", ["--label-separator", "|"], "several"),
        (lists, [], "several"),
        (tmp_path / "score.csv", ["--score"], "score"),
    ):
        out = path.with_suffix(".db")
        result = build(path, out, "--task", "classify", *options)
        assert result.exit_code == 0, result.output
        assert json.loads((out / "labels.json").read_text()) == {"kind": kind}
    assert TextDB(tmp_path / "several.db").record(0)["target"] == {"labels": [0, 1], "scores": [1.0, 1.0]}
    assert TextDB(tmp_path / "lists.db").record(1)["target"] == {"labels": [], "scores": []}
    assert TextDB(tmp_path / "score.db").record(1)["target"] == {"labels": [0], "scores": [-2.0]}
    examples, _ = read("classify", tmp_path / "score.csv")
    assert [example.fields["target"]["labels"] for example in examples] == [[1], [0]], "without --score a number is a name"


def test_labels_of_several_files_are_numbered_together(tmp_path, build):
    (tmp_path / "train.csv").write_text("image,label\na.jpg,10\nb.jpg,9\n")
    (tmp_path / "val.csv").write_text("image,label\nc.jpg,2\n")
    assert build(f"{tmp_path}/{{train,val}}.csv", tmp_path / "both.db", "--task", "classify").exit_code == 0
    assert json.loads((tmp_path / "both.db" / "ans2label.json").read_text()) == {"2": 0, "9": 1, "10": 2}
    assert list(TextDB(tmp_path / "both.db").ids) == ["0-0", "0-1", "1-0"]
    listed = tmp_path / "both.db" / "ans2label.json"
    assert build(tmp_path / "val.csv", tmp_path / "val.db", "--task", "classify", "--join", listed).exit_code == 0
    assert TextDB(tmp_path / "val.db").record(0)["target"]["labels"] == [0]


@pytest.mark.parametrize(
    ("content", "options", "said"),
    [
        ("image,label\na.jpg,dog\nb.jpg,dog\n", {}, "has the label 'dog' in all rows, so there is nothing to tell apart"),
        ("text,label\nhi,dog\nhi,cat\n", {}, r"row 0 of .*pairs.csv has no image column \(it has: text, label\)"),
        ("image,label\na.jpg,dog\nb.jpg,7\n", {"score": True}, "the label of row 0 of .* is 'dog'; expected a number, because --score"),
        ("image,label\na.jpg,nan\nb.jpg,7\n", {"score": True}, "is 'nan'; expected a number"),
        ("image,label\na.jpg,dog||cat\n", {"label_separator": "|"}, "expected labels between '|', none of them empty"),
        ("image,label\n", {}, "has no row; expected a table"),
        ("", {}, "has no row; expected a table"),
    ],
)
def test_what_cannot_be_labels_is_said(content, options, said, tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text(content)
    with pytest.raises(BadInput, match=said.replace("|", r"\|")):
        list(ANNOTATIONS["classify"].with_options("classify", options, [path]).read(path, split=None, join=[], counts={}))


def test_labels_that_are_not_in_the_list_and_fractions(tmp_path, write, build):
    path = write("pairs.jsonl", [{"image": "a.jpg", "label": "dgo"}, {"image": "b.jpg", "label": "cat"}], lines=True)
    result = build(path, tmp_path / "o.db", "--task", "classify", "--join", write("labels.json", ["cat", "dog"]))
    assert result.exit_code == 1 and "unknown label 'dgo'; did you mean 'dog'?" in result.output
    path = write("scores.jsonl", [{"image": "a.jpg", "label": 0.5}, {"image": "b.jpg", "label": 1}], lines=True)
    result = build(path, tmp_path / "o.db", "--task", "classify")
    assert result.exit_code == 1 and "is the fraction 0.5; a number to be predicted is asked for with --score" in result.output
    result = build(path, tmp_path / "o.db", "--task", "classify", "--answers-more-than", 3)
    assert result.exit_code == 2 and "--answers-more-than does nothing with --task classify; it is of --task vqa" in result.output
    assert build(path, tmp_path / "o.db", "--task", "captions", "--score").exit_code == 1
