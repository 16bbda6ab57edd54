"""Which rows of published region databases fine-tuning, evaluating and predicting read where nobody says: RefCOCO's all, others 0.2."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import pytest
import yaml

from uniter.datasets.image_db import ImageDB, encode_record
from uniter.model.train.config import TrainSettings
from uniter.model.train.finetuning import evaluate_finetuned, finetune, predict
from uniter.model.train.runs import regions_to_read

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
