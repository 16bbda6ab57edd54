"""A database's card says what it holds, and follows from its header alone."""

import json
from pathlib import Path
from typing import Any

import yaml

from uniter.datasets.cards import CARD_FILE, region_card, text_card


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
