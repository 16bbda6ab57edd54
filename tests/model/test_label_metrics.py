"""Figures of one's own labels, against their definitions: pairs counted one by one, curves drawn point by point."""

import itertools

import numpy as np
import pytest
from scipy.stats import rankdata, spearmanr

from uniter.model.label_metrics import auroc, average_precision, label_figures, mean_ranks, score_figures


def cases(count: int = 20) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    found = []
    for number in range(count):
        truth = rng.random(30) < 0.3
        truth[:2] = True, False
        scores = rng.random(30) + 0.3 * truth
        found.append((np.round(scores, 1 if number % 2 else 8), truth))  # with ties and without
    return found


def test_auroc_is_the_share_of_pairs_in_the_right_order() -> None:
    for scores, truth in cases():
        pairs = [(s > t) + 0.5 * (s == t) for s, t in itertools.product(scores[truth], scores[~truth])]
        assert auroc(scores, truth) == pytest.approx(np.mean(pairs))


def test_average_precision_is_the_sum_of_precision_over_steps_of_recall() -> None:
    for scores, truth in cases():
        total, before = 0.0, 0.0
        for threshold in sorted(set(scores.tolist()), reverse=True):
            given = scores >= threshold
            recall = (truth & given).sum() / truth.sum()
            total += (recall - before) * (truth & given).sum() / given.sum()
            before = recall
        assert average_precision(scores, truth) == pytest.approx(total)


def test_ranks_and_their_correlation_are_scipys() -> None:
    for scores, truth in cases():
        other = np.round(scores + truth, 1)
        assert mean_ranks(scores).tolist() == rankdata(scores).tolist()
        figures = score_figures(scores, other)
        assert figures["spearman"] == pytest.approx(spearmanr(scores, other).statistic)
        assert figures["squared_error"] == pytest.approx(sum((s - o) ** 2 for s, o in zip(scores, other, strict=True)) / 30)
    assert set(score_figures(np.zeros(3), np.arange(3))) == {"squared_error"}


def test_macro_f1_and_accuracy_by_hand() -> None:
    truth = np.array([[1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 1, 0]], dtype=bool)
    chosen = np.array([[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0]], dtype=bool)
    figures = label_figures(chosen.astype(float), truth, chosen)
    # The first label: precision 1/2, recall 1; the second: precision 1, recall 2/3; the third is nowhere.
    assert figures["macro_f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert figures["accuracy"] == 0.75


def test_what_a_part_does_not_determine_is_not_there() -> None:
    truth = np.array([[0, 1], [0, 1]], dtype=bool)
    assert set(label_figures(np.ones((2, 2)), truth, truth, two_sided=True)) == {"accuracy", "macro_f1"}
    truth = np.array([[1, 0], [0, 1], [0, 1]], dtype=bool)
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.95, 0.05]])
    two = label_figures(probabilities, truth, probabilities > 0.5, two_sided=True)
    assert two["auroc"] == 0.5 and two["average_precision"] == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)


def test_they_are_scikit_learns() -> None:
    """Where it is installed; it is no dependency, so the definitions above are what always runs."""
    learn = pytest.importorskip("sklearn.metrics", reason="scikit-learn is no dependency; the definitions are tested above")
    rng = np.random.default_rng(1)
    probabilities, numbers = rng.dirichlet(np.ones(4), 60), rng.integers(0, 4, 60)
    truth, chosen = np.eye(4, dtype=bool)[numbers], np.eye(4, dtype=bool)[probabilities.argmax(axis=1)]
    figures = label_figures(probabilities, truth, chosen)
    assert figures["accuracy"] == pytest.approx(learn.accuracy_score(numbers, probabilities.argmax(axis=1)))
    assert figures["macro_f1"] == pytest.approx(learn.f1_score(numbers, probabilities.argmax(axis=1), average="macro"))
    assert figures["auroc"] == pytest.approx(learn.roc_auc_score(numbers, probabilities, multi_class="ovr"))
    assert figures["average_precision"] == pytest.approx(learn.average_precision_score(truth, probabilities))
