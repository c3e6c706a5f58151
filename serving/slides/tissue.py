"""Tissue detection on a thumbnail: tissue absorbs more light than the glass beside it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...artifacts.images import Rgb

Mask = NDArray[np.bool_]

METHOD = "absorbance"
"""Name of the method; features of slides state it."""
GAP_UM = 25.0
"""Gaps in tissue up to about twice this width count as tissue: alveoli, fat cells, space between cells."""
MIN_ABSORBANCE, MAX_ABSORBANCE = 0.03, 0.07
"""Range of the threshold, an optical density to base 10."""
NOISE_TIMES = 4.0
"""The threshold is at least this many times the noise of the glass."""
STRONG = 0.15
"""Density above which tissue need not have any texture."""
DARK = 60
"""Median grey level below which an image was taken on a dark ground, such as fluorescence."""

_FLAT, _BRIGHT, _GREY_SPREAD, _LEAST = 2.0, 110, 0.08, 0.005
"""Of glass: largest gradient (levels per pixel), least grey level, largest saturation, least share."""
_TINT_SPREAD, _BRIGHT_TINT, _LEAST_TINTED = 0.2, 170, 0.05
"""The same for tinted glass, which is looked for if there is no colourless one."""
_PEAK_SHARE = 0.1
_WHITE, _ENOUGH_PX = 252, 1024
_DARK_VALUE = 90
_LOG = -np.log10((np.arange(256, dtype=np.float32) + 1) / 256)
_MIN_SATURATION, _MAX_SATURATION = 0.05, 0.20


def tissue_mask(thumbnail: Rgb, mpp: float | None = None) -> Mask:
    """Return True where a thumbnail (H, W, 3) shows tissue.

    The glass is the brightest frequent colour of flat, bright, colourless pixels. Tissue is where the
    optical density above it, in the channel that absorbs most, exceeds a threshold: Otsu's, scaled and
    clipped to 0.03 to 0.07. So grey, pale and loose tissue is found, which has little colour. A density
    below 0.15 counts only with colour, or where it changes from pixel to pixel: shading of the glass does
    not count. Gaps up to twice ``GAP_UM`` are filled. Dark pixels without colour (scan borders, black ink)
    are not tissue. Specks under 0.01 % of the image are removed, and holes of that size filled. An image on
    a dark ground is divided by its saturation.

    Args:
        thumbnail: uint8 (H, W, 3).
        mpp: micrometres per pixel of the thumbnail; when None, gaps of 1 % of the longer side are filled.
    """
    from scipy.ndimage import gaussian_filter, maximum_filter, minimum_filter
    from skimage.filters import threshold_otsu
    from skimage.morphology import remove_small_holes, remove_small_objects

    grey = thumbnail.dot(np.full(3, 1 / 3, np.float32))
    glass = glass_colour(thumbnail, grey)
    if glass is None and float(np.median(grey)) < DARK:
        mask = by_saturation(thumbnail)
    else:
        colour = np.array([245, 245, 245]) if glass is None else glass
        tables = np.maximum(0, _LOG - _LOG[colour][:, None])  # (3, 256)
        above = tables[0][thumbnail[..., 0]]
        for channel in (1, 2):
            np.maximum(above, tables[channel][thumbnail[..., channel]], out=above)
        density = gaussian_filter(above, 1.0)
        change = _change(density)
        noise = still = 0.0
        if glass is not None:
            like_glass = np.abs(grey - colour.mean()) <= 4
            if like_glass.any():
                noise = float(np.median(density[like_glass]))
                still = float(np.median(change[like_glass]))
        cut = MIN_ABSORBANCE
        if float(np.ptp(density)) > 1e-6:
            otsu = float(threshold_otsu(np.minimum(density, 0.5)))
            cut = float(np.clip(0.6 * otsu, MIN_ABSORBANCE, MAX_ABSORBANCE))
        rough = maximum_filter((change > NOISE_TIMES * still).view(np.uint8), 5) > 0
        brightest = thumbnail.max(2)
        spread = brightest - thumbnail.min(2)
        mask = density > max(cut, NOISE_TIMES * noise)
        mask &= rough | (density > STRONG) | (spread > brightest // 8)  # the last: has colour
        mask &= (brightest >= _DARK_VALUE) | (spread >= np.maximum(brightest // 4, 12))
    gap = 0.005 * max(mask.shape) if mpp is None else GAP_UM / mpp
    size = 2 * max(1, round(gap)) + 1
    # the mask is repeated beyond the edge, so that tissue at the edge stays
    closed = minimum_filter(maximum_filter(mask, size, mode="nearest"), size, mode="nearest")
    without_specks = remove_small_objects(closed | mask, max_size=_speck(mask))
    filled: Mask = remove_small_holes(without_specks, max_size=_speck(mask))
    return filled


def glass_colour(thumbnail: Rgb, grey: NDArray[np.float32]) -> NDArray[np.uint8] | None:
    """Return the colour (3,) of the glass on a thumbnail (H, W, 3) with grey levels (H, W), or None.

    It is the brightest frequent colour. White counts only without another one, since files are white where
    nothing was scanned.
    """
    from scipy.ndimage import gaussian_filter1d, gaussian_gradient_magnitude

    step = max(1, max(grey.shape) // _ENOUGH_PX)
    thumbnail, grey = thumbnail[::step, ::step], grey[::step, ::step]
    brightest = thumbnail.max(2).astype(np.float32)
    spread = (brightest - thumbnail.min(2)) / np.maximum(brightest, 1)
    flat = (gaussian_gradient_magnitude(grey, 1.0) < _FLAT) & (grey > _BRIGHT)
    usable = flat & (spread < _GREY_SPREAD)
    if usable.mean() < _LEAST:
        usable = flat & (spread < _TINT_SPREAD) & (grey > _BRIGHT_TINT)
        if usable.mean() < _LEAST_TINTED:
            return None
    counts = np.bincount(grey[usable].round().astype(np.int64), minlength=256)
    smooth = gaussian_filter1d(counts.astype(np.float64), 2)
    shares = np.convolve(smooth, np.ones(13), "same") / smooth.sum()
    inner = np.arange(1, 255)
    peaks = inner[
        (smooth[inner] >= smooth[inner - 1])
        & (smooth[inner] > smooth[inner + 1])
        & (shares[inner] > _PEAK_SHARE)
    ]
    if smooth[255] > smooth[254] and shares[255] > _PEAK_SHARE / 2:
        peaks = np.append(peaks, 255)
    if not len(peaks):
        peaks = np.array([int(smooth.argmax())])
    level, below = int(peaks.max()), peaks[peaks < _WHITE]
    if level >= _WHITE and len(below):
        level = int(below.max())
    near = usable & (np.abs(grey - level) <= 6)
    colour: NDArray[np.uint8] = np.median(thumbnail[near], axis=0).astype(np.uint8)
    return colour


def _change(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the larger difference (H, W) of left and right, or upper and lower, neighbours."""
    change = np.zeros_like(values)
    np.abs(values[:, 2:] - values[:, :-2], out=change[:, 1:-1])
    np.maximum(change[1:-1], np.abs(values[2:] - values[:-2]), out=change[1:-1])
    return change


