"""Which examples a task's batches hold, in which order, and how tasks are mixed: pure functions of (seed, epoch)."""

import functools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from uniter.datasets.batches.corpus import SPECIAL_TOKENS, Corpus
from uniter.datasets.batches.example import SampleFunction
from uniter.datasets.batches.masking import Pairing, published_pairs, random_pairs, true_pairs
from uniter.datasets.batches.order import BUCKET, Batches, Stream, budget_batches, generator, joined, published_batches
from uniter.datasets.errors import BadInput

Ordering = Literal["buckets", "published"]


@dataclass(slots=True)
class Part:
    """One task on one corpus: what the mixture draws.

    Attributes:
        name: `task_corpus`, as the log writes it.
        corpus: its examples.
        sample: makes what the task shows of an example.
        ratio: how often it is drawn, relative to the other parts.
        negative_probability: chance that an example is shown another picture (image-text matching); 0 for the other tasks.
        lengths: tokens of each example with the pictures (N, K) it is shown; by default one sequence of text and all regions.
        sequences: of an example, each counted in `lengths` with its [CLS] and [SEP], which the published sampler does not count.
    """

    name: str
    corpus: Corpus
    sample: SampleFunction
    ratio: float = 1.0
    negative_probability: float = 0.0
    lengths: Callable[[Corpus, NDArray[np.int32]], NDArray[np.int64]] = Corpus.lengths_with
    sequences: int = 1


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """All that a micro-batch depends on.

    Attributes:
        step: the update it belongs to, counted from 1.
        number: its number among the update's micro-batches of all processes.
        part: the number of its part in the mixture.
        position: its number in the part's stream.
        epoch: the part's epoch.
        examples: (n,) int64. images: (n, K) int32 the pictures shown. matched: (n,) bool.
    """

    step: int
    number: int
    part: int
    position: int
    epoch: int
    examples: NDArray[np.int64]
    images: NDArray[np.int32]
    matched: NDArray[np.bool_]


