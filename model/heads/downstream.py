"""The down-stream models: one body, one small head each, under the published key names.

What a reader would get wrong: one example may be several sequences of the batch. NLVR2 pairs are rows 2k (left picture) and
2k + 1 (right picture); a retrieval group is a positive followed by its negatives; VCR shows every choice as a sequence of its own.

`PackedBatch.targets` holds, by task:

    answers   (B, A) float, soft score of each answer (VQA), or the one-hot label (SNLI-VE)
    truth     (B / 2,) or (B,) int64, 1 where the statement holds (NLVR2)
    region    (B,) int64, the referred region's number within its sequence (RefCOCO)
    correct   (B,) int64, 1 where the sequence shows the right choice (VCR)
    rival     (B,) int64, the wrong region that a ranking loss compares with, -1 for the one that scores best (RefCOCO)
    group_sizes (G,) int64 on the host, sequences of each group to mine hard negatives from (retrieval); without it the batch is one group

Legend of shape suffixes: B sequences, N rows of all sequences, P pairs, R regions, H hidden, A answers.

Source: github.com/ChenRocks/UNITER, model/{vqa,ve,nlvr2,itm,re,vcr}.py.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from uniter.datasets.batches.collate import PackedBatch
from uniter.datasets.batches.layout import take_sequences
from uniter.datasets.errors import BadInput
from uniter.datasets.text_db.annotations.vcr import TAG_WORDS
from uniter.model.heads.pretraining import Outputs
from uniter.model.linear import Linear
from uniter.model.sharing import Shared
from uniter.model.transport import padded
from uniter.model.uniter import Encoded, UniterConfig, UniterModel, initialise, layer_norm

ABSENT = -1e4  # the published score of a region that is not there


WORDS = "uniter.embeddings.word_embeddings.weight"


TOKEN_TYPES = "uniter.embeddings.token_type_embeddings.weight"


VCR_TOKEN_TYPES = (0, 1, 0, 0)  # question, region, answer, rationale: the last two begin as copies of the first


class DownstreamModel(Shared):
    """A body that a task's head is put on.

    Attributes:
        unread: name prefixes of tensors that no answer depends on.
        token_type_rows: how many token types the task has, and which pre-trained row each begins as a copy of.
    """

    token_type_rows: ClassVar[tuple[int, ...]] = (0, 1)
    unread: ClassVar[tuple[str, ...]] = ("uniter.img_embeddings.mask_embedding.",)

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

    @staticmethod
    def begun(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """A pre-trained state dict with what of this task's head begins as a copy of it; a fine-tuned one as it is."""
        return state


def two_layers(width: int, inner: int, outputs: int, activation: type[nn.Module]) -> nn.Sequential:
    """The published heads: a layer, activation, norm, a layer."""
    return nn.Sequential(Linear(width, inner), activation(), layer_norm(inner), Linear(inner, outputs))


