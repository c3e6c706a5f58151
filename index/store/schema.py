"""The catalog's schema as an ordered list of changes; ``user_version`` is how many were applied.

A change is never edited once it was released: a later one is added instead.
"""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Callable
from typing import Any

from ...errors import Damaged
from .packing import pack_coded, pack_numbers, pack_places, pack_texts, seal

_VERSION_1 = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE slides (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL UNIQUE,
    kind TEXT NOT NULL,
    source TEXT NOT NULL,
    features_file TEXT NOT NULL,
    features_sha256 TEXT NOT NULL,
    content_sha256 TEXT NOT NULL,
    tiles INTEGER NOT NULL,
    size_px_level0 INTEGER NOT NULL,
    mpp REAL,
    target_mpp REAL,
    width INTEGER NOT NULL,
    height INTEGER NOT NULL,
    label TEXT,
    patient TEXT,
    reason TEXT NOT NULL,
    added_at TEXT NOT NULL
);
CREATE TABLE tiles (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    slide_id INTEGER NOT NULL REFERENCES slides (id),
    row INTEGER NOT NULL,
    x INTEGER NOT NULL,
    y INTEGER NOT NULL,
    file TEXT,
    label TEXT,
    patient TEXT,
    UNIQUE (slide_id, row)
);
CREATE TABLE generations (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    revision INTEGER NOT NULL,
    file TEXT NOT NULL,
    sha256 TEXT NOT NULL,
    vectors INTEGER NOT NULL,
    created_at TEXT NOT NULL
);
CREATE TABLE clusterings (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL UNIQUE,
    method TEXT NOT NULL,
    about TEXT NOT NULL,
    file TEXT NOT NULL,
    sha256 TEXT NOT NULL,
    clusters INTEGER NOT NULL,
    revision INTEGER NOT NULL,
    created_at TEXT NOT NULL
);
CREATE TABLE assignments (
    clustering_id INTEGER NOT NULL REFERENCES clusterings (id),
    tile_id INTEGER NOT NULL REFERENCES tiles (id),
    cluster INTEGER NOT NULL,
    distance REAL NOT NULL,
    strength REAL NOT NULL,
    unknown INTEGER NOT NULL,
    PRIMARY KEY (clustering_id, tile_id)
) WITHOUT ROWID;
CREATE INDEX assignments_of_tile ON assignments (tile_id);
"""

_VERSION_2 = """
CREATE TABLE slide_tiles (
    slide_id INTEGER PRIMARY KEY REFERENCES slides (id) ON DELETE CASCADE,
    first_tile INTEGER NOT NULL,
    places BLOB NOT NULL,
    files BLOB,
    labels BLOB,
    patients BLOB,
    mosaic BLOB,
    seal BLOB NOT NULL
);
CREATE TABLE placements (
    clustering_id INTEGER NOT NULL REFERENCES clusterings (id) ON DELETE CASCADE,
    slide_id INTEGER NOT NULL REFERENCES slides (id) ON DELETE CASCADE,
    fitted INTEGER NOT NULL,
    cluster BLOB NOT NULL,
    distance BLOB NOT NULL,
    strength BLOB NOT NULL,
    unknown BLOB NOT NULL,
    seal BLOB NOT NULL,
    PRIMARY KEY (clustering_id, slide_id)
);
CREATE INDEX placements_of_slide ON placements (slide_id);
CREATE TABLE clusters (
    clustering_id INTEGER NOT NULL REFERENCES clusterings (id) ON DELETE CASCADE,
    cluster INTEGER NOT NULL,
    name TEXT NOT NULL,
    description TEXT NOT NULL,
    seal BLOB NOT NULL,
    PRIMARY KEY (clustering_id, cluster)
);
ALTER TABLE slides ADD COLUMN metadata TEXT NOT NULL DEFAULT '{}';
ALTER TABLE slides ADD COLUMN seal BLOB;
ALTER TABLE clusterings ADD COLUMN seal BLOB;
ALTER TABLE meta ADD COLUMN seal BLOB;
"""
_DROP_VERSION_1 = """
DROP TABLE assignments;
DROP TABLE tiles;
DROP TABLE generations;
CREATE TABLE generations (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    file TEXT NOT NULL,
    sha256 TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    raw_file TEXT,
    raw_sha256 TEXT,
    slides BLOB NOT NULL,
    vectors INTEGER NOT NULL,
    about TEXT NOT NULL,
    created_at TEXT NOT NULL,
    seal BLOB NOT NULL
);
"""


def _run(db: sqlite3.Connection, script: str) -> None:
    """Run statements one by one, inside the caller's transaction."""
    for statement in script.split(";\n"):
        if statement.strip():
            db.execute(statement)


