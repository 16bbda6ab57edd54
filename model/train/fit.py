"""Does what was given belong together: texts, regions, tokenizer, checkpoint?"""

import contextlib
import dataclasses
import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from uniter.datasets.batches.corpus import Corpus, check_both_kinds, special_tokens, tells_choices, vocabulary_of
from uniter.datasets.errors import BadInput
from uniter.datasets.image_db.database import open_image_dbs
from uniter.datasets.image_db.origin import RegionOrigin, origins_of
from uniter.datasets.text_db.tokenizer import ON_BOARD, Tokenizer
from uniter.datasets.text_db.vocabulary_files import VOCABULARY_FILE
from uniter.model.checkpoints.beside import DETECTOR, tokenizer_beside, told_beside
from uniter.model.checkpoints.read import find_weights
from uniter.model.settings.files import run_of
from uniter.model.tasks.task import Task, extras
from uniter.model.train.work import Data
from uniter.model.uniter import UniterConfig

logger = logging.getLogger(__name__)


def check_texts(corpus: Corpus, row: Task, name: str) -> None:
    """Raise BadInput where a text database says that it was built for another task."""
    for text in corpus.texts:
        stated = (text.header or {}).get("settings", {}).get("task")
        if isinstance(stated, str) and stated not in extras(row).texts:
            what = "captions, which have no labels" if stated == "captions" else f"the texts of {stated}"
            raise BadInput(f"{text.path} holds {what}; {name} takes those that uniter-build-db --task {extras(row).texts[0]} makes")


def labelled(corpus: Corpus, row: Task, name: str) -> Corpus:
    """The examples whose right answer is known; the others count as left out.

    Raises:
        BadInput: none has one.
    """
    known = extras(row).known
    if known is None:
        return corpus
    unknown_N = np.fromiter((not known(corpus.record(number)) for number in range(len(corpus))), np.bool_, len(corpus))
    if unknown_N.all():
        raise BadInput(
            f"corpus {corpus.name!r}: none of its {len(corpus):,} texts has a label, so there is nothing to learn or to measure; join the "
            f"annotations when the texts are built (uniter-build-db --task {extras(row).texts[0]}); of a test part, "
            f"uniter-train predict {name} writes the submission"
        )
    return corpus.without(unknown_N, "without a label")


def in_words(left_out: Mapping[str, int]) -> str:
    """What was left out, as a sentence says it."""
    return ", ".join(f"{count:,} {reason}" for reason, count in left_out.items())


def refuse_left_out(left_out: Mapping[str, int], examples: int) -> None:
    """Raise BadInput where something was left out (`--strict`)."""
    if left_out:
        missing = sum(left_out.values())
        raise BadInput(
            f"{missing:,} of {missing + examples:,} examples would be left out ({in_words(left_out)}), which --strict refuses; extract the "
            "regions of all pictures, or leave --strict out"
        )


def check_pictures(corpus: Corpus, row: Task, name: str) -> None:
    """Raise BadInput unless the texts are about as many pictures each as the task takes."""
    found = corpus.image_rows_NK.shape[1]
    if found != row.pictures:
        raise BadInput(
            f"corpus {corpus.name!r}: its texts are about {found} pictures each, {name} takes {row.pictures}; was it built for {name}?"
        )


def check_shown(corpus: Corpus) -> None:
    """Raise BadInput unless the texts are about one picture each, or VCR's with its two kinds of regions."""
    if is_second_stage(corpus):
        check_both_kinds(corpus)
    elif corpus.image_rows_NK.shape[1] != 1:
        raise BadInput(
            f"corpus {corpus.name!r}: its texts are about {corpus.image_rows_NK.shape[1]} pictures each; pre-training takes texts about "
            "one picture, or VCR's with --images 'gt;det'"
        )


def is_second_stage(corpus: Corpus) -> bool:
    """Whether pre-training on it is VCR's second stage."""
    return corpus.image_rows_NK.shape[1] == 2 and all(tells_choices(text) for text in corpus.texts)


def check_vocabulary(config: UniterConfig, vocabulary: int, *, tags: int = 0) -> None:
    """Raise BadInput unless the texts' word pieces are the model's, `tags` more at most."""
    if config.vocab_size + tags < vocabulary:
        more = f" and can take {tags} object tags more" if tags else ""
        raise BadInput(
            f"the texts were built with {vocabulary:,} word pieces, but the model has {config.vocab_size:,}{more}; use its tokenizer"
        )


