"""Settings from a file, a run and the command line, in that order."""

from collections.abc import Mapping, Sequence
from typing import Any

from uniter.datasets.errors import WrongUsage
from uniter.model.settings.files import assign, load_config, put, read_settings, shipped_configs
from uniter.model.settings.published import is_published, read_published
from uniter.model.settings.recipes import in_places
from uniter.model.settings.settings import DEFAULT_TASK, TrainSettings
from uniter.model.tasks.table import SYNONYMS


def gather_settings(
    config: str | None,
    *,
    roots: Sequence[str] = (),
    assignments: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    text: Sequence[str] = (),
    images: Sequence[str] = (),
    validation_text: Sequence[str] = (),
    validation_images: Sequence[str] = (),
    tasks: str | None = None,
) -> TrainSettings:
    """The settings of a command: the file's, overruled by the command's options, overruled by its assignments.

    Args:
        config: a shipped name, a YAML file of ours, or a published JSON file of UNITER's or VILLA's.
        roots: "/container=folder" for the paths of a published file or a recipe that ships.
        assignments: of `--set`.
        options: dotted key -> value.
        text, images, validation_text, validation_images: one corpus of these databases instead of the file's.
        tasks: of every corpus, such as "mlm,itm" (equally often) or "mlm:2,itm:1".

    Raises:
        BadInput: one sentence about the first thing that is wrong.
    """
    values = _file_values(config, roots, options or {}, own_data=bool(text))
    if text or images:
        if not (text and images):
            raise WrongUsage("give both --text and --images: texts without regions (or regions without texts) cannot be trained on")
        corpora = values.get("corpora")
        first = corpora[0] if isinstance(corpora, list) and corpora else None
        kept = {"tasks": first["tasks"]} if isinstance(first, dict) and "tasks" in first else {}
        values["corpora"] = [{**kept, "text": list(text), "images": list(images)}]
    overruled: dict[str, Any] = {}
    if validation_text or validation_images:
        if not validation_text:
            raise WrongUsage("--val-images says where the pictures of --val-text are; give --val-text too")
        overruled |= {"validation_text": list(validation_text), "validation_images": list(validation_images)}
    if tasks is not None:
        overruled["tasks"] = _task_ratios(tasks)
    corpora = values.get("corpora")
    for corpus in corpora if isinstance(corpora, list) else []:
        if isinstance(corpus, dict):  # anything else is refused in words below
            corpus |= overruled
    if not values.get("corpora"):
        raise WrongUsage("nothing to train on: give --text captions.db --images out.lmdb, or settings with corpora (--config)")
    for key, value in (options or {}).items():
        put(values, key, value)
    for assignment in assignments:
        assign(values, assignment)
    return read_settings(values, source=config or "the command")


def _file_values(config: str | None, roots: Sequence[str], options: Mapping[str, Any], *, own_data: bool) -> dict[str, Any]:
    """What the file says, a published one in our words; nothing without one."""
    values = load_config(config) if config is not None else {}
    task = str(options.get("task", DEFAULT_TASK))
    own_start = bool({"from", "model.size"} & options.keys())
    if is_published(values):
        return read_published(values, roots=roots, source=str(config), own_start=own_start, task=task)
    stated = values.get("task", task)
    if isinstance(stated, str) and SYNONYMS.get(stated, stated) != task:
        way = f"uniter-train {stated}" if stated == DEFAULT_TASK else f"uniter-train finetune {stated}"
        raise WrongUsage(f"settings {config}: they are of the task {stated!r}; use them with {way}, or take the key out")
    if roots or config in shipped_configs():
        return in_places(values, roots, str(config), own_data=own_data, own_start=own_start)
    return values


def _task_ratios(tasks: str) -> dict[str, float]:
    """Task -> how often it is drawn, from "mlm:2,itm"; 1 where nothing is said."""
    ratios: dict[str, float] = {}
    for part in tasks.split(","):
        name, _, ratio = part.strip().partition(":")
        try:
            ratios[name] = float(ratio or 1)
        except ValueError:
            raise WrongUsage(f"--tasks {tasks!r}: {ratio!r} is no number; expected tasks like mlm,itm or mlm:2,itm:1") from None
    return ratios
