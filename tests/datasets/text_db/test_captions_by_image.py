"""The captions of each image by its key, from files of captions and text databases."""

import json
from pathlib import Path

import pytest

from uniter.datasets.errors import BadInput
from uniter.datasets.text_db.building.build import build_text_db
from uniter.datasets.text_db.caption import Caption
from uniter.datasets.text_db.captions.by_image import captions_by_image
from uniter.datasets.text_db.tokenizer import Tokenizer


def rows(path: Path, *pairs: tuple[str, str]) -> Path:
    path.write_text("".join(json.dumps({"image": image, "caption": text}) + "\n" for image, text in pairs))
    return path


def test_images_are_found_by_name_or_by_a_number_of_one_image(tmp_path: Path) -> None:
    find = captions_by_image(
        rows(tmp_path / "c.jsonl", ("val2014/COCO_val2014_000000000139.jpg", "b"), ("7.png", "x"), ("COCO_val2014_000000000139.jpg", "a"))
    )
    for key in ("COCO_val2014_000000000139", "139", "coco_val2014_000000000139.npz"):
        assert find(key) == ["b", "a"], key
    assert find("7") == ["x"] and find("img_7") == ["x"]
    assert find("8") == () and find("stranger") == ()
    several = captions_by_image(rows(tmp_path / "d.jsonl", ("cat_1.jpg", "cat"), ("dog_1.jpg", "dog")))
    assert several("1") == (), "two images share the number"
    assert several("dog_1") == ["dog"]
    assert captions_by_image(rows(tmp_path / "e.jsonl", ("cat-1.jpg", "cat")))("dog-1") == ()


def test_a_text_database_gives_its_word_pieces_together(tmp_path: Path) -> None:
    texts = [Caption("1", "a.jpg", "Snowboarders , again ."), Caption("0", "a.jpg", "A dog .")]
    build_text_db(texts, tmp_path / "texts.db", tokenizer=Tokenizer.load())
    assert sorted(captions_by_image(tmp_path / "texts.db")("a")) == ["A dog .", "Snowboarders , again ."]


def test_what_holds_no_captions_is_said(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="does not exist"):
        captions_by_image(tmp_path / "none")
    (tmp_path / "x.txt").write_text("hello")
    with pytest.raises(BadInput):
        captions_by_image(tmp_path / "x.txt")
