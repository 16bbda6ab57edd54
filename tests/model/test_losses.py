"""Losses: golden ones, and numbers worked out by hand."""

import math

import numpy as np
import pytest
import torch

from uniter.model import UniterForPretraining, losses

TASKS = {
    "mlm": (UniterForPretraining.masked_words, losses.masked_words, "cross_entropy"),
    "mrfr": (UniterForPretraining.masked_features, losses.masked_features, "squared_error"),
    "mrc": (UniterForPretraining.masked_classes, losses.masked_classes, "cross_entropy"),
    "mrckl": (UniterForPretraining.masked_classes, losses.masked_distributions, "kl"),
    "itm": (UniterForPretraining.pairs, losses.pairs, "cross_entropy"),
    "itm_ot": (UniterForPretraining.aligned_pairs, losses.pairs, "cross_entropy"),
}


@pytest.mark.parametrize("task", TASKS)
def test_golden_losses(task, uniter_golden, golden_model, pack, close):
    head, loss, name = TASKS[task]
    inputs, expected = np.load(uniter_golden / f"inputs_{task}.npz"), np.load(uniter_golden / f"outputs_{task}.npz")
    batch = pack(inputs).batch
    outputs = head(golden_model, batch)
    terms = loss(outputs, batch.targets)
    close(terms[name], expected["loss"])
    close(losses.of({name: terms[name]}).number, expected["loss_mean"])
    if "hard_targets" in expected:
        assert losses.best_foreground_class(batch.targets["soft_labels"]).tolist() == expected["hard_targets"].tolist()
    if task == "itm_ot":
        matched = inputs["targets"] == 1
        close(terms["transport"][matched], expected["ot_pos"])
        close(-terms["transport"][~matched], expected["ot_neg"])
        close(terms["transport"].mean(), expected["ot_loss"])
        close(losses.of(terms, weights={"transport": 0.1}).number, expected["total_loss_lambda0p1"])


def test_cross_entropy_by_hand():
    outputs = {"scores": torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])}
    term = losses.masked_words(outputs, {"words": torch.tensor([1, -1, 0]), "places": torch.tensor([0, 2])})["cross_entropy"]
    torch.testing.assert_close(term, torch.tensor([-math.log(0.75), math.log(2.0)]))


def test_background_is_never_the_class_but_takes_part_in_kl():
    soft = torch.tensor([[0.9, 0.04, 0.06]])
    assert losses.best_foreground_class(soft).tolist() == [2]
    uniform = {"scores": torch.zeros(1, 3)}
    expected = sum(p * (math.log(p) - math.log(1 / 3)) for p in (0.9, 0.04, 0.06))
    assert float(losses.masked_distributions(uniform, {"soft_labels": soft})["kl"].sum()) == pytest.approx(expected, rel=1e-5)
    certain = losses.masked_distributions(uniform, {"soft_labels": torch.tensor([[1.0, 0.0, 0.0]])})["kl"]
    torch.testing.assert_close(certain, torch.tensor([[math.log(3.0), 0.0, 0.0]]))


def test_reductions():
    term = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert float(losses.of({"a": term}).number) == 2.5
    assert float(losses.of({"a": term}, reduction="rows").number) == 5.0
    assert float(losses.of({"a": term}, reduction="sum").number) == 10.0
    assert float(losses.of({"a": term, "b": term}, weights={"b": 0.1}).number) == pytest.approx(2.75)
    assert losses.of({"a": term}, reduction="rows").sums == {"a": (torch.tensor(10.0), 2)}
    with pytest.raises(ValueError, match="without loss terms"):
        losses.of({})


def test_mismatched_pairs_are_pushed_apart():
    outputs = {"scores": torch.zeros(2, 2), "distances": torch.tensor([0.2, 0.5])}
    terms = losses.pairs(outputs, {"matched": torch.tensor([1, 0])})
    torch.testing.assert_close(terms["transport"], torch.tensor([0.2, -0.5]))
