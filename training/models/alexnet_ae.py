"""Paper 000: the AlexNet autoencoder; its encoder has torchvision's AlexNet state-dict keys."""

from __future__ import annotations

import torch
from torch import nn

from .embedding import AutoEncoder
from .layers import deconv, require_size

SIZE_PX = 250


class AlexNet(nn.Module):
    """AlexNet as in torchvision (61,100,840 parameters at 1000 classes).

    Attributes:
        fresh: keys that are not loaded from a checkpoint, because their size depends on ``dim``.
    """

    fresh = ("classifier.6.",)

    def __init__(self, classes: int = 1000, dropout: float = 0.5) -> None:
        """Create ``features`` and ``classifier``."""
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 11, 4, 2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(64, 192, 5, 1, 2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(192, 384, 3, 1, 1),
            nn.ReLU(),
            nn.Conv2d(384, 256, 3, 1, 1),
            nn.ReLU(),
            nn.Conv2d(256, 256, 3, 1, 1),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(6)
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(256 * 6 * 6, 4096),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(4096, 4096),
            nn.ReLU(),
            nn.Linear(4096, classes),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 3, S, S) -> (N, classes)."""
        logits: torch.Tensor = self.classifier(self.avgpool(self.features(x)).flatten(1))
        return logits


def build_alexnet_ae(size_px: int = SIZE_PX, dim: int = 512, dropout: float = 0.5) -> AutoEncoder:
    """Return paper 000's AlexNet AE with a code of 512 (the authors' settings file has 256).

    The decoder always outputs 250 x 250 pixels. Tiles are in 0..1 without normalisation, even with ImageNet
    weights, as in the authors' code.
    """
    require_size(size_px, SIZE_PX)
    decoder = nn.Sequential(
        nn.ReLU(),  # not in place: that would change the code, which is the embedding
        nn.Dropout(dropout),
        nn.Linear(dim, 4096),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(4096, 4096),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(4096, 256 * 6 * 6),
        nn.Unflatten(1, (256, 6, 6)),
        nn.BatchNorm2d(256),
        nn.ReLU(),
        *deconv(256, 256, 5, 1, 1),
        *deconv(256, 384, 4, 2, 1),
        *deconv(384, 192, 4, 2, 2),
        *deconv(192, 192, 6, 2, 1),
        *deconv(192, 64, 6, 2, 1),
        nn.ConvTranspose2d(64, 3, 4, 2, 2),
        nn.Sigmoid(),
    )
    return AutoEncoder(AlexNet(dim, dropout), decoder, size_px, dim, tail=("classifier",))
