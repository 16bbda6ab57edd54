"""The card of an exported model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from uniter.datasets.image_db.origin import RegionOrigin
from uniter.datasets.runs.run_log import read_log
from uniter.datasets.runs.step_folders import checkpoint_steps
from uniter.model.checkpoints.beside import DETECTOR
from uniter.model.checkpoints.load import kind_of
from uniter.model.checkpoints.read import find_weights
from uniter.model.checkpoints.write import Weights, as_weights
from uniter.model.settings.files import run_of


def model_card(
    model: nn.Module | Weights,
    *,
    name: str = "UNITER",
    trained_on: str | None = None,
    data: Sequence[str] = (),
    results: Mapping[str, float] | None = None,
    licence: str | None = None,
    place: str = "this/folder",
) -> str:
    """The model card: what it is, its sizes, how to load it, and what is known of its training.

    Args:
        trained_on: a sentence about the data; None is said as not recorded.
        data: the names of the data sets, for those who search.
        results: figures to show, by name.
        licence: its identifier, such as "mit"; None is said as not stated.
        place: what to load it by.
    """
    weights = as_weights(model)
    config, tokenizer = weights.config, weights.tokenizer
    told, origin = weights.about, RegionOrigin.from_dict(weights.about.get(DETECTOR))
    sizes = {
        "parameters": f"{weights.parameters() / 1e6:.1f} million",
        "layers, hidden size, heads": f"{config.num_hidden_layers}, {config.hidden_size}, {config.num_attention_heads}",
        "vocabulary": f"{config.vocab_size:,} word pieces" + (f" ({tokenizer.name})" if tokenizer is not None else ""),
        "region features": f"{config.image_feature_size} wide",
        "detector classes": f"{config.label_classes:,} with background",
        "detector": "not recorded" if origin is None else str(origin),
        "task": str(told.get("task") or "not recorded"),
        "licence": licence or "not stated",
    }
    if isinstance(told.get("answers"), list):
        sizes["answers"] = f"{len(told['answers']):,}"
    lines = ["---", _front_matter(name, told, data, results or {}, licence), "---", "", f"# {name}", ""]
    lines += ["An image-text encoder in the architecture of UNITER (Chen et al., ECCV 2020): word pieces and detected regions"]
    lines += ["in one BERT encoder.", ""]
    lines += ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in sizes.items()), ""]
    kind = kind_of(weights.state, told).__name__
    lines += ["```sh", "pip install uniter-toolkit", "```", ""]
    lines += ["```python", f"from uniter.model import {kind}", "", f'model = {kind}.from_pretrained("{place}")', "```", ""]
    lines += ["`uniter.model.load` gives its tokenizer, answers, task and detector as well. The folder holds no code.", ""]
    lines += ["## Training data", "", trained_on or "Not recorded.", ""]
    if results:
        lines += ["## Results", "", "| measure | value |", "|---|---|", *(f"| {key} | {value:.4g} |" for key, value in results.items()), ""]
    lines += [
        "## Limits",
        "",
        "The model repeats what its captions and its detector's classes say of people and places; it was not checked",
    ]
    lines += ["for any use that concerns persons.", ""]
    return "\n".join(lines)


def _front_matter(name: str, told: Mapping[str, Any], data: Sequence[str], results: Mapping[str, float], licence: str | None) -> str:
    """What the hub sorts models by, as YAML."""
    task = str(told.get("task") or "pretrain")
    values: dict[str, Any] = {"library_name": "uniter-toolkit", "license": licence or "unknown"}
    values["tags"] = ["uniter", "vision-and-language", task]
    if results:
        measures = [{"type": key.rsplit("/", 1)[-1], "name": key, "value": round(value, 6)} for key, value in results.items()]
        values["metrics"] = list(dict.fromkeys(measure["type"] for measure in measures))
        shown = {"type": "custom", "name": ", ".join(data) or "not recorded"}
        values["model-index"] = [{"name": name, "results": [{"task": {"type": task}, "dataset": shown, "metrics": measures}]}]
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True).rstrip()


def run_card(weights: Weights, start: str, *, licence: str | None = None) -> str:
    """The model card, with what the run's log knows where `start` is a run or one of its checkpoints."""
    found = run_of(find_weights(start))
    if found is None:
        return model_card(weights, licence=licence)
    run, settings = found
    lines = [line for line in read_log(run) if line["kind"] == "validation"]
    results = {name: value for name, value in lines[-1].items() if isinstance(value, float) and "loss_" not in name} if lines else {}
    data = [Path(text).name for corpus in settings.corpora for text in corpus.text]
    steps = checkpoint_steps(run)
    return model_card(
        weights,
        name=run.resolve().name,
        trained_on=f"{', '.join(data)}; {steps[-1] if steps else 0:,} of {settings.steps:,} updates, seed {settings.seed}.",
        data=data,
        results=results,
        licence=licence,
    )
