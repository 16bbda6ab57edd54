"""VILLA's adversarial training: the words' embeddings and the regions' features are shifted to where the loss grows, and what the
model says must stay what it says without a shift.

An update has K passes over each micro-batch, whose gradients all count ("free" training: FreeLB); the shifts of a pass are those of the
one before, moved along their gradient. What a reader would get wrong: the clean answers are no fixed target, gradients flow into them
too; and a norm is that of one sequence of text and regions, not of an example (NLVR2 has two, VCR four), nor of a batch.

Differs from the published code: shifts are float32 and added in float32 (in half precision most of one is rounded away); the clean
pass is differentiated once, with the K gradients of its scores added up, instead of K times; pre-training, retrieval and RefCOCO,
whose adversarial code was never published, are trained as the paper describes.

Legend of shape suffixes: B sequences, T text tokens, R regions, H hidden, D feature width; N is T or R, and W then H or D.

Source: Gan et al., "Large-Scale Adversarial Training for Vision-and-Language Representation Learning", NeurIPS 2020;
github.com/zhegan27/VILLA, train_vqa_adv.py.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from uniter.datasets.batches.collate import PackedBatch
from uniter.datasets.batches.filling import only_real
from uniter.model import losses
from uniter.model.heads.pretraining import Outputs
from uniter.model.losses import DIVERGENCE, Loss
from uniter.model.settings.settings import AdversarialSettings, Norm
from uniter.model.tasks.task import Head, Task

SHORTEST = 1e-8  # a gradient that is shorter moves the shift by less than the rate


@dataclass(frozen=True, slots=True)
class Shift:
    """What is added to the words or the regions of a batch.

    Attributes:
        values_NW: float32, (T, H) of words or (R, D) of regions; has its gradient after a pass.
        lengths_B: (B,) int64 on the values' device, words or regions of each sequence.
        sequence_N: (N,) int64, of each row its sequence.
    """

    values_NW: Tensor
    lengths_B: Tensor
    sequence_N: Tensor

    @classmethod
    def zero(cls, lengths_B: Tensor, like_NW: tuple[int, int], *, behind: int = 0) -> "Shift":
        """Of no length, for sequences of so many rows each; rows that are left `behind` those of all sequences are one more sequence."""
        rows, width = like_NW
        lengths_B = torch.cat([lengths_B, lengths_B.new_full((1,), behind)]) if behind else lengths_B
        # Its size is given: otherwise the host would wait for the device.
        sequence_N = torch.arange(len(lengths_B), device=lengths_B.device).repeat_interleave(lengths_B, output_size=rows)
        return cls(torch.zeros(rows, width, device=lengths_B.device, requires_grad=True), lengths_B, sequence_N)

    def norms(self, values_NW: Tensor, kind: Norm) -> Tensor:
        """(B,), the l2 norm or the largest size of each sequence's numbers."""
        # Unchecked: looking whether the lengths fit would wait for the device.
        if kind == "linf":
            return torch.segment_reduce(values_NW.abs().amax(dim=1), "max", lengths=self.lengths_B, initial=0, unsafe=True)
        return torch.segment_reduce(values_NW.square().sum(dim=1), "sum", lengths=self.lengths_B, initial=0, unsafe=True).sqrt()

    def moved(self, rate: float, kind: Norm, max_norm: float) -> "Shift":
        """Moved along its gradient by `rate` in each sequence, and brought back where it is longer than `max_norm` (unless that is 0)."""
        gradient_NW = self.values_NW.grad
        assert gradient_NW is not None, "only after a pass is it known where to"
        with torch.no_grad():
            step_B = rate / self.norms(gradient_NW, kind).clamp(min=SHORTEST)
            moved_NW = self.values_NW + step_B[self.sequence_N].unsqueeze(1) * gradient_NW
            if max_norm > 0 and kind == "linf":
                moved_NW = moved_NW.clamp(-max_norm, max_norm)
            elif max_norm > 0:
                shrunk_B = (max_norm / self.norms(moved_NW, kind).clamp(min=SHORTEST)).clamp(max=1)
                moved_NW = moved_NW * shrunk_B[self.sequence_N].unsqueeze(1)
        return Shift(moved_NW.requires_grad_(), self.lengths_B, self.sequence_N)


Shifts = Mapping[str, Shift]  # by "text", "image"


def zero_shifts(batch: PackedBatch, on: Sequence[str], *, hidden: int) -> dict[str, Shift]:
    """Shifts of no length of the chosen sides of a batch, its ghosts as one more sequence that nothing shifts. hidden: H of the model."""
    sequences, layout = len(batch.text_lengths_B), batch.layout
    rows, (regions, width) = len(batch.input_ids_T), batch.features_RD.shape
    of = {
        "text": (layout.text_lengths_B, (rows, hidden), rows - int(batch.text_lengths_B.sum())),
        "image": (layout.region_counts_B, (regions, width), regions - int(batch.region_counts_B.sum())),
    }
    return {side: Shift.zero(of[side][0][:sequences], of[side][1], behind=of[side][2]) for side in on}


def shifted(batch: PackedBatch, shifts: Shifts) -> PackedBatch:
    """The batch as the model sees it with these shifts."""
    words, regions = shifts.get("text"), shifts.get("image")
    return replace(
        batch,
        word_shifts_TH=None if words is None else words.values_NW,
        region_shifts_RD=None if regions is None else regions.values_NW,
    )


