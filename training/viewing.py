"""Changes that other programs make to a tile before a person shows it to histoseek.

A viewer, a browser or a screenshot resamples with another filter, sharpens, blurs, compresses as JPEG, and
changes gamma, saturation and contrast. :func:`show` makes these changes on a batch, and :func:`warp` draws
the filter of the warp.

Resampling and filters are drawn once for :data:`TOGETHER` tiles, all else for every tile.
"""

from __future__ import annotations

import io
import math
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import nn

from .models.embedding import LUMA

TOGETHER = 4
"""Tiles that share a resampling filter; more is faster, and less varied."""
UNCHANGED = 0.12
"""Share of tiles that are neither resampled nor filtered."""
RESAMPLED, BLURRED, SHARPENED = 0.28, 0.17, 0.33
"""Shares of the other tiles that are resampled, blurred, sharpened; the rest stays as warped."""
FILTERED_TWICE = 0.3
"""Share of tiles that get a second, mild blur or sharpening."""
SCALE = (0.5, 0.95)
"""Side of a resampled tile, before it is enlarged again."""
BLUR_PX = (0.3, 1.5)
"""Standard deviation of a Gaussian blur, in pixels."""
SHARPNESS = (0.3, 2.2)
"""Amount of an unsharp mask whose radius is :data:`MASK_PX`."""
MASK_PX = (0.5, 1.5)
"""Standard deviation of the blur in an unsharp mask, in pixels."""
PLAIN_COLOUR = 0.15
"""Share of tiles whose colours do not change."""
GAMMA, SATURATION, CONTRAST, BRIGHTNESS, CHANNEL = 0.25, 0.3, 0.1, 0.05, 0.05
"""Largest change of the logarithm of gamma; of saturation, contrast, brightness and each channel's mean."""
COMPRESSED, QUALITY = 0.35, (40, 95)
"""Share of tiles that are compressed, and the JPEG quality."""
NOISY, NOISE = 0.15, (0.005, 0.03)
"""Share of tiles with noise, and its standard deviation, for values in 0..1."""

Filter = Literal["bilinear", "bicubic", "nearest"]
_SMALLER: tuple[tuple[str, bool], ...] = (
    ("nearest", False), ("bilinear", True), ("bicubic", True), ("bilinear", False), ("area", False),
)  # fmt: skip
_LARGER = ("bilinear", "bicubic", "bicubic", "nearest")
_WARPS: tuple[tuple[float, Filter], ...] = ((0.45, "bilinear"), (0.85, "bicubic"), (1.0, "nearest"))


class Draws:
    """Random numbers of one CPU generator; the same state gives the same changes on any device."""

    def __init__(self, generator: torch.Generator, device: torch.device) -> None:
        """Draw from ``generator``; tensors go to ``device``."""
        self.generator, self.device = generator, device

    def one(self, low: float = 0.0, high: float = 1.0) -> float:
        """Return a number from ``low`` to ``high``."""
        return low + (high - low) * float(torch.rand((), generator=self.generator))

    def index(self, count: int) -> int:
        """Return an integer from 0 to ``count`` - 1."""
        return int(torch.randint(count, (), generator=self.generator))

    def around(self, count: int, channels: int = 1) -> torch.Tensor:
        """Return numbers from -1 to 1, (count, channels, 1, 1)."""
        drawn = torch.rand(count, channels, 1, 1, generator=self.generator) * 2 - 1
        return drawn.to(self.device)

    def chosen(self, count: int, share: float) -> list[int]:
        """Return the indices of about ``share`` of ``count`` items."""
        return torch.nonzero(torch.rand(count, generator=self.generator) < share).flatten().tolist()


def grid_of(where: torch.Tensor, out_px: int) -> torch.Tensor:
    """Return the places (N, P, P, 2) that affine maps (N, 2, 3) send the ``out_px`` x ``out_px`` pixels to.

    The same as torch's ``affine_grid`` with ``align_corners=False``, which takes several times as long.
    """
    steps = (torch.arange(out_px, device=where.device, dtype=where.dtype) * 2 + 1) / out_px - 1
    across = where[:, None, :, 0] * steps[None, :, None] + where[:, None, :, 2]
    down = where[:, None, :, 1] * steps[None, :, None]
    # As complex numbers x and y are added in one operation, along rows that a CPU can vectorise.
    x_y = [torch.view_as_complex(part.contiguous()) for part in (across, down)]
    return torch.view_as_real(x_y[1][:, :, None] + x_y[0][:, None, :])


def floats(tiles: torch.Tensor) -> torch.Tensor:
    """Return tiles, uint8 or float in 0..1, as floats in 0..1."""
    if tiles.dtype == torch.uint8:
        return tiles.to(torch.float32).div_(255)
    return tiles


def warp(
    tiles: torch.Tensor, where: torch.Tensor, out_px: int, generator: torch.Generator
) -> torch.Tensor:
    """Warp tiles (N, 3, S, S) as :func:`~histoseek.training.augment.look` does, with a drawn filter.

    Tiles are uint8 or float in 0..1; the result is float.
    """
    draws = Draws(generator, tiles.device)
    warped = []
    for part, at in zip(
        torch.split(tiles, TOGETHER), torch.split(where.to(tiles.device), TOGETHER), strict=True
    ):
        drawn = draws.one()
        mode = next(name for share, name in _WARPS if drawn <= share)
        warped.append(
            nn.functional.grid_sample(
                floats(part), grid_of(at, out_px), mode=mode, padding_mode="reflection",
                align_corners=False,
            )
        )  # fmt: skip
    return torch.cat(warped).clamp_(0, 1)


