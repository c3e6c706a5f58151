"""An image per slide that shows what was embedded: tissue outlines, tiles, and a caption with numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ...artifacts.geojson import Ring
from ...artifacts.images import Rgb
from .slide import Grid

LONGEST = 1024
_TISSUE = (0, 110, 60)
_TILE = (20, 70, 200)
_STRIP_PX = 26


def draw_overlay(grid: Grid, polygons: Sequence[Sequence[Ring]], caption: str) -> Rgb:
    """Return the thumbnail with tissue outlines (green; in level-0 pixels), tiles (blue) and a caption."""
    height, width = grid.thumbnail.shape[:2]
    factor = min(1.0, LONGEST / max(width, height))
    size = max(1, round(width * factor)), max(1, round(height * factor))
    thumbnail = Image.fromarray(grid.thumbnail).resize(size, Image.Resampling.BOX)
    scale = size[0] / grid.width
    tint = Image.new("RGBA", size)
    pen = ImageDraw.Draw(tint)
    side = grid.size_px_level0 * scale
    edge = (*_TILE, 150) if side >= 6 else None
    for x, y in grid.coords * scale:
        pen.rectangle((x, y, x + side, y + side), fill=(*_TILE, 34), outline=edge)
    for rings in polygons:
        for ring in rings:
            pen.line([(x, y) for x, y in ring * scale], fill=(*_TISSUE, 255), width=2)
    marked = Image.alpha_composite(thumbnail.convert("RGBA"), tint).convert("RGB")
    sheet = Image.new("RGB", (max(size[0], 420), size[1] + _STRIP_PX), "white")
    sheet.paste(marked, (0, 0))
    font = ImageFont.load_default(13)
    ImageDraw.Draw(sheet).text((6, size[1] + 5), caption, fill=(30, 30, 30), font=font)
    return np.asarray(sheet)
