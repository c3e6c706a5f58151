"""Estimates µm per pixel from the size of nuclei, to propose it for slides that do not state it.

Nuclei absorb red light, both in haematoxylin and in DAB. They are found as maxima of the scale-normalised
Laplacian of Gaussian of the optical density (Lindeberg 1998). The scale at which most of them respond is
their size in pixels. ``tests/bench/scale_guess.py`` measures how often the estimate is right.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ...artifacts.images import Rgb
from .tissue import tissue_mask, tissue_share

USUAL = (0.25, 0.5, 1.0)
"""µm per pixel that are proposed: objectives 40x, 20x and 10x."""
NUCLEUS_UM = 1.7
"""Standard deviation of the Gaussian that fits nuclei best, in µm; of nuclei about 5 µm wide."""
FEWEST = 40
"""Number of nuclei below which nothing is estimated."""
SIDE_PX, MOST = 512, 8
_SIGMAS = 1.2 * 1.19 ** np.arange(17)
_WEAKEST = 0.08
_OF_THE_STRONG = 0.35


def proposed(estimate: float | None) -> float | None:
    """Return the usual µm per pixel next to an estimate; None if none is within a factor of 1.41."""
    if estimate is None:
        return None
    nearest = min(USUAL, key=lambda usual: abs(np.log2(usual / estimate)))
    return nearest if abs(np.log2(nearest / estimate)) <= 0.5 else None


def estimate(pictures: Sequence[Rgb]) -> float | None:
    """Return µm per pixel of pictures of tissue, uint8 (H, W, 3); None without enough nuclei."""
    histogram, count = np.zeros(len(_SIGMAS)), 0
    for picture in pictures:
        scales, responses = _blobs(picture)
        if not len(responses):
            continue
        strong = responses > _OF_THE_STRONG * np.percentile(responses, 95)
        weights = (
            responses[strong] * _SIGMAS[scales[strong]] ** 1.5
        )  # few large beside many small ones
        histogram += np.bincount(scales[strong], weights=weights, minlength=len(_SIGMAS))
        count += int(strong.sum())
    from scipy.ndimage import gaussian_filter1d

    best = int(gaussian_filter1d(histogram, 1).argmax())
    if count < FEWEST or not 0 < best < len(_SIGMAS) - 1:
        return None
    return float(NUCLEUS_UM / _SIGMAS[best])


def _blobs(picture: Rgb) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the number of the scale and the response of each dark blob."""
    from scipy.ndimage import gaussian_laplace, maximum_filter

    density = -np.log((picture[..., 0].astype(np.float32) + 8) / 263)
    response = np.stack([-(sigma**2) * gaussian_laplace(density, sigma) for sigma in _SIGMAS])
    peaks = (response == maximum_filter(response, size=(3, 5, 5))) & (response > _WEAKEST)
    peaks[0] = peaks[-1] = False
    scales = np.nonzero(peaks)[0]
    return scales, response[peaks]


def squares(thumbnail: Rgb, width: int, height: int) -> tuple[list[tuple[int, int]], int]:
    """Return left and top of up to 8 squares that tissue fills, spread over a slide, and their side.

    Args:
        thumbnail: the whole slide, (H, W, 3).
        width: of the slide in pixels of level 0, like the result.
        height: likewise.
    """
    mask, side = tissue_mask(thumbnail), min(SIDE_PX, width, height)
    xs, ys = np.arange(0, width - side + 1, side), np.arange(0, height - side + 1, side)
    corners = np.stack(np.meshgrid(xs, ys), axis=-1).reshape(-1, 2)
    to_mask = np.tile([mask.shape[1] / width, mask.shape[0] / height], 2)
    share = tissue_share(mask, np.concatenate([corners, corners + side], axis=1) * to_mask)
    full = corners[share >= max(0.5, float(np.quantile(share, 0.8)))]
    if len(full):
        full = full[np.unique(np.linspace(0, len(full) - 1, MOST).astype(int))]
    return [(int(x), int(y)) for x, y in full], side
