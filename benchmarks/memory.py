"""How much memory pre-training takes, and what fits on a card: the memory table of docs/pretraining.md.

Weights, gradients and AdamW's two moments are counted; what a forward pass keeps for the backward pass is measured, on the CPU,
by counting every distinct tensor that autograd saves (parameters left out) for batches of COCO-like lengths. Attention saves no
probabilities in either case (CPU and CUDA use flash kernels without dropout, which is why it is set to 0 here). Models of two and three
layers are measured: further ones keep what the third does. With `recompute` a layer keeps its input, and one at a time all the rest. The
same numbers hold on a GPU but for the workspace of its libraries, for which RESERVE is set aside.

    python benchmarks/memory.py

Counted on the CPU, for any card: takes no --device; `benchmarks/gpu.py` measures the peak on a real one.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from uniter.datasets.batches.collate import PackedBatch, hidden_places
from uniter.model.heads.pretraining import UniterForPretraining
from uniter.model.losses import masked_words
from uniter.model.uniter import PRESETS, UniterConfig, set_dropout

GIB = 2**30
RESERVE = 1.5 * GIB  # CUDA context, library workspaces, fragmentation
CARDS = (8, 12, 24, 48, 80)
BYTES_PER_PARAMETER = 16  # float32 weight, gradient and two moments
WORDS, REGIONS = 15, 40  # of a pair, [CLS] and [SEP] counted
# 48 micro-batches of about 80 pairs (pretrain-alldata-base-8gpu.json, 8 processes times 6 accumulated, batches as its sampler fills them)
PUBLISHED_PAIRS_PER_UPDATE = 48 * 80


def batch_of(pairs: int, config: UniterConfig) -> PackedBatch:
    generator = torch.Generator().manual_seed(0)
    words = torch.full((pairs * WORDS,), -1)
    words[::7] = 5
    return PackedBatch(
        input_ids_T=torch.randint(5, config.vocab_size, (pairs * WORDS,), generator=generator),
        text_positions_T=torch.arange(WORDS).repeat(pairs),
        text_types_T=torch.zeros(pairs * WORDS, dtype=torch.int64),
        features_RD=torch.rand(pairs * REGIONS, config.image_feature_size, generator=generator).half(),
        positions_R7=torch.rand(pairs * REGIONS, 7, generator=generator),
        region_types_R=torch.ones(pairs * REGIONS, dtype=torch.int64),
        text_lengths_B=torch.full((pairs,), WORDS),
        region_counts_B=torch.full((pairs,), REGIONS),
        targets={"words": words, "places": hidden_places(words, None)},
        example_ids=[str(number) for number in range(pairs)],
    )


def saved_bytes(model: UniterForPretraining, batch: PackedBatch, *, bf16: bool) -> int:
    """Bytes that one forward pass with the masked-word loss keeps for the backward pass, parameters not counted."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, int] = {}
    kept: list[Tensor] = []  # so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        masked_words(model.masked_words(batch), batch.targets)["cross_entropy"].mean()
    return sum(storages.values())


@dataclass(frozen=True)
class Kept:
    """What stays for the backward pass.

    Attributes:
        parameters: of the model. constant: bytes, whatever the number of pairs (weights in half precision).
        pair: bytes a pair, where everything is kept.
        recomputed: bytes a pair, where only the input of each layer is, and what one layer keeps while it is computed again.
    """

    parameters: int
    constant: float
    pair: float
    recomputed: float


def kept_by(name: str, *, bf16: bool) -> Kept:
    """By two numbers of pairs and of layers: a layer in the middle keeps what another does."""
    rows, layers = WORDS + REGIONS, PRESETS[name]["num_hidden_layers"]
    small, large = 4, 12
    slopes, constants, recomputed = [], [], []
    for few in (2, 3):
        model = UniterForPretraining(UniterConfig.preset(name, num_hidden_layers=few)).train()
        set_dropout(model, 0.0)
        at_small, at_large = (saved_bytes(model, batch_of(pairs, model.config), bf16=bf16) for pairs in (small, large))
        slopes.append((at_large - at_small) / (large - small))
        constants.append(at_small - small * slopes[-1])
        model.uniter.encoder.recompute = True  # what checkpointing keeps it keeps by itself, so that only the rest is counted here
        at_small, at_large = (saved_bytes(model, batch_of(pairs, model.config), bf16=bf16) for pairs in (small, large))
        recomputed.append((at_large - at_small) / (large - small))
    # Hidden dropout keeps one byte a value, twice a layer and once for the embeddings, besides.
    width = PRESETS[name]["hidden_size"]
    masks, embedding_masks = 2 * rows * width, rows * width
    a_layer = slopes[1] - slopes[0] + masks
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in UniterForPretraining(UniterConfig.preset(name)).parameters())
    return Kept(
        parameters=parameters,
        constant=max(constants[0] + (layers - 2) * (constants[1] - constants[0]), 0.0),
        pair=slopes[0] + 2 * masks + (layers - 2) * a_layer + embedding_masks,
        # The inputs of layers are float32 on a GPU, where norms compute in it.
        recomputed=recomputed[0] + embedding_masks + layers * rows * width * 4 + a_layer,
    )


def rows_of_table() -> Iterator[tuple[str, str, Kept, float]]:
    """(model, how it computes, what is kept, bytes kept a pair)."""
    for name in ("base", "large"):
        for precision in ("fp32", "bf16"):
            kept = kept_by(name, bf16=precision == "bf16")
            yield name, precision, kept, kept.pair
            yield name, f"{precision}, recompute", kept, kept.recomputed


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(f"Pairs of {WORDS} word pieces and {REGIONS} regions; the published update holds {PUBLISHED_PAIRS_PER_UPDATE:,} pairs.\n")
    print("| model | precision | weights, gradients, moments | per pair | " + " | ".join(f"{card} GB" for card in CARDS) + " |")
    print("|---|---|---|---|" + "---|" * len(CARDS))
    for name, how, kept, slope in rows_of_table():
        fixed = kept.parameters * BYTES_PER_PARAMETER
        cells = []
        for card in CARDS:
            pairs = int((card * GIB - RESERVE - fixed - kept.constant) / slope)
            accumulation = -(-PUBLISHED_PAIRS_PER_UPDATE // pairs) if pairs > 0 else 0
            cells.append(f"{pairs:,} pairs, x{accumulation}" if pairs > 0 else "does not fit")
        print(f"| {name} | {how} | {fixed / GIB:.1f} GiB | {slope / 2**20:.1f} MiB | " + " | ".join(cells) + " |", flush=True)
    print(f"\n(x: micro-batches accumulated to one update of the published number of pairs; tokens are {WORDS + REGIONS} times the pairs)")


if __name__ == "__main__":
    main()