def show(tiles: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Change tiles, float (N, 3, S, S) in 0..1, as other programs do; shape and range stay."""
    draws = Draws(generator, tiles.device)
    tiles = torch.cat([_filtered(part, draws) for part in torch.split(tiles, TOGETHER)])
    plain = draws.chosen(len(tiles), PLAIN_COLOUR)
    coloured = _recoloured(tiles, draws)
    coloured[plain] = tiles[plain]
    for number in draws.chosen(len(tiles), COMPRESSED):
        coloured[number] = _compressed(coloured[number], draws)
    for number in draws.chosen(len(tiles), NOISY):
        noise = torch.randn(tiles.shape[1:], generator=generator).to(tiles.device)
        coloured[number] = (coloured[number] + draws.one(*NOISE) * noise).clamp(0, 1)
    return coloured


def blur(tiles: torch.Tensor, sigma_px: float) -> torch.Tensor:
    """Blur tiles (N, C, S, S) with a Gaussian of a standard deviation of ``sigma_px`` pixels.

    Tiles are mirrored outside. On a CPU, two products with a matrix (S, S) take less time than convolutions
    of three channels.
    """
    reach, side = max(1, math.ceil(2.5 * sigma_px)), tiles.shape[-1]
    steps = torch.arange(-reach, reach + 1, device=tiles.device)
    kernel = torch.exp(-(steps**2) / (2 * sigma_px**2))
    rows = torch.arange(side, device=tiles.device)[:, None]
    last = side - 1
    columns = last - (last - (rows + steps).abs()).abs()
    weights = (kernel / kernel.sum()).expand(side, -1).to(tiles)
    matrix = tiles.new_zeros(side, side).scatter_add_(1, columns, weights)
    stack = tiles.flatten(0, 1) @ matrix.T
    return torch.matmul(matrix.expand(len(stack), -1, -1), stack).view_as(tiles)


def _filtered(tiles: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Resample, blur or sharpen a few tiles, all in the same way."""
    if draws.one() < UNCHANGED:
        return tiles
    kind = draws.one()
    if kind < RESAMPLED:
        tiles = _resampled(tiles, draws)
    elif kind < RESAMPLED + BLURRED:
        tiles = blur(tiles, draws.one(*BLUR_PX))
    elif kind < RESAMPLED + BLURRED + SHARPENED:
        tiles = tiles + draws.one(*SHARPNESS) * (tiles - blur(tiles, draws.one(*MASK_PX)))
    if draws.one() < FILTERED_TWICE:  # below 0 blurs, above 0 sharpens
        tiles = tiles + draws.one(-0.5, 0.8) * (tiles - blur(tiles, draws.one(0.5, 1.2)))
    return tiles.clamp(0, 1)


def _resampled(tiles: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Make tiles smaller and enlarge them again, each with a drawn filter."""
    side = tiles.shape[-1]
    smaller = max(8, round(side * draws.one(*SCALE)))
    mode, antialias = _SMALLER[draws.index(len(_SMALLER))]
    tiles = nn.functional.interpolate(tiles, (smaller, smaller), mode=mode, antialias=antialias)
    return nn.functional.interpolate(
        tiles, (side, side), mode=_LARGER[draws.index(len(_LARGER))]
    ).clamp(0, 1)


def _recoloured(tiles: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Change gamma, saturation, contrast, brightness and the balance of the channels of every tile."""
    count = len(tiles)
    gamma = torch.exp(GAMMA * draws.around(count))
    saturation = torch.exp(SATURATION * draws.around(count))
    balance, brightness = 1 + CHANNEL * draws.around(count, 3), BRIGHTNESS * draws.around(count)
    contrast = 1 + CONTRAST * draws.around(count)
    luma = torch.tensor(LUMA, device=tiles.device)[:, None, None]
    changed = torch.empty_like(tiles)
    together = TOGETHER if tiles.device.type == "cpu" else count  # few tiles stay in the cache
    for start in range(0, count, together):
        part = slice(start, start + together)
        some = tiles[part].clamp(1 / 255, 1).pow_(gamma[part])
        grey = (some * luma).sum(1, keepdim=True)
        some.sub_(grey).mul_(saturation[part]).add_(grey)
        middle = some.mean((2, 3), keepdim=True)
        some.sub_(middle).mul_(contrast[part]).add_(middle * balance[part] + brightness[part])
        changed[part] = some.clamp_(0, 1)
    return changed


def _compressed(tile: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Encode a tile (3, S, S) as JPEG and decode it."""
    pixels = (tile * 255).round_().to(torch.uint8).permute(1, 2, 0).contiguous().cpu().numpy()
    stream = io.BytesIO()
    low, high = QUALITY
    quality, subsampling = low + draws.index(high - low + 1), draws.index(3)
    Image.fromarray(pixels).save(stream, "JPEG", quality=quality, subsampling=subsampling)
    decoded = torch.from_numpy(np.array(Image.open(stream)))
    return floats(decoded.permute(2, 0, 1)).to(tile)
