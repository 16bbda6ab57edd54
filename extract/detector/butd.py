"""Bottom-Up-Attention's R101-C4 on stock Detectron2: the parts that Detectron2 lacks, registered under names of their own.

Easy to get wrong, and hardly seen in a cosine: the stem's pool has no padding and rounds up; the RoI head's last stage keeps its
14 x 14 resolution by dilation; regions are pooled by their maximum (RoIPool); box widths count pixels inclusively (+ 1); the anchors
belong to the weights, and Detectron2 would silently keep its own.

Imports Detectron2: load this module only where a detector is built.

Source: peteanderson80/bottom-up-attention (`test.prototxt`, `proposal_layer.py`).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BACKBONE_REGISTRY
from detectron2.modeling.backbone.resnet import BasicStem, BottleneckBlock, ResNet, build_resnet_backbone
from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY
from detectron2.modeling.proposal_generator.rpn import RPN
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, Res5ROIHeads
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import nms

from uniter.extract.detector.extents import Size
from uniter.extract.detector.fixed_size import Candidates

SMALLEST_PROPOSAL = 16


"""Pixels of the original image; shorter proposals are dropped."""


class CaffeStem(BasicStem):  # type: ignore[misc]
    """The stem with Caffe's pool: 3 x 3, stride 2, no padding, sizes rounded up."""

    caffe_pool = True

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float32 pixels to (B, 64, H', W'), the pooling rounding up as Caffe's does."""
        return F.max_pool2d(F.relu_(self.conv1(images)), kernel_size=3, stride=2, padding=0, ceil_mode=True)


@BACKBONE_REGISTRY.register()  # type: ignore[untyped-decorator]
def uniter_caffe_resnet(cfg: CfgNode, input_shape: ShapeSpec) -> Any:
    """Detectron2's ResNet with Caffe's stem pool."""
    backbone = build_resnet_backbone(cfg, input_shape)
    backbone.stem = CaffeStem(input_shape.channels, cfg.MODEL.RESNETS.STEM_OUT_CHANNELS, cfg.MODEL.RESNETS.NORM)
    return backbone


@PROPOSAL_GENERATOR_REGISTRY.register()
class UniterCaffeRPN(RPN):  # type: ignore[misc]
    """Detectron2's RPN with the rules of Caffe's proposal layer."""

    def predict_proposals(
        self,
        anchors: list[Any],
        pred_objectness_logits: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        image_sizes: list[tuple[int, int]],
        scales: Sequence[float] | None = None,
    ) -> list[Any]:
        """As Detectron2's; `scales` are network pixels per pixel of each original image (1 where not given)."""
        results = []
        for row, (size, scale) in enumerate(zip(image_sizes, scales or [1.0] * len(image_sizes), strict=True)):
            boxes, logits = caffe_proposals(
                torch.cat([level.tensor for level in anchors]),
                torch.cat([level[row] for level in pred_objectness_logits]),
                torch.cat([level[row] for level in pred_anchor_deltas]),
                size,
                smallest=SMALLEST_PROPOSAL * scale,
                before_nms=self.pre_nms_topk[False],
                after_nms=self.post_nms_topk[False],
                nms_threshold=self.nms_thresh,
            )
            results.append(Instances(size, proposal_boxes=Boxes(boxes), objectness_logits=logits))
        return results

    def candidates(self, anchors: list[Any], logits: list[Tensor], deltas: list[Tensor], size: Size, scale: float) -> Candidates:
        """What `predict_proposals` suppresses, of one image, for tensors of one size."""
        boxes, scores = caffe_decoded(torch.cat([level.tensor for level in anchors]), torch.cat(deltas), size), torch.cat(logits)
        usable = caffe_usable(boxes, scores, SMALLEST_PROPOSAL * scale)
        before, after = self.pre_nms_topk[False], self.post_nms_topk[False]
        return Candidates(boxes, scores, usable, inclusive(boxes), None, before, after, self.nms_thresh)


