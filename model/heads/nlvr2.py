"""Three heads for NLVR2: triplet, paired, and paired with attention."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uniter.datasets.batches.collate import PackedBatch
from uniter.model.heads.downstream import ABSENT, DownstreamModel
from uniter.model.heads.pretraining import Outputs
from uniter.model.linear import Linear, linear
from uniter.model.transport import pad_rows
from uniter.model.uniter import Encoded, UniterConfig, initialise

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
    """Attention of one sequence to another; the parameters of torch's MultiheadAttention, but on rows without padding."""

    def __init__(self, config: UniterConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.in_proj_weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(3 * width, width)))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = Linear(width, width)
        self.heads, self.dropout = config.num_attention_heads, nn.Dropout(config.attention_probs_dropout_prob)
        initialise(self.out_proj, deviation=config.initializer_range)

    def forward(self, asking_NH: Tensor, asking_lengths_P: Tensor, asked_NH: Tensor, asked_lengths_P: Tensor) -> Tensor:
        """(N, H): for each row of the asking sequences what it takes from the asked sequence of the same pair."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        query, asking_padding = pad_rows(linear(asking_NH, weights[0], biases[0]), asking_lengths_P)
        key, asked_padding = pad_rows(linear(asked_NH, weights[1], biases[1]), asked_lengths_P)
        value, _ = pad_rows(linear(asked_NH, weights[2], biases[2]), asked_lengths_P)
        query, key, value = (part.view(*part.shape[:2], self.heads, -1).transpose(1, 2) for part in (query, key, value))
        taken = F.scaled_dot_product_attention(
            query, key, value, attn_mask=~asked_padding[:, None, None, :], dropout_p=self.dropout.p if self.training else 0.0
        )
        output_NH: Tensor = self.out_proj(taken.transpose(1, 2).flatten(2)[~asking_padding])
        return output_NH


class AttentionPool(nn.Module):
    def __init__(self, config: UniterConfig) -> None:
        super().__init__()
        self.fc = nn.Sequential(Linear(config.hidden_size, 1), nn.ReLU())
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)
        initialise(self.fc, deviation=config.initializer_range)

    def forward(self, rows_NH: Tensor, lengths_P: Tensor) -> Tensor:
        """(P, H), the weighted sum of each sequence's rows."""
        scores, padding = pad_rows(self.fc(rows_NH), lengths_P)
        weights = self.dropout(scores.squeeze(2).masked_fill(padding, ABSENT).softmax(dim=1))
        padded, _ = pad_rows(rows_NH, lengths_P)
        pooled_PH: Tensor = (weights.unsqueeze(1) @ padded).squeeze(1)
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
        encoded = self(batch)
        left_NH, left_lengths_P = rows_of_sequences(encoded, slice(0, None, 2))
        right_NH, right_lengths_P = rows_of_sequences(encoded, slice(1, None, 2))
        left_taken_NH = self.attn1(left_NH, left_lengths_P, right_NH, right_lengths_P)
        right_taken_NH = self.attn2(right_NH, right_lengths_P, left_NH, left_lengths_P)
        left_PH = self.attn_pool(self.fc(torch.cat([left_taken_NH, left_NH], dim=1)), left_lengths_P)
        right_PH = self.attn_pool(self.fc(torch.cat([right_taken_NH, right_NH], dim=1)), right_lengths_P)
        return {"scores": self.nlvr2_output(torch.cat([left_PH, right_PH], dim=1))}


def rows_of_sequences(encoded: Encoded, chosen: slice) -> tuple[Tensor, Tensor]:
    """The states of some sequences end to end, in the batch's order, and their lengths."""
    first, lengths = encoded.first_rows_B[chosen], encoded.sequence_lengths_B[chosen]
    starts = lengths.cumsum(0) - lengths
    within = torch.arange(int(lengths.sum()), device=lengths.device) - starts.repeat_interleave(lengths)
    return encoded.hidden_NH[first.repeat_interleave(lengths) + within], lengths
