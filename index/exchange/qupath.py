"""Writes tiles and clusters as GeoJSON for QuPath."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...artifacts.feature_files import read_about
from ...artifacts.files import (
    publish_folder,
    write_atomic,
)
from ...errors import BadInput
from ..search.columns import Coded
from ..search.tiles import allowed
from ..store.rows import plain_name
from ..vectors.scan import prepared
from ..view import View
from .table import Table

COLOURS = (0x4C78A8, 0xF58518, 0xE45756, 0x72B7B2, 0x54A24B, 0xEECA3B, 0xB279A2, 0xFF9DA6, 0x9D755D)
UNKNOWN_COLOUR = 0x9E9E9E
UNKNOWN = -3
"""Number drawn for an unknown tile, in place of its cluster."""


def write_geojson(
    view: View, table: Table, out: Path, clustering: str | None = None, like: int | None = None
) -> int:
    """Write a folder with ``<slide>.geojson``: tiles as detections with their cluster or similarity.

    Coordinates are QuPath's: (0, 0) is the top-left corner of the scanned area.
    """
    values: NDArray[Any]
    if like is not None:
        metric = view.state.metric
        query = prepared(view.vectors_of([like]), metric)
        vectors = prepared(table.vectors, metric)
        cosine = metric == "cosine"
        values = vectors @ query[0] if cosine else -np.linalg.norm(vectors - query[0], axis=1)
        names: dict[int, str] = {}
    else:
        chosen, _ = view.clustering(clustering)
        values = table.numbers(f"cluster.{chosen}").copy()
        values[table.numbers(f"unknown.{chosen}")] = UNKNOWN
        names = view.cluster_names(chosen)
    slides = table.columns["slide"]
    assert isinstance(slides, Coded)
    drawn = np.flatnonzero(table.numbers("size_px_level0") > 0)
    if not len(drawn):
        raise BadInput(
            "none of the tiles has a size on its slide: tile sets have no places, and CLAM's files do not "
            "say (import them with --tile-px)"
        )
    order = drawn[np.argsort(slides.codes[drawn], kind="stable")]
    corners = origins(view)
    parts = np.split(order, np.flatnonzero(np.diff(slides.codes[order])) + 1)
    with publish_folder(out) as folder:
        for rows in parts:
            slide = slides.names[int(slides.codes[rows[0]])]
            origin = corners.get(slide) or (0, 0)
            features = [
                _feature(table, row, values[row], names, like, origin) for row in rows.tolist()
            ]
            document = {"type": "FeatureCollection", "features": features}
            name = plain_name(slide)
            if (folder / f"{name}.geojson").exists():  # another slide has the same safe name
                name = f"{name[:80]}-{hashlib.sha256(slide.encode()).hexdigest()[:8]}"
            write_atomic(folder / f"{name}.geojson", json.dumps(document, ensure_ascii=False))
    return len(drawn)


def origins(view: View, where: str | None = None) -> dict[str, tuple[int, int] | None]:
    """Return, by slide, the top-left corner of the scanned area (level-0 pixels), which is QuPath's (0, 0).

    It is None if the feature file lacks it: files of other tools and of older versions do. With a filter,
    slides without a tile that passes are left out.
    """
    passing = allowed(view.state, where)
    starts = view.columns.starts
    found: dict[str, tuple[int, int] | None] = {}
    for number, slide in enumerate(view.columns.slides):
        rows = slice(int(starts[number]), int(starts[number + 1]))
        if slide["kind"] != "slide" or (passing is not None and not passing[rows].any()):
            continue
        about = read_about(view.state.store.path / slide["features_file"]) or {}
        bounds = about.get("bounds") or [0, 0]
        found[slide["name"]] = (int(bounds[0]), int(bounds[1])) if "bounds" in about else None
    return found


def without_size(view: View, where: str | None = None) -> dict[str, int]:
    """Return, by slide, the number of tiles without a size on the slide; these cannot be drawn."""
    passing = allowed(view.state, where)
    columns = view.columns
    found = {}
    for number, slide in enumerate(columns.slides):
        rows = slice(int(columns.starts[number]), int(columns.starts[number + 1]))
        count = slide["tiles"] if passing is None else int(passing[rows].sum())
        if slide["name"] and not slide["size_px_level0"] and count:
            found[slide["name"]] = count
    return found


def _feature(
    table: Table,
    row: int,
    value: Any,
    names: dict[int, str],
    like: int | None,
    origin: tuple[int, int],
) -> dict[str, Any]:
    x, y, size = (int(table.numbers(key)[row]) for key in ("x", "y", "size_px_level0"))
    x, y = x - origin[0], y - origin[1]
    ring = [[x, y], [x + size, y], [x + size, y + size], [x, y + size], [x, y]]
    properties: dict[str, Any] = {"objectType": "detection"}
    if like is not None:
        properties["measurements"] = {"similarity": round(float(value), 6)}
    else:
        number = int(value)
        name = "unknown" if number == UNKNOWN else names.get(number, "")
        name = name or ("noise" if number < 0 else f"cluster {number}")
        colour = UNKNOWN_COLOUR if number < 0 else COLOURS[number % len(COLOURS)]
        rgb = [colour >> 16, colour >> 8 & 0xFF, colour & 0xFF]
        properties["classification"] = {"name": name, "color": rgb}
    return {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": properties,
    }
