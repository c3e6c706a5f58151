"""Builds the image network of a shape."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...errors import BadInput
from .resnet import ResNet, ResNetShape
from .swin import Swin, SwinShape
from .vit import Pool, VitEncoder, VitShape

Shape = VitShape | SwinShape | ResNetShape


def image_net(shape: Shape, pool: Pool) -> nn.Module:
    """Return the image network of a shape, in evaluation mode, without memory for its weights.

    Raises:
        BadInput: the network cannot compute this pooling.
    """
    if pool not in shape.pools():
        raise BadInput(
            f"--pool is {pool!r}; expected one of {', '.join(shape.pools())} for this network"
        )
    net: Any
    with torch.device("meta"):
        if isinstance(shape, SwinShape):
            net = Swin(shape)
        elif isinstance(shape, ResNetShape):
            net = ResNet(shape)
        else:
            net = VitEncoder(shape, pool)
    built: nn.Module = net.eval()
    return built