@dataclass(frozen=True, slots=True)
class Pass:
    """One of the K passes over a batch, after its gradients were added to the parameters.

    Attributes:
        shifts: what was added, with its gradient.
        outputs: of the head; where words and regions alternate, first with the words shifted, then with the regions.
        losses: of those, the divergence from the clean answers among the terms.
    """

    shifts: Shifts
    outputs: list[Outputs]
    losses: list[Loss]


def passes(
    score: Callable[[PackedBatch], Outputs],
    task: Task,
    batch: PackedBatch,
    shifts: Shifts,
    adversarial: AdversarialSettings,
    *,
    normalisation: losses.Normalisation,
) -> Iterator[Pass]:
    """Forward and backward, K times; all gradients are added up when the iterator is exhausted.

    Args:
        score: the head's outputs of a batch.
        task: a row that weighs its divergence (`with_divergence`).
        batch: on the model's device; the scores of its ghosts count for nothing.
        shifts: what the first pass adds; empty where nothing is to be shifted.
    """
    views = [[side] for side in shifts] if adversarial.alternate and shifts else [list(shifts)]
    clean = _Clean.of(only_real(score(shifted(batch, _without_gradient(shifts))), batch)[0]) if adversarial.weight else None
    for number in range(1, adversarial.steps + 1):
        found: list[tuple[Outputs, Loss]] = []
        for view in views:
            outputs, targets = only_real(score(shifted(batch, {side: shifts[side] for side in view})), batch)
            terms = dict(task.losses(outputs, targets))
            if clean is not None:
                terms[DIVERGENCE] = task.divergence(clean.fixed, outputs, targets)
            loss = losses.of(terms, weights=task.weights, reduction=task.reduction, normalisation=normalisation)
            share = loss.number / (adversarial.steps * len(views))
            share.backward()  # type: ignore[no-untyped-call]
            found.append((outputs, loss))
        yield Pass(shifts, [outputs for outputs, _ in found], [loss for _, loss in found])
        if number < adversarial.steps:
            shifts = {
                side: shift.moved(adversarial.rate_of(side), adversarial.norm, adversarial.max_norm) for side, shift in shifts.items()
            }
    if clean is not None:
        clean.backward()


@dataclass(frozen=True, slots=True)
class _Clean:
    """The outputs of the pass without shifts; `fixed` has their scores cut off from what they were computed by."""

    outputs: Outputs
    fixed: Outputs

    @classmethod
    def of(cls, outputs: Outputs) -> "_Clean":
        return cls(outputs, {**outputs, "scores": outputs["scores"].detach().float().requires_grad_()})

    def backward(self) -> None:
        """What all passes want of these scores, handed on at once: the graph is walked once instead of K times."""
        scores, gradient = self.outputs["scores"], self.fixed["scores"].grad
        assert gradient is not None
        scores.backward(gradient.to(scores.dtype))  # type: ignore[no-untyped-call]


def _without_gradient(shifts: Shifts) -> dict[str, Shift]:
    """The zero shifts of the clean pass. They are added all the same, so that half precision rounds both alike."""
    return {side: replace(shift, values_NW=torch.zeros_like(shift.values_NW)) for side, shift in shifts.items()}


def with_divergence(task: Task, adversarial: AdversarialSettings | None) -> Task:
    """The row with the divergence's weight among those of its terms."""
    return (
        task if adversarial is None or not adversarial.weight else replace(task, weights={**task.weights, DIVERGENCE: adversarial.weight})
    )


def forward_backward(
    task: Task,
    head: Head,
    model: Any,
    batch: PackedBatch,
    adversarial: AdversarialSettings,
    *,
    normalisation: losses.Normalisation,
    computing: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> tuple[Outputs, Outputs, Loss]:
    """Add the gradients of a micro-batch, which is one of a plain update's, to the parameters.

    Args:
        task, head: a row that weighs its divergence (`with_divergence`), and its head as it is called (compiled or not).
        computing: the precision that forward passes are computed in.

    Returns:
        The head's outputs of the first pass, which shifts nothing, and the targets, both without ghosts; and the loss with its sums
        averaged over the passes.
    """
    # A single pass shifts nothing, and is then a plain one to the bit. Shifts are those of all sequences, whichever are trained with.
    shifts = zero_shifts(batch, adversarial.on if adversarial.steps > 1 else [], hidden=model.config.hidden_size)
    with computing():
        batch = task.narrowed(model, batch)

    def score(seen: PackedBatch) -> Outputs:
        with computing():
            return head(model, seen)

    first: Outputs | None = None
    found: list[Loss] = []
    for one in passes(score, task, batch, shifts, adversarial, normalisation=normalisation):
        first = first or one.outputs[0]
        found += one.losses
    assert first is not None
    return first, only_real({}, batch)[1], _mean(found)


def _mean(found: Sequence[Loss]) -> Loss:
    sums = {name: (torch.stack([loss.sums[name][0] for loss in found]).mean(dim=0), count) for name, (_, count) in found[0].sums.items()}
    return Loss(torch.stack([loss.number.detach() for loss in found]).mean(dim=0), sums, found[0].rows)
