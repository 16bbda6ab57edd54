"""Settings of a run: validated at the edge, None where the run chooses by what it is given.

A settings file is YAML. What a key means stands in its description (`uniter-train pretrain --explain` prints them); an unknown
key, a wrong type or an impossible combination is an error that names the key and the nearest known one.
"""

import contextlib
import difflib
import importlib.resources
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from uniter.datasets.batching import BUCKET
from uniter.datasets.errors import BadInput, unknown_name

CONFIG_FILE = "config.yaml"
SHIPPED = "uniter.model.train.configs"


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=True)


class CorpusSettings(Settings):
    """Databases that are mixed as one."""

    name: str = Field(default="data", description="what the log calls it", pattern=r"^[^/_\s]+$")
    text: list[str] = Field(description="text databases", min_length=1)
    images: list[str] = Field(description="region databases; any text may speak of any image", min_length=1)
    tasks: dict[str, float] | None = Field(default=None, description="task: mix ratio; none: all that the data allow, in UNITER's ratios")
    validation_text: list[str] = Field(
        [], description="text databases to validate on; none: some pictures are held out of the training ones"
    )
    validation_images: list[str] = Field(default=[], description="their region databases; none: the training ones")


class ModelSettings(Settings):
    """The size of the model, where it does not come from `from`."""

    size: Literal["tiny", "base", "large"] | None = Field(default=None, description="none: by device and amount of data")
    hidden_size: int | None = Field(default=None, ge=1, description="columns of the hidden states; none, as those below: by the size")
    num_hidden_layers: int | None = Field(default=None, ge=1, description="layers of the encoder")
    num_attention_heads: int | None = Field(default=None, ge=1, description="heads of each layer; must divide hidden_size")
    intermediate_size: int | None = Field(default=None, ge=1, description="columns inside each layer's feed-forward half")
    max_position_embeddings: int | None = Field(default=None, ge=1, description="longest text, with [CLS] and [SEP]; none: 512")
    vocab_size: int | None = Field(default=None, ge=1, description="none: the text databases' vocabulary")
    initializer_range: float | None = Field(default=None, gt=0, description="deviation of new weights; none: chosen by the model's size")

    def overrides(self) -> dict[str, int | float]:
        return {name: value for name, value in self.model_dump(exclude={"size"}).items() if value is not None}


class OptimizerSettings(Settings):
    """AdamW as published."""

    learning_rate: float | None = Field(default=None, gt=0, description="at the end of the warm-up; none: chosen by the model's size")
    warmup_steps: int | None = Field(default=None, ge=0, description="none: a tenth of the steps, at most 10,000")
    head_rate_multiplier: float | None = Field(default=None, gt=0, description="times the rate for a task's head; none: as published")
    betas: tuple[float, float] = Field(default=(0.9, 0.98), description="how slowly the means of gradients and of their squares move")
    epsilon: float = Field(default=1e-6, gt=0, description="added to the root of the mean square")
    weight_decay: float = Field(default=0.01, ge=0, description="of all but biases and the norms called LayerNorm")
    clip: float | None = Field(default=None, description="global norm of gradients at most; -1: any; none: 5, or the task's")
    unused_gradients: Literal["none", "zero"] = Field(
        default="none", description="none: heads that a task does not use rest; zero: they drift by momentum and decay, as in torch 1.x"
    )


class RegionSettings(Settings):
    """Which regions are taken from published databases (ours hold their selection)."""

    conf_th: float = Field(default=0.2, description="least confidence; -1: num_bb of each picture, whatever their confidence")
    min_bb: int = Field(default=10, ge=1, description="at least so many of a picture, however unsure")
    max_bb: int = Field(default=100, ge=1, description="at most so many of a picture")
    num_bb: int = Field(default=36, ge=1, description="with conf_th -1: so many of each picture")


class MaskingSettings(Settings):
    words: float = Field(default=0.15, gt=0, lt=1, description="chance of a word to be hidden (MLM)")
    regions: float = Field(default=0.15, gt=0, lt=1, description="chance of a region to be hidden (MRFR, MRC, MRC-KL)")


