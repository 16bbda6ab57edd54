"""The scores of all texts with all pictures: kept slice by slice, so that whatever stops the command, it goes on where it was.

A folder holds settings.json (what is scored with what) and `scores_FIRST.npy`, float32 (texts of the slice, pictures), each of
which appears by rename. Where there are more pictures than can be held, slices are of a block of them each, and say which
(`scores_FIRST_PICTURE.npy`). Only the first process reads and writes; the others are told.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uniter.datasets.batches.corpus import Corpus
from uniter.datasets.progress import Progress
from uniter.datasets.storage.claims import Maker, claim, source_names
from uniter.datasets.storage.files import opened_aside, sha256_of
from uniter.model.train.distributed import Processes

logger = logging.getLogger(__name__)

Scores = NDArray[np.float32]
Score = Callable[[int, int], Scores]


SLICE_PAIRS = 200_000


SCORES = Maker("retrieval scores", "header.json", ("scores_*.npy",))  # never complete by a file: whoever reads them counts the slices


def sources_of(corpus: Corpus) -> dict[str, Path]:
    """The databases of a corpus, by the names under which a folder of scores remembers them."""
    return {**source_names([text.path for text in corpus.texts], "texts"), **source_names(corpus.images.folders, "regions")}


def pictures_of(corpus: Corpus) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """The corpus' pictures (M,), as rows of its region database, in the order in which the texts name them (COCO's five folds are
    runs of that order), and the number of each text's picture among them, (N,)."""
    rows, first, inverse = np.unique(corpus.image_rows_NK[:, 0], return_index=True, return_inverse=True)
    order = np.argsort(first)
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    return rows[order].astype(np.int32), place[inverse.reshape(-1)]


def in_slices(
    texts: int,
    blocks: Sequence[tuple[int, int]],
    of_block: Callable[[int, int], Score],
    *,
    processes: Processes,
    folder: Path | None = None,
    settings: Callable[[], dict[str, Any]] = dict,
    sources: Mapping[str, Path] | None = None,
    progress: Progress | None = None,
) -> Scores:
    """All scores (texts, pictures), on every process.

    Args:
        blocks: the pictures, in runs of (first, end), that are scored one after the other.
        of_block: such a run -> (first, end) -> this process's share of the scores of these texts with the pictures of the run, 0 where
            another process's.
        folder: where slices are kept and found again; None keeps nothing.
        settings: what the scores depend on; asked for only where there is a folder.
        sources: the databases whose contents they depend on, by the names under which the folder remembers them.
        progress: told of the pairs whose scores were kept; `score` tells it of its own.

    Raises:
        SettingsDiffer: the folder holds scores of something else, or of other contents.
    """
    pictures = blocks[-1][1]
    step = max(1, SLICE_PAIRS // max(end - begin for begin, end in blocks))
    if folder is not None and processes.writes:
        said = {} if len(blocks) == 1 else {"pictures_of_slices": [end - begin for begin, end in blocks]}
        claim(folder, {**settings(), "texts_of_a_slice": step, **said}, maker=SCORES, sources=sources)
    everything = np.empty((texts, pictures), dtype=np.float32)
    found = 0
    for begin, end in blocks:
        score, name = of_block(begin, end), "" if len(blocks) == 1 else f"_{begin:08d}"
        for first in range(0, texts, step):
            last = min(first + step, texts)
            path = None if folder is None or not processes.writes else folder / f"scores_{first:08d}{name}.npy"
            kept: list[Scores] = processes.gather(_kept(path, (last - first, end - begin)))[0]
            if kept:
                everything[first:last, begin:end] = kept[0]
                found += kept[0].size * processes.writes
                if progress is not None:
                    progress.found(kept[0].size)
                continue
            everything[first:last, begin:end] = np.stack(processes.gather(score(first, last))).sum(axis=0, dtype=np.float32)
            if path is not None:
                _keep(path, everything[first:last, begin:end])
    if found:
        logger.info("%s of %s pairs were scored already: %s", f"{found:,}", f"{texts * pictures:,}", folder)
    return everything


def identity(corpus: Corpus, pictures: NDArray[np.int32], weights: Path, *, precision: str) -> dict[str, Any]:
    """What scores depend on besides the databases' contents, as JSON: the weights' bytes, the chosen texts and pictures, the precision."""
    texts = [[corpus.example_id(number), int(length)] for number, length in enumerate(corpus.text_lengths_N)]
    counts = np.asarray(corpus.images.region_counts)
    regions = [[corpus.images.keys_list[row], int(counts[row])] for row in pictures.tolist()]
    return {
        "weights_sha256": sha256_of(weights),
        "texts_sha256": _digest([texts, [text.header for text in corpus.texts]]),
        "pictures_sha256": _digest([regions, corpus.images.header]),
        "precision": precision,
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _kept(path: Path | None, shape: tuple[int, int]) -> list[Scores]:
    if path is None or not path.is_file():
        return []
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        found = np.empty(0)
    if found.shape != shape or found.dtype != np.float32:
        logger.warning("%s is damaged; its pairs are scored again", path)
        return []
    return [found]


def _keep(path: Path, scores: Scores) -> None:
    with opened_aside(path) as file:
        np.save(file, scores, allow_pickle=False)
