"""RefCOCO's and VCR's samples against the golden items, and the check of the order of regions."""

import dataclasses
import hashlib
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from uniter.datasets.batches.candidates import are_annotated, candidate_boxes, inclusive_iou, picture_of, read_pictures
from uniter.datasets.batches.collate import collate
from uniter.datasets.batches.corpus import Corpus, gather, open_corpus
from uniter.datasets.batches.downstream import multiple_choice, referred_region
from uniter.datasets.batches.example import UNKNOWN, Example, Masking, Sample
from uniter.datasets.batches.pretraining import masked_regions, masked_regions_with_classes, masked_text
from uniter.datasets.errors import BadInput
from uniter.datasets.image_db import ImageDB
from uniter.datasets.text_db import TextDB


def checksum(array: np.ndarray) -> str:
    return hashlib.sha1(np.ascontiguousarray(array, dtype=np.float32).tobytes()).hexdigest()


def example(corpus: Corpus, number: int) -> Example:
    return Example(corpus, number, tuple(corpus.image_rows_NK[number].tolist()))


def phrase(corpus: Corpus, number: int, *, annotated: bool) -> Sample:
    pictures = [read_pictures(text) for text in corpus.texts]
    return referred_region(example(corpus, number), random.Random(0), Masking(), pictures=pictures, annotated=annotated)


def boxes_of(corpus: Corpus, number: int) -> np.ndarray:
    record = corpus.record(number)
    picture = picture_of([read_pictures(text) for text in corpus.texts], corpus, number, record)
    return candidate_boxes(corpus.regions(int(corpus.image_rows_NK[number, 0])).norm_bb, picture.size)


def _check_item(sample: Sample, expected: dict, *, sequence: int = 0) -> None:
    shown = sample.sequences[sequence]
    assert shown.input_ids == expected["input_ids"]["values"]
    assert checksum(shown.features) == expected["img_feat"]["sha1_f32"]
    positions = collate([dataclasses.replace(sample, sequences=[shown])]).positions_R7
    assert checksum(positions.numpy()) == expected["img_pos_feat"]["sha1_f32"]


def test_golden_phrases_with_annotated_and_detected_boxes(uniter_tasks_golden: Path) -> None:
    items = json.loads((uniter_tasks_golden / "expect_items.json").read_text())
    arrays = np.load(uniter_tasks_golden / "expect_items.npz", allow_pickle=False)
    images = ImageDB(uniter_tasks_golden / "img_db" / "toy")
    corpus = gather([TextDB(uniter_tasks_golden / "txt_db" / "refcoco_train.db")], images, "refcoco", -1)
    assert [corpus.example_id(number) for number in range(len(corpus))] == items["ReDataset.ids"]
    for number, expected in items["ReDataset"].items():
        made = phrase(corpus, int(number), annotated=True)
        _check_item(made, expected)
        assert made.targets["region"].tolist() == expected["target"]["values"]

    keys = [images.keys_list[row].replace("coco_gt", "det_coco") for row in corpus.image_rows_NK[:, 0]]
    rows = np.array([[images.index_of(key)] for key in keys], dtype=np.int32)
    detected = dataclasses.replace(corpus, image_rows_NK=rows)
    for number, expected in items["ReEvalDataset_det"].items():
        made = phrase(detected, int(number), annotated=False)
        _check_item(made, expected)
        boxes = boxes_of(detected, int(number))
        np.testing.assert_allclose(boxes, arrays[f"ReEvalDataset_det|{number}|obj_boxes"], rtol=1e-6)
        wanted = arrays[f"ReEvalDataset_det|{number}|tgt_box"].tolist()
        assert made.targets["overlaps"].tolist() == pytest.approx([inclusive_iou(box, wanted) for box in boxes.tolist()], abs=1e-5)


def _data_corpus(golden: Path, which: str) -> Corpus:
    entry = json.loads((golden / "expected.json").read_text())["txt_db"]
    path = next(value["path"] for name, value in entry.items() if name.startswith("refcoco"))
    return open_corpus("refcoco", [golden / path], [golden / "img_db" / which], max_text_length=-1)


