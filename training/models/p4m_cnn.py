"""Paper 002: the CNN that is equivariant under p4m, the quarter turns and reflections of the square.

Cohen & Welling (ICML 2016) in plain torch. An element of the group D4 reflects (m = 1) or not (m = 0), and
then rotates by r quarter turns; its index is 4 m + r. A map of O fields is stored as 8 O channels, ordered
by field first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ...errors import BadInput
from .embedding import Encoder, feature_encoder

ORDER = 8
WIDTHS = {"published": (64, 128, 256), "32": (32, 64, 128), "16": (16, 32, 64), "8": (8, 16, 32)}
POOLS = ("max", "average")


def act(element: int, picture: NDArray[np.int64]) -> NDArray[np.int64]:
    """Apply an element of D4 to the last two axes of an array."""
    mirrored = np.flip(picture, -1) if element >= 4 else picture
    return np.rot90(mirrored, element % 4, (-2, -1))


def product_table() -> NDArray[np.int64]:
    """Return table[g, h] = index of g h (first h, then g), computed by moving a 3 x 3 array."""
    start = np.arange(9).reshape(3, 3)
    moved = [act(g, start).tobytes() for g in range(ORDER)]
    return np.array(
        [[moved.index(act(g, act(h, start)).tobytes()) for h in range(ORDER)] for g in range(ORDER)]
    )


def _lifting_index(kernel: int) -> torch.Tensor:
    """Return (8, k k): for each g, the index in a filter of every pixel of the filter moved by g."""
    pixels = np.arange(kernel * kernel).reshape(kernel, kernel)
    return torch.tensor(np.stack([act(g, pixels).reshape(-1) for g in range(ORDER)]))


def _group_index(kernel: int) -> torch.Tensor:
    """Return (8, 8 k k): likewise for filters w on the group; (g w)[h] is w[g^-1 h] moved by g."""
    cells = np.arange(ORDER * kernel * kernel).reshape(ORDER, kernel, kernel)
    table = product_table()
    banks = []
    for g in range(ORDER):
        back = [int(np.flatnonzero(table[g] == h)[0]) for h in range(ORDER)]  # g^-1 h
        banks.append(act(g, cells[back]).reshape(-1))
    return torch.tensor(np.stack(banks))


class _Convolution(nn.Module):
    """A convolution with one filter per field, moved by each of the eight elements."""

    index: torch.Tensor

    def __init__(
        self, inside: int, out: int, kernel: int, index: torch.Tensor, planes: int
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out, inside, planes * kernel * kernel))
        nn.init.normal_(self.weight, 0, math.sqrt(2 / (inside * planes * kernel * kernel)))
        self.kernel = kernel
        self.register_buffer("index", index, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out, inside, cells = self.weight.shape
        bank = self.weight[:, :, self.index.reshape(-1)].reshape(out, inside, ORDER, cells)
        bank = bank.transpose(1, 2).reshape(out * ORDER, -1, self.kernel, self.kernel)
        return nn.functional.conv2d(x, bank, padding=self.kernel // 2)


class LiftingConv(_Convolution):
    """From the plane to the group: (N, I, H, W) -> (N, 8 O, H, W), no bias."""

    def __init__(self, inside: int, out: int, kernel: int) -> None:
        """Create O x I filters of k x k."""
        super().__init__(inside, out, kernel, _lifting_index(kernel), 1)


class GroupConv(_Convolution):
    """On the group: (N, 8 I, H, W) -> (N, 8 O, H, W), no bias."""

    def __init__(self, inside: int, out: int, kernel: int) -> None:
        """Create O x I filters of 8 x k x k."""
        super().__init__(inside, out, kernel, _group_index(kernel), ORDER)


class InnerNorm(nn.Module):
    """Batch norm with one mean and variance per field, shared by its eight orientations."""

    def __init__(self, fields: int) -> None:
        """Create the norm of O fields."""
        super().__init__()
        self.norm = nn.BatchNorm3d(fields)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 8 O, H, W) -> (N, 8 O, H, W)."""
        fields = x.reshape(x.shape[0], -1, ORDER, *x.shape[2:])
        normed: torch.Tensor = self.norm(fields)
        return normed.reshape(x.shape)


