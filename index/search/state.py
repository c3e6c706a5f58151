"""A committed state of an atlas: the columns of its tiles, and their vectors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from sqlite3 import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...artifacts.manifest import Manifest
from ...errors import BadInput, Damaged, Mismatch, NotFound
from ..store.catalog import REVISION, get_meta
from ..store.packing import unpack_numbers
from ..store.store import StateGone, Store
from ..vectors.index import VectorIndex
from ..vectors.scan import Metric
from .columns import Columns


@dataclass(frozen=True)
class State:
    """One committed state; it does not change when the atlas does.

    Attributes:
        store: the catalog and feature files.
        revision: number of the state.
        columns: columns of the tiles, such as label and patient.
        index: vectors of the tiles.
        generation: number of the index file; 0 for none.
        about: plan, options and measurements of the index file.
        clusterings: the catalog's rows of the fitted clusterings, newest first.
        cluster_names: names that people gave to clusters, by clustering and number.
    """

    store: Store
    revision: int
    columns: Columns
    index: VectorIndex
    generation: int
    about: dict[str, Any]
    clusterings: list[dict[str, Any]]
    cluster_names: dict[str, dict[int, str]]

    @property
    def manifest(self) -> Manifest:
        """The manifest of the atlas's encoder."""
        return self.store.manifest

    @property
    def metric(self) -> Metric:
        """How vectors are compared."""
        return self.store.manifest.metric

    def require_tiles(self) -> None:
        """Check that the atlas has tiles.

        Raises:
            BadInput: it has none.
        """
        if not len(self.index):
            raise BadInput(f"{self.store.path} has no tiles yet; add features first")

    def positions(self, tiles: Sequence[int]) -> NDArray[np.int64]:
        """Return the positions (T,) of tiles by id.

        Raises:
            NotFound: the atlas has no tile with one of the ids.
        """
        positions = self.columns.positions(np.asarray(tiles, dtype=np.int64))
        if (positions < 0).any():
            missing = np.asarray(tiles)[positions < 0]
            raise NotFound(
                f"{self.store.path} has no tile {missing[0]}, or it was removed; search again"
            )
        return positions

    def vectors_at(self, positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the vectors (T, D) at positions (T,), from the feature files.

        Where prepared vectors are enough, ``index.at`` is much faster: it reads no whole files.

        Raises:
            Damaged: a feature file is missing or has changed since it was added.
        """
        slides = self.columns.slide_of(positions)
        vectors = np.empty((len(positions), self.manifest.dim), dtype=np.float32)
        for number in np.unique(slides).tolist():
            rows = slides == number
            of_slide = self.store.vectors_of(self.columns.slides[number])
            vectors[rows] = of_slide[positions[rows] - self.columns.starts[number]]
        return vectors

    def embeddings_at(self, positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the vectors (T, D) at positions (T,), from the index if it has them unchanged."""
        if self.metric == "l2" or self.manifest.normalised:
            return self.index.at(positions)
        return self.vectors_at(positions)

    def vectors_of(self, tiles: Sequence[int]) -> NDArray[np.float32]:
        """Return the vectors (T, D) of tiles by id; see :meth:`positions` and :meth:`vectors_at`."""
        return self.vectors_at(self.positions(tiles))

    def sample(self, count: int, seed: int) -> NDArray[np.int64]:
        """Return the positions of ``count`` tiles drawn at random, ascending; all if there are fewer."""
        self.require_tiles()
        rows = self.columns.present()
        drawn = np.random.default_rng(seed).choice(rows, min(count, len(rows)), replace=False)
        return np.sort(drawn)

    def mosaic_of(self, number: int) -> NDArray[np.int64]:
        """Return the positions (M,) of the mosaic of the slide with a number.

        Raises:
            Damaged: the slide has no mosaic.
        """
        slide = self.columns.slides[number]
        if slide["mosaic"] is None:
            raise Damaged(
                f"slide {slide['name']!r} was added by a version that was never released; build the "
                "atlas again from its feature files with `histoseek index create` and `index add`"
            )
        rows = unpack_numbers(slide["mosaic"], "<i4").astype(np.int64)
        return rows + int(self.columns.starts[number])

    def check_queries(self, queries: NDArray[np.float32]) -> None:
        """Check that vectors can be compared with those of this atlas.

        Raises:
            Mismatch: they have another length.
            BadInput: they are not finite.
        """
        if queries.ndim != 2 or queries.shape[1] != self.manifest.dim:
            raise Mismatch(
                f"the query vectors have the shape {queries.shape}; expected (N, {self.manifest.dim}), as "
                "in this atlas"
            )
        if not np.isfinite(queries).all():
            raise BadInput("the query vectors contain NaN or infinity; embed the images again")

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """Yield a connection to the catalog that sees exactly this state.

        Raises:
            StateGone: a writer has committed since.
        """
        with self.store.catalog.read() as db:
            self._check_revision(db)
            yield db
            self._check_revision(db)  # a folder that only others can write has no snapshot

    def _check_revision(self, db: Connection) -> None:
        if int(get_meta(db, REVISION)) != self.revision:
            raise StateGone(
                f"{self.store.path} has changed since revision {self.revision}; take a new view"
            )
