"""The official preprocessing's databases, made again from the same annotation files through the command."""

import json

import pytest

from uniter.datasets.text_db import TextDB


def sets(*goldens):
    """(annotation folder, official database, its meta.json) of every database of these sets that was made from annotations."""
    for golden in goldens:
        for path in sorted((golden / "txt_db").glob("*.db")):
            meta = json.loads((path / "meta.json").read_text())
            if meta.get("annotations") and meta.get("task") in ("nlvr", "re"):
                yield golden, path, meta


TEMPLATES = {"nlvr": "nlvr2_{stem}.npz", "re": "visual_grounding_coco_gt_{id:012d}.npz"}


def rebuild(golden, path, meta, build, out):
    first, *companions = (golden / name for name in meta["annotations"])
    words = [first, out, "--tokenizer", golden / meta["toker"], "--key", TEMPLATES[meta["task"]]]
    if meta["task"] == "re":
        words += ["--task", "refcoco", "--split", path.stem.split("_")[1]]
    else:
        words += ["--task", "nlvr2"]
        companions += [golden / meta["missing_imgs"]] if meta["missing_imgs"] else []
    for companion in companions:
        words += ["--join", companion]
    result = build(*words)
    assert result.exit_code == 0, result.output
    return TextDB(out), TextDB(path)


@pytest.mark.parametrize("task", ["nlvr", "re"])
def test_golden_records_of_the_official_preprocessing(uniter_data_golden, uniter_tasks_golden, build, tmp_path, task):
    made = 0
    for golden, path, meta in sets(uniter_data_golden, uniter_tasks_golden):
        if meta["task"] != task:
            continue
        made += 1
        ours, official = rebuild(golden, path, meta, build, tmp_path / f"{made}.db")
        assert list(ours.ids) == list(official.ids)
        assert ours.lengths.tolist() == official.lengths.tolist()
        for number, example in enumerate(official.ids):
            record, wanted = ours[example], official[example]
            if "sent" not in wanted:  # the text as it was read, which only ours keep under this name
                assert record.pop("sent") == wanted["sentence"]
            assert record == wanted
            assert ours.image_key(number) == official.image_key(number)
        for name in ("UNK", "CLS", "SEP", "MASK", "v_range"):
            assert ours.meta[name] == meta[name]
    assert made >= 2


def test_golden_side_files_of_referring_expressions(uniter_data_golden, uniter_tasks_golden, build, tmp_path):
    made = 0
    for golden, path, meta in sets(uniter_data_golden, uniter_tasks_golden):
        if meta["task"] == "re":
            made += 1
            rebuild(golden, path, meta, build, tmp_path / f"{made}.db")
            for name in ("refs.json", "images.json", "annotations.json", "categories.json"):
                ours = json.loads((tmp_path / f"{made}.db" / name).read_text())
                assert ours == json.loads((path / name).read_text()), name
    assert made >= 2


def test_golden_lengths_of_vcr(uniter_tasks_golden):
    from uniter.datasets.text_db.annotations.vcr import question_and_answer, question_answer_and_rationale

    official = TextDB(uniter_tasks_golden / "txt_db" / "vcr_toy.db")
    for name, length in (("id2len_qa", question_and_answer), ("id2len_qar", question_answer_and_rationale)):
        wanted = json.loads((official.path / f"{name}.json").read_text())
        assert {example: length(official[example]) for example in wanted} == wanted
