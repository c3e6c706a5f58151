"""Stored clusterings: rows in the catalog beside arrays in a file, replaced in one step."""

from __future__ import annotations

import json
import sqlite3
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import BadInput, Damaged, unknown_name
from ..files import sha256_file, write_atomic
from .catalog import Catalog, insert, now
from .clusters import Assigned, Clustering


def store(
    path: Path,
    catalog: Catalog,
    name: str,
    clustering: Clustering,
    revision: int,
    ids: NDArray[np.int64],
    placed: Assigned,
) -> None:
    """Store a clustering with the place of every tile, replacing an earlier one of that name.

    The file has a name of its own and the row goes last, so that a crash leaves the earlier one whole.
    """
    file = f"clusters-{name}.{time.time_ns():x}.npz"
    write_atomic(path / file, clustering.to_bytes())
    row = {
        "name": name,
        "method": clustering.method,
        "about": json.dumps(clustering.about),
        "file": file,
        "sha256": sha256_file(path / file),
        "clusters": clustering.clusters,
        "revision": revision,
        "created_at": now(),
    }
    with catalog.write() as db:
        old = db.execute("SELECT id FROM clusterings WHERE name = ?", (name,)).fetchone()
        if old is not None:
            db.execute("DELETE FROM assignments WHERE clustering_id = ?", (old["id"],))
            db.execute("DELETE FROM clusterings WHERE id = ?", (old["id"],))
        insert_assignments(db, insert(db, "clusterings", row), ids, placed)
    named = {row["file"] for row in catalog.rows("SELECT file FROM clusterings")}
    for stale in path.glob("clusters-*.npz"):
        if stale.name not in named:
            stale.unlink(missing_ok=True)


def insert_assignments(
    db: sqlite3.Connection, clustering: int, ids: NDArray[np.int64], placed: Assigned
) -> None:
    """Insert the places of tiles ``ids`` (N,), in the caller's transaction."""
    columns = (placed.cluster, placed.distance, placed.strength, placed.unknown)
    rows = zip(ids.tolist(), *(column.tolist() for column in columns), strict=True)
    db.executemany(
        "INSERT INTO assignments VALUES (?, ?, ?, ?, ?, ?)", ((clustering, *r) for r in rows)
    )


def load(path: Path, catalog: Catalog, name: str | None) -> tuple[str, Clustering]:
    """Return a clustering by name; the newest when left out.

    Raises:
        BadInput: none fitted yet, or none of that name.
        Damaged: its file is missing or changed.
    """
    rows = catalog.rows("SELECT * FROM clusterings ORDER BY id DESC")
    if not rows:
        raise BadInput(f"{path} has no clusters yet; run `histoseek index fit` first")
    chosen = [row for row in rows if name is None or row["name"] == name]
    if not chosen:
        raise unknown_name("clustering", str(name), [row["name"] for row in rows])
    row = chosen[0]
    file = path / row["file"]
    if not file.is_file() or sha256_file(file) != row["sha256"]:
        raise Damaged(f"{file} is missing or changed; fit clustering {row['name']!r} again")
    about: dict[str, Any] = json.loads(row["about"])
    return row["name"], Clustering.from_bytes(row["method"], file.read_bytes(), about)
