"""The scale of an atlas's tiles: one by default, several only where somebody said so.

The same structure embeds differently at another scale, so that tiles of 0.5 and of 1 µm per pixel side by
side make neighbours of what is not alike. What has no scale (tile sets, CLAM's files) is not judged.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import Mismatch
from .catalog import get_meta

MIXED = "mixed_scales"
"""Key of the atlas's meta; ``yes`` once tiles of different scale were allowed."""

TOLERANCE = 0.05
"""Two scales differ if the larger is over this share larger; 0.5 and 0.499 µm per pixel do not."""


def differ(one: float, other: float) -> bool:
    """Whether two scales (µm per pixel) are not the same."""
    return max(one, other) > (1 + TOLERANCE) * min(one, other)


def check_scale(db: sqlite3.Connection, name: str, target_mpp: float | None, origin: str) -> None:
    """Compare the scale of a slide's tiles with those that the atlas holds.

    Args:
        db: of the catalog.
        name: of the slide, whose own older tiles do not count.
        target_mpp: µm per pixel of its tiles, or None.
        origin: for messages.

    Raises:
        Mismatch: they differ, and nobody allowed it; names both.
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
    """Count slides and tiles by scale, JSON-ready; the most frequent scale first.

    Args:
        slides: rows of ``slides`` that are there.
        mixed: whether different scales were allowed.
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
    """Say the scales of an atlas in a line."""
    parts = [
        f"{s['target_mpp']:.4g} µm per pixel ({s['tiles']:,} tiles)" for s in scales["of_tiles"]
    ]
    if scales["unknown"]["tiles"]:
        parts.append(f"unknown ({scales['unknown']['tiles']:,} tiles)")
    mixed = "mixed scales were allowed" if scales["mixed"] else ""
    return "; ".join([*parts, *([mixed] if mixed else [])]) or "no tiles"
