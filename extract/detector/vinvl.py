"""VinVL's X152-C4 on stock Detectron2: the parts that Detectron2 lacks, registered under names of their own.

Easy to get wrong, and hardly seen in a cosine: its BatchNorm has no epsilon; anchors, decoding and clipping count pixels inclusively
(+ 1), non-maximum suppression does not; nothing is dropped for being small; the resized longer side is truncated, not rounded.

Imports Detectron2: load this module only where a detector is built.

Source: Zhang et al. 2021; microsoft/scene_graph_benchmark (`sgg_configs/vgattr/vinvl_x152c4.yaml`, `maskrcnn_benchmark/modeling/rpn`).
"""

import math
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BACKBONE_REGISTRY
from detectron2.modeling.backbone.resnet import build_resnet_backbone
from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY
from detectron2.modeling.proposal_generator.rpn import RPN
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, Res5ROIHeads
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from uniter.extract.detector.butd import first_kept

VINVL_CLASSES, VINVL_ATTRIBUTES = 1594, 524
"""Without the background and "no attribute"."""

VINVL_SCALES = (2, 4, 8, 16, 32)
"""Of the anchors, in cells of 16 pixels."""

LARGEST_LOG_GROWTH = math.log(1000 / 16)


def without_epsilon(module: nn.Module) -> nn.Module:
    """The module itself, with nothing added to the variances of its frozen BatchNorms."""
    for layer in module.modules():
        if type(layer).__name__ == "FrozenBatchNorm2d":
            setattr(layer, "eps", 0.0)  # noqa: B010 - mypy takes any attribute of a module for a tensor or a module
    return module


@BACKBONE_REGISTRY.register()  # type: ignore[untyped-decorator]
def uniter_vinvl_resnet(cfg: CfgNode, input_shape: ShapeSpec) -> Any:
    """Detectron2's ResNet, its BatchNorms without epsilon."""
    return without_epsilon(build_resnet_backbone(cfg, input_shape))


@ROI_HEADS_REGISTRY.register()
class UniterVinvlROIHeads(Res5ROIHeads):  # type: ignore[misc]
    """Detectron2's C4 heads, the BatchNorms of their last stage without epsilon."""

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Detectron2's arguments of the heads; batch normalisations of the last stage divide without an epsilon, as VinVL's do."""
        made: dict[str, Any] = super().from_config(cfg, input_shape)
        without_epsilon(made["res5"])
        return made


@PROPOSAL_GENERATOR_REGISTRY.register()
class UniterVinvlRPN(RPN):  # type: ignore[misc]
    """Detectron2's RPN with the reference's box arithmetic."""

    def predict_proposals(
        self, anchors: list[Any], pred_objectness_logits: list[Tensor], pred_anchor_deltas: list[Tensor], image_sizes: list[tuple[int, int]]
    ) -> list[Any]:
        """As Detectron2's, for one level."""
        results = []
        for row, size in enumerate(image_sizes):
            boxes, logits = vinvl_proposals(
                anchors[0].tensor,
                pred_objectness_logits[0][row],
                pred_anchor_deltas[0][row],
                size,
                before_nms=self.pre_nms_topk[False],
                after_nms=self.post_nms_topk[False],
                nms_threshold=self.nms_thresh,
            )
            results.append(Instances(size, proposal_boxes=Boxes(boxes), objectness_logits=logits))
        return results


def vinvl_proposals(
    anchors: Tensor,
    logits: Tensor,
    deltas: Tensor,
    image_size: tuple[int, int],
    *,
    before_nms: int = 6000,
    after_nms: int = 300,
    nms_threshold: float = 0.7,
) -> tuple[Tensor, Tensor]:
    """Proposals of one image: best 6000 by their sigmoid, decode, clip, non-maximum suppression, best 300.

    Args:
        anchors: (A, 4) network pixels, inclusive.
        logits: (A,).
        deltas: (A, 4).
        image_size: (height, width) of the network's input, without padding.

    Returns:
        Boxes (P, 4) and their logits (P,), best first.
    """
    order = logits.sigmoid().argsort(descending=True, stable=True)[:before_nms]
    logits = logits[order]
    boxes = clipped(decoded(anchors[order], deltas[order]), image_size)
    kept = first_kept(boxes, logits.sigmoid(), threshold=nms_threshold, most=after_nms)
    return boxes[kept], logits[kept]


