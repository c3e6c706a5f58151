"""MobileNetV3-Small (Howard et al. 2019) with torchvision's state-dict keys; paper 004's backbone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from .embedding import Encoder, feature_encoder

# kernel, expanded, out, squeeze-excite, hard-swish, stride: blocks 1..11, as in torchvision.
BLOCKS = (
    (3, 16, 16, True, False, 2),
    (3, 72, 24, False, False, 2),
    (3, 88, 24, False, False, 1),
    (5, 96, 40, True, True, 2),
    (5, 240, 40, True, True, 1),
    (5, 240, 40, True, True, 1),
    (5, 120, 48, True, True, 1),
    (5, 144, 48, True, True, 1),
    (5, 288, 96, True, True, 2),
    (5, 576, 96, True, True, 1),
    (5, 576, 96, True, True, 1),
)
FEATURES = 576
_norm = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)


def _divisible(value: float, by: int = 8) -> int:
    rounded = max(by, int(value + by / 2) // by * by)
    return rounded + by if rounded < 0.9 * value else rounded


class SymmetricConv2d(nn.Conv2d):
    """A convolution with symmetric kernels: each is averaged over its rotations and reflections.

    If the input is rotated by quarter turns or reflected, so are the output maps. With a stride of two this
    needs kernels and inputs of even side, because an odd kernel would sample the pixels off centre.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) -> (N, C', H', W')."""
        weight = symmetric(self.weight)
        return nn.functional.conv2d(x, weight, self.bias, self.stride, self.padding, 1, self.groups)


def symmetric(kernels: torch.Tensor) -> torch.Tensor:
    """Return the mean of kernels (O, I, K, K) over the eight rotations and reflections of a square."""
    across = (kernels + kernels.flip(3)) / 2
    both = (across + across.flip(2)) / 2
    return (both + both.transpose(2, 3)) / 2


def _conv_norm(
    inside: int,
    out: int,
    kernel: int,
    stride: int,
    act: type[nn.Module] | None,
    groups: int = 1,
    symmetry: bool = False,
) -> nn.Sequential:
    kind, pad = nn.Conv2d, kernel // 2
    if symmetry and kernel > 1:
        kind = SymmetricConv2d
        kernel += stride == 2
    conv = kind(inside, out, kernel, stride, pad, groups=groups, bias=False)
    return nn.Sequential(conv, _norm(out), *([act(inplace=True)] if act else []))


class SqueezeExcite(nn.Module):
    """Channel attention: global mean, fc1, ReLU, fc2, hard sigmoid, scale."""

    def __init__(self, channels: int) -> None:
        """Create two 1x1 convolutions; the inner width is a quarter, rounded to a multiple of eight."""
        super().__init__()
        squeezed = _divisible(channels / 4)
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x`` (N, C, H, W) scaled per channel."""
        pooled = x.mean((2, 3), keepdim=True)
        gate = nn.functional.hardsigmoid(self.fc2(nn.functional.relu(self.fc1(pooled))))
        return x * gate


class InvertedResidual(nn.Module):
    """Expand 1x1, depthwise, squeeze-excite, project 1x1; with a skip connection if the shapes agree."""

    def __init__(
        self,
        inside: int,
        kernel: int,
        expanded: int,
        out: int,
        se: bool,
        hs: bool,
        stride: int,
        symmetry: bool = False,
    ) -> None:
        """Build the layers that the block has, numbered without gaps as in torchvision."""
        super().__init__()
        act: type[nn.Module] = nn.Hardswish if hs else nn.ReLU
        layers: list[nn.Module] = []
        if expanded != inside:
            layers.append(_conv_norm(inside, expanded, 1, 1, act))
        layers.append(_conv_norm(expanded, expanded, kernel, stride, act, expanded, symmetry))
        if se:
            layers.append(SqueezeExcite(expanded))
        layers.append(_conv_norm(expanded, out, 1, 1, None))
        self.block = nn.Sequential(*layers)
        self.skip = stride == 1 and inside == out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) -> (N, C', H/stride, W/stride)."""
        y: torch.Tensor = self.block(x)
        return x + y if self.skip else y


class MobileNetV3Small(nn.Module):
    """The classifier (2,542,856 parameters at 1000 classes), or without it the backbone.

    Args:
        classes: width of the classifier; 0 leaves it out and returns the 576 pooled features (927,008
            parameters).
        deviation: without a classifier, return the standard deviation of every map as well as its mean,
            1,152 features in all; it measures how unevenly a pattern is spread over the tile.
        symmetry: use symmetric kernels (:class:`SymmetricConv2d`) wherever they are wider than one pixel.
            A tile whose side is a multiple of 32 then has the same features, up to rounding, in all eight
            orientations. Kernels of stride two are one pixel wider, so torchvision's weights do not fit.
        layers: without a classifier, pool these of the 13 feature layers (0 to 12) and return the features
            of all, in this order.
        blur: width of a fixed binomial filter before the first layer, an odd number; 0 for none.

    Attributes:
        parts: number of features of each pooled layer; their sum is the length of the output.

    Raises:
        ValueError: a layer does not exist, or the blur is an even number.
    """

    def __init__(
        self,
        classes: int = 1000,
        deviation: bool = False,
        symmetry: bool = False,
        layers: Sequence[int] = (12,),
        blur: int = 0,
    ) -> None:
        """Build the layers and initialise them as torchvision does."""
        super().__init__()
        self.deviation = deviation
        widths = (16, *(block[2] for block in BLOCKS), FEATURES)
        if not layers or not all(0 <= layer < len(widths) for layer in layers):
            raise ValueError(f"layers are {list(layers)}; expected some of 0 to {len(widths) - 1}")
        if blur and (blur < 0 or blur % 2 == 0):
            raise ValueError(f"blur is {blur}; expected an odd width, or 0")
        self.layers = tuple(layers)
        self.parts = tuple((1 + deviation) * widths[layer] for layer in layers)
        row = torch.tensor([float(math.comb(blur - 1, n)) for n in range(blur)])
        self.blur = nn.Buffer(torch.outer(row, row) / row.sum() ** 2, persistent=False)
        blocks: list[nn.Module] = [_conv_norm(3, 16, 3, 2, nn.Hardswish, symmetry=symmetry)]
        inside = 16
        for kernel, expanded, out, se, hs, stride in BLOCKS:
            blocks.append(InvertedResidual(inside, kernel, expanded, out, se, hs, stride, symmetry))
            inside = out
        blocks.append(_conv_norm(inside, FEATURES, 1, 1, nn.Hardswish))
        self.features = nn.Sequential(*blocks)
        self.classifier = (
            nn.Sequential(
                nn.Linear(FEATURES, 1024), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(1024, classes)
            )
            if classes
            else nn.Identity()
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0.0, 0.01)
                nn.init.zeros_(module.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 3, S, S) -> (N, classes), or without a classifier (N, sum of :attr:`parts`)."""
        if len(self.blur):
            kernel = self.blur.expand(3, 1, -1, -1)
            padded = nn.functional.pad(x, (len(self.blur) // 2,) * 4, mode="reflect")
            x = nn.functional.conv2d(padded, kernel, groups=3)
        pooled: dict[int, torch.Tensor] = {}
        for number, block in enumerate(self.features):
            x = block(x)
            if number in self.layers:
                pooled[number] = self._pooled(x)
        result: torch.Tensor = self.classifier(torch.cat([pooled[n] for n in self.layers], 1))
        return result

    def _pooled(self, maps: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) -> (N, C), or (N, 2 C) with the deviation."""
        mean = maps.mean((2, 3))
        if not self.deviation:
            return mean
        return torch.cat([mean, maps.var((2, 3), correction=0).add(1e-5).sqrt()], 1)


def build_mobilenet_v3_small(
    size_px: int = 224,
    dim: int = 64,
    hidden: int = 256,
    dropout: float = 0.3,
    relu_embedding: bool = False,
    classes: int = 0,
    deviation: bool = False,
    symmetry: bool = False,
    layers: str = "12",
    blur: int = 0,
) -> Encoder:
    """Return paper 004's encoder: MobileNetV3-Small up to its 576 pooled features, with a head 576-256-64.

    Four options are not from the paper: ``deviation`` pools by mean and deviation (1,152 features);
    ``symmetry`` gives all rotations and reflections of a tile the same embedding; ``layers``, such as
    ``3+6+8+12``, pools several layers; ``blur`` puts a binomial filter in front.
    """
    tail = ("features.9", "features.10", "features.11", "features.12")
    numbers = [int(number) for number in layers.split("+")]
    backbone = MobileNetV3Small(0, deviation, symmetry, numbers, blur)
    return feature_encoder(
        backbone, sum(backbone.parts), size_px, dim, hidden, dropout, relu_embedding, classes, tail,
        parts=backbone.parts,
    )  # fmt: skip
