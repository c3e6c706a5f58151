"""Measures the index of an atlas: recall against exact search, latency, and size."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import numpy as np

from ...errors import BadInput
from ..opened import OpenAtlas
from ..search.tiles import allowed
from ..vectors.index import VectorIndex
from ..vectors.scan import Mask, Vectors, prepared
from ..vectors.tuning import HeldOut, recall_of
from ..view import View

LATENCY_RUNS = 20


def audit(atlas: OpenAtlas, queries: int, k: int, seed: int, where: str | None) -> dict[str, Any]:
    """Measure the current index; see :meth:`Atlas.audit <histoseek.index.atlas.Atlas.audit>`."""
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
        "notes": view.notes(where),
        "passing": len(alive) if passing is None else int(passing[alive].sum()),
        "plan": asdict(index.plan),
        "tiles": len(index),
        "tiles_since_the_index_was_written": index.recent_rows,
        "removed_since": index.positions - len(index),
        **_measure(index, HeldOut(picked, vectors), k, passing),
        "bytes_of_the_vectors": 4 * len(index) * state.manifest.dim,
        "when_built": state.about.get("measured", {}),
    }


def _measure(index: VectorIndex, queries: HeldOut, k: int, allowed: Mask | None) -> dict[str, Any]:
    """Measure recall@k and latency of an index, and the latency of exact search."""
    scores, positions = index.search(queries.vectors, k + 1, allowed, exact=True)
    other = (positions >= 0) & (positions != queries.positions[:, None])
    truth = -np.sort(-np.where(other, scores, -np.inf), axis=1)[:, :k]
    recall = round(recall_of(index, queries, truth, k, allowed), 5)
    report: dict[str, Any] = {"queries": len(queries), "k": k, "recall": recall}
    batch = queries.vectors[:100]

    def median(parts: Iterable[Vectors], exact: bool) -> float:
        times = [_milliseconds(index, part, k, allowed, exact) for part in parts]
        return round(statistics.median(times), 3)

    for name, exact in (("index", False), ("exact", True)):
        report[f"{name}_ms_per_query"] = median(queries.vectors[:LATENCY_RUNS, None], exact)
        report[f"{name}_ms_per_{len(batch)}_queries"] = median([batch] * 3, exact)
    return report


def _milliseconds(
    index: VectorIndex, queries: Vectors, k: int, allowed: Mask | None, exact: bool
) -> float:
    started = time.perf_counter()
    index.search(queries, k, allowed, exact)
    return 1000 * (time.perf_counter() - started)
