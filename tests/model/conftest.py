"""Golden batches are padded and carry a gather index; the model reads packed ones. Here is the way from one to the other."""

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from uniter.datasets.batches.collate import PackedBatch, collate, hidden_places
from uniter.datasets.batches.corpus import Corpus, open_corpus
from uniter.datasets.batches.example import Example, Masking
from uniter.model import UniterConfig, UniterForPretraining
from uniter.model.settings.files import read_settings
from uniter.model.settings.settings import TrainSettings
from uniter.model.tasks.table import DOWNSTREAM, PRETRAINING
from uniter.model.tasks.task import Task, extras


def packed_from_padded(inputs: Mapping[str, np.ndarray]) -> SimpleNamespace:
    """A packed batch and `joint_rows` (B, L): for each padded joint position the place in "texts, then regions", -1 at padding.

    Understands text alone and regions alone, `img_type_ids`, `txt_type_ids`, one text or one image expanded to all rows.
    """
    tensors = {name: torch.from_numpy(np.asarray(value)) for name, value in inputs.items()}
    attention = tensors["attn_masks"] if "attn_masks" in tensors else tensors.get("txt_attn_masks", tensors.get("img_attn_masks"))
    rows, width = attention.shape
    lengths = attention.sum(1)
    text_width = tensors["input_ids"].shape[1] if "input_ids" in tensors else 0
    if "gather_index" in tensors:
        # The k-th real joint position points into "padded text, then padded regions".
        place = tensors["gather_index"]
    else:
        place = torch.arange(width).expand(rows, width)
    real = attention == 1
    is_text = real & (place < text_width)
    text_lengths, region_counts = is_text.sum(1), lengths - is_text.sum(1)

    def picked(name: str, mask: Tensor, offset: int) -> Tensor:
        source = tensors[name].expand(rows, *tensors[name].shape[1:])
        example, joint = mask.nonzero(as_tuple=True)
        return source[example, place[example, joint] - offset]

    is_region = real & ~is_text
    text_count, region_count = int(text_lengths.sum()), int(region_counts.sum())
    joint_rows = torch.full((rows, width), -1)
    joint_rows[is_text] = torch.arange(text_count)
    joint_rows[is_region] = text_count + torch.arange(region_count)
    has_text, has_regions = text_count > 0, region_count > 0
    batch = PackedBatch(
        input_ids_T=picked("input_ids", is_text, 0) if has_text else torch.zeros(0, dtype=torch.long),
        text_positions_T=picked("position_ids", is_text, 0) if has_text else torch.zeros(0, dtype=torch.long),
        text_types_T=picked("txt_type_ids", is_text, 0) if "txt_type_ids" in tensors else torch.zeros(text_count, dtype=torch.long),
        features_RD=picked("img_feat", is_region, text_width) if has_regions else torch.zeros(0, 1),
        positions_R7=picked("img_pos_feat", is_region, text_width) if has_regions else torch.zeros(0, 7),
        region_types_R=picked("img_type_ids", is_region, text_width)
        if "img_type_ids" in tensors
        else torch.ones(region_count, dtype=torch.long),
        text_lengths_B=text_lengths,
        region_counts_B=region_counts,
        masked_regions_R=picked("img_masks", is_region, text_width).bool() if "img_masks" in tensors else None,
    )
    for name, ours in {"feat_targets": "features", "label_targets": "soft_labels"}.items():
        if name in tensors:
            batch.targets[ours] = tensors[name]
    if "txt_labels" in tensors:
        batch.targets["words"] = picked("txt_labels", is_text, 0)
    if "targets" in tensors:
        batch.targets["matched"] = tensors["targets"]
    if (places := hidden_places(batch.targets.get("words"), batch.masked_regions_R)) is not None:
        batch.targets["places"] = places
    return SimpleNamespace(batch=batch, joint_rows=joint_rows, real=real)


def padded_like_golden(hidden_NH: Tensor, layout: Any, packed: SimpleNamespace) -> Tensor:
    """Hidden states at the real joint positions, in row-major order of the golden (B, L) mask: (number of ones, H)."""
    rows = torch.cat([layout.text_rows_T, layout.region_rows_R])
    return hidden_NH[rows[packed.joint_rows[packed.real]]]


@pytest.fixture
def pack() -> Callable[[Mapping[str, np.ndarray]], SimpleNamespace]:
    return packed_from_padded


@pytest.fixture
def at_real_positions() -> Callable[[Tensor, Any, SimpleNamespace], Tensor]:
    return padded_like_golden


