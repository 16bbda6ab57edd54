"""Batches of images of different sizes that give what each image gives alone.

An image in a larger batch is surrounded by padding, and the padding does not stay zero: a convolution writes its bias there and the
next one reads it. So before each convolution wider than one pixel everything outside the image's own extent is set to zero again,
which is what the convolution of the image alone would have met. The extent on each level follows from the layers' own arithmetic.

Layers that mix positions in other ways (group normalisation, deformable convolutions, attention) are not handled; `supports_padding`
says so, and images of different sizes then run one after another.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Size = tuple[int, int]


POINTWISE = ("FrozenBatchNorm2d", "BatchNorm2d", "NaiveSyncBatchNorm", "SyncBatchNorm", "ReLU", "Identity")


@dataclass(frozen=True)
class Arithmetic:
    """What decides the size of a convolution's or pool's output: (height, width) of each, and whether it is rounded up.

    `beyond`: zeros at the end alone, besides the padding.
    """

    kernel: Size
    stride: Size
    padding: Size
    dilation: Size = (1, 1)
    ceil: bool = False
    beyond: int = 0

    def size(self, before: int, axis: int) -> int:
        """The output's size along an axis."""
        reach = before + 2 * self.padding[axis] + self.beyond - self.dilation[axis] * (self.kernel[axis] - 1) - 1
        return (-(-reach // self.stride[axis]) if self.ceil else reach // self.stride[axis]) + 1


STEM_CONVOLUTION = Arithmetic((7, 7), (2, 2), (3, 3))


STEM_POOL, CAFFE_STEM_POOL = Arithmetic((3, 3), (2, 2), (1, 1)), Arithmetic((3, 3), (2, 2), (0, 0), ceil=True)


LAST_LEVEL_POOL = Arithmetic((1, 1), (2, 2), (0, 0))


class ValidExtents:
    """Extents of each image of one batch on every level, a level being told by its total (height, width)."""

    def __init__(self, sizes: Sequence[Size], total: Size) -> None:
        self._levels: dict[Size, list[Size]] = {total: list(sizes)}

    def of(self, maps: Tensor) -> list[Size]:
        """(height, width) of each image on the level of these (N, C, H, W) maps."""
        return self._levels[_spatial(maps)]

    def record(self, before: Tensor, after: Tensor, *layers: "Arithmetic") -> None:
        """Note the level that some layers made of another, by their arithmetic."""
        level = _spatial(after)
        if level not in self._levels:
            sizes = self.of(before)
            for layer in layers:
                sizes = [(layer.size(height, 0), layer.size(width, 1)) for height, width in sizes]
            self._levels[level] = sizes

    def clear_outside(self, maps: Tensor) -> None:
        """Set to zero, in place, what lies outside each image's extent."""
        total_height, total_width = _spatial(maps)
        for image, (height, width) in zip(maps, self.of(maps), strict=True):
            if height < total_height:
                image[:, height:] = 0
            if width < total_width:
                image[:, :height, width:] = 0


class PaddingGuard:
    """Hooks on the layers of some modules that keep the padding of a batch from mattering, while `batch` is entered."""

    def __init__(self, *modules: nn.Module) -> None:
        self._extents: ValidExtents | None = None
        for root in modules:
            for module in root.modules():
                if isinstance(module, nn.Conv2d):
                    module.register_forward_pre_hook(self._before_convolution)
                    module.register_forward_hook(self._after_convolution)
                elif _is_stem(module):
                    module.get_submodule("conv1").register_forward_hook(self._before_stem_pool)
                    module.register_forward_hook(self._after_stem)
                elif type(module).__name__ == "LastLevelMaxPool":
                    module.register_forward_hook(self._after_last_pool)

    @contextlib.contextmanager
    def batch(self, sizes: Sequence[Size], total: Size) -> Iterator[ValidExtents]:
        """Guard one batch: sizes (height, width) of the images within the (height, width) of the padded batch."""
        extents = ValidExtents(sizes, total)
        self._extents = extents
        try:
            yield extents
        finally:
            self._extents = None

    # The hooks clear their inputs in place: outside the extents no value is ever needed, so whoever else reads them loses nothing.
    def _before_convolution(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, nn.Conv2d)
        if self._extents is not None and max(layer.kernel_size) > 1:
            self._extents.clear_outside(inputs[0])

    def _after_convolution(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(layer, nn.Conv2d)
        if self._extents is not None:
            kernel, stride, padding, dilation = (_pair(getattr(layer, name)) for name in ("kernel_size", "stride", "padding", "dilation"))
            self._extents.record(inputs[0], output, Arithmetic(kernel, stride, padding, dilation, beyond=getattr(layer, "beyond", 0)))

    def _before_stem_pool(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        # The pool follows a ReLU: a zero never wins against what is inside, just as the border that the image alone would have.
        if self._extents is not None:
            self._after_convolution(layer, inputs, output)
            self._extents.clear_outside(output)

    def _after_stem(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if self._extents is not None:
            pool = CAFFE_STEM_POOL if getattr(layer, "caffe_pool", False) else STEM_POOL
            self._extents.record(inputs[0], output, STEM_CONVOLUTION, pool)

    def _after_last_pool(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: list[Tensor]) -> None:
        if self._extents is not None:
            self._extents.record(inputs[0], output[0], LAST_LEVEL_POOL)


def supports_padding(*modules: nn.Module) -> bool:
    """Whether every layer of the modules is one that the guard understands."""
    leaves = [leaf for root in modules for leaf in root.modules() if not list(leaf.children())]
    return all(
        isinstance(leaf, nn.Conv2d) or type(leaf).__name__ in (*POINTWISE, "LastLevelMaxPool") or not list(leaf.parameters())
        for leaf in leaves
    )


def _is_stem(module: nn.Module) -> bool:
    return any(kind.__name__ == "BasicStem" for kind in type(module).__mro__)


def _spatial(maps: Tensor) -> Size:
    return maps.shape[-2], maps.shape[-1]


def _pair(value: int | Sequence[int]) -> Size:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def pad_together(images: Sequence[Tensor], divisor: int) -> tuple[Tensor, list[Size]]:
    """Stack (3, h, w) images into one (N, 3, H, W) batch of zeros.

    Returns:
        The batch and each image's extent: its own size rounded up to `divisor`, which is what it would be padded to alone.
    """
    sizes = [(-(-image.shape[1] // divisor) * divisor, -(-image.shape[2] // divisor) * divisor) for image in images]
    total = max(height for height, _ in sizes), max(width for _, width in sizes)
    batch = torch.zeros((len(images), 3, *total), dtype=images[0].dtype, device=images[0].device)
    batch = batch.to(memory_format=torch.channels_last)
    for row, image in zip(batch, images, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = image
    return batch, sizes
