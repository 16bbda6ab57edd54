"""Which models answer what, and what a checkpoint needs so that photographs are asked with it."""

import logging

from uniter.datasets.errors import BadInput
from uniter.datasets.image_db.origin import RegionOrigin
from uniter.datasets.text_db.tokenizer import Tokenizer
from uniter.model.checkpoints.load import Checkpoint
from uniter.model.heads.classification import UniterForClassification
from uniter.model.heads.downstream import UniterForReferring, UniterForRetrieval, UniterForVqa
from uniter.model.heads.pretraining import UniterForPretraining
from uniter.model.tasks.table import made_by
from uniter.model.understanding.results import Answer, Classification, Grounding, Match, Ranking, Seen

log = logging.getLogger(__name__)

_MATCHING = (UniterForRetrieval, UniterForPretraining), "match texts with photographs"
# Result -> the kinds of models that give it, better ones first, and what that takes in words.
ASKED_FOR: dict[type[Seen], tuple[tuple[type, ...], str]] = {
    Match: _MATCHING,
    Ranking: _MATCHING,
    Answer: ((UniterForVqa,), "answer questions"),
    Grounding: ((UniterForReferring, UniterForPretraining), "point at what a phrase means"),
    Classification: ((UniterForClassification,), "label photographs"),
}


def check_askable(found: Checkpoint) -> None:
    """Raise BadInput unless a checkpoint has a trained head that photographs are asked with, and all that is needed to ask it."""
    asked = {kind for kinds, _ in ASKED_FOR.values() for kind in kinds}
    if type(found.model) not in asked or any(name.startswith("itm_output.") for name in found.fresh):
        raise BadInput(
            f"{found.source} has none of the heads that photographs are asked with (matching, retrieval, VQA, own labels, RefCOCO); "
            f"train it further: {made_by(UniterForPretraining)} or uniter-train finetune"
        )
    if found.tokenizer is None:
        raise BadInput(
            f"{found.source} does not tell its tokenizer ({found.config.vocab_size:,} word pieces, and the texts of its run are not at "
            "hand); name it: a vocabulary file, or the text database it was trained on"
        )
    if isinstance(found.model, UniterForVqa | UniterForClassification) and found.model.answer_count and found.answers is None:
        raise BadInput(f"{found.source} does not tell the names of its {found.model.answer_count:,} answers; give its ans2label.json")


def check_detector(found: Checkpoint, origin: RegionOrigin | None, *, meant: bool) -> None:
    """Raise BadInput where a model is known to have learnt from another detector's regions."""
    if found.detector is not None and origin is not None and found.detector.is_another(origin) and not meant:
        raise BadInput(
            f"{found.source} learnt from the regions of {found.detector}, but these are of {origin}; use its detector, or say that another "
            "one is meant (--other-detector)"
        )
    if found.detector is not None and origin is not None and (differences := found.detector.other_selection_in_words(origin)):
        log.warning("%s learnt from another selection of regions than is shown to it: %s", found.source, differences)
    if found.detector is None or origin is None:
        unknown = found.source if found.detector is None else "the source of regions"
        log.info("%s does not say of which detector its regions are; they are taken to be of one", unknown)


def tokenizer_of(model: Checkpoint) -> Tokenizer:
    """Of a checkpoint that `check_askable` let through."""
    assert model.tokenizer is not None, "a model without one was refused"
    return model.tokenizer