@pytest.fixture
def golden_config(uniter_golden: Path) -> UniterConfig:
    meta = json.loads((uniter_golden / "meta.json").read_text())
    return UniterConfig.from_json(uniter_golden / "config.json", image_feature_size=meta["img_dim"], label_classes=meta["img_label_dim"])


@pytest.fixture
def golden_model(uniter_golden: Path, golden_config: UniterConfig) -> UniterForPretraining:
    """The golden pre-training model, freshly loaded, in eval mode."""
    model = UniterForPretraining(golden_config)
    model.load_state_dict(load_file(uniter_golden / "weights.safetensors"))
    return model.eval()


@pytest.fixture
def close() -> Callable[..., None]:
    """|got - expected| <= atol + rtol * |expected|, both as arrays, with the golden README's limits as default."""

    def check(got: Tensor, expected: Any, *, atol: float = 1e-5, rtol: float = 1e-5) -> None:
        np.testing.assert_allclose(got.detach().numpy(), np.asarray(expected), atol=atol, rtol=rtol)

    return check


def random_batch(
    text_lengths: list[int], region_counts: list[int], *, width: int, vocabulary: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> PackedBatch:
    """A made-up packed batch with every pre-training target."""
    generator = torch.Generator().manual_seed(seed)
    texts, regions = sum(text_lengths), sum(region_counts)
    boxes = torch.rand(regions, 4, generator=generator)
    positions = torch.cat([boxes, boxes[:, :2], boxes[:, :1] * boxes[:, 1:2]], dim=1)
    return PackedBatch(
        input_ids_T=torch.randint(5, vocabulary, (texts,), generator=generator),
        text_positions_T=torch.cat([torch.arange(length) for length in text_lengths]),
        text_types_T=torch.zeros(texts, dtype=torch.long),
        features_RD=torch.rand(regions, width, generator=generator).to(dtype),
        positions_R7=positions,
        region_types_R=torch.ones(regions, dtype=torch.long),
        text_lengths_B=torch.tensor(text_lengths),
        region_counts_B=torch.tensor(region_counts),
    )


@pytest.fixture
def make_batch() -> Callable[..., PackedBatch]:
    return random_batch


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


@pytest.fixture(scope="session")
def task_world(tmp_path_factory: pytest.TempPathFactory, made_up: Any) -> dict[str, Path]:
    """The made-up world: `captions` and `images`, other pictures' regions `found`, and the texts of each down-stream task by their name."""
    folder = tmp_path_factory.mktemp("every_row")
    scenes = made_up.World(width=16, noise=0.1)
    texts, images = scenes.write(folder, pictures=24, captions=2)
    _, found = scenes.write(folder / "found", pictures=24, captions=1, prefix="found_scene")
    wanted = {extras(row).texts[0] for row in DOWNSTREAM.values()} - {"captions"}
    return {"captions": texts, "images": images, "found": found} | {task: scenes.write_task(folder, task) for task in sorted(wanted)}


RowCase = Callable[..., tuple[Task, torch.nn.Module, PackedBatch]]


@pytest.fixture(scope="session")
def row_case(task_world: dict[str, Path]) -> RowCase:
    """`row_case("vqa")`: a row of either table as it is for the made-up world, its model and a batch of it; `first`: which examples."""

    opened: dict[str, Corpus] = {}

    def make(name: str, *, first: int = 0, count: int = 4, **sizes: Any) -> tuple[Task, torch.nn.Module, PackedBatch]:
        row = PRETRAINING.get(name) or DOWNSTREAM[name]
        texts = "captions" if row.finetuning is None else extras(row).texts[0]
        images = str(task_world["images"])
        if texts not in opened:  # VCR's pictures have annotated and detected regions
            opened[texts] = open_corpus(texts, [task_world[texts]], [f"{images};{task_world['found']}" if texts == "vcr" else images])
        corpus = opened[texts]
        task = row.of_data(row, corpus)
        config = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "image_feature_size": 16, "label_classes": 9}
        words = corpus.texts[0].v_range[1]
        made = UniterConfig.preset("tiny", **{"vocab_size": words, **config, **sizes})
        torch.manual_seed(0)
        model = UniterForPretraining(made) if task.finetuning is None else extras(task).model(made, **extras(task).sizes)
        if name == "retrieval-hard":  # of whose examples one is hundreds of sequences
            task = replace(task, sample=partial(task.sample, drawn=5 + first % 2), narrow=partial(task.narrow.func, count=3))
            count = 1
        samples = []
        for number in range(first, first + count):
            pictures = tuple(corpus.image_rows_NK[number].tolist())
            samples.append(task.sample(Example(corpus, number, pictures), random.Random(number), Masking()))
        return task, model, collate(samples)

    return make
