"""Batches: the published sampler number by number; ours: every example once, within the budget, nearly full."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from uniter.datasets.batches.order import Batches, Stream, budget_batches, fill, generator, joined, published_batches
from uniter.datasets.errors import BadInput


def test_golden_sampler_of_the_task_goldens(uniter_tasks_golden: Path) -> None:
    golden = json.loads((uniter_tasks_golden / "expect_sampler.json").read_text())
    args = golden["args"]
    for name, drop_last in (("batches_droplast", True), ("batches_keep_last", False)):
        found = published_batches(
            golden["lens"],
            budget=args["batch_size"],
            rng=random.Random(args["random.seed"]),
            bucket=args["bucket_size"],
            multiple=args["size_multiple"],
            drop_last=drop_last,
        )
        assert found == golden[name]


def test_golden_sampler_of_the_data_goldens(uniter_data_golden: Path) -> None:
    golden = json.loads((uniter_data_golden / "expected.json").read_text())["sampler"]
    for run in golden["runs"]:
        found = published_batches(
            golden["lens"],
            budget=run["batch_size"],
            rng=random.Random(run["random_seed"]),
            bucket=run["bucket_size"],
            multiple=run["size_multiple"],
            drop_last=run["droplast"],
        )
        assert found == run["batches"]


def test_published_sampler_names_the_budget_that_would_do() -> None:
    with pytest.raises(BadInput, match=r"8 examples of length 90 do not fit into a budget of 100 tokens; raise batch_tokens to 720"):
        published_batches([90] * 8, budget=100, rng=random.Random(0))


@pytest.fixture
def lengths() -> np.ndarray:
    """COCO-like: about 13 word pieces, 10-100 regions."""
    rng = np.random.default_rng(5)
    return rng.integers(8, 25, 30_000) + rng.integers(10, 101, 30_000)


@pytest.mark.parametrize("bucket", [1, 256, 8192, 10**9])
def test_every_example_once_within_the_budget_and_over_95_percent_full(lengths: np.ndarray, bucket: int) -> None:
    batches = budget_batches(lengths, budget=10_240, seed=3, epoch=2, bucket=bucket)
    assert sorted(batches.examples.tolist()) == list(range(len(lengths)))
    assert all(lengths[batches[number]].sum() <= 10_240 for number in range(len(batches)))
    assert fill(batches, lengths, budget=10_240) > 0.95


def test_buckets_put_like_lengths_together(lengths: np.ndarray) -> None:
    batches = budget_batches(lengths, budget=10_240, seed=3, epoch=0)
    spread = [np.ptp(lengths[batches[number]]) for number in range(len(batches))]
    assert np.median(spread) <= 4


def test_order_is_a_function_of_seed_and_epoch(lengths: np.ndarray) -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return budget_batches(lengths, budget=4096, seed=seed, epoch=epoch).examples.tolist()

    assert order(1, 1) == order(1, 1)
    assert order(1, 1) != order(1, 2)
    assert order(1, 1) != order(2, 1)


def test_an_example_over_the_budget_is_a_batch_of_its_own() -> None:
    batches = budget_batches(np.array([5, 50, 5]), budget=10, seed=0, epoch=0)
    assert sorted(len(batches[number]) for number in range(len(batches))) in ([1, 2], [1, 1, 1])
    assert sorted(batches.examples.tolist()) == [0, 1, 2]


def test_a_stream_is_its_epochs_end_to_end() -> None:
    asked: list[int] = []

    def epoch_batches(epoch: int) -> Batches:
        asked.append(epoch)
        return joined([[epoch * 10 + number] for number in range(3)])

    stream = Stream(epoch_batches)
    found = [(epoch, examples.tolist()) for epoch, examples in map(stream.locate, range(7))]
    assert found == [(0, [0]), (0, [1]), (0, [2]), (1, [10]), (1, [11]), (1, [12]), (2, [20])]
    assert asked == [0, 1, 2]
    # A resume begins in the middle.
    assert Stream(epoch_batches).locate(4)[1].tolist() == [11]


def test_generators_differ_by_path() -> None:
    draws = {generator(seed, *path).integers(2**40) for seed in (0, 1) for path in ((), ("a",), ("a", 1), ("a1",), ("a", "1", ""))}
    assert len(draws) == 10
