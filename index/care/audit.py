"""Measures the index of an atlas: recall against exact search, latency, and size."""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import BadInput
from ..opened import OpenAtlas
from ..search.tiles import allowed
from ..vectors.index import VectorIndex
from ..vectors.scan import Mask, prepared
from ..vectors.tuning import HeldOut, recall_of
from ..view import View

LATENCY_RUNS = 20


def audit(
    atlas: OpenAtlas, queries: int = 500, k: int = 10, seed: int = 1, where: str | None = None
) -> dict[str, Any]:
    """Measure recall, latency and size of the current index.

    Args:
        atlas: the atlas to measure.
        queries: number of query tiles from the atlas; a tile does not count as its own neighbour.
        k: number of neighbours.
        seed: of the choice of queries.
        where: metadata filter for the measured searches.

    Raises:
        BadInput: a number is out of range, or no tile passes the filter.
    """
    if queries < 1 or k < 1 or seed < 0:
        raise BadInput(
            f"queries is {queries}, k is {k}, seed is {seed}; expected at least 1, 1 and 0"
        )
    report = atlas.ask(_audit, queries, k, seed, where)
    return {**report, "bytes": atlas.generations.bytes_on_disk()}


def _audit(view: View, queries: int, k: int, seed: int, where: str | None) -> dict[str, Any]:
    state, index = view.state, view.index
    picked = state.sample(queries, seed)
    vectors = prepared(state.vectors_at(picked), state.metric)
    passing = allowed(state, where)
    if passing is not None and not passing.any():
        raise BadInput(f"no tile passes the filter {where!r}; use a wider filter")
    alive = state.columns.present()
    return {
        "generation": view.generation,
        "revision": view.revision,
        "where": where,
        "passing": len(alive) if passing is None else int(passing[alive].sum()),
        "plan": index.plan.as_dict(),
        "tiles": len(index),
        "tiles_since_the_index_was_written": index.recent_rows,
        "removed_since": index.positions - len(index),
        **_measure(index, HeldOut(picked, vectors), k, passing),
        "bytes_of_the_vectors": 4 * len(index) * state.manifest.dim,
        "when_built": state.about.get("measured", {}),
    }


def _measure(
    index: VectorIndex, asked: HeldOut, k: int, allowed: Mask | None = None
) -> dict[str, Any]:
    """Measure recall@k and latency of an index, and the latency of exact search.

    Args:
        index: the index to measure.
        asked: query tiles of the atlas; a tile does not count as its own neighbour.
        k: number of neighbours.
        allowed: (N,) positions that may be found; None for all.
    """
    scores, true = index.search(asked.vectors, k + 1, allowed, exact=True)
    lost = (true == asked.positions[:, None]) | (true < 0)
    truth = -np.sort(-np.where(lost, -np.inf, scores), axis=1)[:, :k]
    report: dict[str, Any] = {
        "queries": len(asked),
        "k": k,
        "recall": round(recall_of(index, asked, truth, k, allowed), 5),
    }
    batch = asked.vectors[:100]
    for name, exact in (("index", False), ("exact", True)):
        one = [
            _milliseconds(index, asked.vectors[n : n + 1], k, allowed, exact)
            for n in range(min(LATENCY_RUNS, len(asked)))
        ]
        whole = [_milliseconds(index, batch, k, allowed, exact) for _ in range(3)]
        report[f"{name}_ms_per_query"] = round(statistics.median(one), 3)
        report[f"{name}_ms_per_{len(batch)}_queries"] = round(statistics.median(whole), 3)
    return report


def _milliseconds(
    index: VectorIndex, queries: NDArray[np.float32], k: int, allowed: Mask | None, exact: bool
) -> float:
    started = time.perf_counter()
    index.search(queries, k, allowed, exact)
    return 1000 * (time.perf_counter() - started)
