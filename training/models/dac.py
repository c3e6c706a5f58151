"""Paper 001: three convolutional autoencoders, each with a clustering head (Table 3).

The printed sizes do not match in two places. At 28 px the decoder here has output paddings of 1, 0, 1, 1.
At 96 px a global average pool precedes the clustering head; all printed layers stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from ...errors import BadInput
from .embedding import AutoEncoder
from .layers import conv, deconv, require_size

OUTPUTS = ("code", "clusters")


class ClusteringAutoEncoder(AutoEncoder):
    """An autoencoder with a head that assigns its code to K clusters.

    Attributes:
        cluster_head: code (N, 256) -> probabilities (N, K).
        clusters: K.
        output: output of ``forward`` and of the exported graph: ``code``, or ``clusters`` (probabilities).
    """

    def __init__(
        self,
        backbone: nn.Module,
        decoder: nn.Module,
        size_px: int,
        clusters: int,
        output: str,
        grey: bool = False,
        pooled: bool = False,
    ) -> None:
        """Join the parts; with ``pooled``, the head receives the average over the code's map."""
        if output not in OUTPUTS:
            raise BadInput(f"output is {output!r}; expected one of {', '.join(OUTPUTS)}")
        pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()) if pooled else nn.Flatten()
        super().__init__(backbone, decoder, size_px, 256, grey, pool)
        hidden = (nn.Linear(256, 64), nn.BatchNorm1d(64), nn.ReLU())
        last = (nn.Linear(64, clusters), nn.BatchNorm1d(clusters), nn.ReLU(), nn.Softmax(1))
        self.cluster_head = nn.Sequential(*hidden, *last)
        self.clusters = clusters
        self.output = output
        if output == "clusters":
            self.dim = clusters

    def features(self, tiles: torch.Tensor) -> torch.Tensor:
        """Return codes (N, 256) or cluster probabilities (N, K), depending on ``output``."""
        code = self.code(tiles)
        return code if self.output == "code" else self.cluster_head(code)

    def code(self, tiles: torch.Tensor) -> torch.Tensor:
        """Return codes (N, 256)."""
        return super().features(tiles)


def _encoder(channels: int, widths: Sequence[int], first: tuple[int, int, int]) -> list[nn.Module]:
    """Build Conv-BN-ReLU per width; kernel, stride, padding are ``first``, then 3, 2, 1."""
    layers = conv(channels, widths[0], *first)
    for inside, out in pairwise(widths):
        layers += conv(inside, out, 3, 2, 1)
    return layers


def _decoder(channels: int, widths: Sequence[int], padding: Sequence[int]) -> nn.Sequential:
    """Build Deconv (3, 2, 1)-BN-ReLU per width, the last one linear; ``padding`` is the output padding."""
    layers: list[nn.Module] = []
    for (inside, out), extra in zip(pairwise((channels, *widths)), padding, strict=True):
        layers += deconv(inside, out, 3, 2, 1, extra)
    return nn.Sequential(*layers[:-2])


def build_dac_fmnist(
    size_px: int = 28, clusters: int = 10, output: str = "code"
) -> ClusteringAutoEncoder:
    """Return paper 001's net for grey tiles of 28 px: 49,057 parameters and a head of 17,246 (K = 10)."""
    require_size(size_px, 28)
    encoder = nn.Sequential(*_encoder(1, (8, 16, 32, 64), (3, 2, 1)))
    decoder = _decoder(64, (32, 16, 8, 1), (1, 0, 1, 1))
    return ClusteringAutoEncoder(encoder, decoder, size_px, clusters, output, grey=True)


def build_dac_cifar(
    size_px: int = 32, clusters: int = 10, output: str = "code"
) -> ClusteringAutoEncoder:
    """Return paper 001's net for colour tiles of 32 px: 49,347 parameters and a head of 17,246 (K = 10)."""
    require_size(size_px, 32)
    encoder = nn.Sequential(*_encoder(3, (8, 16, 32, 64), (3, 2, 1)))
    decoder = _decoder(64, (32, 16, 8, 3), (1, 1, 1, 1))
    return ClusteringAutoEncoder(encoder, decoder, size_px, clusters, output)


def build_dac_stl(
    size_px: int = 96, clusters: int = 10, output: str = "code"
) -> ClusteringAutoEncoder:
    """Return paper 001's net for colour tiles of 96 px: 787,203 parameters, a head of 17,246 (K = 10)."""
    require_size(size_px, 96)
    last = conv(128, 256, 3, 1, 1)  # built first: the order decides the random weights
    encoder = nn.Sequential(*_encoder(3, (16, 32, 64, 128), (5, 4, 2)), *last)
    decoder = _decoder(256, (128, 64, 32, 16, 3), (1, 1, 1, 1, 1))
    return ClusteringAutoEncoder(encoder, decoder, size_px, clusters, output, pooled=True)
