"""Attention on packed rows: equal to PyTorch's own sequence by sequence, with its gradients, with dropout, on every device's shapes."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from uniter.datasets.batches.layout import lay_out
from uniter.model.attention import attend, packed_attention

LENGTHS = [7, 3, 3, 0, 2]  # an empty sequence, too
OFFSETS = torch.tensor([0, 7, 10, 13, 13, 15], dtype=torch.int32)


def rows(dtype: torch.dtype = torch.float32, *, seed: int = 0, width: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(15, 2, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(3)]


def one_by_one(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    taken = []
    for own in zip(*(torch.split(part, LENGTHS) for part in (query, key, value)), strict=True):
        taken.append(F.scaled_dot_product_attention(*(part.transpose(0, 1) for part in own)).transpose(0, 1))
    return torch.cat(taken)


def packed(*inputs: Tensor, dropout: float = 0.0) -> Tensor:
    attended, *_ = packed_attention(*inputs, OFFSETS, max(LENGTHS), dropout, "flash")
    return attended


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_one_by_one_with_gradients(dtype: torch.dtype) -> None:
    ours, theirs = rows(dtype), rows(dtype)
    torch.testing.assert_close(packed(*ours), one_by_one(*theirs), atol=1e-6, rtol=1e-6)
    weights = torch.randn(15, 2, 4, dtype=dtype)
    (packed(*ours) * weights).sum().backward()
    (one_by_one(*theirs) * weights).sum().backward()
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our.grad, their.grad, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_are_those_of_the_function(dropout: float) -> None:
    def seeded(*inputs: Tensor) -> Tensor:
        torch.manual_seed(3)
        return packed(*inputs, dropout=dropout)

    assert torch.autograd.gradcheck(seeded, rows(torch.float64))


def test_the_operator_keeps_its_word() -> None:
    """Its schema, its fake twin and its gradient, as PyTorch checks them for compilers."""
    torch.library.opcheck(packed_attention, (*rows(), OFFSETS, max(LENGTHS), 0.0, "flash"))


def test_dropout_is_drawn_anew_by_the_generator_of_the_process() -> None:
    query, key, _ = rows()
    ones = torch.ones(15, 2, 4)
    torch.manual_seed(0)
    first, second = packed(query, key, ones, dropout=0.5), packed(query, key, ones, dropout=0.5)
    torch.manual_seed(0)
    assert torch.equal(packed(query, key, ones, dropout=0.5), first) and not torch.equal(first, second)
    # Dropout keeps the expectation: rows of probabilities sum to 1 on average.
    mean = torch.stack([packed(query, key, ones, dropout=0.5) for _ in range(400)]).mean()
    assert abs(float(mean.detach()) - 1) < 0.05
    torch.testing.assert_close(packed(query, key, ones), ones)


def test_rows_beside_the_sequences_are_refused() -> None:
    with pytest.raises(ValueError, match="the sequences have 15 rows, but there are 16"):
        packed_attention(*(torch.zeros(16, 2, 4) for _ in range(3)), OFFSETS, 7, 0.0, "flash")


@pytest.mark.gpu
@pytest.mark.parametrize(("kernel", "dtype"), [("flash", torch.bfloat16), ("efficient", torch.float32), ("efficient", torch.bfloat16)])
def test_kernels_of_the_gpu_agree_with_the_cpu(kernel: str, dtype: torch.dtype) -> None:
    layout = lay_out(torch.tensor([30, 5, 12]), torch.tensor([44, 17, 8]))
    generator = torch.Generator().manual_seed(0)
    here = [torch.randn(116, 128, generator=generator).requires_grad_() for _ in range(3)]
    there = [part.detach().to("cuda", dtype).requires_grad_() for part in here]
    expected = attend(*here, layout, heads=2, dropout=0.0)
    ours = attend(*there, layout.each(Tensor.cuda), heads=2, dropout=0.0, kernel=kernel)
    limits = {"atol": 3e-2, "rtol": 3e-2} if dtype == torch.bfloat16 else {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(ours.float().cpu(), expected, **limits)
    expected.sum().backward()
    ours.sum().backward()
    for cpu, gpu in zip(here, there, strict=True):
        torch.testing.assert_close(gpu.grad.float().cpu(), cpu.grad, **limits)
    ones = torch.ones_like(there[2])
    dropped = attend(there[0], there[1], ones, layout.each(Tensor.cuda), heads=2, dropout=0.5, kernel=kernel)
    assert not torch.allclose(dropped, ones)
