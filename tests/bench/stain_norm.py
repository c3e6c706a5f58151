"""Stain normalisation: the colours of a slide brought to those of a reference, after Reinhard or Macenko.

Both methods are fitted to the tissue of a slide, not to each tile, so that a tile without one of the stains
keeps its colours. The resulting change of colours is applied as a table over red, green and blue.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from histoseek.errors import BadInput

Table = ImageFilter.Color3DLUT
Floats = NDArray[np.float64]
Change = Callable[[Floats], Floats]

STEPS = 33
"""Steps of the table for each channel; between them colours are interpolated."""
LEAST_POINTS, MOST_POINTS = 500, 200_000
TISSUE_DENSITY = 0.15
"""Pixels with a mean optical density (to base 10) below it are glass, and are not fitted."""

# Ruderman's colour space for Reinhard et al., Color transfer between images (2001), eq. 3 to 7.
_LMS = np.array([[0.3811, 0.5783, 0.0402], [0.1967, 0.7244, 0.0782], [0.0241, 0.1288, 0.8444]])
_OPPONENT = np.diag([3**-0.5, 6**-0.5, 2**-0.5]) @ np.array([[1, 1, 1], [1, 1, -2], [1, -1, 0]])
_REINHARD = np.array([[-0.520, -0.113, 0.018], [0.202, 0.057, 0.008]])
"""Reference: mean and deviation of the three channels, over twelve sources of H&E."""

# Macenko et al., A method for normalizing histology slides (2009), and the reference of its authors' code.
_REFERENCE = np.array([[0.5626, 0.7201, 0.4062], [0.2159, 0.8012, 0.5581]])
"""Optical densities (natural logarithm) of haematoxylin and eosin, of length 1."""
_STRONG = np.array([1.9705, 1.0308])
"""99th percentile of their amounts."""
_FAINT, _ANGLE_PERCENT, _STRONG_PERCENT = 0.15, 1.0, 99.0
_LEAST_ANGLE = 0.1
"""Least angle between the stains, in radians; those of the reference are .39 apart."""


def fitted(points: NDArray[np.uint8], method: str) -> Table:
    """Return the table that brings a slide's colours to those of the reference.

    Args:
        points: pixels of the slide, (N, 3), of which the glass is not used.
        method: Reinhard's mean and deviation, or Macenko's two stains.

    Raises:
        BadInput: too few points show tissue, or all have one colour.
    """
    pixels = points[:: max(1, len(points) // MOST_POINTS)].astype(np.float64)
    tissue = pixels[-np.log10((pixels + 1) / 256).mean(1) > TISSUE_DENSITY]
    if len(tissue) < LEAST_POINTS:
        raise BadInput(
            f"{len(tissue)} of {len(pixels)} sampled pixels show tissue; stain normalisation needs "
            f"{LEAST_POINTS}"
        )
    change = (_by_reinhard if method == "reinhard" else _by_macenko)(tissue)
    grid = np.linspace(0, 255, STEPS)
    blue, green, red = np.meshgrid(grid, grid, grid, indexing="ij")
    colours = change(np.stack([red, green, blue], -1).reshape(-1, 3))
    table = (np.clip(colours, 0, 255) / 255).ravel().tolist()
    return Table(STEPS, table)


def normalise(tiles: NDArray[np.uint8], table: Table) -> None:
    """Change the colours of tiles (N, H, W, 3) in place, by a table."""
    for number, tile in enumerate(tiles):
        tiles[number] = np.asarray(Image.fromarray(tile).filter(table))


def sampled(tiles: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return every fourth pixel of every fourth row of images (N, H, W, 3), as (M, 3)."""
    return tiles[:, 2::4, 2::4].reshape(-1, 3)


def _by_reinhard(tissue: Floats) -> Change:
    values = _ruderman(tissue)
    mean, deviation = values.mean(0), values.std(0)
    if deviation.min() < 1e-6:
        raise BadInput("all sampled pixels have one colour, so the stain cannot be normalised")
    back = np.linalg.inv(_OPPONENT).T, np.linalg.inv(_LMS).T

    def change(pixels: Floats) -> Floats:
        values = (_ruderman(pixels) - mean) / deviation * _REINHARD[1] + _REINHARD[0]
        return np.asarray(10 ** (values @ back[0]) @ back[1] * 256 - 1)

    return change


def _ruderman(pixels: Floats) -> Floats:
    return np.asarray(np.log10((pixels + 1) / 256 @ _LMS.T) @ _OPPONENT.T)


def _by_macenko(tissue: Floats) -> Change:
    density = -np.log((tissue + 1) / 256)
    strong = density[(density >= _FAINT).all(1)]
    if len(strong) < LEAST_POINTS:
        raise BadInput(
            "too few sampled pixels absorb all colours, so the stains cannot be told apart"
        )
    plane = np.linalg.eigh(np.cov(strong.T))[1][:, 1:]
    plane *= np.where(plane.sum(0) < 0, -1, 1)
    angles = np.arctan2(*(strong @ plane).T)
    ends = np.percentile(angles, [_ANGLE_PERCENT, 100 - _ANGLE_PERCENT])
    if ends[1] - ends[0] < _LEAST_ANGLE:
        raise BadInput("the sampled pixels show one stain only, so two cannot be told apart")
    stains = np.stack([np.sin(ends), np.cos(ends)], 1) @ plane.T
    if stains[0, 0] < stains[1, 0]:  # haematoxylin absorbs more red light
        stains = stains[::-1]
    amounts = density @ np.linalg.pinv(stains)
    scale = _STRONG / np.maximum(np.percentile(amounts, _STRONG_PERCENT, axis=0), 1e-3)

    def change(pixels: Floats) -> Floats:
        found = np.maximum(0, -np.log((pixels + 1) / 256) @ np.linalg.pinv(stains)) * scale
        return np.asarray(256 * np.exp(-found @ _REFERENCE) - 1)

    return change
