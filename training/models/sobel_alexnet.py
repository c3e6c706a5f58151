"""Paper 002: DeepCluster's AlexNet, with batch norms, after a fixed Sobel filter."""

from __future__ import annotations

import math

import torch
from torch import nn

from ...errors import BadInput
from .embedding import Encoder
from .layers import conv

FEATURES = 4096
LEAST_PX = 63
"""Smallest side of a tile; the last pooling has no input below it."""
_HORIZONTAL = ((1.0, 0.0, -1.0), (2.0, 0.0, -2.0), (1.0, 0.0, -1.0))
_VERTICAL = ((1.0, 2.0, 1.0), (0.0, 0.0, 0.0), (-1.0, -2.0, -1.0))


class Sobel(nn.Conv2d):
    """Two signed gradients of a grey tile, (N, 1, S, S) -> (N, 2, S, S), with fixed weights."""

    def __init__(self) -> None:
        """Set the two filters and freeze them."""
        super().__init__(1, 2, 3, 1, 1)
        with torch.no_grad():
            self.weight.copy_(torch.tensor((_HORIZONTAL, _VERTICAL))[:, None])
            nn.init.zeros_(self.bias)  # type: ignore[arg-type]
        self.requires_grad_(False)


def build_sobel_alexnet(size_px: int = 64, classes: int = 200, dropout: float = 0.5) -> Encoder:
    """Return Sobel-AlexNet-BN; its 4096 features are taken before the last ReLU, as in DeepCluster.

    The classifier's input size follows from the convolutions (256 at 64 px, 9216 at 224 px). The authors'
    code has a fixed 9216, which does not fit at the paper's 64 px.

    Args:
        size_px: side of the input.
        classes: width of the top layer (the paper's K); training draws a new top layer every epoch.
        dropout: dropout in the classifier.
    """
    if size_px < LEAST_PX:
        raise BadInput(f"size_px is {size_px}; this network needs at least {LEAST_PX} px")
    convolutions = nn.Sequential(
        Sobel(),
        *conv(2, 96, 11, 4, 2),
        nn.MaxPool2d(3, 2),
        *conv(96, 256, 5, 1, 2),
        nn.MaxPool2d(3, 2),
        *conv(256, 384, 3, 1, 1),
        *conv(384, 384, 3, 1, 1),
        *conv(384, 256, 3, 1, 1),
        nn.MaxPool2d(3, 2),
        nn.Flatten(),
    )
    with torch.no_grad():
        convolutions.eval()
        example = next(convolutions.parameters()).new_zeros(1, 1, size_px, size_px)
        flat = convolutions(example).shape[1]
        convolutions.train()
    head = nn.Sequential(
        nn.Dropout(dropout),
        nn.Linear(flat, FEATURES),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(FEATURES, FEATURES),
    )
    half = (0.5, 0.5, 0.5)
    net = Encoder(
        convolutions, head, size_px, FEATURES, mean=half, std=half, grey=True, classes=classes,
        relu_before_top=True,
    )  # fmt: skip
    for module in net.modules():
        if isinstance(module, nn.Conv2d) and not isinstance(module, Sobel):
            spread = math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels))
            nn.init.normal_(module.weight, 0, spread)
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.01)
            nn.init.zeros_(module.bias)
    return net
