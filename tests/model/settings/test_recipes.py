"""The recipes that ship say what was published, number by number; the numbers here were copied from the published files by hand."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from uniter.datasets.errors import BadInput
from uniter.model.settings.files import load_config, shipped_configs
from uniter.model.settings.gather import gather_settings
from uniter.model.settings.recipes import memory_of, recipes
from uniter.model.settings.settings import TrainSettings
from uniter.model.tasks.table import DOWNSTREAM
from uniter.model.train.runs import _share


class Published(NamedTuple):
    """Of a file: GPUs, train_batch_size, gradient_accumulation_steps, learning_rate, num_train_steps, warmup_steps, checkpoint, seed,
    lr_mul, and adv_modality, adv_lr_txt and adv_kl_weight."""

    task: str
    gpus: int
    batch: int
    accumulation: int
    rate: float
    steps: int
    warmup: int
    start: str
    seed: int = 42
    head: float | None = None
    shifts: tuple[list[str], float, float] | None = None


WORDS, BOTH = ["text"], ["text", "image"]
FINETUNING = {
    "vqa-base": Published("vqa", 4, 5120, 5, 8e-5, 6000, 600, "uniter-base.pt", head=10),
    "vqa-large": Published("vqa", 8, 3072, 4, 5e-5, 5000, 500, "uniter-large.pt", head=10),
    "ve-base": Published("ve", 2, 4096, 4, 8e-5, 4000, 400, "uniter-base.pt"),
    "ve-large": Published("ve", 4, 4096, 2, 3e-5, 4000, 400, "uniter-large.pt"),
    "nlvr2-base": Published("nlvr2", 1, 10240, 1, 3e-5, 8000, 800, "uniter-base.pt", seed=77),
    "nlvr2-large": Published("nlvr2", 2, 5120, 2, 2e-5, 5000, 500, "uniter-large.pt", seed=24),
    "vcr-base": Published("vcr", 4, 4000, 5, 6e-5, 8000, 800, "uniter-base-vcr_2nd_stage.pt", head=1),
    "vcr-large": Published("vcr", 4, 4000, 5, 6e-5, 8000, 800, "uniter-large-vcr_2nd_stage.pt", head=1),
    "retrieval-flickr-base": Published("retrieval", 8, 40, 4, 5e-5, 20000, 2000, "uniter-base.pt"),
    "retrieval-hard-flickr-base": Published("retrieval-hard", 16, 8, 1, 5e-5, 5000, 500, "uniter-base.pt"),
    "retrieval-hard-flickr-large": Published("retrieval-hard", 16, 8, 1, 5e-5, 5000, 500, "uniter-large.pt"),
    "retrieval-hard-coco-base": Published("retrieval-hard", 16, 8, 1, 5e-5, 5000, 500, "uniter-base.pt"),
    "retrieval-hard-coco-large": Published("retrieval-hard", 16, 8, 1, 3e-5, 5000, 500, "uniter-large.pt"),
    "refcoco-base": Published("refcoco", 1, 128, 1, 1e-4, 24000, 1500, "uniter-base.pt", seed=24, head=1),
    "refcoco+-base": Published("refcoco-two-layers", 1, 128, 1, 6e-5, 10000, 1000, "uniter-base.pt", seed=24, head=1),
    "refcocog-base": Published("refcoco", 1, 128, 1, 1e-4, 24000, 1500, "uniter-base.pt", seed=24, head=1),
    "vqa-base-villa": Published("vqa", 4, 5120, 5, 8e-5, 6000, 600, "villa-base.pt", head=10, shifts=(WORDS, 1e-3, 1.5)),
    "vqa-large-villa": Published("vqa", 8, 3072, 4, 5e-5, 5000, 500, "villa-large.pt", head=10, shifts=(WORDS, 2e-3, 1.0)),
    "vqa-large-villa-best": Published("vqa", 16, 2048, 3, 5e-5, 7000, 700, "villa-large.pt", head=10, shifts=(BOTH, 2e-3, 1.0)),
    "ve-base-villa": Published("ve", 2, 4096, 4, 8e-5, 4000, 400, "villa-base.pt", shifts=(WORDS, 1e-3, 1.5)),
    "ve-large-villa": Published("ve", 4, 4096, 2, 3e-5, 4000, 400, "villa-large.pt", shifts=(WORDS, 1e-3, 1.5)),
    "nlvr2-base-villa": Published("nlvr2", 1, 10240, 1, 3e-5, 8000, 800, "villa-base.pt", seed=77, shifts=(WORDS, 1e-3, 1.5)),
    "nlvr2-large-villa": Published("nlvr2", 2, 5120, 2, 2e-5, 5000, 500, "villa-large.pt", seed=24, shifts=(WORDS, 1e-3, 1.5)),
    "vcr-base-villa": Published("vcr", 4, 4000, 5, 6e-5, 8000, 800, "villa-base-vcr-2nd-stage.pt", head=1, shifts=(BOTH, 1e-2, 1.5)),
    "vcr-large-villa": Published(
        "vcr", 4, 2000, 10, 6e-5, 10000, 1000, "villa-large-vcr-2nd-stage.pt", seed=88, head=1, shifts=(BOTH, 0.1, 1.0)
    ),
}
PRETRAINING = {
    "pretrain-indomain-base": Published("pretrain", 8, 10240, 2, 5e-5, 200_000, 10_000, "bert-base-cased"),
    "pretrain-alldata-base": Published("pretrain", 8, 10240, 6, 5e-5, 200_000, 10_000, "bert-base-cased"),
    "pretrain-alldata-large": Published("pretrain", 16, 6144, 4, 5e-5, 500_000, 10_000, "bert-large-cased"),
    "pretrain-vcr-base": Published("pretrain", 4, 6144, 4, 3e-5, 45_000, 4_500, "uniter-base.pt"),
    "pretrain-vcr-large": Published("pretrain", 4, 6144, 4, 3e-5, 45_000, 4_500, "uniter-large.pt"),
}
ALL = PRETRAINING | FINETUNING
ROOTS = ["/txt=/data/txt", "/img=/data/img", "/pretrain=/data/start"]
# What a published batch of so many groups, phrases or tokens is in tokens here, and micro-batches of an update.
BATCHES = {"retrieval": lambda n: n * 150, "retrieval-hard": lambda n: 1, "vcr": lambda n: 4 * n}
REFERRING = ("refcoco", "refcoco-two-layers")


def settings_of(name: str) -> TrainSettings:
    return gather_settings(name, roots=ROOTS, options={"task": ALL[name].task})


def test_every_recipe_is_held_to_what_was_published() -> None:
    assert {recipe.name for recipe in recipes()} == set(ALL) == {name for name in shipped_configs() if "processes" in load_config(name)}


@pytest.mark.parametrize("name", ALL)
def test_it_says_what_was_published(name: str) -> None:
    said, published = settings_of(name), ALL[name]
    in_tokens = BATCHES.get(published.task, (lambda n: n * 20) if published.task in REFERRING else (lambda n: n))
    assert (said.task, said.processes, said.batch_tokens) == (published.task, published.gpus, in_tokens(published.batch))
    # Of hard negatives each of the eight groups is a micro-batch.
    assert said.accumulation == (published.batch if published.task == "retrieval-hard" else published.accumulation)
    optimizer = said.optimizer
    assert (optimizer.learning_rate, said.steps, optimizer.warmup_steps) == (published.rate, published.steps, published.warmup)
    assert said.seed == published.seed and optimizer.head_rate_multiplier == published.head
    assert said.from_ == (published.start if published.start.startswith("bert") else f"/data/start/{published.start}")
    assert (optimizer.betas, optimizer.weight_decay, optimizer.epsilon, said.dropout) == ((0.9, 0.98), 0.01, 1e-6, 0.1)
    longest = 220 if "vcr" in name else 60
    assert (said.max_text_length, said.precision, optimizer.unused_gradients) == (longest, "bf16", "zero")
    boxes = (said.regions.conf_th, said.regions.max_bb, said.regions.min_bb, said.regions.num_bb)
    threshold = 0.075 if name == "vqa-large-villa-best" else 0.2
    assert boxes == ((-1, 100, 10, 100) if published.task in REFERRING else (threshold, 100, 10, 36))
    assert said.normalisation == ("global-mean" if published.task == "retrieval-hard" else "published")
    if published.shifts is None:
        assert said.adversarial is None
    else:
        on, rate, weight = published.shifts
        shifts = said.adversarial
        assert shifts is not None and (shifts.on, shifts.weight, shifts.steps, shifts.norm, shifts.max_norm) == (on, weight, 3, "l2", 0)
        assert {shifts.rate_of(side) for side in on} == {rate} and not shifts.alternate


@pytest.mark.parametrize("name", FINETUNING)
def test_fine_tuning_clips_at_two_and_names_known_rows(name: str) -> None:
    said = settings_of(name)
    assert said.optimizer.clip == 2.0 and said.task in DOWNSTREAM
    (corpus,) = said.corpora
    assert corpus.validation_text and corpus.validation_images
    valid = {"vcr": 1000, "retrieval": 2000}.get(said.task, None if said.task in REFERRING else 500)
    assert said.validate_every == valid


@pytest.mark.parametrize("name", PRETRAINING)
def test_pre_training_mixes_as_published(name: str) -> None:
    said = settings_of(name)
    four = ("itm", "mlm", "mrfr", "mrc-kl")
    everything = {"coco": (6, 8, 4, 4), "vg": (9, 12, 6, 6), "cc": (9, 12, 6, 6), "sbu": (6, 8, 4, 4)}
    second = {"pretrain-vcr-base": (2, 1, 1), "pretrain-vcr-large": (10, 1, 1)}
    ratios: dict[str, Any] = {corpus.name: corpus.tasks for corpus in said.corpora}
    if name in second:
        assert ratios == {"vcr": dict(zip(four[1:], second[name], strict=True))}
        assert said.optimizer.clip == -1 and said.validate_every == 2000
        return
    mixed = {"coco": (2, 2, 1, 1), "vg": (2, 2, 1, 1)} if "indomain" in name else everything
    assert ratios == {corpus: dict(zip(four, numbers, strict=True)) for corpus, numbers in mixed.items()}
    assert (said.optimizer.clip, said.alignment_weight, said.negative_probability, said.masking.regions) == (5.0, 0.1, 0.5, 0.15)
    assert said.validate_every == (10_000 if "large" in name else 5_000)


def test_databases_and_starts_are_mapped_or_the_users_own() -> None:
    said = settings_of("vqa-base")
    assert said.corpora[0].text == ["/data/txt/vqa_train.db", "/data/txt/vqa_trainval.db", "/data/txt/vqa_vg.db"]
    assert settings_of("vcr-base").corpora[0].images == ["/data/img/vcr_gt_train;/data/img/vcr_train"]
    with pytest.raises(BadInput, match=r"vqa-base: /txt/vqa_train\.db is a path of the published container; .* --root /txt=FOLDER"):
        gather_settings("vqa-base", options={"task": "vqa"})
    own = gather_settings("vqa-base", options={"task": "vqa", "from": "run"}, text=["a.db"], images=["a.lmdb"])
    assert (own.from_, own.corpora[0].text, own.steps) == ("run", ["a.db"], 6000)
    with pytest.raises(BadInput, match="and here are none of them; leave it out"):
        gather_settings("small-gpu-8gb", roots=["/txt=x"], text=["a.db"], images=["a.lmdb"])
    with pytest.raises(BadInput, match="of the task 'vqa'; use them with uniter-train finetune vqa"):
        gather_settings("vqa-base", roots=ROOTS, options={"task": "ve"})


def test_what_they_take_is_the_documented_arithmetic() -> None:
    found = {recipe.name: recipe for recipe in recipes()}
    pairs = {"pretrain-indomain-base": 1280, "pretrain-alldata-base": 3840, "pretrain-alldata-large": 3072}
    assert {name: found[name].examples for name in pairs} == pairs
    assert found["pretrain-alldata-base"].hours == pytest.approx(15, abs=0.5)
    assert found["pretrain-alldata-large"].hours == pytest.approx(107, abs=1)
    # Three passes with shifts and a clean one, each forward and backward.
    assert found["vqa-base-villa"].hours == pytest.approx(4 * found["vqa-base"].hours)
    assert found["vqa-base-villa"].memory > found["vqa-base"].memory
    assert found["vqa-base"].data == (
        "vqa_train.db", "vqa_trainval.db", "vqa_vg.db", "vqa_devval.db", "coco_train2014", "coco_val2014", "vg",
    )  # fmt: skip


@pytest.mark.parametrize("name", [name for name in shipped_configs() if name.startswith("small-gpu-")])
def test_settings_for_small_gpus_fit_them(name: str) -> None:
    card, _, size = name.removeprefix("small-gpu-").partition("gb-")
    settings = gather_settings(name, text=["a.db"], images=["a.lmdb"])
    assert settings.batch_tokens and settings.precision == "bf16"
    taken = memory_of(size or "base", settings.batch_tokens, recompute=settings.recompute)
    assert 0.7 * int(card.removesuffix("gb")) < taken < 0.95 * int(card.removesuffix("gb"))


@pytest.mark.parametrize(("world", "share"), [(1, 20), (2, 10), (4, 5), (5, 4), (20, 1)])
def test_other_numbers_of_processes_share_an_update(world: int, share: int) -> None:
    assert _share(5, 4, world) == share
    assert _share(5, None, world) == 5


def test_processes_that_cannot_share_are_told() -> None:
    with pytest.raises(BadInput, match=r"4 x 5 micro-batches \(processes, accumulation\), which 8 processes cannot share evenly"):
        _share(5, 4, 8)


def test_the_page_of_reproduction_names_every_recipe() -> None:
    page = (Path(__file__).parents[3] / "docs" / "reproducing.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for name in ALL)
    assert all(
        f"| {recipe.memory:.0f} GiB |" in line for recipe in recipes() for line in page.splitlines() if f"| `{recipe.name}` | `" in line
    )
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")]
    assert len(cells) > 60 and all(all(row) for row in cells), "no cell is empty"