def that_fit(data: Data, model: nn.Module) -> Data:
    """The data without validation texts that are longer than the model's positions.

    Raises:
        BadInput: a text to train on is, or all validation texts are; better now than in the middle of the run.
    """
    config = getattr(model, "config", None)
    assert isinstance(config, UniterConfig)
    positions = config.max_position_embeddings
    for corpus in data.training.values():
        longest, most = int(corpus.text_lengths_N.max()), positions - special_tokens(corpus)
        if longest > most:
            raise BadInput(
                f"a text of {longest} word pieces does not fit the model's {positions} positions; "
                f"set max_text_length to {most} or less, which leaves longer ones out"
            )
    validation = {}
    for name, corpus in data.validation.items():
        fitting = np.flatnonzero(corpus.text_lengths_N <= positions - special_tokens(corpus))
        if not len(fitting):
            raise BadInput(f"corpus {name!r}: all validation texts are longer than the model's {positions} positions; give shorter ones")
        if len(fitting) < len(corpus):
            logger.warning(
                "corpus %s: %d validation texts are longer than the model's positions and left out", name, len(corpus) - len(fitting)
            )
        validation[name] = corpus.take(fitting)
    return dataclasses.replace(data, validation=validation)


def tokenizer_of_texts(corpora: Iterable[Corpus], *, start: str | None = None) -> Tokenizer | None:
    """What the texts were tokenised with; None where they do not tell (published databases that name another than BERT-cased).

    Args:
        corpora: must agree; one may have words of a task behind the others' vocabulary.
        start: the checkpoint that will read them, which must agree as well where it tells its vocabulary.

    Raises:
        BadInput: two of them differ: the numbers of the word pieces would mean different words.
    """
    own: dict[str, Tokenizer] = {}
    # Each database once: held-out texts are in that of those that are trained on.
    for path, text in {text.path: text for corpus in corpora for text in corpus.texts}.items():
        if (path / VOCABULARY_FILE).is_file():
            own[str(path)] = Tokenizer.load(path)
        elif text.tokenizer_name in ON_BOARD:
            own[str(path)] = Tokenizer.load(text.tokenizer_name)
    if start is not None and (of_start := tokenizer_beside(find_weights(start))) is not None:
        own[start] = of_start
    names = sorted(own, key=lambda name: own[name].vocab_size)
    for smaller, larger in itertools.pairwise(names):
        one, other = own[smaller], own[larger]
        if one.vocabulary != other.vocabulary[: len(one.vocabulary)] or one.lowercase != other.lowercase:
            raise BadInput(
                f"{smaller} has other word pieces ({one.name}, {one.vocab_size:,}) than {larger} ({other.name}, {other.vocab_size:,}); "
                f"build the texts with one tokeniser: uniter-build-db --tokenizer {larger if start is None else find_weights(start).parent}"
            )
    return own[names[-1]] if names else None


def regions_to_read(images: Sequence[str], *preferred: Mapping[str, Any]) -> dict[str, Any]:
    """Which rows are taken from published region databases: the first selection that all of them have, else the reader's own.

    Ours hold their selection, so that any fits.
    """
    for selection in preferred:
        with contextlib.suppress(BadInput):
            open_image_dbs(list(images), **selection)
            return dict(selection)
    return {}


def regions_of_run(start: str) -> list[dict[str, Any]]:
    """The rows that a run was trained with; none where `start` is no run, nor one of its checkpoints."""
    found = run_of(find_weights(start)) if Path(start).exists() else None  # what is not here may be on the hub: no run
    return [] if found is None else [found[1].regions.model_dump()]


def check_fit(config: UniterConfig, corpus: Corpus, *, source: str) -> None:
    """Raise BadInput unless a model of these sizes can read the corpus."""
    width, vocabulary = corpus.images.feature_width, vocabulary_of(corpus)
    if config.image_feature_size != width:
        raise BadInput(f"region features are {width} wide, but {source} was trained on {config.image_feature_size}; use its detector")
    if config.vocab_size < vocabulary:
        raise BadInput(f"the texts were built with {vocabulary:,} word pieces, but {source} has {config.vocab_size:,}; use its tokenizer")


