"""UNITER's published JSON settings as ours: their container paths, their batching and their normalisation.

What the files say that means nothing any more is ignored with a word; what cannot work is refused in a sentence.

Source: ChenRocks/UNITER, `config/*.json`; facts/uniter.md sections 5.4, 5.6 and 8.2.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from uniter.datasets.errors import BadInput
from uniter.model.settings.files import put
from uniter.model.settings.settings import DEFAULT_TASK
from uniter.model.tasks.table import task_name
from uniter.model.uniter import UniterConfig

logger = logging.getLogger(__name__)

# Published key -> ours. Dots reach into groups.
RENAMED = {
    "itm_neg_prob": "negative_probability",
    "itm_ot_lambda": "alignment_weight",
    "max_txt_len": "max_text_length",
    "train_batch_size": "batch_tokens",
    "gradient_accumulation_steps": "accumulation",
    "learning_rate": "optimizer.learning_rate",
    "warmup_steps": "optimizer.warmup_steps",
    "betas": "optimizer.betas",
    "weight_decay": "optimizer.weight_decay",
    "grad_norm": "optimizer.clip",
    "num_train_steps": "steps",
    "valid_steps": "validate_every",
    "mrm_prob": "masking.regions",
    "conf_th": "regions.conf_th",
    "max_bb": "regions.max_bb",
    "min_bb": "regions.min_bb",
    "num_bb": "regions.num_bb",
    "dropout": "dropout",
    "seed": "seed",
}


# argparse's defaults of `pretrain.py`, where they differ from ours.
DEFAULTS = {"itm_ot_lambda": 0.0, "gradient_accumulation_steps": 16, "learning_rate": 3e-5, "grad_norm": 2.0, "dropout": 0.1}


MEANINGLESS = {
    "rank": "processes number themselves",
    "mask_dir": "no code reads it",
    "pin_mem": "memory is pinned wherever there is a GPU",
    "n_workers": "the number of workers is fitted to the machine; --set workers=4 overrules",
    "compressed_db": "databases say themselves how they are packed",
    "val_batch_size": "validation uses the training budget",
}


ELSEWHERE = {"output_dir", "model_config", "checkpoint", "train_datasets", "val_datasets", "optim", "fp16"}


# Of the fine-tuning files.
RENAMED_FINETUNING = {**{key: value for key, value in RENAMED.items() if key not in {"itm_neg_prob", "itm_ot_lambda", "mrm_prob"}}} | {
    "lr_mul": "optimizer.head_rate_multiplier",
}


DEFAULTS_FINETUNING = {"weight_decay": 0.0, "grad_norm": 0.25, "dropout": 0.1}


MEANINGLESS_FINETUNING = {
    **MEANINGLESS,
    "use_img_type": "NLVR2's pictures always have token types of their own",
    "full_val": "training validates on groups, evaluation on all pairs",
    "inf_minibatch_size": "evaluation batches by tokens",
    "margin": "it is 0.2, as published",
    "negative_size": "the row draws 1, with hard negatives 399",
    "hard_neg_size": "it is 31, as published",
    "train_db_group": "databases are given",
    "hard_ratio": "it is 0.3, as published",
    "decay": "the rate falls linearly, as in every published file",
    "checkpoint_from": "a checkpoint says itself which tables it holds",
}


DATABASES = {
    "train_txt_db", "train_img_db", "train_txt_dbs", "train_img_dbs", "val_txt_db", "val_img_db", "test_txt_db", "test_img_db",
    "val_txt_dbs", "val_img_dbs",
}  # fmt: skip


# Of VILLA's files.
ADVERSARIAL = {
    "adv_training", "adv_modality", "adv_lr_txt", "adv_lr_img", "adv_steps", "adv_init_mag", "norm_type", "adv_max_norm", "adv_kl_weight",
}  # fmt: skip


NLVR2_MODELS = {"paired-attn": "nlvr2", "paired": "nlvr2-paired", "triplet": "nlvr2-triplet"}


REFERRING_LAYERS = {1: ("refcoco", "refcoco-rank"), 2: ("refcoco-two-layers",)}


PHRASE_TOKENS = 20  # of a phrase with the annotated boxes of its picture, about


GROUP_TOKENS = 150  # of a text with its picture, a wrong picture and a wrong text, about


def is_published(values: Mapping[str, Any]) -> bool:
    """Whether a settings file is UNITER's: ours have neither of these keys."""
    return bool({"train_datasets", "train_txt_db", "train_txt_dbs", "model_config"} & values.keys())


