"""The figures: deterministic, right at the known ends, and moved by learning."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from uniter.datasets import progress
from uniter.datasets.batches.corpus import Corpus, open_corpus
from uniter.datasets.batches.example import Masking
from uniter.datasets.errors import BadInput
from uniter.model import UniterConfig, UniterForPretraining, load_uniter
from uniter.model.evaluation import pretrained as evaluate
from uniter.model.evaluation.pretrained import _Run, evaluate_pretraining, evaluate_run, retrieval, retrieval_groups
from uniter.model.settings.settings import TrainSettings
from uniter.model.train.distributed import Processes
from uniter.model.train.pretraining import pretrain
from uniter.model.train.scoring import Means, Scoring

ALONE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory, made_up: Any) -> tuple[Path, Path]:
    return made_up.World(width=16).write(tmp_path_factory.mktemp("held-out"), pictures=30, captions=2, seed=9)


@pytest.fixture(scope="module")
def corpus(held_out: tuple[Path, Path]) -> Corpus:
    return open_corpus("toy", [held_out[0]], [held_out[1]])


@pytest.fixture
def model(corpus: Corpus) -> UniterForPretraining:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64, "image_feature_size": 16, "label_classes": 9}
    return UniterForPretraining(UniterConfig.preset("tiny", vocab_size=corpus.texts[0].v_range[1], **sizes))


def test_figures_are_a_function_of_the_seed(
    model: UniterForPretraining, corpus: Corpus, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluate, "ENOUGH_WORDS", 120)
    monkeypatch.setattr(progress, "LINE_EVERY_SECONDS", 0.0)

    def figures(seed: int, budget: int) -> dict[str, float]:
        return evaluate_pretraining(model, corpus, processes=ALONE, budget=budget, seed=seed, candidates=10, words=range(20, 400))

    first = figures(1, 300)
    told = capsys.readouterr().err.splitlines()[-1]
    done, of_total = re.match(r"evaluating: ([\d,]+) of ([\d,]+) examples", told).groups()
    assert done == of_total  # neither more nor less than was said beforehand
    assert {
        "mlm.accuracy", "mlm.accuracy_other_picture", "itm.accuracy", "mrc-kl.kl", "mrc-kl.kl_of_mean", "mrc-kl.entropy", "mrfr.mse",
        "retrieval.text_r1", "retrieval.image_r1", "retrieval.candidates", "mlm.words_accuracy",
    } <= first.keys()  # fmt: skip
    assert figures(1, 300) == first
    assert figures(2, 300)["mlm.masked_words"] != first["mlm.masked_words"]
    # Another budget makes other batches, but the same masks and pairs for the masked tasks.
    other = figures(1, 999)
    for name in ("mlm.accuracy", "mlm.accuracy_other_picture", "mlm.masked_words", "retrieval.text_r1"):
        assert other[name] == pytest.approx(first[name], abs=1e-9), name
    assert model.training


def test_the_mean_is_measured_as_by_hand(model: UniterForPretraining, corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that always answers the mean distribution or feature has the divergence and error "of the mean"."""
    figures = evaluate_pretraining(model, corpus, processes=ALONE, budget=500, masking=Masking(regions=0.999), candidates=2)
    keys = [corpus.images.keys_list[row] for row in corpus.image_rows_NK[:, 0]]
    labels = np.concatenate([corpus.images[key].soft_labels for key in keys]).astype(np.float64)
    features = np.concatenate([corpus.images[key].features for key in keys]).astype(np.float64)
    mean = labels.mean(axis=0)
    assert figures["mrc-kl.kl_of_mean"] == pytest.approx((labels * (np.log(labels) - np.log(mean))).sum(axis=1).mean(), rel=0.02)
    assert figures["mrc-kl.entropy"] == pytest.approx(-(labels * np.log(labels)).sum(axis=1).mean(), rel=0.02)
    assert figures["mrfr.mse_of_mean"] == pytest.approx(features.var(axis=0).mean(), rel=0.02)


def test_retrieval_counts_ranks_and_ties_against_us(model: UniterForPretraining, corpus: Corpus) -> None:
    run = _Run(Scoring(model, ALONE, 500, 0, by_example=True), corpus)
    with torch.no_grad():
        model.itm_output.weight.zero_()
        model.itm_output.bias.zero_()
    same_for_all = retrieval(run, retrieval_groups(corpus, candidates=10, seed=0))
    assert same_for_all["retrieval.text_r1"] == same_for_all["retrieval.image_r1"] == same_for_all["retrieval.text_r5"] == 0
    assert same_for_all["retrieval.text_r10"] == 1
    assert same_for_all["retrieval.candidates"] == 10 and same_for_all["retrieval.groups"] == 3


def test_groups_hold_different_pictures_and_texts(corpus: Corpus) -> None:
    for group in retrieval_groups(corpus, candidates=8, seed=2):
        assert len(set(corpus.image_rows_NK[group, 0].tolist())) == 8
        assert len({tuple(corpus.record(int(example))["input_ids"]) for example in group}) == 8
    assert len(retrieval_groups(corpus, candidates=500, seed=2)) == 1
    with pytest.raises(BadInput, match="at least 2 candidates"):
        retrieval_groups(corpus, candidates=1, seed=2)


def test_means_of_what_was_never_counted_are_absent() -> None:
    means = Means()
    means.add("never", 0.0, 0)
    means.add("twice", 3.0, 1)
    means.add("twice", 1.0, 1)
    assert means.means() == {"twice": 2.0}


def test_a_model_of_other_regions_or_words_is_refused(small: Callable[..., TrainSettings], tmp_path: Path, made_up: Any) -> None:
    pretrain(small(steps=1, validate_every=1, checkpoint_every=1), tmp_path / "run")
    texts, images = made_up.World(width=24).write(tmp_path / "other", pictures=4)
    with pytest.raises(BadInput, match=r"region features are 24 wide, but .* was trained on 16"):
        evaluate_run(str(tmp_path / "run"), text=[str(texts)], images=[str(images)])


def test_the_picture_matters_after_learning(
    small: Callable[..., TrainSettings], held_out: tuple[Path, Path], tmp_path: Path, made_up: Any
) -> None:
    """Masked words beside the right picture are guessed at least 10 points better than beside another one."""
    texts, images = made_up.World(width=16, noise=0.1).write(tmp_path / "world", pictures=300, captions=3, seed=1, regions=4)
    settings = small(
        corpora=[{"text": [str(texts)], "images": [str(images)], "tasks": {"mlm": 1}}],
        model={"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256, "initializer_range": 0.09},
        batch_tokens=600,
        accumulation=1,
        dropout=0.0,
        steps=350,
        validate_every=350,
        checkpoint_every=350,
        optimizer={"learning_rate": 7e-4},
    )
    pretrain(settings, tmp_path / "run")
    figures = evaluate_run(
        str(tmp_path / "run"),
        text=[str(held_out[0])],
        images=[str(held_out[1])],
        words=list(made_up.COLOURS + made_up.SHAPES),
        candidates=10,
    )
    mlm = figures["mlm"]
    assert mlm["accuracy"] > mlm["accuracy_other_picture"] + 0.1, figures
    assert mlm["words_accuracy"] > mlm["words_accuracy_other_picture"] + 0.2, figures
    assert load_uniter(tmp_path / "run").config.hidden_size == 128
