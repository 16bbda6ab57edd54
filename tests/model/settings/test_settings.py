"""Settings: what is wrong is said in a sentence that names the key; UNITER's published files run."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from uniter.datasets.errors import BadInput
from uniter.model.settings.files import assign, differences, load_config, read_settings, shipped_configs, write_config
from uniter.model.settings.gather import gather_settings
from uniter.model.settings.published import read_published
from uniter.model.settings.settings import explain_settings

DATA = {"corpora": [{"text": ["a.db"], "images": ["a.lmdb"]}]}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"batch_token": 5}, "unknown key 'batch_token'; did you mean 'batch_tokens'?"),
        ({"optimizer": {"learning_rte": 1}}, "unknown key 'optimizer.learning_rte'; did you mean 'optimizer.learning_rate'?"),
        ({"clip": 3}, "unknown key 'clip'; did you mean 'optimizer.clip'?"),
        ({"steps": "many"}, "steps is 'many', but input should be a valid integer"),
        ({"precision": "fp16"}, "precision is 'fp16', but input should be 'fp32', 'tf32' or 'bf16'"),
        ({"steps": 5, "optimizer": {"warmup_steps": 9}}, "optimizer.warmup_steps: 9 is more than steps, 5"),
        ({"from": "x.pt", "model": {"size": "base"}}, "model: its size comes from `from`; leave one of the two out"),
        (
            {"model": {"hidden_size": 100, "num_attention_heads": 12}},
            "model.num_attention_heads: 12 does not divide model.hidden_size, 100",
        ),
        ({"attention": "flash"}, "attention: flash computes in half precision only; set precision to bf16 or leave attention out"),
        ({"regions": {"min_bb": 20, "max_bb": 10}}, "regions.min_bb: 20 is more than regions.max_bb, 10"),
        ({"optimizer": {"betas": [0.9]}}, "the key 'optimizer.betas.1' is missing"),
        ({"corpora": [*DATA["corpora"], *DATA["corpora"]]}, "corpora: two are called 'data'; give each its own name"),
        (
            {"corpora": [{"text": ["a.db"], "images": ["a.lmdb"], "task": {}}]},
            "unknown key 'corpora.0.task'; did you mean 'corpora.tasks'?",
        ),
        ({"corpora": [{"text": ["a.db"]}]}, "the key 'corpora.0.images' is missing"),
    ],
)
def test_what_is_wrong_is_said_by_key(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadInput) as caught:
        read_settings({**DATA, **changes}, source="mine.yaml")
    assert str(caught.value).startswith(f"mine.yaml: {sentence}")


def test_assignments_reach_everywhere() -> None:
    values: dict[str, Any] = copy.deepcopy(DATA)
    for assignment in (
        "optimizer.learning_rate=1e-4",
        "checkpoint_every=500",
        "corpora.0.name=coco",
        "from=null",
        "optimizer.betas=[0.9, 0.99]",
    ):
        assign(values, assignment)
    settings = read_settings(values, source="x")
    assert settings.optimizer.learning_rate == 1e-4 and settings.checkpoint_every == 500
    assert settings.corpora[0].name == "coco" and settings.optimizer.betas == (0.9, 0.99)
    for wrong in ("steps", "=3", "corpora.7.name=x", "steps=[1"):
        with pytest.raises(BadInput):
            assign(copy.deepcopy(DATA), wrong)


def test_written_settings_read_back_the_same(tmp_path: Path) -> None:
    settings = read_settings({**DATA, "steps": 9, "from": "bert-base-cased"}, source="x")
    write_config(tmp_path / "config.yaml", settings)
    assert read_settings(load_config(str(tmp_path / "config.yaml")), source="y") == settings
    values = settings.model_dump(mode="json", by_alias=True)
    assert differences(values, {**values, "steps": 10}) == ["steps: 9 -> 10"]
    assert differences(values, {**values, "keep": 5}) == []


def test_shipped_settings_are_valid_and_named() -> None:
    assert shipped_configs()
    for name in shipped_configs():
        options = {"task": load_config(name).get("task", "pretrain"), "from": "run"}
        gather_settings(name, text=["a.db"], images=["a.lmdb"], options=options)
    with pytest.raises(BadInput, match=f"did you mean '{shipped_configs()[0]}'"):
        load_config(shipped_configs()[0] + "x")


@pytest.mark.parametrize(
    ("name", "examples"),
    [
        *((f"small-gpu-{card}gb", 3840) for card in (8, 12, 24)),
        *((f"small-gpu-{card}gb-large", 16 * 4 * 48) for card in (8, 12, 24)),
        ("pretrain-in-domain-base", 16 * 80),
    ],
)
def test_shipped_settings_have_the_published_number_of_examples_in_an_update(name: str, examples: int) -> None:
    """48 (in-domain 16) micro-batches of about 80 examples of about 55 tokens; of the large model 64 of 48."""
    settings = gather_settings(name, text=["a.db"], images=["a.lmdb"])
    assert settings.batch_tokens and settings.accumulation
    assert settings.batch_tokens * settings.accumulation == examples * 55
    start = "bert-large-cased" if name.endswith("-large") else "bert-base-cased"
    assert (settings.from_, settings.optimizer.learning_rate, settings.optimizer.clip) == (start, 5e-5, 5.0)
    alone = gather_settings(name, text=["a.db"], images=["a.lmdb"], assignments=["from=null"], options={"model.size": "base"})
    assert alone.from_ is None


def test_every_setting_is_explained() -> None:
    lines = explain_settings().splitlines()
    assert len(lines) > 40
    assert all("  # " in line for line in lines)
    assert any(line.startswith("normalisation: global-mean  # ") for line in lines)


def test_options_overrule_the_file_and_assignments_overrule_both(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("steps: 5\nseed: 1\ncorpora: [{text: [a.db], images: [a.lmdb], tasks: {mlm: 1}}]\n")
    settings = gather_settings(
        str(tmp_path / "mine.yaml"), options={"steps": 6, "seed": 2}, assignments=["seed=3"], text=["b.db"], images=["b.lmdb"]
    )
    assert (settings.steps, settings.seed, settings.corpora[0].text) == (6, 3, ["b.db"])
    assert settings.corpora[0].tasks == {"mlm": 1}
    with pytest.raises(BadInput, match="give both --text and --images"):
        gather_settings(None, text=["b.db"])
    with pytest.raises(BadInput, match="nothing to train on"):
        gather_settings(None)
    (tmp_path / "hostile.yaml").write_text("!!python/object/apply:os.system ['touch /tmp/owned']")
    with pytest.raises(BadInput, match="not valid YAML"):
        gather_settings(str(tmp_path / "hostile.yaml"))


ALL_DATA = {
    "model_config": "/src/config/uniter-base.json",
    "checkpoint": "/pretrain/uniter-base-init.pt",
    "output_dir": "/storage/pretrain/alldata",
    "mrm_prob": 0.15,
    "itm_neg_prob": 0.5,
    "itm_ot_lambda": 0.1,
    "max_txt_len": 60,
    "conf_th": 0.2,
    "max_bb": 100,
    "min_bb": 10,
    "num_bb": 36,
    "train_batch_size": 10240,
    "val_batch_size": 10240,
    "gradient_accumulation_steps": 6,
    "learning_rate": 5e-05,
    "valid_steps": 5000,
    "num_train_steps": 200000,
    "optim": "adamw",
    "betas": [0.9, 0.98],
    "dropout": 0.1,
    "weight_decay": 0.01,
    "grad_norm": 5.0,
    "warmup_steps": 10000,
    "seed": 42,
    "fp16": True,
    "n_workers": 4,
    "pin_mem": True,
    "train_datasets": [
        {
            "name": "coco",
            "db": ["/txt/pretrain_coco_train.db/", "/txt/pretrain_coco_restval.db/"],
            "img": ["/img/coco_train2014/", "/img/coco_val2014/"],
            "tasks": ["itm", "mlm", "mrfr", "mrckl"],
            "mix_ratio": [6, 8, 4, 4],
        },
        {
            "name": "vg",
            "db": ["/txt/pretrain_vg_train.db/"],
            "img": ["/img/vg/"],
            "tasks": ["itm", "mlm", "mrfr", "mrckl"],
            "mix_ratio": [9, 12, 6, 6],
        },
    ],
    "val_datasets": [
        {"name": "coco", "db": ["/txt/pretrain_coco_val.db/"], "img": ["/img/coco_val2014/"], "tasks": ["itm", "mlm", "mrfr", "mrckl"]},
    ],
}
ROOTS = ["/txt=/data/txt", "/img=/data/img/", "/pretrain=/data/start"]


def test_a_published_file_means_the_published_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "pretrain-alldata-base-8gpu.json"
    path.write_text(json.dumps({**ALL_DATA, "rank": 0, "mask_dir": "/x", "warp": 9}))
    with caplog.at_level("INFO"):
        settings = gather_settings(str(path), roots=ROOTS)
    for word in (
        "rank is ignored: processes number themselves",
        "mask_dir is ignored: no code reads it",
        "fp16 with loss scaling is replaced by bf16",
        "warp = 9 is not known and ignored",
    ):
        assert word in caplog.text
    assert settings.workers is None
    coco, visual_genome = settings.corpora
    assert coco.text == ["/data/txt/pretrain_coco_train.db", "/data/txt/pretrain_coco_restval.db"]
    assert coco.images == ["/data/img/coco_train2014", "/data/img/coco_val2014"]
    assert coco.tasks == {"itm": 6, "mlm": 8, "mrfr": 4, "mrc-kl": 4} and visual_genome.tasks == {
        "itm": 9,
        "mlm": 12,
        "mrfr": 6,
        "mrc-kl": 6,
    }
    assert (coco.validation_text, coco.validation_images) == (["/data/txt/pretrain_coco_val.db"], ["/data/img/coco_val2014"])
    assert (settings.normalisation, settings.ordering, settings.optimizer.unused_gradients) == ("published", "published", "zero")
    assert (settings.batch_tokens, settings.accumulation, settings.steps, settings.validate_every) == (10240, 6, 200000, 5000)
    assert (settings.optimizer.learning_rate, settings.optimizer.warmup_steps, settings.optimizer.clip) == (5e-5, 10000, 5.0)
    assert (settings.alignment_weight, settings.precision, settings.from_) == (0.1, "bf16", "/data/start/uniter-base-init.pt")


def test_absent_published_keys_take_argparses_defaults() -> None:
    values = {key: value for key, value in ALL_DATA.items() if key not in {"itm_ot_lambda", "gradient_accumulation_steps"}}
    ours = read_published(values, roots=ROOTS, source="x.json")
    assert ours["alignment_weight"] == 0.0 and ours["accumulation"] == 16


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_config": "/src/config/uniter-large.json"}, "is a base model, but model_config /src/config/uniter-large.json is large"),
        ({"optim": "adamax"}, "optim is 'adamax'; only adamw"),
        ({"train_datasets": [{"name": "coco", "db": []}]}, "a data set of train_datasets lacks 'img'"),
    ],
)
def test_published_files_that_cannot_work_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        read_published({**ALL_DATA, **changes}, roots=ROOTS, source="x.json")


def test_unmapped_container_paths_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        BadInput, match="/img/coco_train2014/ is a path of the published container; say where it is with --root /img=FOLDER"
    ):
        read_published(ALL_DATA, roots=["/txt=/data/txt"], source="x.json")
    with pytest.raises(BadInput, match="of a fine-tuning task; use it with uniter-train finetune"):
        read_published({"train_txt_db": "/txt/ve_train.db", "model_config": "x"}, source="x.json")
    # What the user starts from need not be mapped.
    ours = read_published(ALL_DATA, roots=ROOTS[:2], source="x.json", own_start=True)
    assert "from" not in ours and "model" not in ours


VQA = {
    "train_txt_dbs": ["/txt/vqa_train.db", "/txt/vqa_vg.db"],
    "train_img_dbs": ["/img/coco_train2014/", "/img/vg/"],
    "val_txt_db": "/txt/vqa_devval.db",
    "val_img_db": "/img/coco_val2014/",
    "checkpoint": "/pretrain/uniter-base.pt",
    "model_config": "/src/config/uniter-base.json",
    "output_dir": "/storage/vqa/default",
    "max_txt_len": 60,
    "train_batch_size": 5120,
    "val_batch_size": 10240,
    "gradient_accumulation_steps": 5,
    "learning_rate": 8e-05,
    "lr_mul": 10.0,
    "valid_steps": 500,
    "num_train_steps": 6000,
    "warmup_steps": 600,
    "optim": "adamw",
    "betas": [0.9, 0.98],
    "dropout": 0.1,
    "weight_decay": 0.01,
    "grad_norm": 2.0,
    "seed": 42,
    "fp16": True,
    "n_workers": 4,
    "pin_mem": True,
}


def test_published_fine_tuning_files_mean_their_runs(tmp_path: Path) -> None:
    path = tmp_path / "train-vqa-base-4gpu.json"
    path.write_text(json.dumps(VQA))
    settings = gather_settings(str(path), roots=ROOTS, options={"task": "vqa"})
    assert settings.task == "vqa" and settings.from_ == "/data/start/uniter-base.pt"
    assert settings.corpora[0].text == ["/data/txt/vqa_train.db", "/data/txt/vqa_vg.db"]
    assert settings.corpora[0].validation_text == ["/data/txt/vqa_devval.db"]
    assert (settings.batch_tokens, settings.accumulation, settings.steps) == (5120, 5, 6000)
    assert (settings.optimizer.head_rate_multiplier, settings.optimizer.clip) == (10.0, 2.0)
    nlvr2 = {key: value for key, value in VQA.items() if key != "lr_mul"} | {"model": "paired-attn", "use_img_type": True}
    assert read_published(nlvr2, roots=ROOTS, source="x.json", task="nlvr2")["task"] == "nlvr2"
    with pytest.raises(BadInput, match="use it with uniter-train finetune nlvr2"):
        read_published(nlvr2, roots=ROOTS, source="x.json", task="nlvr2-triplet")
    large = {**VQA, "model_config": "/src/config/uniter-large.json"}
    with pytest.raises(BadInput, match="is a base model, but model_config"):
        read_published(large, roots=ROOTS, source="train-itm-flickr-large-16gpu-hn.json", task="retrieval-hard")
    hard = read_published({**VQA, "train_batch_size": 8}, roots=ROOTS, source="x.json", task="retrieval-hard")
    assert (hard["batch_tokens"], hard["accumulation"], hard["ordering"], hard["normalisation"]) == (1, 8, "buckets", "global-mean")


def test_published_files_of_referring_expressions_and_choices() -> None:
    referring = {**VQA, "train_batch_size": 128, "decay": "linear", "conf_th": -1, "num_bb": 100, "seed": 24}
    ours = read_published(referring, roots=ROOTS, source="train-refcoco-base-1gpu.json", task="refcoco")
    assert (ours["batch_tokens"], ours["ordering"], ours["regions"]["conf_th"]) == (2560, "buckets", -1)
    with pytest.raises(BadInput, match=r"a head with 2 layers .* use it with uniter-train finetune refcoco-two-layers"):
        read_published({**referring, "mlp": 2}, roots=ROOTS, source="train-refcoco+-base-1gpu.json", task="refcoco")
    choices = {**VQA, "train_batch_size": 4000, "max_txt_len": 220, "checkpoint_from": "vcr_pretrain"}
    choices |= {"train_txt_dbs": ["/txt/vcr_train.db/"], "train_img_dbs": ["/img/vcr_gt_train/;/img/vcr_train/"]}
    ours = read_published(choices, roots=ROOTS, source="train-vcr-base-4gpu.json", task="vcr")
    assert (ours["batch_tokens"], ours["max_text_length"]) == (16000, 220)
    assert ours["corpora"][0]["images"] == ["/data/img/vcr_gt_train;/data/img/vcr_train"]


def test_tasks_and_their_ratios_on_the_command_line() -> None:
    def tasks(text: str | None) -> object:
        return gather_settings(None, text=["a.db"], images=["a.lmdb"], tasks=text).corpora[0].tasks

    assert tasks(None) is None
    assert tasks("mlm, itm") == {"mlm": 1.0, "itm": 1.0}
    assert tasks("mlm:2,mrc-kl:0.5") == {"mlm": 2.0, "mrc-kl": 0.5}
    with pytest.raises(BadInput, match="--tasks 'mlm:often': 'often' is no number"):
        tasks("mlm:often")


def test_corpora_of_another_kind_are_refused_whatever_the_command_adds(tmp_path: Path) -> None:
    path = tmp_path / "odd.yaml"
    for odd in ("corpora: [captions.db]", "corpora: captions.db"):
        path.write_text(odd, encoding="utf-8")
        with pytest.raises(BadInput, match="corpora"):
            gather_settings(str(path), validation_text=["val.db"], tasks="mlm")


def test_a_file_of_another_task_is_said_to_be_one(tmp_path: Path) -> None:
    published, ours, odd = tmp_path / "pretrain.json", tmp_path / "config.yaml", tmp_path / "odd.yaml"
    published.write_text(json.dumps(ALL_DATA))
    with pytest.raises(BadInput, match=r"pretrain.json is a published file of pre-training; use it with uniter-train pretrain"):
        gather_settings(str(published), roots=ROOTS, options={"task": "vqa"})
    ours.write_text(json.dumps({**DATA, "task": "pretrain"}))
    assert gather_settings(str(ours)).task == "pretrain"
    with pytest.raises(BadInput, match=r"of the task 'pretrain'; use them with uniter-train pretrain"):
        gather_settings(str(ours), options={"task": "vqa"})
    ours.write_text(json.dumps({**DATA, "task": "vqa"}))
    with pytest.raises(BadInput, match=r"of the task 'vqa'; use them with uniter-train finetune vqa"):
        gather_settings(str(ours))
    odd.write_text(json.dumps({**DATA, "model": 5}))
    with pytest.raises(BadInput, match="'model' is a int, expected a mapping with the key 'size'"):
        gather_settings(str(odd), options={"model.size": "tiny"})


def test_settings_that_are_no_text_are_said_not_to_be(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(b"\xec\x00\xff")
    with pytest.raises(BadInput, match="not UTF-8 text"):
        load_config(str(tmp_path / "config.yaml"))
    (tmp_path / "config.yaml").write_text("[" * 100_000)
    with pytest.raises(BadInput, match="not valid YAML"):
        load_config(str(tmp_path / "config.yaml"))
