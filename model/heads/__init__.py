"""What stands on the encoder; heads know nothing of checkpoints."""

from uniter.model.heads.pretraining import Outputs, UniterForPretraining

__all__ = ["Outputs", "UniterForPretraining"]
