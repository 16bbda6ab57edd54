"""What makes the network faster on a CPU: fused convolutions, pooling over all boxes, memory that is kept."""

import ctypes
import logging
import sys
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import roi_pool

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


def max_pooled(maps: Tensor, boxes: Tensor, *, scale: float, side: int) -> Tensor:
    """What `torchvision.ops.roi_pool` gives for one image, bit for bit.

    Args:
        maps: (1, C, H, W), best channels last.
        boxes: (P, 4) float32 pixels, x0 y0 x1 y1.
        scale: cells of the map per pixel.
        side: bins along each axis.

    Returns:
        (P, C, side, side), channels last, of the maps' dtype.
    """
    channels, height, width = maps.shape[1:]
    pooled = torch.empty((len(boxes), channels, side, side), dtype=maps.dtype, memory_format=torch.channels_last)
    indices = torch.empty((1, channels, side, side), dtype=torch.int64, memory_format=torch.channels_last)
    # C rounds halves away from zero, and the last cell belongs to the box.
    cells = np.floor((boxes * scale).double().numpy() + 0.5).astype(np.int64)
    for row, (x0, y0, x1, y1) in enumerate(cells.tolist()):
        wide, high = max(x1 - x0 + 1, 1), max(y1 - y0 + 1, 1)
        if not (0 <= x0 < width and 0 <= y0 < height and has_exact_bins(wide, side) and has_exact_bins(high, side)):
            pooled[row] = roi_pool(maps.float().contiguous(), [boxes[row : row + 1]], side, scale)[0]
            continue
        part, into = maps[:, :, y0 : y0 + high, x0 : x0 + wide], pooled[row : row + 1]
        beyond = (0, wide - part.shape[3], 0, high - part.shape[2])
        if any(beyond):
            part = F.pad(part, beyond, value=-torch.inf)
        torch.ops.aten.adaptive_max_pool2d.out(part, [side, side], out=into, indices=indices)
        if any(beyond):
            into.masked_fill_(into == -torch.inf, 0)  # bins wholly beyond the map's edge
    return pooled


@lru_cache(maxsize=4096)
def has_exact_bins(cells: int, side: int) -> bool:
    """Whether float32 arithmetic, as torchvision's, cuts so many cells into the bins that exact arithmetic gives."""
    size = np.float32(cells) / np.float32(side)
    return all(
        int(np.floor(np.float32(i) * size)) == i * cells // side and int(np.ceil(np.float32(i + 1) * size)) == -(-(i + 1) * cells // side)
        for i in range(side)
    )


def keep_freed_memory() -> None:
    """Have glibc, in the whole process, keep up to 1 GiB of freed memory for what is asked next.

    Every batch asks for the same large tensors. Left alone, glibc returns each to the system and clears fresh pages for the next, which
    takes up to a tenth of the time. Other C libraries stay as they are.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_threshold = -1, -3
        # Before 2.35, glibc refuses more than 32 MiB; were the other one set alone, it would stay at its first 128 KiB.
        if library.mallopt(mmap_threshold, 1 << 30) or library.mallopt(mmap_threshold, 1 << 25):
            library.mallopt(trim_threshold, 1 << 30)