def read_published(
    values: Mapping[str, Any], *, roots: Sequence[str] = (), source: str, own_start: bool = False, task: str = DEFAULT_TASK
) -> dict[str, Any]:
    """Our settings, as a mapping that `read_settings` validates.

    Args:
        values: the JSON file.
        roots: "/img=folder" and the like: where the container's folders are here.
        source: the file, for messages.
        task: pretrain, or the down-stream task that is fine-tuned.
        own_start: the user says what to start from, so the file's checkpoint and model sizes are not looked at.

    Raises:
        BadInput: the file is of another task, a path has no root, or checkpoint and model do not fit.
    """
    if task != DEFAULT_TASK:
        return _read_finetuning(values, roots=roots, source=source, own_start=own_start, task=task)
    if "train_datasets" not in values:
        raise BadInput(f"{source} is a published file of a fine-tuning task; use it with uniter-train finetune TASK")
    places = Places(roots, source)
    ours: dict[str, Any] = {"normalisation": "published", "ordering": "published", "optimizer": {"unused_gradients": "zero"}}
    for key, value in {**DEFAULTS, **values}.items():
        if key in RENAMED:
            put(ours, RENAMED[key], value)
        elif key in MEANINGLESS:
            logger.info("%s: %s is ignored: %s", source, key, MEANINGLESS[key])
        elif key not in ELSEWHERE | ADVERSARIAL:
            logger.warning("%s: %s = %r is not known and ignored", source, key, value)
    if values.get("optim", "adamw") != "adamw":
        raise BadInput(f"{source}: optim is {values['optim']!r}; only adamw, which every published file uses, is here")
    if values.get("fp16"):
        logger.info("%s: fp16 with loss scaling is replaced by bf16, which needs none; --precision fp32 overrules", source)
        ours["precision"] = "bf16"
    ours["checkpoint_every"] = ours.get("validate_every")
    ours["corpora"] = _corpora(values, places, source)
    ours |= _adversarial(values, source)
    if own_start:
        return ours
    size = check_sizes(values, source)
    checkpoint = values.get("checkpoint")
    if checkpoint:
        ours["from"] = places.here(str(checkpoint))
    else:
        ours["model"] = {"size": size} if size else _model_sizes(places.here(str(values.get("model_config", ""))), source)
    return ours


