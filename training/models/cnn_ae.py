"""Paper 000: the base CNN autoencoder, and the one without max-pooling ("CustomCNN").

The paper does not show the base decoder; it follows the authors' code. Both nets share it.
"""

from __future__ import annotations

from torch import nn

from .embedding import AutoEncoder
from .layers import conv, deconv, require_size

SIZE_PX = 50
CODE = 256


def _decoder() -> nn.Sequential:
    """Build the decoder, 256 x 1 x 1 -> 3 x 50 x 50, with sides of 2, 3, 6, 12 and 25 in between."""
    return nn.Sequential(
        nn.ReLU(),
        *deconv(CODE, 256, 4, 1, 1),
        *deconv(256, 512, 3, 2, 1),
        *deconv(512, 256, 4, 2, 1),
        *deconv(256, 256, 4, 2, 1),
        *deconv(256, 128, 5, 2, 1),
        nn.ConvTranspose2d(128, 3, 4, 2, 1),
        nn.Sigmoid(),
    )


def build_cnn_ae(size_px: int = SIZE_PX) -> AutoEncoder:
    """Return paper 000's base CNN AE: five convolutions with max-pooling, and a code of 256."""
    require_size(size_px, SIZE_PX)
    encoder = nn.Sequential(
        *conv(3, 128, 3, 1, 0),
        nn.MaxPool2d(2),
        *conv(128, 256, 5, 1, 1),
        nn.MaxPool2d(2),
        *conv(256, 512, 4, 1, 1),
        nn.MaxPool2d(2),
        *conv(512, 256, 3, 2, 2),
        nn.MaxPool2d(2),
        *conv(256, CODE, 2, 1, 0)[:2],  # the code has no ReLU
    )
    return AutoEncoder(encoder, _decoder(), size_px, CODE)


def build_cnn_ae_no_pool(size_px: int = SIZE_PX) -> AutoEncoder:
    """Return paper 000's best CNN AE: strides instead of max-pooling, and a code of 256."""
    require_size(size_px, SIZE_PX)
    encoder = nn.Sequential(
        *conv(3, 128, 4, 1, 1),
        *conv(128, 256, 5, 2, 1),
        *conv(256, 512, 4, 2, 0),
        *conv(512, 256, 5, 2, 0),
        *conv(256, CODE, 4, 2, 0)[:2],
    )
    return AutoEncoder(encoder, _decoder(), size_px, CODE)
