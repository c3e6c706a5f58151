"""The catalog's schema, and the changes to it since its release, in order.

``user_version`` of the database is the number of the schema. A released migration is never edited:
append another one to :data:`MIGRATIONS` instead.
"""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Callable

FIRST = 2
"""Number of the schema that :func:`create` creates. Schema 1 was never released."""
_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL, seal BLOB) WITHOUT ROWID;
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
    added_at TEXT NOT NULL,
    metadata TEXT NOT NULL DEFAULT '{}',
    seal BLOB
);
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
CREATE TABLE clusterings (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL UNIQUE,
    method TEXT NOT NULL,
    about TEXT NOT NULL,
    file TEXT NOT NULL,
    sha256 TEXT NOT NULL,
    clusters INTEGER NOT NULL,
    revision INTEGER NOT NULL,
    created_at TEXT NOT NULL,
    seal BLOB
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
"""


def _add_annotations(db: sqlite3.Connection) -> None:
    db.execute(
        """CREATE TABLE annotations (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    slide_id INTEGER NOT NULL REFERENCES slides (id) ON DELETE CASCADE,
    uuid TEXT NOT NULL UNIQUE,
    label TEXT NOT NULL,
    note TEXT NOT NULL,
    polygons TEXT NOT NULL,
    author TEXT NOT NULL,
    created_at TEXT NOT NULL,
    changed_at TEXT NOT NULL,
    seal BLOB NOT NULL
)"""
    )
    db.execute("CREATE INDEX annotations_of_slide ON annotations (slide_id)")


def _add_quality(db: sqlite3.Connection) -> None:
    db.execute(
        """CREATE TABLE tile_quality (
    slide_id INTEGER PRIMARY KEY REFERENCES slides (id) ON DELETE CASCADE,
    quality BLOB NOT NULL,
    seal BLOB NOT NULL
)"""
    )


MIGRATIONS: tuple[Callable[[sqlite3.Connection], None], ...] = (_add_annotations, _add_quality)
"""Changes since schema :data:`FIRST`, in order."""


def create(db: sqlite3.Connection) -> dict[str, str]:
    """Create the first schema in an empty database, in the caller's transaction.

    Returns:
        The first rows of the table ``meta``: an identity for the atlas, and the next tile id.
    """
    for statement in _SCHEMA.split(";\n"):
        if statement.strip():
            db.execute(statement)
    return {"atlas_id": uuid.uuid4().hex, "next_tile": "1"}


def has_table(db: sqlite3.Connection, name: str) -> bool:
    """Whether the atlas has a table; an atlas that cannot be written keeps an older schema."""
    found = db.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (name,)).fetchone()
    return found is not None


def newest() -> int:
    """Return the number of the newest schema."""
    return FIRST + len(MIGRATIONS)
