"""Pre-training: its data, its model and its tasks.

VCR's second stage is pre-training, too: a corpus of VCR's texts with "gt;det" regions, from a pre-trained run. Its texts are question,
right answer and right rationale end to end; its tasks are MLM, MRFR and MRC-KL. Differs from the published code, which cannot be imported
and meant to train on question and answer alone as well, but overwrote those loaders by the longer ones; like it, only the longer
are trained, and they contain the others.
"""

import dataclasses
import itertools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from uniter.datasets.batches.corpus import Corpus, open_corpus, vocabulary_of
from uniter.datasets.batches.example import Example
from uniter.datasets.batches.plans import Mixture, Part
from uniter.datasets.errors import BadInput
from uniter.datasets.text_db.annotations.vcr import TAG_WORDS
from uniter.model.checkpoints.beside import infer_config
from uniter.model.checkpoints.grow import load_state, second_stage
from uniter.model.checkpoints.read import find_weights, read_state
from uniter.model.heads.downstream import VCR_TOKEN_TYPES
from uniter.model.heads.pretraining import UniterForPretraining
from uniter.model.settings.settings import DEFAULT_TASK, CorpusSettings, TrainSettings
from uniter.model.tasks.rows import LONGEST_CHOICE
from uniter.model.tasks.table import DEFAULT_PRETRAINING, PRETRAINING, check_soft_labels, default_tasks, pretraining_task, task_name
from uniter.model.tasks.task import Task
from uniter.model.train.defaults import complete
from uniter.model.train.fit import check_budget, check_classes, check_shown, check_vocabulary, in_words, is_second_stage, that_fit
from uniter.model.train.runs import begun, learn
from uniter.model.train.work import Data, Work, with_validation
from uniter.model.uniter import UniterConfig, set_dropout

logger = logging.getLogger(__name__)

LENGTHS_OF_CHOICES = "id2len_qar.json"  # VCR's text databases have it, ours and the published ones, and no others


def pretrain(settings: TrainSettings, run: str | Path) -> dict[str, Any]:
    """Start a pre-training run in the folder `run`, or go on with the one that is there; see `runs.begun` and `runs.learn`."""
    if settings.task != DEFAULT_TASK:
        raise BadInput(f"these settings are of the task {settings.task!r}; use uniter-train finetune {settings.task}")
    texts = [Path(text) for corpus in settings.corpora for text in corpus.text]
    if "max_text_length" not in settings.model_fields_set and any((text / LENGTHS_OF_CHOICES).is_file() for text in texts):
        settings = settings.model_copy(update={"max_text_length": LONGEST_CHOICE})
    with begun(settings, Path(run)) as start:
        data = open_data(start.settings)
        settings = complete(start.settings, *data.size(), start.everyone)
        if start.earlier is None:
            check_budget(settings.batch_tokens, data.training.values())
        detector, tokenizer = start.detector(data), start.tokenizer(data)
        model = build_model(settings, data)
        data = that_fit(data, model)
        work = Work(settings, data, model, *build_mixture(settings, data), validation_parts(settings, data))
        return learn(start, work, tokenizer=tokenizer, detector=detector)


def open_data(settings: TrainSettings) -> Data:
    """Open the corpora and hold out pictures for validation where no validation database is given."""
    options = {**settings.regions.model_dump(), "readahead": settings.readahead}
    training: dict[str, Corpus] = {}
    validation: dict[str, Corpus] = {}
    tasks: dict[str, dict[str, float]] = {}
    for wanted in settings.corpora:
        corpus = open_corpus(wanted.name, wanted.text, wanted.images, max_text_length=settings.max_text_length, image_options=options)
        check_shown(corpus)
        tasks[wanted.name] = _tasks_of(wanted, corpus)
        training[wanted.name], validation[wanted.name] = with_validation(wanted, corpus, settings, options)
        if corpus.left_out:
            logger.info("corpus %s: left out %s", wanted.name, in_words(corpus.left_out))
    widths = {name: corpus.images.feature_width for name, corpus in training.items()}
    if len(set(widths.values())) > 1:
        raise BadInput(f"the corpora's region features differ in width ({widths}); extract all with one detector")
    return Data(training, validation, tasks)


