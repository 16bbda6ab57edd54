"""An image in which the detector found nothing: read, shown and converted where the format can, never trained on, always said."""

from pathlib import Path

import numpy as np
import pytest

from uniter.datasets.batches.corpus import open_corpus
from uniter.datasets.errors import BadInput
from uniter.datasets.image_db import ImageDB
from uniter.datasets.image_db.formats.table import FORMATS
from uniter.datasets.image_db.records import encode_record
from uniter.datasets.image_db.regions import RegionFeatures, normalised_boxes
from uniter.datasets.image_db.writing.units import UnitStore
from uniter.datasets.maintenance.convert import convert
from uniter.datasets.text_db.building.build import build_text_db
from uniter.datasets.text_db.caption import Caption
from uniter.datasets.text_db.tokenizer import Tokenizer
from uniter.datasets.view.region_report import write_region_report

COUNTS = {"cat": 2, "dog": 3, "empty": 0, "fog": 0}
HOLD_NONE = {"butd-tsv", "lxmert-tsv", "hdf5"}  # formats in which such an image has no place


def record_of(count: int) -> RegionFeatures:
    boxes = np.array([[5, 5, 60, 40]] * count, np.float32).reshape(count, 4)
    return RegionFeatures(
        features=np.ones((count, 8), np.float32),
        norm_bb=normalised_boxes(boxes, (60, 100)),
        conf=np.full(count, 0.5, np.float32),
        boxes=boxes,
        size=(60, 100),
        soft_labels=np.full((count, 4), 0.25, np.float32),
    )


@pytest.fixture
def images(tmp_path: Path) -> Path:
    out = tmp_path / "images.lmdb"
    store = UnitStore(out, settings={})
    with store.unit(0) as writer:
        assert writer is not None
        for key, count in COUNTS.items():
            writer.put(key, encode_record(record_of(count)), regions=count)
        writer.complete()
    assert store.finish(units=1, header={"feature_width": 8, "label_classes": 4})
    return out


def texts(folder: Path, *examples: str | tuple[str, ...]) -> Path:
    captions = [Caption(str(number), image, "what a sight") for number, image in enumerate(examples)]
    build_text_db(captions, folder, tokenizer=Tokenizer.load())
    return folder


def test_it_is_read_as_no_rows_of_the_right_widths(images: Path) -> None:
    database = ImageDB(images)
    assert dict(zip(database.keys_list, database.region_counts.tolist(), strict=True)) == COUNTS
    nothing = database["empty"]
    assert (len(nothing), nothing.features.shape, nothing.size) == (0, (0, 8), (60, 100))
    assert nothing.soft_labels is not None and nothing.soft_labels.shape == (0, 4) and nothing.position.shape == (0, 7)


def test_its_texts_are_left_out_of_a_corpus_and_counted(images: Path, tmp_path: Path) -> None:
    corpus = open_corpus("x", [texts(tmp_path / "a.db", "cat", "empty", "dog", "fog", "empty", "cat")], [images])
    assert [corpus.example_id(number) for number in range(len(corpus))] == ["0", "2", "5"]
    assert corpus.left_out == {"image without regions": 3}
    assert (np.asarray(corpus.images.region_counts)[corpus.image_rows_NK] > 0).all()


def test_one_of_two_pictures_without_regions_is_enough(images: Path, tmp_path: Path) -> None:
    pairs = [("cat", "dog"), ("cat", "empty"), ("fog", "dog"), ("empty", "fog"), ("dog", "dog")]
    corpus = open_corpus("x", [texts(tmp_path / "a.db", *pairs)], [images])
    assert [corpus.example_id(number) for number in range(len(corpus))] == ["0", "4"]
    assert corpus.left_out == {"image without regions": 3}


def test_a_corpus_of_such_images_alone_says_why_it_is_empty(images: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"corpus 'x' has no example to train on \(2 image without regions\)"):
        open_corpus("x", [texts(tmp_path / "a.db", "empty", "fog")], [images])


def test_the_page_shows_it_without_boxes(images: Path, tmp_path: Path) -> None:
    summary = write_region_report([images], tmp_path / "report")
    assert (summary.pictures, summary.unreadable) == (4, [])
    page = summary.page.read_text()
    cards = {card.split("</h3>")[0]: card for card in page.split("<h3>")[1:]}
    assert all(f"{count} regions" in cards[key] for key, count in COUNTS.items())
    assert cards["empty"].count("<tr>") == 1, "the heading of the table and no row"
    assert "<title>0 to 1: 2</title>" in page, "two images in the histogram's bar for no boxes"


# The layouts of projects need more of an image than these have: tests/datasets/image_db/formats.
@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if form.layout is None])
def test_a_format_holds_it_or_says_that_it_does_not(images: Path, tmp_path: Path, name: str) -> None:
    if name == "hdf5-36":  # images of equal numbers only
        with pytest.raises(BadInput, match="'dog' has 3 regions but the first has 2"):
            convert(images, tmp_path / "there", to=name)
        return
    report = convert(images, tmp_path / "there", to=name)
    lost = {row["key"]: row["error"] for row in report.skipped}
    assert set(lost) == ({"empty", "fog"} if name in HOLD_NONE else set())
    assert all(f"image {key!r} has " in said and "regions" in said for key, said in lost.items())
    assert (report.images, report.regions) == (4 - len(lost), 5)
    again = convert(tmp_path / "there", tmp_path / "back.lmdb")
    assert not again.skipped
    back = ImageDB(tmp_path / "back.lmdb")
    assert {key.removesuffix(".npz"): len(back[key]) for key in back} == {key: n for key, n in COUNTS.items() if key not in lost}


def test_published_databases_count_the_rows_that_are_there(images: Path, tmp_path: Path) -> None:
    """UNITER's rule says ten at least, also of an image that has none."""
    convert(images, tmp_path / "published", to="uniter")
    published = ImageDB(tmp_path / "published")
    counts = dict(zip(published.keys_list, published.region_counts.tolist(), strict=True))
    assert counts == {f"{key}.npz": count for key, count in COUNTS.items()}
    assert published["empty.npz"].features.shape == (0, 8)
