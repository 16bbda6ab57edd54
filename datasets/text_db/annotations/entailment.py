"""SNLI-VE: `snli_ve_{train,dev,test}.jsonl`, a Flickr30k photograph as the premise and a sentence as the hypothesis.

The label numbers are the published ones. `sentence1`, the caption that SNLI's premise was, is not shown to the model.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from uniter.datasets.errors import BadInput, shown
from uniter.datasets.storage.streams import json_lines
from uniter.datasets.text_db.annotations.fields import no_companions, no_split, text_field
from uniter.datasets.text_db.caption import Caption

LABELS: Final = {"contradiction": 0, "entailment": 1, "neutral": 2}


_IMAGE_FIELDS: Final = ("Flickr30K_ID", "Flikr30kID", "Flickr30kID")  # the authors spelt it in several ways


def read_entailment(path: Path, *, split: str | None, join: Sequence[Path], counts: Counter[str]) -> Iterator[Caption]:
    """The pairs, in order. Pairs whose annotators did not agree (gold label "-") are left out, `counts["without_gold_label"]`.

    Raises:
        BadInput: a line lacks the photograph, the hypothesis, or has another label.
    """
    no_split(path, split, "SNLI-VE")
    no_companions(join, "SNLI-VE")
    for row, (where, entry) in enumerate(json_lines(path)):
        image = next((str(entry[name]) for name in _IMAGE_FIELDS if isinstance(entry.get(name), str | int)), None)
        if image is None:
            raise BadInput(f"{where} has no {_IMAGE_FIELDS[0]}; expected SNLI-VE's snli_ve_*.jsonl")
        label = entry.get("gold_label")
        if label == "-":
            counts["without_gold_label"] += 1
            continue
        fields: dict[str, Any] = {}
        if label is not None:
            if not isinstance(label, str) or label not in LABELS:
                raise BadInput(f"{where} has the gold_label {shown(label)}; expected {', '.join(LABELS)} or -")
            fields = {"gold_label": label, "target": {"labels": [LABELS[label]], "scores": [1.0]}}
        photo = image.removesuffix(".jpg")
        pair = entry.get("pairID")
        example = pair if isinstance(pair, str) and pair else str(row)
        yield Caption(example, f"{photo}.jpg", text_field(entry, "sentence2", where), (("flickr", photo),), fields)


def side_files(paths: Sequence[Path], *, split: str | None, join: Sequence[Path]) -> dict[str, Any]:
    """The labels by number, as UNITER's trainer wants them."""
    return {"ans2label.json": LABELS}
