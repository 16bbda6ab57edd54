"""The tasks of the made-up world: readable by the readers of the authors' formats, true to the scenes, the same for the same seed."""

import json
from collections import Counter

import pytest

from uniter.datasets.errors import BadInput
from uniter.datasets.made_up.files import write_world
from uniter.datasets.made_up.tasks.table import write_tasks
from uniter.datasets.storage.plain_pickle import load_plain_pickle
from uniter.datasets.text_db.annotations.table import ANNOTATIONS

SOURCES = {
    "vqa": ("vqa/v2_OpenEnded_mscoco_train2014_questions.json", ["vqa/v2_mscoco_train2014_annotations.json"], None),
    "ve": ("snli_ve/snli_ve_train.jsonl", [], None),
    "nlvr2": ("nlvr2/train.json", [], None),
    "retrieval": ("retrieval/dataset_scenes.json", [], "train"),
    "refcoco": ("refcoco/refs(unc).p", ["refcoco/instances.json"], "train"),
    "refcoco+": ("refcoco+/refs(unc).p", ["refcoco+/instances.json"], "train"),
    "refcocog": ("refcocog/refs(umd).p", ["refcocog/instances.json"], "train"),
    "vcr": ("vcr/train.jsonl", [], None),
    "gqa": ("gqa/train_balanced_questions.json", ["gqa/val_balanced_questions.json"], None),
    "flickr30k_entities": ("flickr30k_entities/train.txt", [], None),
    "own_labels": ("own_labels/train_one.csv", [], None),
}
READERS = {"refcoco+": "refcoco", "refcocog": "refcoco", "flickr30k_entities": "flickr30k-entities", "own_labels": "classify"}
PLACES = {"left", "right", "above", "below"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    out = tmp_path_factory.mktemp("world")
    write_world(out, images=120, held_out=24, seed=3)
    counts = write_tasks(out)
    scenes = {scene["key"]: scene for part in ("train", "val") for scene in json.loads((out / f"scenes_{part}.json").read_text())["scenes"]}
    return out, counts, scenes


def examples(world, task):
    path, join, split = SOURCES[task]
    tasks = world[0] / "tasks"
    counts = Counter()
    return list(
        ANNOTATIONS[READERS.get(task, task)].read(tasks / path, split=split, join=[tasks / name for name in join], counts=counts)
    ), counts


@pytest.mark.parametrize("task", SOURCES)
def test_the_readers_of_the_authors_formats_read_them(world, task):
    found, _ = examples(world, task)
    assert len(found) > 20 and len({example.id for example in found}) == len(found)
    assert all(example.text for example in found)


def test_every_task_has_examples_and_other_tables_know_no_more(world):
    assert set(world[1]) == {"snli_ve" if task == "ve" else task for task in SOURCES}
    assert all(count > 50 for count in world[1].values())


def test_answers_are_true_of_the_scenes(world):
    out, _, scenes = world
    by_number = {scene["number"]: scene for scene in scenes.values()}
    document = json.loads((out / "tasks" / SOURCES["vqa"][0]).read_text())
    annotations = json.loads((out / "tasks" / SOURCES["vqa"][1][0]).read_text())["annotations"]
    kinds = Counter()
    for question, annotation in zip(document["questions"], annotations, strict=True):
        things = by_number[question["image_id"]]["things"]
        words, answer = question["question"].rstrip("?").split(), annotation["multiple_choice_answer"]
        kinds[annotation["answer_type"]] += 1
        assert len(annotation["answers"]) == 10
        assert Counter(said["answer"] for said in annotation["answers"]).most_common(1)[0][0] == answer
        if words[:2] == ["What", "colour"]:
            assert [thing["colour"] for thing in things if thing["shape"] == words[-1]] == [answer]
        elif words[0] == "Is":
            assert any(thing["colour"] == words[-2] and thing["shape"] == words[-1] for thing in things) == (answer == "yes")
        elif words[0] == "How":
            assert len(things) == int(answer)
    assert set(kinds) == {"yes/no", "number", "other"}


def test_phrases_of_captions_are_tied_to_all_things_that_look_so(world):
    found, counts = examples(world, "flickr30k_entities")
    for example in found:
        things = world[2][example.image.removesuffix(".jpg")]["things"]
        wanted = [thing["box"] for thing in things if f"{thing['colour']} {thing['shape']}" == " ".join(example.text.split()[1:])]
        assert sorted(example.fields["boxes"]) == sorted([x0, y0, x1 - x0, y1 - y0] for x0, y0, x1, y1 in wanted)
    assert counts["phrases_without_box"] > 0, "the ground has none"


def test_labels_are_the_colours_of_the_shapes_that_the_texts_name(world):
    found, _ = examples(world, "own_labels")
    table = sorted({thing["colour"] for scene in world[2].values() for thing in scene["things"]})
    for example in found[:200]:
        things = world[2][example.image.removesuffix(".jpg")]["things"]
        colours = [thing["colour"] for thing in things if thing["shape"] == example.text.split()[-1]]
        assert [table[number] for number in example.fields["target"]["labels"]] == colours


def test_soft_scores_and_the_table_of_answers_come_out_of_it(world):
    found, counts = examples(world, "vqa")
    scores = {score for example in found for score in example.fields["target"]["scores"]}
    assert {0.3, 1.0} <= scores <= {0.3, 0.6, 0.9, 1.0}
    assert counts["without_known_answer"] < len(found) / 4


def test_hypotheses_of_each_label_are_true_to_the_scenes(world):
    found, _ = examples(world, "ve")
    labels = Counter()
    for example in found:
        things = world[2][example.image.removesuffix(".jpg")]["things"]
        label = example.fields["gold_label"]
        labels[label] += 1
        if example.text.startswith("There is a"):
            phrase = " ".join(example.text.rstrip(".").split()[3:])
            assert (phrase in {f"{thing['colour']} {thing['shape']}" for thing in things}) == (label == "entailment")
    assert set(labels) == {"entailment", "contradiction", "neutral"} and min(labels.values()) > 50


def test_statements_hold_for_some_pairs_and_not_for_others(world):
    rows = [json.loads(line) for line in (world[0] / "tasks/nlvr2/train.json").read_text().splitlines()]
    labels = Counter(row["label"] for row in rows)
    assert set(labels) == {"True", "False"} and 0.3 < labels["True"] / len(rows) < 0.7
    sentences = {}
    for row in rows:
        split, number, _, place = row["identifier"].split("-")
        sentences.setdefault((split, number, place), set()).add(row["sentence"])
        left, right = (world[2][row[side].removesuffix(".jpg")]["things"] for side in ("left_url", "right_url"))
        if row["sentence"].startswith("There are more"):
            assert (len(left) > len(right)) == (row["label"] == "True")
        if row["sentence"].startswith("The left picture shows a "):
            assert any(thing["shape"] == row["sentence"][:-1].split()[-1] for thing in left) == (row["label"] == "True")
    assert all(len(texts) == 1 for texts in sentences.values()), "a set's sentence is one for all of its pairs"
    for example in examples(world, "nlvr2")[0]:
        assert all((world[0] / "tasks/nlvr2/images" / name.replace(".png", ".jpg")).is_file() for name in example.image)


def test_phrases_name_one_thing_alone(world):
    found, _ = examples(world, "refcoco")
    plain = placed = 0
    for example in found:
        things = world[2][example.image.removesuffix(".jpg")]["things"]
        wanted = things[example.fields["ann_id"] % 100]
        x0, y0, x1, y1 = wanted["box"]
        assert example.fields["bbox"] == [x0, y0, x1 - x0, y1 - y0]
        words = example.text.split()
        if words[0] in PLACES or words[-2:-1] == ["the"]:
            side = (set(words) & PLACES).pop()
            same = [t for t in things if {t["shape"], t["colour"]} & set(words)]
            there = [t for t in same if (t["box"][0] + t["box"][2] < 160) == (side == "left")]
            assert there == [wanted]
            placed += 1
        elif len(words) <= 3 and words[-1] != "thing":
            plain += 1
            described = [f"{t['size']} {t['colour']} {t['shape']}" for t in things]
            assert sum(text.endswith(example.text) for text in described) == 1
            assert f"{wanted['size']} {wanted['colour']} {wanted['shape']}".endswith(example.text)
    assert plain > 50 and placed > 50
    refs = load_plain_pickle(world[0] / "tasks/refcoco/refs(unc).p")
    assert {ref["split"] for ref in refs} == {"train", "val", "testA", "testB"}


def test_the_three_sets_of_phrases_differ_as_the_authors_do(world):
    by_looks, long = (examples(world, name)[0] for name in ("refcoco+", "refcocog"))
    assert not any(PLACES & set(example.text.split()) for example in by_looks)
    assert any(PLACES & set(example.text.split()) for example in examples(world, "refcoco")[0])
    for example in long:
        things = world[2][example.image.removesuffix(".jpg")]["things"]
        said, relation, other = example.text.removeprefix("the ").replace(" that is ", "|").replace(" the ", "|").split("|")
        described = [f"{thing['size']} {thing['colour']} {thing['shape']}" for thing in things]
        assert described[example.fields["ann_id"] % 100] == said and described.count(other) == 1
        assert relation in ("left of", "right of", "above", "below")
    refs = load_plain_pickle(world[0] / "tasks/refcocog/refs(umd).p")
    assert {ref["split"] for ref in refs} == {"train", "val", "test"}


def test_multiple_choice_has_one_right_answer_somewhere(world):
    rows = [json.loads(line) for line in (world[0] / "tasks/vcr/train.jsonl").read_text().splitlines()]
    for row in rows:
        things = world[2][row["img_fn"].split("/")[1].removesuffix(".jpg")]["things"]
        shown = {f"{thing['colour']} {thing['shape']}" for thing in things}
        phrases = [" ".join(choice[1:-2]) for choice in row["answer_choices"]]
        assert [phrase in shown for phrase in phrases] == [place == row["answer_label"] for place in range(4)]
        assert len({json.dumps(choice) for choice in row["rationale_choices"]}) == 4
        assert (world[0] / "tasks/vcr/vcr1images" / row["metadata_fn"]).is_file()
    for name in ("answer_label", "rationale_label"):
        assert set(Counter(row[name] for row in rows)) == {0, 1, 2, 3}, "the right one is anywhere"


def test_retrieval_has_karpathys_parts(world):
    document = json.loads((world[0] / "tasks/retrieval/dataset_scenes.json").read_text())
    assert Counter(image["split"] for image in document["images"]) == {"train": 96, "val": 12, "test": 12}


def test_the_same_seed_gives_the_same_files_and_another_asks_otherwise(world, tmp_path):
    def files(folder):
        return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}

    write_tasks(world[0], tmp_path / "again")
    write_tasks(world[0], tmp_path / "again")
    assert files(tmp_path / "again") == files(world[0] / "tasks")
    write_tasks(world[0], tmp_path / "other", seed=1)
    assert files(tmp_path / "other") != files(world[0] / "tasks")


def test_a_folder_without_a_world_is_said(tmp_path):
    with pytest.raises(BadInput, match="holds no made-up world"):
        write_tasks(tmp_path)


def test_the_command_writes_them_too(tmp_path):
    from click.testing import CliRunner

    from uniter.cli.scenes import main

    result = CliRunner().invoke(main, [str(tmp_path / "w"), "--images", "20", "--held-out", "8", "--tasks", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["tasks"]["vqa"] > 20 and (tmp_path / "w/tasks/vcr/train.jsonl").is_file()
