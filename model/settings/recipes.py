"""The published recipes that ship: where their databases are here, and what each of them takes.

A recipe is a settings file that says for how many processes its accumulation is. Its paths are those of UNITER's container; `--root` maps
them. What it takes is arithmetic on the numbers below, not a measurement.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from uniter.datasets.errors import BadInput
from uniter.model.settings.files import load_config, read_settings, shipped_configs
from uniter.model.settings.published import Places
from uniter.model.settings.settings import DEFAULT_TASK, CorpusSettings, TrainSettings
from uniter.model.tasks.table import row_of
from uniter.model.tasks.task import PAIR, SEQUENCE, extras
from uniter.model.uniter import PRESETS

BYTES_A_WEIGHT = 18  # float32 weight, gradient and two moments, and what it is rounded to for an update


RESERVE = 1.5 * 2**30  # CUDA context, library workspaces


# Of bf16 computation, kept for the backward pass of a token (benchmarks/memory.py, a pair): everything, or with `recompute` what is left.
KEPT = {"base": 18.1 * 2**20 / SEQUENCE, "large": 48.6 * 2**20 / SEQUENCE}


KEPT_RECOMPUTED = {"base": 4.5 * 2**20 / SEQUENCE, "large": 8.5 * 2**20 / SEQUENCE}


WEIGHTS = {"base": 110e6, "large": 336e6}  # with embeddings and pooler, without heads


H100_OPERATIONS = 0.4 * 990e12  # a second: 40 % of its peak in bf16


@dataclass(frozen=True, slots=True)
class Recipe:
    """A published recipe and what it takes.

    Attributes:
        name: of the settings file. task: pretrain, or the down-stream task. size: base or large.
        processes: GPUs of the published run. steps: updates.
        examples: of an update (pairs; of NLVR2 statements, of VCR questions, of retrieval groups), whatever the number of processes.
        data: the text and region databases, by the names of UNITER's.
        start: what it begins with.
        memory: GiB of a GPU.
        hours: of one H100, if the data keep up.
    """

    name: str
    task: str
    size: str
    processes: int
    steps: int
    examples: int
    data: tuple[str, ...]
    start: str
    memory: float
    hours: float


def recipes() -> list[Recipe]:
    """All that ship, by task and size."""
    found = []
    for name in shipped_configs():
        values = load_config(name)
        if values.get("processes") is not None:
            found.append(_costed(name, read_settings(values, source=name)))
    return sorted(found, key=lambda recipe: (recipe.task != DEFAULT_TASK, recipe.task, recipe.size, recipe.name))


def _costed(name: str, settings: TrainSettings) -> Recipe:
    assert settings.steps and settings.batch_tokens and settings.accumulation and settings.processes and settings.from_
    size = "large" if "-large" in name else "base"
    taken = PAIR if settings.task == DEFAULT_TASK else extras(row_of(settings.task)).taken
    in_a_batch = max(settings.batch_tokens // taken.budget, 1)
    examples = in_a_batch * settings.accumulation * settings.processes
    passes, kept = 1, 1
    if settings.adversarial is not None and (settings.adversarial.steps > 1 or settings.adversarial.weight):
        # The clean pass is forward and backward like each of the others, and is kept while they are computed.
        clean = settings.adversarial.weight > 0
        passes, kept = settings.adversarial.steps * (1 + settings.adversarial.alternate) + clean, 1 + clean
    operations = (6 * passes * taken.tokens + 2 * taken.scored) * encoder_weights(size) * examples * settings.steps
    memory = memory_of(size, in_a_batch * taken.tokens * kept, recompute=settings.recompute)
    data = dict.fromkeys(_name(path) for corpus in settings.corpora for path in _paths(corpus))
    return Recipe(
        name=name,
        task=settings.task,
        size=size,
        processes=settings.processes,
        steps=settings.steps,
        examples=examples,
        data=tuple(data),
        start=_name(settings.from_),
        memory=memory,
        hours=operations / H100_OPERATIONS / 3600,
    )


def memory_of(size: str, tokens: int, *, recompute: bool) -> float:
    """GiB of a GPU that training with micro-batches of so many tokens takes in bf16, by arithmetic.

    Args:
        size: base or large.
        recompute: only the input of each layer is kept.
    """
    kept = KEPT_RECOMPUTED if recompute else KEPT
    return (WEIGHTS[size] * BYTES_A_WEIGHT + RESERVE + kept[size] * tokens) / 2**30


def encoder_weights(size: str) -> int:
    """Of the matrices that every token goes through: four of attention and two of the feed-forward half in each layer."""
    preset = PRESETS[size]
    width = preset["hidden_size"]
    return preset["num_hidden_layers"] * (4 * width**2 + 2 * width * preset["intermediate_size"])


def _paths(corpus: CorpusSettings) -> list[str]:
    groups = (corpus.text, corpus.validation_text, corpus.images, corpus.validation_images)
    return [half for group in groups for path in group for half in path.split(";")]


def _name(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]


def in_places(values: Mapping[str, Any], roots: Sequence[str], source: str, *, own_data: bool, own_start: bool) -> dict[str, Any]:
    """Settings with the container paths replaced by those here.

    Args:
        roots: "/img=folder" and the like.
        own_data, own_start: the user names databases, or what to start from, so those of the settings are not looked at.

    Raises:
        BadInput: a path has no root, or there is nothing to map.
    """
    places, mapped = Places(roots, source), dict(values)
    keys = ("text", "images", "validation_text", "validation_images")
    corpora = [corpus for corpus in values.get("corpora") or [] if isinstance(corpus, dict)]
    named = [str(path) for corpus in corpora for key in keys for path in corpus.get(key, [])] + [str(values.get("from", ""))]
    if roots and not any(places.maps(path) for path in named):
        raise BadInput(
            "--root maps the container paths of published JSON files and of recipes that ship, and here are none of them; leave it out, or "
            "name such a file with --config"
        )
    if not own_data and corpora:
        mapped["corpora"] = [
            {key: [places.here(path) for path in value] if key in keys else value for key, value in corpus.items()} for corpus in corpora
        ]
    if not own_start and str(values.get("from", "")).startswith("/"):
        mapped["from"] = places.here(str(values["from"]))
    return mapped
