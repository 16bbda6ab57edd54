"""What a down-stream model answers, as official figures and as the files that the official evaluations take.

Predictions are held by example id: what the row's `answer` says of each. No file here is a pickle.
"""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from uniter.datasets.batches.candidates import candidate_boxes, picture_of, read_pictures
from uniter.datasets.batches.corpus import Corpus
from uniter.datasets.errors import BadInput
from uniter.datasets.storage.files import read_json_object
from uniter.datasets.text_db.annotations.vcr import CHOICES
from uniter.model import metrics

Predictions = Mapping[str, Any]


def answer_table(*corpora: Corpus) -> dict[str, int] | None:
    """The answers of the corpora's texts and their numbers (`ans2label.json`); None where the databases say nothing of them.

    Raises:
        BadInput: two databases number answers differently, or one not from 0 on.
    """
    paths = [text.path / "ans2label.json" for corpus in corpora for text in corpus.texts]
    tables = {path: read_json_object(path) for path in paths if path.is_file()}
    if not tables:
        return None
    (first, known), *others = tables.items()
    for path, table in others:
        if table != known:
            raise BadInput(
                f"{path} numbers its {len(table):,} answers otherwise than {first} its {len(known):,}; "
                f"build both texts with one list of answers: uniter-build-db --join {first}"
            )
    if sorted(known.values()) != list(range(len(known))):
        raise BadInput(f"{first} does not number its answers 0 to {len(known) - 1}")
    return known


def nlvr2_figures(corpus: Corpus, predictions: Predictions) -> dict[str, float]:
    """Accuracy and consistency; of statements whose truth is known."""
    truths = {corpus.example_id(number): bool(corpus.record(number)["target"]) for number in range(len(corpus))}
    return metrics.nlvr2_figures(predictions, truths)


def vcr_figures(corpus: Corpus, predictions: Predictions) -> dict[str, float]:
    """Q->A, QA->R and Q->AR; of questions whose answers are known."""
    labels = np.array([[corpus.record(number)[name] for name in ("qa_target", "qar_target")] for number in range(len(corpus))])
    scores = np.array([predictions[corpus.example_id(number)] for number in range(len(corpus))])
    return metrics.vcr_figures(scores[:, :CHOICES], scores[:, CHOICES:].reshape(-1, CHOICES, CHOICES), labels[:, 0], labels[:, 1])


def write_answers(path: Path, corpus: Corpus, predictions: Predictions, names: Sequence[str] | None) -> None:
    """VQA's result file: a JSON list of {"question_id": int, "answer": str}."""
    rows = [{"question_id": _number(name), "answer": named(best, names)} for name, best in predictions.items()]
    path.write_text(json.dumps(rows), encoding="utf-8")


def write_gqa(path: Path, corpus: Corpus, predictions: Predictions, names: Sequence[str] | None) -> None:
    """GQA's file: a JSON list of {"questionId": str, "prediction": str}."""
    rows = [{"questionId": name, "prediction": named(best, names)} for name, best in predictions.items()]
    path.write_text(json.dumps(rows), encoding="utf-8")


def write_labels(path: Path, corpus: Corpus, predictions: Predictions, names: Sequence[str] | None) -> None:
    """SNLI-VE: a JSON object {example id: label}."""
    path.write_text(json.dumps({name: named(best, names) for name, best in predictions.items()}), encoding="utf-8")


def write_statements(path: Path, corpus: Corpus, predictions: Predictions, names: Sequence[str] | None) -> None:
    """NLVR2's CSV: `identifier,True|False`, no header."""
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows((name, str(bool(holds))) for name, holds in predictions.items())


def write_regions(path: Path, corpus: Corpus, predictions: Predictions, names: Sequence[str] | None) -> None:
    """RefCOCO: a JSON list of {"sent_id", "ref_id", "image_id", "region": its row, "box": [x, y, width, height] in pixels}."""
    pictures = [read_pictures(text) for text in corpus.texts]
    rows = []
    for number in range(len(corpus)):
        record, region = corpus.record(number), int(predictions[corpus.example_id(number)])
        norm_bb = corpus.regions(int(corpus.image_rows_NK[number, 0])).norm_bb[[region]]
        box = candidate_boxes(norm_bb, picture_of(pictures, corpus, number, record).size)[0].tolist()
        rows.append({name: record.get(name) for name in ("sent_id", "ref_id", "image_id")} | {"region": region, "box": box})
    path.write_text(json.dumps(rows), encoding="utf-8")


def write_groundings(path: Path, corpus: Corpus, predictions: Predictions, names: Sequence[str] | None) -> None:
    """Flickr30k Entities: a JSON list of {"id", "image_id", "entity", "region": its row, "box": [x, y, width, height] in pixels}."""
    rows = []
    for number in range(len(corpus)):
        record, region = corpus.record(number), int(predictions[corpus.example_id(number)])
        norm_bb = corpus.regions(int(corpus.image_rows_NK[number, 0])).norm_bb[[region]]
        box = candidate_boxes(norm_bb, tuple(record["size"]))[0].tolist()
        told = {name: record.get(name) for name in ("image_id", "entity")}
        rows.append({"id": corpus.example_id(number), **told, "region": region, "box": box})
    path.write_text(json.dumps(rows), encoding="utf-8")


def write_choices(path: Path, corpus: Corpus, predictions: Predictions, names: Sequence[str] | None) -> None:
    """VCR's CSV: the scores of each question's answers, and of its rationales with each answer, by the number in "test-N"."""
    numbers = range(CHOICES)
    columns = [f"answer_{answer}" for answer in numbers]
    columns += [f"rationale_conditioned_on_a{answer}_{rationale}" for answer in numbers for rationale in numbers]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["annot_id", *columns])
        for name in sorted(predictions, key=_place_in_part):
            writer.writerow([name, *predictions[name]])


def _place_in_part(name: str) -> tuple[str, int, str]:
    part, _, number = name.rpartition("-")
    return (part, int(number), "") if number.isdigit() else (part, -1, number)


def _number(name: str) -> int | str:
    return int(name) if name.isdigit() else name


def named(number: int, names: Sequence[str] | None) -> str:
    """The name of an answer.

    Raises:
        BadInput: nobody knows it.
    """
    if names is None:
        raise BadInput("the answers' names are not known: neither the model nor the text database has them; give --answers ans2label.json")
    if number >= len(names):
        raise BadInput(
            f"the model answers number {number}, but only {len(names)} answers have names; give its own ans2label.json (--answers)"
        )
    return names[number]
