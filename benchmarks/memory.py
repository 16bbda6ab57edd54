"""How much memory pre-training takes, and what fits on a card: the memory table of docs/pretraining.md.

Weights, gradients and AdamW's two moments are counted; what a forward pass keeps for the backward pass is measured, on the CPU,
by counting every distinct tensor that autograd saves (parameters left out) for batches of COCO-like lengths. Attention saves no
probabilities in either case (CPU and CUDA use flash kernels without dropout, which is why it is set to 0 here). The same numbers
hold on a GPU but for the workspace of its libraries, for which RESERVE is set aside.

    python benchmarks/memory.py

Counted on the CPU, for any card: takes no --device; `benchmarks/gpu.py` measures the peak on a real one.
"""

import argparse
from typing import Any

import torch
from torch import Tensor

from uniter.datasets.batches.collate import PackedBatch, hidden_places
from uniter.model.heads.pretraining import UniterForPretraining
from uniter.model.losses import masked_words
from uniter.model.uniter import UniterConfig, set_dropout

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


def per_pair(name: str, *, bf16: bool) -> tuple[int, float, float]:
    """(parameters, bytes kept per pair, bytes kept whatever the number of pairs), by two batch sizes."""
    model = UniterForPretraining(UniterConfig.preset(name)).train()
    set_dropout(model, 0.0)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    small, large = 4, 12
    at_small, at_large = (saved_bytes(model, batch_of(pairs, model.config), bf16=bf16) for pairs in (small, large))
    slope = (at_large - at_small) / (large - small)
    # Hidden dropout keeps one byte a value, three times a layer, besides.
    config: Any = model.config
    slope += (WORDS + REGIONS) * config.hidden_size * (2 * config.num_hidden_layers + 1)
    return parameters, slope, max(at_small - small * slope, 0.0)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(f"Pairs of {WORDS} word pieces and {REGIONS} regions; the published update holds {PUBLISHED_PAIRS_PER_UPDATE:,} pairs.\n")
    print("| model | precision | weights, gradients, moments | kept per pair | " + " | ".join(f"{card} GB card" for card in CARDS) + " |")
    print("|---|---|---|---|" + "---|" * len(CARDS))
    for name in ("base", "large"):
        for bf16 in (False, True):
            parameters, slope, constant = per_pair(name, bf16=bf16)
            fixed = parameters * BYTES_PER_PARAMETER
            cells = []
            for card in CARDS:
                pairs = int((card * GIB - RESERVE - fixed - constant) / slope)
                if pairs < 1:
                    cells.append("does not fit")
                else:
                    accumulation = -(-PUBLISHED_PAIRS_PER_UPDATE // pairs)
                    cells.append(f"{pairs:,} pairs, {pairs * (WORDS + REGIONS):,} tokens, x{accumulation}")
            precision = "bf16" if bf16 else "fp32"
            print(f"| {name} | {precision} | {fixed / GIB:.1f} GiB | {slope / 2**20:.1f} MiB | " + " | ".join(cells) + " |")
    print("\n(x: micro-batches accumulated to one update of the published number of pairs)")


if __name__ == "__main__":
    main()
