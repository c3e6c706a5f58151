"""Nearest neighbours by FAISS, over the index file and the recent vectors.

The main part is the index file. It is exact (``flat``), or has inverted lists (``ivf``) of shorter codes
(``sq8``, ``pq``); the candidates found by codes are ranked again by the exact vectors in a second file. The
recent vectors, which were added after the file was written, are searched exactly. Positions number the
main part first, then the recent vectors.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .files import GPU_LIMIT, IndexPlan
from .scan import (
    Found,
    Mask,
    Metric,
    Positions,
    Vectors,
    empty_hits,
    import_faiss,
    matrix_of,
    merged,
    prepared,
    rescored,
    scan,
)

FILTER_EXACT = 200_000
"""If a filter keeps at most this many vectors, compare all of them; lists could miss far matches."""
FILTER_MARGIN = 8
"""With more vectors than that, a filtered search reads this many times what an unfiltered one reads."""
FILTER_VALUES = 32_000_000
"""Maximum number of coordinates of filtered vectors held in memory at once (128 MB)."""
FILTERS_KEPT = 4


@dataclass(frozen=True)
class _Passing:
    """The vectors of the main part that pass a filter.

    Attributes:
        mask: (M + T,) of the whole index.
        rows: (P,) positions that pass.
        vectors: (P, D) vectors that pass, if they are few enough to compare them all.
        counts: (cells,) how many pass in each cell, if they are many; None also if the mask leaves out only
            removed vectors, because then the cells need not be counted.
        bits: the mask as FAISS reads it.
    """

    mask: Mask
    rows: Positions
    vectors: Vectors | None
    counts: Any
    bits: Any


class VectorIndex:
    """Nearest neighbours of vectors, by position.

    For ``cosine`` the score is the cosine similarity (1 is the same direction). For ``l2`` it is the
    negative Euclidean distance. In both, higher is nearer.
    """

    def __init__(
        self,
        dim: int,
        metric: Metric,
        recent: Vectors,
        main: Any = None,
        plan: IndexPlan | None = None,
        exact_vectors: Any = None,
        alive: Mask | None = None,
        gpu: Any = None,
    ) -> None:
        """Join the parts.

        Args:
            dim: D.
            metric: how vectors are compared.
            recent: (T, D) prepared vectors; their positions follow those of ``main``.
            main: FAISS index; its numbers are the first positions.
            plan: of ``main``.
            exact_vectors: FAISS's flat index of the exact vectors, if ``main`` holds codes.
            alive: (M + T,) positions not removed; None for all.
            gpu: copy of ``main`` on GPUs (:func:`gpu_copy`).
        """
        self.dim, self.metric, self.plan = dim, metric, plan or IndexPlan()
        self._main, self._recent, self._alive = main, recent, alive
        self._main_rows = 0 if main is None else int(main.ntotal)
        self._refined: Any = None
        self._exact_index = main  # owns the memory of self._exact
        if exact_vectors is not None:
            self._refined = import_faiss().IndexRefine(main, exact_vectors)
            self._exact_index = exact_vectors
        self._exact: Any = None if main is None else matrix_of(self._exact_index)
        self._cells: NDArray[np.int32] | None = None
        self._gpu = gpu
        self._filters: list[_Passing] = []
        self._masks: list[tuple[Mask, Mask]] = []
        self._count = self.positions if alive is None else int(alive.sum())
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Number of vectors that a search can find."""
        return self._count

    @property
    def positions(self) -> int:
        """Number of positions, including those of removed vectors."""
        return self._main_rows + len(self._recent)

    @property
    def recent_rows(self) -> int:
        """Number of vectors added after the main part was written."""
        return len(self._recent)

    def at(self, positions: Positions) -> Vectors:
        """Return the prepared vectors (T, D) at positions (T,), as they are searched.

        They are not compared with the feature files; ``index verify`` does that.
        """
        if not self._main_rows:
            return self._recent[positions]
        found = np.empty((len(positions), self.dim), dtype=np.float32)
        late = positions >= self._main_rows
        found[~late] = self._exact[positions[~late]]
        found[late] = self._recent[positions[late] - self._main_rows]
        return found

    # -- searching ------------------------------------------------------------------------------

    def search(
        self, queries: Vectors, k: int, allowed: Mask | None = None, exact: bool = False
    ) -> Found:
        """Return scores (Q, k') and positions (Q, k'), best first; -1 fills missing hits.

        Args:
            queries: (Q, D).
            k: maximum number of hits; k' is smaller if the index holds fewer vectors.
            allowed: (positions,) which may be found; None for all.
            exact: compare with every vector, regardless of the plan.
        """
        mask = self._mask(allowed)
        k = min(k, self.positions)
        if k == 0 or not len(queries):
            return empty_hits(len(queries), 0)
        ready = prepared(queries, self.metric)
        rows = self._main_rows
        parts = []
        if rows:
            parts.append(self._search_main(ready, k, mask, exact))
        if len(self._recent):
            part = None if mask is None else mask[rows:]
            scores, found = scan(ready, self._recent, k, self.metric, part)
            parts.append((scores, np.where(found >= 0, found + rows, -1)))
        scores, found = merged(parts, k)
        if self.metric == "l2":
            scores = -np.sqrt(np.maximum(-scores, 0))
        return scores, found

    def _mask(self, allowed: Mask | None) -> Mask | None:
        """Return the positions that may be found; the last mask is cached, as filters are often reused."""
        if allowed is None or self._alive is None:
            return self._alive if allowed is None else allowed
        if allowed is self._alive:
            return allowed
        with self._lock:
            for given, both in self._masks:
                if given is allowed or both is allowed:
                    return both
            both = allowed & self._alive
            self._masks = [(allowed, both), *self._masks[: FILTERS_KEPT - 1]]
            return both

    def _search_main(self, ready: Vectors, k: int, mask: Mask | None, exact: bool) -> Found:
        head = None if mask is None else mask[: self._main_rows]
        if head is not None and not head.any():
            return empty_hits(len(ready), k)
        if self.plan.kind == "flat":
            return scan(ready, self._exact, k, self.metric, head)
        passing = None
        if mask is not None and head is not None and not head.all():
            passing = self._passing(mask, head)
            if passing.vectors is not None:
                scores, found = scan(ready, passing.vectors, k, self.metric)
                return scores, np.where(found >= 0, passing.rows[found], -1)
        if exact:
            return scan(ready, self._exact, k, self.metric, head)
        there = self._main_rows if passing is None else len(passing.rows)
        return self._search_enough(ready, min(k, there), passing)

    def _search_enough(self, ready: Vectors, k: int, passing: _Passing | None) -> Found:
        """Search the lists; read more of them if the usual number yields fewer than k hits."""
        usual = self.plan.probes * self._main_rows / self.plan.cells
        times = 1
        while times * usual < 2 * k and times < self.plan.cells:
            times *= 2
        while True:
            scores, found = self._search_lists(ready, k, passing, times)
            if times >= self.plan.cells or (found >= 0).all():
                return scores, found
            times *= 4

    def _search_lists(self, ready: Vectors, k: int, passing: _Passing | None, times: int) -> Found:
        """Search with ``times`` times the usual number of probes."""
        faiss = import_faiss()
        wide = min(self._main_rows, k * self.plan.widen)
        if passing is not None and passing.counts is not None:
            found = self._search_passing(ready, wide, passing, times)
            return rescored(ready, self._exact, found, k, self.metric)
        if self._gpu is not None and passing is None and times == 1 and wide <= GPU_LIMIT:
            return rescored(ready, self._exact, self._gpu.search(ready, wide)[1], k, self.metric)
        probes = min(self.plan.cells, times * self.plan.probes)
        lists = faiss.SearchParametersIVF(nprobe=probes)
        if passing is not None:  # removed vectors are only skipped
            lists.sel = selector = faiss.IDSelectorBitmap(passing.bits)  # noqa: F841 - kept alive
        parameters = faiss.IndexRefineSearchParameters(k_factor=wide / k, base_index_params=lists)
        scores, found = self._refined.search(ready, k, params=parameters)
        return scores if self.metric == "cosine" else -scores, found

    def _passing(self, mask: Mask, head: Mask) -> _Passing:
        """Return what passes a filter in the main part; the results for the last filters are cached."""
        with self._lock:
            for cached in self._filters:
                if cached.mask is mask:
                    return cached
        rows = np.flatnonzero(head)
        bits = np.packbits(head, bitorder="little")
        if mask is self._alive:
            passing = _Passing(mask, rows, None, None, bits)
        elif len(rows) <= min(FILTER_EXACT, FILTER_VALUES // self.dim):
            passing = _Passing(mask, rows, self._exact[rows], None, None)
        else:
            counts = np.bincount(self._cell_of()[rows], minlength=self.plan.cells)
            passing = _Passing(mask, rows, None, counts, bits)
        with self._lock:
            self._filters = [passing, *self._filters[: FILTERS_KEPT - 1]]
        return passing

    def _search_passing(self, ready: Vectors, k: int, passing: _Passing, times: int) -> Positions:
        """Return candidates (Q, k) that pass the filter, ranked by their codes."""
        faiss = import_faiss()
        selector = faiss.IDSelectorBitmap(passing.bits)
        distances, cells = self._cells_to_read(ready, passing, times)
        scores = np.empty((len(ready), k), dtype=np.float32)
        found = np.empty((len(ready), k), dtype=np.int64)
        parameters = faiss.SearchParametersIVF(nprobe=cells.shape[1], sel=selector)
        pointer = faiss.swig_ptr
        self._main.search_preassigned_c(
            len(ready), pointer(ready), k, pointer(cells), pointer(distances), pointer(scores),
            pointer(found), False, parameters,
        )  # fmt: skip
        return found

    def _cells_to_read(
        self, ready: Vectors, passing: _Passing, times: int
    ) -> tuple[NDArray[np.float32], Positions]:
        """Return distances and numbers (Q, P) of the nearest cells that hold enough passing vectors.

        A filter may leave few or no vectors in the cells around a query. So the search reads cells until
        they hold enough passing vectors, instead of a fixed number of cells.
        """
        cells = self.plan.cells
        usual = self.plan.probes * self._main_rows / cells
        enough = np.inf if times >= cells else FILTER_MARGIN * usual * times
        per_cell = len(passing.rows) / cells
        width = cells if enough == np.inf else min(cells, 8 + 2 * int(enough / per_cell))
        while True:
            distances, near = self._main.quantizer.search(ready, width)
            counts = passing.counts[near]
            before = np.cumsum(counts, axis=1) - counts
            if width == cells or (before[:, -1] >= enough).all():
                break
            width = min(cells, 4 * width)
        read = (counts > 0) & (before < enough)
        order = np.argsort(~read, axis=1, kind="stable")[:, : max(1, int(read.sum(axis=1).max()))]
        chosen = np.take_along_axis(np.where(read, near, -1), order, 1)
        nearest = np.take_along_axis(distances, order, 1)
        return np.ascontiguousarray(nearest), np.ascontiguousarray(chosen)

    def _cell_of(self) -> NDArray[np.int32]:
        """Return the cell of every vector of the main part (M,); all -1 if there are no cells."""
        if self._cells is None:
            faiss, lists = import_faiss(), self._main.invlists
            cells = np.full(self._main_rows, -1, dtype=np.int32)
            for cell in range(self.plan.cells):
                if size := lists.list_size(cell):
                    cells[faiss.rev_swig_ptr(lists.get_ids(cell), size)] = cell
            self._cells = cells
        return self._cells

    def within(
        self, queries: Vectors, least: float, allowed: Mask | None = None, limit: int = 1_000_000
    ) -> list[tuple[NDArray[np.float32], Positions]]:
        """Return, per query, scores and positions of all vectors above a threshold, best first; exact.

        Args:
            queries: (Q, D).
            least: lowest score to return.
            allowed: as in :meth:`search`.
            limit: maximum number per query.
        """
        mask = self._mask(allowed)
        answers = []
        for query in queries:
            # Increasing k step by step finds all without a score for every vector in memory.
            k = min(256, max(1, self.positions))
            while True:
                scores, found = self.search(query[None], k, mask, exact=True)
                inside = (found[0] >= 0) & (scores[0] >= least)
                if inside.sum() < found.shape[1] or k >= min(limit, self.positions):
                    break
                k = min(4 * k, limit, self.positions)
            answers.append((scores[0][inside], found[0][inside]))
        return answers
