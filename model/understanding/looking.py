"""What a model makes of one text and one picture, for looking at: match, attention from words to regions, transport plan.

Legend of shape suffixes: T text tokens with [CLS] and [SEP], R regions, A heads, L layers.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from uniter.datasets.batches.collate import PackedBatch, collate
from uniter.datasets.batches.example import Sample, TokenSequence
from uniter.model.heads.pretraining import UniterForPretraining
from uniter.model.transport import transport_costs, transport_plan
from uniter.model.uniter import Encoded, UniterModel


@dataclass(frozen=True)
class Look:
    """What was seen.

    Attributes:
        match: probability that text and picture belong together, by the pre-training head.
        attention_TR: (T, R) float32, how much each token attends to each region: the mean over the last layer's heads of what goes to
            regions at all, each row summing to 1.
        plan_TR: (T, R) float32, the optimal transport plan between tokens and regions; rows sum to 1 / T, columns to 1 / R.
    """

    match: float
    attention_TR: NDArray[np.float32]
    plan_TR: NDArray[np.float32]


@torch.no_grad()
def look(model: UniterForPretraining, sequence: TokenSequence, *, example: str = "") -> Look:
    """Look at one pair of text and picture; the model should be in eval mode.

    Args:
        model: on any device.
        sequence: the text with [CLS] and [SEP], at least one region.
        example: its id, for messages.
    """
    batch = collate([Sample(example, [sequence])]).to(model.uniter.embeddings.word_embeddings.weight.device)
    attention_TR = attention_to_regions(model.uniter, batch)
    encoded = model.uniter(batch)
    match = torch.softmax(model.itm_output(model.uniter.pooled(encoded)).float(), dim=1)[0, 1]
    return Look(match=float(match), attention_TR=attention_TR, plan_TR=word_region_plan(encoded))


@torch.no_grad()
def attention_to_regions(body: UniterModel, batch: PackedBatch) -> NDArray[np.float32]:
    """`Look.attention_TR` of a batch of one sequence, for any model's body."""
    words = len(batch.input_ids_T)
    (attention_ANN,) = body.attentions(batch)[-1]
    to_regions_TR = attention_ANN[:, :words, words:].mean(dim=0)
    shares_TR: NDArray[np.float32] = (to_regions_TR / to_regions_TR.sum(dim=1, keepdim=True).clamp_min(1e-12)).float().cpu().numpy()
    return shares_TR


@torch.no_grad()
def word_region_plan(encoded: Encoded) -> NDArray[np.float32]:
    """`Look.plan_TR` of an encoded batch of one sequence."""
    text_TH, regions_RH = encoded.text_TH, encoded.regions_RH
    no_words, no_regions = (torch.zeros(1, len(rows), dtype=torch.bool, device=rows.device) for rows in (text_TH, regions_RH))
    plan_BRT = transport_plan(transport_costs(text_TH[None], regions_RH[None], no_words, no_regions), no_words, no_regions)
    plan_TR: NDArray[np.float32] = plan_BRT[0].T.float().cpu().numpy()
    return plan_TR
