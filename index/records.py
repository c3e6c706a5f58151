"""What goes into an atlas and what comes out: rows of slides and tiles, hits, results of adding."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..errors import BadInput
from ..feature_files import Features, content_sha256
from ..tables import clean_row
from .catalog import now
from .mosaic import mosaic_of_groups
from .tile_table import pack_coded, pack_numbers, pack_places, pack_texts
from .vectors import Metric, prepared


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


def slide_row(item: Features, file: str, digest: str, given: dict[str, str]) -> dict[str, Any]:
    """Return the row of the table ``slides`` for a feature file; ``given`` metadata wins over the file."""
    own = item.about.get("row", {})
    own = clean_row(own) if isinstance(own, dict) else {}
    more = further({k: v for k, v in own.items() if k not in OWN}) | further(given)
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
        "metadata": json.dumps(more, sort_keys=True),
        "reason": str(item.about.get("reason", "")),
        "added_at": now(),
    }


def tiles_row(item: Features, metric: Metric) -> dict[str, Any]:
    """Return the row of the table ``slide_tiles``, but for the numbers of slide and first tile."""
    rows = mosaic_of_groups(prepared(item.features, metric), item.coords, item.groups)
    return {
        "places": pack_places(item.coords),
        "files": pack_texts(item.files),
        "labels": pack_coded(item.labels),
        "patients": pack_coded(item.groups),
        "mosaic": pack_numbers(rows, "<i4"),
    }
