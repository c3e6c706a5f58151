"""Where every tile of an atlas lies on its map, kept in a file so that only new slides are placed."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from ... import stopping
from ...artifacts.files import write_atomic
from ...errors import StorageFailed
from ..store.store import Store
from .layout import Layout

FILE = "map-places.npz"
GRID = 65_535
"""Coordinates are whole numbers from 0 to this, for -1 to 1 of the layout."""
Grid = NDArray[np.uint16]


@dataclass(frozen=True)
class Places:
    """The tiles of an atlas on its map.

    Attributes:
        ids: (N,) ids of all tiles, ascending.
        places: (N, 2) coordinates x, y from 0 to :data:`GRID`.
        revision: of the atlas.
    """

    ids: NDArray[np.int64]
    places: Grid
    revision: int


def on_grid(points: NDArray[np.floating[Any]]) -> Grid:
    """Return coordinates from -1 to 1 as whole numbers from 0 to :data:`GRID`."""
    grid: Grid = np.round((np.clip(points, -1, 1) + 1) / 2 * GRID).astype(np.uint16)
    return grid


def places_of(store: Store, layout: Layout, progress: Callable[[int, int], None]) -> Places:
    """Place every tile of an atlas; slides that are in the file keep their places.

    Args:
        store: the atlas's folder.
        layout: the map.
        progress: called with the number of tiles placed and in all.

    Raises:
        Damaged: a feature file is missing or has changed since it was added.
    """
    revision = store.catalog.revision()
    slides = store.tile_ranges()
    key = _key(layout)
    known = _read(store.path / FILE, key)
    total, done, new = sum(slide["tiles"] for slide in slides), 0, False
    parts, ids = [np.zeros((0, 2), np.uint16)], [np.zeros(0, np.int64)]
    for slide in slides:
        stopping.check()
        part = known.get(slide["id"])
        if part is None or len(part) != slide["tiles"]:
            part, new = on_grid(layout.place(store.vectors_of(slide))), True
        done += len(part)
        progress(done, total)
        parts.append(part)
        ids.append(np.arange(slide["first_tile"], slide["first_tile"] + slide["tiles"]))
    places = np.concatenate(parts)
    if new or len(known) != len(slides):
        # If the folder cannot be written, the tiles are placed again next time.
        with suppress(StorageFailed):
            _write(store.path / FILE, key, slides, places)
    return Places(np.concatenate(ids).astype(np.int64), places, revision)


def _key(layout: Layout) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(layout.points).data)
    digest.update(np.ascontiguousarray(layout.landmarks).data)
    return digest.hexdigest()


def _read(path: Path, key: str) -> dict[int, Grid]:
    """Return the stored places by slide id; {} if the file is missing, damaged or of another map."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            same = str(arrays["key"]) == key
            slides, tiles, places = arrays["slides"], arrays["tiles"], arrays["places"]
    except (OSError, ValueError, KeyError, BadZipFile, EOFError):
        return {}
    if not same or places.shape != (int(tiles.sum()), 2) or places.dtype != np.uint16:
        return {}
    parts = np.split(places, np.cumsum(tiles)[:-1])
    return dict(zip(slides.tolist(), parts, strict=False))


def _write(path: Path, key: str, slides: list[dict[str, Any]], places: Grid) -> None:
    buffer = io.BytesIO()
    np.savez(
        buffer,
        key=np.array(key),
        slides=np.array([slide["id"] for slide in slides], np.int64),
        tiles=np.array([slide["tiles"] for slide in slides], np.int64),
        places=places,
    )
    write_atomic(path, buffer.getvalue())
