"""The quick RoI max pooling gives torchvision's values bit for bit, at the map's edges and beyond too."""

import pytest
import torch
from torchvision.ops import roi_pool

from uniter.extract.detector import cpu as pooling
from uniter.extract.detector.cpu import has_exact_bins, max_pooled

WIDTH, HEIGHT = 63, 38


def boxes() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(200, 2, generator=generator) * torch.tensor([980.0, 580.0])
    sides = torch.rand(200, 2, generator=generator) ** 2 * torch.tensor([900.0, 560.0])
    special = [
        [0, 0, 1000, 600],  # the whole map, its far edges rounded to a cell beyond
        [8, 24, 40.5, 56],  # halves of cells
        [0, 0, 56.5 * 16, 300],  # 57 and 62 cells, where torchvision's float32 bins differ from exact ones
        [0, 0, 61 * 16, 300],
        [1004, 590, 1020, 800],  # starts in the last cell, and beyond it
        [1010, 620, 1100, 800],
        [-40, -20, 60, 70],
        [300, 300, 300, 300],
        [400, 200, 380, 190],
    ]
    return torch.cat([torch.tensor(special), torch.cat([corners, corners + sides], dim=1)])


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("channels", "side"), [(40, 14), (1, 7)])
def test_the_same_as_torchvisions(channels: int, side: int, kind: torch.dtype) -> None:
    torch.manual_seed(1)
    whole = torch.randn(2, channels, HEIGHT + 3, WIDTH + 2).to(memory_format=torch.channels_last)
    maps = whole[1:, :, :HEIGHT, :WIDTH].to(kind)
    expected = roi_pool(maps.float().contiguous(), [boxes()], side, 1 / 16).to(kind)
    assert (expected == 0).any()  # bins beyond the edge
    got = max_pooled(maps, boxes(), scale=1 / 16, side=side)
    assert torch.equal(got, expected)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(max_pooled(maps.contiguous(), boxes()[::7], scale=1 / 16, side=side), expected[::7])
    assert max_pooled(maps, boxes()[:0], scale=1 / 16, side=side).shape == (0, channels, side, side)


def test_torchvision_is_hardly_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.Tensor] = []

    def watched(maps: torch.Tensor, rois: list[torch.Tensor], side: int, scale: float) -> torch.Tensor:
        asked.extend(rois)
        pooled: torch.Tensor = roi_pool(maps, rois, side, scale)
        return pooled

    monkeypatch.setattr(pooling, "roi_pool", watched)
    max_pooled(torch.rand(1, 4, HEIGHT, WIDTH), boxes(), scale=1 / 16, side=14)
    assert 0 < len(asked) < 10


def test_bins_by_float32() -> None:
    assert [cells for cells in range(1, 100) if not has_exact_bins(cells, 14)] == [57, 62]
    assert [cells for cells in range(1, 100) if not has_exact_bins(cells, 7)] == [57]
