"""The card of an exported model."""

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from uniter.datasets.image_db.origin import RegionOrigin
from uniter.datasets.runs.run_log import read_log
from uniter.datasets.runs.step_folders import checkpoint_steps
from uniter.model.checkpoints.beside import DETECTOR
from uniter.model.checkpoints.read import find_weights
from uniter.model.checkpoints.write import Weights, as_weights
from uniter.model.heads.pretraining import UniterForPretraining
from uniter.model.settings.files import run_of


def model_card(
    model: nn.Module | Weights, *, name: str = "UNITER", trained_on: str | None = None, results: Mapping[str, float] | None = None
) -> str:
    """The model card: what it is, its sizes, how to load it, and what is known of its training.

    Args:
        trained_on: a sentence about the data; None is said as not recorded.
        results: figures to show, by name.
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
    }
    if isinstance(told.get("answers"), list):
        sizes["answers"] = f"{len(told['answers']):,}"
    lines = ["---", "library_name: uniter-toolkit", "tags:", "- uniter", "- vision-and-language", "---", "", f"# {name}", ""]
    lines += ["An image-text encoder in the architecture of UNITER (Chen et al., ECCV 2020): word pieces and detected regions"]
    lines += ["in one BERT encoder.", ""]
    lines += ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in sizes.items()), ""]
    # `load` knows by the configuration which class it is, so that a fine-tuned model keeps its head.
    tuned = UniterForPretraining.__name__ not in told.get("architectures", [UniterForPretraining.__name__])
    name_of_function, taken = ("load", ".model") if tuned else ("load_uniter", "")
    lines += ["```python", f"from uniter.model import {name_of_function}", f'model = {name_of_function}("this/folder"){taken}', "```", ""]
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


def run_card(weights: Weights, start: str) -> str:
    """The model card, with what the run's log knows where `start` is a run or one of its checkpoints."""
    found = run_of(find_weights(start))
    if found is None:
        return model_card(weights)
    run, settings = found
    lines = [line for line in read_log(run) if line["kind"] == "validation"]
    results = {name: value for name, value in lines[-1].items() if isinstance(value, float) and "loss_" not in name} if lines else {}
    texts = ", ".join(Path(text).name for corpus in settings.corpora for text in corpus.text)
    steps = checkpoint_steps(run)
    return model_card(
        weights,
        name=run.resolve().name,
        trained_on=f"{texts}; {steps[-1] if steps else 0:,} of {settings.steps:,} updates, seed {settings.seed}.",
        results=results,
    )
