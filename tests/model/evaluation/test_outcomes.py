"""What a model got right and wrong, example by example: the same as its figures say, and a page that shows it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from uniter.cli.view import main as view
from uniter.datasets.batches.corpus import open_corpus
from uniter.datasets.errors import BadInput
from uniter.model import UniterConfig
from uniter.model.checkpoints.write import save_checkpoint
from uniter.model.evaluation.finetuned import evaluate_finetuned
from uniter.model.evaluation.outcomes import outcomes_of, task_of
from uniter.model.settings.settings import TrainSettings
from uniter.model.tasks.judging import Judged, calibration, calibration_error
from uniter.model.tasks.table import DOWNSTREAM
from uniter.model.tasks.task import extras
from uniter.model.train.finetuning import finetune

Make = Callable[..., TrainSettings]
FIGURE = {"vcr": "qa", "flickr30k-entities": "r1"}
ROWS = [name for name, row in DOWNSTREAM.items() if extras(row).judge is not None and extras(row).texts[0] == name]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, made_up: Any) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("outcomes")
    scenes = made_up.World(width=16, noise=0.1)
    _, images = scenes.write(folder, pictures=24, captions=1)
    _, found = scenes.write(folder / "found", pictures=24, captions=1, prefix="found_scene")
    texts = {name: scenes.write_task(folder, name, count=60) for name in (*ROWS, "retrieval")}
    return {"images": images, "found": found, **texts}


def images_of(name: str, world: dict[str, Path]) -> str:
    return f"{world['images']};{world['found']}" if name == "vcr" else str(world["images"])


@pytest.mark.parametrize("name", ROWS)
def test_what_is_right_adds_up_to_the_accuracy(name: str, world: dict[str, Path], tmp_path: Path) -> None:
    corpus = open_corpus(name, [world[name]], [images_of(name, world)], max_text_length=-1)
    row = DOWNSTREAM[name].of_data(DOWNSTREAM[name], corpus)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64, "initializer_range": 0.3, "image_feature_size": 16}
    model = extras(row).model(UniterConfig.preset("tiny", vocab_size=corpus.texts[0].v_range[1], **sizes), **extras(row).sizes)
    table = world[name] / "ans2label.json"
    answers: dict[str, Any] = {}
    if table.exists():
        numbers = json.loads(table.read_text())
        answers = {"answers": sorted(numbers, key=numbers.__getitem__)}
    save_checkpoint(tmp_path / "model", model, about={"task": name, **answers})
    asked: dict[str, Any] = {"text": [str(world[name])], "images": [images_of(name, world)], "device": "cpu"}
    assert task_of(str(tmp_path / "model")) == name
    found = outcomes_of(name, str(tmp_path / "model"), **asked)
    figures = evaluate_finetuned(name, str(tmp_path / "model"), **asked)
    right = [one.judged.right for one in found.outcomes]
    assert np.mean(right) == pytest.approx(figures[FIGURE.get(name, "accuracy")]) and len(right) == figures["examples"] == 60
    assert all(0 <= one.judged.confidence <= 1 and one.judged.surprise >= 0 for one in found.outcomes if one.judged.confidence is not None)
    assert sum(count for _, _, count in found.cells) == 60 and sum(found.pairs().values()) == (0 if found.points else 60)
    hardest = found.hardest(5)
    assert [one.judged.surprise for one in hardest] == sorted((one.judged.surprise for one in found.outcomes), reverse=True)[:5]
    if answers:
        assert {one.truth for one in found.outcomes} <= set(answers["answers"])
    picture = found.keys_of(hardest[0])[0]
    assert all(picture in found.keys_of(one) for one in found.hardest(60, [picture]))


def test_calibration_by_hand() -> None:
    said = [(0.95, 1.0), (0.91, 0.0), (0.3, 0.0), (1.0, 1.0)]
    cells = calibration([Judged((0.0,), (0.0,), right, sure, 0.0) for sure, right in said])
    assert [count for _, _, count in cells] == [1, 3]
    assert cells[0][:2] == (0.3, 0.0) and cells[1][:2] == pytest.approx((2.86 / 3, 2 / 3))
    assert calibration_error(cells) == pytest.approx((0.3 * 1 + (2.86 / 3 - 2 / 3) * 3) / 4)


@pytest.mark.parametrize("name", ["nlvr2", "refcoco", "classify"])
def test_the_page_of_a_fine_tuned_run(name: str, world: dict[str, Path], small: Make, tmp_path: Path) -> None:
    corpora = [{"name": "toy", "text": [str(world[name])], "images": [str(world["images"])]}]
    finetune(small(corpora=corpora, task=name, steps=1, validate_every=1), tmp_path / "run")
    words = [tmp_path / "run", world["images"], "--text", world[name], "--out", tmp_path / "page", "--pairs", 3, "--json"]
    result = CliRunner().invoke(view, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["pairs"] == 3
    page = (tmp_path / "page" / "index.html").read_text()
    assert f"<h2>{name} on {name}.db</h2>" in page and "Hardest examples" in page and "expected calibration error" in page
    assert ("<h2>Confusion</h2>" in page) == (name != "refcoco")
    pictures = sorted(path.name for path in (tmp_path / "page" / "pictures").iterdir())
    sides = 2 if name == "nlvr2" else 1
    assert pictures == [f"{place:03d}-{side}-000.jpg" for place in range(3) for side in range(sides)]
    assert all(page.count(picture) == 2 for picture in pictures), "shown, and a link to itself"
    assert page.index("train loss") > page.index("Hardest examples"), "the curves follow"


def test_a_task_without_single_answers_is_refused(world: dict[str, Path], small: Make, tmp_path: Path) -> None:
    corpora = [{"name": "toy", "text": [str(world["retrieval"])], "images": [str(world["images"])]}]
    finetune(small(corpora=corpora, task="retrieval", steps=1, validate_every=1), tmp_path / "run")
    with pytest.raises(BadInput, match="which ranks and gives no single answers"):
        outcomes_of("retrieval", str(tmp_path / "run"), text=[str(world["retrieval"])], images=[str(world["images"])], device="cpu")