class UniterForVqa(DownstreamModel):
    """VQA (3,129 answers as published) and SNLI-VE (3 labels: contradiction, entailment, neutral): one score an answer."""

    def __init__(self, config: UniterConfig, *, answers: int = 3129) -> None:
        super().__init__(config)
        self.vqa_output = two_layers(config.hidden_size, 2 * config.hidden_size, answers, nn.GELU)
        initialise(self.vqa_output, deviation=config.initializer_range)

    @classmethod
    def sizes(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """`answers` of a checkpoint that has this head, nothing of others."""
        return {"answers": len(state["vqa_output.3.weight"])} if "vqa_output.3.weight" in state else {}

    @property
    def answer_count(self) -> int:
        """A, how many answers it knows."""
        last = self.vqa_output[3]
        assert isinstance(last, nn.Linear)
        return last.out_features

    def answers(self, batch: PackedBatch) -> Outputs:
        """scores (B, A), logits."""
        return {"scores": self.vqa_output(self.pooled(batch))}


class UniterForRetrieval(DownstreamModel):
    """Image-text retrieval: one score a pair. Before fine-tuning the score is ITM's logit of "they match"."""

    unread = (*DownstreamModel.unread, "itm_output.")

    def __init__(self, config: UniterConfig) -> None:
        super().__init__(config)
        self.itm_output = Linear(config.hidden_size, 2)
        self.rank_output = Linear(config.hidden_size, 1)
        initialise(self.itm_output, deviation=config.initializer_range)
        initialise(self.rank_output, deviation=config.initializer_range)

    @staticmethod
    def begun(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """As published, the ranking head begins as row 1 of ITM's; a fine-tuned one is kept, and the values are copied, not shared."""
        begun = dict(state)
        for part in ("weight", "bias"):
            if f"itm_output.{part}" in state and f"rank_output.{part}" not in state:
                begun[f"rank_output.{part}"] = state[f"itm_output.{part}"][1:2].clone()
        return begun

    def ranks(self, batch: PackedBatch) -> Outputs:
        """scores (B, 1): the higher, the better text and image match."""
        return {"scores": self.rank_output(self.pooled(batch))}

    def hard_negatives(self, batch: PackedBatch, *, count: int) -> Tensor:
        """The sequences with which to train: of each group its first, the positive, and the `count` negatives that score highest,
        best first; fewer of every group where one has fewer.

        Scored without dropout and without gradient.

        Returns:
            (G * (1 + count),) int64 numbers of sequences.
        """
        sizes = group_sizes(batch)
        fewest = min(count, min(sizes) - 1)
        with torch.no_grad(), evaluating(self):
            scores_B = self.ranks(batch)["scores"].squeeze(1)
        chosen, first = [], 0
        for scores in torch.split(scores_B, sizes):
            hardest = scores[1:].topk(fewest, sorted=True).indices + 1
            chosen.append(torch.cat([hardest.new_zeros(1), hardest]) + first)
            first += len(scores)
        return torch.cat(chosen)

    def mined(self, batch: PackedBatch, *, count: int) -> PackedBatch:
        """The batch laid out as each group's positive and its `count` hardest negatives only, G * (1 + count) sequences."""
        numbers = self.hard_negatives(batch, count=count)
        # How long the chosen ones are only the device knows: there is room for the longest.
        lengths_B, sizes = batch.text_lengths_B.numpy() + batch.region_counts_B.numpy(), group_sizes(batch)
        negatives = len(numbers) // len(sizes) - 1
        groups = np.split(lengths_B, np.cumsum(sizes)[:-1])
        rows = sum(int(group[0] + np.sort(group[1:])[::-1][:negatives].sum()) for group in groups)
        return replace(batch, layout=take_sequences(batch.layout, numbers, rows=rows))


def group_sizes(batch: PackedBatch) -> list[int]:
    """Sequences of each group to mine from; the whole batch is one where it does not say."""
    sizes: list[int] = batch.targets["group_sizes"].tolist() if "group_sizes" in batch.targets else [len(batch.text_lengths_B)]
    return sizes


class UniterForReferring(DownstreamModel):
    """RefCOCO, RefCOCO+, RefCOCOg: one score a region. `layers` 1 or 2 (published option `mlp`)."""

    def __init__(self, config: UniterConfig, *, layers: int = 1) -> None:
        super().__init__(config)
        if layers not in (1, 2):
            raise BadInput(f"the referring head has 1 or 2 layers, got {layers}")
        width = config.hidden_size
        self.re_output: nn.Module = Linear(width, 1) if layers == 1 else two_layers(width, width, 1, nn.GELU)
        initialise(self.re_output, deviation=config.initializer_range)

    @classmethod
    def sizes(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """`layers` of a checkpoint whose head has two, nothing of others: one is the default."""
        return {"layers": 2} if "re_output.3.weight" in state else {}

    def regions(self, batch: PackedBatch) -> Outputs:
        """scores (B, most regions), -10000 where a sequence has fewer, and `region_counts` (B,)."""
        layout = batch.layout
        counts_B = layout.region_counts_B
        states_RH = self.uniter.states(batch, layout, layout.region_rows_R)
        scores, padding = padded(self.re_output(states_RH).float(), counts_B.cumsum(0) - counts_B, counts_B, layout.most_regions)
        return {"scores": scores.squeeze(2).masked_fill(padding, ABSENT), "region_counts": counts_B}


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
        self.vcr_output = two_layers(config.hidden_size, 2 * config.hidden_size, 2, nn.ReLU)
        initialise(self.vcr_output, deviation=config.initializer_range)

    @classmethod
    def sizes(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """`words`, the vocabulary with VCR's own names in it, of a checkpoint that has them."""
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
