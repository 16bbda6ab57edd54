"""`uniter-train predict match|answer|ground|rank`: from files to printed answers, in one process."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from uniter.cli.train import main
from uniter.datasets import progress
from uniter.datasets.text_db.vocabulary_files import SPECIALS
from uniter.extract.detector.preparation import CaffePreparation
from uniter.extract.detector.protocol import PreparedImage, RawRegions
from uniter.model import UniterConfig, UniterForPretraining
from uniter.model.checkpoints.write import save_checkpoint
from uniter.model.heads.downstream import UniterForReferring, UniterForVqa

WORDS = (*SPECIALS, "!", "a", "the", "red", "blue", "square", "what", "color", "?")


class QuarterDetector:
    """Finds the four quarters of every photograph; a feature is a quarter's mean colour."""

    name, feature_width, class_names, attribute_names, min_boxes, max_boxes = "quarters", 3, ("quarter",), (), 4, 4
    device = "cpu"
    preparation = CaffePreparation(shortest=24, longest=40)
    device = "cpu"
    shown = 0

    def settings(self) -> dict[str, Any]:
        return {"name": self.name, "weights": {"sha256": "0"}}

    def prepare(self, image: np.ndarray) -> PreparedImage:
        return PreparedImage(image, (1.0, 1.0), (image.shape[0], image.shape[1]))

    def detect(self, images: list[PreparedImage], *, boxes: Any = None) -> list[RawRegions]:
        type(self).shown += len(images)
        found = []
        for image in images:
            height, width = image.size
            corners = [(x, y, x + width // 2, y + height // 2) for y in (0, height // 2) for x in (0, width // 2)]
            features = np.array([image.pixels[y0:y1, x0:x1].mean(axis=(0, 1)) / 255 for x0, y0, x1, y1 in corners], dtype=np.float32)
            chances = np.array([[0.1 + 0.1 * row, 0.9 - 0.1 * row] for row in range(4)], dtype=np.float32)
            found.append(RawRegions(np.array(corners, dtype=np.float32), features, chances))
        return found


@pytest.fixture(autouse=True)
def quarters(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[QuarterDetector]:
    """The commands' detector and cache, whatever they are told."""
    QuarterDetector.shown = 0
    monkeypatch.setattr("uniter.extract.install.require_detectron2", lambda: None)
    monkeypatch.setattr("uniter.extract.on_demand.build_detector", lambda name, *, weights, device: QuarterDetector())
    monkeypatch.setenv("UNITER_CACHE", str(tmp_path / "cache"))
    return QuarterDetector


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    sizes = {"vocab_size": len(WORDS), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = UniterConfig(**sizes, image_feature_size=3, label_classes=2, initializer_range=0.2)
    models = {"run": UniterForPretraining(config), "vqa": UniterForVqa(config, answers=2), "refcoco": UniterForReferring(config)}
    for name, model in models.items():
        save_checkpoint(folder / name, model, about={"answers": ["blue", "red"]} if name == "vqa" else {})
        (folder / name / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return {name: folder / name for name in models}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        cv2.imwrite(str(tmp_path / "photos" / f"{number}.png"), cv2.resize(pixels, (60, 48), interpolation=cv2.INTER_NEAREST))
    return tmp_path / "photos"


def predict(*words: object) -> Result:
    return CliRunner().invoke(main, ["predict", *map(str, words), "--device", "cpu"])


def answers(*words: object) -> list[dict[str, Any]]:
    result = predict(*words, "--json")
    assert result.exit_code == 0, result.stderr
    found: list[dict[str, Any]] = json.loads(result.stdout)["answers"]
    return found


def test_the_four_questions_from_photograph_to_answer(runs: dict[str, Path], photos: Path, quarters: type[QuarterDetector]) -> None:
    (matched,) = answers("match", "--from", runs["run"], "--image", photos / "0.png", "--text", "a red square")
    assert 0 < matched["probability"] < 1 and matched["from"] == str(runs["run"])
    (answered,) = answers("answer", "--from", runs["vqa"], "--image", photos / "0.png", "--text", "what color ?")
    assert answered["answer"] in ("blue", "red") and answered["best"][0]["answer"] == answered["answer"]
    (pointed,) = answers("ground", "--from", runs["refcoco"], "--image", photos / "0.png", "--text", "the red square")
    assert not pointed["zero_shot"] and pointed["box"] in ([0, 0, 30, 24], [30, 0, 60, 24], [0, 24, 30, 48], [30, 24, 60, 48])
    (ranked,) = answers("rank", "--from", runs["run"], "--image", photos, "--text", "a red square")
    assert {Path(row["image"]).name for row in ranked["ranking"]} == {"0.png", "1.png", "2.png"}
    chances = [row["probability"] for row in ranked["ranking"]]
    assert chances == sorted(chances, reverse=True)
    assert quarters.shown == 3  # what was detected is kept in the cache folder


def test_it_says_how_far_it_is_beside_the_answers(runs: dict[str, Path], photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_SECONDS", 0.0)
    for question, done in (("rank", "ranking: 3 of 3 photographs"), ("match", "asking: 3 of 3 pairs")):
        result = predict(question, "--from", runs["run"], "--image", photos, "--text", "a red square", "--json")
        assert result.exit_code == 0 and json.loads(result.stdout) and done in result.stderr
        assert ("regions: 3 of 3 photographs" in result.stderr) == (question == "rank")  # afterwards they are kept


def test_every_text_is_asked_of_every_photograph(runs: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    found = answers(
        "match", "--from", runs["run"], "--image", photos, "--text", "a red square", "--text", "a blue square", "--out", tmp_path / "pages"
    )
    assert [(Path(one["image"]).name, one["text"]) for one in found] == [
        (f"{number}.png", text) for number in range(3) for text in ("a red square", "a blue square")
    ]
    pages = [f"{number}.match{again}.jpg" for number in range(3) for again in ("", "-2")]
    assert [Path(one["page"]).name for one in found] == pages and {page.name for page in (tmp_path / "pages").iterdir()} == {*pages}


def test_pages_are_called_after_their_photographs_and_never_take_a_picture_of_somebody_elses(
    runs: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    odd = tmp_path / "odd"
    odd.mkdir()
    names = ("Dog.png", "dog.jpg", "a dog & a cat ☂.png", "☂.png")
    for number, name in enumerate(names):
        Image.new("RGB", (40, 30), (40 * number, 0, 0)).save(odd / name)
    pages = tmp_path / "pages"
    pages.mkdir()
    Image.new("RGB", (4, 3)).save(pages / "dog.match.jpg")
    mine = (pages / "dog.match.jpg").read_bytes()
    asked = ("match", "--from", runs["run"], "--image", odd, "--text", "a red square", "--out", pages)
    for _ in range(2):  # the second time its own pages are written over, and no others come
        drawn = {Path(one["image"]).name: Path(one["page"]).name for one in answers(*asked)}
        assert drawn["a dog & a cat ☂.png"] == "a_dog_a_cat_.match.jpg" and drawn["☂.png"] == "_.match.jpg"
        assert len({name.casefold() for name in drawn.values()}) == 4
        assert {path.name for path in pages.iterdir()} == {*drawn.values(), "dog.match.jpg"} and "dog.match.jpg" not in drawn.values()
    assert (pages / "dog.match.jpg").read_bytes() == mine


def test_a_picture_of_the_answer_and_lines_to_read(runs: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    result = predict(
        "ground", "--from", runs["run"], "--image", photos / "1.png", "--text", "the red square", "--out", tmp_path / "page.png"
    )
    assert result.exit_code == 0, result.stderr
    assert "1.png: the red square: region" in result.stdout and "no model was trained to point" in result.stdout
    assert Image.open(tmp_path / "page.png").width >= 900
    result = predict("rank", "--from", runs["run"], "--image", photos, "--text", "a red square")
    assert result.stdout.splitlines()[0] == "a red square" and len(result.stdout.splitlines()) == 4


def test_the_cache_is_where_it_is_told_or_nowhere(
    runs: dict[str, Path], photos: Path, tmp_path: Path, quarters: type[QuarterDetector]
) -> None:
    asked = ("match", "--from", runs["run"], "--image", photos / "0.png", "--text", "a square")
    for _ in range(2):
        answers(*asked, "--cache", tmp_path / "kept")
    assert quarters.shown == 1 and any((tmp_path / "kept").iterdir())
    for _ in range(2):
        answers(*asked, "--no-cache")
    assert quarters.shown == 3 and not (tmp_path / "cache").exists()
    assert predict(*asked, "--no-cache", "--cache", tmp_path / "kept").exit_code == 2


def test_what_cannot_be_is_said_in_one_line(runs: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    def said(*words: object, code: int = 1) -> str:
        result = predict(*words)
        assert result.exit_code == code and not result.stdout, result.output
        *notes, line = result.stderr.strip().splitlines()
        assert all("does not say of which detector" in note for note in notes)
        return line

    photo = ("--image", photos / "0.png", "--text", "a square")
    assert "takes a model that was trained for it" in said("answer", "--from", runs["run"], *photo)
    assert "expected the name of a picture" in said("match", "--from", runs["run"], *photo, "--out", tmp_path / "page.txt", code=2)
    (tmp_path / "page.jpg").write_text("")
    assert "give a folder" in said("match", "--from", runs["run"], *photo, "--text", "another", "--out", tmp_path / "page.jpg", code=2)
    assert "none.png: No such file" in said("match", "--from", runs["run"], "--image", tmp_path / "none.png", "--text", "a square")


def test_other_words_are_tasks(runs: dict[str, Path]) -> None:
    help_of_all = CliRunner().invoke(main, ["predict", "--help"]).stdout
    assert all(f"  {name} " in help_of_all for name in ("match", "answer", "ground", "rank", "vqa", "retrieval"))
    assert "Example:" in CliRunner().invoke(main, ["predict", "match", "--help"]).stdout
    for words in (("vqa", "--from", "run/"), ("--from", "run/", "vqa")):
        assert "Missing option '--out'" in CliRunner().invoke(main, ["predict", *words]).stderr
    unknown = CliRunner().invoke(main, ["predict", "vqaa", "--from", "run/", "--out", "x.json", "--text", "t", "--images", "i"])
    assert unknown.exit_code == 2 and "did you mean 'vqa'" in unknown.stderr


@pytest.mark.parametrize("several", [False, True])
def test_a_page_is_not_drawn_over_a_photograph(several: bool, tmp_path: Path) -> None:
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    for name in ("000.jpg", "001.jpg") if several else ("000.jpg",):
        Image.new("RGB", (40, 30), "red").save(photographs / name)
    before = {path.name: path.read_bytes() for path in photographs.iterdir()}
    image, out = (photographs, photographs) if several else (photographs / "000.jpg", photographs / ".." / "photographs" / "000.jpg")
    words = ["--from", tmp_path, "--image", image, "--text", "a red square", "--out", out]
    result = CliRunner().invoke(main, ["predict", "match", *map(str, words)])
    assert result.exit_code == 1 and "would be written over" in result.stderr, result.output
    assert {path.name: path.read_bytes() for path in photographs.iterdir()} == before