class Mixture:
    """Parts mixed by ratio: the task of each update is drawn from (seed, step), its examples come from the part's stream.

    Args:
        parts: what is mixed.
        budget: tokens of a micro-batch.
        seed: decides the tasks, the order, the pairs and the masks.
        bucket: see `budget_batches`.
        ordering: "buckets" or "published" (UNITER's own sampler, its counting of tokens and its way to draw pairs).
        multiple: the published sampler's multiple.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        *,
        budget: int,
        seed: int,
        bucket: int = BUCKET,
        ordering: Ordering = "buckets",
        multiple: int = 8,
    ) -> None:
        if not parts:
            raise BadInput("there is no task to train; name at least one, e.g. mlm")
        self.parts, self.budget, self.seed = list(parts), budget, seed
        self.bucket, self.ordering, self.multiple = bucket, ordering, multiple
        self._pairings: dict[int, tuple[int, Pairing]] = {}
        self._streams = [Stream(functools.partial(self._epoch_batches, number)) for number in range(len(parts))]
        ratios = np.array([part.ratio for part in parts], dtype=np.float64)
        if not (ratios > 0).all():
            raise BadInput(f"mix ratios must be positive, got {ratios.tolist()}")
        self._edges = np.cumsum(ratios) / ratios.sum()

    def part_at(self, step: int) -> int:
        """The part of update `step`: the same on every process, a function of (seed, step) only."""
        return int(np.searchsorted(self._edges, generator(self.seed, "task", step).random(), side="right"))

    def plans(
        self, taken: Sequence[int], *, first_step: int, last_step: int, accumulation: int, rank: int = 0, world: int = 1
    ) -> Iterator[Plan]:
        """This process's micro-batches of the updates first_step..last_step.

        Args:
            taken: how many micro-batches the updates before took from each part's stream (all processes together).
            accumulation: micro-batches of one update on one process.
            rank, world: this process and how many there are.
        """
        positions = list(taken)
        for step in range(first_step, last_step + 1):
            part = self.part_at(step)
            for number in range(rank, accumulation * world, world):
                yield self._plan(step, number, part, positions[part] + number)
            positions[part] += accumulation * world

    def _plan(self, step: int, number: int, part: int, position: int) -> Plan:
        epoch, examples = self._streams[part].locate(position)
        pairing = self._pairing(part, epoch)
        return Plan(step, number, part, position, epoch, examples, pairing.images[examples], pairing.matched[examples])

    def _pairing(self, number: int, epoch: int) -> Pairing:
        """The pictures of a part's epoch; the latest is remembered, since positions come in rising order."""
        part = self.parts[number]
        if not part.negative_probability:
            return Pairing(part.corpus.image_rows_NK, np.broadcast_to(np.True_, len(part.corpus)))
        if number not in self._pairings or self._pairings[number][0] != epoch:
            self._pairings[number] = (epoch, self._draw_pairs(part, epoch))
        return self._pairings[number][1]

    def _draw_pairs(self, part: Part, epoch: int) -> Pairing:
        own = part.corpus.image_rows_NK[:, 0]
        try:
            if self.ordering == "published":
                rng = random.Random(f"{self.seed}/{part.name}/pairs/{epoch}")
                numpy_rng = np.random.RandomState(rng.getrandbits(32))
                pairing = published_pairs(own.tolist(), rng, numpy_rng, negative_probability=part.negative_probability)
            else:
                rng_of_epoch = generator(self.seed, part.name, "pairs", epoch)
                pairing = random_pairs(own, rng_of_epoch, negative_probability=part.negative_probability)
        except ValueError as error:
            raise BadInput(f"part {part.name!r}: {error}; leave itm out of the tasks") from error
        return Pairing(pairing.images[:, None], pairing.matched)

    def _epoch_batches(self, number: int, epoch: int) -> Batches:
        part = self.parts[number]
        lengths = part.lengths(part.corpus, self._pairing(number, epoch).images)
        if self.ordering == "buckets":
            seed = int(generator(self.seed, part.name).integers(2**62))
            return budget_batches(lengths, budget=self.budget, seed=seed, epoch=epoch, bucket=self.bucket)
        rng = random.Random(f"{self.seed}/{part.name}/batches/{epoch}")
        published = published_batches(
            (lengths - SPECIAL_TOKENS * part.sequences).tolist(), budget=self.budget, rng=rng, bucket=self.bucket, multiple=self.multiple
        )
        if not published:
            raise BadInput(
                f"part {part.name!r}: the published sampler drops the last batch of each bucket and so leaves none of {len(lengths)} "
                "examples; use ordering: buckets"
            )
        return joined(published)


def sequential_plans(
    part: Part, number: int, *, budget: int, seed: int, rank: int = 0, world: int = 1, pairing: Pairing | None = None
) -> Iterator[Plan]:
    """Every example of a part once, in batches of like lengths, dealt to the processes: for validation and prediction.

    Args:
        part: the part; number: its number in the assembler's list.
        budget: tokens of a batch.
        seed: decides the pairs of image-text matching.
        pairing: the pictures to show instead of drawing them; images (N, K).
    """
    if pairing is None and part.negative_probability:
        drawn = random_pairs(
            part.corpus.image_rows_NK[:, 0],
            generator(seed, part.name, "validation"),
            negative_probability=part.negative_probability,
        )
        pairing = Pairing(drawn.images[:, None], drawn.matched)
    shown = pairing or true_pairs(part.corpus.image_rows_NK)
    lengths = part.lengths(part.corpus, shown.images)
    batches = budget_batches(lengths, budget=budget, seed=seed, epoch=0, bucket=max(len(lengths), 2))
    for position in range(rank, len(batches), world):
        examples = batches[position]
        yield Plan(0, position, number, position, 0, examples, shown.images[examples], shown.matched[examples])
