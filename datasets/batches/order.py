"""Which examples make a batch: token budgets, and an order that is a pure function of (seed, epoch).

The budget counts real tokens (word pieces with [CLS] and [SEP], and regions), because nothing is padded. The published sampler
counts otherwise (longest x number, specials left out) and is kept, exactly, for compatible runs.

A stream of batches goes on for ever, epoch after epoch. One micro-batch after the other is taken from it, by all processes
together: of the micro-batches of one update, number m goes to process m modulo world. So every process takes equally many
steps, and in an epoch no example is lost or seen twice, whatever the number of processes.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from uniter.datasets.errors import BadInput

BUCKET = 8192


@dataclass(frozen=True, slots=True, eq=False)
class Batches:
    """The batches of one epoch, one after the other.

    Attributes:
        examples: (N,) int64, the examples of all batches end to end.
        ends: (M,) int64, where each batch ends in it.
    """

    examples: NDArray[np.int64]
    ends: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, batch: int) -> NDArray[np.int64]:
        start = int(self.ends[batch - 1]) if batch else 0
        return self.examples[start : int(self.ends[batch])]


def generator(seed: int, *path: int | str) -> np.random.Generator:
    """A generator that depends on `seed` and `path` only (equal on every machine)."""
    words = [word for part in path for word in (str(part).encode(), b"/")]
    return np.random.default_rng([seed & 0xFFFFFFFFFFFFFFFF, *b"".join(words)])


def budget_batches(lengths: NDArray[np.integer], *, budget: int, seed: int, epoch: int, bucket: int = BUCKET) -> Batches:
    """Every example once, in batches of at most `budget` tokens, in an order that (seed, epoch) decides.

    Examples are shuffled, cut into buckets, sorted by length within each (up and down in turns, so that a batch that reaches
    over two buckets holds like lengths), filled greedily, and the batches are shuffled.

    Args:
        lengths: (N,) tokens of each example.
        budget: most tokens of a batch; a single longer example is a batch of its own.
        seed, epoch: decide the order.
        bucket: examples of a bucket; 1 leaves the lengths mixed.
    """
    rng = generator(seed, "batches", epoch)
    order = rng.permutation(len(lengths))
    counted = np.asarray(lengths, dtype=np.int64)
    if bucket > 1:
        key = counted[order]
        number = np.arange(len(order)) // bucket
        key = np.where(number % 2 == 0, key, -key)
        order = order[np.lexsort((key, number))]
    total = np.concatenate([[0], np.cumsum(counted[order])])
    ends: list[int] = []
    start = 0
    while start < len(order):
        start = max(start + 1, int(np.searchsorted(total, total[start] + budget, side="right")) - 1)
        ends.append(start)
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
    finishes = np.array(ends, dtype=np.int64)
    shuffled = rng.permutation(len(ends))
    sizes = (finishes - starts)[shuffled]
    new_ends = np.cumsum(sizes)
    places = np.arange(len(order)) + np.repeat(starts[shuffled] - (new_ends - sizes), sizes)
    return Batches(order[places].astype(np.int64), new_ends.astype(np.int64))


def fill(batches: Batches, lengths: NDArray[np.integer], *, budget: int) -> float:
    """The share of the token budget that the batches use."""
    return float(np.asarray(lengths, dtype=np.int64)[batches.examples].sum() / (budget * max(len(batches), 1)))


def published_batches(
    lengths: Sequence[int], *, budget: int, rng: random.Random, bucket: int = BUCKET, multiple: int = 8, drop_last: bool = True
) -> list[list[int]]:
    """The batches of UNITER's token-bucket sampler, number by number.

    Args:
        lengths: word pieces without [CLS] and [SEP], plus regions, of each example.
        budget: longest x number stays within it; the longest is that of the whole bucket, as published.
        rng: shuffles the examples, and in the end the batches.
        bucket: examples of a bucket, sorted by decreasing length.
        multiple: a batch grows by so many examples at a time.
        drop_last: leave out the last, smaller batch of every bucket (in training).

    Raises:
        BadInput: `multiple` of the longest examples are over the budget.

    Source: ChenRocks/UNITER `data/sampler.py`.
    """
    order = list(range(len(lengths)))
    rng.shuffle(order)
    batches: list[list[int]] = []
    for start in range(0, len(order), bucket):
        by_length = sorted(order[start : start + bucket], key=lambda example: lengths[example], reverse=True)
        longest, batch = 0, list[int]()
        for chunk_start in range(0, len(by_length), multiple):
            chunk = by_length[chunk_start : chunk_start + multiple]
            longest = max(longest, *(lengths[example] for example in chunk))
            if longest * (len(batch) + multiple) > budget:
                if not batch:
                    raise BadInput(
                        f"{multiple} examples of length {longest} do not fit into a budget of {budget} tokens; "
                        f"raise batch_tokens to {longest * multiple} or lower max_text_length"
                    )
                batches.append(batch)
                batch = list(chunk)
            else:
                batch.extend(chunk)
        if batch and not drop_last:
            batches.append(batch)
    rng.shuffle(batches)
    return batches


def joined(batches: Sequence[Sequence[int]]) -> Batches:
    """A list of batches in the compact form."""
    sizes = np.fromiter((len(batch) for batch in batches), dtype=np.int64, count=len(batches))
    return Batches(np.array([example for batch in batches for example in batch], dtype=np.int64), np.cumsum(sizes))


@dataclass(slots=True)
class Stream:
    """An endless sequence of micro-batches: the epochs one after the other.

    Attributes:
        epoch_batches: epoch -> its batches, never none.
    """

    epoch_batches: Callable[[int], Batches]
    _epoch: int = -1
    _first: int = 0
    _current: Batches | None = None

    def locate(self, position: int) -> tuple[int, NDArray[np.int64]]:
        """(epoch, examples) of micro-batch `position`, counted from the first epoch's first. Cheap in rising order."""
        if self._current is None or position < self._first:
            self._epoch, self._first, self._current = 0, 0, self.epoch_batches(0)
        while position >= self._first + len(self._current):
            self._first += len(self._current)
            self._epoch += 1
            self._current = self.epoch_batches(self._epoch)
        return self._epoch, self._current[position - self._first]
