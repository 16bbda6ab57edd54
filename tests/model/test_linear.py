"""The oneDNN way computes what the plain one does, forward and backward, and steps aside where it should."""

import pytest
import torch
import torch.nn.functional as F

from uniter.model import linear as module
from uniter.model.linear import Linear, linear


def onednn_works() -> bool:
    try:
        return module._product(torch.ones(2, 3), torch.ones(4, 3)).shape == (2, 4)
    except (AttributeError, RuntimeError):
        return False


@pytest.mark.parametrize("shape", [(7, 12), (2, 5, 12)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_products_and_gradients_agree(shape, with_bias, monkeypatch):
    if not onednn_works():
        pytest.skip("this PyTorch has no oneDNN linear operator")
    torch.manual_seed(0)
    rows, weight = torch.randn(shape, requires_grad=True), torch.randn(9, 12, requires_grad=True)
    bias = torch.randn(9, requires_grad=True) if with_bias else None
    wanted = [tensor for tensor in (rows, weight, bias) if tensor is not None]
    results = []
    for fast in (True, False):
        monkeypatch.setattr(module, "onednn_is_faster", lambda fast=fast: fast)
        product = linear(rows, weight, bias)
        results.append([product, *torch.autograd.grad(product.sin().sum(), wanted)])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
    transposed = linear(rows, torch.randn(12, 9).t(), bias)
    assert transposed.shape == (*shape[:-1], 9)


def test_empty_rows_half_precision_and_autocast_take_the_plain_way(monkeypatch):
    monkeypatch.setattr(module, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(module, "_product", lambda *_: pytest.fail("the oneDNN way was taken"))
    layer = Linear(3, 2)
    assert layer(torch.zeros(0, 3)).shape == (0, 2)
    assert torch.equal(layer.double()(torch.ones(1, 3).double()), F.linear(torch.ones(1, 3).double(), layer.weight, layer.bias))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert Linear(3, 2)(torch.ones(1, 3)).dtype == torch.bfloat16


def test_the_choice_falls_back_when_the_operator_is_gone(monkeypatch):
    def gone(*_):
        raise AttributeError("no such operator")

    monkeypatch.setattr(module, "_product", gone)
    assert module.onednn_is_faster.__wrapped__() is False
