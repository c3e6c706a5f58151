"""Chooses an index and measures its recall against exact search.

Queries are tiles of the atlas that the index was not trained on; a tile never counts as its own neighbour.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import BadInput
from .files import IndexPlan
from .index import VectorIndex
from .scan import Mask, Metric, scan

EXACT_UP_TO = 100_000
"""Up to this many tiles, every query is compared with all of them."""
LEAST_FOR_LISTS = 1_000
PER_CELL = 64
"""Training vectors of k-means per list."""
QUERIES = 1_000
"""Query tiles that measure recall: half choose the settings, the other half judge the choice."""
WIDEN = (2, 3, 4, 6, 8, 16, 32, 64)
LISTS_OVERHEAD = 1.06
"""Factor for the memory of inverted lists besides codes and numbers, such as room for growth."""


@dataclass(frozen=True)
class IndexOptions:
    """Requirements for an index.

    Attributes:
        recall: share of the true nearest neighbours that a search must find; 1 for exact search.
        k: number of neighbours on which recall is measured.
        memory_mb: memory budget of the lists in MB; None for one byte per coordinate.
        exact_up_to: up to this many tiles, search is always exact.
        seed: of all random choices.
    """

    recall: float = 0.99
    k: int = 10
    memory_mb: float | None = None
    exact_up_to: int = EXACT_UP_TO
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0.5 <= self.recall <= 1:
            raise BadInput(f"recall is {self.recall}; expected 0.5 to 1")
        if self.k < 1:
            raise BadInput(f"k is {self.k}; expected 1 or more")
        if self.exact_up_to < 0:
            raise BadInput(f"exact_up_to is {self.exact_up_to}; expected 0 or more")
        if self.memory_mb is not None and self.memory_mb <= 0:
            raise BadInput(f"the memory budget is {self.memory_mb} MB; expected more than 0")


@dataclass(frozen=True)
class HeldOut:
    """Tiles held out of training, used as queries.

    Attributes:
        positions: (Q,) in the index.
        vectors: (Q, D) prepared.
    """

    positions: NDArray[np.int64]
    vectors: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.positions)

    def part(self, chosen: slice) -> HeldOut:
        """Return some of them."""
        return HeldOut(self.positions[chosen], self.vectors[chosen])


def plan_for(total: int, dim: int, options: IndexOptions) -> IndexPlan:
    """Return how to build an index of ``total`` vectors; :func:`tune` sets the probes.

    Raises:
        BadInput: the memory budget is too small for any index; the message gives the smallest.
    """
    few = total <= max(options.exact_up_to, LEAST_FOR_LISTS)
    if options.memory_mb is None:
        exact = few or options.recall == 1
        return IndexPlan() if exact else IndexPlan("ivf", "sq8", _cells(total))
    budget = options.memory_mb * 1e6
    if few and 4.0 * total * dim <= budget:
        return IndexPlan()
    if total <= LEAST_FOR_LISTS:
        raise BadInput(
            f"{total} vectors are too few to compress; expected more than {LEAST_FOR_LISTS}, or a larger "
            "memory budget"
        )
    budget -= 4 * dim * (_cells(total) + 256)  # centroids, and the codebook of pq
    room = budget / LISTS_OVERHEAD / total - 8  # bytes per vector beside its number
    if room >= dim:
        return IndexPlan("ivf", "sq8", _cells(total))
    fitting = [m for m in range(1, dim // 2 + 1) if dim % m == 0 and m <= room]
    if not fitting:
        least = ((1 + 8) * total * LISTS_OVERHEAD + 4 * dim * (_cells(total) + 256)) / 1e6
        raise BadInput(
            f"{total:,} vectors of length {dim} do not fit into {options.memory_mb:g} MB; the smallest "
            f"index takes about {least:.3g} MB"
        )
    return IndexPlan("ivf", "pq", _cells(total), code_bytes=fitting[-1])


def _cells(total: int) -> int:
    """Return the power of two nearest to 1.5 times the square root of the count; at least 8."""
    return int(2 ** max(3, round(np.log2(1.5 * np.sqrt(max(1, total))))))


def draw(
    chunks: Iterable[NDArray[np.float32]], total: int, dim: int, plan: IndexPlan, seed: int
) -> tuple[NDArray[np.float32], HeldOut]:
    """Draw, in two passes, a training sample and query tiles that are not in it.

    Returns:
        The sample (M, D) and the query tiles; both are empty for an exact plan.
    """
    nothing = np.zeros((0, dim), dtype=np.float32)
    if plan.kind == "flat":
        return nothing, HeldOut(np.zeros(0, dtype=np.int64), nothing)
    size = PER_CELL * (max(plan.cells, 256) if plan.coding == "pq" else plan.cells)
    shuffled = np.random.default_rng(seed).permutation(total)
    queries = np.sort(shuffled[: min(QUERIES, max(1, total // 10))])
    sample = np.sort(shuffled[len(queries) : len(queries) + size])
    return gather(chunks, sample, dim), HeldOut(queries, gather(chunks, queries, dim))


def gather(
    chunks: Iterable[NDArray[np.float32]], positions: NDArray[np.int64], dim: int
) -> NDArray[np.float32]:
    """Return the vectors (P, D) at ascending positions (P,)."""
    parts, start = [np.zeros((0, dim), dtype=np.float32)], 0
    for vectors in chunks:
        first, last = np.searchsorted(positions, [start, start + len(vectors)])
        parts.append(vectors[positions[first:last] - start])
        start += len(vectors)
    return np.concatenate(parts)


def neighbours(
    chunks: Iterable[NDArray[np.float32]], queries: HeldOut, k: int, metric: Metric
) -> NDArray[np.float32]:
    """Return the scores (Q, k) of the k nearest other tiles of each tile, by exact search."""
    scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
    start = 0
    for vectors in chunks:
        if not len(vectors):
            continue
        new_scores, new = scan(queries.vectors, vectors, min(k + 1, len(vectors)), metric)
        itself = new + start == queries.positions[:, None]
        scores = np.concatenate([scores, np.where(itself, -np.inf, new_scores)], axis=1)
        scores = -np.sort(-scores, axis=1)[:, :k]
        start += len(vectors)
    return scores if metric == "cosine" else -np.sqrt(np.maximum(-scores, 0))


def recall_of(
    index: VectorIndex,
    queries: HeldOut,
    truth: NDArray[np.float32],
    k: int,
    allowed: Mask | None = None,
) -> float:
    """Return the share of the true neighbours that a search finds.

    Args:
        index: to search.
        queries: query tiles; a tile does not count as its own neighbour.
        truth: (Q, k) scores of the true neighbours. Any tile that scores at least as high as the last of
            them counts as one, because tiles with the same image are interchangeable.
        k: number of neighbours.
        allowed: (N,) positions that may be found.
    """
    scores, found = index.search(queries.vectors, k + 1, allowed)
    other = (found >= 0) & (found != queries.positions[:, None])
    count = np.isfinite(truth).sum(axis=1)
    last = np.where(count > 0, truth[np.arange(len(truth)), np.maximum(count - 1, 0)], np.inf)
    near = other & (scores >= last[:, None] - 1e-5 * np.maximum(1, np.abs(last[:, None])))
    hits = np.minimum(near.sum(axis=1), count)
    return float((hits[count > 0] / count[count > 0]).mean()) if count.any() else 1.0


def tune(
    main: Any,
    exact_vectors: Any,
    plan: IndexPlan,
    chunks: Iterable[NDArray[np.float32]],
    queries: HeldOut,
    metric: Metric,
    options: IndexOptions,
) -> tuple[IndexPlan, dict[str, Any]]:
    """Choose the fewest candidates to rank again, and the fewest probes, that reach the recall.

    One half of the held-out tiles chooses them, the other half judges the choice. If the judged recall is
    too low, probes are added until it is reached or every list is read.

    Returns:
        The plan and the measurements.
    """
    if plan.kind == "flat":
        return plan, {"recall": 1.0, "exact": True}
    k = min(options.k, max(1, main.ntotal - 1))
    truth = neighbours(chunks, queries, k, metric)
    half = len(queries) // 2
    recent = np.zeros((0, main.d), dtype=np.float32)

    def reached(candidate: IndexPlan, part: slice) -> float:
        index = VectorIndex(main.d, metric, recent, main, candidate, exact_vectors)
        return recall_of(index, queries.part(part), truth[part], k)

    choosing, judging = slice(0, half), slice(half, None)
    best = plan
    for widen in WIDEN:
        best = replace(plan, widen=widen, probes=plan.cells)
        if reached(best, choosing) >= options.recall:
            break
    low, high = 0, best.cells  # the smallest sufficient number is in (low, high]
    while high - low > max(1, low // 8):
        middle = min(max(low + 1, 2 * low), (low + high) // 2) if low else 1
        if reached(replace(best, probes=middle), choosing) >= options.recall:
            high = middle
        else:
            low = middle
    chosen = replace(best, probes=high)
    judged = reached(chosen, judging)
    while judged < options.recall and chosen.probes < chosen.cells:
        probes = chosen.probes + max(1, chosen.probes // 4)
        chosen = replace(chosen, probes=min(chosen.cells, probes))
        judged = reached(chosen, judging)
    return chosen, {
        "recall": round(judged, 5),
        "k": k,
        "queries": len(queries) - half,
        "reached": judged >= options.recall,
    }
