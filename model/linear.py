"""Linear layers that take the fastest exact way on the processor at hand.

The MKL inside PyTorch leaves half of the vector width of AMD's newer processors unused, oneDNN beside it does not. So there float32
products go to oneDNN, forward and backward; everywhere else, and under autocast, to `torch.nn.functional.linear`. Which way is taken
depends on the machine only, never on a measurement: a resumed run must compute the same bits.

Measured: a product on Zen 5 in 31 instead of 70 ms; a forward on one core of Zen 4, base 599 instead of 637 ms, tiny 40 instead of 44.
"""

import functools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows (..., I) times weight (O, I) transposed, plus bias (O,): (..., O)."""
    if torch.compiler.is_compiling():
        return F.linear(rows, weight, bias)
    suits = rows.device.type == "cpu" and rows.dtype == weight.dtype == torch.float32 and rows.numel() > 0
    if suits and not torch.is_autocast_enabled("cpu") and onednn_is_faster():
        product: Tensor = _OneDnnLinear.apply(rows, weight, bias)
        return product
    return F.linear(rows, weight, bias)


class Linear(nn.Linear):
    """`torch.nn.Linear` by way of `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) to (..., out), as `linear` computes it."""
        return linear(input, self.weight, self.bias)


@functools.cache
def onednn_is_faster() -> bool:
    """Whether this is an AMD processor with AVX-512, and PyTorch has the oneDNN operator that is used here."""
    try:
        amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
        # The operator is PyTorch's own, not a promised interface: use it only while it does what it did.
        return amd and wide and _product(torch.ones(2, 3), torch.ones(4, 3)).tolist() == [[3.0] * 4] * 2
    except (OSError, AttributeError, RuntimeError, TypeError):
        return False


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return product


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return _product(rows, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (gradient,) = gradients
        rows, weight = ctx.saved_tensors
        needs_rows, needs_weight, needs_bias = ctx.needs_input_grad
        flat = gradient.reshape(-1, gradient.shape[-1])
        for_rows = _product(flat, weight.t()).view(rows.shape) if needs_rows else None
        for_weight = _product(flat.t(), rows.reshape(-1, rows.shape[-1]).t()) if needs_weight else None
        return for_rows, for_weight, flat.sum(dim=0) if needs_bias else None
