"""What stands on the encoder; heads know nothing of checkpoints."""

from uniter.model.heads.classification import UniterForClassification
from uniter.model.heads.downstream import UniterForReferring, UniterForRetrieval, UniterForVcr, UniterForVqa
from uniter.model.heads.nlvr2 import UniterForNlvr2Paired, UniterForNlvr2PairedAttention, UniterForNlvr2Triplet
from uniter.model.heads.pretraining import Outputs, UniterForPretraining

__all__ = [
    "Outputs",
    "UniterForClassification",
    "UniterForNlvr2Paired",
    "UniterForNlvr2PairedAttention",
    "UniterForNlvr2Triplet",
    "UniterForPretraining",
    "UniterForReferring",
    "UniterForRetrieval",
    "UniterForVcr",
    "UniterForVqa",
]
