"""Pictures that many texts are compared with: read once, embedded once, and kept on the device.

What enters the first layer of a region depends on no text, so that for all texts with all pictures a picture is read and projected once
instead of once a pair (COCO's 5,000 pictures with 25,000 texts: 0.8 GB are read instead of 4 TB). What is kept takes 4 bytes a region and
hidden unit: 0.6 GB of UNITER-base for these. Where that is more than `STORE_BYTES`, pictures are taken in blocks.

What a reader would get wrong: the batches of pairs hold no features at all, only the numbers of rows of what is kept.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from uniter.datasets.batches.collate import PackedBatch
from uniter.datasets.batches.corpus import Corpus
from uniter.datasets.batches.example import Example
from uniter.datasets.batches.layout import counted_within
from uniter.datasets.batches.loader import MicroBatch
from uniter.datasets.batches.masking import Pairing
from uniter.datasets.batches.order import budget_batches
from uniter.datasets.batches.plans import Part, Plan
from uniter.datasets.batches.pretraining import picture_alone
from uniter.model.heads.pretraining import Outputs
from uniter.model.tasks.task import Head
from uniter.model.train.distributed import Processes
from uniter.model.train.scoring import Scoring

STORE_BYTES = 2 * 2**30  # on the device, whatever it is: COCO's 5,000 pictures of 100 regions each fit, for UNITER-large too


@dataclass(frozen=True, slots=True)
class KnownPictures:
    """A process's share of some pictures, as they enter the first layer.

    Attributes:
        places_P: (P,) int64, which of the pictures these are.
        counts_P: (P,) int64, their regions.
        regions_RH: (R, H) float32 on the device, the regions of all of them end to end.
    """

    places_P: NDArray[np.int64]
    counts_P: NDArray[np.int64]
    regions_RH: Tensor


def blocks_of(counts_M: NDArray[np.integer], scoring: Scoring) -> list[tuple[int, int]]:
    """Runs of pictures, (first, end) each, that take at most `STORE_BYTES` (a picture that takes more is a run of its own).

    Args:
        counts_M: (M,) regions of each picture.
        scoring: knows the model's width.
    """
    total = np.concatenate([[0], np.cumsum(np.asarray(counts_M, dtype=np.int64) * _width(scoring) * 4)])
    blocks, first = list[tuple[int, int]](), 0
    while first < len(counts_M):
        end = max(first + 1, int(np.searchsorted(total, total[first] + STORE_BYTES, side="right")) - 1)
        blocks.append((first, end))
        first = end
    return blocks


def know(scoring: Scoring, corpus: Corpus, pictures_M: NDArray[np.int32]) -> KnownPictures:
    """Read and embed this process's share of pictures, rows of the corpus' region database of which it has a text each."""
    everyone = scoring.processes
    counts_M = np.asarray(corpus.images.region_counts, dtype=np.int64)[pictures_M]
    # Large and small ones are dealt out in turn.
    places_P = np.sort(np.argsort(-counts_M, kind="stable")[everyone.rank :: everyone.world])
    counts_P, rows_P = counts_M[places_P], pictures_M[places_P]
    kept = torch.empty((int(counts_P.sum()), _width(scoring)), device=everyone.device)
    if len(places_P):
        known, firsts = np.unique(corpus.image_rows_NK[:, 0], return_index=True)
        about = corpus.take(firsts[np.searchsorted(known, rows_P)])
        part, pairing = Part("pictures", about, picture_alone), Pairing(rows_P[:, None], np.ones(len(rows_P), dtype=np.bool_))
        starts_P = np.cumsum(counts_P) - counts_P
        alone = replace(scoring, processes=Processes(0, 1, everyone.device), progress=None)  # pairs are counted, not pictures
        for made, _, outputs in alone.scored(part, _embedded, pairing=pairing):
            rows = _rows(starts_P, counts_P, made.plan.examples)
            kept.index_copy_(0, torch.from_numpy(rows).to(kept.device, non_blocking=True), outputs["regions"].to(kept.dtype))
    return KnownPictures(places_P, counts_P, kept)


def score_pairs(scoring: Scoring, head: Head, corpus: Corpus, examples: Sequence[int], known: KnownPictures) -> NDArray[np.float32]:
    """(texts, P) scores of these examples' texts with the known pictures.

    Args:
        head: gives scores (B, 1) of a batch.
    """
    texts = [_words(corpus, number) for number in examples]
    scores = torch.empty(len(texts) * len(known.places_P), device=known.regions_RH.device)
    if len(scores):

        def of_known(model: Any, batch: PackedBatch) -> Outputs:
            outputs: Outputs = head(model, replace(batch, embedded_regions_RH=known.regions_RH.index_select(0, batch.targets["rows"])))
            return outputs

        batches = _batches(texts, known, scoring)
        for _, batch, outputs in scoring.put_through(batches, of_known):
            scores.index_copy_(0, batch.targets["pairs"], outputs["scores"].float().squeeze(1))
    found: NDArray[np.float32] = scores.cpu().numpy().reshape(len(texts), -1)
    return found


def _width(scoring: Scoring) -> int:
    model: Any = scoring.model
    return int(model.config.hidden_size)


def _embedded(model: Any, batch: PackedBatch) -> Outputs:
    return {"regions": model.uniter.embed_regions(batch)}


def _words(corpus: Corpus, number: int) -> NDArray[np.int64]:
    shown, no_regions = Example(corpus, number, ()).read(), np.empty((0, 0), dtype=np.float32)
    return np.array(shown.sequence(shown.words(), (no_regions, no_regions)).input_ids, dtype=np.int64)


def _batches(texts: Sequence[NDArray[np.int64]], known: KnownPictures, scoring: Scoring) -> Iterator[MicroBatch]:
    """Every pair once, in batches of like lengths, as `sequential_plans` orders them."""
    words, lengths = np.concatenate(texts), np.array([len(text) for text in texts], dtype=np.int64)
    first_words, first_regions = np.cumsum(lengths) - lengths, np.cumsum(known.counts_P) - known.counts_P
    of_pairs = np.add.outer(lengths, known.counts_P).ravel()
    chosen = budget_batches(of_pairs, budget=scoring.budget, seed=scoring.seed, epoch=0, bucket=max(len(of_pairs), 2))
    pinned = scoring.processes.device.type == "cuda"
    for position in range(len(chosen)):
        pairs = chosen[position]
        text, picture = np.divmod(pairs, len(known.counts_P))
        of_text = lengths[text]
        batch = PackedBatch(
            input_ids_T=torch.from_numpy(words[_rows(first_words, lengths, text)]),
            text_positions_T=torch.from_numpy(counted_within(of_text)),
            text_types_T=torch.zeros(int(of_text.sum()), dtype=torch.int64),
            features_RD=torch.empty((0, 0)),
            positions_R7=torch.empty((0, 7)),
            region_types_R=torch.empty(0, dtype=torch.int64),
            text_lengths_B=torch.from_numpy(of_text),
            region_counts_B=torch.from_numpy(known.counts_P[picture]),
            targets={
                "pairs": torch.from_numpy(pairs),
                "rows": torch.from_numpy(_rows(first_regions, known.counts_P, picture)),
            },
        )
        made = MicroBatch(Plan(0, position, 0, position, 0, pairs, picture[:, None].astype(np.int32), np.ones(len(pairs), np.bool_)), batch)
        yield made.pin_memory() if pinned else made


def _rows(starts: NDArray[np.int64], counts: NDArray[np.int64], chosen: NDArray[np.int64]) -> NDArray[np.int64]:
    """The rows of some runs, one after the other, by where each run starts and how long it is."""
    return np.repeat(starts[chosen], counts[chosen]) + counted_within(counts[chosen])