def caffe_proposals(
    anchors: Tensor,
    logits: Tensor,
    deltas: Tensor,
    image_size: tuple[int, int],
    *,
    smallest: float,
    before_nms: int = 6000,
    after_nms: int = 300,
    nms_threshold: float = 0.7,
) -> tuple[Tensor, Tensor]:
    """Proposals of one image: decode, clip, drop small ones, best 6000, non-maximum suppression, best 300.

    Args:
        anchors: (A, 4) network pixels, inclusive.
        logits: (A,) foreground minus background; their order is that of Caffe's soft-max.
        deltas: (A, 4).
        image_size: (height, width) of the network's input.
        smallest: the shortest side that stays, network pixels. Where nothing is that large (an image narrower than that),
            all stay; Caffe's layer fails there.

    Returns:
        Boxes (P, 4) and their logits (P,), by decreasing logit.
    """
    boxes = caffe_decoded(anchors, deltas, image_size)
    large = caffe_usable(boxes, logits, smallest)
    boxes, logits = boxes[large], logits[large]
    order = logits.argsort(descending=True, stable=True)[:before_nms]
    boxes, logits = boxes[order], logits[order]
    kept = first_kept(inclusive(boxes), logits, threshold=nms_threshold, most=after_nms)
    return boxes[kept], logits[kept]


