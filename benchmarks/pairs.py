"""All texts with all pictures, from a region database on disk: pictures read and embedded once, beside once a pair.

    a pair      what `uniter-train evaluate retrieval` did: each batch reads its pictures and projects their features
    once        what it does: `known_pictures.py`

Records as Bottom-Up-Attention gives them: float16, 2048 columns, 10 to 100 regions. Both ways take turns in one process; scores must agree.
"batches" is what one process makes without a model: where that is less than what a GPU scores, the GPU waits. Rates are per second of
processor time (on a GPU by the clock), so that what else the machine does counts less.

python benchmarks/pairs.py                                         # tiny, 20 texts with 200 pictures in a turn: two minutes on a core
python benchmarks/pairs.py --model base --device cuda --texts 200 --pictures 1000 --precision bf16 --workers 8
"""

import argparse
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from uniter.datasets.batches.collate import PackedBatch
from uniter.datasets.batches.corpus import Corpus, open_corpus
from uniter.datasets.batches.masking import Pairing
from uniter.datasets.batches.plans import Part
from uniter.datasets.batches.pretraining import matched_pair
from uniter.datasets.image_db.database import ImageDB
from uniter.datasets.image_db.records import encode_record
from uniter.datasets.image_db.regions import RegionFeatures
from uniter.datasets.image_db.writing.units import UnitStore
from uniter.datasets.text_db.building.build import build_text_db
from uniter.datasets.text_db.caption import Caption
from uniter.datasets.text_db.tokenizer import Tokenizer
from uniter.model.evaluation.known_pictures import know, score_pairs
from uniter.model.evaluation.pair_scores import pictures_of
from uniter.model.heads.downstream import UniterForRetrieval
from uniter.model.tasks.task import Head
from uniter.model.train.distributed import Processes
from uniter.model.train.scoring import Scoring
from uniter.model.uniter import PRESETS, UniterConfig

WIDTH = 2048


def write_databases(root: Path, texts: int, pictures: int) -> None:
    dice = np.random.default_rng(0)
    store = UnitStore(root / "regions.lmdb", settings={})
    with store.unit(0) as writer:
        for picture in range(pictures):
            count = int(np.clip(np.rint(dice.lognormal(np.log(36), 0.6)), 10, 100))
            corners = np.sort(dice.random((count, 2, 2), dtype=np.float32), axis=1).reshape(count, 4)
            norm_bb = np.concatenate([corners, corners[:, 2:] - corners[:, :2]], axis=1)
            features = np.maximum(dice.standard_normal((count, WIDTH), dtype=np.float32), 0).astype(np.float16)
            record = RegionFeatures(features=features, norm_bb=norm_bb, conf=np.ones(count, dtype=np.float32))
            writer.put(f"picture{picture:06d}", encode_record(record), regions=count)
            writer.commit()
        writer.complete()
    store.finish(units=1, header={"feature_width": WIDTH, "label_classes": 0})
    words = [word for word in Tokenizer.load().vocabulary if word.isalpha() and len(word) > 2][:5000]
    captions = (
        Caption(f"{text}", f"picture{text % pictures:06d}", " ".join(dice.choice(words, dice.integers(6, 16)))) for text in range(texts)
    )
    build_text_db(captions, root / "texts.db", tokenizer=Tokenizer.load())


def nothing(model: Any, batch: PackedBatch) -> dict[str, torch.Tensor]:
    """A head that asks no model."""
    return {"scores": torch.zeros(len(batch.text_lengths_B), 1, device=batch.input_ids_T.device)}


Pictures = np.ndarray[Any, np.dtype[np.int32]]


def once_a_pair(scoring: Scoring, corpus: Corpus, pictures: Pictures, texts: int, head: Head) -> np.ndarray[Any, Any]:
    scores = np.zeros((texts, len(pictures)), dtype=np.float32)
    part = Part("pairs", corpus.take(np.repeat(np.arange(texts), len(pictures))), matched_pair)
    shown = np.tile(pictures, texts)[:, None]
    for made, _, outputs in scoring.scored(part, head, pairing=Pairing(shown, np.ones(len(shown), dtype=np.bool_))):
        text, picture = np.divmod(made.plan.examples, len(pictures))
        scores[text, picture] = outputs["scores"].float().squeeze(1).cpu().numpy()
    return scores


