"""Stored clusterings: rows in the catalog and arrays in a file, replaced in one step."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...artifacts.files import sha256_file, write_atomic
from ...errors import BadInput, Damaged, unknown_name
from ..store.catalog import Catalog, insert, now, update
from ..store.packing import SEAL, pack_numbers, unpack_numbers
from .clustering import Assigned, Clustering

KINDS = {"cluster": "<i4", "distance": "<f4", "strength": "<f4", "unknown": "u1"}


def store(
    path: Path,
    catalog: Catalog,
    name: str,
    clustering: Clustering,
    revision: int,
    assigned: Iterable[tuple[int, Assigned]],
) -> int:
    """Store a clustering with the assignment of every tile, replacing an earlier one of that name.

    The file gets a new name and the rows are written last, so that a crash leaves the earlier one intact.

    Args:
        path: the atlas.
        catalog: its catalog.
        name: of the clustering.
        clustering: the fitted clustering.
        revision: of the state that it was fitted on.
        assigned: slide ids, each with the assignments of its tiles.

    Returns:
        The number of user-given names that were dropped, because the clusters have changed.
    """
    file, digest = _write(path, name, clustering)
    row = {
        "name": name,
        "method": clustering.method,
        "about": json.dumps(clustering.about),
        "file": file,
        "sha256": digest,
        "clusters": clustering.clusters,
        "revision": revision,
        "created_at": now(),
    }
    with catalog.write() as db:
        old = db.execute("SELECT id, sha256 FROM clusterings WHERE name = ?", (name,)).fetchone()
        given = [] if old is None else _names(db, old["id"])
        kept = given if old is not None and old["sha256"] == digest else []  # identical clusters
        db.execute("DELETE FROM clusterings WHERE name = ?", (name,))
        number = insert(db, "clusterings", row)
        for cluster in kept:
            insert(db, "clusters", {**cluster, "clustering_id": number})
        for slide, of_tiles in assigned:
            insert_placement(db, number, slide, of_tiles, fitted=True)
    remove_orphans(path, catalog)
    return len(given) - len(kept)


def _names(db: sqlite3.Connection, clustering: int) -> list[dict[str, Any]]:
    rows = db.execute("SELECT * FROM clusters WHERE clustering_id = ?", (clustering,)).fetchall()
    return [{k: v for k, v in dict(row).items() if k != SEAL} for row in rows]


def _write(path: Path, name: str, clustering: Clustering) -> tuple[str, str]:
    """Write the arrays to a file named by their content; return its name and sha256."""
    blob = clustering.to_bytes()
    digest = hashlib.sha256(blob).hexdigest()
    file = f"clusters-{name}.{digest[:12]}.npz"
    write_atomic(path / file, blob)
    return file, digest


def replace_file(path: Path, catalog: Catalog, row: dict[str, Any], clustering: Clustering) -> None:
    """Replace a lost or damaged file of a clustering."""
    file, digest = _write(path, row["name"], clustering)
    with catalog.write() as db:
        update(db, "clusterings", {"id": row["id"]}, {"file": file, "sha256": digest})
    remove_orphans(path, catalog)


def remove_orphans(path: Path, catalog: Catalog) -> None:
    """Delete files of clusterings that no row names."""
    named = {row["file"] for row in catalog.rows("SELECT file FROM clusterings")}
    for stale in path.glob("clusters-*.npz"):
        if stale.name not in named:
            stale.unlink(missing_ok=True)


def insert_placement(
    db: sqlite3.Connection, clustering: int, slide: int, assigned: Assigned, fitted: bool
) -> None:
    """Insert the assignments of a slide's tiles; ``fitted`` if the clustering was fitted on this slide."""
    columns = {key: pack_numbers(getattr(assigned, key), kind) for key, kind in KINDS.items()}
    row = {"clustering_id": clustering, "slide_id": slide, "fitted": int(fitted), **columns}
    insert(db, "placements", row)


def placements(db: sqlite3.Connection, name: str) -> dict[int, tuple[Assigned, bool]]:
    """Return, by slide id, the assignments of its tiles and whether the clustering was fitted on it."""
    rows = db.execute(
        "SELECT p.* FROM placements AS p JOIN clusterings AS c ON c.id = p.clustering_id "
        "WHERE c.name = ?",
        (name,),
    ).fetchall()
    by_slide = {}
    for row in rows:
        columns = {key: unpack_numbers(row[key], kind) for key, kind in KINDS.items()}
        columns["unknown"] = columns["unknown"].astype(bool)
        by_slide[row["slide_id"]] = Assigned(**columns), bool(row["fitted"])
    return by_slide


def stored(catalog: Catalog) -> list[dict[str, Any]]:
    """Return the catalog's rows of the clusterings, newest first."""
    return [dict(row) for row in catalog.rows("SELECT * FROM clusterings ORDER BY id DESC")]


def row_of(path: Path, rows: Sequence[Mapping[str, Any]], name: str | None) -> Mapping[str, Any]:
    """Return the row of a clustering by name; None for the newest.

    Raises:
        BadInput: there is no clustering.
        NotFound: there is no clustering of that name.
    """
    if not rows:
        raise BadInput(f"{path} has no clusters yet; run `histoseek index fit` first")
    for row in rows:
        if name is None or row["name"] == name:
            return row
    raise unknown_name("clustering", str(name), [row["name"] for row in rows])


def load(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    name: str | None,
    cache: dict[str, Clustering],
) -> tuple[str, Clustering]:
    """Return a clustering by name; None for the newest.

    Args:
        path: the atlas.
        rows: of the clusterings; see :func:`stored`.
        name: of the clustering.
        cache: clusterings by sha256; read and filled.

    Raises:
        BadInput: there is no clustering.
        NotFound: there is no clustering of that name.
        Damaged: its file is missing or has changed.
    """
    row = row_of(path, rows, name)
    clustering = cache.get(row["sha256"])
    if clustering is None:
        file = path / row["file"]
        if not file.is_file() or sha256_file(file) != row["sha256"]:
            raise Damaged(
                f"{file} is missing or has changed; fit the clustering {row['name']!r} again"
            )
        about: dict[str, Any] = json.loads(row["about"])
        clustering = Clustering.from_bytes(row["method"], file.read_bytes(), about)
        for stale in set(cache) - {other["sha256"] for other in rows}:
            cache.pop(stale, None)
        cache[row["sha256"]] = clustering
    return row["name"], clustering
