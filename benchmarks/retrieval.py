"""How many text-picture pairs a second UNITER scores packed, against the padded loop that everyone else runs. Prints one table.

    python benchmarks/retrieval.py

The opponent is shipped here: each batch padded to its longest pair, a mask into `scaled_dot_product_attention`, all rows of all
layers, the ranking head on the pooled first row - the very same parameters. Both make their batches from the same pairs and score
them, in turns, in one run; the median of the repeats counts. Lengths are like COCO's: about 13 word pieces, 10 to 100 boxes.

"unsorted" batches are what a loop over texts meets: one text with one picture after the other. "sorted" ones are neighbours among
all pairs sorted by length, which is the padded loop's best case. `uniter-train evaluate retrieval` sorts.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from uniter.datasets.batches.collate import collate
from uniter.datasets.batches.example import Sample, TokenSequence
from uniter.model import UniterConfig
from uniter.model.heads.downstream import UniterForRetrieval
from uniter.model.uniter import PRESETS

CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


@dataclass(frozen=True)
class Pairs:
    """Texts (word pieces with [CLS] and [SEP]) and pictures (features (n, D), norm_bb (n, 6)) to be scored with each other."""

    texts: list[list[int]]
    pictures: list[tuple[np.ndarray, np.ndarray]]

    def sequence(self, text: int, picture: int) -> TokenSequence:
        features, norm_bb = self.pictures[picture]
        return TokenSequence(self.texts[text], features, norm_bb)

    def lengths(self) -> np.ndarray:
        """(texts, pictures) tokens of each pair."""
        words, boxes = (np.array([len(one) for one in side]) for side in (self.texts, [features for features, _ in self.pictures]))
        return np.add.outer(words, boxes)


def draw_pairs(texts: int, pictures: int, config: UniterConfig, rng: np.random.Generator) -> Pairs:
    """Texts of 6 to 40 word pieces, about 13; pictures of 10 to 100 boxes, about 42."""
    words = np.clip(np.rint(rng.lognormal(math.log(12.6), 0.22, texts)), 6, 40).astype(int)
    boxes = np.clip(np.rint(rng.lognormal(math.log(36), 0.6, pictures)), 10, 100).astype(int)
    shown = []
    for count in boxes:
        corners = np.sort(rng.random((count, 2, 2), dtype=np.float32), axis=1).reshape(count, 4)
        norm_bb = np.concatenate([corners, corners[:, 2:] - corners[:, :2]], axis=1)
        shown.append((rng.random((count, config.image_feature_size), dtype=np.float32), norm_bb))
    return Pairs([rng.integers(5, config.vocab_size, length).tolist() for length in words], shown)


def choose(kind: str, pairs: Pairs, *, size: int, count: int, rng: np.random.Generator) -> list[list[tuple[int, int]]]:
    """`count` batches of `size` pairs (text, picture)."""
    texts, pictures = len(pairs.texts), len(pairs.pictures)
    if kind == "unsorted":
        return [
            [(int(text), picture) for picture in range(min(size, pictures))] for text in rng.choice(texts, count, replace=count > texts)
        ]
    by_length = np.argsort(pairs.lengths().ravel(), kind="stable")
    # Short, middling and long ones.
    starts = np.linspace(0, max(len(by_length) - size, 0), count + 2).astype(int)[1:-1]
    return [[divmod(int(number), pictures) for number in by_length[start : start + size]] for start in starts]


def packed_scores(model: UniterForRetrieval, sequences: Sequence[TokenSequence], device: torch.device) -> Tensor:
    """(B,), as `uniter-train evaluate retrieval` scores."""
    batch = collate([Sample("", [sequence]) for sequence in sequences]).to(device)
    return model.ranks(batch)["scores"].squeeze(1)


def padded_scores(model: UniterForRetrieval, sequences: Sequence[TokenSequence], device: torch.device) -> Tensor:
    """(B,), computed on rectangles."""
    words = torch.tensor([len(one.input_ids) for one in sequences])
    boxes = torch.tensor([len(one.features) for one in sequences])
    ids = pad_sequence([torch.tensor(one.input_ids) for one in sequences], batch_first=True).to(device)
    features = pad_sequence([torch.from_numpy(one.features) for one in sequences], batch_first=True).to(device)
    places = pad_sequence([torch.from_numpy(one.norm_bb) for one in sequences], batch_first=True).to(device)
    places = torch.cat([places, places[..., 4:5] * places[..., 5:6]], dim=2)
    # UNITER's gather index: from "padded text, then padded regions" to the joint sequence, padded once.
    joint = torch.arange(int((words + boxes).max())).expand(len(sequences), -1)
    attended = joint < (words + boxes)[:, None]
    index = torch.where((joint >= words[:, None]) & attended, joint - words[:, None] + ids.shape[1], joint).to(device)
    mask = attended[:, None, None, :].to(device)

    body = model.uniter
    positions = torch.arange(ids.shape[1], device=device).unsqueeze(0)
    text = body.embeddings(ids, positions, torch.zeros_like(ids))
    image = body.img_embeddings
    types = body.embeddings.token_type_embeddings(torch.ones(features.shape[:2], dtype=torch.long, device=device))
    appearance = image.img_layer_norm(image.img_linear(features)) + image.pos_layer_norm(image.pos_linear(places))
    regions = image.LayerNorm(appearance + types)
    hidden = torch.cat([text, regions], dim=1).gather(1, index.unsqueeze(2).expand(-1, -1, text.shape[2]))
    for layer in body.encoder.layer:
        own = layer.attention.self
        query, key, value = (
            projection(hidden).view(*hidden.shape[:2], own.heads, -1).transpose(1, 2) for projection in (own.query, own.key, own.value)
        )
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        attended_hidden = layer.attention.output(context.transpose(1, 2).reshape(hidden.shape), hidden)
        hidden = layer.output(layer.intermediate(attended_hidden), attended_hidden)
    return model.rank_output(body.pooler(hidden[:, 0])).squeeze(1)


def seconds(work: Callable[[], object], clock: Callable[[], float], device: torch.device) -> float:
    started = clock()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - started


@torch.no_grad()
def main(words: Sequence[str] | None = None) -> dict[str, float]:
    """Print the table; returns packed / padded pairs a second of each kind of batches."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="base", choices=sorted(PRESETS))
    parser.add_argument("--layers", type=int, help="fewer layers than the model has, for a quick look")
    parser.add_argument("--hidden", type=int, help="another width, for a quick look; the inner one is four times as large")
    parser.add_argument("--texts", type=int, default=200, help="texts that pairs are drawn from")
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--batch", type=int, default=32, help="pairs of a batch")
    parser.add_argument("--count", type=int, default=3, help="batches that are scored in a turn")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"], help="of both")
    parser.add_argument(
        "--clock", default="wall", choices=list(CLOCKS), help="processor time is steadier on a busy machine (with --threads 1)"
    )
    arguments = parser.parse_args(words)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    sizes = {} if arguments.layers is None else {"num_hidden_layers": arguments.layers}
    if arguments.hidden is not None:
        sizes |= {"hidden_size": arguments.hidden, "intermediate_size": 4 * arguments.hidden, "num_attention_heads": 4}
    config = UniterConfig.preset(arguments.model, **sizes)
    model = UniterForRetrieval(config).eval().to(device)
    rng = np.random.default_rng(0)
    pairs = draw_pairs(arguments.texts, arguments.pictures, config, rng)
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=arguments.precision == "bf16")
    print(
        f"UNITER-{arguments.model}, {config.num_hidden_layers} layers of width {config.hidden_size}, {arguments.count} batches of "
        f"{arguments.batch} pairs, {arguments.device}, {arguments.precision}, {arguments.threads} threads, {arguments.clock} time, "
        f"median of {arguments.repeats}, PyTorch {torch.__version__}"
    )
    print(f"{'batches':9} {'padding':>8} {'padded pairs/s':>15} {'packed pairs/s':>15} {'ratio':>6}   wanted")
    ratios = {}
    for kind, wanted in (("sorted", 1.0), ("unsorted", 1.5)):
        batches = [
            [pairs.sequence(*pair) for pair in batch] for batch in choose(kind, pairs, size=arguments.batch, count=arguments.count, rng=rng)
        ]
        lengths = [np.array([len(one.input_ids) + len(one.features) for one in batch]) for batch in batches]
        padding = 1 - sum(int(one.sum()) for one in lengths) / sum(int(one.max()) * len(one) for one in lengths)
        torch.testing.assert_close(packed_scores(model, batches[0], device), padded_scores(model, batches[0], device), atol=1e-3, rtol=1e-3)
        taken: dict[str, list[float]] = {"padded": [], "packed": []}
        for repeat in range(arguments.repeats + 1):
            for name, score in (("padded", padded_scores), ("packed", packed_scores)):

                def turn(score=score, batches=batches) -> None:  # type: ignore[no-untyped-def]
                    with autocast:
                        for batch in batches:
                            score(model, batch, device).cpu()

                spent = seconds(turn, CLOCKS[arguments.clock], device)
                if repeat:  # the first is for warming up
                    taken[name].append(spent)
        number = sum(map(len, batches))
        speed = {name: number / statistics.median(values) for name, values in taken.items()}
        ratios[kind] = speed["packed"] / speed["padded"]
        verdict = "" if ratios[kind] >= wanted else "   NOT REACHED"
        print(
            f"{kind:9} {padding:8.1%} {speed['padded']:15.1f} {speed['packed']:15.1f} {ratios[kind]:6.2f}   {wanted:.1f}{verdict}",
            flush=True,
        )
    return ratios


if __name__ == "__main__":
    main()
