"""Quality of the tiles in the catalog: one blob per slide, for slides whose features state it."""

from __future__ import annotations

import sqlite3

import numpy as np
from numpy.typing import NDArray

from ...artifacts.feature_files import QUALITY
from ...errors import Damaged
from .catalog import insert
from .packing import REMEDY, pack_numbers, unpack_numbers
from .schema import has_table

TABLE = "tile_quality"
BYTES = 2 * len(QUALITY)
"""Bytes of the measures of one tile."""
MOST = 60_000.0
"""Largest stored measure; more does not fit into 16 bits."""


def store(db: sqlite3.Connection, slide: int, quality: NDArray[np.float32]) -> None:
    """Store the quality (N, Q) of a slide's tiles, by slide id, in the caller's transaction."""
    db.execute(f"DELETE FROM {TABLE} WHERE slide_id = ?", (slide,))
    insert(
        db,
        TABLE,
        {"slide_id": slide, "quality": pack_numbers(np.clip(quality, -MOST, MOST), "<f2")},
    )


def slides_with(db: sqlite3.Connection) -> frozenset[int]:
    """Return the ids of the slides whose tiles have a quality."""
    if not has_table(db, TABLE):
        return frozenset()
    return frozenset(row["slide_id"] for row in db.execute(f"SELECT slide_id FROM {TABLE}"))


def unpack(blob: bytes) -> NDArray[np.float32]:
    """Decode what :func:`store` stored: (N, Q)."""
    numbers = unpack_numbers(blob, "<f2")
    if len(numbers) % len(QUALITY):
        raise Damaged(f"the quality of tiles in the atlas's database is incomplete; {REMEDY}")
    rows: NDArray[np.float32] = numbers.reshape(-1, len(QUALITY)).astype(np.float32)
    return rows
