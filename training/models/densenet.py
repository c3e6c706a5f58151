"""DenseNet-BC (Huang et al. 2017) with torchvision's state-dict keys: paper 000's net and densenet121.

Paper 000 states only "five dense blocks" at 50 px. We chose the sizes: five blocks allow four halvings of
50 px, and the cost equals that of the paper's CNN autoencoders.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn

from ...errors import BadInput
from .embedding import Encoder, feature_encoder

OLD_KEYS = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12])\.")
"""Keys in the checkpoint published by torchvision: ``norm.1.`` instead of ``norm1.``."""


class DenseLayer(nn.Sequential):
    """BN-ReLU-1x1-BN-ReLU-3x3; the new channels are appended to the input."""

    def __init__(self, inside: int, growth: int, bottleneck: int) -> None:
        """Create a layer that adds ``growth`` channels."""
        wide = growth * bottleneck
        super().__init__(
            OrderedDict(
                norm1=nn.BatchNorm2d(inside),
                relu1=nn.ReLU(),
                conv1=nn.Conv2d(inside, wide, 1, bias=False),
                norm2=nn.BatchNorm2d(wide),
                relu2=nn.ReLU(),
                conv2=nn.Conv2d(wide, growth, 3, 1, 1, bias=False),
            )
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) -> (N, C + growth, H, W)."""
        return torch.cat([x, super().forward(x)], 1)  # type: ignore[no-untyped-call]


class DenseNet(nn.Module):
    """Dense blocks joined by transitions that halve channels and size; returns pooled features or classes.

    Args:
        blocks: layers per block.
        growth: number of channels that each layer adds.
        stem: channels of the first convolution.
        large: use densenet121's stem (7x7, stride 2, max-pool), for 224 px; else a 3x3 convolution.
        classes: width of the classifier; 0 leaves it out.
        bottleneck: width of a layer's 1x1 convolution, as a multiple of ``growth``.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        growth: int,
        stem: int,
        large: bool,
        classes: int = 0,
        bottleneck: int = 4,
    ) -> None:
        """Build the layers and initialise them as torchvision does."""
        super().__init__()
        kernel, stride, padding = (7, 2, 3) if large else (3, 1, 1)
        parts: OrderedDict[str, nn.Module] = OrderedDict(
            conv0=nn.Conv2d(3, stem, kernel, stride, padding, bias=False),
            norm0=nn.BatchNorm2d(stem),
            relu0=nn.ReLU(),
        )
        if large:
            parts["pool0"] = nn.MaxPool2d(3, 2, 1)
        channels = stem
        for number, layers in enumerate(blocks, 1):
            block: OrderedDict[str, nn.Module] = OrderedDict()
            for layer in range(layers):
                block[f"denselayer{layer + 1}"] = DenseLayer(channels, growth, bottleneck)
                channels += growth
            parts[f"denseblock{number}"] = nn.Sequential(block)
            if number < len(blocks):
                parts[f"transition{number}"] = nn.Sequential(
                    OrderedDict(
                        norm=nn.BatchNorm2d(channels),
                        relu=nn.ReLU(),
                        conv=nn.Conv2d(channels, channels // 2, 1, bias=False),
                        pool=nn.AvgPool2d(2),
                    )
                )
                channels //= 2
        parts["norm5"] = nn.BatchNorm2d(channels)
        self.features = nn.Sequential(parts)
        self.channels = channels
        self.classifier = nn.Linear(channels, classes) if classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
            elif isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 3, S, S) -> (N, features), or (N, classes) with a classifier."""
        pooled = nn.functional.relu(self.features(x)).mean((2, 3))
        result: torch.Tensor = self.classifier(pooled)
        return result

    @staticmethod
    def rename(key: str) -> str:
        """Return the current name of a key in a checkpoint."""
        return OLD_KEYS.sub(r"\1\2.", key)


def build_densenet(
    size_px: int = 50,
    dim: int = 0,
    hidden: int = 256,
    dropout: float = 0.3,
    relu_embedding: bool = False,
    classes: int = 2,
    growth: int = 24,
) -> Encoder:
    """Return paper 000's supervised DenseNet: five blocks of six layers; embeds by pooled features."""
    if size_px < 16:
        raise BadInput(
            f"size_px is {size_px}; expected at least 16: the blocks halve it four times"
        )
    net = DenseNet((6, 6, 6, 6, 6), growth, 2 * growth, large=False)
    tail = ("features.denseblock5", "features.norm5")
    return feature_encoder(
        net, net.channels, size_px, dim, hidden, dropout, relu_embedding, classes, tail
    )


def build_densenet121(
    size_px: int = 224,
    dim: int = 0,
    hidden: int = 256,
    dropout: float = 0.3,
    relu_embedding: bool = False,
    classes: int = 1000,
) -> Encoder:
    """Return DenseNet-121; torchvision's checkpoint can be loaded, also with its old key names."""
    net = DenseNet((6, 12, 24, 16), 32, 64, large=True)
    tail = ("features.denseblock4", "features.norm5")
    return feature_encoder(
        net, net.channels, size_px, dim, hidden, dropout, relu_embedding, classes, tail
    )
