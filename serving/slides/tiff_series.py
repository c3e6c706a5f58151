"""Which of several pictures of a TIFF is the slide: neither a label, nor a macro, nor a thumbnail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ...errors import BadInput
from .overview import overview
from .tiff_source import TiffSource, open_tiff
from .tissue import tissue_mask

RIVAL = 0.5
"""Share of the largest picture's area from which another one could be the slide too."""
LOOK_PX = 512


def the_slide(path: Path) -> int:
    """Return the number of the picture of a TIFF that is the slide.

    It is the largest picture, if every other one has less than half of its area; else the only one of
    the large pictures that shows tissue. A file that cannot be read has the number 0: opening it says why.

    Raises:
        BadInput: several pictures could be the slide; names them and the option that chooses.
    """
    try:
        with open_tiff(path) as opened:
            pictures = [(str(series.name), *_size(series)) for series in opened.series]
    except Exception:
        return 0
    if len(pictures) <= 1:
        return 0
    areas = [width * height for _, width, height in pictures]
    large = [number for number, area in enumerate(areas) if area >= RIVAL * max(areas)]
    showing = large if len(large) == 1 else [n for n in large if _shows_tissue(path, n)]
    if len(showing) == 1:
        return showing[0]
    named = ", ".join(
        f"{number} ({pictures[number][0] or 'no name'}, {pictures[number][1]} x {pictures[number][2]})"
        for number in (showing or large)
    )
    raise BadInput(
        f"{path} holds {len(showing or large)} pictures that could be the slide: {named}; say which with "
        "--series N, or by a column 'series' of the manifest"
    )


def is_largest(path: Path, size: tuple[int, int]) -> bool:
    """Whether no picture of a TIFF is larger than (width, height); True for what cannot be read."""
    try:
        with open_tiff(path) as opened:
            areas = [width * height for width, height in map(_size, opened.series)]
    except Exception:
        return True
    return not areas or size[0] * size[1] >= max(areas)


def _size(series: Any) -> tuple[int, int]:
    """Return width and height of a picture."""
    page = series.levels[0].pages[0].aspage()
    return int(page.imagewidth), int(page.imagelength)


def _shows_tissue(path: Path, number: int) -> bool:
    """Whether a picture can be read and shows tissue."""
    try:
        source = TiffSource(path, number)
        try:
            return bool(tissue_mask(np.asarray(overview(source, LOOK_PX, path))).any())
        finally:
            source.close()
    except BadInput:
        return False
