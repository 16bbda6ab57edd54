"""The box predictor that is trained: classes, attributes and a coarse thumbnail of each region."""

import logging
from pathlib import Path
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
from uniter.extract.weights.load import load_weight_file

log = logging.getLogger(__name__)

THUMBNAIL = 4  # pixels a side


# ------------------------------------------------------------------------------------------------------------------ predictor


class TrainedPredictor(FastRCNNOutputLayers):  # type: ignore[misc]
    """Detectron2's box predictor, with the losses of attributes and thumbnails beside those of classes and boxes."""

    attributes = 0
    _features: Tensor

    def add_branches(self, *, width: int, attributes: int) -> None:
        """Add what Detectron2's predictor lacks: (width,) features to (3 * THUMBNAIL ** 2,) pixels, and the attribute branch if any."""
        self.attributes = attributes
        self.thumbnail = nn.Linear(width, 3 * THUMBNAIL**2)
        if attributes:
            add_attribute_branch(self, classes=self.num_classes, attributes=attributes)
            nn.init.normal_(self.cls_embedding.weight, std=0.1)

    def forward(self, features: Tensor) -> Any:
        self._features = features.flatten(start_dim=1)
        return super().forward(features)

    def losses(self, predictions: Any, proposals: list[Any]) -> dict[str, Tensor]:
        """Detectron2's losses, `loss_thumbnail` (mean squared error) and `loss_attribute` (soft-max cross-entropy, weight 0.5)."""
        found: dict[str, Tensor] = super().losses(predictions, proposals)
        classes = torch.cat([proposal.gt_classes for proposal in proposals])
        foreground = classes < self.num_classes
        thumbnails = torch.cat([proposal.gt_thumbnails for proposal in proposals])[foreground]
        # A sum over none is 0 and keeps the graph, where a mean would be nan.
        error = F.mse_loss(self.thumbnail(self._features[foreground]), thumbnails, reduction="sum")
        found["loss_thumbnail"] = error / max(thumbnails.numel(), 1)
        if self.attributes:
            targets = torch.cat([proposal.gt_attributes for proposal in proposals]).clone()
            targets[~foreground] = 0
            targets[~foreground, -1] = 1
            known = targets.sum(dim=1) > 0  # boxes without annotated attributes say nothing
            embedded = self.cls_embedding(classes[known])
            hidden = torch.relu(self.fc_attr(torch.cat([self._features[known], embedded], dim=1)))
            shares = F.log_softmax(self.attr_score(hidden), dim=1)
            found["loss_attribute"] = -0.5 * (targets[known] * shares).sum() / max(int(known.sum()), 1)
        return found


def build_network(cfg: CfgNode, *, attributes: int, seed: int) -> nn.Module:
    """Detectron2's model of this configuration with `TrainedPredictor` as its box predictor; weights drawn from the seed."""
    torch.manual_seed(seed)  # Detectron2 initialises from the global state
    try:
        model = build_model(cfg)
    except (KeyError, AssertionError, ValueError, RuntimeError, TypeError, AttributeError, IndexError) as error:
        raise BadInput(f"Detectron2 cannot build this configuration ({error}); what was changed in it?") from error
    width = model.roi_heads.box_predictor.cls_score.in_features
    predictor = TrainedPredictor(cfg, ShapeSpec(channels=width, height=1, width=1))
    predictor.add_branches(width=width, attributes=attributes)
    model.roi_heads.box_predictor = predictor.to(cfg.MODEL.DEVICE)
    network: nn.Module = model
    return network


def start_from(network: nn.Module, path: Path) -> None:
    """Copy what fits by name and shape from a weight file of any known layout; nothing in the file is executed."""
    tensors = load_weight_file(path).tensors
    own = network.state_dict()
    fitting = {name: tensor for name, tensor in tensors.items() if name in own and own[name].shape == tensor.shape}
    if not fitting:
        raise BadInput(f"{path}: none of its {len(tensors)} tensors fits this detector by name and shape; is it of another architecture?")
    network.load_state_dict({name: tensor.to(own[name].dtype) for name, tensor in fitting.items()}, strict=False)
    log.info("%d of the detector's %d tensors start from %s", len(fitting), len(own), path)