def _tasks_of(wanted: CorpusSettings, corpus: Corpus) -> dict[str, float]:
    if wanted.tasks is not None:
        named = {task_name(name): ratio for name, ratio in wanted.tasks.items()}
        check_soft_labels(list(named), wanted.name, has_soft_labels=corpus.has_soft_labels)
        shown = [name for name in named if PRETRAINING[name].shows_other_pictures]
        if shown and is_second_stage(corpus):
            *others, last = (name for name, row in PRETRAINING.items() if not row.shows_other_pictures)
            raise BadInput(f"corpus {wanted.name!r}: VCR's second stage has no task {shown[0]}; it takes {', '.join(others)} and {last}")
        return named
    tasks = default_tasks(has_soft_labels=corpus.has_soft_labels, pictures=corpus.image_rows_NK.shape[1])
    if without := [name for name in DEFAULT_PRETRAINING if PRETRAINING[name].needs_soft_labels and name not in tasks]:
        logger.warning("corpus %s: its region databases hold no soft labels, so %s is left out", wanted.name, ", ".join(without))
    for name in [name for name in tasks if PRETRAINING[name].shows_other_pictures]:
        if len(set(corpus.image_rows_NK[:, 0].tolist())) < 4:
            logger.warning("corpus %s: %s needs other pictures to show and is left out", wanted.name, name)
            del tasks[name]
    return tasks


def build_model(settings: TrainSettings, data: Data) -> UniterForPretraining:
    """The model in training mode on the CPU: of `from`, or new, its random numbers decided by the seed."""
    corpora = list(data.training.values())
    width = corpora[0].images.feature_width
    classes = max(corpus.images.label_classes for corpus in corpora)
    vocabulary, second = max(map(vocabulary_of, corpora)), any(map(is_second_stage, corpora))
    torch.manual_seed(settings.seed)
    if settings.from_ is None:
        overrides: dict[str, Any] = {"vocab_size": vocabulary, **settings.model.overrides(), "image_feature_size": width}
        if second:
            overrides["type_vocab_size"] = len(VCR_TOKEN_TYPES)
        if classes:
            overrides["label_classes"] = classes
        config = UniterConfig.preset(settings.model.size or "tiny", **overrides)
        check_vocabulary(config, vocabulary)
        model = UniterForPretraining(config)
        begin_at_averages(model, corpora)
    else:
        source = find_weights(settings.from_)
        weights = read_state(source)
        config = infer_config(weights, beside=source)
        # BERT knows no regions: those parts are new and take the sizes of the databases.
        if "uniter.img_embeddings.img_linear.weight" not in weights:
            config = dataclasses.replace(config, image_feature_size=width)
        if "region_classifier.net.3.weight" not in weights and classes:
            config = dataclasses.replace(config, label_classes=classes)
        check_vocabulary(config, vocabulary, tags=len(TAG_WORDS) if second else 0)
        if second:
            model = second_stage(weights, config, extra_words=max(vocabulary - config.vocab_size, 0), source=settings.from_)
        else:
            model = UniterForPretraining(config)
            load_state(model, weights, source=settings.from_)
    if config.image_feature_size != width:
        raise BadInput(
            f"region features are {width} wide, but {settings.from_} was trained on {config.image_feature_size}; use its detector"
        )
    of_classes = sorted({name for tasks in data.tasks.values() for name in tasks if PRETRAINING[name].needs_soft_labels})
    if of_classes:
        check_classes(config, corpora, tasks=of_classes)
    if settings.dropout is not None:
        set_dropout(model, settings.dropout)
    return model.train()


