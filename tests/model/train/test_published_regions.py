"""Which rows of published region databases fine-tuning, evaluating and predicting read where nobody says: RefCOCO's all, others 0.2."""

import csv
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
import torch
import yaml

from uniter.datasets.batches.collate import collate
from uniter.datasets.batches.corpus import open_corpus
from uniter.datasets.batches.example import Example, Masking
from uniter.datasets.image_db import ImageDB
from uniter.datasets.image_db.records import encode_record
from uniter.model import UniterConfig
from uniter.model.evaluation.finetuned import evaluate_finetuned, predict
from uniter.model.settings.settings import TrainSettings
from uniter.model.tasks.table import DOWNSTREAM
from uniter.model.tasks.task import extras
from uniter.model.train.finetuning import finetune
from uniter.model.train.fit import regions_to_read

Make = Callable[..., TrainSettings]
BOXES = 14  # more than the ten that stay whatever their confidence


def publish(ours: ImageDB, folder: Path, *, confidence: float) -> Path:
    """The records as UNITER publishes them, all of the same confidence."""
    folder.mkdir(parents=True)
    with lmdb.open(str(folder), map_size=1 << 26) as environment, environment.begin(write=True) as transaction:
        for key in ours:
            record = ours[key]
            object.__setattr__(record, "conf", record.conf * 0 + confidence)
            transaction.put(key.encode(), encode_record(record, key=key))
        transaction.put(b"__keys__", json.dumps(list(ours)).encode())
    return folder.parent


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, made_up: Any) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("published")
    scenes = made_up.World(width=16, noise=0.1)
    _, images = scenes.write(folder, pictures=12, captions=1, regions=BOXES)
    ours, texts = ImageDB(images), scenes.write_task(folder, "refcoco", count=60)
    return {
        "texts": texts,
        "annotated": publish(ours, folder / "re_coco_gt" / "feat_numbb100", confidence=0.0),
        "whole": publish(ours, folder / "whole" / "all", confidence=0.0),
        "detected": publish(ours, folder / "re_coco_det" / "feat_th0.2_max100_min10", confidence=0.5),
    }


def test_referring_reads_all_annotated_boxes_as_published(world: dict[str, Path], small: Make, tmp_path: Path) -> None:
    def settings(**changes: Any) -> TrainSettings:
        corpora = [{"name": "toy", "text": [str(world["texts"])], "images": [str(world["annotated"])]}]
        return small(corpora=corpora, task="refcoco", steps=2, **changes)

    run = tmp_path / "run"
    finetune(settings(stop_after=1), run)
    finetune(settings(), run)
    kept = yaml.safe_load((run / "config.yaml").read_text())["regions"]
    assert (kept["conf_th"], kept["num_bb"]) == (-1, 100)
    for images in ("annotated", "whole", "detected"):
        asked = {"text": [str(world["texts"])], "images": [str(world[images])], "device": "cpu"}
        assert 0 <= evaluate_finetuned("refcoco", str(run), **asked)["accuracy"] <= 1
        predict("refcoco", str(run), tmp_path / f"{images}.json", **asked)
        assert len(json.loads((tmp_path / f"{images}.json").read_text())) == 60


def test_the_first_selection_that_is_there_is_taken(world: dict[str, Path]) -> None:
    all_rows, few = {"conf_th": -1, "num_bb": 100}, {"conf_th": -1, "num_bb": 36}
    assert regions_to_read([str(world["annotated"])], few, all_rows) == all_rows
    assert regions_to_read([str(world["annotated"]), str(world["detected"])], all_rows) == {}
    assert regions_to_read([str(world["whole"])], few, all_rows) == few
    assert len(ImageDB(world["whole"], **all_rows)["scene_1_00000"]) == BOXES
    assert len(ImageDB(world["whole"])["scene_1_00000"]) == 10


@pytest.mark.parametrize(
    ("name", "regions"), [("refcoco", "re_gt"), ("refcoco-two-layers", "re_det"), ("refcoco-rank", "re_gt"), ("vcr", "both")]
)
def test_golden_databases_and_published_checkpoints_of_given_regions(
    name: str, regions: str, uniter_tasks_golden: Path, uniter_data_golden: Path, tmp_path: Path
) -> None:
    """A `.pt` of tensors only, as UNITER's trainers wrote them, evaluated and asked on databases as UNITER read them."""
    if name == "vcr":
        toy, texts = uniter_tasks_golden / "img_db" / "toy", uniter_tasks_golden / "txt_db" / "vcr_toy.db"
        images = f"{next(toy.glob('feat_numbb*'))};{toy}"
    else:
        entries = json.loads((uniter_data_golden / "expected.json").read_text())["txt_db"]
        texts = uniter_data_golden / next(entry["path"] for key, entry in entries.items() if key.startswith("refcoco"))
        images = str(uniter_data_golden / "img_db" / regions)
    corpus = open_corpus(name, [texts], [images], max_text_length=-1)
    row = DOWNSTREAM[name].of_data(DOWNSTREAM[name], corpus)
    sizes = {"hidden_size": 64, "num_attention_heads": 1, "num_hidden_layers": 2, "intermediate_size": 64, "initializer_range": 0.3}
    config = UniterConfig.preset("tiny", vocab_size=corpus.texts[0].v_range[1], image_feature_size=corpus.images.feature_width, **sizes)
    torch.manual_seed(0)
    model = extras(row).model(config, **extras(row).sizes).eval()
    published = tmp_path / "model_step_8000.pt"
    torch.save({"model_state": model.state_dict()}, published)
    asked = {"text": [str(corpus.texts[0].path)], "images": [images], "device": "cpu"}
    figures = evaluate_finetuned(name, str(published), **asked)
    predict(name, str(published), tmp_path / "answers", **asked)
    sample, examples = extras(row).predicted or row.sample, range(len(corpus))
    shown = [Example(corpus, number, tuple(corpus.image_rows_NK[number].tolist())) for number in examples]
    outputs = [row.head(model, collate([sample(one, random.Random(0), Masking())])) for one in shown]
    said = [extras(row).answer(one)[0] for one in outputs]
    assert figures["examples"] == len(corpus) == len(said)
    if name == "vcr":
        rows = {line["annot_id"]: list(map(float, list(line.values())[1:])) for line in csv.DictReader((tmp_path / "answers").open())}
        for one, scores in zip(shown, said, strict=True):
            assert rows[one.id] == pytest.approx(scores, abs=1e-5)
        right = [np.argmax(scores[:4]) == one.corpus.record(one.number)["qa_target"] for one, scores in zip(shown, said, strict=True)]
        assert figures["qa"] == pytest.approx(np.mean(right))
    else:
        pointed = {str(line["sent_id"]): line["region"] for line in json.loads((tmp_path / "answers").read_text())}
        assert [pointed[one.id] for one in shown] == said
