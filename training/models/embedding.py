"""What every model here is to the rest of the package: a net that turns tiles into embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ...errors import BadInput
from .gate import TissueGate

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
UNIT_MEAN = (0.0, 0.0, 0.0)
UNIT_STD = (1.0, 1.0, 1.0)
LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in grey (ITU-R BT.601); they sum to 1."""


class Encoder(nn.Module):
    """A backbone with a head; input float (N, 3, S, S) normalised, output (N, D).

    Attributes:
        size_px: S, the side of the input.
        dim: D, the length of the embedding.
        mean: per-channel mean that the input was normalised with, for values in 0..1.
        std: likewise the standard deviation.
        tail: names of the backbone's last parts, those that fine-tuning trains.
        grey: whether the net sees grey values; colours are then mixed inside.
        relu_before_top: whether ``top`` sees the features through a ReLU.
        top: linear classifier (F, classes) that training may use, or None; not part of ``forward``.
        chain: affine map (F, D) after the head that was fitted to the features (PCA, whitening), or
            None; F is D where there is none.
        gate: scores shrunken pixels, 0 tissue to 1 out of distribution, (N,), or None; part of
            the exported graph, not of ``forward``.
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
        grey: bool = False,
        classes: int = 0,
        relu_before_top: bool = False,
    ) -> None:
        """Join a backbone (N, C, S, S) -> map and a head, map -> (N, D); C is 1 if ``grey``, else 3."""
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.top = nn.Linear(dim, classes) if classes else None
        self.relu_before_top = relu_before_top
        self.chain: nn.Linear | None = None
        self.gate: TissueGate | None = None
        self.size_px = size_px
        self.dim = dim
        self.tail = tuple(tail)
        self.mean = mean
        self.std = std
        self.grey = grey

    def colours(self, tiles: torch.Tensor) -> torch.Tensor:
        """Return what the backbone sees of (N, 3, S, S): the same, or its luma (N, 1, S, S)."""
        if not self.grey:
            return tiles
        red, green, blue = LUMA
        return red * tiles[:, 0:1] + green * tiles[:, 1:2] + blue * tiles[:, 2:3]

    def features(self, tiles: torch.Tensor) -> torch.Tensor:
        """Return what the head gives, (N, F), before the chain."""
        features: torch.Tensor = self.head(self.backbone(self.colours(tiles)))
        return features

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        """Return embeddings (N, D), not normalised."""
        features = self.features(tiles)
        embedding: torch.Tensor = features if self.chain is None else self.chain(features)
        return embedding

    def classify(self, tiles: torch.Tensor) -> torch.Tensor:
        """Return logits (N, classes) of the linear classifier on the features."""
        if self.top is None:
            raise BadInput("this encoder was built without a classifier; pass classes")
        features = self.features(tiles)
        logits: torch.Tensor = self.top(
            nn.functional.relu(features) if self.relu_before_top else features
        )
        return logits

    def attach_chain(self, dim: int) -> nn.Linear:
        """Add an affine map (F, ``dim``) after the head, for the fit of PCA and whitening."""
        self.chain = nn.Linear(self.dim, dim)
        self.dim = dim
        return self.chain


class AutoEncoder(Encoder):
    """An encoder with a decoder: the code is the embedding, the decoder draws the tile from it.

    The backbone ends in the code, as a vector or a map; the head only flattens (or pools) it.
    """

    def __init__(
        self,
        backbone: nn.Module,
        decoder: nn.Module,
        size_px: int,
        dim: int,
        grey: bool = False,
        head: nn.Module | None = None,
        tail: Sequence[str] = (),
    ) -> None:
        """Join a backbone (N, C, S, S) -> code and a decoder, code -> (N, C, S, S), both on 0..1."""
        flatten = head if head is not None else nn.Flatten()
        super().__init__(backbone, flatten, size_px, dim, tail, UNIT_MEAN, UNIT_STD, grey)
        self.decoder = decoder

    def reconstruct(self, tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return embeddings (N, D), reconstructions (N, C, S, S) and what they should be."""
        seen = self.colours(tiles)
        code = self.backbone(seen)
        return self.head(code), self.decoder(code), seen


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


def feature_encoder(
    backbone: nn.Module,
    features: int,
    size_px: int,
    dim: int,
    hidden: int,
    dropout: float,
    relu_embedding: bool,
    classes: int,
    tail: Sequence[str] = (),
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    grey: bool = False,
) -> Encoder:
    """Return an encoder on a backbone of F features: those themselves if ``dim`` is 0, else projected."""
    head = projection_head(features, hidden, dim, dropout, relu_embedding) if dim else nn.Identity()
    return Encoder(
        backbone, head, size_px, dim or features, tail, mean, std, grey=grey, classes=classes
    )