def _version_1(db: sqlite3.Connection) -> None:
    """Slides, and a row per tile and per tile's cluster."""
    _run(db, _VERSION_1)


def _version_2(db: sqlite3.Connection) -> None:
    """Arrays per slide in the place of a row per tile; names of clusters; any column of metadata."""
    _run(db, _VERSION_2)
    last = db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'tiles'").fetchone()
    for (slide,) in db.execute("SELECT id FROM slides ORDER BY id").fetchall():
        _move_tiles(db, slide)
    db.execute(
        "INSERT INTO meta (key, value) VALUES ('next_tile', ?)",
        (str(int(last[0]) + 1 if last else 1),),
    )
    db.execute("INSERT INTO meta (key, value) VALUES ('atlas_id', ?)", (uuid.uuid4().hex,))
    _run(db, _DROP_VERSION_1)
    for table, key in (("slides", "id"), ("clusterings", "id"), ("meta", "key")):
        for row in _rows(db, f"SELECT * FROM {table}"):
            db.execute(f"UPDATE {table} SET seal = ? WHERE {key} = ?", (seal(row), row[key]))


def _rows(db: sqlite3.Connection, query: str, values: tuple[Any, ...] = ()) -> list[dict[str, Any]]:
    cursor = db.execute(query, values)
    names = [column[0] for column in cursor.description]
    return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]


def _insert(db: sqlite3.Connection, table: str, row: dict[str, Any]) -> None:
    sealed = {**row, "seal": seal(row)}
    marks = ", ".join("?" for _ in sealed)
    db.execute(
        f"INSERT INTO {table} ({', '.join(sealed)}) VALUES ({marks})", tuple(sealed.values())
    )


def _move_tiles(db: sqlite3.Connection, slide: int) -> None:
    tiles = _rows(db, "SELECT * FROM tiles WHERE slide_id = ? ORDER BY row", (slide,))
    ids = [tile["id"] for tile in tiles]
    first = ids[0] if ids else 0
    if ids != list(range(first, first + len(ids))):
        raise Damaged(
            f"tiles of slide {slide} are not numbered in one piece; build the atlas again from its "
            "feature files"
        )
    _insert(
        db,
        "slide_tiles",
        {
            "slide_id": slide,
            "first_tile": first,
            "places": pack_places([(t["x"], t["y"]) for t in tiles]),
            "files": pack_texts([t["file"] for t in tiles]),
            "labels": pack_coded([t["label"] for t in tiles]),
            "patients": pack_coded([t["patient"] for t in tiles]),
        },
    )
    for clustering in _rows(db, "SELECT id FROM clusterings ORDER BY id"):
        placed = _rows(
            db,
            "SELECT a.* FROM assignments AS a JOIN tiles AS t ON t.id = a.tile_id "
            "WHERE a.clustering_id = ? AND t.slide_id = ? ORDER BY t.row",
            (clustering["id"], slide),
        )
        if len(placed) == len(tiles):  # else they are placed anew at the next change
            kinds = {"cluster": "<i4", "distance": "<f4", "strength": "<f4", "unknown": "u1"}
            _insert(
                db,
                "placements",
                {
                    "clustering_id": clustering["id"],
                    "slide_id": slide,
                    "fitted": 1,
                    **{k: pack_numbers([p[k] for p in placed], kind) for k, kind in kinds.items()},
                },
            )


MIGRATIONS: tuple[Callable[[sqlite3.Connection], None], ...] = (_version_1, _version_2)
"""Schema changes in order."""
