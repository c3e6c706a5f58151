"""Annotations as masks, and tissue outlines and tiles as GeoJSON for QuPath."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ...artifacts.files import write_atomic
from ...artifacts.geojson import (
    Ring,
    area_of,
    class_of,
    collection,
    polygon,
    polygons_of,
    read_features,
    square,
)  # fmt: skip
from ...errors import BadInput
from .tissue import Mask


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
    polygons: list[list[Ring]] = []
    seen: set[str] = set()
    for feature in read_features(path):
        name = class_of(feature)
        seen.add(name)
        if not classes or name in classes:
            polygons += polygons_of(feature, str(path))
    if not polygons:
        present = ", ".join(sorted(filter(None, seen))) or "none"
        required = f" of class {', '.join(classes)}" if classes else ""
        raise BadInput(f"{path} has no polygon{required}; classes in it: {present}")
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
        rings = sorted(find_contours(padded, 0.5), key=area_of, reverse=True)
        polygons.append([(ring[:, ::-1] + (left - 0.5, top - 0.5)) * down for ring in rings])
    return polygons


def write_tissue(path: Path, polygons: Sequence[Sequence[Ring]]) -> None:
    """Write tissue outlines as QuPath annotations of class ``Tissue``."""
    properties = {"objectType": "annotation", "classification": {"name": "Tissue"}}
    rounded = ([np.round(ring, 1).tolist() for ring in rings] for rings in polygons)
    _write(path, [polygon(rings, properties) for rings in rounded])


def write_tiles(
    path: Path, coords: NDArray[np.int64], side: int, faults: Sequence[str] | None = None
) -> None:
    """Write tiles as QuPath tiles, numbered by row; left-out tiles have their fault as class.

    Args:
        path: the file.
        coords: (N, 2) top-left x, y in QuPath's frame.
        side: side of a tile.
        faults: why each tile was left out; "" for an embedded tile.
    """
    squares, row = [], 0
    for (x, y), fault in zip(coords.tolist(), faults or [""] * len(coords), strict=True):
        properties: dict[str, Any] = {"objectType": "tile", "name": str(row)}
        if fault:
            properties = {
                "objectType": "tile",
                "name": f"left out: {fault}",
                "classification": {"name": f"Left out: {fault}"},
            }
        else:
            row += 1
        squares.append(square(x, y, side, properties))
    _write(path, squares)


def _write(path: Path, features: list[dict[str, Any]]) -> None:
    write_atomic(path, json.dumps(collection(features), separators=(",", ":")))