def by_saturation(thumbnail: Rgb) -> Mask:
    """Return where smoothed saturation exceeds Otsu's threshold, clipped to 0.05 to 0.20; no specks."""
    from scipy.ndimage import gaussian_filter
    from skimage.filters import threshold_otsu
    from skimage.morphology import remove_small_objects

    hsv = np.asarray(Image.fromarray(thumbnail).convert("HSV"))  # 20 times faster than in floats
    saturation = gaussian_filter(hsv[..., 1].astype(np.float32) / 255, 1.0)
    usable = hsv[..., 2] > 0.1 * 255
    values = saturation[usable]
    if values.size == 0 or float(values.max()) < _MIN_SATURATION:
        return np.zeros(thumbnail.shape[:2], dtype=bool)
    cut = _MIN_SATURATION
    if float(np.ptp(values)) > 1e-6:
        cut = float(np.clip(threshold_otsu(values), _MIN_SATURATION, _MAX_SATURATION))
    mask = (saturation > cut) & usable
    without_specks: Mask = remove_small_objects(mask, max_size=_speck(mask))
    return without_specks


def _speck(mask: Mask) -> int:
    """Return the size in pixels up to which an area is a speck."""
    return max(4, mask.size // 10_000)


def tissue_share(mask: Mask, boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the share of tissue in boxes (N, 4) of x0, y0, x1, y1 in (fractional) pixels of the mask."""
    height, width = mask.shape
    total = np.zeros((height + 1, width + 1), dtype=np.int64)
    total[1:, 1:] = mask.cumsum(0).cumsum(1)
    x0 = np.clip(np.floor(boxes[:, 0]), 0, width - 1).astype(int)
    y0 = np.clip(np.floor(boxes[:, 1]), 0, height - 1).astype(int)
    x1 = np.clip(np.ceil(boxes[:, 2]), x0 + 1, width).astype(int)
    y1 = np.clip(np.ceil(boxes[:, 3]), y0 + 1, height).astype(int)
    inside = total[y1, x1] - total[y0, x1] - total[y1, x0] + total[y0, x0]
    share: NDArray[np.float64] = inside / ((x1 - x0) * (y1 - y0))
    return share
