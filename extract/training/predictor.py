"""The box predictor that is trained: classes, attributes and a coarse thumbnail of each region."""

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from torch import Tensor, nn
from torch.nn import functional as F

from uniter.datasets.errors import BadInput
from uniter.extract.detector.butd import add_attribute_branch

THUMBNAIL = 4  # pixels a side
SOFT_WEIGHT = 2.0
"""What distributions over classes, a teacher's, weigh beside the classes themselves."""


# ------------------------------------------------------------------------------------------------------------------ predictor


class TrainedPredictor(FastRCNNOutputLayers):  # type: ignore[misc]
    """Detectron2's box predictor, with the losses of attributes and thumbnails beside those of classes and boxes."""

    attributes = 0
    soft_weight = 0.0
    published = False
    """Learn attributes as Bottom-Up-Attention did, and no thumbnails, which it did not have."""
    _features: Tensor

    def add_branches(self, *, width: int, attributes: int) -> None:
        """Add what Detectron2's predictor lacks: (width,) features to (3 * THUMBNAIL ** 2,) pixels, and the attribute branch if any."""
        self.attributes = attributes
        self.thumbnail = nn.Linear(width, 3 * THUMBNAIL**2)
        if attributes:
            add_attribute_branch(self, classes=self.num_classes, attributes=attributes)
            nn.init.normal_(self.cls_embedding.weight, std=0.1)

    def forward(self, features: Tensor) -> Any:
        """Class scores and box changes of (N, ...) pooled regions; the features are remembered for the attributes' loss."""
        self._features = features.flatten(start_dim=1)
        return super().forward(features)

    def losses(self, predictions: Any, proposals: list[Any]) -> dict[str, Tensor]:
        """Detectron2's losses; `loss_thumbnail` (mean squared error), unless as published; `loss_attribute`, see below; and, where
        boxes have distributions over classes, `loss_soft` (Kullback-Leibler divergence among the foreground's classes, over all regions).
        """
        found: dict[str, Tensor] = super().losses(predictions, proposals)
        classes = torch.cat([proposal.gt_classes for proposal in proposals])
        foreground = classes < self.num_classes
        thumbnails = torch.cat([proposal.gt_thumbnails for proposal in proposals])[foreground]
        if not self.published:
            # A sum over none is 0 and keeps the graph, where a mean would be nan.
            error = F.mse_loss(self.thumbnail(self._features[foreground]), thumbnails, reduction="sum")
            found["loss_thumbnail"] = error / max(thumbnails.numel(), 1)
        if self.attributes:
            targets = torch.cat([proposal.gt_attributes for proposal in proposals])
            find = self._published_attribute_loss if self.published else self._attribute_loss
            found["loss_attribute"] = find(targets, classes, foreground)
        if proposals and all(proposal.has("gt_soft") for proposal in proposals):
            soft = torch.cat([proposal.gt_soft for proposal in proposals])
            stated = foreground & (soft.sum(dim=1) > 0)
            shares = F.log_softmax(predictions[0][stated, : self.num_classes], dim=1)
            divergence = F.kl_div(shares, soft[stated], reduction="sum")
            found["loss_soft"] = self.soft_weight * divergence / max(len(classes), 1)
        return found

    def _attribute_loss(self, targets: Tensor, classes: Tensor, foreground: Tensor) -> Tensor:
        """Soft-max cross-entropy, weight 0.5, of shares (R, A + 1); the background has none; boxes without annotated ones say nothing."""
        targets = targets.clone()
        targets[~foreground] = 0
        targets[~foreground, -1] = 1
        known = targets.sum(dim=1) > 0
        return -0.5 * (targets[known] * self._attribute_shares(classes, known)).sum() / max(int(known.sum()), 1)

    def _published_attribute_loss(self, targets: Tensor, classes: Tensor, foreground: Tensor) -> Tensor:
        """Soft-max cross-entropy, weight 0.5, of every attribute of every foreground region, all of them weighing the same.

        A region of a thing without annotated attributes is to have none; the background says nothing.

        Source: bottom-up-attention, `proposal_target_layer.py` and `loss_attr` of `train.prototxt`.
        """
        stated = (targets[foreground] > 0).to(targets.dtype)
        stated[:, -1] = (stated[:, :-1].sum(dim=1) == 0).to(targets.dtype)
        return -0.5 * (stated * self._attribute_shares(classes, foreground)).sum() / stated.sum().clamp(min=1)

    def _attribute_shares(self, classes: Tensor, of: Tensor) -> Tensor:
        """(N, A + 1) logarithms of the probabilities of the regions that `of` (R,) says, given their classes (R,)."""
        hidden = torch.relu(self.fc_attr(torch.cat([self._features[of], self.cls_embedding(classes[of])], dim=1)))
        return F.log_softmax(self.attr_score(hidden), dim=1)


def build_network(cfg: CfgNode, *, attributes: int, seed: int, soft_weight: float = SOFT_WEIGHT, published: bool = False) -> nn.Module:
    """Detectron2's model of this configuration with `TrainedPredictor` as its box predictor; weights drawn from the seed.

    `published`: attributes are learnt as Bottom-Up-Attention did.
    """
    torch.manual_seed(seed)  # Detectron2 initialises from the global state
    try:
        model = build_model(cfg)
    except (KeyError, AssertionError, ValueError, RuntimeError, TypeError, AttributeError, IndexError) as error:
        raise BadInput(f"Detectron2 cannot build this configuration ({error}); what was changed in it?") from error
    width = model.roi_heads.box_predictor.cls_score.in_features
    predictor = TrainedPredictor(cfg, ShapeSpec(channels=width, height=1, width=1))
    predictor.add_branches(width=width, attributes=attributes)
    predictor.soft_weight, predictor.published = soft_weight, published
    model.roi_heads.box_predictor = predictor.to(cfg.MODEL.DEVICE)
    network: nn.Module = model
    return network
