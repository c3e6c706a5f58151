"""Paper 000: the base CNN autoencoder, and the one without max-pooling ("CustomCNN").

The paper does not show the base decoder; it follows the authors' code. Both nets share it.
"""

from __future__ import annotations

from torch import nn

from ...errors import BadInput
from .embedding import AutoEncoder

SIZE_PX = 50
CODE = 256


def _conv(inside: int, out: int, kernel: int, stride: int, padding: int) -> list[nn.Module]:
    return [nn.Conv2d(inside, out, kernel, stride, padding), nn.BatchNorm2d(out), nn.ReLU()]


def _deconv(inside: int, out: int, kernel: int, stride: int, padding: int) -> list[nn.Module]:
    deconv = nn.ConvTranspose2d(inside, out, kernel, stride, padding)
    return [deconv, nn.BatchNorm2d(out), nn.ReLU()]


def _decoder() -> nn.Sequential:
    """Build the decoder, 256 x 1 x 1 -> 3 x 50 x 50, with sides of 2, 3, 6, 12 and 25 in between."""
    return nn.Sequential(
        nn.ReLU(),
        *_deconv(CODE, 256, 4, 1, 1),
        *_deconv(256, 512, 3, 2, 1),
        *_deconv(512, 256, 4, 2, 1),
        *_deconv(256, 256, 4, 2, 1),
        *_deconv(256, 128, 5, 2, 1),
        nn.ConvTranspose2d(128, 3, 4, 2, 1),
        nn.Sigmoid(),
    )


def _check(size_px: int) -> None:
    if size_px != SIZE_PX:
        raise BadInput(f"size_px is {size_px}; this net closes at {SIZE_PX} px only")


def build_cnn_ae(size_px: int = SIZE_PX) -> AutoEncoder:
    """Return paper 000's base CNN AE: five convolutions with max-pooling, and a code of 256."""
    _check(size_px)
    encoder = nn.Sequential(
        *_conv(3, 128, 3, 1, 0),
        nn.MaxPool2d(2),
        *_conv(128, 256, 5, 1, 1),
        nn.MaxPool2d(2),
        *_conv(256, 512, 4, 1, 1),
        nn.MaxPool2d(2),
        *_conv(512, 256, 3, 2, 2),
        nn.MaxPool2d(2),
        *_conv(256, CODE, 2, 1, 0)[:2],  # the code has no ReLU
    )
    return AutoEncoder(encoder, _decoder(), size_px, CODE)


def build_cnn_ae_no_pool(size_px: int = SIZE_PX) -> AutoEncoder:
    """Return paper 000's best CNN AE: strides instead of max-pooling, and a code of 256."""
    _check(size_px)
    encoder = nn.Sequential(
        *_conv(3, 128, 4, 1, 1),
        *_conv(128, 256, 5, 2, 1),
        *_conv(256, 512, 4, 2, 0),
        *_conv(512, 256, 5, 2, 0),
        *_conv(256, CODE, 4, 2, 0)[:2],
    )
    return AutoEncoder(encoder, _decoder(), size_px, CODE)
