"""The loader: one global list of micro-batches, whoever makes them and however many share them."""

import multiprocessing
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from uniter.datasets.batches.corpus import Corpus, open_corpus
from uniter.datasets.batches.example import Masking
from uniter.datasets.batches.loader import Assembler, MicroBatch, _unless_failed, load
from uniter.datasets.batches.plans import Mixture, Part, sequential_plans
from uniter.datasets.batches.pretraining import masked_regions_with_classes, masked_text, matched_pair
from uniter.datasets.errors import BadInput, UniterError


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, made_up) -> Corpus:
    texts, images = made_up.World(width=8).write(tmp_path_factory.mktemp("world"), pictures=30, captions=3)
    return open_corpus("toy", [texts], [images])


@pytest.fixture
def parts(corpus: Corpus) -> list[Part]:
    return [
        Part("mlm_toy", corpus, masked_text, 2),
        Part("itm_toy", corpus, matched_pair, 2, 0.5),
        Part("mrc-kl_toy", corpus, masked_regions_with_classes, 1),
    ]


def _mixture(parts: list[Part], **options) -> Mixture:
    return Mixture(parts, budget=120, seed=3, **options)


def _batches(parts: list[Part], *, workers: int = 0, steps: int = 12, **options) -> list[MicroBatch]:
    taken = [0] * len(parts)
    return list(load(_mixture(parts), Masking(), taken, first_step=1, last_step=steps, accumulation=2, workers=workers, **options))


def _same(one: MicroBatch, other: MicroBatch) -> bool:
    assert one.batch.example_ids == other.batch.example_ids
    pairs = [(one.batch.input_ids_T, other.batch.input_ids_T), (one.batch.features_RD, other.batch.features_RD)]
    pairs += [(one.batch.targets[name], other.batch.targets[name]) for name in one.batch.targets]
    return all(torch.equal(left, right) for left, right in pairs)


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_makes_the_same_batches(parts: list[Part], workers: int) -> None:
    alone, helped = _batches(parts), _batches(parts, workers=workers)
    assert len(alone) == len(helped) == 24
    assert all(_same(one, other) for one, other in zip(alone, helped, strict=True))


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_batches_can_be_made_by_processes_that_inherit_nothing(parts: list[Part], method: str) -> None:
    assembler = Assembler(parts, 3)
    plan = next(_mixture(parts).plans([0, 0, 0], first_step=1, last_step=1, accumulation=1))
    here = assembler[plan]  # opens the databases in this process first
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert _same(pool.apply(assembler.__getitem__, (plan,)), here)


def test_two_processes_share_what_one_does_with_twice_the_accumulation(parts: list[Part]) -> None:
    mixture = _mixture(parts)
    alone = list(mixture.plans([0, 0, 0], first_step=1, last_step=8, accumulation=4))
    shared = [list(_mixture(parts).plans([0, 0, 0], first_step=1, last_step=8, accumulation=2, rank=rank, world=2)) for rank in (0, 1)]
    assert len(shared[0]) == len(shared[1]) == 16
    dealt = sorted([*shared[0], *shared[1]], key=lambda plan: (plan.step, plan.number))
    assert [(p.step, p.part, p.position, p.examples.tolist(), p.images.tolist()) for p in dealt] == [
        (p.step, p.part, p.position, p.examples.tolist(), p.images.tolist()) for p in alone
    ]


def test_a_resume_goes_on_where_the_stream_was(parts: list[Part]) -> None:
    whole = list(_mixture(parts).plans([0, 0, 0], first_step=1, last_step=20, accumulation=2))
    taken = [sum(plan.part == part for plan in whole if plan.step <= 9) for part in range(3)]
    rest = list(_mixture(parts).plans(taken, first_step=10, last_step=20, accumulation=2))
    assert [(p.step, p.position, p.examples.tolist()) for p in rest] == [
        (p.step, p.position, p.examples.tolist()) for p in whole if p.step >= 10
    ]


