"""Fine-tuning: a row of the down-stream table for `runs.start`; evaluating and predicting with what came out."""

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
from uniter.model.train.fit import check_fit, check_pictures, refuse_captions, regions_to_read
from uniter.model.train.kind import Data, Kind, with_validation
from uniter.model.train.runs import start
from uniter.model.uniter import UniterConfig, set_dropout


def finetune(settings: TrainSettings, run: Path) -> dict[str, Any]:
    """Start a fine-tuning run in the folder `run`, or go on with the one that is there; see `runs.start`."""
    row = extras(row_of(settings.task))
    if row.max_text_length is not None and "max_text_length" not in settings.model_fields_set:
        settings = settings.model_copy(update={"max_text_length": row.max_text_length})
    if row.regions and not settings.regions.model_fields_set:
        images = [path for corpus in settings.corpora for path in (*corpus.images, *corpus.validation_images)]
        settings = settings.model_copy(update={"regions": RegionSettings(**regions_to_read(images, row.regions))})
    return start(settings, run, kind_of(settings.task))


def kind_of(name: str) -> Kind:
    """How a down-stream task is run."""
    name = task_name(name, DOWNSTREAM)
    row = DOWNSTREAM[name]

    def open_data(settings: TrainSettings) -> Data:
        options = {**settings.regions.model_dump(), "readahead": settings.readahead}
        training: dict[str, Corpus] = {}
        validation: dict[str, Corpus] = {}
        for wanted in settings.corpora:
            if wanted.tasks is not None:
                raise BadInput(f"corpora: {wanted.name!r} names tasks, which only pre-training mixes; fine-tuning {name} trains {name}")
            corpus = open_corpus(wanted.name, wanted.text, wanted.images, max_text_length=settings.max_text_length, image_options=options)
            check_pictures(corpus, row, name)
            refuse_captions(corpus, name)
            training[wanted.name], validation[wanted.name] = with_validation(wanted, corpus, settings, options)
        answer_table(*training.values(), *validation.values())  # raises where they number answers differently
        return Data(training, validation, {corpus: {name: 1.0} for corpus in training})

    def parts(corpora: dict[str, Corpus], row: Task = row) -> list[tuple[Task, Part]]:
        found = []
        for corpus_name, corpus in corpora.items():
            task = row.of_data(row, corpus)
            # Larger corpora are drawn as often as they are larger: every example is seen equally often.
            part = Part(f"{name}_{corpus_name}", corpus, task.sample, float(len(corpus)), lengths=task.lengths, sequences=task.sequences)
            found.append((task, part))
        return found

    def build_model(settings: TrainSettings, data: Data) -> DownstreamModel:
        torch.manual_seed(settings.seed)
        first = next(iter(data.training.values()))
        task = extras(row.of_data(row, first))
        if settings.from_ is not None:
            model = load_downstream(task.model, settings.from_, **task.sizes)
        else:
            overrides = {"vocab_size": max(text.v_range[1] for text in first.texts), **settings.model.overrides()}
            overrides["image_feature_size"] = first.images.feature_width
            model = task.model(UniterConfig.preset(settings.model.size or "tiny", **overrides), **task.sizes)
        for corpus in data.training.values():
            check_fit(model.config, corpus, source=settings.from_ or "the model")
        if settings.dropout is not None:
            set_dropout(model, settings.dropout)
        return model.train()

    def build_mixture(settings: TrainSettings, data: Data) -> tuple[list[Task], Mixture]:
        tasks, mixed = zip(*parts(data.training), strict=True)
        mixture = Mixture(mixed, budget=settings.batch_tokens or 1, seed=settings.seed, bucket=settings.bucket, ordering=settings.ordering)
        return list(tasks), mixture

    def about(data: Data) -> dict[str, Any]:
        table = answer_table(next(iter(data.training.values())))
        return {} if table is None else {"answers": sorted(table, key=lambda answer: table[answer])}

    return Kind(
        task=name,
        open_data=open_data,
        complete=lambda settings, examples, mean, everyone: complete_finetuning(settings, extras(row), examples, mean, everyone),
        build_model=build_model,
        build_mixture=build_mixture,
        validation_parts=lambda settings, data: parts(data.validation, DOWNSTREAM[extras(row).validate_as or name]),
        head=extras(row).head,
        about=about,
    )
