"""The atlas: slides' embeddings with their provenance, searched and clustered; the facade of this stage.

A folder: ``atlas.db`` (what there is), ``encoder/`` (a copy of the bundle) and ``features/`` (the vectors)
are the truth; ``index-<generation>.faiss`` and ``clusters-<name>.npz`` are derived. One process writes at a
time, any number read, and each reader sees one committed state.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from .. import stopping
from ..artifacts.files import exclusive, publish_folder, write_atomic, write_json
from ..artifacts.manifest import MANIFEST, Manifest, external_manifest, read_manifest
from ..console import Report
from ..errors import BadInput, Damaged, Mismatch, NotFound, StorageFailed
from .clusters import fitting
from .clusters import report as cluster_report
from .clusters import stored as clusterings
from .clusters.clustering import Assigned, Clustering
from .search import cases
from .search import map as layout
from .search import tiles as search
from .search.map import Layout
from .search.tiles import Own
from .store.catalog import ATLAS_ID, Catalog, now
from .store.metadata import AddedSlides, Metadata, slides_meant
from .store.relocation import Relocated, relocate
from .store.rows import Hit, plain_name
from .store.scales import MIXED, scales_of
from .vectors import tuning
from .vectors.generations import Generations, View
from .vectors.index import VectorIndex
from .vectors.scan import prepared
from .writer import FEATURES, Writer

ENCODER = "encoder"
LOCK = ".lock"
NAME_LIMIT = 64
T = TypeVar("T")


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
        self.generations = Generations(path, self.catalog, self.manifest)
        self._writer = Writer(path, self.catalog, self.manifest, self.generations)
        self._clusterings: dict[str, Clustering] = {}

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
            _fill(folder, manifest)
        return cls(path)

    @classmethod
    def create_external(
        cls, path: Path, encoder: str, dim: int, metric: str = "cosine", mpp: float | None = None
    ) -> Atlas:
        """Make an empty atlas for features that another tool made, bound to its encoder's name.

        Raises:
            BadInput: ``path`` exists, or a name, length or metric that is not possible.
        """
        manifest = external_manifest(encoder, dim, metric, mpp)
        with publish_folder(path) as folder:
            write_json(folder / ENCODER / MANIFEST, manifest.model_dump())
            _fill(folder, manifest)
        return cls(path)

    @property
    def encoder_bundle(self) -> Path:
        """The folder of the atlas's own encoder."""
        return self.path / ENCODER

    @contextmanager
    def writing(self) -> Iterator[Writer]:
        """Hold the writer's lock.

        Raises:
            Busy: another process is writing.
            StorageFailed: the folder cannot be written.
        """
        with exclusive(self.path / LOCK, f"atlas {self.path}"):
            yield self._writer

    # -- changing -------------------------------------------------------------------------------

    def add(
        self,
        files: Sequence[Path],
        metadata: Metadata | None = None,
        replace: bool = False,
        progress: Report = lambda done, total, text: None,
        mixed_scales: bool = False,
    ) -> AddedSlides:
        """Add feature files, each whole or not at all; what is there already is left alone.

        Args:
            files: HDF5 feature files.
            metadata: label, patient and any other column, by what names the slide: its name in the atlas,
                its file's name, or the end of its path (see ``slide_names``); also taken over
                for slides that are there already.
            replace: put other features of a slide that is there in the place of the old ones (upsert).
            progress: called after each file.
            mixed_scales: let the atlas hold tiles of different µm per pixel, from now on.

        Returns:
            What became of each file; a file that does not fit is reported, not raised.

        Raises:
            BadInput: a row of the metadata that means two slides, or two rows that mean one.
            Busy: another process is writing.
            StorageFailed: no space; what was added before stays.
        """
        with self.writing() as writer:
            if mixed_scales:
                writer.allow_mixed_scales()
            return writer.add(files, metadata or {}, replace, progress)

    def remove(self, names: Sequence[str]) -> int:
        """Remove slides or tile sets by name, all or none; their tiles' ids are never used again.

        Returns:
            How many tiles went.

        Raises:
            BadInput: a name that is not there.
            Busy: another process is writing.
        """
        with self.writing() as writer:
            return writer.remove(names)

    def relabel(self, rows: Iterable[dict[str, str]]) -> int:
        """Set labels, patients and further columns of slides, or of tiles of a tile set; all or none.

        Args:
            rows: ``slide`` (as for :meth:`add`) and the columns to set; with ``file`` one tile is meant. An
                empty value takes away what was there.

        Returns:
            How many slides changed.

        Raises:
            BadInput: a slide or tile that is not there.
            Busy: another process is writing.
        """
        with self.writing() as writer:
            return writer.relabel(rows)

    def slides_without_row(self, names: Iterable[str]) -> list[str]:
        """Return the slides that none of the names of a table's rows means, sorted."""
        slides = self.slides()
        meant = set(slides_meant(set(names), slides).values())
        return sorted(slide["name"] for slide in slides if slide["name"] not in meant)

    def relocate(
        self, old: str | None, new: Path | None, folders: Sequence[Path]
    ) -> list[Relocated]:
        """Take over where slides lie now; see :func:`~histoseek.index.store.relocation.relocate`."""
        with self.writing():
            return relocate(self.path, self.catalog, old, new, folders)

    # -- vectors --------------------------------------------------------------------------------

    def view(self) -> View:
        """Return the newest committed state, to read from as long as wanted.

        Raises:
            Damaged: a feature file is missing or changed whose vectors no index file holds.
        """
        return self.generations.view()

    def ask(self, question: Callable[[View], T]) -> T:
        """Answer a question of several steps from one committed state.

        A writer may delete files that an earlier state needs: then the question is asked again, of the
        newest state.

        Args:
            question: given a view, reads everything from it; may be called more than once.

        Raises:
            Damaged: a file is missing or changed, and no writer did it.
        """
        return self.generations.steady(lambda: question(self.view()))

    def vectors(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return tile ids (N,) ascending and vectors (N, D), from the feature files.

        Raises:
            Damaged: a feature file is missing or is not the one that was added.
        """
        return self.generations.vectors()

    def vectors_of(self, tiles: Sequence[int], view: View | None = None) -> NDArray[np.float32]:
        """Return the vectors (T, D) of tiles by id, from the feature files.

        Args:
            tiles: ids.
            view: the state they are of; the newest when left out.

        Raises:
            BadInput: an id that is not there.
            Damaged: a feature file is missing or is not the one that was added.
        """
        view = view or self.view()
        columns = view.columns
        positions = self._positions(tiles, view)
        slides = columns.slide_of(positions)
        found = np.empty((len(positions), self.manifest.dim), dtype=np.float32)
        for number in np.unique(slides).tolist():
            rows = slides == number
            vectors = self.generations.vectors_of(columns.slides[number])
            found[rows] = vectors[positions[rows] - columns.starts[number]]
        return found

    def _positions(self, tiles: Sequence[int], view: View) -> NDArray[np.int64]:
        positions = view.columns.positions(np.asarray(tiles, dtype=np.int64))
        if (positions < 0).any():
            lost = [int(t) for t, p in zip(tiles, positions.tolist(), strict=True) if p < 0]
            raise NotFound(f"{self.path} holds no tile {lost[0]} (any more); search again")
        return positions

    def index(self) -> VectorIndex:
        """Return the index of the newest state."""
        return self.view().index

    # -- searching ------------------------------------------------------------------------------

    def search(
        self,
        queries: NDArray[np.float32],
        k: int = 10,
        where: str | None = None,
        least: float | None = None,
        per_slide: bool = False,
        exact: bool = False,
        view: View | None = None,
    ) -> list[list[Hit]]:
        """Return the k most similar tiles of each query.

        Args:
            queries: (Q, D) of this atlas's encoder.
            k: hits per query; all tiles if there are fewer.
            where: metadata filter such as ``organ = 'colon' and patient != 'P7'``; see
                :mod:`~histoseek.index.search.filters`.
            least: lowest score of a hit (a range search, always exact).
            per_slide: at most one hit per slide.
            exact: compare with every tile, whatever the index.
            view: the state to search; the newest when left out.

        Raises:
            BadInput: k below 1, a filter that cannot be read, an empty atlas, or queries that are not
                finite.
            Mismatch: queries of another length.
        """
        wanted = search.Wanted(k, where, least, per_slide, exact)
        self.check_queries(queries)
        view = self._filled_view(view)
        return search.hits(view, *search.find(view, queries, wanted))

    def search_like(
        self,
        tiles: Sequence[int],
        k: int = 10,
        where: str | None = None,
        without: Own = "tile",
        per_slide: bool = False,
        exact: bool = False,
        view: View | None = None,
    ) -> list[list[Hit]]:
        """Return the tiles most similar to tiles of the atlas, by id.

        Args:
            tiles: ids.
            k: hits per tile.
            where: metadata filter.
            without: what of the query's own is left out: its ``tile``, ``slide`` or ``patient``.
            per_slide: at most one hit per slide.
            exact: compare with every tile.
            view: the state to search; the newest when left out.

        Raises:
            BadInput: a tile that is not there.
            Damaged: a feature file is missing or changed, or was replaced since ``view``.
        """
        wanted = search.Wanted(k, where, None, per_slide, exact)

        def read(view: View) -> list[list[Hit]]:
            view = self._filled_view(view)
            vectors = self.vectors_of(tiles, view)
            found = search.find_like(view, self._positions(tiles, view), vectors, wanted, without)
            return search.hits(view, *found)

        return self.ask(read) if view is None else read(view)

    def search_combined(
        self,
        positive: NDArray[np.float32],
        negative: NDArray[np.float32] | None = None,
        k: int = 10,
        where: str | None = None,
        per_slide: bool = False,
        view: View | None = None,
    ) -> list[Hit]:
        """Return the tiles like all of some vectors and unlike others: "more like these, unlike those".

        Args:
            positive: (P, D), at least one.
            negative: (M, D).
            k: hits.
            where: metadata filter.
            per_slide: at most one hit per slide.
            view: the state to search; the newest when left out.
        """
        query = self.combined(positive, negative)
        return self.search(query[None], k, where, per_slide=per_slide, view=view)[0]

    def combined(
        self, positive: NDArray[np.float32], negative: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """Return the query (D,) that is like some vectors (P, D) and unlike others (M, D)."""
        none = np.zeros((0, self.manifest.dim), dtype=np.float32)
        other = none if negative is None else negative
        if not len(positive):
            raise BadInput("no example to be like was given; expected at least one")
        self.check_queries(positive)
        self.check_queries(other)
        found: NDArray[np.float32] = search.combined(positive, other, self.manifest.metric)[0]
        return found

    def similar_slides(
        self,
        query: str | NDArray[np.float32],
        k: int = 10,
        by: Literal["slide", "patient"] = "slide",
        how: cases.How = "median",
        where: str | None = None,
        view: View | None = None,
    ) -> list[cases.Similar]:
        """Return the slides or cases most like a slide or case of the atlas, or like new tiles.

        Args:
            query: name of a slide (or, by patient, of a patient), or the vectors (Q, D) of tiles.
            k: slides or cases.
            by: what is ranked. Of the query's own patient nothing is returned, as long as it has one.
            how: ``median`` of the minimum distances (Yottixel), or ``votes`` of the nearest tiles.
            where: metadata filter of the tiles that count.
            view: the state to search; the newest when left out.

        Raises:
            BadInput: no such slide or patient, or one without tiles.
        """
        return self.generations.steady(
            lambda: cases.similar_slides(self, query, k, by, how, where, view)
        )

    def scores_in(
        self, slide: str, query: NDArray[np.float32], view: View | None = None
    ) -> NDArray[np.float32]:
        """Return the score (N,) of every tile of a slide for one query (D,).

        Raises:
            NotFound: no such slide.
        """
        view = view or self.view()
        row = next((s for s in view.columns.slides if s["name"] == slide and slide), None)
        if row is None:
            raise NotFound(f"{self.path} holds no slide {slide!r}")
        metric = self.manifest.metric
        own = prepared(self.generations.vectors_of(row), metric)
        asked = prepared(query[None], metric)
        if metric == "cosine":
            scores: NDArray[np.float32] = own @ asked[0]
            return scores
        distances: NDArray[np.float32] = np.linalg.norm(own - asked, axis=1)
        return -distances

    def _filled_view(self, view: View | None = None) -> View:
        view = view or self.view()
        if not len(view.index):
            raise BadInput(f"{self.path} holds no tiles yet; add features first")
        return view

    def check_queries(self, queries: NDArray[np.float32]) -> None:
        """Refuse vectors that cannot be compared with those of this atlas.

        Raises:
            Mismatch: of another length.
            BadInput: not finite.
        """
        if queries.ndim != 2 or queries.shape[1] != self.manifest.dim:
            raise Mismatch(
                f"queries have shape {queries.shape}; this atlas compares vectors of length "
                f"{self.manifest.dim}"
            )
        if not np.isfinite(queries).all():
            raise BadInput("queries hold NaN or infinity; embed the images again")

    def tiles(self, ids: Sequence[int], view: View | None = None) -> dict[int, dict[str, Any]]:
        """Return what is known of tiles, by id, as the fields of :class:`Hit` but for rank and score."""
        view = view or self.view()
        positions = self._positions(ids, view)
        none = np.zeros((1, len(positions)), dtype=np.float32)
        (found,) = view.columns.hits(positions[None], none)
        return {
            hit.tile: {k: v for k, v in hit._asdict().items() if k not in {"rank", "score"}}
            for hit in found
        }

    # -- the index ------------------------------------------------------------------------------

    def audit(
        self, queries: int = 500, k: int = 10, seed: int = 1, where: str | None = None
    ) -> dict[str, Any]:
        """Measure what the current index finds of the true neighbours, how fast, and what it takes.

        Args:
            queries: tiles of the atlas that are asked, each without itself.
            k: neighbours.
            seed: of the choice.
            where: metadata filter under which it is measured.
        """
        if queries < 1 or k < 1 or seed < 0:
            raise BadInput(f"{queries} queries, k {k}, seed {seed}: expected at least 1, 1 and 0")
        return self.generations.steady(lambda: self._audit(queries, k, seed, where))

    def _audit(self, queries: int, k: int, seed: int, where: str | None) -> dict[str, Any]:
        view = self._filled_view()
        index = view.index
        columns = view.columns
        alive = columns.present()
        rng = np.random.default_rng(seed)
        picked = np.sort(rng.choice(alive, min(queries, len(alive)), replace=False))
        ids = columns.ids(picked).tolist()
        vectors = prepared(self.vectors_of(ids, view), self.manifest.metric)
        passing = search.allowed(view, where)
        if passing is not None and not passing.any():
            raise BadInput(f"no tile passes {where!r}; loosen the filter")
        report = tuning.audit(index, tuning.HeldOut(picked, vectors), k, passing)
        return {
            "generation": view.generation,
            "revision": view.revision,
            "where": where,
            "passing": len(alive) if passing is None else int(passing[alive].sum()),
            "plan": index.plan.as_dict(),
            "tiles": len(index),
            "tiles_since_the_index_was_written": index.tail_rows,
            "removed_since": index.positions - len(index),
            **report,
            "bytes": self.generations.bytes_on_disk(),
            "bytes_of_the_vectors": 4 * len(index) * self.manifest.dim,
            "when_built": view.about.get("measured", {}),
        }

    def tune(
        self,
        recall: float | None = None,
        memory_mb: float | None = None,
        exact_up_to: int | None = None,
        k: int | None = None,
    ) -> dict[str, Any]:
        """Write the index anew for other aims, which hold from then on; None keeps the default.

        Args:
            recall: share of the true neighbours that a search must find; 1 for exact search.
            memory_mb: what the index may take; smaller codes are ranked again by the exact vectors.
            exact_up_to: tiles up to which search is exact anyway.
            k: how many neighbours the recall is measured on.

        Returns:
            The plan that was chosen, and what was measured.

        Raises:
            BadInput: an aim that cannot be reached, with what could be.
            Busy: another process is writing.
        """
        given = {"recall": recall, "memory_mb": memory_mb, "exact_up_to": exact_up_to, "k": k}
        options = tuning.Options(**{key: v for key, v in given.items() if v is not None})  # type: ignore[arg-type]
        with self.writing() as writer:
            writer.tidy()
            self._filled_view()
            return self.generations.write(options, store_options=True)

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
            seed: of everything random, also of the sample that is fitted above 200,000 tiles.

        Returns:
            What was fitted, with the size of every cluster.

        Raises:
            BadInput: an unknown method, too few tiles or a name that is not plain.
            Busy: another process is writing.
        """
        name = name or method
        if plain_name(name) != name or len(name) > NAME_LIMIT:
            raise BadInput(f"name {name!r}: expected letters, digits, '-', '_' and '.' only")
        with self.writing() as writer:
            writer.tidy()
            return fitting.fit(self, method, name, k, min_cluster_size, seed)

    def clustering(
        self, name: str | None = None, view: View | None = None
    ) -> tuple[str, Clustering]:
        """Return a fitted clustering by name; the newest when left out.

        Args:
            name: of the clustering.
            view: the state that it is of; the newest when left out.

        Raises:
            BadInput: none fitted yet, or none of that name.
            Damaged: its file is missing or changed.
        """
        rows = clusterings.stored(self.catalog) if view is None else view.clusterings
        return clusterings.load(self.path, rows, name, self._clusterings)

    def assign(
        self, queries: NDArray[np.float32], name: str | None = None, view: View | None = None
    ) -> list[dict[str, Any]]:
        """Place new vectors (Q, D) in clusters: cluster, its name, distance, strength and unknown of each.

        Args:
            queries: (Q, D) of this atlas's encoder.
            name: of the clustering; the newest when left out.
            view: the state whose clusters and names count; the newest when left out.

        Raises:
            BadInput: no such clustering.
            Mismatch: vectors of another length.
        """
        self.check_queries(queries)

        def read(view: View) -> list[dict[str, Any]]:
            chosen, clustering = self.clustering(name, view)
            return clustering.assign(queries).rows(view.cluster_names[chosen])

        return self.ask(read) if view is None else read(view)

    def placed(self, name: str | None = None) -> tuple[NDArray[np.int64], Assigned]:
        """Return tile ids (N,) and where they belong in a clustering, in the order of :meth:`vectors`.

        Raises:
            BadInput: no such clustering.
        """
        return self.generations.unmoved(lambda: cluster_report.placed(self, name))

    def clusters(self, name: str | None = None, examples: int = 3) -> list[dict[str, Any]]:
        """Describe the clusters of a clustering: name, size, unknown, labels, example tiles.

        Raises:
            BadInput: no such clustering.
        """
        return self.generations.unmoved(lambda: cluster_report.describe(self, name, examples))

    def name_cluster(
        self, cluster: int, text: str, description: str = "", clustering: str | None = None
    ) -> None:
        """Give a cluster a name and a description; "" takes the name away.

        Raises:
            BadInput: no such clustering or cluster, or a text that is too long.
            Busy: another process is writing.
        """
        with self.writing():
            cluster_report.rename(self, cluster, text, description, clustering)

    def cluster_names(self, name: str | None = None) -> dict[int, str]:
        """Return the names that people gave to clusters, by number.

        Raises:
            BadInput: no such clustering.
        """
        view = self.view()
        chosen, _ = self.clustering(name, view)
        return view.cluster_names[chosen]

    def drift(self, name: str | None = None) -> dict[str, Any]:
        """Report how many of the tiles that came after the fit are unknown to it.

        Raises:
            BadInput: no such clustering.
        """
        return self.generations.unmoved(lambda: cluster_report.drift(self, name))

    # -- the map --------------------------------------------------------------------------------

    def layout(self) -> Layout | None:
        """Return the map of the atlas; None if none was made, or if it has grown to twice its tiles.

        Raises:
            Damaged: its file is not whole.
        """
        found = layout.read(self.path)
        meta = self.catalog.meta()
        fits = layout.fits(found, meta[ATLAS_ID], len(self.view().index), self.manifest.dim)
        return found if fits else None

    def make_layout(self, seed: int = 0) -> Layout:
        """Make the map of the atlas and keep it there, if its folder can be written.

        Raises:
            BadInput: an empty atlas.
            MissingPart: openTSNE is not installed.
        """

        def landmarks() -> tuple[NDArray[np.float32], int]:
            view = self._filled_view()
            rows = view.columns.present()
            some = rows[layout.sample(len(rows), seed)]
            return self.vectors_of(view.columns.ids(some).tolist(), view), len(rows)

        vectors, tiles = self.generations.steady(landmarks)
        metric = self.manifest.metric
        number = self.catalog.meta()[ATLAS_ID]
        made = stopping.aside(
            lambda: layout.make(number, tiles, prepared(vectors, metric), metric, seed)
        )
        with suppress(StorageFailed):  # a folder that is only read: the caller has the map
            write_atomic(self.path / layout.FILE, made.to_bytes())
        return made

    def usual_nearness(self, tiles: int = 200, seed: int = 0) -> NDArray[np.float32]:
        """Return how similar some tiles are to their nearest of another patient, ascending (T',).

        A tile without patient leaves out its slide; where there is no other, only the tile itself. With
        these one can say how near a new image's nearest tile is, compared with tiles of the atlas.
        """

        def read() -> NDArray[np.float32]:
            view = self._filled_view()
            rows = view.columns.present()
            rng = np.random.default_rng(seed)
            some = np.sort(rng.choice(rows, min(tiles, len(rows)), replace=False))
            vectors = self.vectors_of(view.columns.ids(some).tolist(), view)
            for without in ("patient", "tile"):
                scores, at = search.find_like(view, some, vectors, search.Wanted(k=1), without)
                if scores.shape[1] and (at[:, 0] >= 0).any():
                    break
            else:
                return np.zeros(0, dtype=np.float32)
            return np.sort(scores[:, 0][at[:, 0] >= 0])

        return self.generations.steady(read)

    def foreign_share(self, tiles: int = 1000, seed: int = 0) -> float:
        """Return which share of some tiles the encoder's gate calls foreign; 0 where it has none."""

        def read() -> float:
            view = self._filled_view()
            rows = view.columns.present()
            some = np.random.default_rng(seed).choice(rows, min(tiles, len(rows)), replace=False)
            vectors = self.vectors_of(view.columns.ids(np.sort(some)).tolist(), view)
            return float(np.mean(self.manifest.foreign(vectors)))

        return self.generations.steady(read) if self.manifest.gate else 0.0

    # -- facts ----------------------------------------------------------------------------------

    def slides(self) -> list[dict[str, Any]]:
        """Return every slide and tile set with its counts, labels, metadata and provenance."""
        rows = self.catalog.rows("SELECT * FROM slides ORDER BY name")
        return [
            {k: v for k, v in dict(row).items() if k not in {"metadata", "seal"}}
            | {"metadata": json.loads(row["metadata"])}
            for row in rows
        ]

    @property
    def mixed_scales(self) -> bool:
        """Whether tiles of different µm per pixel were allowed."""
        return MIXED in self.catalog.meta()

    def stats(self) -> dict[str, Any]:
        """Return counts, encoder, index and clusterings."""
        view = self.view()
        columns = view.columns
        there = [s for s in columns.slides if s["name"]]
        label = columns.coded("label")
        alive = columns.present()
        counts = np.bincount(label.codes[alive] + 1, minlength=len(label.names) + 1)
        labels = dict(zip(["(none)", *label.names], counts.tolist(), strict=True))
        meta = self.catalog.meta()
        shown = ("name", "method", "clusters", "about", "revision", "created_at")
        rows = [{key: row[key] for key in shown} for row in reversed(view.clusterings)]
        return {
            "atlas": str(self.path),
            "slides": len(there),
            "tiles": len(view.index),
            "slides_without_tiles": sum(not s["tiles"] for s in there),
            "revision": view.revision,
            "created_at": meta["created_at"],
            "encoder": {
                k: getattr(self.manifest, k)
                for k in ("name", "sha256", "arch", "dim", "metric", "size_px", "mpp", "licence")
            },
            "index": {"generation": view.generation, **view.about},
            "scales": scales_of(there, MIXED in meta),
            "fields": [*columns.names(), "file", "tile", "x", "y", "mpp", "target_mpp", "cluster"],
            "labels": {
                k: n for k, n in sorted(labels.items(), key=lambda item: (-item[1], item[0])) if n
            },
            "clusterings": [{**row, "about": json.loads(row["about"])} for row in rows],
        }

    # -- care -----------------------------------------------------------------------------------

    def verify(self) -> list[str]:
        """Check every file against its hash and every count; return what is wrong, [] if nothing is."""
        from .care.verify import problems

        while True:
            revision = self.catalog.revision()
            found = [problem.text for problem in problems(self)]
            if not found or self.catalog.revision() == revision:
                return found  # else a writer changed what was being looked at

    def repair(self) -> list[str]:
        """Make again what is derived and missing or damaged; the truth is never touched.

        Returns:
            What was done.

        Raises:
            Busy: another process is writing.
        """
        from .care.verify import repair

        with self.writing() as writer:
            return repair(self, writer)

    def snapshot(self, out: Path) -> dict[str, Any]:
        """Copy one committed state of the atlas into a new folder, which is an atlas itself.

        Reading may go on meanwhile; a writer is told to wait.

        Raises:
            BadInput: ``out`` exists.
            Damaged: the atlas is not whole; nothing is written.
            StorageFailed: no space.
        """
        from .care.snapshots import take

        return take(self, out)


def _fill(folder: Path, manifest: Manifest) -> None:
    """Give a new atlas its places for features and its catalog."""
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
