"""A made-up world's databases and settings of a model so small that an update takes milliseconds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from uniter.model.train.config import TrainSettings, read_settings

Databases = tuple[Path, Path]


@pytest.fixture(scope="session")
def databases(tmp_path_factory: pytest.TempPathFactory, made_up: Any) -> Databases:
    return made_up.World(width=16).write(tmp_path_factory.mktemp("world"), pictures=40, captions=2)


@pytest.fixture
def small(databases: Databases) -> Callable[..., TrainSettings]:
    """`small(steps=4, ...)`: settings of a run on the made-up world; keywords overrule, `corpora` entries too."""

    def make(**changes: Any) -> TrainSettings:
        texts, images = databases
        values: dict[str, Any] = {
            "corpora": [{"name": "toy", "text": [str(texts)], "images": [str(images)]}],
            "model": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64},
            "batch_tokens": 150,
            "accumulation": 2,
            "dropout": 0.1,
            "steps": 8,
            "validate_every": 4,
            "checkpoint_every": 2,
            "tensorboard": False,
            "device": "cpu",
            "workers": 0,
        }
        return read_settings({**values, **changes}, source="test")

    return make
