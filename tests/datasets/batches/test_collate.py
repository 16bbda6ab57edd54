"""Packed batches against what the published collate functions pad."""

import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from uniter.datasets.batches.collate import PackedBatch, collate
from uniter.datasets.batches.corpus import gather
from uniter.datasets.batches.example import Example, Masking, Rows, Sample, TokenSequence
from uniter.datasets.batches.pretraining import masked_regions, masked_text
from uniter.datasets.errors import BadInput
from uniter.datasets.image_db import ImageDB
from uniter.datasets.text_db import TextDB


def _sample(name: str, words: int, regions: int, *, width: int = 4, masked: list[int] | None = None) -> Sample:
    rng = np.random.default_rng(words * 100 + regions)
    mask = None if masked is None else np.isin(np.arange(regions), masked)
    sequence = TokenSequence(
        list(range(10, 10 + words)), rng.random((regions, width), np.float32).astype(np.float16), rng.random((regions, 6)), mask
    )
    return Sample(name, [sequence], {"words": np.arange(words)})


def test_golden_collate_of_masked_words(uniter_tasks_golden: Path) -> None:
    """The padded golden batch, unpadded, is ours."""
    expected = json.loads((uniter_tasks_golden / "expect_items.json").read_text())["mlm_collate(items 0-4)"]["batch"]
    corpus = gather([TextDB(uniter_tasks_golden / "txt_db" / "itm_toy.db")], ImageDB(uniter_tasks_golden / "img_db" / "toy"), "toy")
    samples = [
        masked_text(Example(corpus, number, (int(corpus.image_rows_NK[number, 0]),)), random.Random(1000 + number), Masking())
        for number in range(expected["input_ids"]["shape"][0])
    ]
    batch = collate(samples)
    padded_ids = np.array(expected["input_ids"]["values"])
    real = np.arange(padded_ids.shape[1]) < batch.text_lengths_B.numpy()[:, None]
    assert batch.input_ids_T.tolist() == padded_ids[real].tolist()
    assert batch.targets["words"].tolist() == np.array(expected["txt_labels"]["values"])[real].tolist()
    assert batch.text_positions_T.tolist() == [position for row in real for position in range(row.sum())]
    lengths = np.array(expected["attn_masks"]["values"]).sum(axis=1)
    assert (batch.text_lengths_B + batch.region_counts_B).tolist() == lengths.tolist()


def test_sequences_stand_end_to_end_in_the_precision_of_the_database() -> None:
    samples = [_sample("a", 3, 2), _sample("b", 5, 4)]
    batch = collate(samples)
    assert len(batch) == 2 and batch.tokens == 3 + 5 + 2 + 4
    assert batch.example_ids == ["a", "b"]
    assert batch.features_RD.dtype == torch.float16
    assert np.array_equal(batch.features_RD[2:].numpy(), samples[1].sequences[0].features)
    box = samples[1].sequences[0].norm_bb.astype(np.float32)
    assert np.array_equal(batch.positions_R7[2:, :6].numpy(), box)
    assert np.array_equal(batch.positions_R7[2:, 6].numpy(), box[:, 4] * box[:, 5])
    assert batch.text_positions_T.tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert batch.region_types_R.tolist() == [1] * 6 and batch.text_types_T.tolist() == [0] * 8
    assert batch.masked_regions_R is None


def test_masked_rows_are_zero_in_the_batch_only() -> None:
    sample = _sample("a", 3, 4, masked=[1, 3])
    before = sample.sequences[0].features.copy()
    batch = collate([sample, _sample("b", 2, 2, masked=[0])])
    assert batch.masked_regions_R is not None
    assert batch.masked_regions_R.tolist() == [False, True, False, True, True, False]
    assert (batch.features_RD[batch.masked_regions_R] == 0).all()
    assert (batch.features_RD[~batch.masked_regions_R] != 0).all()
    assert np.array_equal(sample.sequences[0].features, before)


def test_targets_are_what_the_masked_rows_held(uniter_tasks_golden: Path) -> None:
    corpus = gather([TextDB(uniter_tasks_golden / "txt_db" / "itm_toy.db")], ImageDB(uniter_tasks_golden / "img_db" / "toy"), "toy")
    example = Example(corpus, 3, (int(corpus.image_rows_NK[3, 0]),))
    batch = collate([masked_regions(example, random.Random(2), Masking())])
    whole = corpus.regions(example.images[0]).features
    assert np.array_equal(batch.targets["features"].numpy(), whole[batch.masked_regions_R.numpy()])
    assert batch.targets["features"].abs().sum() > 0


def test_rows_of_larger_arrays_are_copied_once_into_the_targets() -> None:
    first, second = np.arange(12, dtype=np.float16).reshape(4, 3), np.arange(6, dtype=np.float32).reshape(2, 3)
    pieces = [Rows([(first, np.array([3, 1]))]), Rows([(second, np.array([0])), (first, np.array([], dtype=np.intp))])]
    assert [len(rows) for rows in pieces] == [2, 1]
    samples = [dataclasses.replace(_sample("a", 3, 2), targets={"soft_labels": rows}) for rows in pieces]
    joined = collate(samples).targets["soft_labels"]
    assert joined.tolist() == [[9, 10, 11], [3, 4, 5], [0, 1, 2]] == np.concatenate([np.asarray(rows) for rows in pieces]).tolist()
    assert joined.dtype == torch.float32, "the finer of two"
    assert collate(samples[:1]).targets["soft_labels"].dtype == torch.float16


def test_features_of_two_detectors_are_refused_by_name() -> None:
    with pytest.raises(BadInput, match=r"example 'b': features of shape \(2, 5\).*4 wide"):
        collate([_sample("a", 3, 2), _sample("b", 3, 2, width=5)])


def test_boxes_of_another_layout_are_refused_by_name() -> None:
    sample = _sample("b", 3, 2)
    sample.sequences[0].norm_bb = sample.sequences[0].norm_bb[:, :4]
    with pytest.raises(BadInput, match=r"example 'b': .*boxes of shape \(2, 4\).*expected boxes of 6 numbers"):
        collate([_sample("a", 3, 2), sample])


def test_moving_keeps_lengths_on_the_host() -> None:
    batch = collate([_sample("a", 3, 2, masked=[0])]).to("meta")
    assert isinstance(batch, PackedBatch)
    assert batch.features_RD.device.type == "meta" and batch.targets["words"].device.type == "meta"
    assert batch.text_lengths_B.device.type == "cpu"
