"""The figures and the predictions of a fine-tuned model."""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uniter.datasets.batches.corpus import Corpus, open_corpus
from uniter.datasets.batches.plans import Part
from uniter.datasets.devices import fitting_precision
from uniter.datasets.errors import BadInput
from uniter.datasets.storage.files import write_bytes, write_json, written_aside
from uniter.model.checkpoints.load import Checkpoint, load
from uniter.model.evaluation import pair_scores
from uniter.model.evaluation.known_pictures import blocks_of, know, score_pairs
from uniter.model.metrics import fold_recalls, retrieval_recalls
from uniter.model.tasks.predictions import answer_table
from uniter.model.tasks.table import DOWNSTREAM, row_of
from uniter.model.tasks.task import NO_SIZES, Task, extras
from uniter.model.train.distributed import Processes, processes
from uniter.model.train.fit import (
    check_detector,
    check_fit,
    check_pictures,
    check_texts,
    labelled,
    refuse_left_out,
    regions_of_run,
    regions_to_read,
    remarks_on,
    tokenizer_of_texts,
)
from uniter.model.train.scoring import Scoring, by_id, validate


@dataclass(frozen=True, slots=True)
class Opened:
    """A down-stream model with its data, known to belong together; made by `opened`.

    Attributes:
        task: the row, made for these data.
        corpus: the examples that are scored.
        scoring: how the model is put through them.
        weights: the file of the weights.
        answers: their names by number, where answers have names.
    """

    task: Task
    corpus: Corpus
    scoring: Scoring
    weights: Path
    answers: Sequence[str] | None
    remarks: Sequence[str]

    def remarked(self) -> dict[str, Any]:
        """What is to be known of the regions, for the summary, if there is anything."""
        return {"remarks": list(self.remarks)} if self.remarks else {}

    def measured(self) -> dict[str, Any]:
        """Loss, metrics and official figures; what was predicted on the way is not computed again."""
        row = extras(self.task)
        part = Part("evaluation", self.corpus, self.task.sample, lengths=self.task.lengths)
        with self.scoring.shown(len(self.corpus), unit="examples", label="evaluating") as scoring:
            figures: dict[str, Any] = validate(scoring, self.task, part, official=True)
        if row.figures is not None and row.predicted is not None:
            figures |= row.figures(self.corpus, self.predictions())
        return figures

    def predictions(self) -> dict[str, Any]:
        """What the model says of every example, in corpus order."""
        row, found = extras(self.task), dict[int, Any]()
        part = Part("predictions", self.corpus, row.predicted or self.task.sample, lengths=row.predicted_lengths or self.task.lengths)
        with self.scoring.shown(len(self.corpus), unit="examples", label="predicting") as scoring:
            for made, _, outputs in scoring.scored(part, self.task.head):
                found |= dict(zip(made.plan.examples.tolist(), row.answer(outputs), strict=True))
        return by_id(self.corpus, found, self.scoring.processes)

    def every_pair(self, folder: Path | None = None) -> tuple[pair_scores.Scores, np.ndarray[Any, np.dtype[np.int64]], list[str]]:
        """Scores (texts, pictures), the column of each text's picture, the pictures' keys.

        Args:
            folder: where scores are kept, so that the same command goes on where it was stopped.
        """
        pictures, own = pair_scores.pictures_of(self.corpus)
        with self.scoring.shown(len(self.corpus) * len(pictures), unit="pairs", label="scoring") as scoring:
            scores = self._pairs(scoring, pictures, folder)
        return scores, own, [self.corpus.images.keys_list[row] for row in pictures.tolist()]

    def _pairs(self, scoring: Scoring, pictures: NDArray[np.int32], folder: Path | None) -> pair_scores.Scores:
        pairs = extras(self.task).pairs
        assert pairs is not None

        def of_block(begin: int, end: int) -> pair_scores.Score:
            known = functools.cache(functools.partial(know, scoring, self.corpus, pictures[begin:end]))  # not before it is asked for

            def score(first: int, last: int) -> pair_scores.Scores:
                scores = np.zeros((last - first, end - begin), dtype=np.float32)
                scores[:, known().places_P] = score_pairs(scoring, pairs, self.corpus, range(first, last), known())
                return scores

            return score

        counts = np.asarray(self.corpus.images.region_counts)[pictures]
        return pair_scores.in_slices(
            len(self.corpus), blocks_of(counts, scoring), of_block,
            processes=scoring.processes, folder=folder, sources=pair_scores.sources_of(self.corpus),
            settings=lambda: pair_scores.identity(self.corpus, pictures, self.weights, precision=scoring.precision),
            progress=scoring.progress,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Asked:
    """What is measured, and how."""

    text: Sequence[str]
    images: Sequence[str]
    batch_tokens: int
    workers: int | None
    precision: str | None
    other_detector: bool
    seed: int = 42
    max_text_length: int = -1


def evaluate_finetuned(
    name: str,
    start_from: str,
    *,
    text: Sequence[str],
    images: Sequence[str],
    seed: int = 42,
    batch_tokens: int = 8192,
    max_text_length: int = -1,
    workers: int | None = None,
    device: str | None = None,
    precision: str | None = None,
    scores: Path | None = None,
    other_detector: bool = False,
    strict: bool = False,
) -> dict[str, Any]:
    """The figures of a down-stream model: its loss and metric, and the official ones; how many examples they are of, and how many were
    left out for which reason.

    Retrieval scores every text with every picture; a pre-trained model is evaluated zero-shot.

    Args:
        scores: the folder where retrieval keeps its scores; the same call goes on where it was stopped.
        other_detector: regions of another detector than the model learnt from are meant.
        strict: refuse where an example is left out.
        precision: "fp32" or "bf16"; None: bf16 on a GPU that computes in it, else fp32.
        workers: processes that make batches; None: fitted to the machine.

    Raises:
        BadInput: databases and model do not fit, the model was trained for something else, or no text has a label.
    """
    _check_scores(name, scores)
    asked = Asked(text, images, batch_tokens, workers, precision, other_detector, seed, max_text_length)
    with processes(device) as everyone:
        run = opened(name, start_from, asked, everyone, labels=True)
        left_out = run.corpus.left_out
        if strict:
            refuse_left_out(left_out, len(run.corpus))
        if extras(run.task).pairs is None:
            return {"examples": len(run.corpus), "left_out": left_out, **run.remarked(), **run.measured()}
        matrix, own, keys = run.every_pair(scores)
        figures = retrieval_recalls(matrix, own)
        if len(keys) > 1000 and len(keys) % 5 == 0:
            figures |= {f"five_folds.{key}": value for key, value in fold_recalls(matrix, own).items()}
        return {"texts": len(run.corpus), "pictures": len(keys), "left_out": left_out, **run.remarked(), **figures}


def predict(
    name: str,
    start_from: str,
    out: Path,
    *,
    text: Sequence[str],
    images: Sequence[str],
    answers: Path | None = None,
    batch_tokens: int = 8192,
    workers: int | None = None,
    device: str | None = None,
    precision: str | None = None,
    scores: Path | None = None,
    other_detector: bool = False,
    strict: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write what a model answers as the file that the task's official evaluation takes (retrieval: each side's best ten).

    What was left out is listed beside it, in `OUT.left_out.json`: {reason: [ids]}.

    Args:
        answers: `ans2label.json`, where neither the model nor the texts know the names of the answers.
        scores: as for `evaluate_finetuned`, and the same folder serves both.
        other_detector, strict: as for `evaluate_finetuned`.
        overwrite: replace what is at `out`, once its successor is whole.

    Raises:
        BadInput: as `evaluate_finetuned`, but labels are not needed; or there is something at `out`.
    """
    _check_scores(name, scores)
    _refuse_taken(out, [*text, *images, *([answers] if answers is not None else [])], start_from, overwrite=overwrite)
    if not out.absolute().parent.is_dir():
        raise BadInput(f"{out.absolute().parent} is no folder, so {out.name} cannot be written into it; make it first")
    asked = Asked(text, images, batch_tokens, workers, precision, other_detector)
    with processes(device) as everyone:
        run = opened(name, start_from, asked, everyone, labels=False, answers=answers)
        corpus, write = run.corpus, extras(run.task).write
        if strict:
            refuse_left_out(corpus.left_out, len(corpus))
        if write is None:
            matrix, _, keys = run.every_pair(scores)
            if everyone.writes:
                best = _best(matrix, [corpus.example_id(row) for row in range(len(corpus))], keys)
                write_bytes(out, json.dumps(best).encode())
        else:
            predictions = run.predictions()
            if everyone.writes:
                with written_aside(out) as aside:
                    write(aside, corpus, predictions, run.answers)
        summary: dict[str, Any] = {"task": name, "out": str(out), "examples": len(corpus), "left_out": corpus.left_out} | run.remarked()
        if everyone.writes:
            listed = out.with_name(f"{out.name}.left_out.json")
            if corpus.left_out:
                write_json(listed, corpus.left_out_ids())
                summary["left_out_listed"] = str(listed)
            else:
                listed.unlink(missing_ok=True)  # of an earlier submission of that name
        return summary


def _check_scores(name: str, folder: Path | None) -> None:
    if folder is not None and extras(row_of(name)).pairs is None:
        raise BadInput(f"scores of pairs are kept for retrieval only, and {name} scores none; leave --scores out")


def _refuse_taken(out: Path, data: Sequence[str | Path], start: str, *, overwrite: bool) -> None:
    """BadInput where writing `out` would change a source, or somebody's file that was not said to be replaced."""
    for source in [Path(half) for one in data for half in str(one).split(";")]:
        if source.exists() and out.resolve().is_relative_to(source.resolve()):
            raise BadInput(f"{out} is or lies in the source {source}, and would change it; choose another --out")
    if not out.exists():
        return
    if Path(start).exists() and out.resolve().is_relative_to(Path(start).resolve()):
        raise BadInput(f"{out} is there already, in {start}, of which it may be a part; choose another --out, or remove it yourself")
    if not overwrite:
        raise BadInput(f"{out} is there already; choose another --out, or --overwrite")


def _best(scores: np.ndarray[Any, Any], texts: list[str], pictures: list[str], depth: int = 10) -> dict[str, Any]:
    def ranked(matrix: np.ndarray[Any, Any], asked: list[str], found: list[str]) -> dict[str, list[list[Any]]]:
        order = np.argsort(-matrix, axis=1, kind="stable")[:, :depth]
        return {name: [[found[place], float(matrix[row, place])] for place in order[row].tolist()] for row, name in enumerate(asked)}

    return {"images_of_text": ranked(scores, texts, pictures), "texts_of_image": ranked(scores.T, pictures, texts)}


def opened(name: str, start_from: str, asked: Asked, everyone: Processes, *, labels: bool, answers: Path | None = None) -> Opened:
    """Data and model, once it is known that they belong together.

    Args:
        labels: examples without one count as left out; otherwise they are not looked at.
        answers: the names of the answers, where they are given.
    """
    row = row_of(name)
    own = extras(row)
    if answers is not None and not own.named:
        raise BadInput(f"{name} does not choose among named answers; leave --answers out")
    regions = regions_to_read(asked.images, *regions_of_run(start_from), own.regions)
    corpus = open_corpus(name, asked.text, asked.images, max_text_length=asked.max_text_length, image_options=regions)
    check_pictures(corpus, row, name)
    check_texts(corpus, row, name)
    checkpoint = load(start_from, own.model, answers=answers)
    _check_head(checkpoint, row, name)
    check_detector([corpus], checkpoint.detector, source=start_from, meant=asked.other_detector)
    remarks = remarks_on([corpus], checkpoint.detector, source=start_from)
    check_fit(checkpoint.config, corpus, source=start_from)
    tokenizer_of_texts([corpus], start=start_from)
    if labels:
        corpus = labelled(corpus, row, name)
    sizes = type(checkpoint.model).sizes(checkpoint.model.state_dict())
    task, names = row.of_data(row, corpus, NO_SIZES if labels else sizes), checkpoint.answers
    if (table := answer_table(corpus)) is not None and own.named:
        of_texts = sorted(table, key=lambda answer: table[answer])
        if answers is None and names is not None and list(names) != of_texts:
            raise BadInput(
                f"{start_from} numbers its {len(names):,} answers otherwise than the texts their {len(of_texts):,}; build the texts with "
                "the list of those it was trained on: uniter-build-db --join ans2label.json"
            )
        names = names or of_texts
    wanted = extras(task).sizes
    if any(sizes.get(key) != value for key, value in wanted.items()):
        raise BadInput(
            f"{start_from} knows {sizes}, but the texts {dict(wanted)}; was it trained for {name}, with the same list of answers?"
        )
    scoring = Scoring(
        checkpoint.model.to(everyone.device),
        everyone,
        asked.batch_tokens,
        asked.seed,
        precision=asked.precision or fitting_precision(everyone.device),
        workers=everyone.fitting_workers() if asked.workers is None else asked.workers,
    )
    return Opened(task, corpus, scoring, checkpoint.weights, names, remarks)


def _check_head(checkpoint: Checkpoint, row: Task, name: str) -> None:
    """Raise BadInput unless the checkpoint was trained for the task: a head of random numbers is not measured."""
    source, told, own = checkpoint.source, checkpoint.task, extras(row)
    if told in DOWNSTREAM:
        theirs = extras(DOWNSTREAM[told])
        if theirs.model is not own.model or theirs.texts != own.texts:
            raise BadInput(
                f"{source} was trained for {told}, not for {name}; name {told}, or train it: uniter-train finetune {name} --from"
            )
    fresh = [tensor for tensor in checkpoint.fresh if not tensor.startswith(own.model.unread)]
    if fresh:
        what = "is pre-trained and has no head for" if told == "pretrain" else "lacks what it takes for"
        raise BadInput(
            f"{source} {what} {name} ({', '.join(sorted(fresh)[:2])}{', ...' if len(fresh) > 2 else ''} would be random numbers); "
            f"fine-tune it first: uniter-train finetune {name} --from {source}"
        )
