"""Augmentation of a whole batch on its device: one warp, then stain, colour and viewing changes.

:func:`placement` draws the warp of each tile first, so that a loss can apply the same warp to other maps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from .viewing import floats, grid_of, show, warp

# Optical density of haematoxylin, eosin and a residual per RGB channel (Ruifrok & Johnston 2001).
_STAINS = ((0.650, 0.704, 0.286), (0.072, 0.990, 0.105), (0.268, 0.570, 0.776))
IN_CACHE = 2_500_000
"""Bytes of tiles that a CPU changes at once, so that they stay in its cache."""


@dataclass(frozen=True)
class Augmentation:
    """Ranges of the random changes; 0 (or False) turns one off.

    Attributes:
        rotation_deg: rotate by up to this angle either way.
        zoom: scale by a factor between 1 - zoom and 1 + zoom.
        shift: translate by up to this fraction of the side.
        flip: mirror half of the tiles.
        stain: change each stain's density by up to this fraction, and its background by a tenth of it.
        colour: change brightness and contrast by up to this fraction.
        noise: standard deviation of Gaussian pixel noise, for values 0..1.
        crop_px: side of a random crop, not rescaled; 0 keeps the whole tile.
        viewing: change tiles as other programs do (:mod:`histoseek.training.viewing`): other resampling
            filters, sharpening, blur, gamma, saturation, contrast, JPEG, noise.
    """

    rotation_deg: float = 15.0
    zoom: float = 0.1
    shift: float = 0.0
    flip: bool = True
    stain: float = 0.2
    colour: float = 0.1
    noise: float = 0.0
    crop_px: int = 0
    viewing: bool = False


def augment(
    tiles: torch.Tensor,
    ranges: Augmentation,
    generator: torch.Generator,
    where: torch.Tensor | None = None,
    then: Callable[[torch.Tensor], torch.Tensor] = lambda tiles: tiles,
) -> torch.Tensor:
    """Change every tile of a batch at random.

    Args:
        tiles: float (N, 3, S, S), 0..1, or uint8.
        ranges: limits of the random changes.
        generator: CPU generator; the same state gives the same result on any device.
        where: warps (N, 2, 3) from :func:`placement`; None draws them here.
        then: what is done in place to some tiles at a time, after all changes, such as normalisation.

    Returns:
        float (N, 3, S', S'), 0..1, and after that ``then``; S' is ``crop_px``, or S when that is 0.
    """
    side = tiles.shape[-1]
    if where is None:
        where = placement(len(tiles), side, ranges, generator).to(tiles.device)
    out_px, count, device = ranges.crop_px or side, len(tiles), tiles.device
    if ranges.viewing:
        tiles = warp(tiles, where, out_px, generator)

    def draw() -> torch.Tensor:
        return (torch.rand(count, 3, generator=generator) * 2 - 1).to(device)

    changes: list[Callable[[torch.Tensor, slice], None]] = []
    if ranges.stain:
        changes.append(_stain(1 + ranges.stain * draw(), 0.1 * ranges.stain * draw()))
    if ranges.colour:
        changes.append(_colour(1 + ranges.colour * draw(), 0.5 * ranges.colour * draw()))
    together = max(1, IN_CACHE // (12 * side * side)) if device.type == "cpu" else count
    later = ranges.viewing or ranges.noise > 0  # all tiles at once
    layout = torch.contiguous_format if later else torch.channels_last
    changed = torch.empty((count, 3, out_px, out_px), device=device, memory_format=layout)
    for start in range(0, count, together):
        part = slice(start, start + together)
        some = tiles[part] if ranges.viewing else look(floats(tiles[part]), where[part], out_px)
        for change in changes:
            change(some, part)
        changed[part] = some if later else then(some)
    if not later:
        return changed
    if ranges.viewing:
        changed = show(changed, generator)
    if ranges.noise:
        strength = ranges.noise * torch.rand(count, 1, 1, 1, generator=generator).to(device)
        pixels = torch.randn(changed.shape, generator=generator).to(device)
        changed = (changed + strength * pixels).clamp(0, 1)
    return then(changed)


def _stain(scale: torch.Tensor, offset: torch.Tensor) -> Callable[[torch.Tensor, slice], None]:
    """Return a function that changes each stain's density in place, by factors and offsets (N, 3)."""
    basis = torch.tensor(_STAINS, device=scale.device)
    basis = basis / basis.norm(dim=1, keepdim=True)
    # Convert to stains, scale and offset, convert back: one 3 x 3 matrix and one offset per tile.
    change = ((torch.linalg.inv(basis) * scale[:, None, :]) @ basis).transpose(1, 2)
    shift = -(offset @ basis)[:, :, None]

    def apply(tiles: torch.Tensor, part: slice) -> None:
        light = tiles.clamp_(1 / 255, 1).log_().flatten(2)  # minus the optical density
        changed = torch.baddbmm(shift[part], change[part], light).exp_().clamp_(0, 1)
        tiles.copy_(changed.view_as(tiles))

    return apply


def _colour(
    contrast: torch.Tensor, brightness: torch.Tensor
) -> Callable[[torch.Tensor, slice], None]:
    """Return a function that scales the channels around their mean in place, then adds (N, 3)."""
    contrast, brightness = contrast[:, :, None, None], brightness[:, :, None, None]

    def apply(tiles: torch.Tensor, part: slice) -> None:
        middle = tiles.mean((2, 3), keepdim=True)
        shift = middle * (1 - contrast[part]) + brightness[part]
        tiles.mul_(contrast[part]).add_(shift).clamp_(0, 1)

    return apply


def placement(
    count: int, side: int, ranges: Augmentation, generator: torch.Generator, views: int = 1
) -> torch.Tensor:
    """Draw the rotation, zoom, shift, reflection and crop of each of ``count`` tiles of side ``side``.

    With several ``views``, tile n is also tile n + count / views, n + 2 count / views and so on. All views
    of a tile have the same centre.

    Returns:
        float (N, 2, 3): affine maps from output to input coordinates, both from -1 to 1 (the ``theta`` of
        torch's ``affine_grid``).
    """
    share = (ranges.crop_px or side) / side

    def draw() -> torch.Tensor:
        return torch.rand(count, generator=generator) * 2 - 1

    angle = draw() * math.radians(ranges.rotation_deg)
    zoom = share / (1 + draw() * ranges.zoom)
    mirror = torch.where(draw() < 0, -1.0, 1.0) if ranges.flip else torch.ones(count)
    reach = max(0.0, 1 - share) + 2 * ranges.shift
    shift_x, shift_y = (draw()[: count // views].repeat(views) * reach for _ in "xy")
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    rows = [
        torch.stack([cos * mirror, -sin, shift_x], 1),
        torch.stack([sin * mirror, cos, shift_y], 1),
    ]
    return torch.stack(rows, 1)


def look(maps: torch.Tensor, where: torch.Tensor, out_px: int) -> torch.Tensor:
    """Warp maps (N, C, S, S) to (N, C, ``out_px``, ``out_px``): bilinear, mirrored outside the map."""
    return nn.functional.grid_sample(
        maps,
        grid_of(where.to(maps), out_px),
        mode="bilinear",
        padding_mode="reflection",
        align_corners=False,
    )