def once(scoring: Scoring, corpus: Corpus, pictures: Pictures, texts: int, head: Head) -> np.ndarray[Any, Any]:
    return score_pairs(scoring, head, corpus, range(texts), know(scoring, corpus, pictures))


WAYS = {"a pair": once_a_pair, "once": once}


class Reads:
    """How many pictures this process read while it is entered (with workers, who read elsewhere, none)."""

    def __enter__(self) -> "Reads":
        self.count, self._read = 0, ImageDB.read_arrays

        def counted(database: ImageDB, row: int, fields: tuple[str, ...]) -> Any:
            self.count += 1
            return self._read(database, row, fields)

        ImageDB.read_arrays = counted  # type: ignore[assignment]
        return self

    def __exit__(self, *_: object) -> None:
        ImageDB.read_arrays = self._read  # type: ignore[method-assign]


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", choices=sorted(PRESETS))
    parser.add_argument("--texts", type=int, default=20, help="that are scored with all pictures in a turn")
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args(words)
    torch.manual_seed(0)
    device = torch.device(chosen.device)
    clock = time.perf_counter if device.type == "cuda" or chosen.workers else time.process_time
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write_databases(root, max(chosen.texts, chosen.pictures), chosen.pictures)
        corpus = open_corpus("pairs", [root / "texts.db"], [root / "regions.lmdb"])
        pictures, _ = pictures_of(corpus)
        config = UniterConfig.preset(chosen.model, vocab_size=corpus.texts[0].v_range[1])
        scoring = Scoring(
            UniterForRetrieval(config).to(device), Processes(0, 1, device), chosen.batch_tokens, 42, precision=chosen.precision,
            workers=chosen.workers,
        )  # fmt: skip
        taken: dict[str, list[float]] = {way: [] for way in WAYS}
        made: dict[str, list[float]] = {way: [] for way in WAYS}
        scores, reads = dict[str, Any](), dict[str, int]()
        for turn in range(chosen.repeats + 1):
            for way, score in WAYS.items():
                began = clock()
                with Reads() as counted:
                    scores[way] = score(scoring, corpus, pictures, chosen.texts, UniterForRetrieval.ranks)
                reads[way], scored = counted.count, clock()
                score(scoring, corpus, pictures, chosen.texts, nothing)
                if turn:  # the first is for warming up
                    taken[way].append(scored - began)
                    made[way].append(clock() - scored)
        np.testing.assert_allclose(scores["once"], scores["a pair"], atol=1e-5 if chosen.precision == "fp32" else 3e-2)
    pairs = chosen.texts * len(pictures)
    rates = {way: pairs / statistics.median(times) for way, times in taken.items()}
    found: dict[str, Any] = {
        "pairs": pairs, "pairs_a_second": rates,
        "batches_pairs_a_second": {way: pairs / statistics.median(times) for way, times in made.items()},
        "pictures_read": reads, "ratio": rates["once"] / rates["a pair"],
        "largest_difference": float(np.abs(scores["once"] - scores["a pair"]).max()),
        "memory_mebibytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }  # fmt: skip
    if chosen.json:
        print(json.dumps(found))
        return found
    asked = f"{chosen.texts} texts with {len(pictures)} pictures, {device}, {chosen.precision}"
    print(f"UNITER-{chosen.model}, {asked}, PyTorch {torch.__version__}")
    for way in WAYS:
        batches = found["batches_pairs_a_second"][way]
        print(f"{way:8} {rates[way]:10.1f} pairs/s, batches {batches:10.1f} pairs/s, {reads[way]:>8,} pictures read")
    print(f"ratio {found['ratio']:.2f}; scores differ by at most {found['largest_difference']:.1e}; {found['memory_mebibytes']:.0f} MiB")
    return found


if __name__ == "__main__":
    main()