class TrainSettings(Settings):
    """A run."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, populate_by_name=True)

    task: str = Field(default="pretrain", description="pretrain, or the down-stream task that is fine-tuned")
    corpora: list[CorpusSettings] = Field(min_length=1)
    model: ModelSettings = Field(default_factory=ModelSettings)
    from_: str | None = Field(default=None, alias="from", description="a run, checkpoint or BERT to start from; none: random numbers")
    dropout: float | None = Field(default=None, ge=0, lt=1, description="of the whole model; none: chosen by the model's size")
    steps: int | None = Field(default=None, ge=1, description="updates of the weights; none: chosen by the amount of data")
    batch_tokens: int | None = Field(default=None, ge=1, description="word pieces and regions of a micro-batch; none: by model and device")
    accumulation: int | None = Field(default=None, ge=1, description="micro-batches of an update, per process; none: by model and device")
    normalisation: Literal["global-mean", "published"] = Field(
        default="global-mean",
        description="global-mean: the mean over all an update held; published: means of micro-batches, summed, averaged over processes",
    )
    ordering: Literal["buckets", "published"] = Field(
        default="buckets", description="how batches are made; published: UNITER's token-bucket sampler"
    )
    bucket: int = Field(default=BUCKET, ge=1, description="examples that are sorted by length together")
    max_text_length: int = Field(default=60, ge=-1, description="longer texts (word pieces) are left out; -1 keeps all")
    masking: MaskingSettings = Field(default_factory=MaskingSettings)
    regions: RegionSettings = Field(default_factory=RegionSettings)
    negative_probability: float = Field(default=0.5, gt=0, lt=1, description="image-text matching: chance to show another picture")
    alignment_weight: float = Field(default=0.1, ge=0, description="weight of word-region alignment in matching; 0: not computed")
    optimizer: OptimizerSettings = Field(default_factory=lambda: OptimizerSettings())
    precision: Literal["fp32", "bf16"] = Field(default="fp32", description="of the computation; weights and their updates stay float32")
    attention: Literal["auto", "grouped", "jagged", "varlen"] = Field(
        default="auto",
        description="auto: grouped by length on the CPU, jagged on a GPU; varlen: on a GPU in bf16, without dropout of attention",
    )
    seed: int = Field(default=42, ge=0, description="decides everything random")
    device: str | None = Field(default=None, description="cpu, cuda, cuda:N; none: a GPU where there is one")
    workers: int | None = Field(default=None, ge=0, description="processes that make batches; none: fitted to the machine")
    readahead: bool = Field(default=True, description="false for random reads of databases larger than memory on a local disk")
    validate_every: int | None = Field(default=None, ge=1, description="updates between validations; none: a tenth, at most 5,000")
    validation_pictures: int | None = Field(
        None, ge=1, description="pictures held out where there is no validation database; none: a twentieth"
    )
    validation_examples: int = Field(default=2000, ge=1, description="at most so many examples are validated for each task")
    checkpoint_every: int | None = Field(default=None, ge=1, description="updates between checkpoints; none: as validate_every")
    keep: int = Field(default=2, ge=1, description="newest checkpoints that stay; the best one stays besides")
    stop_after: int | None = Field(default=None, ge=1, description="stop after this update, with a checkpoint; repeat to go on")
    tensorboard: bool = Field(default=True, description="write TensorBoard events into the run directory")
    wandb_project: str | None = Field(default=None, description="also log to this Weights & Biases project")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        names = [corpus.name for corpus in self.corpora]
        if len(set(names)) < len(names):
            raise ValueError(f"corpora: two are called {next(name for name in names if names.count(name) > 1)!r}; give each its own name")
        if self.from_ is not None and (self.model.size is not None or self.model.overrides()):
            raise ValueError("model: its size comes from `from`; leave one of the two out")
        if self.steps is not None and self.optimizer.warmup_steps is not None and self.optimizer.warmup_steps > self.steps:
            raise ValueError(f"optimizer.warmup_steps: {self.optimizer.warmup_steps} is more than steps, {self.steps}")
        if self.regions.min_bb > self.regions.max_bb:
            raise ValueError(f"regions.min_bb: {self.regions.min_bb} is more than regions.max_bb, {self.regions.max_bb}")
        if self.attention == "varlen" and self.precision != "bf16":
            raise ValueError("attention: varlen computes in half precision only; set precision to bf16 or leave attention out")
        sizes = self.model
        if sizes.hidden_size and sizes.num_attention_heads and sizes.hidden_size % sizes.num_attention_heads:
            raise ValueError(
                f"model.num_attention_heads: {sizes.num_attention_heads} does not divide model.hidden_size, {sizes.hidden_size}"
            )
        return self


# A repeated command may differ in these and still be the same run.
MAY_CHANGE = {
    "device", "workers", "readahead", "checkpoint_every", "keep", "stop_after", "tensorboard", "wandb_project", "accumulation"
}  # fmt: skip


def read_settings(values: Mapping[str, Any], *, source: str) -> TrainSettings:
    """Validate.

    Raises:
        BadInput: one sentence about the first wrong key.
    """
    try:
        return TrainSettings.model_validate(values)
    except ValidationError as error:
        raise BadInput(f"{source}: {_sentence(error)}") from error


def load_config(name: str) -> dict[str, Any]:
    """The mapping of a settings file: a path, or the name of one that ships.

    Raises:
        BadInput: there is none, or it is no YAML mapping.
    """
    path = Path(name)
    if path.suffix in {".yaml", ".yml", ".json"} or path.exists():
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise BadInput(
                f"cannot read the settings {name}: {error.strerror or error}; shipped ones are {', '.join(shipped_configs())}"
            ) from error
    else:
        if name not in shipped_configs():
            raise BadInput(unknown_name("shipped settings", name, shipped_configs()))
        text = importlib.resources.files(SHIPPED).joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise BadInput(f"settings {name}: not valid YAML ({' '.join(str(error).split())})") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise BadInput(f"settings {name}: expected a mapping of keys to values, got {type(values).__name__}")
    return values


def shipped_configs() -> list[str]:
    """The names of the settings files that ship."""
    return sorted(
        entry.name.removesuffix(".yaml") for entry in importlib.resources.files(SHIPPED).iterdir() if entry.name.endswith(".yaml")
    )


def assign(values: dict[str, Any], assignment: str) -> None:
    """Apply one `--set a.b=c` (c as YAML) to a mapping; `corpora.0.name=x` reaches into lists.

    Raises:
        BadInput: not of that form, or a key on the way is no mapping.
    """
    path, equals, text = assignment.partition("=")
    if not equals or not path:
        raise BadInput(f"--set {assignment!r}: expected KEY=VALUE, e.g. --set optimizer.learning_rate=1e-4")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise BadInput(f"--set {assignment!r}: {text!r} is not a valid value") from error
    if isinstance(value, str):
        # YAML 1.1 reads 1e-4 as a word.
        with contextlib.suppress(ValueError):
            value = float(value)
    place: Any = values
    *parents, last = path.split(".")
    for parent in parents:
        if isinstance(place, list) and parent.isdigit() and int(parent) < len(place):
            place = place[int(parent)]
        elif isinstance(place, dict):
            place = place.setdefault(parent, {})
        else:
            raise BadInput(f"--set {assignment!r}: {parent!r} cannot be reached; is the path right?")
    if isinstance(place, list) and last.isdigit() and int(last) < len(place):
        place[int(last)] = value
    elif isinstance(place, dict):
        place[last] = value
    else:
        raise BadInput(f"--set {assignment!r}: {last!r} cannot be set there; is the path right?")


def known_keys(model: type[BaseModel] = TrainSettings, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, its field) of all settings."""
    for name, info in model.model_fields.items():
        key = prefix + (info.alias or name)
        inner = _inner_model(info.annotation)
        if inner is None:
            yield key, info
        else:
            yield from known_keys(inner, f"{key}.")


