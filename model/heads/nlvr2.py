"""Three heads for NLVR2: triplet, paired, and paired with attention."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uniter.datasets.batches.collate import PackedBatch
from uniter.model.heads.downstream import ABSENT, DownstreamModel
from uniter.model.heads.pretraining import Outputs
from uniter.model.linear import Linear, linear
from uniter.model.transport import padded
from uniter.model.uniter import UniterConfig, initialise

NLVR2_TOKEN_TYPES = (0, 1, 1)  # text, left picture, right picture


class UniterForNlvr2Triplet(DownstreamModel):
    """NLVR2 with both pictures in one sequence, left regions of type 1, right ones of type 2."""

    token_type_rows = NLVR2_TOKEN_TYPES

    def __init__(self, config: UniterConfig) -> None:
        super().__init__(config)
        self.nlvr2_output = Linear(config.hidden_size, 2)
        initialise(self.nlvr2_output, deviation=config.initializer_range)

    def statements(self, batch: PackedBatch) -> Outputs:
        """scores (B, 2), column 1 = the statement holds."""
        return {"scores": self.nlvr2_output(self.pooled(batch))}


class UniterForNlvr2Paired(DownstreamModel):
    """NLVR2 with two sequences a statement; their pooled states side by side."""

    token_type_rows = NLVR2_TOKEN_TYPES

    def __init__(self, config: UniterConfig) -> None:
        super().__init__(config)
        self.nlvr2_output = Linear(2 * config.hidden_size, 2)
        initialise(self.nlvr2_output, deviation=config.initializer_range)

    def statements(self, batch: PackedBatch) -> Outputs:
        """scores (P, 2), column 1 = the statement holds."""
        return {"scores": self.nlvr2_output(self.pooled(batch).view(-1, 2 * self.config.hidden_size))}


class CrossAttention(nn.Module):
    """Attention of one sequence to another; the parameters of torch's MultiheadAttention."""

    def __init__(self, config: UniterConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.in_proj_weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(3 * width, width)))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = Linear(width, width)
        self.heads, self.dropout = config.num_attention_heads, nn.Dropout(config.attention_probs_dropout_prob)
        initialise(self.out_proj, deviation=config.initializer_range)

    def forward(self, asking_PLH: Tensor, asked_PLH: Tensor, asked_padding_PL: Tensor) -> Tensor:
        """(P, L, H): for each row of the asking sequences what it takes from the asked sequence of the same pair."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        rows = asking_PLH, asked_PLH, asked_PLH
        query, key, value = (
            linear(part, weight, bias).view(*part.shape[:2], self.heads, -1).transpose(1, 2)
            for part, weight, bias in zip(rows, weights, biases, strict=True)
        )
        taken = F.scaled_dot_product_attention(
            query, key, value, attn_mask=~asked_padding_PL[:, None, None, :], dropout_p=self.dropout.p if self.training else 0.0
        )
        output_PLH: Tensor = self.out_proj(taken.transpose(1, 2).flatten(2))
        return output_PLH


class AttentionPool(nn.Module):
    """A sequence as one vector: its rows summed, weighted by the softmax of what a layer scores them. Source: UNITER, section 4.1."""

    def __init__(self, config: UniterConfig) -> None:
        super().__init__()
        self.fc = nn.Sequential(Linear(config.hidden_size, 1), nn.ReLU())
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)
        initialise(self.fc, deviation=config.initializer_range)

    def forward(self, rows_PLH: Tensor, padding_PL: Tensor) -> Tensor:
        """(P, H), the weighted sum of each sequence's rows."""
        scores_PL = self.fc(rows_PLH).squeeze(2).masked_fill(padding_PL, ABSENT)
        weights_PL = self.dropout(scores_PL.softmax(dim=1))
        pooled_PH: Tensor = (weights_PL.unsqueeze(1) @ rows_PLH).squeeze(1)
        return pooled_PH


class UniterForNlvr2PairedAttention(DownstreamModel):
    """NLVR2 with two sequences a statement that attend to each other (the published configurations' choice). No pooler."""

    token_type_rows = NLVR2_TOKEN_TYPES
    unread = (*DownstreamModel.unread, "uniter.pooler.")

    def __init__(self, config: UniterConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.attn1, self.attn2 = CrossAttention(config), CrossAttention(config)
        self.fc = nn.Sequential(Linear(2 * width, width), nn.ReLU(), nn.Dropout(config.hidden_dropout_prob))
        self.attn_pool = AttentionPool(config)
        self.nlvr2_output = Linear(2 * width, 2)
        initialise(self.fc, deviation=config.initializer_range)
        initialise(self.nlvr2_output, deviation=config.initializer_range)

    def statements(self, batch: PackedBatch) -> Outputs:
        """scores (P, 2), column 1 = the statement holds."""
        hidden_NH, layout = self(batch).hidden_NH, batch.layout
        (left, left_padding), (right, right_padding) = (
            padded(hidden_NH, layout.first_rows_B[side::2], layout.sequence_lengths_B[side::2], layout.longest) for side in (0, 1)
        )
        left_taken, right_taken = self.attn1(left, right, right_padding), self.attn2(right, left, left_padding)
        left_PH = self.attn_pool(self.fc(torch.cat([left_taken, left], dim=2)), left_padding)
        right_PH = self.attn_pool(self.fc(torch.cat([right_taken, right], dim=2)), right_padding)
        return {"scores": self.nlvr2_output(torch.cat([left_PH, right_PH], dim=1))}
