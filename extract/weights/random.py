"""Weights drawn from a seed, scaled so that features stay finite in float16."""

import math
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from uniter.extract.weights.files import Tensors
from uniter.extract.weights.layouts import ANCHORS


def random_tensors(shapes: Mapping[str, Sequence[int]], seed: int, *, input_deviation: float = 60.0) -> Tensors:
    """Random weights for a detector's tensors, tame enough for float16 and varied enough that regions differ.

    A plain He initialisation doubles the variance with every residual block (float16 overflows) and drifts towards features that are
    the same everywhere. Here the filters have zero mean, so that no common part grows, and the last convolution of each block is
    damped. Every tensor has its own generator, seeded by name and seed, so that they do not depend on each other.
    """
    tensors = {name: _draw(name, tuple(shape), seed) for name, shape in shapes.items() if name != ANCHORS}
    for name in tensors:
        if name.endswith("stem.conv1.weight"):
            tensors[name] /= input_deviation
    return tensors


# Standard deviation of the score of a unit-variance feature: a handful of regions should pass a confidence of 0.2.
RANDOM_GAINS = {"objectness_logits": 1.0, "anchor_deltas": 0.1, "cls_score": 5.5, "bbox_pred": 0.1, "attr_score": 3.0}


def _draw(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    generator = np.random.RandomState((zlib.crc32(name.encode()) + 0x9E3779B1 * seed) & 0xFFFFFFFF)
    layer, _, kind = name.rpartition(".")
    if ".norm" in name or kind.startswith("running"):
        spread = generator.random_sample(shape) - 0.5
        damped = 0.35 if layer.endswith("conv3.norm") else 1.0
        values = {"weight": (1 + 0.4 * spread) * damped, "running_var": 1 + 0.4 * spread}.get(kind, 0.2 * spread)
    elif kind == "bias":
        values = 0.2 * (generator.random_sample(shape) - 0.5)
    else:
        fan_in = max(math.prod(shape[1:]), 1)
        values = generator.standard_normal(shape) * math.sqrt(2.0 / fan_in)
        if len(shape) > 1 and fan_in > 1:
            values -= values.mean(axis=tuple(range(1, len(shape))), keepdims=True)
        values *= RANDOM_GAINS.get(layer.rsplit(".", 1)[-1], 1.0)
    return torch.from_numpy(np.asarray(values, dtype=np.float32).reshape(shape))