def test_golden_phrases_of_the_data_goldens(uniter_data_golden: Path) -> None:
    golden = json.loads((uniter_data_golden / "expected.json").read_text())["datasets"]
    annotated, detected = (_data_corpus(uniter_data_golden, which) for which in ("re_gt", "re_det"))
    assert [annotated.example_id(number) for number in range(len(annotated))] == golden["re_train"]["ids"]
    for number, expected in enumerate(golden["re_train"]["items"]):
        made = phrase(annotated, number, annotated=True)
        assert made.sequences[0].input_ids == expected["input_ids"]
        assert made.targets["region"].tolist() == expected["target"]
        positions = collate([made]).positions_R7
        assert len(positions) == expected["num_bb"] and float(positions.sum()) == pytest.approx(expected["pos_sum"], rel=1e-5)
    for corpus, kind in ((annotated, "re_eval_gt"), (detected, "re_eval_det")):
        for number, expected in enumerate(golden[kind]):
            made, boxes = phrase(corpus, number, annotated=kind == "re_eval_gt"), boxes_of(corpus, number)
            assert (made.id, len(boxes)) == (expected["sent_id"], expected["num_bb"])
            assert corpus.record(number)["bbox"] == pytest.approx(expected["tgt_box"])
            assert boxes[0].tolist() == pytest.approx(expected["obj_boxes_first"], rel=1e-5)
            assert float(boxes.sum()) == pytest.approx(expected["obj_boxes_sum"], rel=1e-5)
            assert made.targets["overlaps"].tolist() == pytest.approx(expected["iou"], abs=2e-5)


def test_golden_sets_tell_annotated_boxes_from_detected_ones(uniter_data_golden: Path) -> None:
    annotated, detected = (_data_corpus(uniter_data_golden, which) for which in ("re_gt", "re_det"))
    pictures = [read_pictures(text) for text in annotated.texts]
    assert are_annotated(annotated, pictures) and not are_annotated(detected, pictures)
    turned = [
        {image: dataclasses.replace(one, annotations=one.annotations[1:] + one.annotations[:1]) for image, one in pictures[0].items()}
    ]
    with pytest.raises(BadInput, match=r"are not the annotations in the order of images\.json"):
        are_annotated(annotated, turned)


def test_a_phrase_that_no_detected_region_covers_has_no_target(uniter_data_golden: Path) -> None:
    corpus = _data_corpus(uniter_data_golden, "re_det")
    for number in range(len(corpus)):
        targets = phrase(corpus, number, annotated=False).targets
        best = int(targets["overlaps"].argmax())
        assert targets["region"].tolist() == [best if targets["overlaps"][best] > 0.5 else UNKNOWN]


def test_regions_that_are_not_the_annotations_are_refused(uniter_data_golden: Path) -> None:
    with pytest.raises(BadInput, match=r"has \d+ regions, but its \d+ annotations are expected"):
        phrase(_data_corpus(uniter_data_golden, "re_det"), 0, annotated=True)


@pytest.fixture
def questions(uniter_tasks_golden: Path) -> Corpus:
    """Annotated and detected regions under the same keys, as the golden set has them."""
    toy = uniter_tasks_golden / "img_db" / "toy"
    annotated = next(toy.glob("feat_numbb*"))
    return open_corpus("vcr", [uniter_tasks_golden / "txt_db" / "vcr_toy.db"], [f"{annotated};{toy}"], max_text_length=-1)


