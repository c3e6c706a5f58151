"""Paper 000: the ResNet autoencoder, at 256 px (at the paper's 250 px the last pooling has no input)."""

from __future__ import annotations

import torch
from torch import nn

from .embedding import AutoEncoder
from .layers import require_size

SIZE_PX = 256


class ResBlock(nn.Module):
    """Three convolutions, the last of stride 2, plus a shortcut of stride 2; halves (or doubles) the sides.

    Args:
        inside: a, input channels.
        out: b, output channels; the layers between have (a + b) / 2.
        kernel: kernel of the first two convolutions.
        up: use transposed convolutions, which double the sides (the decoder's block).
    """

    def __init__(self, inside: int, out: int, kernel: int, up: bool = False) -> None:
        """Create both paths; every convolution has a bias, and no layer follows the sum."""
        super().__init__()
        conv: type[nn.Conv2d] | type[nn.ConvTranspose2d] = nn.ConvTranspose2d if up else nn.Conv2d
        middle = round((inside + out) / 2)
        self.residual = nn.Sequential(
            conv(inside, middle, kernel, 1, kernel // 2),
            nn.BatchNorm2d(middle),
            nn.ReLU(),
            conv(middle, out, kernel, 1, kernel // 2),
            nn.BatchNorm2d(out),
            nn.ReLU(),
            conv(out, out, 4, 2, 1),
        )
        self.identity = conv(inside, out, 4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, a, H, W) -> (N, b, H/2, W/2), or twice the size."""
        y: torch.Tensor = self.residual(x) + self.identity(x)
        return y


def build_resnet_ae(
    size_px: int = SIZE_PX, dim: int = 256, dropout: float = 0.5, decoder_norm: bool = False
) -> AutoEncoder:
    """Return paper 000's ResNet AE with a code of 256.

    Args:
        size_px: 256; the paper says 250, which is not possible with its layers.
        dim: length of the code.
        dropout: dropout before the code and in the decoder.
        decoder_norm: use batch norm and ReLU in the decoder instead of ReLU and dropout, as in the authors'
            later code.
    """
    require_size(size_px, SIZE_PX)
    encoder = _encoder(dim, dropout)
    return AutoEncoder(encoder, _decoder(dim, dropout, decoder_norm), size_px, dim)


def _norm(channels: int) -> list[nn.Module]:
    return [nn.BatchNorm2d(channels), nn.ReLU()]


def _encoder(dim: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 64, 6, 2, 2, bias=False),
        *_norm(64),
        nn.MaxPool2d(4, 2, 1),
        ResBlock(64, 256, 5),
        *_norm(256),
        nn.MaxPool2d(4, 2, 1),
        ResBlock(256, 512, 7),
        *_norm(512),
        nn.MaxPool2d(4, 2, 1),
        nn.Conv2d(512, 512, 4, 2, 1),
        *_norm(512),
        nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(512, 256),
        nn.BatchNorm1d(256),
        nn.ReLU(),
        nn.Linear(256, dim),
    )


def _decoder(dim: int, dropout: float, norm: bool) -> nn.Sequential:
    def after(channels: int) -> list[nn.Module]:
        return _norm(channels) if norm else [nn.ReLU(), nn.Dropout(dropout)]

    return nn.Sequential(
        nn.BatchNorm1d(dim),
        nn.ReLU(),
        nn.Linear(dim, 256),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(256, 4096),
        nn.BatchNorm1d(4096),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Unflatten(1, (256, 4, 4)),
        nn.ConvTranspose2d(256, 512, 4, 2, 1),
        *after(512),
        nn.ConvTranspose2d(512, 512, 4, 2, 1),
        *after(512),
        ResBlock(512, 256, 7, up=True),
        *after(256),
        nn.ConvTranspose2d(256, 256, 4, 2, 1),
        *after(256),
        ResBlock(256, 64, 5, up=True),
        *after(64),
        nn.ConvTranspose2d(64, 3, 6, 2, 2),
        nn.Sigmoid(),
    )
