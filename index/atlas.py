"""The atlas: slides' embeddings with their provenance, searched and clustered; the facade of this stage.

A folder: ``atlas.db`` (the truth), ``encoder/`` (a copy of the bundle), ``features/`` (the vectors),
``index-<generation>.faiss`` and ``clusters-<name>.npz`` (derived). One process writes at a time, any
number read.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..console import Report
from ..errors import BadInput, Damaged, HistoseekError, Mismatch, StorageFailed
from ..feature_files import check_features, parse_features
from ..files import exclusive, publish_folder, remove_leftovers, write_atomic
from ..manifest import Manifest, read_manifest
from . import clusterings
from .catalog import Catalog, bump_revision, insert, now
from .clusters import Clustering, shipped
from .clusters import fit as fit_clusters
from .generations import Generations
from .records import Added, Hit, plain_name, remove_slide, slide_row, tile_rows
from .vectors import VectorIndex

ENCODER = "encoder"
FEATURES = "features"
LOCK = ".lock"
NAME_LIMIT = 64


class Atlas:
    """An open atlas. Reading needs no lock; every method that writes takes the writer's."""

    def __init__(self, path: Path) -> None:
        """Open an atlas.

        Raises:
            BadInput: not an atlas, or of a newer histoseek.
            Damaged: its own parts do not agree.
        """
        self.path = path
        self.catalog = Catalog(path)
        meta = self.catalog.meta()
        self.manifest: Manifest = read_manifest(path / ENCODER, check_graph=False)
        if meta["encoder_sha256"] != self.manifest.sha256:
            raise Damaged(
                f"{path / ENCODER} is encoder {self.manifest.sha256[:12]}…, the atlas is bound to "
                f"{meta['encoder_sha256'][:12]}…; put the right bundle back"
            )
        self._generations = Generations(path, self.catalog, self.manifest)

    @classmethod
    def create(cls, path: Path, bundle: Path) -> Atlas:
        """Make an empty atlas bound to an encoder, with a copy of its bundle.

        Raises:
            BadInput: ``path`` exists, or ``bundle`` is no bundle.
            Damaged: the bundle's graph is not its manifest's.
        """
        manifest = read_manifest(bundle)
        with publish_folder(path) as folder:
            shutil.copytree(bundle, folder / ENCODER, ignore=shutil.ignore_patterns("__pycache__"))
            (folder / FEATURES).mkdir()
            Catalog(folder).create(
                {
                    "encoder_name": manifest.name,
                    "encoder_sha256": manifest.sha256,
                    "dim": str(manifest.dim),
                    "metric": manifest.metric,
                    "created_at": now(),
                }
            )
        return cls(path)

    @property
    def encoder_bundle(self) -> Path:
        """The folder of the atlas's own encoder."""
        return self.path / ENCODER

    # -- adding ---------------------------------------------------------------------------------

    def add(
        self,
        files: Sequence[Path],
        metadata: dict[str, dict[str, str]] | None = None,
        replace: bool = False,
        progress: Report = lambda done, total, text: None,
    ) -> list[Added]:
        """Add feature files, each whole or not at all; what is there already is left alone.

        Args:
            files: HDF5 feature files.
            metadata: by slide name (or file name of the slide): label and patient; also taken over
                for slides that are there already.
            replace: put other features of a slide that is there in the place of the old ones.
            progress: called after each file.

        Returns:
            What became of each file; a file that does not fit is reported, not raised.

        Raises:
            Busy: another process is writing.
            StorageFailed: no space; what was added before stays.
        """
        results: list[Added] = []
        with exclusive(self.path / LOCK, f"atlas {self.path}"):
            remove_leftovers([self.path, self.path / FEATURES])
            for number, file in enumerate(files, start=1):
                try:
                    results.append(self._add_one(file, metadata or {}, replace))
                except StorageFailed:
                    raise
                except HistoseekError as error:
                    results.append(Added(str(file), file.stem, "failed", reason=str(error)))
                except Exception as error:  # one foreign file must not stop the others
                    reason = f"{file}: unexpected {type(error).__name__}: {error}"
                    results.append(Added(str(file), file.stem, "failed", reason=reason))
                progress(number, len(files), file.stem)
            self._remove_orphans()
            self._generations.write()
            self._assign_new()
        return results

    def _add_one(self, file: Path, metadata: dict[str, dict[str, str]], replace: bool) -> Added:
        if not file.is_file():
            raise BadInput(f"{file} does not exist; check the path")
        blob = file.read_bytes()  # once: `embed` may replace the file meanwhile
        item = parse_features(blob, file)
        manifest = self.manifest
        check_features(item, manifest.name, manifest.sha256, manifest.dim, file)
        digest = hashlib.sha256(blob).hexdigest()
        target = f"{FEATURES}/{plain_name(item.name)}-{digest[:12]}.h5"
        row = slide_row(item, target, digest, metadata)
        found = self.catalog.rows("SELECT * FROM slides WHERE name = ?", (item.name,))
        if found and found[0]["content_sha256"] == row["content_sha256"]:
            return self._relabel(file, found[0], row)
        if found and not replace:
            raise Mismatch(
                f"the atlas holds slide {item.name!r} (from {found[0]['source']}) with other features; "
                "to put these in its place add them with --replace; if it is another slide of the same "
                "name, embed both in one run, which gives them different names"
            )
        write_atomic(self.path / target, blob)
        with self.catalog.write() as db:
            if found:
                remove_slide(db, found[0]["id"])
            number = insert(db, "slides", row)
            db.executemany(
                "INSERT INTO tiles (slide_id, row, x, y, file, label, patient) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                tile_rows(item, number),
            )
            bump_revision(db)
        state = "replaced" if found else "added"
        return Added(str(file), item.name, state, len(item.features), str(row["reason"]))

    def _relabel(self, file: Path, found: Any, row: dict[str, Any]) -> Added:
        """Take over a label or patient that is given now for a slide that is there already."""
        changed = {
            key: row[key] for key in ("label", "patient") if row[key] and row[key] != found[key]
        }
        if not changed:
            return Added(str(file), found["name"], "unchanged", found["tiles"])
        with self.catalog.write() as db:
            for key, value in changed.items():
                db.execute(f"UPDATE slides SET {key} = ? WHERE id = ?", (value, found["id"]))
        text = ", ".join(f"{key} {value!r}" for key, value in changed.items())
        return Added(str(file), found["name"], "relabelled", found["tiles"], text)

    def _assign_new(self) -> None:
        """Place tiles that came after a fit in its clusters."""
        pending: dict[str, tuple[int, list[int]]] = {}
        for row in self.catalog.rows("SELECT id, name FROM clusterings"):
            new = self.catalog.rows(
                "SELECT t.id FROM tiles AS t WHERE NOT EXISTS (SELECT 1 FROM assignments AS a "
                "WHERE a.clustering_id = ? AND a.tile_id = t.id)",
                (row["id"],),
            )
            if new:
                pending[row["name"]] = row["id"], [r["id"] for r in new]
        if not pending:
            return
        ids, vectors = self.vectors()
        for name, (number, tiles) in pending.items():
            try:
                _, clustering = self.clustering(name)
            except Damaged:
                continue  # `verify` names it; a new fit mends it
            chosen = np.isin(ids, tiles)
            placed = clustering.assign(vectors[chosen])
            with self.catalog.write() as db:
                clusterings.insert_assignments(db, number, ids[chosen], placed)

    def _remove_orphans(self) -> None:
        """Delete feature files that no slide names: copies made just before a crash."""
        named = {
            row["features_file"] for row in self.catalog.rows("SELECT features_file FROM slides")
        }
        for path in (self.path / FEATURES).glob("*.h5"):
            if f"{FEATURES}/{path.name}" not in named:
                path.unlink()

    # -- vectors --------------------------------------------------------------------------------

    def vectors(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return tile ids (N,) ascending and vectors (N, D), from the feature files.

        Raises:
            Damaged: a feature file is missing or is not the one that was added.
        """
        return self._generations.vectors()

    def index(self) -> VectorIndex:
        """Return the index of the newest state, rebuilt in memory if the stored one is stale."""
        return self._generations.current()

    # -- searching ------------------------------------------------------------------------------

    def search(self, queries: NDArray[np.float32], k: int = 10) -> list[list[Hit]]:
        """Return the k most similar tiles of each query.

        Args:
            queries: (Q, D) of this atlas's encoder.
            k: hits per query; all tiles if there are fewer.

        Raises:
            BadInput: k below 1, an empty atlas, or queries that are not finite.
            Mismatch: queries of another length.
        """
        if k < 1:
            raise BadInput(f"k is {k}; expected 1 or more")
        self._check_queries(queries)
        index = self.index()
        if not len(index):
            raise BadInput(f"{self.path} holds no tiles yet; add features first")
        scores, ids = index.search(queries, k)
        known = self.tiles(np.unique(ids).tolist())
        return [
            [
                Hit(rank=rank, score=round(float(score), 6), **known[int(tile)])
                for rank, (score, tile) in enumerate(zip(*pair, strict=True), start=1)
            ]
            for pair in zip(scores, ids, strict=True)
        ]

    def _check_queries(self, queries: NDArray[np.float32]) -> None:
        if queries.ndim != 2 or queries.shape[1] != self.manifest.dim:
            raise Mismatch(
                f"queries have shape {queries.shape}; this atlas compares vectors of length "
                f"{self.manifest.dim}"
            )
        if not np.isfinite(queries).all():
            raise BadInput("queries hold NaN or infinity; embed the images again")

    def tiles(self, ids: Sequence[int]) -> dict[int, dict[str, Any]]:
        """Return what is known of tiles, by id, as the fields of :class:`Hit`."""
        newest = self.catalog.rows("SELECT id FROM clusterings ORDER BY id DESC LIMIT 1")
        clustering = newest[0]["id"] if newest else -1
        rows = self.catalog.rows(
            "SELECT t.id AS tile, s.name AS slide, t.x, t.y, s.size_px_level0, s.mpp, "
            "COALESCE(t.label, s.label) AS label, COALESCE(t.patient, s.patient) AS patient, "
            "a.cluster, t.file FROM json_each(?) AS wanted "
            "JOIN tiles AS t ON t.id = wanted.value JOIN slides AS s ON s.id = t.slide_id "
            "LEFT JOIN assignments AS a ON a.tile_id = t.id AND a.clustering_id = ?",
            (json.dumps([int(n) for n in ids]), clustering),
        )
        return {row["tile"]: dict(row) for row in rows}

    # -- clusters -------------------------------------------------------------------------------

    def fit(
        self,
        method: str,
        k: int | None = None,
        name: str | None = None,
        min_cluster_size: int | None = None,
        seed: int = 0,
    ) -> dict[str, Any]:
        """Fit clusters on all tiles and store them under a name, replacing an earlier fit of it.

        Args:
            method: kmeans, hdbscan, or encoder: the clusters that it was trained with.
            k: clusters of k-means; None chooses by silhouette.
            name: of the clustering; the method's name when left out.
            min_cluster_size: of HDBSCAN.
            seed: of everything random.

        Returns:
            What was fitted, with the size of every cluster.

        Raises:
            BadInput: an unknown method, too few tiles or a name that is not plain.
            Busy: another process is writing.
        """
        name = name or method
        if plain_name(name) != name or len(name) > NAME_LIMIT:
            raise BadInput(f"name {name!r}: expected letters, digits, '-', '_' and '.' only")
        with exclusive(self.path / LOCK, f"atlas {self.path}"):
            revision = self._generations.revision()
            ids, vectors = self.vectors()
            if method == "encoder":
                clustering = shipped(self.encoder_bundle)
                placed = clustering.assign(vectors)
            else:
                clustering, placed = fit_clusters(vectors, method, k, min_cluster_size, seed)
            clusterings.store(self.path, self.catalog, name, clustering, revision, ids, placed)
        sizes = {
            int(c): int(n)
            for c, n in zip(*np.unique(placed.cluster, return_counts=True), strict=True)
        }
        return {"name": name, "method": method, **clustering.about, "sizes": sizes}

    def clustering(self, name: str | None = None) -> tuple[str, Clustering]:
        """Return a fitted clustering by name; the newest when left out.

        Raises:
            BadInput: none fitted yet, or none of that name.
            Damaged: its file is missing or changed.
        """
        return clusterings.load(self.path, self.catalog, name)

    def assign(self, queries: NDArray[np.float32], name: str | None = None) -> list[dict[str, Any]]:
        """Place new vectors (Q, D) in clusters: cluster, distance, strength and unknown of each.

        Raises:
            BadInput: no such clustering.
            Mismatch: vectors of another length.
        """
        self._check_queries(queries)
        _, clustering = self.clustering(name)
        placed = clustering.assign(queries)
        return [
            {
                "cluster": int(placed.cluster[n]),
                "distance": round(float(placed.distance[n]), 6),
                "strength": round(float(placed.strength[n]), 6),
                "unknown": bool(placed.unknown[n]),
            }
            for n in range(len(queries))
        ]

    # -- facts ----------------------------------------------------------------------------------

    def slides(self) -> list[dict[str, Any]]:
        """Return every slide and tile set with its counts and provenance."""
        return [dict(row) for row in self.catalog.rows("SELECT * FROM slides ORDER BY name")]

    def stats(self) -> dict[str, Any]:
        """Return counts, encoder and clusterings."""
        counts = self.catalog.rows(
            "SELECT (SELECT COUNT(*) FROM slides) AS slides, (SELECT COUNT(*) FROM tiles) AS tiles, "
            "(SELECT COUNT(*) FROM slides WHERE tiles = 0) AS slides_without_tiles"
        )[0]
        labels = self.catalog.rows(
            "SELECT COALESCE(t.label, s.label) AS label, COUNT(*) AS tiles FROM tiles AS t "
            "JOIN slides AS s ON s.id = t.slide_id GROUP BY 1 ORDER BY 2 DESC"
        )
        clusterings = self.catalog.rows(
            "SELECT name, method, clusters, about, revision, created_at FROM clusterings ORDER BY id"
        )
        meta = self.catalog.meta()
        return {
            "atlas": str(self.path),
            **dict(counts),
            "revision": int(meta["revision"]),
            "created_at": meta["created_at"],
            "encoder": {
                k: getattr(self.manifest, k)
                for k in ("name", "sha256", "arch", "dim", "metric", "size_px", "mpp", "licence")
            },
            "labels": {row["label"] or "(none)": row["tiles"] for row in labels},
            "clusterings": [
                {**dict(row), "about": json.loads(row["about"])} for row in clusterings
            ],
        }

    def verify(self) -> list[str]:
        """Check every file against its hash and every count; return what is wrong, [] if nothing is."""
        from .verify import problems

        return problems(self)