def test_an_epoch_loses_and_repeats_nothing_and_keeps_its_pairs(corpus: Corpus) -> None:
    part = Part("itm_toy", corpus, matched_pair, 1, 0.5)
    plans = list(Mixture([part], budget=120, seed=1).plans([0], first_step=1, last_step=60, accumulation=1))
    for epoch in (0, 1):
        seen = Counter(example for plan in plans if plan.epoch == epoch for example in plan.examples.tolist())
        assert seen == Counter(range(len(corpus)))
    labels = [
        dict(pair for p in plans if p.epoch == epoch for pair in zip(p.examples.tolist(), p.matched.tolist(), strict=True))
        for epoch in (0, 1)
    ]
    assert labels[0] != labels[1]
    assert 0.3 < np.mean(list(labels[0].values())) < 0.7


def test_tasks_are_drawn_by_ratio_from_seed_and_step(parts: list[Part]) -> None:
    mixture = _mixture(parts)
    drawn = Counter(mixture.part_at(step) for step in range(1, 3001))
    assert [drawn[part] / 3000 for part in range(3)] == pytest.approx([0.4, 0.4, 0.2], abs=0.03)
    assert [mixture.part_at(step) for step in range(1, 50)] == [_mixture(parts).part_at(step) for step in range(1, 50)]


def test_published_ordering_has_batches_of_multiples(parts: list[Part]) -> None:
    mixture = Mixture(parts, budget=200, seed=3, ordering="published")
    plans = list(mixture.plans([0, 0, 0], first_step=1, last_step=30, accumulation=1))
    assert {len(plan.examples) % 8 for plan in plans} == {0}
    with pytest.raises(BadInput, match="raise batch_tokens to"):
        list(Mixture(parts, budget=20, seed=3, ordering="published").plans([0, 0, 0], first_step=1, last_step=1, accumulation=1))


def test_validation_sees_every_example_once_whoever_shares_it(parts: list[Part]) -> None:
    seen = [
        example
        for rank in range(3)
        for plan in sequential_plans(parts[1], 1, budget=150, seed=0, rank=rank, world=3)
        for example in plan.examples
    ]
    assert sorted(seen) == list(range(len(parts[1].corpus)))


def test_masks_by_example_do_not_depend_on_the_picture_beside(parts: list[Part]) -> None:
    assembler = Assembler(parts, 3, by_example=True)
    plans = list(sequential_plans(parts[0], 0, budget=100, seed=0))
    other = list(sequential_plans(parts[0], 0, budget=333, seed=5))

    def labels(chosen) -> dict[str, list[int]]:
        found = {}
        for plan in chosen:
            batch = assembler[plan].batch
            found |= dict(
                zip(batch.example_ids, (part.tolist() for part in batch.targets["words"].split(batch.text_lengths_B.tolist())), strict=True)
            )
        return found

    assert labels(plans) == labels(other)


def test_nothing_touches_the_global_random_state(parts: list[Part]) -> None:
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    plans = _mixture(parts).plans([0, 0, 0], first_step=1, last_step=3, accumulation=1)
    assembler = Assembler(parts, 3)
    for plan in plans:
        assembler[plan]
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


def test_a_corpus_of_one_picture_cannot_be_matched(tmp_path: Path, made_up) -> None:
    corpus = open_corpus("one", *([path] for path in made_up.World().write(tmp_path, pictures=1)))
    with pytest.raises(BadInput, match="two different pictures; leave itm out"):
        list(
            Mixture([Part("itm_one", corpus, matched_pair, 1, 0.5)], budget=99, seed=1).plans(
                [0], first_step=1, last_step=1, accumulation=1
            )
        )


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_is_its_own_sentence_whichever_process_meets_it(corpus: Corpus, workers: int) -> None:
    parts = [Part("broken_toy", corpus, _refusing)]
    with pytest.raises(BadInput) as refused:
        _batches(parts, workers=workers)
    assert str(refused.value) == "example 'x' is broken; extract it again"


def _refusing(example, rng, masking):
    raise BadInput("example 'x' is broken; extract it again")


def test_a_worker_that_dies_is_said_in_words() -> None:
    def batches():
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
        yield

    with pytest.raises(UniterError, match=r"has died \(DataLoader worker \(pid 7\) is killed .* use fewer workers"):
        list(_unless_failed(batches()))
