"""What goes into an atlas and what comes out: rows of slides and tiles, hits, results of adding."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..feature_files import Features, content_sha256
from .catalog import now


@dataclass(frozen=True)
class Hit:
    """One similar tile.

    Attributes:
        rank: 1 is the most similar.
        score: cosine similarity, or minus the distance for an l2 encoder.
        tile: the tile's id in the atlas.
        slide: name of its slide or tile set.
        x: level-0 left of the tile.
        y: level-0 top of the tile.
        size_px_level0: side of the tile in level-0 pixels; 0 in a tile set.
        mpp: micrometres per pixel of level 0.
        label: of the tile, else of the slide.
        patient: of the tile (its group), else of the slide.
        cluster: in the newest clustering; None before one is fitted.
        file: name of the tile in a tile set.
    """

    rank: int
    score: float
    tile: int
    slide: str
    x: int
    y: int
    size_px_level0: int
    mpp: float | None
    label: str | None
    patient: str | None
    cluster: int | None
    file: str | None


@dataclass(frozen=True)
class Added:
    """What became of one feature file that was to be added.

    Attributes:
        file: the file.
        slide: the name it has in the atlas.
        state: added, unchanged (it was there), relabelled, replaced or failed.
        tiles: how many.
        reason: why it failed, or why it has no tiles.
    """

    file: str
    slide: str
    state: str
    tiles: int = 0
    reason: str = ""


def plain_name(name: str) -> str:
    """Return a name with nothing in it that a file name should not have."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)[:100].lstrip(".") or "_"


def slide_row(
    item: Features, file: str, digest: str, metadata: dict[str, dict[str, str]]
) -> dict[str, Any]:
    """Return the row of the table ``slides`` for a feature file; metadata wins over the file."""
    own = item.about.get("row", {})
    given = metadata.get(item.name) or metadata.get(Path(item.source).name) or {}
    return {
        "name": item.name,
        "kind": item.kind,
        "source": item.source,
        "features_file": file,
        "features_sha256": digest,
        "content_sha256": content_sha256(item),
        "tiles": len(item.features),
        "size_px_level0": item.size_px_level0,
        "mpp": item.mpp,
        "target_mpp": item.target_mpp,
        "width": item.width,
        "height": item.height,
        "label": given.get("label") or own.get("label") or None,
        "patient": given.get("patient") or own.get("patient") or None,
        "reason": str(item.about.get("reason", "")),
        "added_at": now(),
    }


def remove_slide(db: sqlite3.Connection, number: int) -> None:
    """Delete a slide with its tiles and their places in clusters, in the caller's transaction."""
    tiles = "SELECT id FROM tiles WHERE slide_id = ?"
    db.execute(f"DELETE FROM assignments WHERE tile_id IN ({tiles})", (number,))
    db.execute("DELETE FROM tiles WHERE slide_id = ?", (number,))
    db.execute("DELETE FROM slides WHERE id = ?", (number,))


def tile_rows(item: Features, slide: int | None) -> list[tuple[Any, ...]]:
    """Return the rows of the table ``tiles``: slide, row, x, y, file, label, patient."""
    count = len(item.features)
    nothing = (None,) * count
    columns = (item.files or nothing, item.labels or nothing, item.groups or nothing)
    return [
        (
            slide,
            row,
            int(item.coords[row, 0]),
            int(item.coords[row, 1]),
            file,
            label or None,
            group or None,
        )
        for row, (file, label, group) in enumerate(zip(*columns, strict=True))
    ]
