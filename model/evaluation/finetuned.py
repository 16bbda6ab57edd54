"""The figures and the predictions of a fine-tuned model."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from uniter.datasets.batches.corpus import Corpus, open_corpus
from uniter.datasets.batches.loader import MicroBatch
from uniter.datasets.batches.masking import Pairing
from uniter.datasets.batches.plans import Part
from uniter.datasets.batches.pretraining import matched_pair
from uniter.datasets.errors import BadInput
from uniter.datasets.storage.files import read_json_object
from uniter.model.checkpoints.beside import told_beside
from uniter.model.checkpoints.load import load_downstream
from uniter.model.checkpoints.read import find_weights
from uniter.model.evaluation import pair_scores
from uniter.model.heads.pretraining import Outputs
from uniter.model.metrics import fold_recalls, retrieval_recalls
from uniter.model.tasks.predictions import answer_table
from uniter.model.tasks.table import row_of
from uniter.model.tasks.task import Task, extras
from uniter.model.train.distributed import Processes, processes
from uniter.model.train.fit import (
    check_detector,
    check_fit,
    check_pictures,
    origin_of_start,
    regions_of_run,
    regions_to_read,
    tokenizer_of_texts,
)
from uniter.model.train.scoring import Scoring, validate


@dataclass(frozen=True, slots=True)
class _Opened:
    task: Task
    corpus: Corpus
    scoring: Scoring
    weights: Path

    def measured(self) -> dict[str, Any]:
        """Loss, metrics and official figures; what was predicted on the way is not computed again."""
        row, found = extras(self.task), dict[int, Any]()

        def note(made: MicroBatch, outputs: Outputs) -> None:
            if row.figures is not None and row.predicted is None:
                self._note(found, made, outputs)

        part = Part("evaluation", self.corpus, self.task.sample, lengths=self.task.lengths)
        figures: dict[str, Any] = validate(self.scoring, self.task, part, note=note)
        if row.figures is not None:
            figures |= row.figures(self.corpus, self._by_id(found) if row.predicted is None else self.predictions())
        return figures

    def predictions(self) -> dict[str, Any]:
        """What the model says of every example, in corpus order."""
        row, found = extras(self.task), dict[int, Any]()
        part = Part("predictions", self.corpus, row.predicted or self.task.sample, lengths=row.predicted_lengths or self.task.lengths)
        for made, _, outputs in self.scoring.scored(part, self.task.head):
            self._note(found, made, outputs)
        return self._by_id(found)

    def _note(self, found: dict[int, Any], made: MicroBatch, outputs: Outputs) -> None:
        found |= dict(zip(made.plan.examples.tolist(), extras(self.task).answer(outputs), strict=True))

    def _by_id(self, found: dict[int, Any]) -> dict[str, Any]:
        """The answers of all processes by example id, in corpus order."""
        everything = {number: answer for one in self.scoring.processes.gather(found) for number, answer in one.items()}
        return {self.corpus.example_id(number): everything[number] for number in range(len(self.corpus))}

    def every_pair(self, folder: Path | None = None) -> tuple[pair_scores.Scores, np.ndarray[Any, np.dtype[np.int64]], list[str]]:
        """Scores (texts, pictures), the column of each text's picture, the pictures' keys.

        Args:
            folder: where scores are kept, so that the same command goes on where it was stopped.
        """
        pictures, own = pair_scores.pictures_of(self.corpus)

        def score(first: int, end: int) -> pair_scores.Scores:
            scores = np.zeros((end - first, len(pictures)), dtype=np.float32)
            part = Part(f"pairs {first}", self.corpus.take(np.repeat(np.arange(first, end), len(pictures))), matched_pair)
            shown = np.tile(pictures, end - first)[:, None]
            pairs, pairing = extras(self.task).pairs, Pairing(shown, np.ones(len(shown), dtype=np.bool_))
            assert pairs is not None
            for made, _, outputs in self.scoring.scored(part, pairs, pairing=pairing):
                text, picture = np.divmod(made.plan.examples, len(pictures))
                scores[text, picture] = outputs["scores"].float().squeeze(1).cpu().numpy()
            return scores

        scores = pair_scores.in_slices(
            len(self.corpus), len(pictures), score, processes=self.scoring.processes, folder=folder,
            settings=lambda: pair_scores.identity(self.corpus, pictures, self.weights, precision=self.scoring.precision),
        )  # fmt: skip
        return scores, own, [self.corpus.images.keys_list[row] for row in pictures.tolist()]


def evaluate_finetuned(
    name: str,
    start_from: str,
    *,
    text: Sequence[str],
    images: Sequence[str],
    seed: int = 42,
    batch_tokens: int = 8192,
    max_text_length: int = -1,
    workers: int = 0,
    device: str | None = None,
    precision: str = "fp32",
    scores: Path | None = None,
    other_detector: bool = False,
) -> dict[str, Any]:
    """The figures of a down-stream model: its loss and metric, and the official ones.

    Retrieval scores every text with every picture; a pre-trained model is evaluated zero-shot.

    Args:
        scores: the folder where retrieval keeps its scores; the same call goes on where it was stopped.
        other_detector: regions of another detector than the model learnt from are meant.
    """
    _check_scores(name, scores)
    with processes(device) as everyone:
        run = _open(name, start_from, text, images, everyone, batch_tokens, seed, max_text_length, precision, workers, other_detector)
        if extras(run.task).pairs is not None:
            matrix, own, keys = run.every_pair(scores)
            figures = retrieval_recalls(matrix, own)
            if len(keys) > 1000 and len(keys) % 5 == 0:
                figures |= {f"five_folds.{key}": value for key, value in fold_recalls(matrix, own).items()}
            return {"texts": len(run.corpus), "pictures": len(keys), **figures}
        return {"examples": len(run.corpus), **run.measured()}


def predict(
    name: str,
    start_from: str,
    out: Path,
    *,
    text: Sequence[str],
    images: Sequence[str],
    answers: Path | None = None,
    batch_tokens: int = 8192,
    workers: int = 0,
    device: str | None = None,
    precision: str = "fp32",
    scores: Path | None = None,
    other_detector: bool = False,
) -> dict[str, Any]:
    """Write what a model answers as the file that the task's official evaluation takes (retrieval: each side's best ten).

    Args:
        answers: `ans2label.json`, where neither the model nor the texts know the names of the answers.
        scores: as for `evaluate_finetuned`, and the same folder serves both.
        other_detector: as for `evaluate_finetuned`.
    """
    _check_scores(name, scores)
    with processes(device) as everyone:
        run = _open(name, start_from, text, images, everyone, batch_tokens, 42, -1, precision, workers, other_detector)
        if extras(run.task).pairs is not None:
            matrix, _, keys = run.every_pair(scores)
            if everyone.writes:
                out.write_text(json.dumps(_best(matrix, [run.corpus.example_id(row) for row in range(len(run.corpus))], keys)))
        else:
            predictions, names = run.predictions(), _names(start_from, run.corpus, answers)
            write = extras(run.task).write
            if everyone.writes and write is not None:
                write(out, run.corpus, predictions, names)
        return {"task": name, "out": str(out), "examples": len(run.corpus)}


def _check_scores(name: str, folder: Path | None) -> None:
    if folder is not None and extras(row_of(name)).pairs is None:
        raise BadInput(f"scores of pairs are kept for retrieval only, and {name} scores none; leave --scores out")


def _best(scores: np.ndarray[Any, Any], texts: list[str], pictures: list[str], depth: int = 10) -> dict[str, Any]:
    def ranked(matrix: np.ndarray[Any, Any], asked: list[str], found: list[str]) -> dict[str, list[list[Any]]]:
        order = np.argsort(-matrix, axis=1, kind="stable")[:, :depth]
        return {name: [[found[place], float(matrix[row, place])] for place in order[row].tolist()] for row, name in enumerate(asked)}

    return {"images_of_text": ranked(scores, texts, pictures), "texts_of_image": ranked(scores.T, pictures, texts)}


def _names(start_from: str, corpus: Corpus, given: Path | None) -> list[str] | None:
    """The answers by number: the given table, the model's own, or the texts'."""
    if given is not None:
        table = read_json_object(given)
        return sorted(table, key=lambda answer: int(table[answer]))
    known = told_beside(find_weights(start_from)).get("answers")
    if isinstance(known, list):
        return [str(answer) for answer in known]
    of_texts = answer_table(corpus)
    return None if of_texts is None else sorted(of_texts, key=lambda answer: of_texts[answer])


def _open(
    name: str,
    start_from: str,
    text: Sequence[str],
    images: Sequence[str],
    everyone: Processes,
    batch_tokens: int,
    seed: int,
    max_text_length: int,
    precision: str,
    workers: int,
    other_detector: bool,
) -> _Opened:
    row = row_of(name)
    regions = regions_to_read(images, *regions_of_run(start_from), extras(row).regions)
    corpus = open_corpus(name, text, images, max_text_length=max_text_length, image_options=regions)
    check_pictures(corpus, row, name)
    check_detector([corpus], origin_of_start(start_from), source=start_from, meant=other_detector)
    model = load_downstream(extras(row).model, start_from).to(everyone.device)
    check_fit(model.config, corpus, source=start_from)
    tokenizer_of_texts([corpus], start=start_from)
    of_model, of_texts = told_beside(find_weights(start_from)).get("answers"), answer_table(corpus)
    if of_model and of_texts and of_model != sorted(of_texts, key=lambda answer: of_texts[answer]):
        raise BadInput(
            f"{start_from} numbers its {len(of_model):,} answers otherwise than the texts their {len(of_texts):,}; build the texts with "
            "the list of those it was trained on: uniter-build-db --join ans2label.json"
        )
    sizes = type(model).sizes(model.state_dict())
    task = row.of_data(row, corpus)
    wanted = extras(task).sizes
    if any(sizes.get(key) != value for key, value in wanted.items()):
        raise BadInput(
            f"{start_from} knows {sizes}, but the texts {dict(wanted)}; was it trained for {name}, with the same list of answers?"
        )
    scoring = Scoring(model, everyone, batch_tokens, seed, precision=precision, workers=workers)
    return _Opened(task, corpus, scoring, find_weights(start_from))
