"""An image per slide that shows what was embedded: tissue outlines, tiles, and a caption with numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ...artifacts.geojson import Ring
from ...artifacts.images import Rgb
from .quality import FAULTS
from .slide import Grid

LONGEST = 1024
_TISSUE = (0, 110, 60)
_TILE = (20, 70, 200)
_LEFT_OUT = {"pen": (200, 0, 160), "blurred": (230, 110, 0), "unreadable": (90, 90, 90)}
_STRIP_PX = 26


@dataclass(frozen=True)
class Backdrop:
    """A slide's small image and its tissue, kept until its tiles were read.

    Attributes:
        picture: at most :data:`LONGEST` pixels on its longer side.
        width: width of the slide in level-0 pixels.
        polygons: outlines of the tissue, in level-0 pixels.
        tissue: share of the slide that is tissue.
    """

    picture: Image.Image
    width: int
    polygons: Sequence[Sequence[Ring]]
    tissue: float


def backdrop(grid: Grid, polygons: Sequence[Sequence[Ring]]) -> Backdrop:
    """Return what is drawn below the tiles of a grid."""
    height, width = grid.thumbnail.shape[:2]
    factor = min(1.0, LONGEST / max(width, height))
    size = max(1, round(width * factor)), max(1, round(height * factor))
    picture = Image.fromarray(grid.thumbnail).resize(size, Image.Resampling.BOX)
    return Backdrop(picture, grid.width, polygons, grid.tissue)


def draw_overlay(
    behind: Backdrop, coords: NDArray[np.int64], side: int, faults: NDArray[np.int8], caption: str
) -> Rgb:
    """Draw the tissue outlines (green), the tiles (blue), and a caption.

    Tiles that were not embedded are crossed out: pen in purple, blurred in orange, unreadable in grey.

    Args:
        behind: the slide.
        coords: (N, 2) top-left x, y of the tiles in level-0 pixels.
        side: side of a tile in level-0 pixels.
        faults: (N,) why a tile was left out, as indices into ``FAULTS``.
        caption: text below the image.
    """
    size = behind.picture.size
    scale = size[0] / behind.width
    tint = Image.new("RGBA", size)
    pen = ImageDraw.Draw(tint)
    shown = side * scale
    for (x, y), fault in zip(coords * scale, faults, strict=True):
        box = (x, y, x + shown, y + shown)
        if not fault:
            pen.rectangle(box, fill=(*_TILE, 34), outline=(*_TILE, 150) if shown >= 6 else None)
            continue
        colour = _LEFT_OUT[FAULTS[fault]]
        pen.rectangle(
            box, fill=(*colour, 40), outline=(*colour, 230), width=2 if shown >= 12 else 1
        )
        pen.line((x, y, x + shown, y + shown), fill=(*colour, 230), width=2 if shown >= 12 else 1)
    for rings in behind.polygons:
        for ring in rings:
            pen.line([(x, y) for x, y in ring * scale], fill=(*_TISSUE, 255), width=2)
    marked = Image.alpha_composite(behind.picture.convert("RGBA"), tint).convert("RGB")
    sheet = Image.new("RGB", (max(size[0], 420), size[1] + _STRIP_PX), "white")
    sheet.paste(marked, (0, 0))
    font = ImageFont.load_default(13)
    ImageDraw.Draw(sheet).text((6, size[1] + 5), caption, fill=(30, 30, 30), font=font)
    return np.asarray(sheet)
