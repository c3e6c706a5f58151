"""A view: queries on one committed state of an atlas.

The state does not change when the atlas does, so that answers of several questions fit together. Searches
and assignments compare vectors in memory. Coordinates and clusters of hits are read from the catalog: if a
writer has removed a slide of them since, or has fitted the clusters again, the question raises
:class:`~histoseek.errors.Damaged`. So do questions that read the whole catalog (clusters, drift, exports)
once a writer has replaced the state, and those that need a deleted feature file. ``Atlas.ask`` repeats them
on the newest state.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .clusters import report, stored
from .clusters.clustering import Assigned, Clustering
from .search import cases, filters, nearness, tiles
from .search import layout as layouts
from .search.columns import Columns
from .search.layout import Layout
from .search.query import Query
from .search.state import State
from .store.rows import Hit
from .store.scales import scales_of
from .vectors.index import VectorIndex


class View:
    """One committed state of an atlas, for reading.

    Attributes:
        state: the columns of the tiles, and their vectors.
    """

    def __init__(self, state: State, clusterings: dict[str, Clustering] | None = None) -> None:
        """View a state; ``clusterings`` is a cache of clusterings by sha256."""
        self.state = state
        self._clusterings = {} if clusterings is None else clusterings

    def _named(self, name: str | None) -> str:
        """Return the name of a clustering; that of the newest for None."""
        return str(stored.row_of(self.state.store.path, self.state.clusterings, name)["name"])

    @property
    def revision(self) -> int:
        """Number of the state: the number of changes committed so far."""
        return self.state.revision

    @property
    def generation(self) -> int:
        """Number of the index file; 0 for none."""
        return self.state.generation

    @property
    def columns(self) -> Columns:
        """The columns of the tiles, such as label and patient."""
        return self.state.columns

    @property
    def index(self) -> VectorIndex:
        """The vectors of the tiles."""
        return self.state.index

    # -- tiles ----------------------------------------------------------------------------------

    def search(self, query: Query) -> list[list[Hit]]:
        """Return similar tiles, best first: one list per vector and tile of the query.

        A query that combines its examples gets one list.

        Raises:
            BadInput: the query has no example, the filter is invalid, or the atlas has no tiles.
            NotFound: a tile is not in the atlas.
            Mismatch: vectors have another length.
        """
        return tiles.answer(self.state, query)

    def notes(self, where: str | None, patients: bool = False) -> list[str]:
        """Return what an answer leaves out, or does not leave out, without a word.

        Args:
            where: the filter; values that are no numbers are not compared with one.
            patients: whether slides of the query's patient are left out; the patient may be unknown.
        """
        notes = cases.unknown_patients(self.state) if patients else []
        if where is None or not where.strip():
            return notes
        columns, names = self.columns, set(self.columns.names())

        def values_of(name: str) -> list[str] | None:
            return columns.coded(name).names if name in names else None

        return [*filters.notes_of(values_of, filters.parse(where)), *notes]

    def vector_of(self, query: Query) -> NDArray[np.float32]:
        """Return the vector (D,) that combines all examples of a query."""
        return tiles.combined_vector(self.state, query)

    def search_near(self, vector: NDArray[np.float32], query: Query) -> list[Hit]:
        """Return the tiles near a vector (D,) that stands for all examples of a query; best first."""
        return tiles.answer_near(self.state, vector, query)

    def vectors_of(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Return the vectors (T, D) of tiles by id, from the feature files.

        Raises:
            NotFound: the atlas has no tile with one of the ids.
            Damaged: a feature file is missing or has changed since it was added.
        """
        return self.state.vectors_of(ids)

    def tiles(self, ids: Sequence[int]) -> dict[int, dict[str, Any]]:
        """Return tiles by id, each with the fields of :class:`Hit` except rank and score.

        Raises:
            NotFound: the atlas has no tile with one of the ids.
        """
        return {tile["tile"]: tile for tile in self.columns.tiles(self.state.positions(ids))}

    def scores_in(self, slide: str, vector: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the score (N,) of every tile of a slide for one vector (D,).

        Raises:
            NotFound: no such slide.
        """
        return nearness.scores_in(self.state, slide, vector)

    def usual_nearness(self, tiles: int = 200, seed: int = 0) -> nearness.Nearness:
        """Return how similar sampled tiles are to their nearest tile of another patient."""
        return nearness.usual_nearness(self.state, tiles, seed)

    def out_of_distribution_share(self, tiles: int = 1000, seed: int = 0) -> float:
        """Return the out-of-distribution share of sampled tiles; 0 if the encoder has no tissue gate."""
        return nearness.out_of_distribution_share(self.state, tiles, seed)

    # -- slides and cases -----------------------------------------------------------------------

    def similar(
        self,
        query: str | NDArray[np.float32],
        k: int = 10,
        by: Literal["slide", "patient"] = "slide",
        how: cases.How = "median",
        where: str | None = None,
    ) -> list[cases.Similar]:
        """Return the slides or cases most similar to one of the atlas, or to new tiles.

        Args:
            query: name of a slide (with ``by="patient"`` also of a patient), or vectors (Q, D) of tiles.
            k: number of slides or cases.
            by: what is ranked. If the query's patient is known, none of the patient's slides is returned.
            how: ``median`` of the minimum distances (Yottixel), or ``votes`` of the nearest tiles.
            where: metadata filter; only tiles that pass count.

        Raises:
            BadInput: no such slide or patient, it has no tiles, or no other slide passes the filter.
        """
        return cases.similar_slides(self.state, query, k, by, how, where)

    # -- clusters -------------------------------------------------------------------------------

    def clusterings(self) -> list[str]:
        """Return the names of the fitted clusterings, newest first."""
        return [row["name"] for row in self.state.clusterings]

    def clustering(self, name: str | None = None) -> tuple[str, Clustering]:
        """Return a fitted clustering by name; None for the newest.

        Raises:
            BadInput: there is no clustering, or none of that name.
            Damaged: its file is missing or changed.
        """
        path, rows = self.state.store.path, self.state.clusterings
        return stored.load(path, rows, name, self._clusterings)

    def assign(self, vectors: NDArray[np.float32], name: str | None = None) -> list[dict[str, Any]]:
        """Assign new vectors (Q, D) to clusters: cluster, its name, distance, strength and unknown of each.

        Raises:
            BadInput: no such clustering.
            Mismatch: vectors have another length.
        """
        self.state.check_queries(vectors)
        chosen, clustering = self.clustering(name)
        return clustering.assign(vectors).rows(self.state.cluster_names[chosen])

    def assigned(self, name: str | None = None) -> tuple[NDArray[np.int64], Assigned]:
        """Return tile ids (N,) ascending and their assignments in a clustering.

        Raises:
            BadInput: no such clustering.
            Damaged: a writer has committed since the view was taken.
        """
        return report.assigned(self.state, self._named(name))

    def clusters(self, name: str | None = None, examples: int = 3) -> list[dict[str, Any]]:
        """Describe the clusters of a clustering: name, size, unknown, labels, example tiles.

        Raises:
            BadInput: no such clustering.
            Damaged: a writer has committed since the view was taken.
        """
        return report.describe(self.state, self._named(name), examples)

    def cluster_names(self, name: str | None = None) -> dict[int, str]:
        """Return the names that people gave to clusters, by number.

        Raises:
            BadInput: no such clustering.
        """
        return self.state.cluster_names[self._named(name)]

    def suggest_names(
        self,
        words: Sequence[str],
        vectors: NDArray[np.float32],
        name: str | None = None,
        count: int = 3,
    ) -> list[dict[str, Any]]:
        """Propose names for the clusters of a clustering: the words (W) that fit each best.

        Args:
            words: W words to choose from.
            vectors: (W, D) their embeddings by the encoder's text network.
            name: of the clustering; the newest when None.
            count: maximum number of words per cluster.

        Raises:
            BadInput: no such clustering.
            Damaged: a writer has committed since the view was taken.
        """
        return report.suggest(self.state, self._named(name), words, vectors, count)

    def drift(self, name: str | None = None) -> dict[str, Any]:
        """Compare the share of unknown tiles between the fitted slides and those added later.

        Raises:
            BadInput: no such clustering.
            Damaged: a writer has committed since the view was taken.
        """
        return report.drift(self.state, self._named(name))

    # -- the whole atlas ------------------------------------------------------------------------

    def layout(self) -> Layout | None:
        """Return the map; None if there is none, or if the atlas has more than doubled since it was made.

        Raises:
            Damaged: its file is incomplete.
        """
        store = self.state.store
        layout = layouts.read(store.path)
        fits = layouts.fits(layout, store.identity, len(self.index), store.manifest.dim)
        return layout if fits else None

    def stats(self) -> dict[str, Any]:
        """Return counts, encoder, index and clusterings."""
        state, store = self.state, self.state.store
        slides = [s for s in self.columns.slides if s["name"]]
        meta = store.catalog.meta()
        shown = ("name", "method", "clusters", "about", "revision", "created_at")
        rows = [{key: row[key] for key in shown} for row in reversed(state.clusterings)]
        encoder = (
            "name", "sha256", "arch", "dim", "metric", "size_px", "mpp", "licence", "stain_normalise",
        )  # fmt: skip
        return {
            "atlas": str(store.path),
            "slides": len(slides),
            "tiles": len(self.index),
            "slides_without_tiles": sum(not s["tiles"] for s in slides),
            "revision": self.revision,
            "created_at": meta["created_at"],
            "encoder": {key: getattr(store.manifest, key) for key in encoder},
            "index": {"generation": self.generation, **state.about},
            "scales": scales_of(slides, store.mixed_scales),
            "fields": self.columns.fields(),
            "labels": self.columns.label_counts(self.columns.present()),
            "clusterings": [{**row, "about": json.loads(row["about"])} for row in rows],
        }  # fmt: skip
