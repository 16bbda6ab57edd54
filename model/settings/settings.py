"""Settings of a run: validated at the edge, None where the run chooses by what it is given.

A settings file is YAML. What a key means stands in its description (`uniter-train pretrain --explain` prints them); an unknown
key, a wrong type or an impossible combination is an error that names the key and the nearest known one.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self, cast, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from uniter.datasets.batches.order import BUCKET

DEFAULT_TASK = "pretrain"


class Settings(BaseModel):
    """What all settings share: an unknown key is refused, and a value set later is checked as well."""

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
        """The sizes that were set, to be put over those of the named model."""
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
    """Chances of words and regions to be hidden in pre-training. Source: UNITER, section 3.2."""

    words: float = Field(default=0.15, gt=0, lt=1, description="chance of a word to be hidden (MLM)")
    regions: float = Field(default=0.15, gt=0, lt=1, description="chance of a region to be hidden (MRFR, MRC, MRC-KL)")


Norm = Literal["l2", "linf"]


Side = Literal["text", "image"]


class AdversarialSettings(Settings):
    """VILLA's adversarial training: what is shifted, how far, and how much it counts that the answers stay."""

    steps: int = Field(
        default=3, ge=1, description="passes over a micro-batch, each shifted further (VILLA); without these keys: plain training"
    )
    rate: Annotated[float, Field(gt=0)] | dict[Side, Annotated[float, Field(gt=0)]] = Field(
        default=1e-3, description="how far a pass shifts each sequence, in the norm below; {text: ..., image: ...} for each its own"
    )
    weight: float = Field(default=1.5, ge=0, description="of the divergence from the answers without a shift; 0: not computed")
    on: list[Side] = Field(
        default=["text"], min_length=1, description="what is shifted: words' embeddings (text), regions' features (image)"
    )
    norm: Norm = Field(default="l2", description="of a sequence: l2, or linf, its largest number")
    max_norm: float = Field(default=0.0, ge=0, description="shifts are brought back to this norm; 0: never")
    alternate: bool = Field(default=False, description="text and image are shifted in turn, in passes of their own, instead of at once")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(set(self.on)) < len(self.on):
            raise ValueError(f"adversarial.on: {', '.join(self.on)} names one twice")
        if isinstance(self.rate, dict) and set(self.rate) != set(self.on):
            raise ValueError(f"adversarial.rate: has {', '.join(self.rate)}, but {', '.join(self.on)} is shifted (adversarial.on)")
        if self.alternate and len(self.on) < 2:
            raise ValueError(f"adversarial.alternate: only {self.on[0]} is shifted; set adversarial.on to [text, image], or leave it out")
        return self

    def rate_of(self, side: str) -> float:
        """How far a pass shifts this side."""
        return self.rate[cast(Side, side)] if isinstance(self.rate, dict) else self.rate


class TrainSettings(Settings):
    """A run."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, populate_by_name=True)

    task: str = Field(default=DEFAULT_TASK, description="pretrain, or the down-stream task that is fine-tuned")
    corpora: list[CorpusSettings] = Field(min_length=1)
    model: ModelSettings = Field(default_factory=ModelSettings)
    from_: str | None = Field(default=None, alias="from", description="a run, checkpoint or BERT to start from; none: random numbers")
    detector: dict[str, Any] | None = Field(
        default=None, description="whose regions it learns from (name, digest of the weights, selection); filled in by the run"
    )
    other_detector: bool | None = Field(default=None, description="true: regions of another detector than that of `from` are meant")
    dropout: float | None = Field(default=None, ge=0, lt=1, description="of the whole model; none: chosen by the model's size")
    steps: int | None = Field(default=None, ge=1, description="updates of the weights; none: chosen by the amount of data")
    batch_tokens: int | None = Field(default=None, ge=1, description="word pieces and regions of a micro-batch; none: by model and device")
    accumulation: int | None = Field(default=None, ge=1, description="micro-batches of an update, per process; none: by model and device")
    processes: int | None = Field(
        default=None, ge=1, description="accumulation is of so many; others share the same micro-batches; none: of those that there are"
    )
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
    adversarial: AdversarialSettings | None = Field(default=None, description="none: plain training")
    precision: Literal["fp32", "tf32", "bf16"] | None = Field(
        default=None,
        description="of the computation; weights and their updates stay float32; tf32: products on a GPU; none: bf16 on a GPU, else fp32",
    )
    attention: Literal["auto", "flash", "efficient"] = Field(
        default="auto", description="kernel on a GPU; auto: flash in bf16 where the card has it (Ampere or later), else efficient"
    )
    recompute: bool = Field(
        default=False, description="keep only the input of each layer and compute the rest again in the backward pass: less memory, slower"
    )
    compile: bool = Field(default=False, description="fill batches up to sizes that stay, and compile each task's head as one graph")
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
    look_every: int | None = Field(
        default=None, ge=1, description="updates between looks at their losses, which wait for the device; none: 20 on a GPU, else 1"
    )
    keep: int = Field(default=2, ge=1, description="newest checkpoints that stay; the best one stays besides")
    patience: int | None = Field(
        default=None, ge=1, description="stop when so many validations in a row were no better than the best one; none: at the last update"
    )
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
        if self.recompute and self.compile:
            raise ValueError("recompute: a compiled head would draw other dropout when it computes again; leave compile or recompute out")
        if self.regions.min_bb > self.regions.max_bb:
            raise ValueError(f"regions.min_bb: {self.regions.min_bb} is more than regions.max_bb, {self.regions.max_bb}")
        if self.attention == "flash" and self.precision != "bf16":
            raise ValueError("attention: flash computes in half precision only; set precision to bf16 or leave attention out")
        sizes = self.model
        if sizes.hidden_size and sizes.num_attention_heads and sizes.hidden_size % sizes.num_attention_heads:
            raise ValueError(
                f"model.num_attention_heads: {sizes.num_attention_heads} does not divide model.hidden_size, {sizes.hidden_size}"
            )
        return self


# A repeated command may differ in these and still be the same run.
MAY_CHANGE = {
    "device", "workers", "readahead", "checkpoint_every", "keep", "patience", "stop_after", "tensorboard", "wandb_project", "accumulation",
    "look_every",
    "detector", "other_detector",  # compared by what they mean
}  # fmt: skip


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


def explain_settings() -> str:
    """Every setting: key, type, default, meaning; one a line."""
    lines = []
    for key, info in known_keys():
        default = "required" if info.is_required() else "open" if info.get_default(call_default_factory=True) is None else None
        shown = default or yaml.safe_dump(info.get_default(call_default_factory=True), default_flow_style=True).split("\n")[0]
        lines.append(f"{key}: {shown}" + (f"  # {info.description}" if info.description else ""))
    return "\n".join(lines)
