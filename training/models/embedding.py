"""What every model here is to the rest of the package: a net that turns tiles into embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Encoder(nn.Module):
    """A backbone with a head; input float (N, 3, S, S) normalised, output (N, D).

    Attributes:
        size_px: S, the side of the input.
        dim: D, the length of the embedding.
        mean: per-channel mean that the input was normalised with, for values in 0..1.
        std: likewise the standard deviation.
        tail: names of the backbone's last parts, those that fine-tuning trains.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        size_px: int,
        dim: int,
        tail: Sequence[str] = (),
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
    ) -> None:
        """Join a backbone (N, 3, S, S) -> (N, F) and a head (N, F) -> (N, D)."""
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.size_px = size_px
        self.dim = dim
        self.tail = tuple(tail)
        self.mean = mean
        self.std = std

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        """Return embeddings (N, D), not normalised."""
        embedding: torch.Tensor = self.head(self.backbone(tiles))
        return embedding


def projection_head(
    features: int, hidden: int, dim: int, dropout: float, relu_embedding: bool
) -> nn.Sequential:
    """Return the head of paper 004: Linear-BN-ReLU-Dropout-Linear-BN, sizes F-hidden-dim.

    ``relu_embedding`` adds a ReLU on the embedding (the paper speaks of its zero elements).
    """
    layers: list[nn.Module] = [
        nn.Linear(features, hidden),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(hidden, dim),
        nn.BatchNorm1d(dim),
    ]
    if relu_embedding:
        layers.append(nn.ReLU())
    return nn.Sequential(*layers)
