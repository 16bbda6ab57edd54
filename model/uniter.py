"""UNITER's body: word pieces and regions of an image through one BERT encoder.

The parameters bear the published names, so that published state dicts load and ours load elsewhere. What differs from the
published code is that nothing is ever padded: hidden states are (N, H), all sequences end to end (see attention.py).

Legend of shape suffixes: B sequences, N rows of all sequences, T text tokens, R regions, D feature width, H hidden.

Source: Chen et al., "UNITER: UNiversal Image-TExt Representation Learning", ECCV 2020; github.com/ChenRocks/UNITER.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from uniter.datasets.batches.collate import PackedBatch
from uniter.datasets.batches.layout import Layout
from uniter.datasets.errors import BadInput, unknown_name
from uniter.model.attention import AttentionKernel, attend, attention_probabilities
from uniter.model.linear import Linear, linear
from uniter.model.transport import in_single_precision

NORM_EPSILON = 1e-12


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu, "swish": F.silu}


PRESETS: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 512},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
}


@dataclass(frozen=True)
class UniterConfig:
    """The sizes of a UNITER. Names as in the published configuration files; the last two are constructor arguments there.

    Attributes:
        image_feature_size: width D of a region's feature.
        label_classes: classes of the detector's distribution, background (column 0) included.
    """

    vocab_size: int = 28996
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    image_feature_size: int = 2048
    label_classes: int = 1601

    def __post_init__(self) -> None:
        if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
            raise BadInput(
                f"hidden_size {self.hidden_size} cannot be shared by {self.num_attention_heads} attention heads; choose a divisor"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise BadInput(unknown_name("hidden_act", self.hidden_act, ACTIVATIONS))

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Self:
        """One of "tiny", "base" and "large" (the last two as published), with single fields replaced."""
        if name not in PRESETS:
            raise BadInput(unknown_name("model size", name, PRESETS))
        return cls(**{**PRESETS[name], **overrides})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], **overrides: Any) -> Self:
        """From a mapping that may hold more than our fields (BERT's configurations do); absent ones take the defaults."""
        known = {field.name for field in dataclasses.fields(cls)}
        try:
            return cls(**{name: value for name, value in {**values, **overrides}.items() if name in known})
        except TypeError as error:
            raise BadInput(f"this is no model configuration: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The sizes as plain values, as `config.json` has them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, path: str | Path, **overrides: Any) -> Self:
        """Read a configuration file: ours, a published one or BERT's."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BadInput(f"cannot read the model configuration {path}: {error}") from error
        if not isinstance(values, dict):
            raise BadInput(f"the model configuration {path} holds a {type(values).__name__}, expected an object")
        return cls.from_dict(values, **overrides)

    def to_json(self, path: str | Path) -> None:
        """Write them as a `config.json`."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")


def layer_norm(width: int) -> nn.LayerNorm:
    """The normalisation that all of UNITER uses, with BERT's epsilon."""
    return nn.LayerNorm(width, eps=NORM_EPSILON)


def initialise(module: nn.Module, *, deviation: float) -> None:
    """Linear and embedding weights normal, padding rows too; biases 0; norms 1 and 0 (BERT's way)."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=deviation)
        if isinstance(part, nn.LayerNorm):
            nn.init.ones_(part.weight)
        if isinstance(part, nn.Linear | nn.LayerNorm) and part.bias is not None:
            nn.init.zeros_(part.bias)


class TextEmbeddings(nn.Module):
    """Word pieces with their places and types, summed and normalised. Source: UNITER, section 3.1."""

    def __init__(self, config: UniterConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=0)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = layer_norm(config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, ids_T: Tensor, positions_T: Tensor, types_T: Tensor, shifts_TH: Tensor | None = None) -> Tensor:
        """T word pieces, (T,) int64 each, to (T, H); adversarial training adds `shifts_TH` to the words alone."""
        words_TH = self.word_embeddings(ids_T)
        if shifts_TH is not None:
            words_TH = words_TH + shifts_TH
        summed_TH = words_TH + self.position_embeddings(positions_T) + self.token_type_embeddings(types_T)
        embedded_TH: Tensor = self.dropout(self.LayerNorm(summed_TH))
        return embedded_TH


class RegionEmbeddings(nn.Module):
    """A region's feature and place. Differs from the paper: each projection is normed by itself, and the token type is added."""

    def __init__(self, config: UniterConfig) -> None:
        super().__init__()
        self.img_linear = Linear(config.image_feature_size, config.hidden_size)
        self.img_layer_norm = layer_norm(config.hidden_size)
        self.pos_layer_norm = layer_norm(config.hidden_size)
        self.pos_linear = Linear(7, config.hidden_size)
        # Lives in feature space: what a masked region shows instead of its feature. Row 0 means "not masked" and is never read.
        self.mask_embedding = nn.Embedding(2, config.image_feature_size, padding_idx=0)
        self.LayerNorm = layer_norm(config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forget_unmasked(self) -> None:
        """The published forward overwrites row 0 whenever regions are masked; it shows in state dicts and trajectories."""
        self.mask_embedding.weight.data[0].zero_()

    def forward(
        self, features_RD: Tensor, positions_R7: Tensor, types_RH: Tensor, masked_R: Tensor | None, shifts_RD: Tensor | None = None
    ) -> Tensor:
        """R regions to (R, H).

        Args:
            features_RD: (R, D). positions_R7: (R, 7) fractions of the image: x0 y0 x1 y1 w h area.
            types_RH: (R, H) the embedding of the type "region".
            masked_R: (R,) bool, True where the feature is hidden; None: nowhere.
            shifts_RD: added to the features, as adversarial training does.
        """
        features_RD = features_RD.to(self.img_linear.weight.dtype)
        if masked_R is not None:
            if not torch.compiler.is_compiling():
                self.forget_unmasked()
            features_RD = features_RD + masked_R.to(features_RD.dtype).unsqueeze(1) * self.mask_embedding.weight[1]
        # Half precision would round most of a small shift away (measured: a cosine of 0.33 with the one that was meant in bf16).
        with in_single_precision(features_RD.device) if shifts_RD is not None else contextlib.nullcontext():
            projected_RH = self.img_linear(features_RD if shifts_RD is None else features_RD + shifts_RD)
        appearance_RH = self.img_layer_norm(projected_RH)
        place_RH = self.pos_layer_norm(self.pos_linear(positions_R7.to(self.pos_linear.weight.dtype)))
        embedded_RH: Tensor = self.dropout(self.LayerNorm(appearance_RH + place_RH + types_RH))
        return embedded_RH


class DenseAddNorm(nn.Module):
    """Linear, dropout, residual, norm: how each half of a BERT layer ends."""

    def __init__(self, inner: int, config: UniterConfig) -> None:
        super().__init__()
        self.dense = Linear(inner, config.hidden_size)
        self.LayerNorm = layer_norm(config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, inner_NI: Tensor, residual_NH: Tensor) -> Tensor:
        """(N, I) and what it is added to, (N, H), to (N, H)."""
        normed_NH: Tensor = self.LayerNorm(self.dropout(self.dense(inner_NI)) + residual_NH)
        return normed_NH


class SelfAttention(nn.Module):
    """BERT's attention of many heads, on packed sequences."""

    def __init__(self, config: UniterConfig) -> None:
        super().__init__()
        self.query = Linear(config.hidden_size, config.hidden_size)
        self.key = Linear(config.hidden_size, config.hidden_size)
        self.value = Linear(config.hidden_size, config.hidden_size)
        # Holds the probability only: as a module it is found by whoever sets the dropout of a whole model.
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)
        self.heads = config.num_attention_heads

    def forward(self, hidden_NH: Tensor, layout: Layout, kernel: AttentionKernel) -> Tensor:
        """(N, H) rows of all sequences of the layout to (N, H), each attending to its own sequence alone."""
        dropout = self.dropout.p if self.training else 0.0
        parts = self.query, self.key, self.value
        weight, bias = torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts])
        query, key, value = linear(hidden_NH, weight, bias).chunk(3, dim=1)  # one product instead of three
        return attend(query, key, value, layout, heads=self.heads, dropout=dropout, kernel=kernel)


