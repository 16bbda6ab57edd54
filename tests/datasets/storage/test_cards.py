"""A database's card says what it holds, and follows from its header alone."""

import json
from pathlib import Path
from typing import Any

import yaml

from uniter.datasets.image_db.writing.units import UnitStore
from uniter.datasets.storage.cards import CARD_FILE, region_card, text_card
from uniter.datasets.text_db.building.build import build_text_db
from uniter.datasets.text_db.caption import Caption
from uniter.datasets.text_db.tokenizer import Tokenizer


def test_databases_write_their_cards(tmp_path: Path, made_up: Any) -> None:
    texts, images = made_up.World(width=16).write(tmp_path / "one", pictures=10)
    regions = (images / CARD_FILE).read_text()
    assert "| images | 10, and 0 that could not be read" in regions and "| features | 16 wide |" in regions
    words = (texts / CARD_FILE).read_text()
    assert "| texts | 20 |" in words and "| images | 10 |" in words and f"| word pieces | {made_up.vocabulary().name} " in words
    for card in (regions, words):
        assert "uniter" in yaml.safe_load(card.split("---")[1])["tags"]
        assert str(tmp_path) not in card
    again = made_up.World(width=16).write(tmp_path / "two", pictures=10)
    assert [(path / CARD_FILE).read_text() for path in again] == [words, regions]


def test_a_readme_of_somebody_else_stays(tmp_path: Path) -> None:
    for name, build in (("regions", built_regions), ("texts", built_texts)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / CARD_FILE).write_text("# My thesis\n")
        build(folder)
        assert (folder / CARD_FILE).read_text() == "# My thesis\n"
        (folder / CARD_FILE).unlink()
        build(folder)
        card = (folder / CARD_FILE).read_text()
        (folder / CARD_FILE).write_text(card + "stale\n")
        build(folder)
        assert (folder / CARD_FILE).read_text() == card


def built_regions(out: Path) -> None:
    store = UnitStore(out, settings={}, overwrite=True)
    with store.unit(0) as writer:
        assert writer is not None
        writer.put("a", b"record", regions=1)
        writer.complete()
    assert store.finish(units=1, header={})


def built_texts(out: Path) -> None:
    build_text_db([Caption("1", "a.jpg", "A dog .")], out, tokenizer=Tokenizer.load(), overwrite=True)


def test_cards_say_what_headers_say() -> None:
    header = {
        "images": 3, "failures": 1, "regions": 70, "feature_width": 2048, "label_classes": 1601, "detector": "butd", "box_kind": "proposal",
        "weights": {"source": "a|b.pkl", "sha256": "abc", "note": "RANDOM weights"}, "selection": {"rule": "NMS", "min_boxes": 10},
    }  # fmt: skip
    card = region_card(header)
    for line in (
        "| detector | butd |",
        r"| weights | a\|b.pkl |",
        "| sha256 of the weights | abc |",
        "| note | RANDOM weights |",
        "| classes | 1,601 with the background, which is column 0 |",
        "| which regions | rule NMS, min_boxes 10 |",
    ):
        assert line in card
    bare = region_card({"images": 0, "failures": 0, "regions": 0, "weights": None, "selection": None, "converted_from": "a.tsv"})
    assert "| made from | a.tsv |" in bare and "None" not in bare
    header = json.loads('{"examples": 5, "settings": {}, "report": {"texts": {"empty": 2, "excluded": 3}}}')
    assert "| left out | 2 empty, 3 excluded |" in text_card(header)
