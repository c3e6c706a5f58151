"""The scale of an atlas's tiles: one scale by default, several only if the user allows it.

The same structure has another embedding at another scale. With tiles of 0.5 and of 1 µm per pixel in one
atlas, tiles that do not look alike become neighbours. Slides of unknown scale (tile sets, CLAM's files)
are not checked.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import Mismatch
from .catalog import get_meta

MIXED = "mixed_scales"
"""Key in the atlas's meta table; ``yes`` if tiles of different scales are allowed."""

TOLERANCE = 0.05
"""Relative tolerance between two scales; 0.5 and 0.499 µm per pixel count as equal."""


def differ(one: float, other: float) -> bool:
    """Whether two scales (µm per pixel) differ by more than the tolerance."""
    return max(one, other) > (1 + TOLERANCE) * min(one, other)


def check_scale(db: sqlite3.Connection, name: str, target_mpp: float | None, origin: str) -> None:
    """Check that a slide's tiles have the scale of the atlas's tiles.

    Args:
        db: connection to the catalog.
        name: of the slide; its older tiles are not compared.
        target_mpp: µm per pixel of its tiles; None if unknown.
        origin: name of the input for messages.

    Raises:
        Mismatch: the scales differ, and the atlas does not allow mixed scales; the message gives both.
    """
    if target_mpp is None or get_meta(db, MIXED):
        return
    known = db.execute(
        "SELECT target_mpp, COUNT(*) AS slides FROM slides WHERE target_mpp IS NOT NULL AND tiles > 0 "
        "AND name != ? GROUP BY target_mpp ORDER BY slides DESC",
        (name,),
    ).fetchall()
    others = [row for row in known if differ(row["target_mpp"], target_mpp)]
    if others:
        theirs, slides = others[0]["target_mpp"], others[0]["slides"]
        raise Mismatch(
            f"{origin} has tiles of {target_mpp:.4g} µm per pixel; the atlas holds tiles of {theirs:.4g} "
            f"({slides} slide{'' if slides == 1 else 's'}), and at most {TOLERANCE:.0%} apart are "
            "compared: embed the slide at the atlas's scale, or pass --mixed-scales to `index add` or "
            "`index import`"
        )


def scales_of(slides: Sequence[Mapping[str, Any]], mixed: bool) -> dict[str, Any]:
    """Count slides and tiles by scale, JSON-ready; the scale with most tiles comes first.

    Args:
        slides: rows of the table ``slides``.
        mixed: whether different scales are allowed.
    """
    counts: dict[float | None, list[int]] = {}
    for slide in slides:
        scale = None if slide["target_mpp"] is None else round(float(slide["target_mpp"]), 4)
        found = counts.setdefault(scale, [0, 0])
        found[0] += 1
        found[1] += slide["tiles"]
    without = counts.pop(None, [0, 0])
    order = sorted(counts.items(), key=lambda item: (-item[1][1], item[0] or 0))
    return {
        "mixed": mixed,
        "of_tiles": [{"target_mpp": k, "slides": n, "tiles": t} for k, (n, t) in order],
        "unknown": {"slides": without[0], "tiles": without[1]},
    }


def scales_line(scales: Mapping[str, Any]) -> str:
    """Return one line that lists the scales of an atlas."""
    parts = [
        f"{s['target_mpp']:.4g} µm per pixel ({s['tiles']:,} tiles)" for s in scales["of_tiles"]
    ]
    if scales["unknown"]["tiles"]:
        parts.append(f"unknown ({scales['unknown']['tiles']:,} tiles)")
    mixed = "mixed scales were allowed" if scales["mixed"] else ""
    return "; ".join([*parts, *([mixed] if mixed else [])]) or "no tiles"
