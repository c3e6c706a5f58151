"""GeoJSON as QuPath reads and writes it: read annotations, write tissue outlines and tiles.

QuPath shows the scanned area of a slide (``openslide.bounds-*``) with (0, 0) at its corner. Files use
these coordinates; everything else uses level-0 pixels, and :func:`moved` converts between the two.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ...artifacts.files import read_json, write_atomic
from ...errors import BadInput, Damaged
from .tissue import Mask

Ring = NDArray[np.float64]
MAX_BYTES = 512 * 2**20


def read_annotations(path: Path, classes: Sequence[str] = ()) -> list[list[Ring]]:
    """Read polygons from a GeoJSON file, as QuPath exports them.

    Args:
        path: a FeatureCollection, a Feature, or a list of Features.
        classes: keep only annotations of these classes; all when empty.

    Returns:
        For each polygon its rings, (n, 2) of x, y in pixels in QuPath's coordinates as in the file, outline
        first, then holes.

    Raises:
        BadInput: the file is missing, too large or not GeoJSON, or has no polygon (of the classes).
    """
    if path.is_file() and path.stat().st_size > MAX_BYTES:
        raise BadInput(f"{path} is larger than {MAX_BYTES:,} bytes; export only the regions")
    try:
        document = read_json(path)
    except Damaged as error:
        raise BadInput(str(error)) from error
    polygons: list[list[Ring]] = []
    seen: set[str] = set()
    for feature in _features(document):
        name = _class_of(feature)
        seen.add(name)
        if classes and name not in classes:
            continue
        try:
            polygons += _polygons(feature.get("geometry") or {})
        except (TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
            raise BadInput(f"{path} has a polygon that cannot be read ({error})") from error
    if not polygons:
        present = ", ".join(sorted(filter(None, seen))) or "none"
        required = f" of class {', '.join(classes)}" if classes else ""
        raise BadInput(f"{path} has no polygon{required}; classes in it: {present}")
    return polygons


def moved(polygons: Sequence[Sequence[Ring]], x: float, y: float) -> list[list[Ring]]:
    """Return polygons with every point moved by (x, y) pixels."""
    return [[ring + (x, y) for ring in rings] for rings in polygons]


def _class_of(feature: dict[str, Any]) -> str:
    """Return an annotation's class; QuPath writes a derived class as a list of names."""
    properties = feature.get("properties")
    classification = properties.get("classification") if isinstance(properties, dict) else None
    if not isinstance(classification, dict):
        return ""
    names = classification.get("names")
    if isinstance(names, list):
        return ": ".join(map(str, names))
    return str(classification.get("name", ""))


def _features(document: Any) -> Iterator[dict[str, Any]]:
    if isinstance(document, dict) and document.get("type") == "FeatureCollection":
        document = document.get("features")
    items = document if isinstance(document, list) else [document]
    for item in items:
        if isinstance(item, dict) and item.get("type") == "Feature":
            yield item
        elif isinstance(item, dict) and "coordinates" in item:
            yield {"geometry": item}


def _polygons(geometry: dict[str, Any]) -> list[list[Ring]]:
    kind = geometry.get("type")
    if kind == "GeometryCollection":
        return [p for part in geometry["geometries"] for p in _polygons(part)]
    if kind not in {"Polygon", "MultiPolygon"}:
        return []  # points and lines have no area
    parts = [geometry["coordinates"]] if kind == "Polygon" else geometry["coordinates"]
    polygons = []
    for rings in parts:
        arrays = [np.asarray(ring, dtype=np.float64) for ring in rings]
        if any(ring.ndim != 2 or ring.shape[1] < 2 for ring in arrays):
            raise ValueError("a ring must be a list of points")
        arrays = [ring[:, :2] for ring in arrays]
        if any(len(ring) < 3 or not np.isfinite(ring).all() for ring in arrays):
            raise ValueError("a ring needs three points or more, all of them finite")
        polygons.append(arrays)
    return polygons


def draw_mask(polygons: Sequence[Sequence[Ring]], size: tuple[int, int], down: float) -> Mask:
    """Return True inside the polygons on an image of (width, height), ``down`` times smaller."""
    plain = Image.new("1", size)
    mask = np.zeros((size[1], size[0]), dtype=bool)
    for rings in polygons:
        holes = len(rings) > 1  # draw apart, so that the holes are not cut out of other polygons
        sheet = Image.new("1", size) if holes else plain
        pen = ImageDraw.Draw(sheet)
        for number, ring in enumerate(rings):
            points = np.clip(ring / down, -1e6, 1e6)
            pen.polygon([(x, y) for x, y in points], fill=0 if number else 1)
        if holes:
            mask |= np.asarray(sheet)
    mask |= np.asarray(plain)
    return mask


def outlines(mask: Mask, down: float) -> list[list[Ring]]:
    """Return the polygons and holes of a mask (H, W) in level-0 pixels: ``down`` per pixel of the mask."""
    from skimage.measure import find_contours, label, regionprops

    polygons = []
    for region in regionprops(label(mask, connectivity=1)):
        top, left = region.bbox[:2]
        padded = np.pad(region.image, 1).astype(np.float64)
        rings = sorted(find_contours(padded, 0.5), key=_area, reverse=True)
        polygons.append([(ring[:, ::-1] + (left - 0.5, top - 0.5)) * down for ring in rings])
    return polygons


def _area(ring: Ring) -> float:
    y, x = ring[:, 0], ring[:, 1]
    return float(abs(np.dot(x[:-1], y[1:]) - np.dot(x[1:], y[:-1])) / 2)


def write_tissue(path: Path, polygons: Sequence[Sequence[Ring]]) -> None:
    """Write tissue outlines as QuPath annotations of class ``Tissue``."""
    properties = {"objectType": "annotation", "classification": {"name": "Tissue"}}
    rounded = ([np.round(ring, 1).tolist() for ring in rings] for rings in polygons)
    _write(path, [_feature(rings, properties) for rings in rounded])


def write_tiles(path: Path, coords: NDArray[np.int64], side: int) -> None:
    """Write tiles, (N, 2) top-left x, y in QuPath's frame and their side, as QuPath tiles, by row."""
    features = []
    for row, (x, y) in enumerate(coords.tolist()):
        ring = [[x, y], [x + side, y], [x + side, y + side], [x, y + side], [x, y]]
        features.append(_feature([ring], {"objectType": "tile", "name": str(row)}))
    _write(path, features)


def _feature(rings: list[Any], properties: dict[str, Any]) -> dict[str, Any]:
    geometry = {"type": "Polygon", "coordinates": rings}
    return {"type": "Feature", "geometry": geometry, "properties": properties}


def _write(path: Path, features: list[dict[str, Any]]) -> None:
    document = {"type": "FeatureCollection", "features": features}
    write_atomic(path, json.dumps(document, separators=(",", ":")))
