"""Pre-training heads against the golden scores."""

import numpy as np
import pytest
import torch

from uniter.model import UniterForPretraining
from uniter.model.heads.pretraining import full_product

HEADS = {
    "mlm": UniterForPretraining.masked_words,
    "mrfr": UniterForPretraining.masked_features,
    "mrc": UniterForPretraining.masked_classes,
    "mrckl": UniterForPretraining.masked_classes,
    "itm": UniterForPretraining.pairs,
    "itm_ot": UniterForPretraining.aligned_pairs,
}


@pytest.mark.parametrize("task", HEADS)
def test_golden_scores(task, uniter_golden, golden_model, pack, close):
    packed = pack(np.load(uniter_golden / f"inputs_{task}.npz"))
    expected = np.load(uniter_golden / f"outputs_{task}.npz")
    outputs = HEADS[task](golden_model, packed.batch)
    close(outputs["scores"], expected["scores"])
    if task == "itm_ot":
        close(outputs["distances"], expected["ot_dist"])
        close(outputs["plans"], expected["ot_plan_T"])


def test_only_masked_positions_reach_the_vocabulary(uniter_golden, golden_model, pack):
    packed = pack(np.load(uniter_golden / "inputs_mlm.npz"))
    seen = []
    golden_model.cls.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].shape[0]))
    golden_model.masked_words(packed.batch)
    assert seen == [int((packed.batch.targets["words"] != -1).sum())]


def test_gradients_of_every_task_reach_the_first_layer(uniter_golden, golden_model, pack):
    for task, head in HEADS.items():
        golden_model.zero_grad()
        outputs = head(golden_model, pack(np.load(uniter_golden / f"inputs_{task}.npz")).batch)
        outputs["scores"].sum().backward()
        gradient = golden_model.uniter.encoder.layer[0].attention.self.query.weight.grad
        assert gradient is not None and torch.count_nonzero(gradient) == gradient.numel()


def test_more_columns_change_no_score():
    rows, weight, bias = torch.randn(5, 8), torch.randn(70, 8), torch.randn(70)
    for multiple in (1, 7, 64):
        scores = full_product(rows, weight, bias, multiple=multiple)
        torch.testing.assert_close(scores, rows @ weight.t() + bias, atol=1e-5, rtol=1e-5)
