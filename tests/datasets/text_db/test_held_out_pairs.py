"""Pictures that are held out, where an example is about two of them: one held-out picture is enough to hold the example out."""

import numpy as np
import pytest

from uniter.datasets.batches.corpus import Corpus, open_corpus
from uniter.datasets.image_db.records import encode_record
from uniter.datasets.image_db.regions import RegionFeatures
from uniter.datasets.image_db.writing.units import UnitStore
from uniter.datasets.text_db.building.build import build_text_db
from uniter.datasets.text_db.caption import Caption
from uniter.datasets.text_db.tokenizer import Tokenizer

PICTURES = 12


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Each picture in two examples, beside its left and beside its right neighbour; and one example that shows a picture twice."""
    folder = tmp_path_factory.mktemp("ring")
    store = UnitStore(folder / "images.lmdb", settings={})
    with store.unit(0) as writer:
        assert writer is not None
        for number in range(PICTURES):
            box = np.array([[0.1, 0.1, 0.5, 0.5, 0.4, 0.4]], np.float32)
            record = RegionFeatures(features=np.full((1, 4), number, np.float32), norm_bb=box, conf=np.ones(1, np.float32))
            writer.put(f"picture{number:02d}", encode_record(record), regions=1)
        writer.complete()
    assert store.finish(units=1, header={"feature_width": 4})
    pairs = [(number, (number + 1) % PICTURES) for number in range(PICTURES)] + [(0, 0)]
    captions = [Caption(f"{a}-{b}", (f"picture{a:02d}", f"picture{b:02d}"), "two dogs") for a, b in pairs]
    build_text_db(captions, folder / "texts.db", tokenizer=Tokenizer.load())
    return open_corpus("ring", [folder / "texts.db"], [folder / "images.lmdb"])


def shown(corpus: Corpus) -> set[int]:
    return set(corpus.image_rows_NK.ravel().tolist())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [1, 3, 6])
def test_no_picture_that_is_held_out_stands_in_any_pair_of_the_rest(ring: Corpus, count: int, seed: int) -> None:
    rest, held_out = ring.hold_out(count, seed=seed)
    unseen = shown(ring) - shown(rest)
    assert len(unseen) >= count, "so many pictures are in no example of the rest"
    assert all(unseen & set(pair) for pair in held_out.image_rows_NK.tolist()), "what is held out shows one of them"
    assert sorted([*rest.row_N.tolist(), *held_out.row_N.tolist()]) == list(range(len(ring))), "each example is in one of the two"


def test_one_picture_takes_both_its_pairs_with_it(ring: Corpus) -> None:
    for seed in range(10):
        rest, held_out = ring.hold_out(1, seed=seed)
        (picture,) = set.intersection(*(set(pair) for pair in held_out.image_rows_NK.tolist()))
        assert len(held_out) == (3 if ring.images.keys_list[picture] == "picture00" else 2)
        assert len(rest) == len(ring) - len(held_out)
