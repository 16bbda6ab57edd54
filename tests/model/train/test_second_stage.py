"""VCR's second stage: pre-training on question, right answer and right rationale with annotated and detected regions."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner

from uniter.cli.train import main
from uniter.datasets.batches.corpus import open_corpus, vocabulary_of
from uniter.datasets.errors import BadInput
from uniter.datasets.image_db import ImageDB
from uniter.datasets.runs.run_log import read_log
from uniter.model.checkpoints.export import export_published
from uniter.model.checkpoints.load import load_uniter
from uniter.model.checkpoints.read import find_weights, read_state
from uniter.model.evaluation.pretrained import evaluate_run
from uniter.model.settings.settings import TrainSettings
from uniter.model.train.finetuning import finetune
from uniter.model.train.pretraining import build_model, open_data, pretrain

Make = Callable[..., TrainSettings]
WORDS = "uniter.embeddings.word_embeddings.weight"
TYPES = "uniter.embeddings.token_type_embeddings.weight"
TAGS = 8  # of the made-up world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, made_up: Any) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("second")
    scenes = made_up.World(width=16, noise=0.1)
    captions, images = scenes.write(folder, pictures=24, captions=2)
    _, found = scenes.write(folder / "found", pictures=24, captions=1, prefix="found_scene")
    places = {"captions": captions, "images": images, "vcr": scenes.write_task(folder, "vcr"), "nlvr2": scenes.write_task(folder, "nlvr2")}
    return {name: str(path) for name, path in places.items()} | {"both": f"{images};{found}"}


@pytest.fixture
def settings(world: dict[str, str], small: Make) -> Make:
    def make(texts: str = "vcr", images: str = "both", tasks: dict[str, float] | None = None, **changes: Any) -> TrainSettings:
        corpus: dict[str, Any] = {"name": "toy", "text": [world[texts]], "images": [world[images]], "tasks": tasks}
        chosen = {"steps": 4, "batch_tokens": 300, **({"model": {}} if "from" in changes else {}), **changes}
        return small(corpora=[corpus], **chosen)

    return make


@pytest.fixture
def first(settings: Make, tmp_path: Path) -> str:
    """A pre-trained run that has never seen VCR."""
    pretrain(settings("captions", "images", steps=2), tmp_path / "first")
    return str(tmp_path / "first")


def test_it_trains_resumes_and_is_fine_tuned(settings: Make, first: str, world: dict[str, str], tmp_path: Path) -> None:
    unbroken, second = tmp_path / "unbroken", tmp_path / "second"
    pretrain(settings(**{"from": first}, steps=12), unbroken)
    pretrain(settings(**{"from": first}, steps=12, stop_after=5), second)
    pretrain(settings(**{"from": first}, steps=12), second)
    logs = [[line for line in read_log(run) if line["kind"] == "train"] for run in (unbroken, second)]
    assert [line["loss"] for line in logs[0]] == [line["loss"] for line in logs[1]] and len(logs[0]) == 12
    assert {line["part"] for line in logs[0]} == {"mlm_toy", "mrfr_toy", "mrc-kl_toy"}
    chosen = yaml.safe_load((second / "config.yaml").read_text())
    assert chosen["max_text_length"] == 220 and chosen["optimizer"]["learning_rate"] == 5e-4, "chosen by the first stage's size"

    before, after = (read_state(find_weights(run)) for run in (first, str(second)))
    assert len(after[WORDS]) == len(before[WORDS]) + TAGS and after[TYPES].shape[0] == 4 and before[TYPES].shape[0] == 2
    assert len(after["cls.predictions.bias"]) == len(after[WORDS])

    tuned = tmp_path / "tuned"
    finetune(settings(task="vcr", steps=1, batch_tokens=900, optimizer={"learning_rate": 1e-9}, **{"from": str(second)}), tuned)
    kept = read_state(find_weights(str(tuned)))
    torch.testing.assert_close(kept[WORDS], after[WORDS], atol=1e-6, rtol=0)
    torch.testing.assert_close(kept[TYPES], after[TYPES], atol=1e-6, rtol=0)
    # A second stage again, as published files store it: nothing grows any more.
    export_published(load_uniter(second), tmp_path / "uniter-tiny-vcr_2nd_stage.pt")
    wrapped = {"model_state": torch.load(tmp_path / "uniter-tiny-vcr_2nd_stage.pt", weights_only=True)}
    torch.save(wrapped, tmp_path / "wrapped.pt")
    (tmp_path / "wrapped.json").write_text((find_weights(str(second)).parent / "config.json").read_text())
    again = settings(**{"from": str(tmp_path / "wrapped.pt")})
    assert torch.equal(build_model(again, open_data(again)).state_dict()[WORDS], after[WORDS])

    figures = evaluate_run(str(second), text=[world["vcr"]], images=[world["both"]], device="cpu")
    assert set(figures) == {"examples", "pictures", "left_out", "mlm", "mrfr", "mrc-kl"} and figures["pictures"] <= 24
    assert figures == evaluate_run(str(second), text=[world["vcr"]], images=[world["both"]], device="cpu")
    with pytest.raises(BadInput, match="use its tokenizer"):
        evaluate_run(first, text=[world["vcr"]], images=[world["both"]], device="cpu")


def test_it_begins_as_published_but_keeps_the_word_head(settings: Make, first: str) -> None:
    """New token types are copies of row 0, what the first stage knows is kept, its word head too (facts, 8.1 row 8)."""
    wanted = settings(**{"from": first})
    ours, before = build_model(wanted, open_data(wanted)).state_dict(), read_state(find_weights(first))
    assert torch.equal(ours[TYPES], before[TYPES][[0, 1, 0, 0]])
    for name, value in before.items():
        if name != TYPES:
            assert torch.equal(ours[name][: len(value)], value), name


def test_it_learns_the_tags_from_nothing(settings: Make) -> None:
    """Without a first stage, too: the model is as wide as the texts with their tags."""
    wanted = settings()
    data = open_data(wanted)
    model = build_model(wanted, data)
    assert model.config.vocab_size == vocabulary_of(data.training["toy"]) == data.training["toy"].texts[0].v_range[1] + TAGS
    assert model.config.type_vocab_size == 4


def test_captions_and_questions_are_trained_together(settings: Make, tmp_path: Path) -> None:
    questions, captions = settings(steps=8), settings("captions", "images").corpora[0].model_copy(update={"name": "captions"})
    both = questions.model_copy(update={"corpora": [*questions.corpora, captions]})
    assert {name: set(tasks) for name, tasks in open_data(both).tasks.items()} == {
        "toy": {"mlm", "mrfr", "mrc-kl"},
        "captions": {"itm", "mlm", "mrfr", "mrc-kl"},
    }
    pretrain(both, tmp_path / "run")
    parts = {line["part"] for line in read_log(tmp_path / "run") if line["kind"] == "train"}
    assert any(part.endswith("_toy") for part in parts) and any(part.endswith("_captions") for part in parts)


def test_held_out_pictures_are_in_no_training_example(settings: Make) -> None:
    data = open_data(settings())
    training, held_out = data.training["toy"], data.validation["toy"]
    assert len(held_out) and not set(training.image_rows_NK.ravel().tolist()) & set(held_out.image_rows_NK.ravel().tolist())


def test_what_cannot_be_trained_is_said(settings: Make, world: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="VCR's second stage has no task itm; it takes mlm, mrfr, mrc and mrc-kl"):
        open_data(settings(tasks={"mlm": 1, "itm": 1}))
    with pytest.raises(
        BadInput, match=r"about 2 pictures each; pre-training takes texts about one picture, or VCR's with --images 'gt;det'"
    ):
        open_data(settings("nlvr2", "images"))
    with pytest.raises(BadInput, match="without image"):
        open_data(settings("vcr", "images"))
    pretrain(settings("captions", "images", steps=1), tmp_path / "run")
    weights = find_weights(str(tmp_path / "run"))
    narrow = {name: value[:40] if name in (WORDS, "cls.predictions.bias") else value for name, value in read_state(weights).items()}
    torch.save(narrow, tmp_path / "narrow.pt")
    (tmp_path / "narrow.json").write_text((weights.parent / "config.json").read_text())
    wanted = settings(**{"from": str(tmp_path / "narrow.pt")})
    with pytest.raises(BadInput, match="has 40 and can take 81 object tags more; use its tokenizer"):
        build_model(wanted, open_data(wanted))


PUBLISHED = {
    "output_dir": "/storage/pretrain/vcr_2nd_stage_base",
    "model_config": "/src/config/uniter-base.json",
    "checkpoint": "/pretrain/uniter-base.pt",
    "mrm_prob": 0.15,
    "max_txt_len": 220,
    "conf_th": 0.2,
    "max_bb": 100,
    "min_bb": 10,
    "num_bb": 36,
    "train_batch_size": 6144,
    "val_batch_size": 8000,
    "gradient_accumulation_steps": 4,
    "learning_rate": 3e-05,
    "valid_steps": 2000,
    "num_train_steps": 45000,
    "optim": "adamw",
    "betas": [0.9, 0.98],
    "dropout": 0.1,
    "weight_decay": 0.01,
    "grad_norm": -1,
    "warmup_steps": 4500,
    "seed": 42,
    "fp16": True,
    "n_workers": 4,
    "pin_mem": True,
    "rank": 0,
    "train_datasets": [
        {
            "name": "vcr",
            "db": ["/txt/vcr_train.db/"],
            "img": ["/img/vcr_gt_train/;/img/vcr_train/"],
            "tasks": ["mlm", "mrfr", "mrckl"],
            "mix_ratio": [2, 1, 1],
        }
    ],
    "val_datasets": [
        {"name": "vcr", "db": ["/txt/vcr_val.db/"], "img": ["/img/vcr_gt_val/;/img/vcr_val/"], "tasks": ["mlm", "mrfr", "mrckl"]}
    ],
}


def test_the_published_file_runs(first: str, world: dict[str, str], tmp_path: Path) -> None:
    """`pretrain-vcr-base-4gpu.json` as it is, over the made-up world in its places, resumed once."""
    for place, target in {
        "txt/vcr_train.db": world["vcr"],
        "txt/vcr_val.db": world["vcr"],
        **{f"img/{name}": world["both"].split(";")[0] for name in ("vcr_gt_train", "vcr_gt_val")},
        **{f"img/{name}": world["both"].split(";")[1] for name in ("vcr_train", "vcr_val")},
    }.items():
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).symlink_to(target)
    published = tmp_path / "pretrain-vcr-base-4gpu.json"
    published.write_text(json.dumps(PUBLISHED))
    words = ["pretrain", "--config", str(published), "--from", first, "--out", str(tmp_path / "second"), "--json", "--precision", "fp32"]
    words += [word for name in ("txt", "img") for word in ("--root", f"/{name}={tmp_path / name}")]
    words += [word for change in ("batch_tokens=800", "steps=3", "optimizer.warmup_steps=1", "workers=0") for word in ("--set", change)]
    for more in (["--set", "stop_after=2"], []):
        result = CliRunner().invoke(main, words + more)
        assert result.exit_code == 0, result.output
    ours = yaml.safe_load((tmp_path / "second/config.yaml").read_text())
    assert ours["corpora"][0]["tasks"] == {"mlm": 2, "mrfr": 1, "mrc-kl": 1} and ours["max_text_length"] == 220
    assert ours["optimizer"]["clip"] == -1 and ours["ordering"] == "published"
    assert [line["step"] for line in read_log(tmp_path / "second") if line["kind"] == "train"] == [1, 2, 3]


def test_lengths_are_never_fewer_than_the_words_of_a_batch(world: dict[str, str]) -> None:
    """Batches are planned by the longest answer and rationale; what is read are the right ones."""
    from uniter.datasets.batches.example import Example

    corpus = open_corpus("toy", [world["vcr"]], [world["both"]], max_text_length=-1)
    for number in range(len(corpus)):
        told = sum(map(len, Example(corpus, number, ()).read().told()))
        assert told <= corpus.text_lengths_N[number]


def test_annotated_and_detected_regions_may_have_the_same_keys(made_up: Any, tmp_path: Path) -> None:
    """Of "gt;det" the first half holds a picture's annotated regions and the second the detected ones, whatever their keys."""
    plain = made_up.World(width=16, noise=0.1)
    _, gt = plain.write(tmp_path, pictures=8, captions=1, regions=3)
    _, det = plain.write(tmp_path / "det", pictures=8, captions=1, regions=5)
    database = ImageDB(f"{gt};{det}")
    first, second = database.index_of("scene_1_00002"), database.index_of("scene_1_00002", detected=True)
    assert (len(database.read_row(first)), len(database.read_row(second))) == (3, 5)
    assert database.region_counts[[first, second]].tolist() == [3, 5]
    assert len(pickle.loads(pickle.dumps(database)).read_row(second)) == 5
