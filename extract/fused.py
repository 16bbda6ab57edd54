"""Residual blocks on a CPU with convolution, addition and ReLU in one pass over memory, weights laid out once.

PyTorch's compiler uses these oneDNN operations and does not promise to keep them, so each block is compared with its plain form when it
is built; where the operations are missing or differ, the plain block stays. In float32 both give the same numbers.
"""

import logging
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)


class FusedConvolution:
    """One convolution, its weights in oneDNN's own layout; ReLU always, a summand before it if there is one."""

    def __init__(self, layer: nn.Conv2d, images: int, side: int) -> None:
        self.bias = layer.bias
        self.where = [list(layer.padding), list(layer.stride), list(layer.dilation)]
        self.groups = layer.groups
        size = [images, layer.in_channels, side, side]
        self.weight: Tensor = torch.ops.mkldnn._reorder_convolution_weight(layer.weight.detach(), *self.where, self.groups, size)

    def __call__(self, maps: Tensor, *, after: str = "relu") -> Tensor:
        made: Tensor = torch.ops.mkldnn._convolution_pointwise(maps, self.weight, self.bias, *self.where, self.groups, after, [], "")
        return made

    def added_to(self, summand: Tensor, maps: Tensor) -> Tensor:
        """ReLU of the summand plus this convolution."""
        made: Tensor = torch.ops.mkldnn._convolution_pointwise.binary(
            maps, summand, self.weight, self.bias, *self.where, self.groups, "add", 1.0, "relu", [], None
        )
        return made


class FusedBottleneck(nn.Module):
    """Detectron2's BottleneckBlock with folded BatchNorm, for inference on a CPU."""

    def __init__(self, block: Any, *, images: int, side: int) -> None:
        super().__init__()
        self.first, self.second, self.third = (FusedConvolution(layer, images, side) for layer in (block.conv1, block.conv2, block.conv3))
        self.shortcut = None if block.shortcut is None else FusedConvolution(block.shortcut, images, side)

    def forward(self, maps: Tensor) -> Tensor:
        summand = maps if self.shortcut is None else self.shortcut(maps, after="none")
        return self.third.added_to(summand, self.second(self.first(maps)))


def fuse_blocks(blocks: nn.Sequential, *, images: int, side: int) -> None:
    """Replace the bottleneck blocks of a stage, in place, by fused ones that give the same.

    Args:
        blocks: on the CPU, BatchNorm folded, in the precision it will run in.
        images, side: how many maps of which side length usually come; weights are laid out for that, others work too.
    """
    block: Any
    for at, block in enumerate(blocks):
        if type(block).__name__ != "BottleneckBlock" or any(getattr(layer, "norm", None) is not None for layer in block.modules()):
            continue
        weight: Tensor = block.conv1.weight
        probe = torch.randn(2, weight.shape[1], 6, 6, generator=torch.Generator().manual_seed(0))
        probe = probe.to(weight.dtype).contiguous(memory_format=torch.channels_last)
        try:
            with torch.inference_mode():
                fused = FusedBottleneck(block, images=images, side=side)
                expected, got = block(probe).float(), fused(probe).float()
                tolerance = 1e-5 if weight.dtype == torch.float32 else 2e-2
                same = bool(((got - expected).abs().max() <= tolerance * expected.abs().max()).item())
        except (AttributeError, RuntimeError, TypeError) as error:
            log.info("fused convolutions are not used here: %s", str(error).split("\n")[0])
            return
        if same:
            blocks[at] = fused
