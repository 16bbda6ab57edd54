"""The law "no wait inside a step": between two updates the host never asks the device for a number.

On the device "meta" there are no numbers: whatever asks for one (`item`, `nonzero`, a boolean index, `repeat_interleave` without a size,
`cpu`) raises by itself. Fake tensors of a GPU raise, besides, where the operands of an operation lie on different devices.
"""

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from uniter.model import losses
from uniter.model.losses import Loss
from uniter.model.settings.settings import AdversarialSettings
from uniter.model.tasks.table import DOWNSTREAM, PRETRAINING
from uniter.model.train.adversarial import forward_backward, with_divergence

EVERY_ROW = pytest.mark.parametrize("name", [*PRETRAINING, *DOWNSTREAM])


def forward(task: Any, model: Any, batch: Any, normalisation: losses.Normalisation) -> Loss:
    """What the training loop does with a micro-batch before its backward pass."""
    outputs = task.scores(model, batch)
    terms = task.losses(outputs, batch.targets)
    found = losses.of(terms, weights=task.weights, reduction=task.reduction, normalisation=normalisation)
    assert all(values.device == found.number.device for values in task.metric(outputs, batch.targets).values())
    return found


@EVERY_ROW
@pytest.mark.parametrize("normalisation", ["published", "global-mean"])
def test_no_wait_in_forward_losses_metric_and_backward(name: str, normalisation: losses.Normalisation, row_case: Any) -> None:
    task, model, batch = row_case(name)
    model.to("meta").train()
    found = forward(task, model, batch.to("meta"), normalisation)
    assert found.number.device.type == "meta"
    found.number.backward()
    gradient = model.uniter.encoder.layer[0].attention.self.query.weight.grad
    assert gradient is not None and gradient.device.type == "meta"


@EVERY_ROW
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_no_wait_in_adversarial_training(name: str, norm: Any, row_case: Any) -> None:
    """All its passes, with the shifts moved between them."""
    task, model, batch = row_case(name)
    model.to("meta").train()
    adversarial = AdversarialSettings(steps=3, rate=0.1, weight=1.0, on=["text", "image"], norm=norm, max_norm=0.15)
    weighed = with_divergence(task, adversarial)
    outputs, targets, loss = forward_backward(weighed, task.head, model, batch.to("meta"), adversarial, normalisation="global-mean")
    assert loss.number.device.type == "meta" and losses.DIVERGENCE in loss.sums
    assert all(values.device.type == "meta" for values in task.metric(outputs, targets).values())
    gradient = model.uniter.encoder.layer[0].attention.self.query.weight.grad
    assert gradient is not None and gradient.device.type == "meta"


@EVERY_ROW
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_no_wait_and_no_mixed_devices_on_a_gpu(name: str, dtype: torch.dtype | None, row_case: Any) -> None:
    """Forward, losses and metric on a GPU that is not there (PyTorch's backward pass asks for a real one)."""
    task, model, batch = row_case(name)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cuda", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        found = forward(task, model.to("cuda").train(), batch.to("cuda"), "published")
    assert found.number.device.type == "cuda"
