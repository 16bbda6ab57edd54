"""The down-stream models: one body, one small head each, under the published key names.

What a reader would get wrong: one example may be several sequences of the batch. NLVR2 pairs are rows 2k (left picture) and
2k + 1 (right picture); a retrieval group is a positive followed by its negatives; VCR shows every choice as a sequence of its own.

`PackedBatch.targets` holds, by task:

    answers   (B, A) float, soft score of each answer (VQA), or the one-hot label (SNLI-VE)
    truth     (B / 2,) or (B,) int64, 1 where the statement holds (NLVR2)
    region    (B,) int64, the referred region's number within its sequence (RefCOCO)
    correct   (B,) int64, 1 where the sequence shows the right choice (VCR)
    group_sizes (G,) int64, sequences of each group to mine hard negatives from (retrieval); without it the batch is one group

Legend of shape suffixes: B sequences, N rows of all sequences, P pairs, R regions, H hidden, A answers.

Source: github.com/ChenRocks/UNITER, model/{vqa,ve,nlvr2,itm,re,vcr}.py.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uniter.datasets.annotations.vcr import TAG_WORDS
from uniter.datasets.collate import PackedBatch
from uniter.datasets.errors import BadInput
from uniter.model.checkpoints import State, find_weights, infer_config, load_state, read_state
from uniter.model.heads import Outputs, UniterForPretraining
from uniter.model.linear import Linear, linear
from uniter.model.transport import pad_rows
from uniter.model.uniter import Encoded, UniterConfig, UniterModel, initialise, layer_norm

ABSENT = -1e4  # the published score of a region that is not there
WORDS = "uniter.embeddings.word_embeddings.weight"
TOKEN_TYPES = "uniter.embeddings.token_type_embeddings.weight"
VCR_TOKEN_TYPES = (0, 1, 0, 0)  # question, region, answer, rationale: the last two begin as copies of the first
NLVR2_TOKEN_TYPES = (0, 1, 1)  # text, left picture, right picture


class DownstreamModel(nn.Module):
    """A body that a task's head is put on.

    Attributes:
        token_type_rows: how many token types the task has, and which pre-trained row each begins as a copy of.
    """

    token_type_rows: ClassVar[tuple[int, ...]] = (0, 1)

    def __init__(self, config: UniterConfig) -> None:
        super().__init__()
        self.config = replace(config, type_vocab_size=max(config.type_vocab_size, len(self.token_type_rows)))
        self.uniter = UniterModel(self.config)

    def forward(self, batch: PackedBatch) -> Encoded:
        """The encoder's states, without a head."""
        encoded: Encoded = self.uniter(batch)
        return encoded

    def pooled(self, batch: PackedBatch) -> Tensor:
        """(B, H), the pooled first row of each sequence."""
        return self.uniter.pooled_first(batch)

    @classmethod
    def sizes(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """Constructor arguments that a fine-tuned checkpoint tells; none of them for a pre-trained one."""
        return {}

    @classmethod
    def from_checkpoint(cls, path_or_id: str | Path, *, config: UniterConfig | None = None, **sizes: Any) -> Self:
        """The task's model from a pre-trained checkpoint (as published: tables grown, head fresh) or from a fine-tuned one.

        Args:
            path_or_id: anything that `load_uniter` understands.
            config: the sizes of the body; otherwise they follow from the checkpoint.
            sizes: further constructor arguments (`answers`, ...); they overrule what the checkpoint tells.

        Raises:
            BadInput: as `load_uniter`.
        """
        weights = find_weights(path_or_id)
        state = read_state(weights)
        model = cls(config or infer_config(state, beside=weights), **{**cls.sizes(state), **sizes})
        model.start_from(state, source=str(path_or_id))
        return model.eval()

    def start_from(self, state: Mapping[str, Tensor], *, source: str) -> None:
        """Initialise as published from a pre-trained state dict, or restore a fine-tuned one."""
        load_state(self, with_grown_tables(state, self, token_type_rows=self.token_type_rows), source=source)


def with_grown_tables(state: Mapping[str, Tensor], model: nn.Module, *, token_type_rows: tuple[int, ...]) -> State:
    """A state dict whose embedding tables are as long as the model's.

    New token types are copies of the given rows; new word pieces keep the model's fresh values, and so does the bias of the
    word head at them. Tables that are long enough stay as they are.
    """
    grown, own = dict(state), model.state_dict()
    if TOKEN_TYPES in grown and len(grown[TOKEN_TYPES]) < len(own[TOKEN_TYPES]) == len(token_type_rows):
        if max(token_type_rows) >= len(grown[TOKEN_TYPES]):
            raise BadInput(f"the checkpoint knows {len(grown[TOKEN_TYPES])} token types, expected the two of a pre-trained UNITER or BERT")
        grown[TOKEN_TYPES] = grown[TOKEN_TYPES][list(token_type_rows)].clone()
    for name in (WORDS, "cls.predictions.decoder.weight", "cls.predictions.bias"):
        if name in grown and name in own and len(grown[name]) < len(own[name]):
            grown[name] = torch.cat([grown[name], own[name][len(grown[name]) :]])
    return grown


def second_stage(state: Mapping[str, Tensor], config: UniterConfig, *, extra_words: int, source: str) -> UniterForPretraining:
    """The model of VCR's second pre-training: more word pieces (the object tags), four token types.

    Differs from the published code: the word head keeps its pre-trained transform instead of beginning anew.

    Args:
        state: a pre-trained state dict of sizes `config`.
        extra_words: word pieces to add; their rows begin random.
        source: what to call the checkpoint in messages.
    """
    types = max(config.type_vocab_size, len(VCR_TOKEN_TYPES))
    model = UniterForPretraining(replace(config, vocab_size=config.vocab_size + extra_words, type_vocab_size=types))
    load_state(model, with_grown_tables(state, model, token_type_rows=VCR_TOKEN_TYPES), source=source)
    return model.eval()


def _two_layers(width: int, inner: int, outputs: int, activation: type[nn.Module]) -> nn.Sequential:
    return nn.Sequential(Linear(width, inner), activation(), layer_norm(inner), Linear(inner, outputs))


class UniterForVqa(DownstreamModel):
    """VQA (3,129 answers as published) and SNLI-VE (3 labels: contradiction, entailment, neutral): one score an answer."""

    def __init__(self, config: UniterConfig, *, answers: int = 3129) -> None:
        super().__init__(config)
        self.vqa_output = _two_layers(config.hidden_size, 2 * config.hidden_size, answers, nn.GELU)
        initialise(self.vqa_output, deviation=config.initializer_range)

    @classmethod
    def sizes(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        return {"answers": len(state["vqa_output.3.weight"])} if "vqa_output.3.weight" in state else {}

    def answers(self, batch: PackedBatch) -> Outputs:
        """scores (B, A), logits."""
        return {"scores": self.vqa_output(self.pooled(batch))}


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


class UniterForRetrieval(DownstreamModel):
    """Image-text retrieval: one score a pair. Before fine-tuning the score is ITM's logit of "they match"."""

    def __init__(self, config: UniterConfig) -> None:
        super().__init__(config)
        self.itm_output = Linear(config.hidden_size, 2)
        self.rank_output = Linear(config.hidden_size, 1)
        initialise(self.itm_output, deviation=config.initializer_range)
        initialise(self.rank_output, deviation=config.initializer_range)

    def start_from(self, state: Mapping[str, Tensor], *, source: str) -> None:
        """As published, the ranking head begins as row 1 of ITM's; a fine-tuned one is kept, and the values are copied, not shared."""
        state = dict(state)
        for part in ("weight", "bias"):
            if f"itm_output.{part}" in state and f"rank_output.{part}" not in state:
                state[f"rank_output.{part}"] = state[f"itm_output.{part}"][1:2].clone()
        super().start_from(state, source=source)

    def ranks(self, batch: PackedBatch) -> Outputs:
        """scores (B, 1): the higher, the better text and image match."""
        return {"scores": self.rank_output(self.pooled(batch))}

    def hard_negatives(self, batch: PackedBatch, *, count: int) -> Tensor:
        """The sequences with which to train: of each group its first, the positive, and the `count` negatives that score highest,
        best first; fewer of every group where one has fewer.

        Scored without dropout and without gradient, one group after the other.

        Returns:
            (G * (1 + count),) int64 numbers of sequences.
        """
        sequences = torch.arange(len(batch.region_counts_B))
        sizes = batch.targets["group_sizes"].tolist() if "group_sizes" in batch.targets else [len(sequences)]
        fewest = min(count, min(sizes) - 1)
        chosen = []
        for group in torch.split(sequences, sizes):
            with torch.no_grad(), evaluating(self):
                scores = self.ranks(take_sequences(batch, group))["scores"].squeeze(1)
            hardest = scores[1:].topk(fewest, sorted=True).indices + 1
            chosen.append(group[torch.cat([hardest.new_zeros(1), hardest]).cpu()])
        return torch.cat(chosen)

    def mined_ranks(self, batch: PackedBatch, *, count: int) -> Outputs:
        """scores (G * (1 + count), 1) of each group's positive and its hardest negatives, in the model's own mode, with gradient."""
        return self.ranks(take_sequences(batch, self.hard_negatives(batch, count=count)))


class UniterForReferring(DownstreamModel):
    """RefCOCO, RefCOCO+, RefCOCOg: one score a region. `layers` 1 or 2 (published option `mlp`)."""

    def __init__(self, config: UniterConfig, *, layers: int = 1) -> None:
        super().__init__(config)
        if layers not in (1, 2):
            raise BadInput(f"the referring head has 1 or 2 layers, got {layers}")
        width = config.hidden_size
        self.re_output: nn.Module = Linear(width, 1) if layers == 1 else _two_layers(width, width, 1, nn.GELU)
        initialise(self.re_output, deviation=config.initializer_range)

    @classmethod
    def sizes(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        return {"layers": 2} if "re_output.3.weight" in state else {}

    def regions(self, batch: PackedBatch) -> Outputs:
        """scores (B, most regions), -10000 where a sequence has fewer, and `region_counts` (B,)."""
        scores, padding = pad_rows(
            self.re_output(self.uniter.states(batch, lambda layout: layout.region_rows_R)).float(), batch.region_counts_B
        )
        return {
            "scores": scores.squeeze(2).masked_fill(padding, ABSENT),
            "region_counts": batch.region_counts_B.to(scores.device),
        }


class UniterForVcr(DownstreamModel):
    """VCR: every choice is a sequence with two scores, column 1 = this is the right one."""

    token_type_rows = VCR_TOKEN_TYPES

    def __init__(self, config: UniterConfig, *, words: int = 0) -> None:
        """`words`: the vocabulary is grown to so many word pieces (the object tags) where the checkpoint does not know them yet."""
        if words > config.vocab_size + len(TAG_WORDS):
            raise BadInput(
                f"the texts were built with {words:,} word pieces, the model has {config.vocab_size:,}; VCR's object tags are "
                f"{len(TAG_WORDS)} more at most, so use the model's tokenizer"
            )
        super().__init__(replace(config, vocab_size=max(config.vocab_size, words)))
        self.vcr_output = _two_layers(config.hidden_size, 2 * config.hidden_size, 2, nn.ReLU)
        initialise(self.vcr_output, deviation=config.initializer_range)

    @classmethod
    def sizes(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        return {"words": len(state[WORDS])} if WORDS in state else {}

    def choices(self, batch: PackedBatch) -> Outputs:
        """scores (B, 2); the score of a choice in evaluation is column 1."""
        return {"scores": self.vcr_output(self.pooled(batch))}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, afterwards in the mode it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def take_sequences(batch: PackedBatch, numbers: Tensor) -> PackedBatch:
    """A batch of some sequences of another one, in the given order; without its targets and ids, which belong to examples.

    Args:
        numbers: (K,) int64 numbers of sequences.
    """
    host = numbers.cpu()

    def places(lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        lengths_B = lengths_B.cpu()
        starts_B, taken = lengths_B.cumsum(0) - lengths_B, lengths_B[host]
        ends = taken.cumsum(0)
        within = torch.arange(int(taken.sum())) - (ends - taken).repeat_interleave(taken)
        return (starts_B[host].repeat_interleave(taken) + within).to(batch.input_ids_T.device), taken

    texts, text_lengths = places(batch.text_lengths_B)
    regions, region_counts = places(batch.region_counts_B)
    return PackedBatch(
        input_ids_T=batch.input_ids_T[texts],
        text_positions_T=batch.text_positions_T[texts],
        text_types_T=batch.text_types_T[texts],
        features_RD=batch.features_RD[regions],
        positions_R7=batch.positions_R7[regions],
        region_types_R=batch.region_types_R[regions],
        text_lengths_B=text_lengths,
        region_counts_B=region_counts,
        masked_regions_R=None if batch.masked_regions_R is None else batch.masked_regions_R[regions],
    )
