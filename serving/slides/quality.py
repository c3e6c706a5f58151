"""Quality of tiles, measured on their pixels: sharpness, pen, darkness, glass and stain density.

All measures are from 0 to 1, but for the density. They are computed on a part of the pixels, so that they
cost little beside an encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...artifacts.feature_files import QUALITY
from ...artifacts.images import Rgb

Measures = NDArray[np.float32]

UNREADABLE = "unreadable"
FAULTS = ("", "pen", "blurred", UNREADABLE)
"""Why a tile is not embedded, by its code; "" for an embedded tile."""
SHARPNESS, PEN, DARK, GLASS = (
    QUALITY.index(name) for name in ("sharpness", "pen", "dark", "glass")
)
EMPTY = 0.9
"""Share of glass and darkness above which a tile has too little to be called blurred."""
MUCH, SOLID = 0.25, 0.97
"""Share of the tissue with the colours of ink, and share of ink around ink, that tell stain from pen."""

_LINES, _POINTS, _SMALLEST_PX = 16, 12, 16
"""Pixels between lines that measure sharpness, and between pixels that measure colours; smallest side."""
_BLURRED = 17**-0.5
"""The first ratio of :func:`_sharpness` for an image without fine detail, before it is rescaled."""
_NOISE = 9.0
"""Variance of noise that counts as none; 3 grey levels of 256."""
_FLAT = 2.0
"""Variance added to the divisor, so that rounding does not look like detail on empty tiles."""
_DENSITY = -np.log10((np.arange(256, dtype=np.float32) + 1) / 256)
# Hue in 1/256 of a turn, saturation and value from 0 to 255.
_GREEN, _CYAN, _BLUE = (53, 135), (135, 160), (160, 174)
_MIN_SATURATION = {_GREEN: 64, _CYAN: 128, _BLUE: 175}
"""Least saturation of ink by hue; haematoxylin is blue, too, but less saturated."""
_MIN_VALUE, _BLACK = 31, 51
_COLOURED = 20
_PALE, _BRIGHT = 26, 150


@dataclass(frozen=True)
class Limits:
    """Which tiles of a slide are left out.

    Attributes:
        min_sharpness: tiles below are left out as blurred, unless they are nearly all glass, or black.
        max_pen: tiles with a larger share of ink are left out as pen.
    """

    min_sharpness: float = 0.0
    max_pen: float = 1.0

    def faults(self, measures: Measures) -> NDArray[np.int8]:
        """Return the fault of each tile (N,) as an index into :data:`FAULTS`, from measures (N, Q)."""
        codes = np.zeros(len(measures), dtype=np.int8)
        empty = measures[:, GLASS] + measures[:, DARK] > EMPTY
        blurred = (measures[:, SHARPNESS] < self.min_sharpness) & ~empty
        codes[blurred] = FAULTS.index("blurred")
        codes[measures[:, PEN] > self.max_pen] = FAULTS.index("pen")
        return codes


def measure(tiles: NDArray[np.uint8]) -> Measures:
    """Measure tiles, uint8 (N, S, S, 3); return float32 (N, Q), one column for each name in ``QUALITY``.

    - ``sharpness``: contrast of neighbouring pixels in proportion to that of pixels farther apart; 0 for
      an image without fine detail, typically .2 to .6 for tissue in focus. It does not depend on the
      strength of the stain.
    - ``pen``: share of the pixels with a colour of ink: green, cyan, or a blue more saturated than that of
      haematoxylin. Red and black ink have the colours of tissue and are not found.
    - ``dark``: share of nearly black pixels, such as folds, ink, and the border of a scan.
    - ``glass``: share of bright pixels without colour.
    - ``density``: mean optical density (to base 10) over pixels and channels.
    """
    step = max(1, min(_POINTS, tiles.shape[1] // 8))
    points = np.ascontiguousarray(tiles[:, step // 2 :: step, step // 2 :: step])
    count = len(points)
    hsv = _hsv(points.reshape(count, -1, 3))
    measures = np.empty((count, len(QUALITY)), dtype=np.float32)
    shares = {
        "sharpness": _sharpness(tiles[..., 1]),
        "pen": _is_ink(hsv).mean(1),
        "dark": (hsv[..., 2] < _BLACK).mean(1),
        "glass": ((hsv[..., 1] < _PALE) & (hsv[..., 2] > _BRIGHT)).mean(1),
        "density": _DENSITY[points].reshape(count, -1).mean(1),
    }
    for column, name in enumerate(QUALITY):
        measures[:, column] = shares[name]
    return measures


def is_stain(thumbnail: Rgb, mask: NDArray[np.bool_]) -> bool:
    """Whether the colours of ink are those of a slide's stain: much tissue has them, mixed with others.

    Strokes of a pen are solid: nearly all pixels around a pixel of ink are ink, too.

    Args:
        thumbnail: uint8 (H, W, 3).
        mask: (H, W), True where it shows tissue.
    """
    from scipy.ndimage import uniform_filter

    hsv = _hsv(thumbnail)
    coloured, ink = mask & (hsv[..., 1] > _COLOURED), _is_ink(hsv)
    if not coloured.any() or ink[coloured].mean() <= MUCH:
        return False
    around = uniform_filter(ink.astype(np.float32), 9)[ink & mask]
    return float(np.median(around)) < SOLID


def counted(codes: NDArray[np.int8] | Sequence[int]) -> dict[str, int]:
    """Return the number of tiles with each fault, of those that occur."""
    numbers = np.bincount(np.asarray(codes, dtype=np.int64), minlength=len(FAULTS)).tolist()
    return {name: n for name, n in zip(FAULTS, numbers, strict=True) if name and n}


def listed(counts: dict[str, int]) -> str:
    """Return the numbers of left-out tiles as text, such as ``12 pen, 3 blurred``."""
    return ", ".join(f"{count} {fault}" for fault, count in counts.items())


def _hsv(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return hue, saturation and value of pixels (N, M, 3)."""
    return np.asarray(Image.fromarray(pixels).convert("HSV"))


