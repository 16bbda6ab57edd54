"""Laws of every row of the task table: its gradient reaches the encoder, it learns eight examples, perfect answers score 1."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from uniter.datasets.batches.collate import PackedBatch, collate
from uniter.datasets.batches.corpus import Corpus, open_corpus
from uniter.datasets.batches.example import Example, Masking
from uniter.datasets.errors import BadInput
from uniter.model import UniterConfig, UniterForPretraining, losses
from uniter.model.tasks.table import PRETRAINING, check_soft_labels, default_tasks, pretraining_task, task_name
from uniter.model.tasks.task import Task
from uniter.model.train.optim import AdamW, parameter_groups

EACH_TASK = pytest.mark.parametrize("task", PRETRAINING.values(), ids=list(PRETRAINING))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, made_up: Any) -> Corpus:
    texts, images = made_up.World(width=16).write(tmp_path_factory.mktemp("world"), pictures=12)
    return open_corpus("toy", [texts], [images])


def batch_of(task: Task, corpus: Corpus, *, count: int = 8) -> PackedBatch:
    rng = random.Random(0)
    own = corpus.image_rows_NK[:, 0].tolist()
    samples = []
    for number in range(count):
        matched = not task.shows_other_pictures or number % 2 == 0
        image = own[number] if matched else next(row for row in own if row != own[number])
        samples.append(task.sample(Example(corpus, number, (image,), matched), rng, Masking()))
    return collate(samples)


def model_of(corpus: Corpus) -> UniterForPretraining:
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "intermediate_size": 96, "image_feature_size": 16, "label_classes": 9}
    config = UniterConfig.preset(
        "tiny", vocab_size=corpus.texts[0].v_range[1], hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes
    )
    return UniterForPretraining(config)


@EACH_TASK
def test_its_gradient_reaches_the_whole_encoder(task: Task, corpus: Corpus) -> None:
    model, batch = model_of(corpus), batch_of(task, corpus)
    outputs = task.head(model, batch)
    losses.of(task.losses(outputs, batch.targets), weights=task.weights, reduction=task.reduction).number.backward()
    for name, parameter in model.uniter.named_parameters():
        if "pooler" in name or "mask_embedding" in name:
            continue  # read by some tasks only
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@EACH_TASK
def test_all_terms_have_a_row_for_each_thing_that_is_asked(task: Task, corpus: Corpus) -> None:
    model, batch = model_of(corpus), batch_of(task, corpus)
    outputs = task.head(model, batch)
    terms = task.losses(outputs, batch.targets)
    assert set(task.weights) <= set(terms)
    rows = {len(term) for term in terms.values()} | {len(values) for values in task.metric(outputs, batch.targets).values()}
    assert len(rows) == 1


@EACH_TASK
def test_it_learns_eight_examples(task: Task, corpus: Corpus) -> None:
    model, batch = model_of(corpus), batch_of(task, corpus)
    optimizer = AdamW(parameter_groups(model, weight_decay=0.0), lr=3e-3)

    def loss() -> torch.Tensor:
        return losses.of(task.losses(task.head(model, batch), batch.targets), weights=task.weights).number

    first = loss().item()
    for _ in range(120):
        optimizer.zero_grad()
        current = loss()
        current.backward()
        optimizer.step()
    assert loss().item() < 0.35 * first


def perfect_outputs(task: Task, batch: PackedBatch) -> dict[str, torch.Tensor]:
    """Scores that say exactly what is asked."""
    targets = batch.targets
    if "words" in targets:
        labels = targets["words"][targets["words"] >= 0]
        return {"scores": torch.nn.functional.one_hot(labels, 400).float() * 99}
    if "features" in targets:
        return {"scores": targets["features"].float()}
    if "soft_labels" in targets:
        return {"scores": targets["soft_labels"].float().clamp(min=1e-30).log()}
    return {"scores": torch.nn.functional.one_hot(targets["matched"], 2).float() * 99}


@EACH_TASK
def test_perfect_answers_score_one(task: Task, corpus: Corpus) -> None:
    batch = batch_of(task, corpus)
    if task is PRETRAINING["mrc"]:
        # The background is never asked for.
        scores = batch.targets["soft_labels"].float().clone()
        scores[:, 0] = -1
        outputs = {"scores": scores}
    else:
        outputs = perfect_outputs(task, batch)
    best = {"accuracy": 1.0, "mse": 0.0, "kl": 0.0}
    for name, values in task.metric(outputs, batch.targets).items():
        assert values.mean().item() == pytest.approx(best[name], abs=2e-3), name


def test_names_and_defaults() -> None:
    assert task_name("mrckl") == "mrc-kl"
    with pytest.raises(BadInput, match=r"unknown task 'mlmm'; did you mean 'mlm'\?"):
        task_name("mlmm")
    assert default_tasks(has_soft_labels=True) == {"itm": 2, "mlm": 2, "mrfr": 1, "mrc-kl": 1}
    assert default_tasks(has_soft_labels=False) == {"itm": 2, "mlm": 2, "mrfr": 1}
    check_soft_labels(["mlm", "itm"], "x", has_soft_labels=False)
    with pytest.raises(BadInput, match="corpus 'x': task mrc, mrckl needs the detector's soft labels"):
        check_soft_labels(["mrc", "mrckl"], "x", has_soft_labels=False)


def test_without_alignment_no_transport_is_computed(corpus: Corpus) -> None:
    model, batch = model_of(corpus), batch_of(PRETRAINING["itm"], corpus)
    plain, aligned = (pretraining_task("itm", alignment_weight=weight) for weight in (0.0, 0.3))
    assert set(plain.head(model, batch)) == {"scores"}
    assert set(aligned.losses(aligned.head(model, batch), batch.targets)) == {"cross_entropy", "transport"}
    assert aligned.weights == {"transport": 0.3}


def test_a_damaged_picture_is_named(tmp_path: Path, made_up: Any) -> None:
    corpus = open_corpus("x", *([path] for path in made_up.World(width=16).write(tmp_path, pictures=3)))
    data = tmp_path / "regions.lmdb" / "data.mdb"
    content = bytearray(data.read_bytes())
    place = content.find(b"features")
    assert place > 0
    for found in range(len(content) - 8):
        if content[found : found + 8] == b"features":
            content[found : found + 8] = b"f\xff\xff\xff\xff\xff\xffs"
    data.write_bytes(bytes(content))
    corpus = open_corpus("x", [tmp_path / "texts.db"], [tmp_path / "regions.lmdb"])
    with pytest.raises(BadInput, match="scene_1_0000"):
        batch_of(PRETRAINING["mlm"], corpus, count=2)
