"""UNITER: the model, its losses and metrics, and its checkpoints."""

from uniter.model.heads import UniterForPretraining
from uniter.model.uniter import UniterConfig

__all__ = ["UniterConfig", "UniterForPretraining"]