def caffe_decoded(anchors: Tensor, deltas: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Anchors (A, 4) moved by deltas (A, 4) and cut at the centres of the border's pixels, (A, 4)."""
    height, width = image_size
    anchor_width, anchor_height = anchors[:, 2] - anchors[:, 0] + 1, anchors[:, 3] - anchors[:, 1] + 1
    centre_x = deltas[:, 0] * anchor_width + (anchors[:, 0] + 0.5 * anchor_width)
    centre_y = deltas[:, 1] * anchor_height + (anchors[:, 1] + 0.5 * anchor_height)
    half_width, half_height = 0.5 * (deltas[:, 2].exp() * anchor_width), 0.5 * (deltas[:, 3].exp() * anchor_height)
    return torch.stack(
        [
            (centre_x - half_width).clamp(0, width - 1),
            (centre_y - half_height).clamp(0, height - 1),
            (centre_x + half_width).clamp(0, width - 1),
            (centre_y + half_height).clamp(0, height - 1),
        ],
        dim=1,
    )


def caffe_usable(boxes: Tensor, logits: Tensor, smallest: float) -> Tensor:
    """(A,) bool: finite and large enough, or no smaller than all."""
    large = (boxes[:, 2] - boxes[:, 0] + 1 >= smallest) & (boxes[:, 3] - boxes[:, 1] + 1 >= smallest)
    large |= ~large.any()
    return large & boxes.isfinite().all(dim=1) & logits.isfinite()


def inclusive(boxes: Tensor) -> Tensor:
    """Boxes (N, 4) whose far corner is moved by one pixel, which makes torchvision's areas the inclusive ones."""
    return torch.cat([boxes[:, :2], boxes[:, 2:] + 1], dim=1)


def first_kept(boxes: Tensor, scores: Tensor, *, threshold: float, most: int) -> Tensor:
    """The first indices, at most `most`, that torchvision's non-maximum suppression keeps of boxes (N, 4) sorted by score (N,)."""
    # What the best boxes keep does not depend on the others; on a CPU, where time grows with their square, they often suffice.
    counts = [len(boxes)] if boxes.is_cuda else [min(count, len(boxes)) for count in (1500, 3000, len(boxes))]
    kept = scores.new_zeros((0,), dtype=torch.int64)
    for count in counts:
        kept = nms(boxes[:count], scores[:count], threshold)[:most]
        if len(kept) == most:
            break
    return kept


@ROI_HEADS_REGISTRY.register()
class UniterDilatedRes5ROIHeads(Res5ROIHeads):  # type: ignore[misc]
    """Detectron2's C4 heads whose last stage keeps the resolution: stride 1, dilation 2."""

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Detectron2's arguments of the heads, with the last stage of the ResNet dilated as Bottom-Up Attention has it."""
        made: dict[str, Any] = super().from_config(cfg, input_shape)
        resnets = cfg.MODEL.RESNETS
        out_channels = 8 * resnets.RES2_OUT_CHANNELS
        blocks = ResNet.make_stage(
            BottleneckBlock,
            3,
            stride_per_block=[1, 1, 1],
            in_channels=out_channels // 2,
            out_channels=out_channels,
            bottleneck_channels=8 * resnets.NUM_GROUPS * resnets.WIDTH_PER_GROUP,
            num_groups=resnets.NUM_GROUPS,
            norm=resnets.NORM,
            stride_in_1x1=resnets.STRIDE_IN_1X1,
            dilation=2,
        )
        made["res5"] = torch.nn.Sequential(*blocks)
        return made


def butd_config(*, depth: int = 101, classes: int = 1600) -> CfgNode:
    """The configuration of Bottom-Up-Attention's detector (ResNet-101; `depth` and `classes` for small variants in tests)."""
    cfg = get_cfg()
    model = cfg.MODEL
    cfg.INPUT.FORMAT, cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = "BGR", 600, 1000
    model.MASK_ON = False
    model.BACKBONE.NAME = "uniter_caffe_resnet"
    model.RESNETS.DEPTH, model.RESNETS.STRIDE_IN_1X1, model.RESNETS.NORM = depth, True, "FrozenBN"
    model.RESNETS.OUT_FEATURES = ["res4"]
    model.PIXEL_MEAN, model.PIXEL_STD = [102.9801, 115.9465, 122.7717], [1.0, 1.0, 1.0]
    model.PROPOSAL_GENERATOR.NAME = "UniterCaffeRPN"
    model.RPN.IN_FEATURES, model.RPN.CONV_DIMS = ["res4"], [512]
    # Twelve places; what stands in them comes from the weights.
    model.ANCHOR_GENERATOR.SIZES, model.ANCHOR_GENERATOR.ASPECT_RATIOS = [[64, 128, 256, 512]], [[0.5, 1.0, 2.0]]
    model.RPN.PRE_NMS_TOPK_TEST, model.RPN.POST_NMS_TOPK_TEST, model.RPN.NMS_THRESH = 6000, 300, 0.7
    model.ROI_HEADS.NAME, model.ROI_HEADS.IN_FEATURES, model.ROI_HEADS.NUM_CLASSES = "UniterDilatedRes5ROIHeads", ["res4"], classes
    model.ROI_BOX_HEAD.POOLER_TYPE, model.ROI_BOX_HEAD.POOLER_RESOLUTION = "ROIPool", 14
    model.ROI_BOX_HEAD.BBOX_REG_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
    return cfg


EMBEDDING_WIDTH, ATTRIBUTE_WIDTH = 256, 512


def add_attribute_branch(predictor: Any, *, classes: int, attributes: int) -> None:
    """Give a box predictor Bottom-Up-Attention's attribute branch: features and the class's embedding to attributes.

    Args:
        predictor: Detectron2's, whose `cls_score` tells the features' width.
        classes, attributes: how many, without the background and "no attribute".
    """
    predictor.cls_embedding = nn.Embedding(classes + 1, EMBEDDING_WIDTH)
    predictor.fc_attr = nn.Linear(predictor.cls_score.in_features + EMBEDDING_WIDTH, ATTRIBUTE_WIDTH)
    predictor.attr_score = nn.Linear(ATTRIBUTE_WIDTH, attributes + 1)


CAFFE_SCALES = (4, 8, 16, 32)
"""Of Bottom-Up-Attention's anchors, in cells of 16 pixels."""


def caffe_anchors(scales: Sequence[int] = CAFFE_SCALES) -> Tensor:
    """(3 S, 4) float32, Caffe's anchors: ratios 0.5, 1, 2 outer, the S scales inner, inclusive pixels, centre 7.5.

    Source: `generate_anchors.py` of bottom-up-attention; base sizes are rounded before they are scaled.
    """
    rows = []
    for ratio in (0.5, 1.0, 2.0):
        base_width = round(math.sqrt(256 / ratio))
        base_height = round(base_width * ratio)
        for scale in scales:
            half_width, half_height = (base_width * scale - 1) / 2, (base_height * scale - 1) / 2
            rows.append((7.5 - half_width, 7.5 - half_height, 7.5 + half_width, 7.5 + half_height))
    return torch.tensor(rows, dtype=torch.float32)
