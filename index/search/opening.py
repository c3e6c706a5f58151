"""Opens the newest committed state of an atlas from one catalog transaction and the index file."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from sqlite3 import Row
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import Damaged
from ..store import annotation, quality
from ..store.catalog import REVISION, get_meta
from ..store.store import StateGone, Store
from ..store.uploads import source_now
from ..vectors.generations import Generations
from ..vectors.index import VectorIndex
from ..vectors.scan import prepared
from .columns import Columns, StoredColumn
from .state import State
from .tile_rows import clusters_in, places_in, quality_in

GONE = -(2**62)
"""First tile id of a removed slide; no real tile has such an id."""


@dataclass(frozen=True)
class _Rows:
    """The rows that one transaction read from the catalog."""

    revision: int
    slides: list[dict[str, Any]]
    generation: dict[str, Any] | None
    placements: dict[str, StoredColumn]
    clusterings: list[dict[str, Any]]
    cluster_names: dict[str, dict[int, str]]
    annotations: list[Row]
    with_quality: frozenset[int]


class States:
    """Opens states of an atlas; keeps the newest state and the parts that the next one can reuse."""

    def __init__(self, store: Store, generations: Generations) -> None:
        """Use the store and index files of an atlas; nothing is loaded yet."""
        self._store, self._generations = store, generations
        self._lock = threading.Lock()
        self._newest: State | None = None
        self._recent: dict[int, NDArray[np.float32]] = {}

    def newest(self) -> State:
        """Return the newest committed state; the same object as before if nothing changed.

        Raises:
            Damaged: a slide is not in the index file, and its feature file is missing or changed.
        """
        state, revision = self._newest, self._store.catalog.revision()
        if state is not None and state.revision == revision:
            return state
        with self._lock:
            state = self._newest
            if state is not None and state.revision == self._store.catalog.revision():
                return state  # another thread has opened it meanwhile
            self._newest = self._store.retry_if_changed(lambda: self._open(self._read()))
            return self._newest

    def _read(self) -> _Rows:
        with self._store.catalog.read() as db:
            revision = int(get_meta(db, REVISION))
            slides = db.execute(
                "SELECT s.*, t.first_tile, t.files, t.labels, t.patients, t.mosaic, "
                "t.seal AS tiles_seal "
                "FROM slides AS s JOIN slide_tiles AS t ON t.slide_id = s.id ORDER BY s.id"
            ).fetchall()
            generation = db.execute("SELECT * FROM generations ORDER BY id DESC").fetchone()
            fits = [dict(row) for row in db.execute("SELECT * FROM clusterings ORDER BY id")]
            placed: dict[int, set[int]] = {row["id"]: set() for row in fits}
            names: dict[str, dict[int, str]] = {row["name"]: {} for row in fits}
            for row in db.execute(
                "SELECT c.name AS clustering, n.cluster, n.name FROM clusters AS n "
                "JOIN clusterings AS c ON c.id = n.clustering_id WHERE n.name != ''"
            ):
                names[row["clustering"]][row["cluster"]] = row["name"]
            for clustering, slide in db.execute("SELECT clustering_id, slide_id FROM placements"):
                placed[clustering].add(slide)
            annotated = annotation.rows(db)
            with_quality = quality.slides_with(db)
            if int(get_meta(db, REVISION)) != revision:  # read without locks in a read-only folder
                raise StateGone(f"{self._store.path} changed while it was read; try again")
        opened = None if generation is None else dict(generation)
        path = self._store.path
        rows = [dict(row) | {"source": source_now(path, row["source"])} for row in slides]
        placements = {
            row["name"]: StoredColumn(
                frozenset(placed[row["id"]]), clusters_in(self._store.catalog, row["id"])
            )
            for row in fits
        }
        return _Rows(revision, rows, opened, placements, fits[::-1], names, annotated, with_quality)

    def _open(self, rows: _Rows) -> State:
        by_id = {slide["id"]: slide for slide in rows.slides}
        covered: list[dict[str, Any]] = []
        opened = None if rows.generation is None else self._generations.open(rows.generation)
        moved = self._store.catalog.revision() != rows.revision
        if opened is None and rows.generation is not None and moved:
            raise StateGone("the index file was replaced while it was opened; try again")
        if opened is not None:
            covered = [by_id.get(n) or _removed(n, tiles) for n, tiles in opened.slides]
        inside = {slide["id"] for slide in covered}
        late = [slide for slide in rows.slides if slide["id"] not in inside]
        order = [*covered, *late]
        alive = None
        if any(slide["first_tile"] == GONE for slide in covered):
            present = [slide["first_tile"] != GONE for slide in order]
            alive = np.repeat(present, [slide["tiles"] for slide in order])
        index = VectorIndex(
            self._store.manifest.dim,
            self._store.manifest.metric,
            self._read_recent(late),
            opened.main if opened else None,
            opened.plan if opened else None,
            opened.exact_vectors if opened else None,
            alive,
            opened.gpu if opened else None,
        )
        newest = next(reversed(rows.placements), None)
        return State(
            self._store,
            rows.revision,
            Columns(
                order,
                places_in(self._store.catalog),
                rows.placements,
                newest,
                rows.annotations,
                StoredColumn(rows.with_quality, quality_in(self._store.catalog)),
            ),
            index,
            opened.number if opened else 0,
            opened.about if opened else {},
            rows.clusterings,
            rows.cluster_names,
        )

    def _read_recent(self, late: Sequence[dict[str, Any]]) -> NDArray[np.float32]:
        """Return the recent vectors, prepared; reuse those read before."""
        parts = []
        for slide in late:
            vectors = self._recent.get(slide["id"])
            if vectors is None:
                vectors = prepared(self._store.vectors_of(slide), self._store.manifest.metric)
                if len(vectors) != slide["tiles"]:
                    raise Damaged(
                        f"{slide['features_file']} of slide {slide['name']!r} has {len(vectors)} vectors; "
                        f"expected {slide['tiles']}, as in the catalog; embed the slide again"
                    )
            parts.append(vectors)
        empty = np.zeros((0, self._store.manifest.dim), dtype=np.float32)
        joined = np.concatenate([empty, *parts])
        ends = np.cumsum([slide["tiles"] for slide in late], dtype=np.int64)
        # np.split returns views of the joined array, not copies.
        self._recent = dict(zip([s["id"] for s in late], np.split(joined, ends), strict=False))
        return joined


def _removed(number: int, tiles: int) -> dict[str, Any]:
    """Return a placeholder row for a slide that was removed after the index file was written."""
    empty = ("kind", "files", "labels", "patients", "label", "patient", "mpp", "target_mpp")
    return dict.fromkeys(empty) | {
        "id": number,
        "name": "",
        "tiles": tiles,
        "first_tile": GONE,
        "mosaic": b"",
        "metadata": "{}",
        "size_px_level0": 0,
    }
