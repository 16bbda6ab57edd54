"""The retrieval benchmark runs, and its opponent computes the same scores."""

from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest

from uniter.model import UniterConfig

SIZES = {"hidden": 32, "layers": 2, "texts": 12, "pictures": 12, "batch": 8, "count": 2, "repeats": 1, "threads": 1, "clock": "processor"}
TINY = [f"--{name}={value}" for name, value in SIZES.items()]


def test_it_prints_its_table(script: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]) -> None:
    ratios = script("retrieval").main(TINY)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["batches", "sorted", "unsorted"]
    assert set(ratios) == {"sorted", "unsorted"} and all(ratio > 0 for ratio in ratios.values())


def test_sorted_batches_hold_like_lengths_and_unsorted_ones_a_text_with_all_pictures(script: Callable[[str], ModuleType]) -> None:
    retrieval, rng = script("retrieval"), np.random.default_rng(0)
    config = UniterConfig.preset("tiny", image_feature_size=4)
    pairs = retrieval.draw_pairs(30, 40, config, rng)
    lengths = pairs.lengths()
    for text, picture in ((0, 0), (29, 39)):
        sequence = pairs.sequence(text, picture)
        assert len(sequence.input_ids) + len(sequence.features) == lengths[text, picture]
    spreads = {
        kind: np.mean([np.ptp([lengths[pair] for pair in batch]) for batch in retrieval.choose(kind, pairs, size=16, count=5, rng=rng)])
        for kind in ("sorted", "unsorted")
    }
    assert spreads["sorted"] < 5 < 30 < spreads["unsorted"]
    for batch in retrieval.choose("unsorted", pairs, size=16, count=5, rng=rng):
        assert len({text for text, _ in batch}) == 1 and [picture for _, picture in batch] == list(range(16))
