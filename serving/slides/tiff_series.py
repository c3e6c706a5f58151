"""Finds which of several images in a TIFF is the slide, not a label, macro or thumbnail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ...errors import BadInput
from .overview import overview
from .tiff_source import TiffSource, open_tiff
from .tissue import by_saturation

RIVAL = 0.5
"""Minimum share of the largest image's area for another image to be a candidate for the slide."""
LOOK_PX = 512


def the_slide(path: Path) -> int:
    """Return the index of the TIFF image that is the slide.

    It is the largest image, if every other one has less than half of its area; else the only one of the
    large images that shows tissue. Returns 0 for an unreadable file: opening it reports the error.

    Raises:
        BadInput: several images could be the slide; the message lists them and names the option that
            chooses one.
    """
    try:
        with open_tiff(path) as opened:
            images = [(str(series.name), *_size(series)) for series in opened.series]
    except Exception:
        return 0
    if len(images) <= 1:
        return 0
    areas = [width * height for _, width, height in images]
    large = [number for number, area in enumerate(areas) if area >= RIVAL * max(areas)]
    candidates = large if len(large) == 1 else [n for n in large if _shows_tissue(path, n)] or large
    if len(candidates) == 1:
        return candidates[0]
    listed = ", ".join(
        f"{n} ({images[n][0] or 'no name'}, {images[n][1]} x {images[n][2]})" for n in candidates
    )
    raise BadInput(
        f"{path} contains {len(candidates)} images that could be the slide: {listed}; choose one with "
        "--series N, or with a column 'series' of the manifest"
    )


def is_largest(path: Path, size: tuple[int, int]) -> bool:
    """Whether no image of a TIFF is larger than (width, height); True for an unreadable file."""
    try:
        with open_tiff(path) as opened:
            areas = [width * height for width, height in map(_size, opened.series)]
    except Exception:
        return True
    return not areas or size[0] * size[1] >= max(areas)


def _size(series: Any) -> tuple[int, int]:
    """Return width and height of an image."""
    page = series.levels[0].pages[0].aspage()
    return int(page.imagewidth), int(page.imagelength)


def _shows_tissue(path: Path, number: int) -> bool:
    """Whether an image can be read and shows tissue."""
    try:
        source = TiffSource(path, number)
        try:
            return bool(by_saturation(np.asarray(overview(source, LOOK_PX, path))).any())
        finally:
            source.close()
    except BadInput:
        return False
