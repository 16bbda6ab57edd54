"""Samples: what each task shows and asks of an example, against the goldens and by its law."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from uniter.datasets.batches.corpus import Corpus, gather, open_corpus
from uniter.datasets.batches.example import Example, Masking
from uniter.datasets.batches.pretraining import masked_regions, masked_regions_with_classes, masked_text, matched_pair
from uniter.datasets.errors import BadInput
from uniter.datasets.image_db import ImageDB
from uniter.datasets.text_db import TextDB


@pytest.fixture
def toy(uniter_tasks_golden: Path) -> Corpus:
    return gather([TextDB(uniter_tasks_golden / "txt_db" / "itm_toy.db")], ImageDB(uniter_tasks_golden / "img_db" / "toy"), "toy")


def _example(corpus: Corpus, number: int, image: int | None = None) -> Example:
    own = int(corpus.image_rows_NK[number, 0])
    return Example(corpus, number, (own if image is None else image,), image is None)


def test_golden_items(uniter_tasks_golden: Path, toy: Corpus) -> None:
    """Every field of MLM, MRFR and MRC items, features to the bit."""
    import hashlib

    items = json.loads((uniter_tasks_golden / "expect_items.json").read_text())

    def check(array: np.ndarray, expected: dict) -> None:
        assert hashlib.sha1(np.ascontiguousarray(array, dtype=np.float32).tobytes()).hexdigest() == expected["sha1_f32"]

    assert [toy.example_id(number) for number in range(len(toy))] == items["MlmDataset.ids"]
    assert (toy.lengths - 2).tolist() == items["MlmDataset.lens"]
    for kind, sample in (("MlmDataset", masked_text), ("MrfrDataset", masked_regions), ("MrcDataset", masked_regions_with_classes)):
        for number, expected in items[kind].items():
            made = sample(_example(toy, int(number)), random.Random(1000 + int(number)), Masking())
            sequence = made.sequences[0]
            assert sequence.input_ids == expected["input_ids"]["values"]
            check(sequence.features, expected["img_feat"])
            if kind == "MlmDataset":
                assert made.targets["words"].tolist() == expected["txt_labels"]["values"]
                continue
            assert sequence.masked is not None and sequence.masked.astype(int).tolist() == expected["img_mask"]["values"]
            if kind == "MrcDataset":
                whole = np.asarray(toy.images[toy.images.keys_list[toy.image_rows_NK[int(number), 0]]].soft_labels)
                check(whole, expected["img_soft_labels"])
                assert np.array_equal(made.targets["soft_labels"], whole[sequence.masked])
            else:
                assert np.array_equal(made.targets["features"], sequence.features[sequence.masked])


def test_golden_lengths_and_ids_of_the_data_goldens(uniter_data_golden: Path) -> None:
    golden = json.loads((uniter_data_golden / "expected.json").read_text())
    entry = next(entry for entry in golden["txt_db"].values() if "bert" in entry["meta"])
    mlm = golden["datasets"]["mlm"]
    images = [path for path in (uniter_data_golden / "img_db").iterdir() if any(path.glob("feat_th*_compressed"))]
    corpus = open_corpus("toy", [uniter_data_golden / entry["path"]], images, max_text_length=mlm["max_txt_len"])
    assert [corpus.example_id(number) for number in range(len(corpus))] == mlm["ids"]
    # The published lengths count rows that an image with fewer than min_bb regions has not.
    nbb = {key: number for folder in images for path in folder.glob("nbb_*.json") for key, number in json.loads(path.read_text()).items()}
    stated = [nbb[corpus.images.keys_list[row]] for row in corpus.image_rows_NK[:, 0]]
    assert (corpus.text_lengths_N + stated).tolist() == mlm["lens"]


def test_another_picture_brings_its_own_regions(toy: Corpus) -> None:
    other = next(row for row in np.unique(toy.image_rows_NK).tolist() if row != toy.image_rows_NK[0, 0])
    made = matched_pair(_example(toy, 0, other), random.Random(0), Masking())
    assert made.targets["matched"].tolist() == [0]
    assert np.array_equal(made.sequences[0].features, toy.images[toy.images.keys_list[other]].features)
    assert matched_pair(_example(toy, 0), random.Random(0), Masking()).targets["matched"].tolist() == [1]


def test_classes_need_soft_labels(tmp_path: Path, made_up) -> None:
    corpus = open_corpus("x", *([path] for path in made_up.World().write(tmp_path, pictures=4, soft_labels=False)))
    with pytest.raises(BadInput, match=r"image 'scene_1_0000\d' has no soft labels, which MRC needs"):
        masked_regions_with_classes(_example(corpus, 0), random.Random(0), Masking())


def test_what_a_corpus_leaves_out_is_counted(tmp_path: Path, made_up) -> None:
    world = made_up.World()
    texts, images = world.write(tmp_path / "a", pictures=6, captions=2)
    _, strangers = world.write(tmp_path / "b", pictures=2, prefix="other")
    corpus = open_corpus("x", [texts], [images, strangers], max_text_length=5)
    assert corpus.left_out == {"too long": 12 - len(corpus)}
    assert (corpus.text_lengths_N <= 5).all()
    with pytest.raises(BadInput, match=r"corpus 'x' has no example to train on \(12 without image\)"):
        open_corpus("x", [texts], [strangers])


def test_held_out_pictures_are_seen_with_no_text_of_the_rest(tmp_path: Path, made_up) -> None:
    corpus = open_corpus("x", *([path] for path in made_up.World().write(tmp_path, pictures=20, captions=3)))
    rest, held_out = corpus.hold_out(4, seed=1)
    assert len(np.unique(held_out.image_rows_NK)) == 4
    assert len(held_out) == 12 and len(rest) == 48
    assert not set(rest.image_rows_NK[:, 0].tolist()) & set(held_out.image_rows_NK[:, 0].tolist())
    again = corpus.hold_out(4, seed=1)[1]
    assert np.array_equal(again.row_N, held_out.row_N)


def test_what_was_left_out_is_known_by_its_id(toy: Corpus) -> None:
    short = gather(toy.texts, toy.images, "toy", max_text_length=int(np.median(toy.text_lengths_N)))
    assert {reason: len(ids) for reason, ids in short.left_out_ids().items()} == short.left_out
    here = {short.example_id(number) for number in range(len(short))}
    assert here | set(short.left_out_ids()["too long"]) == set(toy.texts[0].ids)
    fewer = short.without(np.arange(len(short)) == 1, "without a label")
    assert fewer.left_out_ids() == {**short.left_out_ids(), "without a label": [short.example_id(1)]}
    assert len(fewer) == len(short) - 1 and short.without(np.zeros(len(short), dtype=np.bool_), "for no reason") is short


def test_region_databases_without_images_are_refused(uniter_tasks_golden: Path, toy: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageDB, "__len__", lambda images: 0)
    with pytest.raises(BadInput, match="its region databases hold no image"):
        gather(toy.texts, toy.images, "toy")