def test_golden_choices(uniter_tasks_golden: Path, questions: Corpus) -> None:
    items = json.loads((uniter_tasks_golden / "expect_items.json").read_text())
    count = len(items["VcrDataset.qa.choice0"])
    for number in range(count):
        made = multiple_choice(example(questions, number), random.Random(0), Masking())
        assert len(made.sequences) == 8
        for place in range(8):
            task = ("qa", "qar")[place // 4]
            expected = items[f"VcrDataset.{task}.choice{place % 4}"][str(number)]
            _check_item(made, expected, sequence=place)
            assert made.sequences[place].text_types == expected["txt_type_ids"]["values"]
            assert made.targets["correct"][place] == expected["target"]["values"][0]


@pytest.mark.parametrize("part", ["val", "test"])
def test_golden_choices_of_evaluation(part: str, uniter_tasks_golden: Path, questions: Corpus) -> None:
    items = json.loads((uniter_tasks_golden / "expect_items.json").read_text())
    whole = items[f"VcrEvalDataset.{part}"]
    number = next(number for number in range(len(questions)) if questions.example_id(number) == whole["qid"])
    made = multiple_choice(example(questions, number), random.Random(0), Masking(), every_answer=part == "test")
    assert len(made.sequences) == whole["n_choices"]
    for place, sequence in enumerate(made.sequences):
        expected = items[f"VcrEvalDataset.{part}.choice{place}"][str(number)]
        _check_item(made, expected, sequence=place)
        assert sequence.text_types == expected["txt_type_ids"]["values"]
    assert made.targets["correct"][:4].argmax() == whole["qa_target"][0]
    assert (made.targets["correct"][4:].reshape(-1, 4).argmax(axis=1) == whole["qar_target"][0]).all()


def test_golden_items_of_the_second_stage(uniter_tasks_golden: Path, questions: Corpus) -> None:
    items = json.loads((uniter_tasks_golden / "expect_items.json").read_text())
    golden = items["MlmDatasetForVCR.qar"]
    assert golden
    for number, expected in golden.items():
        made = masked_text(example(questions, int(number)), random.Random(1000 + int(number)), Masking())
        _check_item(made, expected)
        assert made.sequences[0].text_types == expected["txt_type_ids"]["values"]
        assert made.targets["words"].tolist() == expected["txt_labels"]["values"]


def test_the_second_stage_hides_regions_of_both_kinds_beside_the_whole_story(questions: Corpus) -> None:
    text = questions.texts[0]
    hidden = {"annotated": 0, "detected": 0}
    for seed in range(20):
        number = seed % len(questions)
        record = questions.record(number)
        parts = [record["input_ids"], record["input_ids_as"][record["qa_target"]], record["input_ids_rs"][record["qar_target"]]]
        both = [questions.images.read_row(row, fields=("features", "norm_bb", "soft_labels")) for row in questions.image_rows_NK[number]]
        for sample, name in ((masked_regions, "features"), (masked_regions_with_classes, "soft_labels")):
            made = sample(example(questions, number), random.Random(seed), Masking())
            sequence = made.sequences[0]
            assert sequence.input_ids == [text.cls_id, *(word for part in parts for word in (*part, text.sep_id))]
            whole = np.concatenate([getattr(one, name) for one in both])
            assert sequence.masked is not None and len(sequence.masked) == len(whole) == len(sequence.features)
            assert np.array_equal(made.targets[name], whole[sequence.masked])
        hidden["annotated"] += int(sequence.masked[: len(both[0])].sum())
        hidden["detected"] += int(sequence.masked[len(both[0]) :].sum())
    assert min(hidden.values()) > 0


def test_at_least_one_word_of_each_text_is_hidden(questions: Corpus) -> None:
    sep = questions.texts[0].sep_id
    for seed in range(10):
        made = masked_text(example(questions, 0), random.Random(seed), Masking(words=1e-9))
        ids, labels = made.sequences[0].input_ids, made.targets["words"].tolist()
        ends = [place for place, word in enumerate(ids) if word == sep and labels[place] == -1]
        begins = [1, *(end + 1 for end in ends[:-1])]
        assert [place for place, label in enumerate(labels) if label >= 0] == begins and len(ends) == 3


def test_questions_of_a_test_part_teach_nothing(questions: Corpus) -> None:
    class Blind(TextDB):
        def record(self, number: int) -> dict[str, Any]:
            return {**super().record(number), "qa_target": -1, "qar_target": -1}

    blind = dataclasses.replace(questions, texts=(Blind(questions.texts[0].path),))
    with pytest.raises(BadInput, match="has no right answer and rationale"):
        masked_text(example(blind, 0), random.Random(0), Masking())


def test_golden_lengths_of_choices(uniter_tasks_golden: Path, questions: Corpus) -> None:
    """The published lengths, regions counted: of question and answer, whichever task asks."""
    items = json.loads((uniter_tasks_golden / "expect_items.json").read_text())
    path = questions.texts[0].path
    regions = questions.images.region_counts[questions.image_rows_NK].sum(axis=1)
    for task in ("qa", "qar"):
        assert (TextDB(path, lengths="id2len_qa").lengths + regions).tolist() == items[f"VcrDataset.{task}.lens(with id2len_qa)"]


def test_pictures_without_extent_are_refused(tmp_path: Path) -> None:
    (tmp_path / "images.json").write_text(json.dumps([{"id": 7, "ann_ids": [1], "height": 0, "width": 0}]))
    with pytest.raises(BadInput, match="picture 7 is 0 pixels high and 0 wide"):
        read_pictures(SimpleNamespace(path=tmp_path))
