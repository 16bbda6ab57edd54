"""Residual blocks on a CPU with convolution, addition and ReLU in one pass over memory, weights laid out once.

PyTorch's compiler uses these oneDNN operations and does not promise to keep them, so each block is compared with its plain form when it
is built; where the operations are missing or differ, the plain block stays. In float32 both give the same numbers.
"""

import logging
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)


class FusedConvolution(nn.Module):
    """One convolution, its weights in oneDNN's own layout, then a summand if there is one, then ReLU unless it is left out."""

    def __init__(self, layer: nn.Conv2d, images: int, side: int, *, relu: bool = True) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.dilation = layer.kernel_size, layer.stride, layer.dilation
        self.padding, self.groups, self.relu = layer.padding, layer.groups, relu
        self.where = [list(layer.padding), list(layer.stride), list(layer.dilation)]
        self.bias = layer.bias
        size = [images, layer.in_channels, side, side]
        self.weight: Tensor = torch.ops.mkldnn._reorder_convolution_weight(layer.weight.detach(), *self.where, self.groups, size)

    def forward(self, maps: Tensor, summand: Tensor | None = None) -> Tensor:
        made: Tensor
        if summand is None:
            after = "relu" if self.relu else "none"
            made = torch.ops.mkldnn._convolution_pointwise(maps, self.weight, self.bias, *self.where, self.groups, after, [], "")
        else:
            made = torch.ops.mkldnn._convolution_pointwise.binary(
                maps, summand, self.weight, self.bias, *self.where, self.groups, "add", 1.0, "relu", [], None
            )
        return made


class FusedBottleneck(nn.Module):
    """Detectron2's BottleneckBlock with folded BatchNorm, for inference on a CPU."""

    def __init__(self, block: Any, *, images: int, side: int) -> None:
        super().__init__()
        self.first, self.second, self.third = (FusedConvolution(layer, images, side) for layer in (block.conv1, block.conv2, block.conv3))
        self.shortcut = None if block.shortcut is None else FusedConvolution(block.shortcut, images, side, relu=False)

    def forward(self, maps: Tensor) -> Tensor:
        summand = maps if self.shortcut is None else self.shortcut(maps)
        made: Tensor = self.third(self.second(self.first(maps)), summand)
        return made


def fuse_blocks(module: nn.Module, *, images: int, side: int) -> None:
    """Replace the bottleneck blocks within a module, in place, by fused ones that give the same.

    Args:
        module: on the CPU, BatchNorm folded, in the precision it will run in.
        images, side: how many maps of which side length usually come; weights are laid out for that, others work too.
    """
    block: Any
    for parent in list(module.modules()):
        for name, block in list(parent.named_children()):
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
                setattr(parent, name, fused)
