"""Whole updates of UNITER-base on batches that lie on the device already: what the device alone could do, eager and compiled."""

import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
import train as examples  # benchmarks/train.py: lengths like COCO's
from on_gpu.rows import Place, Row, attempted, seconds_each, waits_of

from uniter.datasets.batches.filling import Room, fill, only_real
from uniter.model import losses
from uniter.model.heads.pretraining import UniterForPretraining
from uniter.model.tasks.compiling import compiled_head
from uniter.model.tasks.table import PRETRAINING
from uniter.model.train.optim import AdamW, clear_gradients, clip_gradients, parameter_groups
from uniter.model.uniter import UniterConfig

ENCODER_WEIGHTS = 85.05e6  # of base
DATA_SHEET = 990e12
PUBLISHED_PAIRS = 200_000 * 3840  # base on all data
ARITHMETIC = {10240: "15,600 pairs/s are 45 % of the data sheet", 40960: "17,400 pairs/s are 50 %"}


def rows(place: Place) -> Iterator[Row]:
    """For 10k and 40k tokens: a task at a time, eager; masked words compiled."""
    model = build(place)
    sizes = (150,) if place.small else (10240, 40960)
    for tokens in sizes:
        for task in ("mlm", "itm"):
            yield from attempted(f"{task}, {tokens:,} tokens", partial(_measured, place, model, task, tokens, None), place)
    backend = "inductor" if place.on_gpu else "eager"
    for tokens in sizes:
        what = f"mlm, {tokens:,} tokens, compiled"
        yield from attempted(what, partial(_measured, place, model, "mlm", tokens, backend), place, needs_seconds=1 if place.small else 30)


def build(place: Place, size: str = "base") -> UniterForPretraining:
    """A new model in training mode on the device."""
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 100}
    config = UniterConfig.preset(size, **({**small, "image_feature_size": 16, "label_classes": 9} if place.small else {}))
    with place.device if place.on_gpu else torch.device("cpu"):  # a GPU draws the weights faster
        return UniterForPretraining(config).to(place.device).train()


def batch_of(place: Place, task: str, tokens: int, config: UniterConfig) -> tuple[examples.PackedBatch, int]:
    """A batch of that many tokens at most, on the host, and the number of its pairs."""
    words, boxes = examples.draw_lengths(4096, np.random.default_rng(0))
    words, boxes = (words % 10 + 3, boxes % 8 + 2) if place.small else (words, boxes)
    pairs = int(np.searchsorted(np.cumsum(words + boxes), tokens, side="right"))
    return examples.make_batch(task, words[:pairs], boxes[:pairs], config, seed=0), pairs


def updates(place: Place, model: UniterForPretraining, task: str, tokens: int, backend: str | None) -> tuple[Callable[[], None], int, int]:
    """What makes an update, with how many tokens and pairs."""
    row = PRETRAINING[task]
    batch, pairs = batch_of(place, task, tokens, model.config)
    real = int(batch.tokens)
    head = row.head
    if backend is not None:
        longest = int(batch.text_lengths_B.max()), int(batch.region_counts_B.max())
        hidden = len(batch.targets["places"]) if "places" in batch.targets else 64
        batch, head = fill(batch, Room(-(-tokens // 64) * 64, pairs, hidden, *longest)), compiled_head(row, backend=backend)
    moved = batch.to(place.device)
    parameters = list(model.parameters())
    optimizer = AdamW(parameter_groups(model, weight_decay=0.01), lr=1e-6)
    optimizer.unusable = torch.zeros((), device=place.device)

    def update() -> None:
        with torch.autocast(place.device.type, dtype=torch.bfloat16, enabled=place.on_gpu):
            outputs, targets = only_real(head(model, moved), moved)
            number = losses.of(row.losses(outputs, targets), weights=row.weights, reduction=row.reduction).number
        number.backward()
        clip_gradients(parameters, 5.0)
        optimizer.step()
        clear_gradients(optimizer, "none")

    return update, real, pairs


def _measured(place: Place, model: UniterForPretraining, task: str, tokens: int, backend: str | None) -> Iterator[Row]:
    name = f"{task}, {tokens:,} tokens" + (", compiled" if backend else "")
    for kernel in ("auto", "efficient"):
        model.uniter.attention_kernel = kernel
        try:
            update, real, pairs = updates(place, model, task, tokens, backend)
            began = time.perf_counter()
            update()
            place.wait()
            break
        except (RuntimeError, TypeError, NotImplementedError) as error:
            if kernel == "efficient" or not place.on_gpu or isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            yield Row(
                f"{name}: attention",
                f"{type(error).__name__}: {' '.join(str(error).split())[:200]}; the efficient kernel is taken",
                state="failed",
            )
    if backend:
        yield Row(f"{name}: the first update", time.perf_counter() - began, "s")
    seconds = seconds_each(update, place, most=0.3 if place.small else 3.0)
    yield from speeds(name, real / seconds, pairs / seconds, wanted=ARITHMETIC.get(tokens, ""))
    if (waits := waits_of(update, place)) is not None:
        yield Row(f"{name}: waits of an update", waits, wanted="0", state="measured" if waits == 0 else "WRONG")
    began = time.perf_counter()
    update()
    yield Row(
        f"{name}: the host's share of an update",
        (time.perf_counter() - began) / seconds,
        wanted="below 1: the device never waits for the host",
    )
    place.wait()


def speeds(name: str, tokens: float, pairs: float, *, wanted: str = "") -> Iterator[Row]:
    """Rows of a speed: tokens and pairs a second, share of the data sheet, hours of the published recipe."""
    yield Row(f"{name}: pairs a second", pairs, "1/s", wanted)
    yield Row(f"{name}: tokens a second", tokens, "1/s")
    yield Row(f"{name}: share of an H100's data sheet", 6 * ENCODER_WEIGHTS * tokens / DATA_SHEET, wanted="0.45, then 0.5")
    yield Row(f"{name}: base on all data would take", PUBLISHED_PAIRS / pairs / 3600, "hours of this card")