class Attention(nn.Module):
    """Self-attention, projected, added to its input and normalised."""

    def __init__(self, config: UniterConfig) -> None:
        super().__init__()
        self.self = SelfAttention(config)
        self.output = DenseAddNorm(config.hidden_size, config)

    def forward(self, hidden_NH: Tensor, layout: Layout, kernel: AttentionKernel, rows_S: Tensor | None) -> Tensor:
        """(N, H) to (N, H), or to (S, H) of the rows that are asked for."""
        context_NH = self.self(hidden_NH, layout, kernel)
        if rows_S is not None:
            context_NH, hidden_NH = context_NH.index_select(0, rows_S), hidden_NH.index_select(0, rows_S)
        attended_SH: Tensor = self.output(context_NH, hidden_NH)
        return attended_SH


class Intermediate(nn.Module):
    """The wide layer of a block, with its activation."""

    def __init__(self, config: UniterConfig) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, hidden_NH: Tensor) -> Tensor:
        """(N, H) to (N, I)."""
        return self.activation(self.dense(hidden_NH))


class Layer(nn.Module):
    """A block of the encoder: attention, then two dense layers."""

    def __init__(self, config: UniterConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.intermediate = Intermediate(config)
        self.output = DenseAddNorm(config.intermediate_size, config)

    def forward(self, hidden_NH: Tensor, layout: Layout, kernel: AttentionKernel, rows_S: Tensor | None = None) -> Tensor:
        """(N, H), or (S, H) if only some rows are asked for: all are attended to, but only those go on."""
        attended_SH = self.attention(hidden_NH, layout, kernel, rows_S)
        output_SH: Tensor = self.output(self.intermediate(attended_SH), attended_SH)
        return output_SH


class Encoder(nn.Module):
    """The blocks, one after the other."""

    def __init__(self, config: UniterConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.recompute = False  # keep only the input of each layer for the backward pass

    def forward(self, hidden_NH: Tensor, layout: Layout, kernel: AttentionKernel, rows_S: Tensor | None = None) -> Tensor:
        """The last layer's states of all rows, (N, H), or of some, (S, H)."""
        last = len(self.layer) - 1
        for number, layer in enumerate(self.layer):
            rows = rows_S if number == last else None
            if self.recompute and torch.is_grad_enabled():
                hidden_NH = checkpoint(layer, hidden_NH, layout, kernel, rows, use_reentrant=False)
            else:
                hidden_NH = layer(hidden_NH, layout, kernel, rows)
        return hidden_NH


class Pooler(nn.Module):
    """A sequence's [CLS] as one vector."""

    def __init__(self, config: UniterConfig) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size)

    def forward(self, first_BH: Tensor) -> Tensor:
        """(B, H) rows of [CLS] to (B, H), within -1 and 1."""
        return torch.tanh(self.dense(first_BH))


@dataclass(frozen=True, slots=True)
class Encoded:
    """What comes out of the encoder.

    Attributes:
        hidden_NH: (N, H), the last layer's states of all rows. In which order the sequences stand is the layout's own matter
            (by length): find rows through the row numbers below.
        layout: where everything stands.
    """

    hidden_NH: Tensor
    layout: Layout

    @property
    def text_rows_T(self) -> Tensor:
        """(T,) int64, the row of each text token, in the batch's order."""
        return self.layout.text_rows_T

    @property
    def region_rows_R(self) -> Tensor:
        """(R,) int64, the row of each region, in the batch's order."""
        return self.layout.region_rows_R

    @property
    def first_rows_B(self) -> Tensor:
        """(B,) int64, the first row of each sequence, in the batch's order."""
        return self.layout.first_rows_B

    @property
    def sequence_lengths_B(self) -> Tensor:
        """(B,) int64, rows of each sequence, in the batch's order."""
        return self.layout.sequence_lengths_B

    @property
    def text_TH(self) -> Tensor:
        """(T, H), states of the text tokens, in the batch's order."""
        return self.hidden_NH.index_select(0, self.layout.text_rows_T)

    @property
    def regions_RH(self) -> Tensor:
        """(R, H), states of the regions, in the batch's order."""
        return self.hidden_NH.index_select(0, self.layout.region_rows_R)


class UniterModel(nn.Module):
    """Embeddings, encoder and pooler (the published keys below `uniter.`).

    `attention_kernel` chooses how attention is computed, see `attention.attend`.
    """

    def __init__(self, config: UniterConfig) -> None:
        super().__init__()
        self.config = config
        self.attention_kernel: AttentionKernel = "auto"
        self.embeddings = TextEmbeddings(config)
        self.img_embeddings = RegionEmbeddings(config)
        self.encoder = Encoder(config)
        self.pooler = Pooler(config)
        initialise(self, deviation=config.initializer_range)

    def embed(self, batch: PackedBatch, layout: Layout) -> Tensor:
        """What enters the first layer: (N, H), in the layout's order.

        Raises:
            BadInput: a text is longer than the model's positions, or the features are of another width.
        """
        config, longest = self.config, layout.longest_text
        if longest > config.max_position_embeddings:
            raise BadInput(
                f"a text of {longest} word pieces does not fit the model's {config.max_position_embeddings} positions; "
                "leave longer texts out (max_text_length)"
            )
        parts: list[Tensor] = []
        if len(batch.input_ids_T):
            parts.append(self.embeddings(batch.input_ids_T, batch.text_positions_T, batch.text_types_T, batch.word_shifts_TH))
        if batch.embedded_regions_RH is not None:
            parts.append(batch.embedded_regions_RH)
        elif len(batch.features_RD):
            parts.append(self.embed_regions(batch))
        return torch.cat(parts).index_select(0, layout.source_rows_N)

    def embed_regions(self, batch: PackedBatch) -> Tensor:
        """The regions as they enter the first layer: (R, H), in the batch's order. No text has a part in it.

        Raises:
            BadInput: the features are of another width.
        """
        width = self.config.image_feature_size
        if batch.features_RD.shape[1] != width:
            raise BadInput(
                f"region features are {batch.features_RD.shape[1]} wide, but the model expects {width}; "
                "use the detector that the model was trained with"
            )
        types_RH = self.embeddings.token_type_embeddings(batch.region_types_R)
        shown = (batch.features_RD, batch.positions_R7, types_RH, batch.masked_regions_R, batch.region_shifts_RD)
        embedded_RH: Tensor = self.img_embeddings(*shown)
        return embedded_RH

    def forward(self, batch: PackedBatch) -> Encoded:
        """Encode a packed batch; text alone (no regions) and regions alone (no text) work too.

        Raises:
            BadInput: as `embed`.
        """
        layout = batch.layout
        return Encoded(self.encoder(self.embed(batch, layout), layout, self.attention_kernel), layout)

    def states(self, batch: PackedBatch, layout: Layout, rows_S: Tensor) -> Tensor:
        """The last layer's states where they are needed: (S, H), of the rows (S,) int64 of the batch's layout.

        The same as rows of `forward`, but the last layer's larger half is computed for these rows only.
        """
        states_SH: Tensor = self.encoder(self.embed(batch, layout), layout, self.attention_kernel, rows_S)
        return states_SH

    def pooled_first(self, batch: PackedBatch, layout: Layout | None = None) -> Tensor:
        """(B, H), the pooler's view of each sequence's first row, in the batch's order, or of those that another layout takes."""
        layout = batch.layout if layout is None else layout
        pooled_BH: Tensor = self.pooler(self.states(batch, layout, layout.first_rows_B))
        return pooled_BH

    def pooled(self, encoded: Encoded) -> Tensor:
        """The same of states that are there already."""
        pooled_BH: Tensor = self.pooler(encoded.hidden_NH.index_select(0, encoded.first_rows_B))
        return pooled_BH

    @torch.no_grad()
    def attentions(self, batch: PackedBatch) -> list[list[Tensor]]:
        """Attention probabilities for looking at: for each layer and sequence (heads, length, length) float32, text before regions."""
        layout = batch.layout
        hidden_NH = self.embed(batch, layout)
        maps: list[list[Tensor]] = []
        for layer in self.encoder.layer:
            attention = layer.get_submodule("attention.self")
            assert isinstance(attention, SelfAttention)
            query, key = attention.query(hidden_NH), attention.key(hidden_NH)
            maps.append(list(attention_probabilities(query, key, layout, heads=attention.heads)))
            hidden_NH = layer(hidden_NH, layout, self.attention_kernel)
        return maps


def set_dropout(model: nn.Module, probability: float) -> None:
    """Give every dropout of a model the same probability, attention's too (UNITER's `--dropout`)."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
