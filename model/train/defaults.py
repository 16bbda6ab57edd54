"""What a run chooses where its settings leave things open: numbers with which it learns on what it is given.

The choices are functions of the amount of data, the size of the model and the device only, so that the same command chooses
the same numbers again. What a model learns with (rates, dropout) follows its size; what a device computes at once follows the device.
"""

from typing import Literal

from uniter.datasets.devices import fitting_precision
from uniter.datasets.storage.files import read_json_object
from uniter.model.checkpoints.beside import configuration_beside
from uniter.model.checkpoints.read import find_weights
from uniter.model.settings.settings import TrainSettings
from uniter.model.tasks.task import Finetuning
from uniter.model.train.distributed import Processes
from uniter.model.uniter import PRESETS

# By model size: peak learning rate and dropout. Published for base and large; tiny is trained from random numbers
# on little data, where a higher rate and no dropout were found best.
LEARNING_RATES = {"tiny": 5e-4, "base": 5e-5, "large": 5e-5}


DROPOUTS = {"tiny": 0.0, "base": 0.1, "large": 0.1}


# Small steps and many: what a small model needs to find out which words go with which regions is updates, not examples.
BATCH_TOKENS = {(True, False): 768, (True, True): 2048, (False, False): 2048, (False, True): 10240}  # (tiny, on a GPU)


ENOUGH_FOR_BASE = 100_000


# 30 passes were too few for a tiny model to learn masked regions whatever the seed.
PASSES, FINETUNING_PASSES = 42, 30


FEWEST_STEPS, MOST_STEPS = 5600, 200_000


def complete(settings: TrainSettings, examples: int, mean_length: float, everyone: Processes) -> TrainSettings:
    """The settings with every open number chosen.

    Args:
        examples: of all training corpora.
        mean_length: tokens of an example, averaged.
        everyone: decides by kind of device and number of processes.
    """
    on_gpu = everyone.device.type == "cuda"
    chosen = settings.model_copy(deep=True)
    if chosen.from_ is None and chosen.model.size is None:
        chosen.model.size = "base" if on_gpu and examples >= ENOUGH_FOR_BASE else "tiny"
    size = chosen.model.size or size_of(chosen.from_ or "")
    if chosen.from_ is None and size == "tiny" and chosen.model.initializer_range is None:
        # BERT's 0.02 is meant for 768 columns; in a narrow model it leaves attention uniform for thousands of updates.
        chosen.model.initializer_range = round(_width(chosen) ** -0.5, 4)
    if chosen.precision is None:
        chosen.precision = _precision(everyone)
    if chosen.batch_tokens is None:
        chosen.batch_tokens = BATCH_TOKENS[size == "tiny", on_gpu]
    if chosen.accumulation is None:
        chosen.accumulation = 1
    if chosen.steps is None:
        per_update = chosen.batch_tokens * chosen.accumulation * everyone.world
        chosen.steps = int(min(max(PASSES * examples * mean_length / per_update, FEWEST_STEPS), MOST_STEPS))
    if chosen.optimizer.learning_rate is None:
        chosen.optimizer.learning_rate = LEARNING_RATES[size]
    if chosen.optimizer.clip is None:
        chosen.optimizer.clip = 5.0
    if chosen.optimizer.warmup_steps is None:
        chosen.optimizer.warmup_steps = min(max(chosen.steps // 10, 1), 10_000)
    if chosen.dropout is None:
        chosen.dropout = DROPOUTS[size]
    if chosen.validate_every is None:
        chosen.validate_every = min(max(chosen.steps // 10, 1), 5000)
    if chosen.checkpoint_every is None:
        chosen.checkpoint_every = chosen.validate_every
    return chosen


def _precision(everyone: Processes) -> Literal["fp32", "bf16"]:
    return "bf16" if fitting_precision(everyone.device) == "bf16" else "fp32"


def _width(settings: TrainSettings) -> int:
    """The columns of a model that starts from nothing."""
    return settings.model.hidden_size or PRESETS[settings.model.size or "tiny"]["hidden_size"]


def is_narrow(width: int) -> bool:
    """Whether the numbers of a tiny model suit one with so many columns, rather than the published ones."""
    return width < PRESETS["base"]["hidden_size"] // 2


def size_of(start: str) -> str:
    """The preset whose numbers suit a checkpoint: "tiny" where the configuration beside it says that it is narrow, else "base"."""
    config = configuration_beside(find_weights(start))
    width = None if config is None else read_json_object(config).get("hidden_size")
    return "tiny" if isinstance(width, int) and is_narrow(width) else "base"


def complete_finetuning(
    settings: TrainSettings, published: Finetuning, examples: int, mean_length: float, everyone: Processes
) -> TrainSettings:
    """The settings of a fine-tuning run with every open number chosen: the published ones, but for a narrow model the rates that it
    learns with on little data, and without a GPU smaller batches.

    Args:
        published: the row's numbers.
        examples, mean_length, everyone: as `complete`.
    """
    chosen = settings.model_copy(deep=True)
    on_gpu = everyone.device.type == "cuda"
    if chosen.from_ is None and chosen.model.size is None:
        chosen.model.size = "base" if on_gpu else "tiny"
    narrow = size_of(chosen.from_) == "tiny" if chosen.from_ is not None else is_narrow(_width(chosen))
    if chosen.precision is None:
        chosen.precision = _precision(everyone)
    if chosen.batch_tokens is None:
        chosen.batch_tokens = published.batch_tokens if on_gpu else 2048
    if chosen.accumulation is None:
        chosen.accumulation = published.accumulation if on_gpu else 1
    if chosen.steps is None:
        per_update = chosen.batch_tokens * chosen.accumulation * everyone.world
        passes = FINETUNING_PASSES * examples * mean_length / per_update
        chosen.steps = int(min(max(passes, 500), published.steps))
    if chosen.optimizer.learning_rate is None:
        chosen.optimizer.learning_rate = LEARNING_RATES["tiny"] if narrow else published.learning_rate
    if chosen.optimizer.head_rate_multiplier is None:
        chosen.optimizer.head_rate_multiplier = 1.0 if narrow else published.head_rate_multiplier
    if chosen.optimizer.clip is None:
        chosen.optimizer.clip = published.clip
    if chosen.optimizer.warmup_steps is None:
        chosen.optimizer.warmup_steps = max(chosen.steps // 10, 1)
    if chosen.dropout is None:
        chosen.dropout = 0.1
    if chosen.validate_every is None:
        chosen.validate_every = max(chosen.steps // 10, 1)
    if chosen.checkpoint_every is None:
        chosen.checkpoint_every = chosen.validate_every
    return chosen
