"""Filled batches: equal to the unfilled ones, and one graph a task without a break."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from uniter.datasets.batches.collate import PackedBatch
from uniter.datasets.batches.filling import Room, fill, only_real
from uniter.model import losses
from uniter.model.settings.settings import AdversarialSettings
from uniter.model.tasks.compiling import compiled_head
from uniter.model.tasks.table import DOWNSTREAM, PRETRAINING
from uniter.model.train.adversarial import forward_backward, with_divergence
from uniter.model.uniter import set_dropout

EVERY_ROW = [name for name, row in (PRETRAINING | DOWNSTREAM).items() if row.compiles]
BATCHES = 20


def room(name: str) -> Room:
    return Room(rows=2048 if name == "vcr" else 512, sequences=64, hidden=64, longest_text=48, most_regions=32)


def learned(task: Any, model: Any, batch: PackedBatch, head: Any) -> dict[str, torch.Tensor]:
    """Loss, terms, metrics and gradients of a batch."""
    model.zero_grad()
    outputs, targets = only_real(head(model, batch), batch)
    terms = task.losses(outputs, targets)
    number = losses.of(terms, weights=task.weights, reduction=task.reduction).number
    number.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"number": number.detach(), **task.metric(outputs, targets), **gradients}


def agree(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], *, limit: float = 1e-5) -> None:
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():
        torch.testing.assert_close(values, theirs[name], atol=limit, rtol=limit, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", EVERY_ROW)
def test_ghosts_change_nothing(name: str, row_case: Any) -> None:
    task, model, batch = row_case(name)
    set_dropout(model, 0.0)
    filled = fill(batch, room(name))
    assert (filled.tokens, len(filled)) == (batch.tokens, len(batch)) and filled.rows > batch.rows == batch.tokens
    agree(learned(task, model, filled, task.head), learned(task, model, batch, task.head))


BOTH = AdversarialSettings(steps=3, rate=0.02, weight=1.5, on=["text", "image"], max_norm=0.03)


def adversarially(task: Any, model: Any, batch: PackedBatch, head: Any) -> dict[str, torch.Tensor]:
    """Loss, terms, metrics and gradients of a batch that is trained with adversarially."""
    model.zero_grad()
    outputs, targets, loss = forward_backward(with_divergence(task, BOTH), head, model, batch, BOTH, normalisation="published")
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    sums = {name: total for name, (total, _) in loss.sums.items()}
    return {"number": loss.number, **sums, **task.metric(outputs, targets), **gradients}


@pytest.mark.parametrize("name", EVERY_ROW)
def test_ghosts_change_nothing_of_adversarial_training(name: str, row_case: Any) -> None:
    """Nor are they shifted: what is shifted is real."""
    task, model, batch = row_case(name)
    set_dropout(model, 0.0)
    agree(adversarially(task, model, fill(batch, room(name)), task.head), adversarially(task, model, batch, task.head), limit=1e-4)


def test_adversarial_training_compiles_to_two_graphs(row_case: Any) -> None:
    """One with shifts that get a gradient, one of the clean pass, where they get none."""
    torch._dynamo.reset()
    counter: Any = CompileCounterWithBackend("aot_eager")
    task, model, _ = row_case("mlm")
    set_dropout(model, 0.0)
    head = compiled_head(task, backend=counter)
    for number in range(5):
        _, _, batch = row_case("mlm", first=number, count=2 + number)
        found = adversarially(task, model, fill(batch, room("mlm")), head)
    agree(found, adversarially(task, model, batch, task.head), limit=1e-4)
    assert counter.frame_count == 2


AT_EVERY_RUN = ("mlm", "mrfr", "nlvr2", "refcoco")  # compiling takes seconds: the others where slow tests are run


@pytest.mark.parametrize("name", [name if name in AT_EVERY_RUN else pytest.param(name, marks=pytest.mark.slow) for name in EVERY_ROW])
def test_one_graph_a_task_without_a_break(name: str, row_case: Any) -> None:
    torch._dynamo.reset()
    counter: Any = CompileCounterWithBackend("aot_eager")
    task, model, _ = row_case(name)
    set_dropout(model, 0.0)
    head = compiled_head(task, backend=counter)
    shapes = set()
    for number in range(BATCHES):
        _, _, batch = row_case(name, first=number, count=2 + number % 5)
        shapes.add(batch.tokens)
        found = learned(task, model, fill(batch, room(name)), head)
        if number in (0, BATCHES - 1):
            agree(found, learned(task, model, batch, task.head))
    assert counter.frame_count == 1
    assert len(shapes) > 3


def test_a_number_of_the_model_has_no_ghosts(row_case: Any) -> None:
    """As the deviation of one's own scores."""
    _, _, batch = row_case("classify")
    filled = fill(batch, room("classify"))
    outputs, _ = only_real({"scores": torch.zeros(len(filled.layout.first_rows_B), 1), "deviation": torch.tensor(2.0)}, filled)
    assert outputs["scores"].shape == (len(batch), 1) and outputs["deviation"].tolist() == 2


def test_what_does_not_fit_is_doubled(row_case: Any) -> None:
    _, _, batch = row_case("mlm")
    small = Room(rows=8, sequences=1, hidden=1, longest_text=2, most_regions=2)
    filled = fill(batch, small)
    sizes = len(filled.input_ids_T), len(filled.layout.first_rows_B), len(filled.targets["places"])
    needed = batch.tokens, len(batch.text_lengths_B), len(batch.targets["places"])
    for size, least in zip(sizes, needed, strict=True):
        assert least <= size < 2 * least
    assert filled.layout.longest_text >= batch.layout.longest_text and filled.layout.most_regions >= batch.layout.most_regions


def test_a_full_batch_needs_no_ghosts(row_case: Any) -> None:
    task, model, batch = row_case("itm")
    set_dropout(model, 0.0)
    exact = Room(batch.tokens, len(batch.text_lengths_B), 1, batch.layout.longest_text, batch.layout.most_regions)
    filled = fill(batch, exact)
    assert filled.rows == batch.tokens and np.all(np.diff(filled.layout.offsets.numpy()) >= 0)
    agree(learned(task, model, filled, task.head), learned(task, model, replace(batch), task.head))