def _read_finetuning(values: Mapping[str, Any], *, roots: Sequence[str], source: str, own_start: bool, task: str) -> dict[str, Any]:
    """The settings of a published fine-tuning file (`train-vqa-base-4gpu.json` ...)."""
    if "train_datasets" in values:
        raise BadInput(f"{source} is a published file of pre-training; use it with uniter-train pretrain, or name a file of {task}")
    places = Places(roots, source)
    texts, images = (_listed(values.get(f"train_{kind}_dbs", values.get(f"train_{kind}_db", []))) for kind in ("txt", "img"))
    if not texts or not images:
        raise BadInput(
            f"{source} names no training databases; expected train_txt_db(s) and train_img_db(s) as in UNITER's fine-tuning files"
        )
    model = values.get("model")
    if model is not None and NLVR2_MODELS.get(str(model)) != task:
        raise BadInput(f"{source} is of the model {model!r}; use it with uniter-train finetune {NLVR2_MODELS.get(str(model), 'nlvr2')}")
    layers = int(values.get("mlp", 1))
    rows = REFERRING_LAYERS.get(layers, ())
    if task.startswith("refcoco") and task not in rows:
        raise BadInput(
            f"{source} is of a head with {layers} layers (mlp); use it with uniter-train finetune {' or '.join(rows) or 'nothing'}"
        )
    ours: dict[str, Any] = {"task": task, "normalisation": "published", "ordering": "published", "optimizer": {"unused_gradients": "zero"}}
    ranks = task.startswith("retrieval")
    for key, value in {**DEFAULTS_FINETUNING, **values}.items():
        if key in RENAMED_FINETUNING:
            put(ours, RENAMED_FINETUNING[key], value)
        elif key in MEANINGLESS_FINETUNING:
            logger.info("%s: %s is ignored: %s", source, key, MEANINGLESS_FINETUNING[key])
        elif key not in ELSEWHERE | DATABASES | ADVERSARIAL | {"model", "mlp"}:
            logger.warning("%s: %s = %r is not known and ignored", source, key, value)
    if values.get("optim", "adam") != "adamw":
        raise BadInput(f"{source}: optim is {values.get('optim', 'adam')!r}; only adamw, which every published file uses, is here")
    if ranks:
        # train_batch_size counts groups there. Groups are packed by tokens here; with hard negatives each is a micro-batch.
        groups = int(ours.pop("batch_tokens", 8))
        ours["ordering"] = "buckets"
        if task == "retrieval":
            ours["batch_tokens"] = groups * GROUP_TOKENS
        else:
            # Of all scripts only that of hard negatives divides by the number of groups.
            ours |= {"batch_tokens": 1, "accumulation": groups, "normalisation": "global-mean"}
    if task.startswith("refcoco"):  # it counts phrases
        ours |= {"ordering": "buckets", "batch_tokens": int(ours.pop("batch_tokens", 128)) * PHRASE_TOKENS}
    if task == "vcr":  # it counts one of an example's four sequences
        ours |= {"ordering": "buckets", "batch_tokens": int(ours.pop("batch_tokens", 4000)) * 4}
    if values.get("fp16"):
        ours["precision"] = "bf16"
    ours["checkpoint_every"] = ours.get("validate_every")
    corpus: dict[str, Any] = {"text": [places.here(path) for path in texts], "images": [places.here(path) for path in images]}
    if values.get("val_txt_db"):
        corpus["validation_text"] = [places.here(path) for path in _listed(values["val_txt_db"])]
        corpus["validation_images"] = [places.here(path) for path in _listed(values.get("val_img_db", []))]
    ours["corpora"] = [corpus]
    ours |= _adversarial(values, source)
    if own_start:
        return ours
    check_sizes(values, source)
    checkpoint = values.get("checkpoint")
    if not checkpoint:
        raise BadInput(f"{source} names no checkpoint to start from; give one with --from")
    ours["from"] = places.here(str(checkpoint))
    return ours


