"""Attention within sequences that stand end to end, without a padded row anywhere.

The one thing a reader would get wrong: the sequences need not stand in the batch's order. On the CPU they stand by
decreasing length, so that equally long ones are neighbours and attention runs over plain views. Whoever wants a row
asks the layout for its number.

Legend of shape suffixes: B sequences, N rows of all sequences, T text tokens, R regions, H hidden, A heads, E width of a head.
"""

import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

# Said once a process about every kind of nested tensor, also about the one that is used here and recommended there.
warnings.filterwarnings("ignore", message="The PyTorch API of nested tensors is in prototype stage", category=UserWarning)


AttentionKernel = Literal["auto", "grouped", "jagged", "varlen"]


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything of a batch stands among the N rows of the hidden states.

    Attributes:
        source_rows_N: (N,) int64, for each row its place in "all text tokens, then all regions" of the batch.
        text_rows_T, region_rows_R: (T,) and (R,) int64, the row of each text token and of each region, in the batch's order.
        first_rows_B: (B,) int64, the first row of each sequence ([CLS] where there is text).
        sequence_lengths_B: (B,) int64, rows of each sequence, in the batch's order.
        offsets: (B + 1,) int64, where the sequences begin in the order in which they stand; the last is N.
        groups: (first row, sequences, length) of each run of equally long sequences, in the order in which they stand.
        shortest, longest: rows of the shortest and the longest sequence.
    """

    source_rows_N: Tensor
    text_rows_T: Tensor
    region_rows_R: Tensor
    first_rows_B: Tensor
    sequence_lengths_B: Tensor
    offsets: Tensor
    groups: tuple[tuple[int, int, int], ...]
    shortest: int
    longest: int


def lay_out(text_lengths_B: Tensor, region_counts_B: Tensor, *, device: torch.device, by_length: bool) -> Layout:
    """Decide where each sequence stands.

    The numbers are worked out on the host: batches whose lengths are CPU tensors cost no wait for the device.

    Args:
        text_lengths_B: (B,) integer, text tokens of each sequence.
        region_counts_B: (B,) integer, regions of each sequence.
        device: where the row numbers go.
        by_length: let the sequences stand by decreasing length instead of in the batch's order.

    Raises:
        ValueError: the batch is empty, or a sequence of it has neither text nor regions.
    """
    texts = text_lengths_B.cpu().numpy().astype(np.int64)
    regions = region_counts_B.cpu().numpy().astype(np.int64)
    lengths = texts + regions
    if not len(lengths) or lengths.min() < 1:
        raise ValueError("every sequence of a batch needs at least one text token or region, and a batch at least one sequence")
    order = np.argsort(-lengths, kind="stable") if by_length else np.arange(len(lengths))
    standing = lengths[order]
    offsets = np.concatenate([[0], np.cumsum(standing)])
    first_rows = np.empty_like(lengths)
    first_rows[order] = offsets[:-1]
    text_rows = np.repeat(first_rows, texts) + _counted_within(texts)
    region_rows = np.repeat(first_rows + texts, regions) + _counted_within(regions)
    source_rows = np.empty(offsets[-1], dtype=np.int64)
    source_rows[np.concatenate([text_rows, region_rows])] = np.arange(offsets[-1])
    changes = np.flatnonzero(np.diff(standing, prepend=-1, append=-1))
    groups = tuple((int(offsets[begin]), int(end - begin), int(standing[begin])) for begin, end in itertools.pairwise(changes))

    def moved(values: NDArray[np.int64]) -> Tensor:
        tensor = torch.from_numpy(values)
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

    return Layout(
        source_rows_N=moved(source_rows),
        text_rows_T=moved(text_rows),
        region_rows_R=moved(region_rows),
        first_rows_B=moved(first_rows),
        sequence_lengths_B=moved(lengths),
        offsets=moved(offsets),
        groups=groups,
        shortest=int(lengths.min()),
        longest=int(lengths.max()),
    )


def _counted_within(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """0, 1, 2, ... within each of the runs of the given lengths, end to end."""
    return np.arange(int(lengths.sum()), dtype=np.int64) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def choose_kernel(kernel: AttentionKernel, device: torch.device) -> Literal["grouped", "jagged", "varlen"]:
    """What "auto" means on this device: groups of equal length on the CPU, jagged scaled-dot-product attention elsewhere."""
    if kernel != "auto":
        return kernel
    return "grouped" if device.type == "cpu" else "jagged"


def attend(
    query_NH: Tensor, key_NH: Tensor, value_NH: Tensor, layout: Layout, *, heads: int, dropout: float, kernel: AttentionKernel = "auto"
) -> Tensor:
    """Scaled dot-product attention of each sequence to itself.

    Args:
        query_NH, key_NH, value_NH: (N, H), rows as in `layout`.
        heads: number of heads; divides H.
        dropout: probability with which an attention probability is dropped; 0 outside training.
        kernel: "grouped" (views of equally long sequences), "jagged" (nested tensors; on CUDA the variable-length flash or
            memory-efficient kernels, which know dropout) or "varlen" (`torch.nn.attention.varlen`: CUDA, half precision, no dropout).

    Returns:
        (N, H), the heads side by side.

    Raises:
        ValueError: "varlen" was asked for together with dropout, in single precision or off a GPU.
    """
    return _KERNELS[choose_kernel(kernel, query_NH.device)](query_NH, key_NH, value_NH, layout, heads, dropout)


def _grouped(query_NH: Tensor, key_NH: Tensor, value_NH: Tensor, layout: Layout, heads: int, dropout: float) -> Tensor:
    sizes = [sequences * length for _, sequences, length in layout.groups]
    attended: list[Tensor] = []
    parts = (torch.split(rows_NH, sizes) for rows_NH in (query_NH, key_NH, value_NH))
    for query, key, value, (_, sequences, length) in zip(*parts, layout.groups, strict=True):
        query, key, value = (part.view(sequences, length, heads, -1).transpose(1, 2) for part in (query, key, value))
        attended_BAQE = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        attended.append(attended_BAQE.transpose(1, 2).reshape(sequences * length, -1))
    return torch.cat(attended)


def _jagged(query_NH: Tensor, key_NH: Tensor, value_NH: Tensor, layout: Layout, heads: int, dropout: float) -> Tensor:
    def nested(rows_NH: Tensor) -> Tensor:
        rows_NAE = rows_NH.view(len(rows_NH), heads, -1)
        return torch.nested.nested_tensor_from_jagged(
            rows_NAE, layout.offsets, min_seqlen=layout.shortest, max_seqlen=layout.longest
        ).transpose(1, 2)

    attended = F.scaled_dot_product_attention(nested(query_NH), nested(key_NH), nested(value_NH), dropout_p=dropout)
    return attended.transpose(1, 2).values().reshape(query_NH.shape)


def _varlen(query_NH: Tensor, key_NH: Tensor, value_NH: Tensor, layout: Layout, heads: int, dropout: float) -> Tensor:
    if dropout > 0:
        raise ValueError(
            f"the varlen attention kernel knows no dropout, but {dropout} was asked for; "
            "set attention_probs_dropout_prob to 0 or use the jagged kernel"
        )
    if query_NH.device.type != "cuda" or query_NH.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"the varlen attention kernel needs half precision on a GPU, got {query_NH.dtype} on {query_NH.device.type}; use 'jagged'"
        )
    # Not at the top: the module came with PyTorch 2.10 and the package asks for 2.6.
    from torch.nn.attention.varlen import varlen_attn

    offsets = layout.offsets.to(torch.int32)
    query, key, value = (rows.view(len(rows), heads, -1) for rows in (query_NH, key_NH, value_NH))
    attended = varlen_attn(query, key, value, offsets, offsets, layout.longest, layout.longest)
    assert isinstance(attended, Tensor)
    return attended.reshape(query_NH.shape)


_KERNELS: dict[str, Callable[[Tensor, Tensor, Tensor, Layout, int, float], Tensor]] = {
    "grouped": _grouped,
    "jagged": _jagged,
    "varlen": _varlen,
}


def attention_probabilities(query_NH: Tensor, key_NH: Tensor, layout: Layout, *, heads: int) -> Iterator[Tensor]:
    """Who attends to whom, for looking at: (A, length, length) float32 for each sequence in the batch's order, rows summing to 1."""
    width = query_NH.shape[1] // heads
    for first, length in zip(layout.first_rows_B.tolist(), layout.sequence_lengths_B.tolist(), strict=True):
        query, key = (rows[first : first + length].float().view(length, heads, width).transpose(0, 1) for rows in (query_NH, key_NH))
        yield torch.softmax(query @ key.transpose(1, 2) / width**0.5, dim=-1)
