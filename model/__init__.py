"""UNITER: the model, its losses and metrics, and its checkpoints."""

from uniter.model.checkpoints import load_uniter
from uniter.model.heads import UniterForPretraining
from uniter.model.uniter import UniterConfig

__all__ = ["UniterConfig", "UniterForPretraining", "load_uniter"]
