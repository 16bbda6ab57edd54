"""What a pre-trained model understands of held-out pairs."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from uniter.datasets.batches.collate import PackedBatch
from uniter.datasets.batches.corpus import Corpus, open_corpus
from uniter.datasets.batches.example import Masking
from uniter.datasets.batches.loader import MicroBatch
from uniter.datasets.batches.masking import Pairing, random_pairs
from uniter.datasets.batches.order import generator
from uniter.datasets.batches.plans import Part
from uniter.datasets.batches.pretraining import masked_regions, masked_regions_with_classes, masked_text, matched_pair
from uniter.datasets.devices import fitting_precision
from uniter.datasets.errors import BadInput
from uniter.datasets.text_db.tokenizer import Tokenizer
from uniter.datasets.text_db.vocabulary_files import VOCABULARY_FILE
from uniter.model import losses
from uniter.model.checkpoints.load import load
from uniter.model.heads.pretraining import Outputs, UniterForPretraining
from uniter.model.tasks.task import Head
from uniter.model.train.distributed import Processes, processes
from uniter.model.train.fit import (
    check_classes,
    check_detector,
    check_fit,
    check_shown,
    origin_of_start,
    refuse_left_out,
    regions_of_run,
    regions_to_read,
    remarks_on,
    tokenizer_of_texts,
)
from uniter.model.train.scoring import Means, Scoring

# A small held-out part is masked several times over, until so many words were asked for.
ENOUGH_WORDS, MOST_ROUNDS = 4000, 20


MOST_GROUPS = 4


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
    figures: dict[str, float] = {"examples": len(corpus), "pictures": len(np.unique(corpus.image_rows_NK[:, 0]))}
    # Masks by example, so that the same words are hidden whichever picture is shown (and so however long the example is).
    run = _Run(Scoring(model, processes, budget, seed, masking or Masking(), True, precision, workers), corpus)
    matched = corpus.image_rows_NK.shape[1] == 1  # VCR's second stage has no matching
    groups = retrieval_groups(corpus, candidates=candidates, seed=seed) if matched else []
    with run.scoring.shown(run.examples_to_score(groups), unit="examples", label="evaluating") as scoring:
        run = _Run(scoring, corpus)
        figures |= _words(run, words)
        figures |= _features(run)
        if corpus.has_soft_labels:
            figures |= _distributions(run)
        if matched:
            figures |= _pairs(run)
            figures |= retrieval(run, groups)
    return figures


@dataclass(frozen=True, slots=True)
class _Run:
    scoring: Scoring
    corpus: Corpus

    @property
    def processes(self) -> Processes:
        return self.scoring.processes

    @property
    def seed(self) -> int:
        return self.scoring.seed

    def scored(
        self, part: Part, head: Head, *, round_number: int = 0, pairing: Pairing | None = None
    ) -> Iterator[tuple[MicroBatch, PackedBatch, Outputs]]:
        seed = int(generator(self.seed, part.name, "round", round_number).integers(2**62))
        return self.scoring.scored(part, head, pairing=pairing, seed=seed)

    def rounds(self) -> int:
        expected = self.scoring.masking.words * float(self.corpus.text_lengths_N.sum())
        return int(min(max(1, round(ENOUGH_WORDS / max(expected, 1.0))), MOST_ROUNDS))

    def pair_rounds(self) -> int:
        """Of image-text matching; none where there is no other picture."""
        if len(np.unique(self.corpus.image_rows_NK)) < 2:
            return 0
        return int(min(max(1, round(1000 / len(self.corpus))), MOST_ROUNDS))

    def examples_to_score(self, groups: Sequence[NDArray[np.int64]]) -> int:
        """Of all figures together, each showing counted; `groups` are those of retrieval, none where nothing is matched."""
        beside_others = 2 if len(np.unique(self.corpus.image_rows_NK[:, 0])) > 1 else 1
        showings = self.rounds() * beside_others + 1 + int(self.corpus.has_soft_labels) + (self.pair_rounds() if groups else 0)
        return showings * len(self.corpus) + sum(len(group) ** 2 for group in groups)


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
                labels_S = losses.hidden_words(batch.targets)
                right_S = outputs["scores"].argmax(dim=1) == labels_S
                means.add_values(f"mlm.accuracy{suffix}", right_S)
                if len(chosen):
                    means.add_values(f"mlm.words_accuracy{suffix}", right_S[torch.isin(labels_S, chosen)])
                if not suffix:
                    means.add("mlm.masked_words", len(labels_S), 1)
    total = means.of_all(run.processes)
    figures = {name: value for name, value in total.means().items() if name != "mlm.masked_words"}
    return figures | {"mlm.masked_words": float(total.sums["mlm.masked_words"])}


def _other_pictures(corpus: Corpus, rng: np.random.Generator) -> Pairing:
    """Each example with another one's picture, VCR's with both kinds of its regions."""
    own_NK = corpus.image_rows_NK
    drawn = random_pairs(own_NK[:, 0], rng, negative_probability=1.0)
    firsts, examples = np.unique(own_NK[:, 0], return_index=True)
    return Pairing(own_NK[examples[np.searchsorted(firsts, drawn.images)]], drawn.matched)


def _pairs(run: _Run) -> dict[str, float]:
    part = Part("itm", run.corpus, matched_pair, negative_probability=0.5)
    means = Means()
    for round_number in range(run.pair_rounds()):
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


def retrieval(run: _Run, groups: Sequence[NDArray[np.int64]]) -> dict[str, float]:
    """Zero-shot retrieval by the matching head: each text of a group against each of its pictures, recall averaged over groups."""
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


def evaluate_run(
    start: str,
    *,
    text: Sequence[str],
    images: Sequence[str],
    candidates: int = 50,
    words: Sequence[str] = (),
    seed: int = 42,
    batch_tokens: int = 8192,
    max_text_length: int = -1,
    workers: int | None = None,
    device: str | None = None,
    precision: str | None = None,
    other_detector: bool = False,
    strict: bool = False,
) -> dict[str, Any]:
    """The figures of `evaluate_pretraining` of a run or checkpoint on databases, grouped: {"mlm": {"accuracy": ...}, ...}.

    Args:
        start: a run directory, a checkpoint file or folder, or a hub id.
        text, images: held-out databases.
        words: words whose accuracy is reported besides, split into the texts' word pieces.
        other_detector: regions of another detector than the model learnt from are meant.
        strict: refuse where an example is left out.

    Raises:
        BadInput: databases and model do not fit.
    """
    regions = regions_to_read(images, *regions_of_run(start))
    corpus = open_corpus("data", text, images, max_text_length=max_text_length, image_options=regions)
    check_shown(corpus)
    if strict:
        refuse_left_out(corpus.left_out, len(corpus))
    check_detector([corpus], origin_of_start(start), source=start, meant=other_detector)
    remarks = remarks_on([corpus], origin_of_start(start), source=start)
    pieces = _pieces(words, corpus)
    with processes(device) as everyone:
        checkpoint = load(start, UniterForPretraining)
        if checkpoint.fresh:
            trained = f"was trained for {checkpoint.task}" if checkpoint.task not in (None, "pretrain") else "lacks heads of pre-training"
            raise BadInput(
                f"{start} {trained} ({', '.join(sorted(checkpoint.fresh)[:2])}, ... would be random numbers); evaluate what it was trained "
                "for, or a pre-trained run"
            )
        model: UniterForPretraining = checkpoint.model.to(everyone.device)
        check_fit(model.config, corpus, source=start)
        check_classes(model.config, [corpus])
        tokenizer_of_texts([corpus], start=start)
        figures = evaluate_pretraining(
            model,
            corpus,
            processes=everyone,
            budget=batch_tokens,
            seed=seed,
            candidates=candidates,
            words=pieces,
            precision=precision or fitting_precision(everyone.device),
            workers=everyone.fitting_workers() if workers is None else workers,
        )
    return {"left_out": corpus.left_out, **({"remarks": remarks} if remarks else {}), **_grouped(figures)}


def _pieces(words: Sequence[str], corpus: Corpus) -> list[int]:
    """The texts' word pieces of these words."""
    if not words:
        return []
    name, local = corpus.texts[0].tokenizer_name, corpus.texts[0].path / VOCABULARY_FILE
    if not local.is_file() and name is None:
        raise BadInput(f"text database {corpus.texts[0].path} does not say its tokeniser, so --words cannot be split; leave it out")
    tokenizer = Tokenizer.load(local if local.is_file() else str(name))
    return [piece for ids in tokenizer.encode_batch(list(words)) for piece in ids if piece != tokenizer.unk_id]


def _grouped(figures: Mapping[str, float]) -> dict[str, Any]:
    """{"mlm.accuracy": x} -> {"mlm": {"accuracy": x}}."""
    groups: dict[str, Any] = {}
    for name, value in figures.items():
        group, dot, rest = name.partition(".")
        if dot:
            groups.setdefault(group, {})[rest] = value
        else:
            groups[name] = value
    return groups
