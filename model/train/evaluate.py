"""The only evaluation loop, and the figures of a pre-trained model on held-out pairs.

Everything is a function of the seed: which words are hidden, which other picture is shown, which pairs compete in retrieval.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from uniter.datasets.batching import generator
from uniter.datasets.collate import PackedBatch
from uniter.datasets.corpus import Corpus
from uniter.datasets.errors import BadInput
from uniter.datasets.loader import Assembler, MicroBatch, Part, load, sequential_plans
from uniter.datasets.masking import NOT_PREDICTED, Pairing, random_pairs
from uniter.datasets.samples import Masking, masked_regions, masked_regions_with_classes, masked_text, matched_pair
from uniter.model import losses
from uniter.model.heads import Outputs, UniterForPretraining
from uniter.model.tasks import Task
from uniter.model.train.distributed import Processes

# A small held-out part is masked several times over, until so many words were asked for.
ENOUGH_WORDS, MOST_ROUNDS = 4000, 20
MOST_GROUPS = 4


@torch.no_grad()
def scored(
    model: nn.Module,
    head: Callable[[Any, PackedBatch], Outputs],
    batches: Iterable[MicroBatch],
    *,
    device: torch.device,
    precision: str = "fp32",
) -> Iterator[tuple[MicroBatch, PackedBatch, Outputs]]:
    """The one loop that runs a model without training it: each micro-batch, its batch on the device, and the head's outputs."""
    was_training = model.training
    model.eval()
    try:
        for made in batches:
            batch = made.batch.to(device, non_blocking=True)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
                outputs = head(model, batch)
            yield made, batch, outputs
    finally:
        model.train(was_training)


