"""What a checkpoint is: reading, writing, exporting."""

from uniter.model.checkpoints.load import load_uniter

__all__ = ["load_uniter"]
