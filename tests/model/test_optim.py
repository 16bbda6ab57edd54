"""The optimizer: the recorded trajectory in both gradient conventions, the schedule, the groups."""

import copy
import json

import numpy as np
import pytest
import torch
from torch import nn

from uniter.model import UniterForPretraining, losses
from uniter.model.train.optim import AdamW, clear_gradients, clip_gradients, learning_rate, parameter_groups, set_learning_rate

TASKS = {
    "mlm": (UniterForPretraining.masked_words, losses.masked_words),
    "mrfr": (UniterForPretraining.masked_features, losses.masked_features),
    "mrc": (UniterForPretraining.masked_classes, losses.masked_classes),
    "mrckl": (UniterForPretraining.masked_classes, losses.masked_distributions),
    "itm_ot": (UniterForPretraining.aligned_pairs, losses.pairs),
}


@pytest.mark.parametrize("convention", ["zero", "none"])
def test_golden_trajectory(convention, uniter_golden, golden_model, pack, close):
    golden = json.loads((uniter_golden / "train_steps.json").read_text())
    options = golden["opts"]
    recorded = golden[f"zero_grad_to_{convention}" if convention == "none" else "zero_grad_to_zero"]
    groups = parameter_groups(golden_model, weight_decay=options["weight_decay"])
    optimizer = AdamW(groups, options["learning_rate"], betas=tuple(options["betas"]))
    for step, (task, expected) in enumerate(zip(golden["order"], recorded["steps"], strict=True), start=1):
        head, loss_of = TASKS[task]
        inputs = np.load(uniter_golden / f"inputs_{task}.npz")
        batch = pack(inputs).batch
        loss = losses.of(loss_of(head(golden_model, batch), batch.targets), weights={"transport": golden["lambda_ot"]}).number
        loss.backward()
        rate = learning_rate(
            step, base=options["learning_rate"], warmup_steps=options["warmup_steps"], total_steps=options["num_train_steps"]
        )
        set_learning_rate(optimizer, rate)
        norm = clip_gradients(golden_model.parameters(), options["grad_norm"])
        optimizer.step()
        clear_gradients(optimizer, convention)
        assert loss.item() == pytest.approx(expected["loss"], rel=1e-5)
        assert rate == pytest.approx(expected["lr"], rel=1e-12)
        assert float(norm) == pytest.approx(expected["grad_norm"], rel=1e-4)
    parameters = dict(golden_model.named_parameters())
    assert parameters.keys() == recorded["params"].keys()
    for name, expected in recorded["params"].items():
        values = parameters[name].detach().double()
        close(values.sum(), expected["sum"], atol=5e-5)
        close(values.norm(), expected["l2"])
        close(values.flatten()[:4], expected["first"])


def test_golden_groups(uniter_golden, golden_model):
    golden = json.loads((uniter_golden / "train_steps.json").read_text())
    decayed, undecayed = parameter_groups(golden_model, weight_decay=0.01)
    assert sorted(decayed["names"]) == sorted(golden["decay_names"]) and decayed["weight_decay"] == 0.01
    assert sorted(undecayed["names"]) == sorted(golden["no_decay_names"]) and undecayed["weight_decay"] == 0.0


def test_golden_learning_rates(uniter_golden):
    golden = json.loads((uniter_golden / "lr_schedule.json").read_text())
    for step, rates in golden.items():
        rate = learning_rate(int(step), base=5e-5, warmup_steps=100, total_steps=1000)
        assert rate == pytest.approx(rates["warmup100_total1000"], rel=1e-12)


def test_groups_of_a_head_have_their_own_rate():
    model = nn.ModuleDict({"uniter": nn.Linear(2, 2), "vqa_output": nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))})
    groups = parameter_groups(model, weight_decay=0.01, head="vqa_output", head_rate_multiplier=10.0)
    assert [group["names"] for group in groups] == [
        ["vqa_output.0.weight", "vqa_output.1.weight"],
        ["vqa_output.0.bias", "vqa_output.1.bias"],
        ["uniter.weight"],
        ["uniter.bias"],
    ]
    optimizer = AdamW(groups)
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [5.0, 5.0, 0.5, 0.5]


def test_one_step_by_hand():
    parameter = nn.Parameter(torch.tensor([1.0]))
    optimizer = AdamW([parameter], 0.1, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.5)
    parameter.grad = torch.tensor([2.0])
    optimizer.step()
    # m = 0.2, v = 0.08; the step is lr * sqrt(0.02) / 0.1 * m / (sqrt(v) + eps), then 5 % of the rest decays.
    stepped = 1 - 0.1 * 0.02**0.5 / 0.1 * 0.2 / (0.08**0.5 + 1e-6)
    assert parameter.item() == pytest.approx(stepped * 0.95, rel=1e-6)


def test_state_survives_saving_and_an_unused_parameter_rests():
    used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = AdamW([used, unused], 0.1)
    used.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(unused, torch.ones(3)) and not optimizer.state[unused]
    again = nn.Parameter(used.detach().clone())
    restored = AdamW([again, nn.Parameter(torch.ones(3))], 0.1)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, other in ((optimizer, used), (restored, again)):
        other.grad = torch.full((3,), 0.3)
        one.step()
    assert torch.equal(used, again)


def test_the_fused_kernel_computes_the_published_form():
    """Over many updates with changing rates, in float64; a parameter that rests falls behind in its count."""
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(9, 4, generator=generator, dtype=torch.float64)) for _ in range(2)]
    expected = [parameter.detach().clone() for parameter in parameters]
    means, squares, steps = [torch.zeros_like(one) for one in expected], [torch.zeros_like(one) for one in expected], [0, 0]
    optimizer = AdamW(parameters, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01)
    for update in range(1, 501):
        rate = learning_rate(update, base=1e-2, warmup_steps=50, total_steps=500)
        set_learning_rate(optimizer, rate)
        for place, parameter in enumerate(parameters):
            parameter.grad = None
            if place == 1 and update % 3:
                continue
            parameter.grad = gradient = torch.randn(9, 4, generator=generator, dtype=torch.float64)
            steps[place] += 1
            means[place] = 0.9 * means[place] + 0.1 * gradient
            squares[place] = 0.98 * squares[place] + 0.02 * gradient**2
            factor = rate * (1 - 0.98 ** steps[place]) ** 0.5 / (1 - 0.9 ** steps[place])
            expected[place] = (expected[place] - factor * means[place] / (squares[place].sqrt() + 1e-6)) * (1 - rate * 0.01)
        optimizer.step()
    for parameter, values in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.detach(), values, atol=1e-12, rtol=1e-12)


def test_the_device_decides_whether_an_update_is_usable():
    parameter = nn.Parameter(torch.ones(3))
    optimizer = AdamW([parameter], 0.1)
    optimizer.unusable = torch.zeros(())
    parameter.grad = torch.full((3,), torch.nan)
    optimizer.unusable.fill_(1)
    optimizer.step()
    assert torch.equal(parameter, torch.ones(3)) and not optimizer.state[parameter]["exp_avg"].any()
    parameter.grad = torch.ones(3)
    optimizer.unusable.zero_()
    optimizer.step()
    assert not torch.equal(parameter, torch.ones(3))


def test_no_limit_means_no_clipping():
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    assert float(clip_gradients([parameter], -1)) == 5.0 and parameter.grad.tolist() == [3.0, 4.0]
    assert float(clip_gradients([parameter], 1.0)) == 5.0
    torch.testing.assert_close(parameter.grad, torch.tensor([0.6, 0.8]))
