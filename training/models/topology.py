"""Paper 003: autoencoders of two topologies, fully connected (AE) and convolutional (CAE), by code size.

The paper gives the AE as "D-128-64-32-16" and lacks the figure of the CAE. Our reading: for a code of 16,
32, 64 or 128 the chain D-128-64-32-16 ends at that size. The CAE has three convolutions with max-pooling;
the width of the last one is chosen so that the flattened 4 x 4 map is the code. For grey images D is the
number of pixels (the paper says 3072 for grey 32 x 32, which has 1024). The initial weights are drawn as
by Keras, which the paper used.
"""

from __future__ import annotations

import math
from itertools import pairwise

from torch import nn

from ...errors import BadInput
from .embedding import AutoEncoder
from .layers import conv

CODES = (16, 32, 64, 128)
FAMILIES = ("map", "linear")


def _check_code(dim: int) -> None:
    if dim not in CODES:
        raise BadInput(
            f"dim is {dim}; expected one of {', '.join(map(str, CODES))}, as in paper 003"
        )


def _start_as_keras(net: AutoEncoder) -> AutoEncoder:
    """Draw weights from Glorot's uniform distribution and set biases to 0, as Keras does."""
    for layer in net.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return net


def build_topology_ae(size_px: int = 28, dim: int = 32, relu_code: bool = False) -> AutoEncoder:
    """Return paper 003's fully connected AE on grey pixels, with ReLU, a linear code and a sigmoid output.

    Args:
        size_px: 28 (MNIST, D = 784) or 32 (CIFAR-10, SVHN; D = 1024).
        dim: length of the code: 16, 32, 64 or 128.
        relu_code: add a ReLU after the code.
    """
    _check_code(dim)
    sizes = [size_px * size_px, *(code for code in CODES[::-1] if code >= dim)]
    encoder: list[nn.Module] = [nn.Flatten()]
    for inside, out in pairwise(sizes):
        encoder += [nn.Linear(inside, out), nn.ReLU()]
    if not relu_code:
        encoder.pop()
    decoder: list[nn.Module] = []
    for inside, out in pairwise(sizes[::-1]):
        decoder += [nn.Linear(inside, out), nn.ReLU()]
    decoder[-1] = nn.Sigmoid()
    decoder.append(nn.Unflatten(1, (1, size_px, size_px)))
    net = AutoEncoder(nn.Sequential(*encoder), nn.Sequential(*decoder), size_px, dim, grey=True)
    return _start_as_keras(net)


def build_topology_cae(
    size_px: int = 32,
    dim: int = 32,
    widths: str = "32-16",
    family: str = "map",
    relu_code: bool = False,
    norm: bool = True,
) -> AutoEncoder:
    """Return paper 003's convolutional AE on three channels.

    Args:
        size_px: side of the input; 28 and 32 end in a 4 x 4 map.
        dim: length of the code: 16, 32, 64 or 128.
        widths: channels of the first two convolutions: 32-16 or 16-8.
        family: ``map``: the code is the last convolution's flattened map; ``linear``: a linear layer
            computes the code from a map of 8 channels.
        relu_code: add a ReLU after the code.
        norm: have a batch norm after each convolution but the last (the paper: "image normalization").
    """
    _check_code(dim)
    if family not in FAMILIES:
        raise BadInput(f"family is {family!r}; expected one of {', '.join(FAMILIES)}")
    try:
        first, second = (int(part) for part in widths.split("-"))
    except ValueError as error:
        raise BadInput(f"widths is {widths!r}; expected two numbers such as 32-16") from error
    sides = [size_px]
    for _ in range(3):
        sides.append(math.ceil(sides[-1] / 2))
    cells = sides[-1] ** 2
    last = 8 if family == "linear" else dim // cells
    if family == "map" and last * cells != dim:
        raise BadInput(
            f"size_px is {size_px}: the map has {cells} cells, but dim {dim} is not a multiple of that"
        )

    def pool() -> nn.Module:
        return nn.MaxPool2d(2, ceil_mode=True)

    def block(inside: int, out: int) -> list[nn.Module]:
        layers = conv(inside, out, 3, 1, 1)
        return layers if norm else [layers[0], layers[2]]

    encoder = [*block(3, first), pool(), *block(first, second), pool()]
    encoder += [*block(second, last)[:-1], pool(), nn.Flatten()]
    decoder: list[nn.Module] = []
    if family == "linear":
        encoder.append(nn.Linear(last * cells, dim))
        decoder.append(nn.Linear(dim, last * cells))
    if relu_code:
        encoder.append(nn.ReLU())
    decoder.append(nn.Unflatten(1, (last, sides[3], sides[3])))
    for inside, out, side in ((last, second, 2), (second, second, 1), (second, first, 0)):
        decoder += [*block(inside, out), nn.Upsample(sides[side])]
    decoder += [nn.Conv2d(first, 3, 3, 1, 1), nn.Sigmoid()]
    return _start_as_keras(
        AutoEncoder(nn.Sequential(*encoder), nn.Sequential(*decoder), size_px, dim)
    )
