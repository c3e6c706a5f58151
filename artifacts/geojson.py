"""GeoJSON as QuPath reads and writes it.

QuPath shows the scanned area of a slide (``openslide.bounds-*``) with (0, 0) at its corner. Its files use
these coordinates; everything else uses level-0 pixels, and :func:`moved` converts between the two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import BadInput, Damaged
from .files import read_json

Ring = NDArray[np.float64]
"""Corners (n, 2) of x, y in pixels; the last is joined to the first."""
Polygon = list[Ring]
"""An outline, then its holes."""
MAX_BYTES = 512 * 2**20


def read_features(path: Path) -> list[dict[str, Any]]:
    """Read the Features of a file: a FeatureCollection, a Feature, a list of Features, or a geometry.

    Raises:
        BadInput: the file is missing, too large or not JSON.
    """
    if path.is_file() and path.stat().st_size > MAX_BYTES:
        raise BadInput(f"{path} is larger than {MAX_BYTES:,} bytes; export only the regions")
    try:
        document = read_json(path)
    except Damaged as error:
        raise BadInput(
            f"{path} is not JSON ({error.__cause__}); expected GeoJSON, as QuPath exports annotations"
        ) from error
    return list(features_of(document))


def features_of(document: Any) -> Iterator[dict[str, Any]]:
    """Yield the Features of a JSON document; a bare geometry becomes a Feature without properties."""
    if isinstance(document, dict) and document.get("type") == "FeatureCollection":
        document = document.get("features")
    items = document if isinstance(document, list) else [document]
    for item in items:
        if isinstance(item, dict) and item.get("type") == "Feature":
            yield item
        elif isinstance(item, dict) and "coordinates" in item:
            yield {"geometry": item}


def properties_of(feature: dict[str, Any]) -> dict[str, Any]:
    """Return a Feature's properties; {} if it has none."""
    properties = feature.get("properties")
    return properties if isinstance(properties, dict) else {}


def class_of(feature: dict[str, Any]) -> str:
    """Return a Feature's class; QuPath writes a derived class as a list of names. "" for none."""
    classification = properties_of(feature).get("classification")
    if not isinstance(classification, dict):
        return ""
    names = classification.get("names")
    if isinstance(names, list):
        return ": ".join(map(str, names))
    return str(classification.get("name") or "")


def polygons_of(feature: dict[str, Any], source: str) -> list[Polygon]:
    """Return the polygons of a Feature; points and lines have none.

    Args:
        feature: the Feature.
        source: name of the file, for the message.

    Raises:
        BadInput: a polygon cannot be read.
    """
    try:
        return _polygons(feature.get("geometry") or {})
    except (
        TypeError,
        ValueError,
        KeyError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise BadInput(f"{source} has a polygon that cannot be read ({error})") from error


def _polygons(geometry: dict[str, Any]) -> list[Polygon]:
    kind = geometry.get("type")
    if kind == "GeometryCollection":
        return [p for part in geometry["geometries"] for p in _polygons(part)]
    if kind not in {"Polygon", "MultiPolygon"}:
        return []
    parts = [geometry["coordinates"]] if kind == "Polygon" else geometry["coordinates"]
    polygons = []
    for rings in parts:
        arrays = [np.asarray(ring, dtype=np.float64) for ring in rings]
        if not arrays:  # an empty geometry
            continue
        if any(ring.ndim != 2 or ring.shape[1] < 2 for ring in arrays):
            raise ValueError("a ring must be a list of points")
        arrays = [ring[:, :2] for ring in arrays]
        if any(len(ring) < 3 or not np.isfinite(ring).all() for ring in arrays):
            raise ValueError("a ring needs three points or more, all of them finite")
        polygons.append(arrays)
    return polygons


def moved(polygons: Sequence[Sequence[Ring]], x: float, y: float) -> list[Polygon]:
    """Return polygons with every point moved by (x, y) pixels."""
    return [[ring + (x, y) for ring in rings] for rings in polygons]


def inside(points: NDArray[Any], rings: Sequence[Any]) -> NDArray[np.bool_]:
    """Return which points (N, 2) are inside rings, by the even-odd rule: holes are outside."""
    x, y = np.asarray(points, dtype=np.float64).T
    found = np.zeros(len(x), dtype=bool)
    if not len(x) or not rings:
        return found
    starts = np.concatenate([np.asarray(ring, dtype=np.float64) for ring in rings])
    ends = np.concatenate([np.roll(np.asarray(ring, np.float64), -1, axis=0) for ring in rings])
    (x0, y0), (x1, y1) = starts.T, ends.T
    order = np.argsort(y, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(y[order])) + 1):  # tiles lie in rows
        level = y[rows[0]]
        n = np.flatnonzero((y0 > level) != (y1 > level))
        crossings = np.sort(x0[n] + (x1[n] - x0[n]) * (level - y0[n]) / (y1[n] - y0[n]))
        beyond = len(crossings) - np.searchsorted(crossings, x[rows], side="right")
        found[rows] = beyond % 2 == 1
    return found


def area_of(ring: Ring) -> float:
    """Return the area of a ring in square pixels."""
    x, y = ring[:, 0], ring[:, 1]
    following_x, following_y = np.roll(x, -1), np.roll(y, -1)
    return float(abs(np.dot(x, following_y) - np.dot(y, following_x)) / 2)


def polygon(rings: list[Any], properties: dict[str, Any]) -> dict[str, Any]:
    """Return a Feature whose geometry is a polygon: its outline, then its holes."""
    geometry = {"type": "Polygon", "coordinates": rings}
    return {"type": "Feature", "geometry": geometry, "properties": properties}


def square(x: int, y: int, side: int, properties: dict[str, Any]) -> dict[str, Any]:
    """Return a Feature whose geometry is a square with the top-left corner (x, y)."""
    ring = [[x, y], [x + side, y], [x + side, y + side], [x, y + side], [x, y]]
    return polygon([ring], properties)


def collection(features: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the document that holds Features."""
    return {"type": "FeatureCollection", "features": features}
