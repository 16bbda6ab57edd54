"""Metrics against the golden ones and against hand-made cases with known answers."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from uniter.datasets.batches.candidates import inclusive_iou
from uniter.datasets.errors import BadInput
from uniter.datasets.text_db.annotations.answers import normalise_answer
from uniter.model import metrics


def test_golden_recalls_are_counted_correctly(uniter_tasks_golden):
    cases = json.loads((uniter_tasks_golden / "expect_itm_eval.json").read_text())
    for case in cases:
        # Rows and columns stand in the order of the numbers in the names.
        images = sorted(set(case["txt2img"].values()), key=lambda name: int(re.sub(r"\D", "", name)))
        texts = sorted(case["txt2img"], key=lambda name: int(re.sub(r"\D", "", name)))
        image_of_text = np.array([images.index(case["txt2img"][text]) for text in texts])
        figures = metrics.retrieval_recalls(np.array(case["scores"]), image_of_text)
        official, correct = case["official"], case["image_recall_counted_correctly"]
        for name in ("txt_r1", "txt_r5", "txt_r10", "txt_r_mean"):
            assert figures[name] == pytest.approx(official[name], abs=1e-12)
        for name, value in correct.items():
            assert figures[name] == pytest.approx(value, abs=1e-12)
            # The published code counts the first texts twice; its figures can exceed 1.
            assert official[name] >= figures[name]


def test_golden_iou(uniter_tasks_golden):
    cases = json.loads((uniter_tasks_golden / "expect_items.json").read_text())["computeIoU"]
    for case in cases:
        assert inclusive_iou(case["a"], case["b"]) == pytest.approx(case["iou"], abs=1e-12)


def test_recalls_by_hand():
    # Texts 0 and 1 belong to image 0, text 2 to image 1.
    scores = np.array([[0.9, 0.1], [0.2, 0.8], [0.7, 0.6]])
    figures = metrics.retrieval_recalls(scores, np.array([0, 0, 1]))
    # Image retrieval: text 0 right, texts 1 and 2 wrong. Text retrieval: image 0's best is text 0, image 1's best is text 1 (wrong).
    assert figures["img_r1"] == pytest.approx(1 / 3) and figures["txt_r1"] == 0.5
    assert figures["img_r5"] == figures["txt_r10"] == 1.0
    assert figures["r_mean"] == pytest.approx((figures["txt_r_mean"] + figures["img_r_mean"]) / 2)


def test_equal_scores_are_no_merit():
    figures = metrics.retrieval_recalls(np.zeros((20, 20)), np.arange(20))
    assert figures["r_mean"] == 0.0
    identity = metrics.retrieval_recalls(np.eye(20, dtype=np.float16), np.arange(20))
    assert identity["r_mean"] == 1.0


def test_recalls_of_random_matrices_agree_with_sorting():
    generator = np.random.default_rng(0)
    image_of_text = np.concatenate([np.arange(40), generator.integers(0, 40, 1500)])
    scores = generator.normal(size=(1540, 40))
    figures = metrics.retrieval_recalls(scores, image_of_text)
    by_image = np.argsort(-scores, axis=1)[:, :5]
    assert figures["img_r5"] == pytest.approx(np.mean([image in row for image, row in zip(image_of_text, by_image, strict=True)]))
    by_text = np.argsort(-scores, axis=0)[:10]
    assert figures["txt_r10"] == pytest.approx(np.mean([image in image_of_text[by_text[:, image]] for image in range(40)]))


def test_five_folds():
    generator = np.random.default_rng(1)
    image_of_text = generator.permutation(np.repeat(np.arange(20), 5))
    scores = generator.normal(size=(100, 20))
    expected = []
    for fold in range(5):
        texts = image_of_text // 4 == fold
        expected.append(metrics.retrieval_recalls(scores[texts][:, fold * 4 : fold * 4 + 4], image_of_text[texts] - fold * 4)["img_r1"])
    assert metrics.fold_recalls(scores, image_of_text)["img_r1"] == pytest.approx(np.mean(expected))
    with pytest.raises(BadInput, match="20 images cannot be cut into 3 equal folds"):
        metrics.fold_recalls(scores, image_of_text, folds=3)


def test_bad_scores_are_said():
    with pytest.raises(BadInput, match="not all finite"):
        metrics.retrieval_recalls(np.array([[0.0, np.nan]]), np.array([0]))
    with pytest.raises(BadInput, match="score every text with every image"):
        metrics.retrieval_recalls(np.zeros((2, 2)), np.array([0]))


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("The Cat.", "cat"),
        ("two dogs", "2 dogs"),
        ("none", "0"),
        ("1,000", "1000"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("well-done", "well done"),
        ("3.5", "3.5"),
        ("St. Louis", "st louis"),
        ("dont", "don't"),
        ("couldntve", "couldntve"),
        ("couldn'tve", "couldn't've"),
        ("couldnt've", "couldn't've"),
        ("somebody'd", "somebodyd"),
        ("yall'll", "y'all'll"),
        ("the", ""),
        ("yes!\n", "yes"),
        ("a\tred apple", "red apple"),
        ("it's", "it's"),
    ],
)
def test_normal_form_of_answers(answer, normal):
    assert normalise_answer(answer) == normal


def test_golden_answers_are_normalised_as_by_the_official_evaluation():
    cases = json.loads((Path(__file__).parents[1] / "golden" / "vqa-evaluation" / "cases.json").read_text())
    for answer, normal in cases["normal_forms"]:
        assert normalise_answer(answer) == normal, answer


def test_nlvr2_accuracy_and_consistency():
    truths = {"dev-1-0-0": True, "dev-1-1-0": False, "dev-1-0-1": True, "dev-2-0-0": False}
    predictions = {"dev-1-0-0": True, "dev-1-1-0": True, "dev-1-0-1": True, "dev-2-0-0": False}
    assert metrics.nlvr2_figures(predictions, truths) == {"accuracy": 0.75, "consistency": pytest.approx(2 / 3)}
    with pytest.raises(BadInput, match="no prediction for 'dev-1-0-0'"):
        metrics.nlvr2_figures({}, truths)
    with pytest.raises(BadInput, match="has 2 fields"):
        metrics.nlvr2_figures({}, {"dev-1": True})


def test_vcr_figures_by_hand():
    answers, rationales = np.array([0, 1, 2]), np.array([3, 3, 3])
    answer_scores = np.eye(4)[[0, 1, 0]]
    rationale_scores = np.eye(4)[[3, 0, 3]]
    expected = {"qa": pytest.approx(2 / 3), "qar": pytest.approx(2 / 3), "q2ar": pytest.approx(1 / 3)}
    assert metrics.vcr_figures(answer_scores, rationale_scores, answers, rationales) == expected
    with_each_answer = np.zeros((3, 4, 4))
    with_each_answer[[0, 1, 2], answers] = rationale_scores
    assert metrics.vcr_figures(answer_scores, with_each_answer, answers, rationales) == expected


def test_metrics_of_batches():
    scores = torch.tensor([[0.1, 0.9], [0.8, 0.2]])
    soft = {"answers": torch.tensor([[0.0, 0.6], [0.0, 1.0]])}
    assert metrics.answer_score({"scores": scores}, soft)["accuracy"].tolist() == pytest.approx([0.6, 0.0])
    assert metrics.statement_accuracy({"scores": scores}, {"truth": torch.tensor([1, 1])})["accuracy"].tolist() == [1.0, 0.0]
    regions = {"scores": scores, "region_counts": torch.tensor([2, 2])}
    overlaps = {"overlaps": torch.tensor([0.9, 0.6, 0.5, 0.9])}
    assert metrics.referred_accuracy(regions, overlaps)["accuracy"].tolist() == [1.0, 0.0], "more than half"
    groups = {"scores": torch.tensor([[0.9], [0.1], [0.5], [0.5]])}
    assert metrics.rank_accuracy(groups, {}, group_size=2)["accuracy"].tolist() == [1.0, 0.0]
    choices = {"scores": torch.tensor([[0.0, score] for score in (0.1, 0.3, 0.2, 0.0, 0.9, 0.1, 0.1, 0.1)])}
    right = metrics.choice_accuracy(choices, {"correct": torch.tensor([0, 1, 0, 0, 0, 0, 0, 1])})
    assert {name: values.tolist() for name, values in right.items()} == {"qa": [1.0], "qar": [0.0], "q2ar": [0.0]}
