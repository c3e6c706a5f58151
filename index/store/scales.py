"""The scale of an atlas's tiles: one scale by default, several only if the user allows it.

The same structure has another embedding at another scale. With tiles of 0.5 and of 1 µm per pixel in one
atlas, tiles that do not look alike become neighbours. Slides of unknown scale (tile sets, CLAM's files)
are not checked.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any

from ...console import counted
from ...errors import Mismatch
from .catalog import get_meta

MIXED = "mixed_scales"
"""Key in the atlas's meta table; ``yes`` if tiles of different scales are allowed."""

TOLERANCE = 0.05
"""Relative tolerance between two scales; 0.5 and 0.499 µm per pixel count as equal."""


def check_scale(db: sqlite3.Connection, name: str, target_mpp: float | None, origin: str) -> str:
    """Check that a slide's tiles have the scale of the atlas's tiles.

    Args:
        db: connection to the catalog.
        name: of the slide; its older tiles are not compared.
        target_mpp: µm per pixel of its tiles; None if unknown.
        origin: name of the input for messages.

    Returns:
        A notice if this slide sets the scale of the atlas, because no other slide has one; else "".

    Raises:
        Mismatch: the scales differ, and the atlas does not allow mixed scales; the message gives both.
    """
    if target_mpp is None or get_meta(db, MIXED):
        return ""
    scales = db.execute(
        "SELECT target_mpp, COUNT(*) AS slides FROM slides WHERE target_mpp IS NOT NULL AND tiles > 0 "
        "AND name != ? GROUP BY target_mpp ORDER BY slides DESC",
        (name,),
    ).fetchall()
    for theirs, slides in scales:
        if max(theirs, target_mpp) > (1 + TOLERANCE) * min(theirs, target_mpp):
            raise Mismatch(
                f"{origin} has tiles of {target_mpp:.4g} µm per pixel, but the atlas has tiles of "
                f"{theirs:.4g} µm per pixel ({counted(slides, 'slide')}); the scales may "
                f"differ by at most {TOLERANCE:.0%}: embed the slide at the atlas's scale, or pass "
                "--mixed-scales to `histoseek index add` or `histoseek index import`"
            )
    if scales:
        return ""
    return (
        f"this slide sets the scale of the atlas: {target_mpp:.4g} µm per pixel; slides of another scale "
        "need --mixed-scales"
    )


def scales_of(slides: Sequence[Mapping[str, Any]], mixed: bool) -> dict[str, Any]:
    """Count slides and tiles by scale, JSON-ready; the scale with most tiles comes first."""
    counts: dict[float | None, list[int]] = {}
    for slide in slides:
        scale = None if slide["target_mpp"] is None else round(float(slide["target_mpp"]), 4)
        count = counts.setdefault(scale, [0, 0])
        count[0] += 1
        count[1] += slide["tiles"]
    slides_unknown, tiles_unknown = counts.pop(None, [0, 0])
    order = sorted(counts.items(), key=lambda item: (-item[1][1], item[0] or 0))
    return {
        "mixed": mixed,
        "of_tiles": [{"target_mpp": k, "slides": n, "tiles": t} for k, (n, t) in order],
        "unknown": {"slides": slides_unknown, "tiles": tiles_unknown},
    }


def scales_line(scales: Mapping[str, Any]) -> str:
    """Return one line that lists the scales of an atlas."""
    parts = [
        f"{s['target_mpp']:.4g} µm per pixel ({s['tiles']:,} tiles)" for s in scales["of_tiles"]
    ]
    if scales["unknown"]["tiles"]:
        parts.append(f"unknown ({scales['unknown']['tiles']:,} tiles)")
    if scales["mixed"]:
        parts.append("mixed scales are allowed")
    return "; ".join(parts) or "no tiles"
