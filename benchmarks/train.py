"""How fast UNITER-base trains packed, against the padded model that everyone else runs. Prints one table.

    python benchmarks/train.py

The opponent is shipped here: rectangles with a mask into `scaled_dot_product_attention`, everything else the same - the very same
parameters, heads, losses, optimizer and examples, dropout on. Both take their steps in turns; the median of five counts.
Lengths are like COCO's: about 13 word pieces, 10 to 100 boxes. "sorted" batches are drawn from neighbours in a bucket of 8,192
examples sorted by length, as UNITER's sampler makes its batches of about 128; "mixed" ones are drawn from all of them.
Linear layers and optimizer are this project's on both sides, so that the ratio shows the padding alone.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from uniter.datasets.batches.collate import PackedBatch
from uniter.datasets.batches.masking import NOT_PREDICTED
from uniter.model import losses
from uniter.model.heads.pretraining import Outputs, UniterForPretraining
from uniter.model.train.optim import AdamW, clear_gradients, clip_gradients, parameter_groups
from uniter.model.transport import transport_distances
from uniter.model.uniter import PRESETS, UniterConfig

BUCKET, NEIGHBOURS = 8192, 128
MASKED = 0.15


@dataclass
class PaddedBatch:
    """The same examples as rectangles, with UNITER's gather index."""

    input_ids: Tensor  # (B, T)
    features: Tensor  # (B, R, D)
    positions: Tensor  # (B, R, 7)
    masked: Tensor | None  # (B, R) bool
    gather_index: Tensor  # (B, L) into "padded text, then padded regions"
    attended: Tensor  # (B, L) bool, True where there is something
    text_lengths: Tensor  # (B,)
    targets: dict[str, Tensor]

    def to(self, device: torch.device) -> "PaddedBatch":
        """The same on a device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved, targets={name: value.to(device) for name, value in self.targets.items()})


def draw_lengths(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(count,) word pieces with [CLS] and [SEP], about 13 and at most 40, and (count,) boxes, 10 to 100, about 42."""
    words = np.clip(np.rint(rng.lognormal(math.log(12.6), 0.22, count)), 6, 40).astype(np.int64)
    boxes = np.clip(np.rint(rng.lognormal(math.log(36), 0.6, count)), 10, 100).astype(np.int64)
    return words, boxes


