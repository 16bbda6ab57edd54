"""Masks and pairs: the published draws, and laws that hold for every draw."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from uniter.datasets.batches.masking import NOT_PREDICTED, mask_regions, mask_words, published_pairs, random_pairs
from uniter.datasets.image_db import ImageDB
from uniter.datasets.text_db import TextDB


def test_golden_masked_words_and_regions_of_the_task_goldens(uniter_tasks_golden: Path) -> None:
    items = json.loads((uniter_tasks_golden / "expect_items.json").read_text())
    meta = json.loads((uniter_tasks_golden / "meta.json").read_text())
    texts = TextDB(uniter_tasks_golden / "txt_db" / "itm_toy.db")
    cls_id, sep_id = meta["ids"]["CLS"], meta["ids"]["SEP"]
    for number, name in enumerate(items["MlmDataset.ids"]):
        words, rng = texts[name]["input_ids"], random.Random(1000 + number)
        read, wanted = mask_words(words, rng, mask_id=meta["ids"]["MASK"], v_range=tuple(meta["v_range"]))
        expected = items["MlmDataset"][str(number)]
        assert [cls_id, *read, sep_id] == expected["input_ids"]["values"]
        assert [NOT_PREDICTED, *wanted, NOT_PREDICTED] == expected["txt_labels"]["values"]
    for kind in ("MrfrDataset", "MrcDataset"):
        for number, expected in items[kind].items():
            mask = mask_regions(expected["img_mask"]["shape"][0], random.Random(1000 + int(number)))
            assert mask.astype(int).tolist() == expected["img_mask"]["values"]


def test_golden_masks_of_the_data_goldens_drawn_one_after_the_other(uniter_data_golden: Path) -> None:
    golden = json.loads((uniter_data_golden / "expected.json").read_text())
    texts = TextDB(uniter_data_golden / golden["txt_db"][_pretraining(golden)]["path"])
    mlm = golden["datasets"]["mlm"]
    rng = random.Random(mlm["random_seed"])
    for name, expected in zip(mlm["ids"], mlm["items"], strict=True):
        read, wanted = mask_words(texts[name]["input_ids"], rng, mask_id=texts.mask_id, v_range=texts.v_range)
        assert [texts.cls_id, *read, texts.sep_id] == expected["input_ids"]
        assert [NOT_PREDICTED, *wanted, NOT_PREDICTED] == expected["txt_labels"]
    for kind in ("mrfr", "mrc"):
        rng = random.Random(golden["datasets"][kind]["random_seed"])
        for expected in golden["datasets"][kind]["items"]:
            mask = mask_regions(len(expected["img_mask"]), rng, probability=golden["datasets"][kind]["mask_prob"])
            assert mask.astype(int).tolist() == expected["img_mask"]


def _pretraining(golden: dict) -> str:
    return next(name for name, entry in golden["txt_db"].items() if "bert" in entry["meta"])


def test_golden_pairs_of_an_epoch(uniter_tasks_golden: Path) -> None:
    expected = json.loads((uniter_tasks_golden / "expect_items.json").read_text())["ItmDataset.epoch"]
    texts = TextDB(uniter_tasks_golden / "txt_db" / "itm_toy.db")
    images = ImageDB(uniter_tasks_golden / "img_db" / "toy")
    order = sorted(texts.images())
    own = [order.index(texts.image_key(number)) for number in range(len(texts))]
    seed = int(expected["note"].split("=")[2].split(",")[0])
    pairing = published_pairs(own, random.Random(seed), np.random.RandomState(seed))
    assert pairing.matched.astype(int).tolist() == expected["labels"]
    assert [order[image] for image in pairing.images] == expected["train_imgs"]
    lengths = [int(texts.lengths[number]) + len(images[order[image]]) for number, image in enumerate(pairing.images)]
    assert lengths == expected["lens"]


def test_every_mask_has_a_target() -> None:
    for seed in range(300):
        rng = random.Random(seed)
        words = [rng.randrange(10, 90) for _ in range(rng.randrange(1, 6))]
        read, wanted = mask_words(words, rng, mask_id=5, v_range=(10, 90), probability=0.02)
        assert any(label != NOT_PREDICTED for label in wanted)
        # What is not predicted is shown as it is, and what is predicted is what stood there.
        assert all(
            (label == NOT_PREDICTED and shown == word) or label == word for shown, label, word in zip(read, wanted, words, strict=True)
        )
        assert mask_regions(rng.randrange(1, 6), rng, probability=0.02).any()


def test_words_are_masked_replaced_and_kept_as_the_paper_says() -> None:
    rng, words = random.Random(7), list(range(100, 200))
    kinds = {"masked": 0, "replaced": 0, "kept": 0, "not predicted": 0}
    for _ in range(400):
        read, wanted = mask_words(words, rng, mask_id=5, v_range=(1000, 2000))
        for shown, label, word in zip(read, wanted, words, strict=True):
            kind = "not predicted" if label == NOT_PREDICTED else "masked" if shown == 5 else "kept" if shown == word else "replaced"
            kinds[kind] += 1
    predicted = 400 * len(words) - kinds["not predicted"]
    assert predicted / (400 * len(words)) == pytest.approx(0.15, abs=0.006)
    assert kinds["masked"] / predicted == pytest.approx(0.8, abs=0.02)
    assert kinds["replaced"] / predicted == pytest.approx(0.1, abs=0.02)


def test_nothing_to_mask_is_an_error() -> None:
    with pytest.raises(ValueError, match="no word"):
        mask_words([], random.Random(0), mask_id=1, v_range=(2, 3))
    with pytest.raises(ValueError, match="no region"):
        mask_regions(0, random.Random(0))


def test_random_pairs_are_never_the_own_picture_and_reach_all_others() -> None:
    own = np.array([3, 3, 7, 9] * 3000, dtype=np.int32)
    pairing = random_pairs(own, np.random.default_rng(0))
    assert pairing.matched.mean() == pytest.approx(0.5, abs=0.02)
    assert (pairing.images[pairing.matched] == own[pairing.matched]).all()
    others = pairing.images[~pairing.matched]
    assert (others != own[~pairing.matched]).all()
    beside_three = others[own[~pairing.matched] == 3]
    assert set(beside_three.tolist()) == {7, 9}
    assert (beside_three == 7).mean() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("pictures", [2, 3, 4, 5])
def test_random_pairs_reach_every_other_picture_as_often_as_asked(pictures: int) -> None:
    own = np.tile(np.arange(pictures, dtype=np.int32) * 5 + 2, 4000)
    pairing = random_pairs(own, np.random.default_rng(0), negative_probability=0.2)
    assert pairing.matched.mean() == pytest.approx(0.8, abs=0.02)
    beside_first = pairing.images[(~pairing.matched) & (own == 2)]
    assert set(beside_first.tolist()) == set(own.tolist()) - {2}


def test_pairs_need_two_pictures() -> None:
    with pytest.raises(ValueError, match="two different pictures"):
        random_pairs(np.array([4, 4], dtype=np.int32), np.random.default_rng(0))
