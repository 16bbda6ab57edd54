"""Fine-tuning: the data, the model and the mixture of a row of the down-stream table."""

import logging
from pathlib import Path
from typing import Any

import torch

from uniter.datasets.batches.corpus import Corpus, open_corpus
from uniter.datasets.batches.plans import Mixture, Part
from uniter.datasets.errors import BadInput
from uniter.model.checkpoints.load import load_downstream
from uniter.model.heads.downstream import DownstreamModel
from uniter.model.settings.settings import RegionSettings, TrainSettings
from uniter.model.tasks.predictions import answer_table
from uniter.model.tasks.table import DOWNSTREAM, row_of, task_name
from uniter.model.tasks.task import Task, extras
from uniter.model.train.defaults import complete_finetuning
from uniter.model.train.fit import check_budget, check_fit, check_pictures, check_texts, in_words, labelled, regions_to_read, that_fit
from uniter.model.train.runs import begun, learn
from uniter.model.train.work import Data, Work, with_validation
from uniter.model.uniter import UniterConfig, set_dropout

logger = logging.getLogger(__name__)


def finetune(settings: TrainSettings, run: str | Path) -> dict[str, Any]:
    """Start a fine-tuning run in the folder `run`, or go on with the one that is there; see `runs.begun` and `runs.learn`."""
    name = task_name(settings.task, DOWNSTREAM)
    row = extras(row_of(name))
    settings = settings.model_copy(update={"task": name})
    if row.max_text_length is not None and "max_text_length" not in settings.model_fields_set:
        settings = settings.model_copy(update={"max_text_length": row.max_text_length})
    if row.regions and not settings.regions.model_fields_set:
        images = [path for corpus in settings.corpora for path in (*corpus.images, *corpus.validation_images)]
        settings = settings.model_copy(update={"regions": RegionSettings(**regions_to_read(images, row.regions))})
    with begun(settings, Path(run)) as start:
        data = open_data(start.settings)
        settings = complete_finetuning(start.settings, row, *data.size(), start.everyone)
        if start.earlier is None and settings.batch_tokens != row.batch_tokens:  # which may mean one example a batch
            check_budget(settings.batch_tokens, data.training.values())
        detector, tokenizer = start.detector(data), start.tokenizer(data)
        model = build_model(settings, data)
        data = that_fit(data, model)
        validation = parts_of(row.validate_as or name, data.validation, name)
        work = Work(settings, data, model, *build_mixture(settings, data), validation, row.head, about(data))
        return learn(start, work, tokenizer=tokenizer, detector=detector)


def open_data(settings: TrainSettings) -> Data:
    """Open the corpora, and hold out pictures for validation where no validation database is given."""
    name, row = settings.task, row_of(settings.task)
    options = {**settings.regions.model_dump(), "readahead": settings.readahead}
    training: dict[str, Corpus] = {}
    validation: dict[str, Corpus] = {}
    for wanted in settings.corpora:
        if wanted.tasks is not None:
            raise BadInput(f"corpora: {wanted.name!r} names tasks, which only pre-training mixes; fine-tuning {name} trains {name}")
        corpus = open_corpus(wanted.name, wanted.text, wanted.images, max_text_length=settings.max_text_length, image_options=options)
        check_pictures(corpus, row, name)
        check_texts(corpus, row, name)
        corpus = labelled(corpus, row, name)
        training[wanted.name], held_out = with_validation(wanted, corpus, settings, options)
        check_texts(held_out, row, name)
        validation[wanted.name] = labelled(held_out, row, name)
        if corpus.left_out:
            logger.info("corpus %s: left out %s", wanted.name, in_words(corpus.left_out))
    answer_table(*training.values(), *validation.values())  # raises where they number answers differently
    return Data(training, validation, {corpus: {name: 1.0} for corpus in training})


def build_model(settings: TrainSettings, data: Data) -> DownstreamModel:
    """The model in training mode on the CPU: of `from`, or new; what is random in it is decided by the seed."""
    torch.manual_seed(settings.seed)
    first = next(iter(data.training.values()))
    row = row_of(settings.task)
    task = extras(row.of_data(row, first))
    if settings.from_ is not None:
        model = load_downstream(task.model, settings.from_, **task.sizes)
    else:
        overrides = {"vocab_size": max(text.v_range[1] for text in first.texts), **settings.model.overrides()}
        overrides["image_feature_size"] = first.images.feature_width
        model = task.model(UniterConfig.preset(settings.model.size or "tiny", **overrides), **task.sizes)
    for corpus in data.training.values():
        check_fit(model.config, corpus, source=settings.from_ or "the model")
    if task.begin is not None:
        task.begin(model, list(data.training.values()))
    if settings.dropout is not None:
        set_dropout(model, settings.dropout)
    return model.train()


def build_mixture(settings: TrainSettings, data: Data) -> tuple[list[Task], Mixture]:
    """The task by part, and which batch comes when."""
    tasks, mixed = zip(*parts_of(settings.task, data.training, settings.task), strict=True)
    mixture = Mixture(mixed, budget=settings.batch_tokens or 1, seed=settings.seed, bucket=settings.bucket, ordering=settings.ordering)
    return list(tasks), mixture


def parts_of(row_name: str, corpora: dict[str, Corpus], name: str) -> list[tuple[Task, Part]]:
    """Each corpus with the row as it is for it; the log calls the parts by `name`."""
    row, found = row_of(row_name), []
    for corpus_name, corpus in corpora.items():
        task = row.of_data(row, corpus)
        # Larger corpora are drawn as often as they are larger: every example is seen equally often.
        part = Part(f"{name}_{corpus_name}", corpus, task.sample, float(len(corpus)), lengths=task.lengths, sequences=task.sequences)
        found.append((task, part))
    return found


def about(data: Data) -> dict[str, Any]:
    """What else a checkpoint tells: the names of its answers, by number."""
    table = answer_table(next(iter(data.training.values())))
    return {} if table is None else {"answers": sorted(table, key=lambda answer: table[answer])}
