"""What a micro-batch costs the host beside the kernels, in proportion to PyTorch's own encoder.

On a GPU the host only starts kernels. Where that takes longer than the kernels themselves, the device waits. So: 12 layers of width 8,
where kernels cost nothing, on a few short sequences, forward and backward; once PyTorch's bare `nn.TransformerEncoder` (no embeddings,
no head, no loss), once ours with everything that training does with a micro-batch of masked words (embeddings, encoder, head, loss,
metric), eager and compiled. They take turns in one process, and the ratio is that of their medians. On the CPU the kernel of attention
is left out and linear layers go the way that they go on a GPU: there, too, the host does no more than to call them.

    python benchmarks/host.py [--device cpu] [--backend inductor] [--repeats 60] [--json]
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from uniter.datasets.batches.collate import PackedBatch
from uniter.datasets.batches.filling import Room, fill, only_real
from uniter.model import UniterConfig, UniterForPretraining, attention, linear, losses
from uniter.model.tasks.compiling import compiled_head
from uniter.model.tasks.table import PRETRAINING

LAYERS, WIDTH, HEADS, INNER = 12, 8, 2, 32
SEQUENCES, WORDS, REGIONS = 4, 8, 8
WARM_UP = 10


def batch_of(config: UniterConfig) -> PackedBatch:
    """A few equally long sequences of which every fourth word is hidden."""
    texts, regions = SEQUENCES * WORDS, SEQUENCES * REGIONS
    words = torch.full((texts,), -1)
    words[::4] = 5
    return PackedBatch(
        input_ids_T=torch.randint(5, config.vocab_size, (texts,)),
        text_positions_T=torch.arange(WORDS).repeat(SEQUENCES),
        text_types_T=torch.zeros(texts, dtype=torch.int64),
        features_RD=torch.rand(regions, config.image_feature_size),
        positions_R7=torch.rand(regions, 7),
        region_types_R=torch.ones(regions, dtype=torch.int64),
        text_lengths_B=torch.full((SEQUENCES,), WORDS),
        region_counts_B=torch.full((SEQUENCES,), REGIONS),
        targets={"words": words, "places": (words >= 0).nonzero().squeeze(1)},
        example_ids=[str(number) for number in range(SEQUENCES)],
    )


def bare(device: torch.device) -> Callable[[], None]:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, INNER, dropout=0.1, activation="gelu", batch_first=True, device=device)
    encoder = nn.TransformerEncoder(layer, LAYERS).train()
    hidden = torch.rand(SEQUENCES, WORDS + REGIONS, WIDTH, device=device)

    def step() -> None:
        encoder.zero_grad()
        encoder(hidden).sum().backward()

    return step


def ours(device: torch.device, *, backend: str | None) -> Callable[[], None]:
    config = UniterConfig(
        vocab_size=64, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=INNER, image_feature_size=8
    )
    model, task, batch = UniterForPretraining(config).to(device).train(), PRETRAINING["mlm"], batch_of(config)
    if backend is not None:
        batch = fill(batch, Room(batch.tokens, SEQUENCES, len(batch.targets["places"]), WORDS, REGIONS))
    head, batch = task.head if backend is None else compiled_head(task, backend=backend), replace(batch).to(device)

    def step() -> None:
        model.zero_grad()
        outputs, targets = only_real(head(model, batch), batch)
        losses.of(task.losses(outputs, targets), weights=task.weights, reduction=task.reduction).number.backward()
        with torch.no_grad():
            task.metric(outputs, targets)

    return step


def call_kernels_only() -> None:
    """Leave out what on the CPU only is the host's own work."""
    attention._groups = lambda *rows: iter(())  # the operator gives rows of no meaning, at once
    linear.onednn_is_faster = lambda: False


def medians(steps: dict[str, Callable[[], None]], *, repeats: int, device: torch.device) -> dict[str, float]:
    """Milliseconds of each, taking turns; on a GPU what the host took, its kernels waited for before each turn."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time  # which other processes do not disturb
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(WARM_UP + repeats):
        for name, step in steps.items():
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            began = clock()
            step()
            if turn >= WARM_UP:
                taken[name].append(1e3 * (clock() - began))
    return {name: statistics.median(times) for name, times in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend", default="inductor", help="of torch.compile; 'none' leaves the compiled column out")
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    device = torch.device(chosen.device)
    if device.type == "cpu":
        call_kernels_only()
    steps = {"bare": bare(device), "eager": ours(device, backend=None)}
    if chosen.backend != "none":
        steps["compiled"] = ours(device, backend=chosen.backend)
    found = medians(steps, repeats=chosen.repeats, device=device)
    ratios = {name: round(value / found["bare"], 2) for name, value in found.items() if name != "bare"}
    if chosen.json:
        print(json.dumps({"milliseconds": {name: round(value, 2) for name, value in found.items()}, "ratio_to_bare": ratios}))
        return
    print(f"{LAYERS} layers of width {WIDTH}, {SEQUENCES} x {WORDS + REGIONS} rows, forward and backward, {chosen.repeats} turns")
    for name, value in found.items():
        print(f"{name:10} {value:8.2f} ms" + (f"   {ratios[name]:.2f} of bare" if name in ratios else ""))


if __name__ == "__main__":
    main()
