"""Colours of clusters and scales that can be told apart with any colour vision."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

PALETTE = ["#E69F00", "#56B4E9", "#009E73", "#C8B400", "#0072B2", "#D55E00", "#CC79A7"]
"""Okabe & Ito's palette without black, its yellow darkened to be visible on white."""
NONE = "#9a9a9a"
VIRIDIS = ["#440154", "#414487", "#2a788e", "#22a884", "#7ad151", "#fde725"]
"""Six steps of matplotlib's viridis, which is even in lightness."""


def rgb(colour: str) -> tuple[int, int, int]:
    """Return ``#rrggbb`` as numbers."""
    red, green, blue = bytes.fromhex(colour[1:])
    return red, green, blue


def colour_of(number: int) -> str:
    """Return the colour of the n-th value; a negative number means no value."""
    return NONE if number < 0 else PALETTE[number % len(PALETTE)]


def ramp(share: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Return colours (N, 3) of shares (N,) from 0 to 1, by viridis."""
    steps = np.array([rgb(colour) for colour in VIRIDIS], dtype=np.float64)
    at = np.linspace(0, 1, len(steps))
    colours = np.stack([np.interp(share, at, channel) for channel in steps.T], axis=1)
    return colours.round().astype(np.uint8)
