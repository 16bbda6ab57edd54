"""What a model makes of one text and one picture, for looking at: match, attention from words to regions, transport plan.

Legend of shape suffixes: T text tokens with [CLS] and [SEP], R regions, A heads, L layers.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from uniter.datasets.collate import collate
from uniter.datasets.samples import Sample, TokenSequence
from uniter.model.heads import UniterForPretraining
from uniter.model.transport import transport_costs, transport_plan


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
    device = model.uniter.embeddings.word_embeddings.weight.device
    batch = collate([Sample(example, [sequence])]).to(device)
    words, regions = len(sequence.input_ids), len(sequence.features)
    (attention_ANN,) = model.uniter.attentions(batch)[-1]
    to_regions_TR = attention_ANN[:, :words, words:].mean(dim=0)
    encoded = model.uniter(batch)
    match = torch.softmax(model.itm_output(model.uniter.pooled(encoded)).float(), dim=1)[0, 1]
    no_words, no_regions = (torch.zeros(1, count, dtype=torch.bool, device=device) for count in (words, regions))
    costs_BTR = transport_costs(encoded.text_TH[None], encoded.regions_RH[None], no_words, no_regions)
    plan_BRT = transport_plan(costs_BTR, no_words, no_regions)
    return Look(
        match=float(match),
        attention_TR=(to_regions_TR / to_regions_TR.sum(dim=1, keepdim=True).clamp_min(1e-12)).float().cpu().numpy(),
        plan_TR=plan_BRT[0].T.float().cpu().numpy(),
    )
