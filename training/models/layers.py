"""Building blocks that several architectures share."""

from __future__ import annotations

from torch import nn

from ...errors import BadInput


def conv(inside: int, out: int, kernel: int, stride: int, padding: int) -> list[nn.Module]:
    """Return a convolution, batch norm and ReLU."""
    return [nn.Conv2d(inside, out, kernel, stride, padding), nn.BatchNorm2d(out), nn.ReLU()]


def deconv(
    inside: int, out: int, kernel: int, stride: int, padding: int, output_padding: int = 0
) -> list[nn.Module]:
    """Return a transposed convolution, batch norm and ReLU."""
    up = nn.ConvTranspose2d(inside, out, kernel, stride, padding, output_padding)
    return [up, nn.BatchNorm2d(out), nn.ReLU()]


def require_size(size_px: int, expected: int) -> None:
    """Check the side of a tile.

    Raises:
        BadInput: it is not the only one for which the network's sizes work out.
    """
    if size_px != expected:
        raise BadInput(f"size_px is {size_px}; this network takes tiles of {expected} px only")