def _adversarial(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Our `adversarial` of one of VILLA's files; empty of a file without adversarial training."""
    if not values.get("adv_training"):
        return {}
    if values.get("adv_init_mag"):
        raise BadInput(
            f"{source}: adv_init_mag is {values['adv_init_mag']!r}; shifts begin at zero, as in every published file: set it to 0"
        )
    modality = _listed(values.get("adv_modality", ["text"]))
    if unknown := set(modality) - {"text", "image", "alter"}:
        raise BadInput(f"{source}: adv_modality names {', '.join(sorted(unknown))}; expected text, image, or both with alter")
    rates = {"text": "adv_lr_txt", "image": "adv_lr_img"}
    on = [side for side in rates if side in modality]
    needed = ["adv_steps", "adv_kl_weight", *(rates[side] for side in on)]
    if missing := [key for key in needed if key not in values]:
        raise BadInput(
            f"{source}: adv_training without {', '.join(missing)}; every file of VILLA's has {'it' if len(missing) == 1 else 'them'}"
        )
    chosen = {
        "on": on,
        "rate": {side: values[rates[side]] for side in on},
        "steps": values["adv_steps"],
        "weight": values["adv_kl_weight"],
        "norm": values.get("norm_type", "l2"),
        "max_norm": values.get("adv_max_norm", 0),
        "alternate": "alter" in modality,
    }
    return {"adversarial": chosen}


def check_sizes(values: Mapping[str, Any], source: str) -> str | None:
    """The model's size by the names in the file: "base", "large" or None where they do not tell.

    Raises:
        BadInput: checkpoint and model are of different sizes (`train-itm-flickr-large-16gpu-hn.json` as published).
    """
    sizes = {}
    for key in ("model_config", "checkpoint"):
        name = str(values.get(key) or "").rsplit("/", 1)[-1]
        sizes[key] = next((size for size in ("base", "large") if f"-{size}" in name), None)
    if sizes["model_config"] and sizes["checkpoint"] and sizes["model_config"] != sizes["checkpoint"]:
        raise BadInput(
            f"{source}: the checkpoint {values['checkpoint']} is a {sizes['checkpoint']} model, but model_config "
            f"{values['model_config']} is {sizes['model_config']}; this published file cannot work, name a checkpoint of the same size"
        )
    return sizes["model_config"]


def _corpora(values: Mapping[str, Any], places: "Places", source: str) -> list[dict[str, Any]]:
    validation = {entry.get("name"): entry for entry in values.get("val_datasets", []) if isinstance(entry, dict)}
    corpora = []
    for entry in values["train_datasets"]:
        try:
            name, texts, images = entry["name"], entry["db"], entry["img"]
            tasks, ratios = entry["tasks"], entry.get("mix_ratio", [1] * len(entry["tasks"]))
        except (KeyError, TypeError) as error:
            raise BadInput(f"{source}: a data set of train_datasets lacks {error}; expected name, db, img, tasks, mix_ratio") from error
        if len(tasks) != len(ratios):
            raise BadInput(f"{source}: data set {name!r} has {len(tasks)} tasks but {len(ratios)} mix ratios")
        corpus: dict[str, Any] = {
            "name": name,
            "text": [places.here(path) for path in _listed(texts)],
            "images": [places.here(path) for path in _listed(images)],
            "tasks": {task_name(task): float(ratio) for task, ratio in zip(tasks, ratios, strict=True)},
        }
        held_out = validation.get(name)
        if held_out is not None:
            corpus["validation_text"] = [places.here(path) for path in _listed(held_out.get("db", []))]
            corpus["validation_images"] = [places.here(path) for path in _listed(held_out.get("img", []))]
        corpora.append(corpus)
    return corpora


def _listed(value: Any) -> list[str]:
    return [str(value)] if isinstance(value, str) else [str(one) for one in value]


def _model_sizes(path: str, source: str) -> dict[str, int]:
    if not Path(path).is_file():
        raise BadInput(f"{source}: its model_config {path!r} is not there; name a size with --model, or map its folder with --root")
    config = UniterConfig.from_json(path)
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings", "vocab_size")
    return {name: getattr(config, name) for name in names}


class Places:
    """Paths of UNITER's container -> paths here."""

    def __init__(self, roots: Sequence[str], source: str) -> None:
        self.source = source
        self.roots: dict[str, str] = {}
        for root in roots:
            container, equals, folder = root.partition("=")
            if not equals or not container.startswith("/") or not folder:
                raise BadInput(f"--root {root!r}: expected /CONTAINER=FOLDER, e.g. --root /img=/data/img")
            self.roots[container.rstrip("/")] = folder.rstrip("/") or "/"

    def maps(self, path: str) -> bool:
        """Whether `--root` says where a container's path is here."""
        return any(path == container or path.startswith(f"{container}/") for container in self.roots)

    def here(self, path: str) -> str:
        """The path, or both halves of "gt;det", with its container folder replaced."""
        if ";" in path:
            return ";".join(self.here(half) for half in path.split(";"))
        for container, folder in self.roots.items():
            if path == container or path.startswith(f"{container}/"):
                return (folder + path[len(container) :]).rstrip("/")
        if path.startswith("/") and not Path(path).exists():
            first = "/" + path.strip("/").split("/")[0]
            raise BadInput(f"{self.source}: {path} is a path of the published container; say where it is with --root {first}=FOLDER")
        return path.rstrip("/") or path
