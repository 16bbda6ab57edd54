"""The heads of pre-training, and the model that bears them.

Heads compute scores only where a task needs them: on masked words, on masked regions, on the first row of each pair. Where
that is comes with the batch; `PackedBatch.targets` holds, by task:

    places       (S,) int64, where the hidden words stand among the text tokens (MLM), or the masked regions among the regions
    words        (T,) int64, the word piece that stood at each text token, -1 where nothing is predicted (MLM)
    features     (S, D) float16 or float32, what the S regions of `masked_regions_R` held (MRFR)
    soft_labels  (S, C) float16 or float32, the detector's distributions of those, background in column 0 (MRC, MRC-KL)
    matched      (B,) int64, 1 where text and image belong together, 0 where not (ITM)

Legend of shape suffixes: B sequences, N rows, T text tokens, R regions, S predicted places, H hidden, D feature width, V words, C classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uniter.datasets.batches.collate import PackedBatch
from uniter.model.linear import Linear, linear
from uniter.model.sharing import Shared
from uniter.model.transport import padded, transport_distances
from uniter.model.uniter import ACTIVATIONS, Encoded, UniterConfig, UniterModel, initialise, layer_norm

# What a head gives: "scores" and, for some tasks, more, by name. The losses read it together with `PackedBatch.targets`.
Outputs = dict[str, Tensor]


def as_parameter(tensor: Tensor) -> nn.Parameter:
    """The same object, known to be a parameter: tying needs the object, not a copy of it."""
    assert isinstance(tensor, nn.Parameter)
    return tensor


class WordTransform(nn.Module):
    """BERT's dense layer, activation and normalisation before words are predicted."""

    def __init__(self, config: UniterConfig) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = layer_norm(config.hidden_size)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, hidden_SH: Tensor) -> Tensor:
        """(S, H) to (S, H)."""
        normed_SH: Tensor = self.LayerNorm(self.activation(self.dense(hidden_SH)))
        return normed_SH


class WordPredictions(nn.Module):
    """Scores over the vocabulary; the matrix is the word embeddings themselves, the bias is its own."""

    def __init__(self, config: UniterConfig, word_embeddings: Tensor) -> None:
        super().__init__()
        self.transform = WordTransform(config)
        self.decoder = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.decoder.weight = as_parameter(word_embeddings)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden_SH: Tensor) -> Tensor:
        """(S, H) hidden states of hidden words to (S, V) scores of all word pieces."""
        transformed_SH = self.transform(hidden_SH)
        if transformed_SH.device.type == "cpu":
            return linear(transformed_SH, self.decoder.weight, self.bias)
        return full_product(transformed_SH, self.decoder.weight, self.bias)


def full_product(rows_SH: Tensor, weight_VH: Tensor, bias_V: Tensor, *, multiple: int = 64) -> Tensor:
    """(S, V) rows times the transposed weight, plus bias; computed with more columns, as the matrix units of a GPU like them, and cut."""
    more = -len(weight_VH) % multiple
    return linear(rows_SH, F.pad(weight_VH, (0, 0, 0, more)), F.pad(bias_V, (0, more)))[:, : len(weight_VH)]


class WordHead(nn.Module):
    """The published keys `cls.predictions.*`."""

    def __init__(self, config: UniterConfig, word_embeddings: Tensor) -> None:
        super().__init__()
        self.predictions = WordPredictions(config, word_embeddings)

    def forward(self, hidden_SH: Tensor) -> Tensor:
        """(S, H) to (S, V) scores of all word pieces."""
        scores_SV: Tensor = self.predictions(hidden_SH)
        return scores_SV


