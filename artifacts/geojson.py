"""Builds GeoJSON as QuPath reads it."""

from __future__ import annotations

from typing import Any


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
