"""Paper 000: the fully connected autoencoder ("BaseDBN" in the authors' code)."""

from __future__ import annotations

from itertools import pairwise

from torch import nn

from .embedding import AutoEncoder

WIDTHS = (2000, 1000, 500, 64)


def _dense(inside: int, out: int) -> list[nn.Module]:
    return [nn.Linear(inside, out), nn.BatchNorm1d(out), nn.ReLU()]


def build_fc_ae(size_px: int = 50) -> AutoEncoder:
    """Return paper 000's FC AE: 7500-2000-1000-500-64 and back, BN and ReLU also on the code."""
    pixels = 3 * size_px * size_px
    encoder: list[nn.Module] = [nn.Flatten()]
    for inside, out in pairwise((pixels, *WIDTHS)):
        encoder += _dense(inside, out)
    decoder: list[nn.Module] = []
    for inside, out in pairwise(WIDTHS[::-1]):
        decoder += _dense(inside, out)
    tiles = nn.Unflatten(1, (3, size_px, size_px))
    decoder += [nn.Linear(WIDTHS[0], pixels), nn.Sigmoid(), tiles]
    return AutoEncoder(nn.Sequential(*encoder), nn.Sequential(*decoder), size_px, WIDTHS[-1])
