"""Attention within sequences that stand end to end, without a padded row anywhere: one operator on every device.

Where the sequences stand is said by the batch's layout (`datasets/batches/layout.py`): `offsets`, and a length that none exceeds, a number
of the host. So nothing here waits for a device, and a compiler sees one operator instead of many views.

Legend of shape suffixes: B sequences, N rows of all sequences, H hidden, A heads, E width of a head, L rows of equally long sequences.
"""

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from uniter.datasets.batches.layout import Layout

# On a GPU; the CPU has one way.
AttentionKernel = Literal["auto", "flash", "efficient"]


def attend(
    query_NH: Tensor, key_NH: Tensor, value_NH: Tensor, layout: Layout, *, heads: int, dropout: float, kernel: AttentionKernel = "auto"
) -> Tensor:
    """Scaled dot-product attention of each sequence to itself.

    Args:
        query_NH, key_NH, value_NH: (N, H), rows as in `layout`.
        heads: number of heads; divides H.
        dropout: probability with which an attention probability is dropped; 0 outside training.
        kernel: on a GPU "flash" (half precision) or "efficient" (any); "auto" takes flash where it runs.

    Returns:
        (N, H), the heads side by side.
    """
    query, key, value = (rows_NH.view(len(rows_NH), heads, -1) for rows_NH in (query_NH, key_NH, value_NH))
    attended_NAE: Tensor = packed_attention(query, key, value, layout.offsets, layout.longest, dropout, choose_kernel(kernel, query))[0]
    return attended_NAE.flatten(1)


def choose_kernel(kernel: AttentionKernel, query_NAE: Tensor) -> str:
    """What "auto" means for these rows: flash attention in half precision where the card has it, else the memory-efficient one."""
    if kernel != "auto":
        return kernel
    half = query_NAE.dtype in (torch.float16, torch.bfloat16)
    return "flash" if half and query_NAE.shape[2] % 8 == 0 and _has_flash() else "efficient"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_flash() -> bool:
    """Whether the card is of a generation (Ampere or later) that the flash kernels are written for."""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (8, 0)


@torch.library.custom_op("uniter::packed_attention", mutates_args=(), device_types="cpu")
def packed_attention(
    query_NAE: Tensor, key_NAE: Tensor, value_NAE: Tensor, offsets: Tensor, longest: int, dropout: float, kernel: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attended rows (N, A, E), and what the gradient needs: the logarithms of the sums of exponentials, and two of the random state.

    Args:
        offsets: (B + 1,) int32, where the sequences begin; the last is N. Sequences may be empty.
        longest: no sequence has more rows.
        kernel: "flash" or "efficient", on a GPU.
    """
    attended_NAE = torch.empty_like(query_NAE, memory_format=torch.contiguous_format)
    logsumexp_NA = query_NAE.new_empty(query_NAE.shape[:2], dtype=_summed_in(query_NAE))
    seed = torch.randint(2**62, (1,)) if dropout > 0 else torch.zeros(1, dtype=torch.int64)
    for group, query, key, value, keep in _groups(offsets, dropout, seed, query_NAE, key_NAE, value_NAE):
        if keep is None:
            taken, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)
            _rows(logsumexp_NA, group).copy_(logsumexp)
        else:
            taken = (_probabilities(query, key) * keep) @ value
        _rows(attended_NAE, group).copy_(taken)
    return attended_NAE, logsumexp_NA, seed, seed.new_empty(0)


@torch.library.custom_op("uniter::packed_attention_backward", mutates_args=(), device_types="cpu")
def packed_attention_backward(
    gradient_NAE: Tensor, query_NAE: Tensor, key_NAE: Tensor, value_NAE: Tensor, attended_NAE: Tensor, logsumexp: Tensor, random: Tensor,
    random_offset: Tensor, offsets: Tensor, longest: int, dropout: float, kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of query, key and value, (N, A, E) each. The CPU draws dropout again instead of keeping it."""
    found = [torch.empty_like(rows, memory_format=torch.contiguous_format) for rows in (query_NAE, key_NAE, value_NAE)]
    rows = query_NAE, key_NAE, value_NAE, gradient_NAE.contiguous(), attended_NAE
    for group, query, key, value, gradient, attended, keep in _groups(offsets, dropout, random, *rows):
        if keep is None:
            own = _rows(logsumexp, group).contiguous()
            gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                gradient, query, key, value, attended, own, 0.0, False
            )
        else:
            gradients = _gradients(gradient, query, key, value, keep)
        for whole, part in zip(found, gradients, strict=True):
            _rows(whole, group).copy_(part)
    return found[0], found[1], found[2]


def _groups(offsets: Tensor, dropout: float, seed: Tensor, *rows: Tensor) -> Iterator[Any]:
    """For each run of equally long sequences (first row, sequences, length), the rows as (sequences, A, L, E), and by what each
    probability (sequences, A, L, L) is multiplied, None without dropout."""
    bounds = offsets.numpy()
    if bounds[-1] != len(rows[0]):
        raise ValueError(f"the sequences have {bounds[-1]} rows, but there are {len(rows[0])}")
    lengths = np.diff(bounds)
    changes = np.flatnonzero(np.diff(lengths, prepend=-1, append=-1))
    generator = torch.Generator().manual_seed(int(seed)) if dropout > 0 else None
    for begin, end in zip(changes[:-1].tolist(), changes[1:].tolist(), strict=True):
        group = int(bounds[begin]), end - begin, int(lengths[begin])
        if group[2] == 0:
            continue
        parts = [_rows(part, group) for part in rows]
        keep = None
        if generator is not None:
            shape = (group[1], rows[0].shape[1], group[2], group[2])
            keep = rows[0].new_empty(shape).bernoulli_(1 - dropout, generator=generator).div_(1 - dropout)
        yield group, *parts, keep