def choose(kind: str, size: int, words: np.ndarray, boxes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Which examples of the bucket make a batch: of many batches of this kind one with the average share of padding."""
    lengths = words + boxes
    pools = [np.arange(len(lengths))] * 64
    if kind == "sorted":
        by_length = np.argsort(lengths, kind="stable")
        pools = [by_length[start : start + NEIGHBOURS] for start in range(0, len(lengths), NEIGHBOURS)]
    batches = [rng.choice(pool, min(size, len(pool)), replace=False) for pool in pools]
    shares = np.array([padding_share(lengths[chosen]) for chosen in batches])
    return batches[int(np.abs(shares - shares.mean()).argmin())]


def padding_share(lengths: np.ndarray) -> float:
    """The share of a rectangle that these sequences leave empty."""
    return 1 - float(lengths.sum()) / float(lengths.max() * len(lengths))


def make_batch(task: str, words: np.ndarray, boxes: np.ndarray, config: UniterConfig, seed: int) -> PackedBatch:
    """Random examples of these lengths, with the targets of a task."""
    generator = torch.Generator().manual_seed(seed)
    texts, regions = int(words.sum()), int(boxes.sum())
    corners = torch.rand(regions, 4, generator=generator)
    features = torch.rand(regions, config.image_feature_size, generator=generator)
    batch = PackedBatch(
        input_ids_T=torch.randint(5, config.vocab_size, (texts,), generator=generator),
        text_positions_T=torch.cat([torch.arange(int(length)) for length in words]),
        text_types_T=torch.zeros(texts, dtype=torch.long),
        features_RD=features,
        positions_R7=torch.cat([corners, corners[:, :2], corners[:, :1] * corners[:, 1:2]], dim=1),
        region_types_R=torch.ones(regions, dtype=torch.long),
        text_lengths_B=torch.from_numpy(words),
        region_counts_B=torch.from_numpy(boxes),
    )
    if task == "mlm":
        predicted = torch.rand(texts, generator=generator) < MASKED
        predicted[0] = True
        batch.targets["words"] = torch.where(predicted, batch.input_ids_T, -1)
        batch.targets["places"] = predicted.nonzero().squeeze(1)
    elif task == "mrc-kl":
        batch.masked_regions_R = torch.rand(regions, generator=generator) < MASKED
        batch.masked_regions_R[0] = True
        features[batch.masked_regions_R] = 0
        logits = torch.randn(int(batch.masked_regions_R.sum()), config.label_classes, generator=generator)
        batch.targets["soft_labels"] = logits.softmax(dim=1)
        batch.targets["places"] = batch.masked_regions_R.nonzero().squeeze(1)
    else:
        batch.targets["matched"] = torch.randint(0, 2, (len(words),), generator=generator)
    return batch


def padded(batch: PackedBatch) -> PaddedBatch:
    """The same examples as rectangles."""
    texts, regions = batch.text_lengths_B, batch.region_counts_B
    width, lengths = int(texts.max()), texts + regions
    joint = torch.arange(int(lengths.max())).expand(len(texts), -1)
    gather_index = torch.where((joint >= texts[:, None]) & (joint < lengths[:, None]), joint - texts[:, None] + width, joint)

    def rectangle(rows: Tensor, counts: Tensor, fill: float = 0) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(list(rows.split(counts.tolist())), batch_first=True, padding_value=fill)

    targets = dict(batch.targets)
    if "words" in targets:
        targets["words"] = rectangle(targets["words"], texts, -1)
    return PaddedBatch(
        input_ids=rectangle(batch.input_ids_T, texts),
        features=rectangle(batch.features_RD, regions),
        positions=rectangle(batch.positions_R7, regions),
        masked=None if batch.masked_regions_R is None else rectangle(batch.masked_regions_R, regions),
        gather_index=gather_index,
        attended=joint < lengths[:, None],
        text_lengths=texts,
        targets=targets,
    )


class PaddedUniter:
    """The opponent: the same parameters, computed on rectangles."""

    def __init__(self, model: UniterForPretraining) -> None:
        self.model = model

    def encode(self, batch: PaddedBatch) -> Tensor:
        """(B, L, H)."""
        body, device = self.model.uniter, batch.input_ids.device
        positions = torch.arange(batch.input_ids.shape[1], device=device).unsqueeze(0)
        text = body.embeddings(batch.input_ids, positions, torch.zeros_like(batch.input_ids))
        types = body.embeddings.token_type_embeddings(torch.ones(batch.features.shape[:2], dtype=torch.long, device=device))
        image, features = body.img_embeddings, batch.features
        if batch.masked is not None:
            features = features + image.mask_embedding(batch.masked.long())
        appearance = image.img_layer_norm(image.img_linear(features)) + image.pos_layer_norm(image.pos_linear(batch.positions))
        regions = image.dropout(image.LayerNorm(appearance + types))
        index = batch.gather_index.unsqueeze(2).expand(-1, -1, text.shape[2])
        hidden = torch.cat([text, regions], dim=1).gather(1, index)
        mask = batch.attended[:, None, None, :]
        for layer in body.encoder.layer:
            own = layer.attention.self
            query, key, value = (
                projection(hidden).view(*hidden.shape[:2], own.heads, -1).transpose(1, 2) for projection in (own.query, own.key, own.value)
            )
            dropout = own.dropout.p if self.model.training else 0.0
            context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
            attended = layer.attention.output(context.transpose(1, 2).reshape(hidden.shape), hidden)
            hidden = layer.output(layer.intermediate(attended), attended)
        return hidden

    def masked_words(self, batch: PaddedBatch) -> Outputs:
        hidden = self.encode(batch)[:, : batch.input_ids.shape[1]]
        return {"scores": self.model.cls(hidden[batch.targets["words"] != -1])}

    def masked_classes(self, batch: PaddedBatch) -> Outputs:
        hidden = self.encode(batch)
        assert batch.masked is not None
        # The mask on the compact joint sequence.
        width = batch.input_ids.shape[1]
        behind_text = torch.cat([torch.zeros_like(batch.input_ids, dtype=torch.bool), batch.masked], dim=1)
        joint = behind_text.gather(1, batch.gather_index) & (batch.gather_index >= width) & batch.attended
        return {"scores": self.model.region_classifier(hidden[joint])}

    def aligned_pairs(self, batch: PaddedBatch) -> Outputs:
        hidden = self.encode(batch)
        scores = self.model.itm_output(self.model.uniter.pooler(hidden[:, 0]))
        rows, width = hidden.shape[0], batch.input_ids.shape[1]
        # UNITER's scatter: joint positions back to "padded text, then padded regions".
        spread = hidden.new_zeros(rows, width + batch.features.shape[1], hidden.shape[2])
        index = torch.where(batch.attended, batch.gather_index, 0).unsqueeze(2).expand_as(hidden)
        spread = spread.scatter_add(1, index, hidden * batch.attended.unsqueeze(2))
        counts = batch.attended.sum(1) - batch.text_lengths
        device = hidden.device
        text_padding = torch.arange(width, device=device) >= batch.text_lengths[:, None]
        region_padding = torch.arange(batch.features.shape[1], device=device) >= counts[:, None]
        distances, _ = transport_distances(spread[:, :width], spread[:, width:], text_padding, region_padding)
        return {"scores": scores, "distances": distances}


HEADS = {
    "mlm": (UniterForPretraining.masked_words, PaddedUniter.masked_words, losses.masked_words),
    "mrc-kl": (UniterForPretraining.masked_classes, PaddedUniter.masked_classes, losses.masked_distributions),
    "itm+alignment": (UniterForPretraining.aligned_pairs, PaddedUniter.aligned_pairs, losses.pairs),
}


CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


def update_seconds(
    optimizer: AdamW,
    parameters: list[Tensor],
    loss: Callable[[], Tensor],
    autocast: AbstractContextManager[object],
    clock: Callable[[], float],
) -> float:
    """One whole update: forward, backward, clip, step."""
    started = clock()
    with autocast:
        value = loss()
    value.backward()
    clip_gradients(parameters, 5.0)
    optimizer.step()
    clear_gradients(optimizer, "none")
    if value.is_cuda:
        torch.cuda.synchronize(value.device)
    return clock() - started


def main(words_given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="base", choices=sorted(PRESETS))
    parser.add_argument("--examples", type=int, default=24, help="examples of a batch")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    parser.add_argument("--tasks", nargs="+", default=list(HEADS), choices=list(HEADS))
    parser.add_argument("--batches", nargs="+", default=["sorted", "mixed"], choices=["sorted", "mixed"])
    parser.add_argument("--layers", type=int, help="fewer layers than the model has, for a quick look")
    parser.add_argument(
        "--clock", default="wall", choices=list(CLOCKS), help="processor time is steadier on a busy machine (with --threads 1)"
    )
    parser.add_argument("--no-bf16", action="store_true")
    arguments = parser.parse_args(words_given)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    config = UniterConfig.preset(arguments.model, **({"num_hidden_layers": arguments.layers} if arguments.layers else {}))
    device = torch.device(arguments.device)
    model = UniterForPretraining(config).to(device).train()
    opponent, parameters = PaddedUniter(model), list(model.parameters())
    optimizer = AdamW(parameter_groups(model, weight_decay=0.01), lr=1e-6)
    rng = np.random.default_rng(0)
    words, boxes = draw_lengths(BUCKET, rng)
    bf16 = not arguments.no_bf16 and (device.type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    print(
        f"UNITER-{arguments.model}, {config.num_hidden_layers} layers, {arguments.examples} examples a batch, {arguments.threads} threads, "
        f"{device}, {arguments.clock} time, median of {arguments.repeats}, PyTorch {torch.__version__}"
    )
    print(f"{'batches':8} {'task':14} {'padding':>8} {'padded s':>9} {'packed s':>9} {'ratio':>6} {'bf16 s':>7} {'on top':>7}")
    for kind in arguments.batches:
        for task in arguments.tasks:
            chosen = choose(kind, arguments.examples, words, boxes, rng)
            batch = make_batch(task, words[chosen], boxes[chosen], config, seed=0)
            rectangle = padded(batch).to(device)
            batch = batch.to(device)
            packed_head, padded_head, terms_of = HEADS[task]
            weights = {"transport": 0.1}

            def packed_loss(batch=batch, head=packed_head, terms_of=terms_of, weights=weights):  # type: ignore[no-untyped-def]
                return losses.of(terms_of(head(model, batch), batch.targets), weights=weights).number

            def padded_loss(batch=rectangle, head=padded_head, terms_of=terms_of, weights=weights):  # type: ignore[no-untyped-def]
                targets = dict(batch.targets)
                if "words" in targets:
                    targets["words"] = targets["words"].flatten()
                    targets["places"] = (targets["words"] != NOT_PREDICTED).nonzero().squeeze(1)
                return losses.of(terms_of(head(opponent, batch), targets), weights=weights).number

            model.eval()
            with torch.no_grad():
                torch.testing.assert_close(packed_loss(), padded_loss(), atol=1e-4, rtol=1e-4)
            model.train()
            contenders: dict[str, tuple[Callable[[], Tensor], Callable[[], AbstractContextManager[object]]]] = {
                "padded": (padded_loss, nullcontext),
                "packed": (packed_loss, nullcontext),
            }
            if bf16:
                contenders["bf16"] = (packed_loss, lambda: torch.autocast(device.type, dtype=torch.bfloat16))
            seconds: dict[str, list[float]] = {name: [] for name in contenders}
            for repeat in range(arguments.repeats + 1):
                for name, (loss, context) in contenders.items():
                    taken = update_seconds(optimizer, parameters, loss, context(), CLOCKS[arguments.clock])
                    if repeat:  # the first is for warming up
                        seconds[name].append(taken)
            median = {name: statistics.median(values) for name, values in seconds.items()}
            padding = padding_share(words[chosen] + boxes[chosen])
            ratio = median["padded"] / median["packed"]
            line = f"{kind:8} {task:14} {padding:8.1%} {median['padded']:9.2f} {median['packed']:9.2f} {ratio:6.2f}"
            if bf16:
                line += f" {median['bf16']:7.2f} {median['packed'] / median['bf16']:7.2f}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