@torch.no_grad()
def begin_at_averages(model: UniterForPretraining, corpora: Sequence[Corpus], *, texts: int = 20_000, pictures: int = 500) -> None:
    """Let a new model's heads answer the averages of the data before they know anything, by their biases alone.

    A small model would otherwise spend a third of its updates on finding out which words and classes occur at all.

    Args:
        model: its word, class and feature biases are set.
        corpora: what it will be trained on.
        texts, pictures: the averages are over so many of each corpus, evenly spaced.
    """
    config = model.config
    words = np.full(config.vocab_size, 0.05)
    features, distributions = np.zeros(config.image_feature_size), np.zeros(config.label_classes)
    regions = classified = 0
    for corpus in corpora:
        for number in _spread(len(corpus), texts):
            np.add.at(words, list(itertools.chain.from_iterable(Example(corpus, number, ()).read().told())), 1)
        own = np.unique(corpus.image_rows_NK)
        fields = ("features", "norm_bb", "soft_labels") if corpus.has_soft_labels else ("features", "norm_bb")
        for row in own[_spread(len(own), pictures)].tolist():
            record = corpus.regions(row, fields=fields)
            features += record.features.sum(axis=0, dtype=np.float64)
            regions += len(record)
            if record.soft_labels is not None and record.soft_labels.shape[1] == config.label_classes:
                distributions += record.soft_labels.sum(axis=0, dtype=np.float64)
                classified += len(record)
    model.cls.predictions.bias.copy_(torch.from_numpy(np.log(words / words.mean())))
    mean = torch.from_numpy(features / max(regions, 1)).float()
    model.feat_regress.bias.copy_(mean)
    # Regions are then told apart by how they differ from the mean region, which is otherwise most of what each of them says.
    projection = model.uniter.img_embeddings.img_linear
    projection.bias.copy_(-(projection.weight @ mean))
    if classified:
        last = model.region_classifier.net[-1].bias
        assert isinstance(last, torch.Tensor)
        last.copy_(torch.from_numpy(np.log(np.maximum(distributions / classified, 1e-6))))


def _spread(length: int, most: int) -> NDArray[np.int64]:
    """At most `most` numbers below `length`, evenly spaced."""
    return np.unique(np.linspace(0, length - 1, min(length, most)).astype(np.int64))


def build_mixture(settings: TrainSettings, data: Data) -> tuple[list[Task], Mixture]:
    """The parts in the order of the settings, and their tasks."""
    tasks: list[Task] = []
    parts: list[Part] = []
    for corpus_name, ratios in data.tasks.items():
        for name, ratio in ratios.items():
            task = pretraining_task(name, alignment_weight=settings.alignment_weight)
            tasks.append(task)
            parts.append(_part(name, corpus_name, task, data.training[corpus_name], settings, ratio))
    mixture = Mixture(parts, budget=settings.batch_tokens or 1, seed=settings.seed, bucket=settings.bucket, ordering=settings.ordering)
    return tasks, mixture


def _part(name: str, corpus_name: str, task: Task, corpus: Corpus, settings: TrainSettings, ratio: float = 1.0) -> Part:
    negative = settings.negative_probability if task.shows_other_pictures else 0.0
    return Part(f"{name}_{corpus_name}", corpus, task.sample, ratio, negative)


def validation_parts(settings: TrainSettings, data: Data) -> list[tuple[Task, Part]]:
    """What is validated: each task of each corpus on its held-out examples, those that lack soft labels left out."""
    found = []
    for corpus_name, ratios in data.tasks.items():
        corpus = data.validation[corpus_name]
        for name in ratios:
            task = pretraining_task(name, alignment_weight=settings.alignment_weight)
            if task.needs_soft_labels and not corpus.has_soft_labels:
                continue
            if task.shows_other_pictures and len(set(corpus.image_rows_NK[:, 0].tolist())) < 2:
                continue
            found.append((task, _part(name, corpus_name, task, corpus, settings)))
    return found
