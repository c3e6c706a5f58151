"""Which stain a slide has, told from the colours of its tiles."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Counts = NDArray[np.int64]

COLOURS = ("brown", "blue", "purple", "other")
"""Colours that are counted: of chromogens such as DAB, of haematoxylin alone, of H&E, and all others."""
STAINS = ("H&E", "IHC", "other")

_STEP = 24
"""Pixels between the points of a tile that are looked at."""
_BROWN, _BLUE = (6, 36), (135, 160)
"""Ranges of hue, in 1/256 of a turn; purple is from the end of blue, over pink and red, to brown."""
_MIN_SATURATION, _DARK, _PALE = 26, 40, 203
"""Least saturation of a coloured point; range of its darkest channel, which leaves out black and glass."""
_LEAST_POINTS = 200
_LEAST_BROWN, _MUCH_BROWN, _IHC, _HE = 0.02, 0.12, 0.6, 0.6


def tally(tiles: NDArray[np.uint8]) -> Counts:
    """Return how many points of tiles, uint8 (N, S, S, 3), have each of ``COLOURS``, (4,)."""
    step = max(1, min(_STEP, tiles.shape[1] // 8))
    points = np.ascontiguousarray(tiles[:, step // 2 :: step, step // 2 :: step])
    hsv = np.asarray(Image.fromarray(points.reshape(len(points), -1, 3)).convert("HSV"))
    darkest, value = points.reshape(len(points), -1, 3).min(2), hsv[..., 2]
    hue = hsv[..., 0][(hsv[..., 1] > _MIN_SATURATION) & (value > _DARK) & (darkest < _PALE)]
    brown = (hue >= _BROWN[0]) & (hue < _BROWN[1])
    blue = (hue >= _BLUE[0]) & (hue < _BLUE[1])
    purple = (hue >= _BLUE[1]) | (hue < _BROWN[0])
    counts = [int(part.sum()) for part in (brown, blue, purple)]
    return np.array([*counts, len(hue) - sum(counts)], dtype=np.int64)


def stain_of(counts: Counts) -> str | None:
    """Return the stain of a slide from the counts of its tiles (4,); None from too few points.

    H&E is purple, pink and red; immunohistochemistry has much brown, or some brown and otherwise blue. A
    slide is ``other`` if it is neither, such as one with haematoxylin alone. Brown special stains count as
    immunohistochemistry.
    """
    total = int(counts.sum())
    if total < _LEAST_POINTS:
        return None
    brown, blue, purple, _ = (counts / total).tolist()
    if brown >= _MUCH_BROWN or (brown >= _LEAST_BROWN and brown + blue >= _IHC):
        return "IHC"
    return "H&E" if purple >= _HE else "other"