def check_classes(config: UniterConfig, corpora: Iterable[Corpus], *, tasks: Sequence[str] = ()) -> None:
    """Raise BadInput where regions have soft labels over other classes than the model predicts.

    Args:
        tasks: of classes, which could be left out.
    """
    found = sorted({corpus.images.label_classes for corpus in corpora} - {0, config.label_classes})
    if found:
        way = f", or leave {' and '.join(tasks)} out of the tasks" if tasks else ""
        raise BadInput(f"the region databases have {found} detector classes, the model {config.label_classes}; use its detector{way}")


def check_budget(budget: int | None, corpora: Iterable[Corpus]) -> None:
    """Raise BadInput where no example fits a batch: each would be one by itself, and the run would be planned for nothing."""
    shortest = min(int(corpus.lengths.min()) for corpus in corpora)
    if budget is not None and budget < shortest:
        raise BadInput(
            f"batch_tokens: {budget} word pieces and regions hold no example: the shortest has {shortest}; set it to some thousand, "
            "or leave it out"
        )


def origin_of_start(start: str) -> RegionOrigin | None:
    """Whose regions a checkpoint learnt from; None where it does not say."""
    return RegionOrigin.from_dict(told_beside(find_weights(start)).get(DETECTOR))


def has_seen_regions(start: str) -> bool:
    """Whether a checkpoint is no plain BERT, as its configuration says."""
    return told_beside(find_weights(start)).get("model_type") != "bert"


LOOKED_AT = 256  # pictures of a corpus, to see whether their regions have places


def remarks_on(corpora: Iterable[Corpus], known: RegionOrigin | None, *, source: str | None) -> list[str]:
    """What is no error and has to be known of the regions; it is logged, and stands in the result.

    Another selection of the same detector is not refused: a region's numbers do not depend on which others are kept, and published sets of
    36 and of 10 to 100 regions are used side by side. Yet a figure differs with it.

    Args:
        known: whose regions `source` learnt from, as far as it says.
        source: a checkpoint or run, for messages; None where there is none.
    """
    corpora = list(corpora)
    remarks: list[str] = []
    found = [RegionOrigin.of_header(header) for corpus in corpora for header in corpus.images.headers]
    for origin in found:
        if known is None or origin is None or known.is_another(origin):
            continue
        if differences := known.other_selection_in_words(origin):
            remarks.append(f"{source} learnt from another selection of the regions of {origin}: {differences}")
    for corpus in corpora:
        missing, looked_at, pictures = corpus.without_positions(LOOKED_AT)
        if missing:
            of = f"{looked_at:,} images" if looked_at == pictures else f"{looked_at:,} images looked at (of {pictures:,})"
            remarks.append(
                f"corpus {corpus.name!r}: {missing:,} of {of} have no boxes, since what they were converted from does not say where "
                "regions are; the model reads zeros for their positions"
            )
    remarks = list(dict.fromkeys(remarks))
    for remark in remarks:
        logger.warning("%s", remark)
    return remarks


def check_detector(
    corpora: Iterable[Corpus], known: RegionOrigin | None, *, source: str | None, meant: bool | None = False
) -> RegionOrigin | None:
    """Whose regions the corpora hold; None where they do not say, or are several detectors' and that is meant.

    Args:
        known: whose regions `source` learnt from, as far as it says.
        source: a checkpoint, a run or settings, for messages; None where there is none.
        meant: other detectors are meant.

    Raises:
        BadInput: they are known to be of another detector than the source, or of several.
    """
    found = origins_of([corpus.images for corpus in corpora])
    if len(found) > 1 and not meant:
        raise BadInput(
            f"the region databases are of several detectors: {found[0]} and {found[1]}; extract all with one, or say that it is meant "
            "(--other-detector)"
        )
    for origin in found:
        if known is not None and origin.is_another(known):
            if not meant:
                raise BadInput(
                    f"{source} learnt from the regions of {known}, but these are of {origin}; use its detector, or say that another one is "
                    "meant (--other-detector)"
                )
            logger.warning("%s learnt from the regions of %s, and these are of %s, as was meant", source, known, origin)
    if source is not None and (known is None or not found):
        what = f"{source} does not say whose regions it learnt from" if known is None else "the region databases do not say whose they are"
        logger.info("%s; they are taken to be of one detector", what)
    return found[0] if len(found) == 1 else None
