"""EfficientNet-Lite0 with a feature pyramid as a Detectron2 backbone, and RoI heads that look twice: the detector on board.

Easy to get wrong: convolutions of stride 2 are padded as TensorFlow's "same" pads, one more at the right and at the bottom than before;
BatchNorm is folded into the weights that ship, so every convolution has a bias and no norm; activations end at 6; the input is RGB.

Imports Detectron2: load this module only where a detector is built.

Source: Tan and Le 2019; the Lite variant (no squeeze-and-excitation, ReLU6) of TensorFlow's `efficientnet/lite`.
"""

from pathlib import Path
from typing import Any

from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, StandardROIHeads
from torch import Tensor, nn
from torch.nn import functional as F

ON_BOARD_WEIGHTS = Path(__file__).resolve().parents[1] / "weights" / "on_board" / "on_board.safetensors"
"""Ships with the package; what is in it and by which right is said in the README.md beside it."""

# Of each stage: how many blocks, their kernel, the stride of the first, how much wider they are inside, channels in and out.
STAGES = ((1, 3, 1, 1, 32, 16), (2, 3, 2, 6, 16, 24), (2, 5, 2, 6, 24, 40), (3, 3, 2, 6, 40, 80), (3, 5, 1, 6, 80, 112),
          (4, 5, 2, 6, 112, 192), (1, 3, 1, 6, 192, 320))  # fmt: skip

# After which block a map goes to the pyramid: its name, channels and stride.
TAPS = {4: ("c3", 40, 8), 10: ("c4", 112, 16), 15: ("c5", 320, 32)}


class SameConvolution(nn.Conv2d):
    """A convolution padded as TensorFlow's "same" pads even sizes: n pixels become n / stride."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, *, stride: int = 1, groups: int = 1) -> None:
        self.beyond = int(stride == 2)
        """Zeros at the end of rows and columns besides those that `padding` lays around."""
        super().__init__(channels_in, channels_out, kernel, stride, padding=(kernel - 1 - self.beyond) // 2, groups=groups)

    def forward(self, maps: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C', H / stride, W / stride)."""
        return super().forward(F.pad(maps, (0, 1, 0, 1)) if self.beyond else maps)


class InvertedBlock(nn.Module):
    """Widen, filter each channel by itself, narrow; added to what came in where the shape is the same."""

    def __init__(self, kernel: int, stride: int, wider: int, channels_in: int, channels_out: int) -> None:
        super().__init__()
        inside = channels_in * wider
        self.expand = SameConvolution(channels_in, inside, 1) if wider != 1 else None
        self.depthwise = SameConvolution(inside, inside, kernel, stride=stride, groups=inside)
        self.project = SameConvolution(inside, channels_out, 1)
        self.adds = stride == 1 and channels_in == channels_out

    def forward(self, maps: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H', W'): widened, filtered channel by channel, narrowed; with the input added where shapes allow."""
        wide = maps if self.expand is None else F.relu6(self.expand(maps))
        narrow: Tensor = self.project(F.relu6(self.depthwise(wide)))
        return maps + narrow if self.adds else narrow


class EfficientNetLite0(Backbone):  # type: ignore[misc]
    """EfficientNet-Lite0 without its classifier: 3.4 million parameters.

    Args:
        freeze_at: the stem and so many of the 16 blocks are not trained.
    """

    def __init__(self, freeze_at: int = 0) -> None:
        super().__init__()
        self.stem = SameConvolution(3, 32, 3, stride=2)
        blocks = []
        for count, kernel, stride, wider, channels_in, channels_out in STAGES:
            blocks += [InvertedBlock(kernel, stride, wider, channels_in, channels_out)]
            blocks += [InvertedBlock(kernel, 1, wider, channels_out, channels_out) for _ in range(count - 1)]
        self.blocks = nn.ModuleList(blocks)
        self._out_features = [name for name, _, _ in TAPS.values()]
        self._out_feature_channels = {name: channels for name, channels, _ in TAPS.values()}
        self._out_feature_strides = {name: stride for name, _, stride in TAPS.values()}
        for part in [self.stem, *blocks[:freeze_at]] if freeze_at else []:
            part.requires_grad_(False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) normalised RGB, H and W multiples of 32, to maps c3, c4 and c5 of strides 8, 16 and 32."""
        maps = F.relu6(self.stem(images))
        found = {}
        for number, block in enumerate(self.blocks):
            maps = block(maps)
            if number in TAPS:
                found[TAPS[number][0]] = maps
        return found


@BACKBONE_REGISTRY.register()  # type: ignore[untyped-decorator]
def uniter_lite_fpn(cfg: CfgNode, input_shape: ShapeSpec) -> Any:
    """The pyramid p3, p4, p5 over EfficientNet-Lite0; MODEL.BACKBONE.FREEZE_AT counts its blocks."""
    return FPN(
        EfficientNetLite0(cfg.MODEL.BACKBONE.FREEZE_AT), cfg.MODEL.FPN.IN_FEATURES, cfg.MODEL.FPN.OUT_CHANNELS, norm=cfg.MODEL.FPN.NORM
    )


@ROI_HEADS_REGISTRY.register()
class UniterSecondLookROIHeads(StandardROIHeads):  # type: ignore[misc]
    """Detectron2's standard heads; where regions are taken, features are pooled again, at the boxes that the first look regressed."""


ON_BOARD_SHORTEST = 320
"""Pixels of the shorter side of an image in `--detector on-board`; what is trained by `lite_config` looks at 288."""


def lite_config(classes: int = 80) -> CfgNode:
    """Detectron2's configuration of the detector on board: 7.3 million parameters, 512-wide features."""
    cfg = get_cfg()
    model = cfg.MODEL
    model.BACKBONE.NAME, model.BACKBONE.FREEZE_AT = "uniter_lite_fpn", 5
    model.FPN.IN_FEATURES, model.FPN.OUT_CHANNELS = ["c3", "c4", "c5"], 128
    model.PIXEL_MEAN, model.PIXEL_STD, cfg.INPUT.FORMAT = [127.0, 127.0, 127.0], [128.0, 128.0, 128.0], "RGB"
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (288,), 288
    cfg.INPUT.MAX_SIZE_TRAIN = cfg.INPUT.MAX_SIZE_TEST = 640
    model.ANCHOR_GENERATOR.SIZES = [[16, 28], [48, 80], [128, 224]]
    rpn, heads, head = model.RPN, model.ROI_HEADS, model.ROI_BOX_HEAD
    rpn.IN_FEATURES = heads.IN_FEATURES = ["p3", "p4", "p5"]
    rpn.BATCH_SIZE_PER_IMAGE = 128
    rpn.PRE_NMS_TOPK_TRAIN = rpn.PRE_NMS_TOPK_TEST = 400
    rpn.POST_NMS_TOPK_TRAIN, rpn.POST_NMS_TOPK_TEST = 300, 200
    heads.NAME, heads.NUM_CLASSES, heads.BATCH_SIZE_PER_IMAGE = "UniterSecondLookROIHeads", classes, 40
    head.NAME, head.NUM_FC, head.FC_DIM, head.POOLER_RESOLUTION, head.POOLER_SAMPLING_RATIO = "FastRCNNConvFCHead", 2, 512, 7, 2
    cfg.DATASETS.TRAIN = ("coco_2017_train",)
    return cfg
