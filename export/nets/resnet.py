"""ResNet-50 (He et al. 2016) as torchvision and timm name its parameters, without its classifier."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

EXPANSION = 4


@dataclass(frozen=True)
class ResNetShape:
    """Sizes of a residual network of bottleneck blocks.

    Attributes:
        depths: number of blocks of each of the four stages.
        size_px: side of the input in pixels.
    """

    depths: tuple[int, int, int, int] = (3, 4, 6, 3)
    size_px: int = 224

    def dim(self, pool: str) -> int:
        """Return the length of an embedding."""
        return 512 * EXPANSION

    def pools(self) -> tuple[str, ...]:
        """Return the poolings that the network can compute."""
        return ("mean",)

    def shallow(self, depth: int) -> ResNetShape:
        """Return the shape with fewer blocks per stage, for tests."""
        return replace(self, depths=(depth,) * 4)


class ResNet(nn.Module):
    """Map normalised tiles (N, 3, S, S) to embeddings (N, 2048): the mean of the last map."""

    def __init__(self, shape: ResNetShape) -> None:
        """Create the network; weights are torch's defaults until a checkpoint is loaded."""
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        inside = 64
        for number, depth in enumerate(shape.depths, start=1):
            width = 32 * 2**number
            blocks = []
            for block in range(depth):
                stride = 2 if block == 0 and number > 1 else 1
                blocks.append(_Bottleneck(inside, width, stride))
                inside = width * EXPANSION
            setattr(self, f"layer{number}", nn.Sequential(*blocks))

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        """Return embeddings, not normalised."""
        maps = nn.functional.relu(self.bn1(self.conv1(tiles)))
        maps = nn.functional.max_pool2d(maps, 3, 2, 1)
        for number in range(1, 5):
            maps = getattr(self, f"layer{number}")(maps)
        return maps.mean((2, 3))


class _Bottleneck(nn.Module):
    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width * EXPANSION, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width * EXPANSION)
        self.downsample: nn.Module = nn.Identity()
        if inside != width * EXPANSION:
            conv = nn.Conv2d(inside, width * EXPANSION, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(width * EXPANSION))

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        found = nn.functional.relu(self.bn1(self.conv1(maps)))
        found = nn.functional.relu(self.bn2(self.conv2(found)))
        return nn.functional.relu(self.bn3(self.conv3(found)) + self.downsample(maps))
