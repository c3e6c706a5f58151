"""Base classes of all models: an encoder that turns tiles into embeddings, and an autoencoder."""

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
    """A backbone with a head; input: normalised float tiles (N, 3, S, S), output: embeddings (N, D).

    Attributes:
        size_px: S, side of the input.
        dim: D, length of the embedding.
        mean: mean per channel for normalising the input, for values in 0..1.
        std: standard deviation per channel, likewise.
        tail: names of the backbone's last layers, which fine-tuning trains.
        grey: whether the backbone takes grey values; ``colours`` converts the input.
        relu_before_top: whether a ReLU precedes ``top``.
        top: linear classifier (F, classes) for training, or None; not part of ``forward``.
        chain: affine map (F, D) after the head, fitted to the features (PCA, whitening), or None; without
            it F = D.
        parts: number of features of each layer that the backbone pools, whose sum is the length of its
            output; empty if it returns one layer.
        gate: tissue gate, which scores shrunken pixels from 0 (tissue) to 1 (out of distribution), or None;
            part of the exported graph, not of ``forward``.
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
        parts: Sequence[int] = (),
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
        self.parts = tuple(parts)
        self.mean = mean
        self.std = std
        self.grey = grey

    def colours(self, tiles: torch.Tensor) -> torch.Tensor:
        """Return the backbone's input for tiles (N, 3, S, S): the same, or their luma (N, 1, S, S)."""
        if not self.grey:
            return tiles
        red, green, blue = LUMA
        return red * tiles[:, 0:1] + green * tiles[:, 1:2] + blue * tiles[:, 2:3]

    def features(self, tiles: torch.Tensor) -> torch.Tensor:
        """Return the head's output (N, F), before the chain."""
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
            raise BadInput("this encoder has no classifier; build it with the option classes")
        features = self.features(tiles)
        if self.relu_before_top:
            features = nn.functional.relu(features)
        logits: torch.Tensor = self.top(features)
        return logits

    def attach_chain(self, dim: int) -> nn.Linear:
        """Add an affine map (F, ``dim``) after the head, to hold a fitted PCA and whitening."""
        self.chain = nn.Linear(self.dim, dim)
        self.dim = dim
        return self.chain


class AutoEncoder(Encoder):
    """An encoder with a decoder: the code is the embedding, and the decoder reconstructs the tile from it.

    The backbone's output is the code, a vector or a map; the head only flattens (or pools) it.
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
        """Return embeddings (N, D), reconstructions (N, C, S, S) and their targets (N, C, S, S)."""
        target = self.colours(tiles)
        code = self.backbone(target)
        return self.head(code), self.decoder(code), target


def projection_head(
    features: int, hidden: int, dim: int, dropout: float, relu_embedding: bool
) -> nn.Sequential:
    """Return the head of paper 004: Linear-BN-ReLU-Dropout-Linear-BN, sizes F-hidden-dim.

    ``relu_embedding`` adds a ReLU to the embedding (the paper mentions zero elements in it).
    """
    first = (nn.Linear(features, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Dropout(dropout))
    last = (nn.Linear(hidden, dim), nn.BatchNorm1d(dim))
    return nn.Sequential(*first, *last, *([nn.ReLU()] if relu_embedding else []))


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
    parts: Sequence[int] = (),
) -> Encoder:
    """Return an encoder that embeds by a backbone's features: unchanged if ``dim`` is 0, else projected.

    Features of several layers (``parts``) differ in scale: a batch norm without weights precedes the head.
    """
    head: nn.Module = nn.Identity()
    if dim:
        head = projection_head(features, hidden, dim, dropout, relu_embedding)
        if len(parts) > 1:
            head.insert(0, nn.BatchNorm1d(features, affine=False))
    return Encoder(
        backbone, head, size_px, dim or features, tail, mean, std,
        grey=grey, classes=classes, parts=parts if len(parts) > 1 else (),
    )  # fmt: skip
