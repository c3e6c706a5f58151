"""A convolutional variational autoencoder (Kingma & Welling 2014); papers 000 and 003 suggest one."""

from __future__ import annotations

import torch
from torch import nn

from ...errors import BadInput
from .embedding import AutoEncoder
from .layers import conv, deconv

WIDTHS = (32, 64, 128, 256)


class VariationalAutoEncoder(AutoEncoder):
    """An autoencoder with a Gaussian code; the embedding is its mean.

    Attributes:
        log_variance: layer from features to log variances (N, D); the head computes the means.
    """

    def __init__(self, size_px: int, dim: int) -> None:
        """Build an encoder of four convolutions of stride 2, and a decoder that reverses them."""
        channels, side = 3, size_px // 16
        layers: list[nn.Module] = []
        for width in WIDTHS:
            layers += conv(channels, width, 4, 2, 1)
            channels = width
        flat = channels * side * side
        back: list[nn.Module] = [nn.Linear(dim, flat), nn.Unflatten(1, (channels, side, side))]
        for width in (*WIDTHS[-2::-1], 3):
            back += deconv(channels, width, 4, 2, 1)
            channels = width
        decoder = nn.Sequential(*back[:-2], nn.Sigmoid())
        encoder = nn.Sequential(*layers, nn.Flatten())
        super().__init__(encoder, decoder, size_px, dim, head=nn.Linear(flat, dim))
        self.log_variance = nn.Linear(flat, dim)

    def reconstruct(self, tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return means (N, D), reconstructions from the means, and the targets of the reconstructions."""
        target = self.colours(tiles)
        mean = self.head(self.backbone(target))
        return mean, self.decoder(mean), target

    def sample(self, tiles: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return means and log variances (N, D), reconstructions from a sampled code, and their targets."""
        target = self.colours(tiles)
        features = self.backbone(target)
        mean, log_variance = self.head(features), self.log_variance(features)
        draw = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
        return mean, log_variance, self.decoder(draw), target


def build_vae(size_px: int = 64, dim: int = 64) -> VariationalAutoEncoder:
    """Return a convolutional VAE; ``dim`` is the length of the code, and ``size_px`` a multiple of 16."""
    if size_px % 16 or size_px < 16:
        raise BadInput(f"size_px is {size_px}; expected a multiple of 16")
    return VariationalAutoEncoder(size_px, dim)