def _rows(rows_NA: Tensor, group: tuple[int, int, int]) -> Tensor:
    """A group's rows, (N, A) or (N, A, E), as a view (sequences, A, L) or (sequences, A, L, E)."""
    first, sequences, length = group
    return rows_NA.narrow(0, first, sequences * length).view(sequences, length, *rows_NA.shape[1:]).transpose(1, 2)


def _probabilities(query: Tensor, key: Tensor) -> Tensor:
    return torch.softmax(query @ key.transpose(2, 3) / query.shape[3] ** 0.5, dim=3)


def _gradients(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of query, key and value, (sequences, A, L, E) each, by hand."""
    probabilities = _probabilities(query, key)
    of_value = (probabilities * keep).transpose(2, 3) @ gradient
    of_probabilities = (gradient @ value.transpose(2, 3)) * keep
    of_scores = probabilities * (of_probabilities - (of_probabilities * probabilities).sum(dim=3, keepdim=True)) / query.shape[3] ** 0.5
    return of_scores @ key, of_scores.transpose(2, 3) @ query, of_value


def _summed_in(rows: Tensor) -> torch.dtype:
    return torch.float64 if rows.dtype == torch.float64 else torch.float32


@packed_attention.register_kernel("cuda")
def _on_cuda(query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, longest: int, dropout: float, kernel: str) -> Any:
    if kernel == "flash":
        both = (offsets, offsets, longest, longest)
        attended, logsumexp, random, random_offset, _ = torch.ops.aten._flash_attention_forward(
            query, key, value, *both, dropout, False, False
        )
        return attended, logsumexp, random, random_offset
    attended, logsumexp, random, random_offset, _, _ = torch.ops.aten._efficient_attention_forward(
        query[None], key[None], value[None], None, offsets, offsets, longest, longest, dropout, 0, True
    )
    return attended[0], logsumexp, random, random_offset


@packed_attention_backward.register_kernel("cuda")
def _(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, attended: Tensor, logsumexp: Tensor, random: Tensor,
    random_offset: Tensor, offsets: Tensor, longest: int, dropout: float, kernel: str,
) -> Any:  # fmt: skip
    gradient = gradient.contiguous()
    both = (offsets, offsets, longest, longest)
    if kernel == "flash":
        return torch.ops.aten._flash_attention_backward(
            gradient, query, key, value, attended, logsumexp, *both, dropout, False, random, random_offset
        )
    single = (part[None] for part in (gradient, query, key, value))
    of_query, of_key, of_value, _ = torch.ops.aten._efficient_attention_backward(
        *single, None, attended[None], *both, logsumexp, dropout, random, random_offset, 0, False
    )
    return of_query[0], of_key[0], of_value[0]


@packed_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, longest: int, dropout: float, kernel: str) -> Any:
    if query.device.type == "cuda":  # PyTorch's own operators know the shapes of what they keep
        attended, *kept = _on_cuda(query, key, value, offsets, longest, dropout, kernel)
        return attended.contiguous(), *kept
    logsumexp = query.new_empty(query.shape[:2], dtype=_summed_in(query))
    numbers = [torch.empty(count, dtype=torch.int64, device=query.device) for count in (1, 0)]
    return torch.empty_like(query, memory_format=torch.contiguous_format), logsumexp, *numbers


@packed_attention_backward.register_fake
def _(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *others: Any) -> Any:
    return tuple(torch.empty_like(rows, memory_format=torch.contiguous_format) for rows in (query, key, value))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *rows, offsets, longest, dropout, kernel = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*rows, *output, offsets)
    ctx.numbers = longest, dropout, kernel


def _backward(ctx: Any, gradient_NAE: Tensor | None, *of_the_rest: Tensor | None) -> tuple[Tensor | None, ...]:
    if gradient_NAE is None:
        return (None,) * 7
    return (*packed_attention_backward(gradient_NAE, *ctx.saved_tensors, *ctx.numbers), None, None, None, None)


packed_attention.register_autograd(_backward, setup_context=_remember)


def attention_probabilities(query_NH: Tensor, key_NH: Tensor, layout: Layout, *, heads: int) -> Iterator[Tensor]:
    """Who attends to whom, for looking at: (A, length, length) float32 for each sequence in the batch's order, rows summing to 1."""
    width = query_NH.shape[1] // heads
    for first, length in zip(layout.first_rows_B.tolist(), layout.sequence_lengths_B.tolist(), strict=True):
        query, key = (rows[first : first + length].float().view(length, heads, width).transpose(0, 1) for rows in (query_NH, key_NH))
        yield torch.softmax(query @ key.transpose(1, 2) / width**0.5, dim=-1)
