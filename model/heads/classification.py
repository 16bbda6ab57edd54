"""The model of somebody's own labels: one label of several, any number of them, or a score.

What a reader would get wrong: what kind of labels they are, and how scores lie, are numbers of the state dict, so that a file of weights
alone tells them. `PackedBatch.targets["answers"]` is (B, A): 1 at the labels that apply, or (B, 1) the score itself.

Legend of shape suffixes: B sequences, H hidden, A labels.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from uniter.datasets.batches.collate import PackedBatch
from uniter.datasets.errors import BadInput
from uniter.datasets.text_db.annotations.own_labels import KINDS
from uniter.model.heads.downstream import DownstreamModel, two_layers
from uniter.model.heads.pretraining import Outputs
from uniter.model.uniter import UniterConfig, initialise

_SCALE = "label_scale"
_LAST = "label_output.3.weight"


class UniterForClassification(DownstreamModel):
    """One score a label from the pooled first row, as VQA's head; of scores one number, in deviations from their mean.

    Args:
        labels: A, 1 for scores.
        label_kind: of `own_labels.KINDS`.
    """

    label_scale: Tensor  # (3,) float32: the kind's number, mean and deviation of the scores it learnt from

    def __init__(self, config: UniterConfig, *, labels: int = 2, label_kind: str = "one") -> None:
        super().__init__(config)
        if label_kind not in KINDS or labels < 1 or (label_kind == "score" and labels != 1):
            raise BadInput(f"a head of {labels} labels of the kind {label_kind!r}; expected {', '.join(KINDS)}, and one number for a score")
        self.kind = label_kind
        self.label_output: nn.Sequential = two_layers(config.hidden_size, 2 * config.hidden_size, labels, nn.GELU)
        initialise(self.label_output, deviation=config.initializer_range)
        self.register_buffer(_SCALE, torch.tensor([float(KINDS.index(label_kind)), 0.0, 1.0]))

    @classmethod
    def sizes(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """`labels` and `label_kind` of a checkpoint that has this head, nothing of others.

        Raises:
            BadInput: its kind of labels is none that is known.
        """
        if _LAST not in state or _SCALE not in state:
            return {}
        number = int(state[_SCALE][0])
        if not 0 <= number < len(KINDS):
            raise BadInput(f"the checkpoint says that its labels are of kind {number}; expected 0 to {len(KINDS) - 1}, is it damaged?")
        return {"labels": len(state[_LAST]), "label_kind": KINDS[number]}

    @property
    def answer_count(self) -> int:
        """A, how many labels have names; 0 of scores."""
        last = self.label_output[3]
        assert isinstance(last, nn.Linear)
        return 0 if self.kind == "score" else last.out_features

    def scale_to(self, mean: float, deviation: float) -> None:
        """Let a fresh head of scores begin at their mean; one that has learnt a scale keeps it."""
        if self.label_scale[1:].tolist() == [0.0, 1.0]:
            self.label_scale[1:] = torch.tensor([mean, deviation])

    def labels(self, batch: PackedBatch) -> Outputs:
        """scores (B, A), logits; of scores the number itself (B, 1), and `deviation` (), in which its error is measured."""
        scores_BA = self.label_output(self.pooled(batch))
        if self.kind != "score":
            return {"scores": scores_BA}
        _, mean, deviation = self.label_scale
        return {"scores": mean + deviation * scores_BA.float(), "deviation": deviation}
