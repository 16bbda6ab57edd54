"""What a run sees to before its first update: data, words, positions and attention that fit."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from uniter.datasets.batches.corpus import open_corpus
from uniter.datasets.errors import BadInput
from uniter.datasets.runs.run_log import read_log
from uniter.datasets.runs.step_folders import checkpoint_steps
from uniter.datasets.text_db.tokenizer import Tokenizer
from uniter.model import UniterConfig, UniterForPretraining
from uniter.model.checkpoints.beside import tokenizer_beside
from uniter.model.checkpoints.export import export_run
from uniter.model.evaluation.pretrained import evaluate_run
from uniter.model.settings.settings import TrainSettings
from uniter.model.train.defaults import size_of
from uniter.model.train.fit import regions_of_run, that_fit
from uniter.model.train.pretraining import pretrain
from uniter.model.train.work import Data

Make = Callable[..., TrainSettings]


@pytest.fixture(scope="module")
def other_words(tmp_path_factory: pytest.TempPathFactory, made_up: Any) -> tuple[Path, Path]:
    """Databases of the same detector whose word pieces mean other words."""
    pieces = made_up.vocabulary().vocabulary
    turned = Tokenizer([*pieces[:40], *reversed(pieces[40:])], name="turned", lowercase=False)
    return made_up.World(width=16).write(tmp_path_factory.mktemp("other words"), pictures=20, seed=2, tokenizer=turned)


def test_vocabulary_size_and_regions_are_told_by_checkpoints_and_exports(small: Make, tmp_path: Path, made_up: Any) -> None:
    pretrain(small(steps=2, validate_every=2), tmp_path / "run")
    export_run(str(tmp_path / "run"), "hub", tmp_path / "hub")
    assert export_run(str(tmp_path / "run"), "published", tmp_path / "toy.pt")["vocabulary"] == made_up.vocabulary().name
    run, checkpoint = (regions_of_run(str(tmp_path / place)) for place in ("run", "run/checkpoints/step-2"))
    assert run == checkpoint and run[0]["num_bb"] == 36 and regions_of_run(str(tmp_path / "toy.pt")) == []
    assert size_of(str(tmp_path / "toy.pt")) == size_of(str(tmp_path / "run")) == "tiny"
    for weights in ("run/checkpoints/latest/model.safetensors", "hub/model.safetensors", "toy.pt"):
        found = tokenizer_beside(tmp_path / weights)
        assert found is not None and found.vocabulary == made_up.vocabulary().vocabulary


def test_texts_of_other_words_are_refused(
    small: Make, tmp_path: Path, databases: tuple[Path, Path], other_words: tuple[Path, Path]
) -> None:
    pairs = {"a": databases, "b": other_words}
    corpora = [{"name": name, "text": [str(texts)], "images": [str(images)]} for name, (texts, images) in pairs.items()]
    with pytest.raises(BadInput, match=r"texts.db has other word pieces \(turned, \d+\) than|than .* \(turned, "):
        pretrain(small(corpora=corpora), tmp_path / "both")
    pretrain(small(steps=2, validate_every=2), tmp_path / "run")
    later = small(corpora=corpora[1:], steps=2, validate_every=2, model={}, **{"from": str(tmp_path / "run")})
    with pytest.raises(BadInput, match=r"build the texts with one tokeniser: uniter-build-db --tokenizer .*run/checkpoints/latest"):
        pretrain(later, tmp_path / "later")
    with pytest.raises(BadInput, match="other word pieces"):
        evaluate_run(str(tmp_path / "run"), text=[str(other_words[0])], images=[str(other_words[1])])
    assert not (tmp_path / "both" / "checkpoints").exists()


def test_texts_longer_than_the_positions_are_said_before_the_run(
    small: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture, databases: tuple[Path, Path]
) -> None:
    sizes = small().model.model_dump(exclude_none=True) | {"max_position_embeddings": 10}
    with pytest.raises(
        BadInput, match=r"a text of \d+ word pieces does not fit the model's 10 positions; set max_text_length to 8 or less"
    ):
        pretrain(small(model=sizes), tmp_path / "long")
    texts, images = databases
    corpus = {"name": "toy", "text": [str(texts)], "images": [str(images)], "validation_text": [str(texts)]}
    # What was refused is no run: the same folder takes the mended command.
    pretrain(small(model=sizes, corpora=[corpus], max_text_length=8, steps=1, validate_every=1), tmp_path / "long")
    assert "validation texts are longer than the model's positions and left out" in caplog.text
    with pytest.raises(BadInput, match="all validation texts are longer than the model's 4 positions; give shorter ones"):
        that_fit(
            Data({}, {"toy": open_corpus("toy", [texts], [images])}, {}),
            UniterForPretraining(UniterConfig.preset("tiny", max_position_embeddings=4)),
        )


def test_the_kernel_of_attention_is_a_setting_of_a_gpu(small: Make, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="attention: flash is a kernel of GPUs, and this run is on cpu; leave attention out"):
        pretrain(small(attention="flash", precision="bf16"), tmp_path / "flash")


def test_what_is_trained_is_said(small: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        pretrain(small(steps=1, validate_every=1), tmp_path / "run")
    assert "corpus toy: 76 examples, 4 held out for validation; tasks itm 2, mlm 2, mrfr 1, mrc-kl 1" in caplog.text
    assert "million parameters on cpu x 1, fp32; 1 updates of 2 x 1 micro-batches of 150 tokens" in caplog.text


@pytest.mark.parametrize("look_every", [1, 3, 20])
def test_patience_ends_a_run_behind_its_best_validation_and_repeating_it_too(
    small: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, look_every: int
) -> None:
    """Validations get worse from the second on: the run ends two of them behind it, and its repetition has nothing to do; however often
    the losses are looked at."""
    losses = iter([3.0, 2.0, 2.5, 2.6, 1.0, 0.5])
    monkeypatch.setattr("uniter.model.train.loop._validate_all", lambda learner, recipe, processes: {"mlm_toy": {"loss": next(losses)}})
    asked = {"steps": 12, "validate_every": 2, "checkpoint_every": 50, "patience": 2, "look_every": look_every}
    summary = pretrain(small(**asked), tmp_path / "run")
    assert summary["steps"] == 8 and summary["of_steps"] == 12 and summary["best"] == 4
    assert checkpoint_steps(tmp_path / "run") == [4, 8], "the last update has a checkpoint, and so has the best"
    again = pretrain(small(**asked), tmp_path / "run")
    assert again["steps"] == 8 and again["best"] == 4 and len(read_log(tmp_path / "run")) == 8 + 4
    longer = pretrain(small(**{**asked, "patience": 3}), tmp_path / "run")
    assert longer["steps"] == 12 and "best" not in longer, "more patience goes on"