def _is_ink(hsv: NDArray[np.uint8]) -> NDArray[np.bool_]:
    hue, saturation, value = (hsv[..., channel] for channel in range(3))
    ink = np.zeros(hue.shape, dtype=bool)
    for (first, end), least in _MIN_SATURATION.items():
        ink |= (hue >= first) & (hue < end) & (saturation > least)
    return ink & (value > _MIN_VALUE)


def _sharpness(grey: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return the sharpness of images (N, S, S): the larger of two ratios of variances.

    The variances are those of second differences over 1, 2 and 4 pixels, along lines in both directions.
    White noise adds the same to each, so the first ratio uses only their differences; it is exact for
    noisy images. An image sampled without smoothing has much detail at 1 pixel; the second ratio is for
    those.
    """
    if grey.shape[1] < _SMALLEST_PX:
        return np.ones(len(grey))
    start = min(_LINES, grey.shape[1]) // 2
    across, down = grey[:, start::_LINES], grey[:, :, start::_LINES]
    lines = np.concatenate([across, down.transpose(0, 2, 1)], axis=1).astype(np.float32)
    near, middle, far = (_roughness(lines, steps) for steps in (1, 2, 4))
    ratio = np.sqrt(np.maximum(0, middle - near) / (np.maximum(0, far - near) + _FLAT))
    smooth = np.maximum(0, ratio - _BLURRED) / (1 - _BLURRED)
    sampled = np.sqrt(np.maximum(0, near - _NOISE) / (far + _FLAT))
    sharpness: NDArray[np.float64] = np.minimum(1, np.maximum(smooth, sampled))
    return sharpness


def _roughness(lines: NDArray[np.float32], steps: int) -> NDArray[np.float32]:
    """Return the variance (N,) of second differences along lines (N, L, S); that of white noise stays."""
    second = lines[..., steps:-steps] * 2
    second -= lines[..., : -2 * steps]
    second -= lines[..., 2 * steps :]
    flat = second.reshape(len(second), -1)
    variance: NDArray[np.float32] = np.einsum("ij,ij->i", flat, flat) / np.float32(
        6 * flat.shape[1]
    )
    return variance