def _inner_model(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    place = [str(part) for part in first["loc"]]
    key = ".".join(place)
    if first["type"] == "extra_forbidden":
        known = [name for name, _ in known_keys()]
        plain = ".".join(part for part in place if not part.isdigit())
        nearest = difflib.get_close_matches(plain, known, n=1, cutoff=0.5)
        if not nearest:
            ends = {name.rsplit(".", 1)[-1]: name for name in known}
            nearest = [ends[end] for end in difflib.get_close_matches(place[-1], list(ends), n=1, cutoff=0.5)]
        hint = f"; did you mean {nearest[0]!r}?" if nearest else f"; known are {', '.join(sorted(known))}"
        return f"unknown key {key!r}{hint}"
    if first["type"] == "missing":
        return f"the key {key!r} is missing"
    if first["type"] == "value_error":
        return str(first["msg"]).removeprefix("Value error, ")
    message = str(first["msg"])
    return f"{key} is {first['input']!r}, but {message[:1].lower()}{message[1:]}"


def write_config(path: Path, settings: TrainSettings) -> None:
    """Write settings as YAML that `--config` reads back to the same."""
    values = settings.model_dump(mode="json", by_alias=True)
    aside = path.with_name(f".{path.name}.incoming")
    aside.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")
    aside.replace(path)


def run_of(weights: Path) -> tuple[Path, TrainSettings] | None:
    """The run directory whose checkpoint a weights file is, and the run's settings; None where it is no run's."""
    run = weights.parent.parent.parent
    path = run / CONFIG_FILE
    if weights.parent.parent.name != "checkpoints" or not path.is_file():
        return None
    return run, read_settings(yaml.safe_load(path.read_text(encoding="utf-8")), source=str(path))


def differences(old: TrainSettings, new: TrainSettings) -> list[str]:
    """What a repeated command says otherwise than the run: "key: old -> new", without what may change."""
    before, after = dict(_flat(old.model_dump(mode="json", by_alias=True))), dict(_flat(new.model_dump(mode="json", by_alias=True)))
    keys = sorted(before.keys() | after.keys())
    return [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in keys
        if before.get(key) != after.get(key) and key.split(".")[0] not in MAY_CHANGE
    ]


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and value and any(isinstance(inner, dict) for inner in value):
        for number, inner in enumerate(value):
            yield from _flat(inner, f"{prefix}.{number}")
    else:
        yield prefix, value


def explain_settings() -> str:
    """Every setting: key, type, default, meaning; one a line."""
    lines = []
    for key, info in known_keys():
        default = "required" if info.is_required() else "open" if info.get_default(call_default_factory=True) is None else None
        shown = default or yaml.safe_dump(info.get_default(call_default_factory=True), default_flow_style=True).split("\n")[0]
        lines.append(f"{key}: {shown}" + (f"  # {info.description}" if info.description else ""))
    return "\n".join(lines)


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
        config: a shipped name, a YAML file of ours, or a published JSON file of UNITER's.
        roots: "/container=folder" for the paths of a published file.
        assignments: of `--set`.
        options: dotted key -> value.
        text, images, validation_text, validation_images: one corpus of these databases instead of the file's.
        tasks: of every corpus, such as "mlm,itm" (equally often) or "mlm:2,itm:1".

    Raises:
        BadInput: one sentence about the first thing that is wrong.
    """
    from uniter.model.train.published import is_published, read_published

    values = load_config(config) if config is not None else {}
    if is_published(values):
        own_start = bool({"from", "model.size"} & (options or {}).keys())
        task = str((options or {}).get("task", "pretrain"))
        values = read_published(values, roots=roots, source=str(config), own_start=own_start, task=task)
    elif roots:
        raise BadInput("--root maps the container paths of UNITER's published JSON files; leave it out, or name such a file with --config")
    if text or images:
        if not (text and images):
            raise BadInput("give both --text and --images: texts without regions (or regions without texts) cannot be trained on")
        corpora = values.get("corpora") or [{}]
        kept = {key: value for key, value in corpora[0].items() if key == "tasks"} if isinstance(corpora[0], dict) else {}
        values["corpora"] = [{**kept, "text": list(text), "images": list(images)}]
    overruled: dict[str, Any] = {}
    if validation_text or validation_images:
        if not validation_text:
            raise BadInput("--val-images says where the pictures of --val-text are; give --val-text too")
        overruled |= {"validation_text": list(validation_text), "validation_images": list(validation_images)}
    if tasks is not None:
        overruled["tasks"] = _task_ratios(tasks)
    corpora = values.get("corpora")
    for corpus in corpora if isinstance(corpora, list) else []:
        if isinstance(corpus, dict):  # anything else is refused in words below
            corpus |= overruled
    if not values.get("corpora"):
        raise BadInput("nothing to train on: give --text captions.db --images out.lmdb, or settings with corpora (--config)")
    for key, value in (options or {}).items():
        parents, last = key.split(".")[:-1], key.split(".")[-1]
        place = values
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    for assignment in assignments:
        assign(values, assignment)
    return read_settings(values, source=config or "the command")


def _task_ratios(tasks: str) -> dict[str, float]:
    """Task -> how often it is drawn, from "mlm:2,itm"; 1 where nothing is said."""
    ratios: dict[str, float] = {}
    for part in tasks.split(","):
        name, _, ratio = part.strip().partition(":")
        try:
            ratios[name] = float(ratio or 1)
        except ValueError:
            raise BadInput(f"--tasks {tasks!r}: {ratio!r} is no number; expected tasks like mlm,itm or mlm:2,itm:1") from None
    return ratios
