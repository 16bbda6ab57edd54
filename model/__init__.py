"""UNITER: the model, its losses and metrics, and its checkpoints.

`Understanding` (photographs asked without training) is imported when it is first used.
"""

from typing import TYPE_CHECKING, Any

from uniter.model.checkpoints import hub as _hub  # gives the classes their from_pretrained
from uniter.model.checkpoints.load import load, load_uniter
from uniter.model.heads import (
    UniterForClassification,
    UniterForNlvr2Paired,
    UniterForNlvr2PairedAttention,
    UniterForNlvr2Triplet,
    UniterForPretraining,
    UniterForReferring,
    UniterForRetrieval,
    UniterForVcr,
    UniterForVqa,
)
from uniter.model.uniter import UniterConfig

if TYPE_CHECKING:
    from uniter.model.understanding import Understanding

__all__ = [
    "Understanding",
    "UniterConfig",
    "UniterForClassification",
    "UniterForNlvr2Paired",
    "UniterForNlvr2PairedAttention",
    "UniterForNlvr2Triplet",
    "UniterForPretraining",
    "UniterForReferring",
    "UniterForRetrieval",
    "UniterForVcr",
    "UniterForVqa",
    "load",
    "load_uniter",
]

del _hub


def __getattr__(name: str) -> Any:
    if name != "Understanding":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from uniter.model.understanding import Understanding

    return Understanding
