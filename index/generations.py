"""Generations: the FAISS index of each state of an atlas, derived from the feature files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import Damaged
from ..feature_files import parse_features
from ..files import sha256_file
from ..manifest import Manifest
from .catalog import Catalog, now
from .vectors import VectorIndex


class Generations:
    """Builds, stores and loads the index of an atlas; a stale or damaged one is built again."""

    def __init__(self, path: Path, catalog: Catalog, manifest: Manifest) -> None:
        """Serve the atlas in ``path``; nothing is loaded yet."""
        self._path, self._catalog, self._manifest = path, catalog, manifest
        self._index: VectorIndex | None = None
        self._index_revision = -1

    def vectors(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return tile ids (N,) ascending and vectors (N, D), from the feature files.

        Raises:
            Damaged: a feature file is missing or is not the one that was added.
        """
        with self._catalog.read() as db:
            slides = db.execute(
                "SELECT id, name, features_file, features_sha256, tiles FROM slides ORDER BY id"
            ).fetchall()
            ids = {
                s["id"]: [
                    r["id"]
                    for r in db.execute(
                        "SELECT id FROM tiles WHERE slide_id = ? ORDER BY row", (s["id"],)
                    )
                ]
                for s in slides
            }
        parts = [np.zeros((0, self._manifest.dim), dtype=np.float32)]
        for slide in slides:
            path = self._path / slide["features_file"]
            blob = path.read_bytes() if path.is_file() else b""
            if hashlib.sha256(blob).hexdigest() != slide["features_sha256"]:
                state = "is changed" if path.is_file() else "is missing"
                raise Damaged(
                    f"{path} of slide {slide['name']!r} {state}; restore it, or embed the slide again "
                    "into a new atlas"
                )
            parts.append(parse_features(blob, path).features)
        flat = [tile for slide in slides for tile in ids[slide["id"]]]
        return np.array(flat, dtype=np.int64), np.concatenate(parts)

    def _build(self) -> VectorIndex:
        ids, vectors = self.vectors()
        index = VectorIndex(self._manifest.dim, self._manifest.metric)
        index.add(ids, vectors)
        return index

    def revision(self) -> int:
        """Return how often the vectors were changed."""
        return int(self._catalog.meta()["revision"])

    def write(self) -> None:
        """Write the index of the current revision, unless there is a good one; drop older ones."""
        revision = self.revision()
        if self._stored(revision) is not None:
            return
        index = self._build()
        rows = self._catalog.rows("SELECT COALESCE(MAX(id), 0) AS last FROM generations")
        file = f"index-{int(rows[0]['last']) + 1}.faiss"
        index.save(self._path / file)
        digest = sha256_file(self._path / file)
        with self._catalog.write() as db:
            db.execute("DELETE FROM generations")
            db.execute(
                "INSERT INTO generations (revision, file, sha256, vectors, created_at) "
                "VALUES (?, ?, ?, ?, ?)",
                (revision, file, digest, len(index), now()),
            )
        for old in self._path.glob("index-*.faiss"):
            if old.name != file:
                old.unlink(missing_ok=True)

    def _stored(self, revision: int) -> VectorIndex | None:
        rows = self._catalog.rows(
            "SELECT file, sha256 FROM generations WHERE revision = ? ORDER BY id DESC", (revision,)
        )
        for row in rows:
            path = self._path / row["file"]
            try:
                if path.is_file() and sha256_file(path) == row["sha256"]:
                    return VectorIndex.load(path, self._manifest.dim, self._manifest.metric)
            except (Damaged, OSError):
                continue  # derived: rebuilt from the features below
        return None

    def current(self) -> VectorIndex:
        """Return the index of the current revision, rebuilt in memory if the stored one is stale."""
        revision = self.revision()
        if self._index is None or self._index_revision != revision:
            self._index = self._stored(revision) or self._build()
            self._index_revision = revision
        return self._index