class FeatureRegression(nn.Module):
    """Back to feature space through the transposed image projection, which is the same tensor as `img_linear.weight`."""

    def __init__(self, config: UniterConfig, image_projection: Tensor) -> None:
        super().__init__()
        self.net = nn.Sequential(Linear(config.hidden_size, config.hidden_size), nn.GELU(), layer_norm(config.hidden_size))
        self.weight = as_parameter(image_projection)
        self.bias = nn.Parameter(torch.zeros(config.image_feature_size))

    def forward(self, hidden_SH: Tensor) -> Tensor:
        """(S, H) hidden states of hidden regions to (S, D) features, by the transposed image projection."""
        return linear(self.net(hidden_SH), self.weight.t(), self.bias)


class RegionClassifier(nn.Module):
    """The head of MRC and MRC-KL: a dense layer, activation, normalisation, and the detector's classes, background first."""

    def __init__(self, config: UniterConfig) -> None:
        super().__init__()
        self.net = nn.Sequential(
            Linear(config.hidden_size, config.hidden_size),
            nn.GELU(),
            layer_norm(config.hidden_size),
            Linear(config.hidden_size, config.label_classes),
        )

    def forward(self, hidden_SH: Tensor) -> Tensor:
        """(S, H) hidden states of hidden regions to (S, C) scores of the classes."""
        scores_SC: Tensor = self.net(hidden_SH)
        return scores_SC


class UniterForPretraining(Shared):
    """UNITER with the heads of its five pre-training tasks; published key names, tied tensors under both of their names."""

    def __init__(self, config: UniterConfig) -> None:
        super().__init__()
        self.config = config
        self.uniter = UniterModel(config)
        self.cls = WordHead(config, self.uniter.embeddings.word_embeddings.weight)
        self.feat_regress = FeatureRegression(config, self.uniter.img_embeddings.img_linear.weight)
        self.region_classifier = RegionClassifier(config)
        self.itm_output = Linear(config.hidden_size, 2)
        initialise(self, deviation=config.initializer_range)

    def forward(self, batch: PackedBatch) -> Encoded:
        """The encoder's states, without a head."""
        encoded: Encoded = self.uniter(batch)
        return encoded

    def masked_words(self, batch: PackedBatch) -> Outputs:
        """MLM: scores (S, V) of the text tokens that are predicted, in the batch's order."""
        layout = batch.layout
        return {"scores": self.cls(self.uniter.states(batch, layout, layout.text_rows_T[batch.targets["places"]]))}

    def masked_features(self, batch: PackedBatch) -> Outputs:
        """MRFR: features (S, D) of the masked regions, in the batch's order."""
        return {"scores": self.feat_regress(self._masked_regions(batch))}

    def masked_classes(self, batch: PackedBatch) -> Outputs:
        """MRC and MRC-KL: scores (S, C) of the masked regions, in the batch's order."""
        return {"scores": self.region_classifier(self._masked_regions(batch))}

    def pairs(self, batch: PackedBatch) -> Outputs:
        """ITM without alignment: scores (B, 2), column 1 = text and image belong together."""
        return {"scores": self.itm_output(self.uniter.pooled_first(batch))}

    def aligned_pairs(self, batch: PackedBatch) -> Outputs:
        """ITM with word-region alignment: scores (B, 2), transport `distances` (B,) and `plans` (B, longest R, longest T)."""
        encoded, layout = self(batch), batch.layout
        scores_B2 = self.itm_output(self.uniter.pooled(encoded))
        first_regions_B = layout.first_rows_B + layout.text_lengths_B
        words, word_padding = padded(encoded.hidden_NH, layout.first_rows_B, layout.text_lengths_B, layout.longest_text)
        regions, region_padding = padded(encoded.hidden_NH, first_regions_B, layout.region_counts_B, layout.most_regions)
        distances_B, plans = transport_distances(words, regions, word_padding, region_padding)
        return {"scores": scores_B2, "distances": distances_B, "plans": plans}

    def _masked_regions(self, batch: PackedBatch) -> Tensor:
        if batch.masked_regions_R is None:
            raise ValueError("this batch masks no regions, which MRFR, MRC and MRC-KL need")
        layout = batch.layout
        return self.uniter.states(batch, layout, layout.region_rows_R[batch.targets["places"]])
