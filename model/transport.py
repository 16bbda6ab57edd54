"""Optimal transport between the words and the regions of a pair: the word-region alignment of ITM.

The plan is a constant for the gradient, which flows through the costs only; everything here is float32, whatever the
model computes in. Small padded matrices are used on purpose: a plan is (regions, words), a fraction of a hidden state.

Legend of shape suffixes: B pairs, T words, R regions (padded here), H hidden.

Source: Xie et al., "A Fast Proximal Point Method for Computing Exact Wasserstein Distance", 2018 (IPOT), as UNITER uses it.
"""

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_EPSILON = 1e-5


PADDED = 1e4


def in_single_precision(device: torch.device) -> AbstractContextManager[Any]:
    """No autocast on this device, where it has any ("meta" has none)."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else contextlib.nullcontext()


def transport_costs(text_BTH: Tensor, regions_BRH: Tensor, text_padding_BT: Tensor, region_padding_BR: Tensor) -> Tensor:
    """1 - cosine of each word and region, 0 at padding: (B, T, R) float32.

    Args:
        text_BTH, regions_BRH: hidden states, any float type.
        text_padding_BT, region_padding_BR: bool, True where there is nothing.
    """
    with in_single_precision(text_BTH.device):
        words = F.normalize(text_BTH.float(), dim=-1, eps=NORM_EPSILON)
        regions = F.normalize(regions_BRH.float(), dim=-1, eps=NORM_EPSILON)
        costs_BTR = 1 - words @ regions.transpose(1, 2)
        return costs_BTR.masked_fill(text_padding_BT.unsqueeze(2) | region_padding_BR.unsqueeze(1), 0.0)


@torch.no_grad()
def transport_plan(
    costs_BTR: Tensor,
    text_padding_BT: Tensor,
    region_padding_BR: Tensor,
    *,
    beta: float = 0.5,
    iterations: int = 50,
    inner_iterations: int = 1,
) -> Tensor:
    """The transport plan between uniform marginals, by IPOT.

    Args:
        costs_BTR: (B, T, R) costs, 0 at padding.
        text_padding_BT, region_padding_BR: bool, True where there is nothing; every pair has at least one word and one region.
        beta: step of the proximal point method.
        iterations, inner_iterations: outer and inner ones; the published setting is 50 and 1.

    Returns:
        (B, R, T) float32, 0 at padding. sigma is carried from one outer iteration to the next, as published.
    """
    with in_single_precision(costs_BTR.device):
        words_B11 = (~text_padding_BT).sum(1).float().view(-1, 1, 1)
        regions_B11 = (~region_padding_BR).sum(1).float().view(-1, 1, 1)
        present_BRT = ~(region_padding_BR.unsqueeze(2) | text_padding_BT.unsqueeze(1))
        kernel_BRT = torch.exp(-costs_BTR.float().transpose(1, 2) / beta) * present_BRT
        plan_BRT = present_BRT.float()
        sigma_BT1 = ((~text_padding_BT).float().unsqueeze(2)) / words_B11
        text_guard_B1T = text_padding_BT.float().unsqueeze(1) * PADDED
        region_guard_BR1 = region_padding_BR.float().unsqueeze(2) * PADDED
        for _ in range(iterations):
            proximal_BRT = kernel_BRT * plan_BRT
            for _ in range(inner_iterations):
                delta_BR1 = 1 / (regions_B11 * (proximal_BRT @ sigma_BT1) + region_guard_BR1)
                sigma_B1T = 1 / (words_B11 * (delta_BR1.transpose(1, 2) @ proximal_BRT) + text_guard_B1T)
                sigma_BT1 = sigma_B1T.transpose(1, 2)
            plan_BRT = delta_BR1 * proximal_BRT * sigma_B1T
        return plan_BRT * present_BRT


def transport_distances(
    text_BTH: Tensor, regions_BRH: Tensor, text_padding_BT: Tensor, region_padding_BR: Tensor, *, beta: float = 0.5, iterations: int = 50
) -> tuple[Tensor, Tensor]:
    """The cost of the best transport of each pair, (B,) float32 with gradient, and the plan (B, R, T) without."""
    costs_BTR = transport_costs(text_BTH, regions_BRH, text_padding_BT, region_padding_BR)
    plan_BRT = transport_plan(costs_BTR.detach(), text_padding_BT, region_padding_BR, beta=beta, iterations=iterations)
    return (costs_BTR * plan_BRT.transpose(1, 2)).sum(dim=(1, 2)), plan_BRT


def padded(rows_NH: Tensor, first_B: Tensor, lengths_B: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Sequences out of rows that stand end to end, as a rectangle: (B, longest, H), zero behind each.

    Args:
        first_B, lengths_B: (B,) int64, the first row of each sequence and how many it has, on the device of the rows.
        longest: no sequence is longer.

    Returns:
        The rectangle, and the padding (B, longest) bool, True where nothing is.
    """
    places = torch.arange(longest, device=rows_NH.device)
    padding = places >= lengths_B.unsqueeze(1)
    # Behind a sequence its own last row is taken, and zeroed: the gradients of the padding are not all added up at one row.
    chosen = (first_B.unsqueeze(1) + torch.minimum(places, (lengths_B - 1).unsqueeze(1))).clamp(min=0, max=len(rows_NH) - 1)
    taken = rows_NH.index_select(0, chosen.flatten()).view(*padding.shape, rows_NH.shape[1])
    return taken.masked_fill(padding.unsqueeze(2), 0), padding
