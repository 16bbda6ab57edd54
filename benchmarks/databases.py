"""From a region database on disk (warm cache) to packed batches, one process, beside what bounds it; and how full batches are.

Records as Bottom-Up-Attention gives them: float16, 66 regions on average, 2048 feature and 1601 label columns, all different.
Rates are per second of processor time, so that what else the machine does counts less.

    bare bytes   get both records from LMDB and copy the bytes that the task needs into a batch, nothing else: the wall
    ours         what training's data loader does: text and region databases -> samples -> packed batch, features staying float16
    as original  decode every field, cast with NumPy to float32, pad into a batch, as ChenRocks/UNITER's loaders do

The first has an easier life than any reader can have: where the bytes lie is worked out beforehand, no text is unpacked, no mask drawn.

python benchmarks/databases.py                      # 1,500 records (0.75 GB in a temporary folder), a minute

About the host alone: takes no --device.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lmdb
import msgpack
import numpy as np
import torch

from uniter.datasets.batches.corpus import Corpus, open_corpus
from uniter.datasets.batches.loader import Assembler
from uniter.datasets.batches.masking import mask_regions
from uniter.datasets.batches.order import budget_batches, fill, joined, published_batches
from uniter.datasets.batches.plans import Part, Plan
from uniter.datasets.batches.pretraining import masked_regions_with_classes, masked_text
from uniter.datasets.image_db.records import encode_record
from uniter.datasets.image_db.regions import RegionFeatures
from uniter.datasets.image_db.writing.units import UnitStore
from uniter.datasets.storage.array_codec import find_arrays
from uniter.datasets.storage.lmdb_files import open_reader
from uniter.datasets.text_db.building.build import build_text_db
from uniter.datasets.text_db.caption import Caption
from uniter.datasets.text_db.tokenizer import Tokenizer

AIMS = {"mlm": (8_000, 2), "mrc-kl": (4_000, 8)}  # pairs a second, times the original's loop
MEAN_REGIONS, WIDTH, CLASSES, BATCH = 66, 2048, 1601, 96
SAMPLES = {"mlm": masked_text, "mrc-kl": masked_regions_with_classes}


def write_databases(root: Path, records: int) -> None:
    """Region database of `records` images and a text database with one caption each."""
    dice = np.random.default_rng(0)
    features = np.maximum(dice.normal(size=(5000, WIDTH)), 0).astype(np.float16)
    labels = dice.dirichlet(np.full(CLASSES, 0.02), size=5000).astype(np.float16)
    store = UnitStore(root / "images.lmdb", settings={})
    units = range(0, records, 250)
    for number, start in enumerate(units):
        with store.unit(number) as writer:
            for index in range(start, min(start + 250, records)):
                count = int(np.clip(dice.normal(MEAN_REGIONS, 25), 10, 100))
                rows = dice.integers(0, 5000, count)
                corners = np.sort(dice.random((count, 2, 2), dtype=np.float32), axis=1).reshape(count, 4)
                record = RegionFeatures(
                    features=features[rows],
                    norm_bb=np.concatenate([corners, corners[:, 2:] - corners[:, :2]], axis=1),
                    conf=np.sort(dice.random(count, dtype=np.float32))[::-1],
                    boxes=corners * np.float32([640, 480, 640, 480]),
                    soft_labels=labels[rows],
                    size=(480, 640),
                )
                writer.put(f"image{index:06d}", encode_record(record), regions=count)
                if index % 50 == 49:
                    writer.commit()
            writer.complete()
    store.finish(units=len(units), header={"feature_width": WIDTH, "label_classes": CLASSES})
    words = [word for word in Tokenizer.load().vocabulary if word.isalpha() and len(word) > 2][:5000]
    rng = random.Random(0)
    captions = (Caption(f"{index}", f"image{index:06d}", " ".join(rng.choices(words, k=11))) for index in range(records))
    build_text_db(captions, root / "captions.db", tokenizer=Tokenizer.load())


# ------------------------------------------------------------------------------------------------------------------------- ours


def plans_of(corpus: Corpus, order: list[int]) -> list[Plan]:
    """What the main process hands to whoever makes the batches."""
    plans = []
    for position, start in enumerate(range(0, len(order), BATCH)):
        examples = np.array(order[start : start + BATCH])
        images = corpus.image_rows_NK[examples]
        plans.append(Plan(1, position, 0, position, 0, examples, images, np.ones(len(examples), dtype=np.bool_)))
    return plans


def ours(assembler: Assembler, plans: list[Plan]) -> int:
    """Batches as training makes them; returns how many pairs."""
    return sum(len(assembler[plan].batch) for plan in plans)


# ------------------------------------------------------------------------------------------------------------------- bare bytes


class Bare:
    """Where the bytes lie, worked out beforehand, so that the timed loop only gets and copies."""

    def __init__(self, environment: lmdb.Environment, corpus: Corpus, order: list[int], seed: int) -> None:
        self.environment = environment
        self.texts = open_reader(corpus.texts[0].path)
        self.ids = [corpus.example_id(number).encode() for number in order]
        rng = random.Random(seed)
        self.plan: list[tuple[bytes, int, int, int, int, int, np.ndarray]] = []
        with environment.begin(buffers=True) as transaction:
            for number in order:
                key = corpus.images.keys_list[int(corpus.image_rows_NK[number, 0])].encode()
                places = find_arrays(transaction.get(key))
                count = places["features"].shape[0]
                masked = np.flatnonzero(mask_regions(count, rng))
                row = (
                    places["features"].offset,
                    count * WIDTH * 2,
                    places["norm_bb"].offset,
                    count * 12,
                    places["soft_labels"].offset,
                    masked,
                )
                self.plan.append((key, *row))

    def run(self, task: str) -> int:
        """Copy features and boxes (and the hidden regions' labels) of every record into a batch's buffers."""
        copied = 0
        with self.environment.begin(buffers=True) as transaction, self.texts.begin(buffers=True) as texts:
            for start in range(0, len(self.plan), BATCH):
                captions = [bytes(texts.get(example)) for example in self.ids[start : start + BATCH]]
                batch = self.plan[start : start + BATCH]
                features = np.empty(sum(row[2] for row in batch), dtype=np.uint8)
                boxes = np.empty(sum(row[4] for row in batch), dtype=np.uint8)
                labels = np.empty((sum(len(row[6]) for row in batch), CLASSES * 2), dtype=np.uint8) if task == "mrc-kl" else None
                at = box_at = label_at = 0
                for key, offset, size, box_offset, box_size, label_offset, masked in batch:
                    value = transaction.get(key)
                    features[at : at + size] = np.frombuffer(value, np.uint8, size, offset)
                    boxes[box_at : box_at + box_size] = np.frombuffer(value, np.uint8, box_size, box_offset)
                    at, box_at = at + size, box_at + box_size
                    if labels is not None:
                        whole = np.frombuffer(value, np.uint8, size // WIDTH // 2 * CLASSES * 2, label_offset).reshape(-1, CLASSES * 2)
                        labels[label_at : label_at + len(masked)] = whole[masked]
                        label_at += len(masked)
                copied += len(captions)
        return copied


# ------------------------------------------------------------------------------------------------------------------ as original


def decode_all(entry: dict[Any, Any]) -> Any:
    """What msgpack-numpy's object hook does."""
    if entry.get(b"nd"):
        return np.frombuffer(entry[b"data"], dtype=np.dtype(entry[b"type"])).reshape(entry[b"shape"])
    return entry


def as_original(environment: lmdb.Environment, corpus: Corpus, task: str, order: list[int], seed: int) -> int:
    """Decode everything, cast to float32 what the original casts (MLM: features and boxes; MRC: everything), pad into batches."""
    rng = random.Random(seed)
    pairs = 0
    with environment.begin(buffers=True) as transaction:
        for start in range(0, len(order), BATCH):
            pictures, texts, targets = [], [], []
            for number in order[start : start + BATCH]:
                texts.append(corpus.record(number)["input_ids"])
                key = corpus.images.keys_list[int(corpus.image_rows_NK[number, 0])]
                record = msgpack.unpackb(transaction.get(key.encode()), object_hook=decode_all, raw=False, strict_map_key=False)
                names = ("features", "norm_bb") if task == "mlm" else ("features", "norm_bb", "conf", "soft_labels")
                record = {name: torch.from_numpy(record[name].astype(np.float32)) for name in names}
                box = record["norm_bb"]
                position = torch.cat([box, box[:, 4:5] * box[:, 5:]], dim=1)
                if task == "mrc-kl":
                    masked = torch.from_numpy(mask_regions(len(box), rng))
                    targets.append(record["soft_labels"][masked])
                    record["features"] = record["features"].masked_fill(masked[:, None], 0)
                pictures.append((record["features"], position))
            longest = max(len(features) for features, _ in pictures)
            features_BRD = torch.zeros(len(pictures), longest, WIDTH)
            positions_BR7 = torch.zeros(len(pictures), longest, 7)
            for row, (features, position) in enumerate(pictures):
                features_BRD[row, : len(features)] = features
                positions_BR7[row, : len(position)] = position
            ids_BT = torch.zeros(len(texts), max(map(len, texts)) + 2, dtype=torch.long)
            for row, ids in enumerate(texts):
                ids_BT[row, 1 : len(ids) + 1] = torch.tensor(ids)
            if targets:
                torch.cat(targets)
            pairs += len(pictures)
    return pairs


# --------------------------------------------------------------------------------------------------------------------- measuring


def measure(root: Path, *, repeats: int) -> Iterator[dict[str, Any]]:
    """One row of the table for each task: pairs a second, median of interleaved runs, and the ratios of the same runs."""
    corpus = open_corpus("benchmark", [root / "captions.db"], [root / "images.lmdb"], max_text_length=-1)
    environment = lmdb.open(str(root / "images.lmdb"), readonly=True, lock=False)
    order = list(range(len(corpus)))
    random.Random(1).shuffle(order)
    bare, plans = Bare(environment, corpus, order, seed=2), plans_of(corpus, order)
    for task, sample in SAMPLES.items():
        assembler = Assembler([Part(task, corpus, sample)], seed=2)
        ways: dict[str, Callable[[], int]] = {
            "bare bytes": lambda task=task: bare.run(task),
            "ours": lambda assembler=assembler: ours(assembler, plans),
            "as original": lambda task=task: as_original(environment, corpus, task, order, 2),
        }
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for way in ways.values():
            way()  # warm cache
        for _ in range(repeats):
            for name, way in ways.items():
                way()  # what ran before leaves its memory and caches to whoever comes next
                start = time.process_time()
                pairs = way()
                rates[name].append(pairs / (time.process_time() - start))
        to_bare = statistics.median(mine / wall for mine, wall in zip(rates["ours"], rates["bare bytes"], strict=True))
        to_original = statistics.median(mine / theirs for mine, theirs in zip(rates["ours"], rates["as original"], strict=True))
        yield {
            "task": task,
            **{name: round(statistics.median(values)) for name, values in rates.items()},
            "of bare bytes": round(to_bare, 3),
            "times the original": round(to_original, 2),
        }
    environment.close()


def fills(*, pairs: int = 500_000, budget: int = 10_240) -> list[dict[str, Any]]:
    """How much of the token budget is filled: captions of 11 word pieces and 66 regions on average, [CLS] and [SEP] counted."""
    dice = np.random.default_rng(3)
    lengths = (np.clip(dice.normal(MEAN_REGIONS, 25, pairs), 10, 100) + np.clip(dice.normal(11, 3, pairs), 4, 60)).astype(np.int64) + 2
    published = joined(published_batches((lengths - 2).tolist(), budget=budget, rng=random.Random(0)))
    in_buckets = budget_batches(lengths, budget=budget, seed=0, epoch=0)
    return [
        {"batches": name, "fill": round(fill(batches, lengths, budget=budget), 4), "number": len(batches)}
        for name, batches in (("ours", in_buckets), ("the published sampler", published))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=1500)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the databases are, or will be; by default a temporary folder")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        root = options.folder or Path(temporary)
        if not (root / "images.lmdb" / "header.json").exists():
            write_databases(root, options.records)
        rows = list(measure(root, repeats=options.repeats))
    shares = fills()
    if options.json:
        print(json.dumps({"rates": rows, "fill": shares}))
        return
    print(f"{options.records:,} records, one process, batches of {BATCH}, median of {options.repeats} interleaved runs")
    print("pairs for each second of processor time:")
    print(f"{'task':<8}{'bare bytes':>12}{'ours':>9}{'aim':>8}{'as original':>13}{'ours / bare bytes':>20}{'ours / original':>18}")
    for row in rows:
        aim, bar = AIMS[row["task"]]
        share, times = f"{row['of bare bytes']:.0%} (bar 60%)", f"{row['times the original']:.1f} (bar {bar})"
        print(f"{row['task']:<8}{row['bare bytes']:>12,}{row['ours']:>9,}{aim:>8,}{row['as original']:>13,}{share:>20}{times:>18}")
    print("\nshare of the token budget that the batches of 500,000 pairs fill:")
    for row, bar in zip(shares, ("over 95%", ""), strict=True):
        print(f"{row['batches']:<24}{row['fill']:>8.1%}{bar and f' (bar {bar})'}")


if __name__ == "__main__":
    main()
