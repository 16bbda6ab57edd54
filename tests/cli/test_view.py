"""`uniter-view` from the outside."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from uniter.cli.view import main
from uniter.datasets.image_db import ImageDB
from uniter.datasets.image_db.records import encode_record
from uniter.datasets.image_db.regions import RegionFeatures, normalised_boxes
from uniter.datasets.image_db.writing.units import UnitStore
from uniter.datasets.text_db import TextDB
from uniter.datasets.text_db.building.build import build_text_db
from uniter.datasets.text_db.caption import Caption
from uniter.datasets.text_db.tokenizer import Tokenizer


@pytest.fixture
def database(tmp_path):
    store = UnitStore(tmp_path / "out.lmdb", settings={})
    boxes = np.array([[1, 2, 30, 20]], np.float32)
    record = RegionFeatures(
        features=np.ones((1, 4), np.float32),
        norm_bb=normalised_boxes(boxes, (30, 40)),
        conf=np.ones(1, np.float32),
        boxes=boxes,
        size=(30, 40),
    )
    with store.unit(0) as unit:
        for key in ("cat", "dog"):
            unit.put(key, encode_record(record), regions=1)
        unit.commit()
        unit.complete()
    assert store.finish(units=1, header={})
    return tmp_path / "out.lmdb"


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_a_page_with_photographs_and_captions(tmp_path, database):
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (40, 30)).save(photos / "cat.png")
    build_text_db([Caption("1", "cat.png", "A cat & a mat.")], tmp_path / "captions.db", tokenizer=Tokenizer.load())
    result = run(database, "--images", photos, "--text", tmp_path / "captions.db", "--out", tmp_path / "report", "--json")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert (summary["pictures"], summary["without_photograph"], summary["with_captions"]) == (2, 1, 1)
    assert repr(ImageDB(database)) == f"<ImageDB {database}: 2 images>"
    assert repr(TextDB(tmp_path / "captions.db")) == f"<TextDB {tmp_path / 'captions.db'}: 1 examples>"
    assert "A cat &amp; a mat." in (tmp_path / "report/index.html").read_text()


def test_published_texts_are_put_together_from_word_pieces(tmp_path, database):
    tokenizer = Tokenizer.load()
    pieces = tokenizer.encode("Two zebras graze.")
    caption = Caption("1", "cat.png", None, fields={"input_ids": pieces})
    build_text_db([caption], tmp_path / "captions.db", tokenizer=tokenizer)
    result = run(database, "--text", tmp_path / "captions.db", "--out", tmp_path / "report")
    assert result.exit_code == 0, result.output
    assert "Two zebras graze ." in (tmp_path / "report/index.html").read_text()


def test_curves_of_two_runs(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        lines = [{"step": step, "kind": "train", "loss": 1 / step} for step in (1, 2, 3)]
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = run(tmp_path / "a", tmp_path / "b", "--out", tmp_path / "curves", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["runs"] == {name: {"lines": 3, "last_update": 3} for name in "ab"}


def test_a_run_and_a_database_want_a_text(tmp_path, database):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/log.jsonl").write_text("")
    result = run(tmp_path / "run", database, "--out", tmp_path / "report")
    assert result.exit_code == 2 and "give one run and --text" in result.stderr
    texts = ("--text", tmp_path / "a.db", "--text", tmp_path / "b.db")
    result = run(tmp_path / "run", database, *texts, "--out", tmp_path / "report")
    assert result.exit_code == 2 and "only one --text is looked at" in result.stderr


def test_what_is_no_database_is_one_line(tmp_path):
    result = run(tmp_path, "--out", tmp_path / "report")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ") and "no region database" in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "report").exists()


def test_help_shows_an_example():
    result = run("--help")
    assert result.exit_code == 0 and "uniter-view out.lmdb --images photos/ --out report/" in result.output


@pytest.fixture
def run_directory(tmp_path):
    import torch

    from uniter.model import UniterConfig, UniterForPretraining
    from uniter.model.checkpoints.write import save_checkpoint

    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "log.jsonl").write_text('{"step": 1, "kind": "train", "loss": 2.0}\n')
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    save_checkpoint(folder / "checkpoints/latest", UniterForPretraining(UniterConfig(**sizes, image_feature_size=4, label_classes=3)))
    return folder


def test_what_words_look_at(tmp_path, database, run_directory):
    captions = [Caption("1", "cat.png", "A <b>cat</b>."), Caption("2", "dog.png", "A dog.")]
    build_text_db(captions, tmp_path / "captions.db", tokenizer=Tokenizer.load())
    result = run(run_directory, database, "--text", tmp_path / "captions.db", "--out", tmp_path / "looks", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["pairs"] == 2
    text = (tmp_path / "looks/index.html").read_text()
    assert "<b>" not in text and "match 0." in text and "transport plan" in text
    words = len(Tokenizer.load().encode("A <b>cat</b>.")) + 2
    assert len(list((tmp_path / "looks/pictures").glob("000-*.jpg"))) == 2 * words
    one = run(run_directory, database, "--text", tmp_path / "captions.db", "--out", tmp_path / "looks", "--key", "dog", "--json")
    assert json.loads(one.stdout)["pairs"] == 1 and "2 with dog" in (tmp_path / "looks/index.html").read_text()


@pytest.mark.parametrize("published", [False, True])
def test_a_key_without_a_text_is_one_line(tmp_path, database, run_directory, published):
    build_text_db([Caption("1", "cat.png", "A cat.")], tmp_path / "captions.db", tokenizer=Tokenizer.load())
    if published:
        for name in ("settings.json", "header.json", "index.safetensors"):
            (tmp_path / "captions.db" / name).unlink()
    result = run(run_directory, database, "--text", tmp_path / "captions.db", "--out", tmp_path / "looks", "--key", "dog")
    assert result.exit_code == 1 and "no text of the database is about an image 'dog'" in result.stderr


@pytest.fixture
def animals(tmp_path):
    store = UnitStore(tmp_path / "animals.lmdb", settings={})
    boxes = np.array([[1, 2, 30, 20], [5, 5, 39, 29]], np.float32)
    with store.unit(0) as unit:
        for number in range(3):
            sure = 0.5 + 0.1 * number
            record = RegionFeatures(
                features=np.ones((2, 4), np.float32),
                norm_bb=normalised_boxes(boxes, (30, 40)),
                conf=np.array([sure, 0.3], np.float32),
                boxes=boxes,
                size=(30, 40),
                soft_labels=np.array([[0.1, sure, 0.0], [0.1, 0.1, 0.8]], np.float32),
            )
            unit.put(f"photo {number}", encode_record(record), regions=2)
        unit.commit()
        unit.complete()
    assert store.finish(units=1, header={"class_names": ["dog", "cat"]})
    return tmp_path / "animals.lmdb"


def test_all_regions_of_one_class_on_one_page_the_surest_first(tmp_path, animals):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(3):
        Image.new("RGB", (40, 30), (80 * number, 0, 0)).save(photos / f"photo {number}.png")
    result = run(animals, "--class", "DOG", "--images", photos, "--out", tmp_path / "dogs", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) | {"page": None} == {
        "page": None, "class": "dog", "found": 3, "images": 3, "shown": 3, "unreadable": 0,
    }  # fmt: skip
    page = (tmp_path / "dogs" / "index.html").read_text()
    places = [page.index(f"{sure} dog") for sure in ("0.700", "0.600", "0.500")]
    assert places == sorted(places) and "3 regions of dog in 3 images, the surest first" in page and " cat" not in page
    assert len(list((tmp_path / "dogs" / "pictures").iterdir())) == 3
    result = run(animals, "--class", "cat", "--limit", 2, "--out", tmp_path / "dogs", "--json")
    assert (json.loads(result.stdout)["found"], json.loads(result.stdout)["shown"]) == (3, 2)
    assert "here are the 2 surest" in (tmp_path / "dogs" / "index.html").read_text()
    assert len(list((tmp_path / "dogs" / "pictures").iterdir())) == 2  # those of the earlier page are gone


def test_a_class_that_nothing_has_is_answered_with_near_ones(tmp_path, animals, database):
    result = run(animals, "--class", "dgo", "--out", tmp_path / "page")
    assert result.exit_code == 2 and "unknown class 'dgo'; did you mean 'dog'? (known: cat, dog)" in result.stderr
    assert not (tmp_path / "page").exists()
    result = run(database, "--class", "dog", "--out", tmp_path / "page")
    assert result.exit_code == 1 and "have no classes" in result.stderr
    result = run(animals, "--class", "dog", "--boxes", "3", "--out", tmp_path / "page")
    assert result.exit_code == 2 and "--boxes makes no difference to the page of one class" in result.stderr


@pytest.mark.parametrize("there", [True, False])
def test_the_page_is_opened_or_it_is_said_where_it_is(tmp_path, database, monkeypatch, there):
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda address: opened.append(address) or there)
    result = run(database, "--out", tmp_path / "a report", "--open", "--json")
    page = tmp_path / "a report" / "index.html"
    assert result.exit_code == 0 and opened == [page.as_uri()] and json.loads(result.stdout)["pictures"] == 2
    assert ("no browser could be opened here" in result.stderr and str(page) in result.stderr) != there
