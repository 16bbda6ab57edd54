"""Transport: golden distances and gradients, and the exact optimum from a linear program."""

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from uniter.model.transport import padded, transport_costs, transport_distances, transport_plan


def test_golden_transport_with_gradients(uniter_golden, close):
    golden = np.load(uniter_golden / "ot_unit.npz")
    text, regions = (torch.from_numpy(golden[name]).requires_grad_() for name in ("txt_emb", "img_emb"))
    text_padding, region_padding = (torch.from_numpy(golden[name]).bool() for name in ("txt_pad", "img_pad"))
    distances, plan = transport_distances(
        text, regions, text_padding, region_padding, beta=float(golden["beta"]), iterations=int(golden["iteration"])
    )
    close(distances, golden["dist"])
    (torch.from_numpy(golden["grad_weight"]) * distances).sum().backward()
    close(text.grad, golden["grad_txt"])
    close(regions.grad, golden["grad_img"])
    assert not plan.requires_grad


def test_plan_has_uniform_marginals_and_reaches_the_linear_optimum():
    generator = np.random.default_rng(3)
    words, regions = 5, 7
    costs = torch.from_numpy(generator.random((1, words, regions), dtype=np.float32))
    nothing = torch.zeros(1, words, dtype=torch.bool), torch.zeros(1, regions, dtype=torch.bool)
    plan = transport_plan(costs, *nothing, iterations=2000)[0].double()
    torch.testing.assert_close(plan.sum(0), torch.full((words,), 1 / words, dtype=torch.double), atol=1e-4, rtol=0)
    torch.testing.assert_close(plan.sum(1), torch.full((regions,), 1 / regions, dtype=torch.double), atol=1e-4, rtol=0)
    marginals = np.zeros((words + regions, words * regions))
    for word in range(words):
        marginals[word, word * regions : (word + 1) * regions] = 1
    for region in range(regions):
        marginals[words + region, region::regions] = 1
    optimum = linprog(costs.numpy().ravel(), A_eq=marginals, b_eq=[1 / words] * words + [1 / regions] * regions).fun
    assert float((costs[0].t() * plan).sum()) == pytest.approx(optimum, abs=2e-3)


def test_padding_changes_nothing():
    torch.manual_seed(0)
    text, regions = torch.randn(4, 8), torch.randn(3, 8)
    nothing = torch.zeros(1, 4, dtype=torch.bool), torch.zeros(1, 3, dtype=torch.bool)
    alone, _ = transport_distances(text[None], regions[None], *nothing)
    padded_text, text_padding = padded(torch.cat([text, torch.randn(9, 8)]), torch.tensor([0, 4]), torch.tensor([4, 9]), 9)
    padded_regions, region_padding = padded(torch.cat([regions, torch.randn(6, 8)]), torch.tensor([0, 3]), torch.tensor([3, 6]), 6)
    together, plan = transport_distances(padded_text, padded_regions, text_padding, region_padding)
    torch.testing.assert_close(together[:1], alone, atol=1e-6, rtol=1e-6)
    assert torch.count_nonzero(plan[0, 3:]) == 0 and torch.count_nonzero(plan[0, :, 4:]) == 0


def test_stays_float32_under_autocast():
    torch.manual_seed(0)
    text, regions = torch.randn(2, 4, 8), torch.randn(2, 3, 8)
    nothing = torch.zeros(2, 4, dtype=torch.bool), torch.zeros(2, 3, dtype=torch.bool)
    expected, expected_plan = transport_distances(text, regions, *nothing)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        distances, plan = transport_distances(text, regions, *nothing)
        assert transport_costs(text, regions, *nothing).dtype == torch.float32
    assert torch.equal(distances, expected) and torch.equal(plan, expected_plan)