def decoded(boxes: Tensor, deltas: Tensor, weights: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """Boxes (..., 4) moved by deltas (..., 4), widths counted inclusively on both sides."""
    width, height = boxes[..., 2] - boxes[..., 0] + 1, boxes[..., 3] - boxes[..., 1] + 1
    right, down = deltas[..., 0] / weights[0], deltas[..., 1] / weights[1]
    wider, higher = (deltas[..., 2] / weights[2]).clamp(max=LARGEST_LOG_GROWTH), (deltas[..., 3] / weights[3]).clamp(max=LARGEST_LOG_GROWTH)
    centre_x, centre_y = right * width + (boxes[..., 0] + 0.5 * width), down * height + (boxes[..., 1] + 0.5 * height)
    new_width, new_height = wider.exp() * width, higher.exp() * height
    return torch.stack(
        [
            centre_x - 0.5 * new_width,
            centre_y - 0.5 * new_height,
            centre_x + 0.5 * new_width - 1,
            centre_y + 0.5 * new_height - 1,
        ],
        dim=-1,
    )


def clipped(boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Boxes (..., 4) cut at the centres of the border's pixels: to 0 .. width - 1 and 0 .. height - 1."""
    height, width = image_size
    limits = (width - 1, height - 1, width - 1, height - 1)
    return torch.stack([boxes[..., axis].clamp(0, limit) for axis, limit in enumerate(limits)], dim=-1)


def vinvl_config(
    *,
    classes: int = VINVL_CLASSES,
    depth: int = 152,
    stem: int = 64,
    res2: int = 256,
    groups: int = 32,
    width: int = 8,
) -> CfgNode:
    """The configuration of VinVL's detector; the arguments are for narrow variants in tests."""
    cfg = get_cfg()
    model = cfg.MODEL
    cfg.INPUT.FORMAT, cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = "BGR", 600, 1000
    model.MASK_ON = False
    model.BACKBONE.NAME = "uniter_vinvl_resnet"
    resnets = model.RESNETS
    resnets.DEPTH, resnets.STRIDE_IN_1X1, resnets.NORM, resnets.OUT_FEATURES = depth, False, "FrozenBN", ["res4"]
    resnets.NUM_GROUPS, resnets.WIDTH_PER_GROUP, resnets.STEM_OUT_CHANNELS, resnets.RES2_OUT_CHANNELS = groups, width, stem, res2
    model.PIXEL_MEAN, model.PIXEL_STD = [103.530, 116.280, 123.675], [1.0, 1.0, 1.0]
    model.PROPOSAL_GENERATOR.NAME = "UniterVinvlRPN"
    model.RPN.IN_FEATURES, model.RPN.CONV_DIMS = ["res4"], [-1]
    # Fifteen places; what stands in them comes from the weights.
    model.ANCHOR_GENERATOR.SIZES = [[16 * scale for scale in VINVL_SCALES]]
    model.ANCHOR_GENERATOR.ASPECT_RATIOS = [[0.5, 1.0, 2.0]]
    model.RPN.PRE_NMS_TOPK_TEST, model.RPN.POST_NMS_TOPK_TEST, model.RPN.NMS_THRESH = 6000, 300, 0.7
    model.ROI_HEADS.NAME, model.ROI_HEADS.IN_FEATURES, model.ROI_HEADS.NUM_CLASSES = "UniterVinvlROIHeads", ["res4"], classes
    head = model.ROI_BOX_HEAD
    head.POOLER_TYPE, head.POOLER_RESOLUTION, head.POOLER_SAMPLING_RATIO = "ROIAlign", 14, 0
    head.BBOX_REG_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
    return cfg