@dataclass(slots=True)
class Means:
    """Sums and counts of named values, and their means in the end."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, total: Tensor | float, count: float) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + float(total)
        self.counts[name] = self.counts.get(name, 0.0) + count

    def add_values(self, name: str, values: Tensor) -> None:
        self.add(name, values.double().sum(), len(values))

    def of_all(self, processes: Processes) -> "Means":
        """The sums over all processes; one that got no batch may know fewer names."""
        total = Means()
        for sums, counts in processes.gather((self.sums, self.counts)):
            for name, value in sums.items():
                total.add(name, value, counts[name])
        return total

    def means(self) -> dict[str, float]:
        return {name: self.sums[name] / count for name, count in sorted(self.counts.items()) if count}


def validate(
    model: nn.Module,
    task: Task,
    part: Part,
    *,
    budget: int,
    seed: int,
    masking: Masking,
    processes: Processes,
    precision: str = "fp32",
    workers: int = 0,
    note: Callable[[MicroBatch, Outputs], None] = lambda made, outputs: None,
) -> dict[str, float]:
    """A task's loss, its terms and its metrics over all examples of a part, shared out to the processes.

    Args:
        note: is told what came out of each of this process's batches.

    Returns:
        "loss" (the terms weighted as in training), "loss_TERM" the mean of each term, each metric's mean by its name.
    """
    plans = sequential_plans(part, 0, budget=budget, seed=seed, rank=processes.rank, world=processes.world)
    batches = load(Assembler([part], seed, masking), plans, workers=workers)
    means = Means()
    for made, batch, outputs in scored(model, task.head, batches, device=processes.device, precision=precision):
        note(made, outputs)
        for name, term in task.losses(outputs, batch.targets).items():
            total, count = losses.sum_and_count(term, "elements" if task.reduction == "elements" else "rows")
            means.add(f"loss_{name}", total.double(), count)
        for name, values in task.metric(outputs, batch.targets).items():
            means.add_values(name, values)
    figures = means.of_all(processes).means()
    figures["loss"] = sum(
        value * task.weights.get(name.removeprefix("loss_"), 1.0) for name, value in figures.items() if name.startswith("loss_")
    )
    return figures


def evaluate_pretraining(
    model: UniterForPretraining,
    corpus: Corpus,
    *,
    processes: Processes,
    budget: int,
    seed: int = 42,
    masking: Masking | None = None,
    candidates: int = 50,
    words: Sequence[int] = (),
    precision: str = "fp32",
    workers: int = 0,
) -> dict[str, float]:
    """The figures of a pre-trained model.

    Args:
        model: on the processes' device.
        corpus: held-out texts with their pictures.
        budget: tokens of a batch.
        seed: decides all draws.
        masking: chances of words and regions to be hidden.
        candidates: pairs that compete in retrieval (fewer if there are fewer pictures).
        words: word pieces whose accuracy is reported besides.

    Returns:
        `mlm.accuracy` over all masked word pieces, `mlm.accuracy_other_picture` with the same words masked beside another
        picture, `mlm.words_accuracy` and `mlm.words_accuracy_other_picture` where `words` are given; `itm.accuracy` at even
        odds; `mrfr.mse` (mean over feature elements) and `mrfr.mse_of_mean` of always answering the mean feature; `mrc-kl.kl`
        (nats a region, summed over classes), `mrc-kl.kl_of_mean` of always answering the mean distribution, `mrc-kl.entropy`,
        the floor of the cross-entropy; `retrieval.text_r1/r5/r10` (the right text for a picture), `retrieval.image_r1/...`,
        `retrieval.candidates`.
    """
    masking = masking or Masking()
    run = _Run(model, corpus, processes, budget, seed, masking, precision, workers)
    figures: dict[str, float] = {"examples": len(corpus), "pictures": len(np.unique(corpus.image_rows_NK[:, 0]))}
    figures |= _words(run, words)
    figures |= _features(run)
    if corpus.has_soft_labels:
        figures |= _distributions(run)
    if corpus.image_rows_NK.shape[1] == 1:  # VCR's second stage has no matching
        figures |= _pairs(run)
        figures |= retrieval(run, candidates=candidates)
    return figures


@dataclass(frozen=True, slots=True)
class _Run:
    model: UniterForPretraining
    corpus: Corpus
    processes: Processes
    budget: int
    seed: int
    masking: Masking
    precision: str
    workers: int

    def scored(
        self, part: Part, head: Callable[[Any, PackedBatch], Outputs], *, round_number: int = 0, pairing: Pairing | None = None
    ) -> Iterator[tuple[MicroBatch, PackedBatch, Outputs]]:
        seed = int(generator(self.seed, part.name, "round", round_number).integers(2**62))
        plans = sequential_plans(
            part, 0, budget=self.budget, seed=seed, rank=self.processes.rank, world=self.processes.world, pairing=pairing
        )
        # Masks by example, so that the same words are hidden whichever picture is shown (and so however long the example is).
        batches = load(Assembler([part], seed, self.masking, by_example=True), plans, workers=self.workers)
        return scored(self.model, head, batches, device=self.processes.device, precision=self.precision)

    def rounds(self) -> int:
        expected = self.masking.words * float(self.corpus.text_lengths_N.sum())
        return int(min(max(1, round(ENOUGH_WORDS / max(expected, 1.0))), MOST_ROUNDS))


def _words(run: _Run, words: Sequence[int]) -> dict[str, float]:
    part = Part("mlm", run.corpus, masked_text)
    pictures = len(np.unique(run.corpus.image_rows_NK[:, 0]))
    chosen = torch.tensor(sorted(set(words)), dtype=torch.int64, device=run.processes.device)
    means = Means()
    for round_number in range(run.rounds()):
        shown: dict[str, Pairing | None] = {"": None}
        if pictures > 1:
            shown["_other_picture"] = _other_pictures(run.corpus, generator(run.seed, "other picture", round_number))
        for suffix, pairing in shown.items():
            for _, batch, outputs in run.scored(part, UniterForPretraining.masked_words, round_number=round_number, pairing=pairing):
                labels_T = batch.targets["words"]
                labels_S = labels_T[labels_T != NOT_PREDICTED]
                right_S = outputs["scores"].argmax(dim=1) == labels_S
                means.add_values(f"mlm.accuracy{suffix}", right_S)
                if len(chosen):
                    means.add_values(f"mlm.words_accuracy{suffix}", right_S[torch.isin(labels_S, chosen)])
                if not suffix:
                    means.add("mlm.masked_words", len(labels_S), 1)
    total = means.of_all(run.processes)
    figures = {name: value for name, value in total.means().items() if name != "mlm.masked_words"}
    return figures | {"mlm.masked_words": total.sums["mlm.masked_words"]}


def _other_pictures(corpus: Corpus, rng: np.random.Generator) -> Pairing:
    """Each example with another one's picture, VCR's with both kinds of its regions."""
    own_NK = corpus.image_rows_NK
    drawn = random_pairs(own_NK[:, 0], rng, negative_probability=1.0)
    firsts, examples = np.unique(own_NK[:, 0], return_index=True)
    return Pairing(own_NK[examples[np.searchsorted(firsts, drawn.images)]], drawn.matched)


def _pairs(run: _Run) -> dict[str, float]:
    if len(np.unique(run.corpus.image_rows_NK)) < 2:
        return {}
    part = Part("itm", run.corpus, matched_pair, negative_probability=0.5)
    means = Means()
    rounds = int(min(max(1, round(1000 / len(run.corpus))), MOST_ROUNDS))
    for round_number in range(rounds):
        for _, batch, outputs in run.scored(part, UniterForPretraining.pairs, round_number=round_number):
            means.add_values("itm.accuracy", outputs["scores"].argmax(dim=1) == batch.targets["matched"])
    return means.of_all(run.processes).means()


def _features(run: _Run) -> dict[str, float]:
    part = Part("mrfr", run.corpus, masked_regions)
    means = Means()
    first, second, count = 0.0, 0.0, 0
    for _, batch, outputs in run.scored(part, UniterForPretraining.masked_features):
        error_SD = losses.masked_features(outputs, batch.targets)["squared_error"]
        means.add("mrfr.mse", error_SD.double().sum(), error_SD.numel())
        wanted_SD = batch.targets["features"].double().cpu().numpy()
        first, second, count = first + wanted_SD.sum(axis=0), second + (wanted_SD**2).sum(axis=0), count + len(wanted_SD)
    everyone = run.processes.gather((first, second, count))
    regions = sum(one[2] for one in everyone)
    mean = sum(one[0] for one in everyone) / regions
    variance = sum(one[1] for one in everyone) / regions - mean**2
    return means.of_all(run.processes).means() | {"mrfr.mse_of_mean": float(np.mean(variance))}


def _distributions(run: _Run) -> dict[str, float]:
    part = Part("mrc-kl", run.corpus, masked_regions_with_classes)
    means = Means()
    total: NDArray[np.float64] | float = 0.0
    for _, batch, outputs in run.scored(part, UniterForPretraining.masked_classes):
        wanted_SC = batch.targets["soft_labels"].double()
        means.add_values("mrc-kl.kl", losses.masked_distributions(outputs, batch.targets)["kl"].sum(dim=1))
        means.add_values("mrc-kl.entropy", -torch.special.xlogy(wanted_SC, wanted_SC).sum(dim=1))
        means.add_values("mrc-kl.accuracy", outputs["scores"].argmax(dim=1) == wanted_SC.argmax(dim=1))
        total = total + wanted_SC.sum(dim=0).cpu().numpy()
    figures = means.of_all(run.processes)
    mean_C = sum(run.processes.gather(total)) / figures.counts["mrc-kl.kl"]
    entropy_of_mean = -float(np.sum(mean_C * np.log(np.maximum(mean_C, 1e-300))))
    found = figures.means()
    # The mean of KL(p || mean) over all p is the entropy of the mean less the mean of the entropies.
    return found | {"mrc-kl.kl_of_mean": entropy_of_mean - found["mrc-kl.entropy"]}


def retrieval(run: _Run, *, candidates: int) -> dict[str, float]:
    """Zero-shot retrieval by the matching head: each text of a group against each of its pictures, recall averaged over groups."""
    groups = retrieval_groups(run.corpus, candidates=candidates, seed=run.seed)
    recalls: dict[str, list[float]] = {}
    for number, group in enumerate(groups):
        size = len(group)
        every_pair = run.corpus.take(np.repeat(group, size))
        pictures = np.tile(run.corpus.image_rows_NK[group], (size, 1))
        part = Part(f"retrieval {number}", every_pair, matched_pair)
        pairing = Pairing(pictures, np.ones(len(pictures), dtype=np.bool_))
        scores = np.zeros(size * size)
        for made, _, outputs in run.scored(part, UniterForPretraining.pairs, pairing=pairing):
            margin = outputs["scores"].float()
            scores[made.plan.examples] = (margin[:, 1] - margin[:, 0]).cpu().numpy()
        summed = np.sum(run.processes.gather(scores), axis=0).reshape(size, size)
        for name, matrix in (("image", summed), ("text", summed.T)):
            # Ties count against us: a model that says the same of all pairs finds nothing.
            ranks = (matrix >= np.diag(matrix)[:, None]).sum(axis=1) - 1
            for depth in (1, 5, 10):
                recalls.setdefault(f"retrieval.{name}_r{depth}", []).append(float((ranks < depth).mean()))
    figures = {name: float(np.mean(values)) for name, values in recalls.items()}
    return figures | {"retrieval.candidates": len(groups[0]), "retrieval.groups": len(groups)}


def retrieval_groups(corpus: Corpus, *, candidates: int, seed: int) -> list[NDArray[np.int64]]:
    """Disjoint groups of equally many examples; within a group all pictures and all texts differ."""
    if candidates < 2:
        raise BadInput(f"retrieval needs at least 2 candidates, got {candidates}")
    groups: list[list[int]] = []
    pictures: set[int] = set()
    texts: set[tuple[int, ...]] = set()
    group: list[int] = []
    for example in generator(seed, "retrieval").permutation(len(corpus)).tolist():
        picture = int(corpus.image_rows_NK[example, 0])
        text = tuple(corpus.record(example)["input_ids"])
        if picture in pictures or text in texts:
            continue
        pictures.add(picture)
        texts.add(text)
        group.append(example)
        if len(group) == candidates:
            groups.append(group)
            group, texts = [], set()
            if len(groups) == MOST_GROUPS:
                break
    if not groups:
        if len(group) < 2:
            raise BadInput("retrieval needs at least two different pictures with different texts")
        groups = [group]
    return [np.array(chosen, dtype=np.int64) for chosen in groups]
