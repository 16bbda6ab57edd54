"""RoI max pooling on a CPU: torchvision's values, from maps whose channels lie together.

torchvision walks over one channel after the other, number by number. PyTorch's adaptive pooling takes many channels at once, and its bins
are RoIPool's: bin i of n cells reaches from floor(i n / side) to ceil((i + 1) n / side). torchvision computes that in float32, which for
a few n comes out one cell wider; such boxes, and those outside the map, are left to it.
"""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import roi_pool


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
