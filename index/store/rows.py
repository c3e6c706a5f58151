"""What goes into an atlas and what comes out: rows of slides and tiles, hits, results of adding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from ...errors import BadInput


class Hit(NamedTuple):
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
        target_mpp: micrometres per pixel of the tile as the encoder saw it; None if unknown.
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
    target_mpp: float | None = None


@dataclass(frozen=True)
class Added:
    """What became of one feature file that was to be added.

    Attributes:
        file: the file.
        slide: the name it has in the atlas.
        state: added, unchanged (it was there), relabelled, moved (its slide lies elsewhere now), replaced
            or failed.
        tiles: how many.
        reason: why it failed, or why it has no tiles.
        encoder_by: of a file of another tool, what says which encoder made it.
    """

    file: str
    slide: str
    state: str
    tiles: int = 0
    reason: str = ""
    encoder_by: str = ""


def plain_name(name: str) -> str:
    """Return a name with nothing in it that a file name should not have."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)[:100].lstrip(".") or "_"


OWN = {
    "tile",
    "x",
    "y",
    "size_px_level0",
    "kind",
    "cluster",
    "vector",
    "projection_x",
    "projection_y",
}
"""Columns that histoseek has of its own, or that exports add."""


def further(row: dict[str, Any]) -> dict[str, str]:
    """Return the columns of a row of metadata that have no place of their own, as text, empty ones not.

    Raises:
        BadInput: a column that is histoseek's own.
    """
    known = {"slide", "path", "label", "patient", "mpp", "file"}
    if taken := sorted(OWN & set(row)):
        raise BadInput(
            f"the metadata has a column {taken[0]!r}, which is histoseek's own: rename it"
        )
    return {str(k): str(v) for k, v in row.items() if k not in known and v not in (None, "")}
