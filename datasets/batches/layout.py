"""Where everything of a batch stands among the rows that the model computes: worked out on the host, once, when the batch is made.

What a reader would get wrong: the sequences do not stand in the batch's order but by decreasing length, so that equally long ones are
neighbours and attention on the CPU runs over plain views. Whoever wants a row asks the layout for its number.

Legend of shape suffixes: B sequences, N rows of all sequences, T text tokens, R regions, K chosen sequences.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything of a batch stands among the N rows of the hidden states.

    Attributes:
        source_rows_N: (N,) int64, for each row its place in "all text tokens, then all regions" of the batch.
        text_rows_T, region_rows_R: (T,) and (R,) int64, the row of each text token and of each region, in the batch's order.
        first_rows_B: (B,) int64, the first row of each sequence ([CLS] where there is text).
        text_lengths_B, region_counts_B: (B,) int64, of each sequence, in the batch's order.
        offsets: (B + 1,) int32, where the sequences begin in the order in which they stand; the last is N.
        longest, longest_text, most_regions: rows, text tokens and regions of no sequence are more; numbers of the host.
    """

    source_rows_N: Tensor
    text_rows_T: Tensor
    region_rows_R: Tensor
    first_rows_B: Tensor
    text_lengths_B: Tensor
    region_counts_B: Tensor
    offsets: Tensor
    longest: int
    longest_text: int
    most_regions: int

    @property
    def sequence_lengths_B(self) -> Tensor:
        """(B,) int64, rows of each sequence, in the batch's order."""
        return self.text_lengths_B + self.region_counts_B

    def each(self, change: Callable[[Tensor], Tensor]) -> "Layout":
        """The same layout with every tensor changed alike (moved, pinned)."""
        return replace(
            self,
            source_rows_N=change(self.source_rows_N),
            text_rows_T=change(self.text_rows_T),
            region_rows_R=change(self.region_rows_R),
            first_rows_B=change(self.first_rows_B),
            text_lengths_B=change(self.text_lengths_B),
            region_counts_B=change(self.region_counts_B),
            offsets=change(self.offsets),
        )


def lay_out(text_lengths_B: Tensor, region_counts_B: Tensor) -> Layout:
    """Decide where each sequence stands.

    Args:
        text_lengths_B: (B,) integer, text tokens of each sequence, on the host.
        region_counts_B: (B,) integer, regions of each sequence, on the host.

    Raises:
        ValueError: the batch is empty, or a sequence of it has neither text nor regions.
    """
    texts = text_lengths_B.numpy().astype(np.int64)
    regions = region_counts_B.numpy().astype(np.int64)
    lengths = texts + regions
    if not len(lengths) or lengths.min() < 1:
        raise ValueError("every sequence of a batch needs at least one text token or region, and a batch at least one sequence")
    order = np.argsort(-lengths, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(lengths[order])])
    first_rows = np.empty_like(lengths)
    first_rows[order] = offsets[:-1]
    text_rows = np.repeat(first_rows, texts) + counted_within(texts)
    region_rows = np.repeat(first_rows + texts, regions) + counted_within(regions)
    source_rows = np.empty(offsets[-1], dtype=np.int64)
    source_rows[np.concatenate([text_rows, region_rows])] = np.arange(offsets[-1])
    return Layout(
        source_rows_N=torch.from_numpy(source_rows),
        text_rows_T=torch.from_numpy(text_rows),
        region_rows_R=torch.from_numpy(region_rows),
        first_rows_B=torch.from_numpy(first_rows),
        text_lengths_B=torch.from_numpy(texts),
        region_counts_B=torch.from_numpy(regions),
        offsets=torch.from_numpy(offsets.astype(np.int32)),
        longest=int(lengths.max()),
        longest_text=int(texts.max()),
        most_regions=int(regions.max()),
    )


def take_sequences(layout: Layout, numbers_K: Tensor, *, rows: int) -> Layout:
    """The layout of some sequences of a batch, wherever it is known which: nothing is read by the host.

    As the host does not know how many rows they have, they get `rows` of them; behind theirs stand ghosts, copies of the batch's first row
    in sequences of their own, which nobody asks for.

    Args:
        layout: of the batch.
        numbers_K: (K,) int64 numbers of sequences, on the layout's device.
        rows: at least as many as the sequences have together.
    """
    device, longest = numbers_K.device, layout.longest
    lengths_K = layout.sequence_lengths_B[numbers_K]
    standing_K, order_K = lengths_K.sort(descending=True, stable=True)
    ends_K = standing_K.cumsum(0)
    first_rows_K = torch.empty_like(lengths_K).scatter(0, order_K, ends_K - standing_K)
    ghosts = torch.arange(1, -(-rows // longest) + 1, device=device)
    offsets = torch.cat([ends_K.new_zeros(1), ends_K, (ends_K[-1] + ghosts * longest).clamp(max=rows)])
    rows_N = torch.arange(rows, device=device)
    place_N = torch.searchsorted(ends_K, rows_N, right=True)
    real_N, place_N = place_N < len(ends_K), place_N.clamp(max=len(ends_K) - 1)
    sequence_N = numbers_K[order_K[place_N]]
    within_N = rows_N - (ends_K - standing_K)[place_N]
    first_N = layout.first_rows_B[sequence_N]
    return replace(
        layout,
        source_rows_N=layout.source_rows_N[torch.where(real_N, first_N + within_N, 0)],
        text_rows_T=layout.text_rows_T[:0],
        region_rows_R=layout.region_rows_R[:0],
        first_rows_B=first_rows_K,
        text_lengths_B=layout.text_lengths_B[numbers_K],
        region_counts_B=layout.region_counts_B[numbers_K],
        offsets=offsets.to(layout.offsets.dtype),
    )


def counted_within(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """[2, 3] -> [0, 1, 0, 1, 2]."""
    starts = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum()), dtype=np.int64) - np.repeat(starts, lengths)
