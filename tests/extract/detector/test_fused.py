"""Fused residual blocks give what Detectron2's give, and are left out where the operations are missing or wrong."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from uniter.extract.detector import cpu as fused
from uniter.extract.detector.cpu import FusedBottleneck, fuse_blocks
from uniter.extract.detector.network import fold_batch_norm


def stage(*, dilation: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    from detectron2.modeling.backbone.resnet import BottleneckBlock, ResNet

    torch.manual_seed(0)
    blocks = ResNet.make_stage(
        BottleneckBlock,
        3,
        stride_per_block=[stride, 1, 1],
        in_channels=16,
        bottleneck_channels=8,
        out_channels=32,
        num_groups=groups,
        norm="FrozenBN",
        stride_in_1x1=True,
        dilation=dilation,
    )
    folded: nn.Sequential = fold_batch_norm(nn.Sequential(*blocks).eval())
    return folded.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize("shape", [{"dilation": 2}, {"stride": 2}, {"groups": 4}])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_fused_blocks_give_what_plain_ones_give(shape: dict[str, int], kind: torch.dtype) -> None:
    plain = stage(**shape).to(kind)
    quick = copy.deepcopy(plain)
    fuse_blocks(quick, images=4, side=14)
    assert all(isinstance(block, FusedBottleneck) for block in quick)
    for images, side in ((4, 14), (3, 7), (1, 1)):
        maps = torch.randn(images, 16, side, side).to(kind).contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            expected, got = plain(maps.clone()).float(), quick(maps.clone()).float()
        tolerance = 1e-5 if kind == torch.float32 else 3e-2
        assert float((got - expected).abs().max()) <= tolerance * float(expected.abs().max())


@pytest.mark.parametrize("fault", ["missing", "wrong"])
def test_without_sound_operations_the_plain_blocks_stay(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = fused.FusedConvolution.forward

    def forward(self: Any, maps: torch.Tensor, summand: torch.Tensor | None = None) -> torch.Tensor:
        if fault == "missing":
            raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_convolution_pointwise'")
        return torch.zeros_like(right(self, maps, summand))

    monkeypatch.setattr(fused.FusedConvolution, "forward", forward)
    blocks = stage()
    fuse_blocks(blocks, images=2, side=7)
    assert not any(isinstance(block, FusedBottleneck) for block in blocks)
