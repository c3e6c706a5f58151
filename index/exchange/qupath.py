"""Writes tiles and clusters as GeoJSON for QuPath."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...artifacts.feature_files import read_about
from ...artifacts.files import publish_folder, write_atomic
from ...artifacts.geojson import collection, square
from ...errors import BadInput
from ..search.columns import Coded
from ..search.tiles import allowed
from ..store.rows import plain_name
from ..vectors.scan import prepared
from ..view import View
from .table import Table

COLOURS = (0x4C78A8, 0xF58518, 0xE45756, 0x72B7B2, 0x54A24B, 0xEECA3B, 0xB279A2, 0xFF9DA6, 0x9D755D)
UNKNOWN_COLOUR = 0x9E9E9E


def write_geojson(
    view: View, table: Table, out: Path, clustering: str | None = None, like: int | None = None
) -> int:
    """Write a folder with ``<slide>.geojson``: tiles as detections with their cluster or similarity.

    Coordinates are QuPath's: (0, 0) is the top-left corner of the scanned area.
    """
    properties = (
        _clusters(view, table, clustering) if like is None else _similarities(view, table, like)
    )
    slides = table.columns["slide"]
    assert isinstance(slides, Coded)
    drawn = np.flatnonzero(table.numbers("size_px_level0") > 0)
    if not len(drawn):
        raise BadInput(
            "no tile has a size on its slide: tile sets have no coordinates, and CLAM's files have no tile "
            "size (import them again with --tile-px)"
        )
    order = drawn[np.argsort(slides.codes[drawn], kind="stable")]
    corners = origins(view)
    parts = np.split(order, np.flatnonzero(np.diff(slides.codes[order])) + 1)
    x, y, side = (table.numbers(key) for key in ("x", "y", "size_px_level0"))
    shown = [slides.names[int(slides.codes[rows[0]])] for rows in parts]
    names = file_names(shown)
    with publish_folder(out) as folder:
        for slide, rows in zip(shown, parts, strict=True):
            left, top = corners.get(slide) or (0, 0)
            squares = [
                square(int(x[row]) - left, int(y[row]) - top, int(side[row]), properties(row))
                for row in rows.tolist()
            ]
            write_atomic(
                folder / f"{names[slide]}.geojson",
                json.dumps(collection(squares), ensure_ascii=False),
            )
    return len(drawn)


def file_names(slides: Iterable[str]) -> dict[str, str]:
    """Return a safe and distinct file name for each slide, without ending."""
    names: dict[str, str] = {}
    for slide in slides:
        name = plain_name(slide)
        if name in names.values():
            name = f"{name[:80]}-{hashlib.sha256(slide.encode()).hexdigest()[:8]}"
        names[slide] = name
    return names


def origins(view: View, where: str | None = None) -> dict[str, tuple[int, int] | None]:
    """Return, by slide, the top-left corner of the scanned area (level-0 pixels), which is QuPath's (0, 0).

    It is None if the feature file lacks it: files of other tools and of older versions do. With a filter,
    slides without a tile that passes are left out.
    """
    passing = allowed(view.state, where)
    starts = view.columns.starts
    corners: dict[str, tuple[int, int] | None] = {}
    for number, slide in enumerate(view.columns.slides):
        rows = slice(int(starts[number]), int(starts[number + 1]))
        if slide["kind"] != "slide" or (passing is not None and not passing[rows].any()):
            continue
        corners[slide["name"]] = _corner(view, slide)
    return corners


def origin(view: View, slide: str) -> tuple[int, int] | None:
    """Return QuPath's (0, 0) on one slide; see :func:`origins`."""
    rows = [row for row in view.columns.slides if row["name"] == slide]
    return _corner(view, rows[0]) if rows and rows[0]["kind"] == "slide" else None


def _corner(view: View, slide: Mapping[str, Any]) -> tuple[int, int] | None:
    about = read_about(view.state.store.path / slide["features_file"]) or {}
    bounds = about.get("bounds") or [0, 0]
    return (int(bounds[0]), int(bounds[1])) if "bounds" in about else None


def without_size(view: View, where: str | None = None) -> dict[str, int]:
    """Return, by slide, the number of tiles without a size on the slide; these cannot be drawn."""
    passing = allowed(view.state, where)
    columns = view.columns
    counts = {}
    for number, slide in enumerate(columns.slides):
        rows = slice(int(columns.starts[number]), int(columns.starts[number + 1]))
        count = slide["tiles"] if passing is None else int(passing[rows].sum())
        if slide["name"] and not slide["size_px_level0"] and count:
            counts[slide["name"]] = count
    return counts


def _similarities(view: View, table: Table, like: int) -> Callable[[int], dict[str, Any]]:
    """Return the properties of a row, with its similarity to a tile."""
    metric = view.state.metric
    query = prepared(view.vectors_of([like]), metric)[0]
    vectors = prepared(table.vectors, metric)
    cosine = metric == "cosine"
    scores = vectors @ query if cosine else -np.linalg.norm(vectors - query, axis=1)
    return lambda row: {
        "objectType": "detection",
        "measurements": {"similarity": round(float(scores[row]), 6)},
    }


def _clusters(view: View, table: Table, clustering: str | None) -> Callable[[int], dict[str, Any]]:
    """Return the properties of a row, with the name and colour of its cluster."""
    chosen, _ = view.clustering(clustering)
    names = view.cluster_names(chosen)
    clusters, unknown = table.numbers(f"cluster.{chosen}"), table.numbers(f"unknown.{chosen}")

    def properties(row: int) -> dict[str, Any]:
        cluster = int(clusters[row])
        drawn = cluster >= 0 and not unknown[row]
        default = f"cluster {cluster}" if drawn else "noise"
        name = "unknown" if unknown[row] else names.get(cluster, "") or default
        colour = COLOURS[cluster % len(COLOURS)] if drawn else UNKNOWN_COLOUR
        rgb = [colour >> 16, colour >> 8 & 0xFF, colour & 0xFF]
        return {"objectType": "detection", "classification": {"name": name, "color": rgb}}

    return properties