class BlurPool(nn.Module):
    """Gaussian blur (sigma .66), then every second pixel, on a grid that D4 maps to itself.

    An even side needs an even filter (4 taps at +-1/2 and +-3/2) and an odd side an odd one (5 taps). With
    an odd filter on an even side, rotating the tile would change the features.
    """

    taps4: torch.Tensor
    taps5: torch.Tensor

    def __init__(self, sigma: float = 0.66) -> None:
        """Compute both filters."""
        super().__init__()
        for taps in (4, 5):
            at = torch.arange(taps, dtype=torch.float64) - (taps - 1) / 2
            line = torch.exp(-(at**2) / (2 * sigma**2))
            plane = torch.outer(line, line) / line.sum() ** 2
            self.register_buffer(f"taps{taps}", plane.float(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, H) -> (N, C, ceil(H / 2), ceil(H / 2))."""
        even = x.shape[-1] % 2 == 0
        taps = self.taps4 if even else self.taps5
        channels = x.shape[1]
        weight = taps.to(x.dtype).expand(channels, 1, *taps.shape)
        return nn.functional.conv2d(x, weight, stride=2, padding=1 if even else 2, groups=channels)


class GroupPool(nn.Module):
    """Pool over the eight orientations of each field, then over the plane: (N, 8 O, H, W) -> (N, O)."""

    def __init__(self, pool: str) -> None:
        """Choose ``max`` (the authors' code) or ``average`` (the paper's text)."""
        super().__init__()
        if pool not in POOLS:
            raise BadInput(f"pool is {pool!r}; expected one of {', '.join(POOLS)}")
        self.pool = pool

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return features that are the same for all rotations and reflections of the tile."""
        fields = x.reshape(x.shape[0], -1, ORDER, *x.shape[2:])
        pooled = fields.amax(2) if self.pool == "max" else fields.mean(2)
        return pooled.mean((2, 3))


def _widths(widths: str) -> Sequence[int]:
    if widths in WIDTHS:
        return WIDTHS[widths]
    try:
        chosen = [int(part) for part in widths.split("-")]
    except ValueError:
        chosen = []
    if len(chosen) < 2 or min(chosen) < 1:
        raise BadInput(
            f"widths is {widths!r}; expected one of {', '.join(WIDTHS)}, or fields per block such as "
            "16-32-64"
        )
    return chosen


def build_p4m_cnn(
    size_px: int = 64,
    classes: int = 200,
    widths: str = "16",
    pool: str = "max",
    dim: int = 0,
    hidden: int = 256,
    dropout: float = 0.3,
    relu_embedding: bool = False,
) -> Encoder:
    """Return the P4M CNN: three blocks of group convolution, inner BN, ReLU, blur-pool; kernels 5, 3, 3.

    Args:
        size_px: side of the input.
        classes: width of the top layer (the paper's K).
        widths: fields per block: published (64-128-256, 9.7 GMACs), 32, 16 (16-32-64), 8, or a list.
        pool: pooling over the orientations, max or average.
        dim: length of a projected embedding; 0 returns the pooled fields.
        hidden: width of the projection's hidden layer.
        dropout: dropout in the projection.
        relu_embedding: end the projection with a ReLU.
    """
    fields = _widths(widths)
    layers: list[nn.Module] = [LiftingConv(1, fields[0], 5)]
    for number, count in enumerate(fields):
        if number:
            layers.append(GroupConv(fields[number - 1], count, 3))
        layers += [InnerNorm(count), nn.ReLU(), BlurPool()]
    backbone = nn.Sequential(*layers, GroupPool(pool))
    half = (0.5, 0.5, 0.5)
    return feature_encoder(
        backbone, fields[-1], size_px, dim, hidden, dropout, relu_embedding, classes,
        mean=half, std=half, grey=True,
    )  # fmt: skip
