"""The mosaic of a slide: a few representative tiles (Yottixel, Kalra et al. 2020).

The tiles are clustered. From every cluster, some tiles are kept that are spread over the slide. Yottixel
clusters colour histograms; here the embeddings are clustered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .kmeans import distinct, kmeans, nearest_centroid

CLUSTERS = 9
"""Yottixel's number of clusters."""
SHARE = 0.05
"""Share of a cluster's tiles that are kept: Yottixel's 5 %."""
LEAST = 2
FIT_SAMPLE = 5_000


def mosaic(
    vectors: NDArray[np.float32],
    places: NDArray[Any],
    seed: int = 0,
    clusters: int = CLUSTERS,
    share: float = SHARE,
) -> NDArray[np.int64]:
    """Return the rows (M,) ascending of the tiles that represent a slide.

    Args:
        vectors: (N, D) prepared.
        places: (N, 2) level-0 coordinates x, y; the tiles kept from a cluster are spread over these.
        seed: of the clustering.
        clusters: maximum number of clusters.
        share: share of each cluster's tiles to keep, but at least two tiles if there are two.
    """
    few = len(vectors) <= clusters * LEAST
    count = 0 if few else min(clusters, distinct(vectors.astype(np.float64)))
    if count < 2:
        return np.arange(min(len(vectors), clusters * LEAST))
    flat = vectors.astype(np.float64)
    some = np.random.default_rng(seed).permutation(len(flat))[:FIT_SAMPLE]
    group, _ = nearest_centroid(flat, kmeans(flat[some], count, seed, starts=1))
    chosen: list[int] = []
    for number in range(count):
        rows = np.flatnonzero(group == number)
        keep = min(len(rows), max(LEAST, round(share * len(rows))))
        chosen += rows[_spread(places[rows].astype(np.float64), keep, seed)].tolist()
    return np.array(sorted(chosen), dtype=np.int64)


def mosaic_of_groups(
    vectors: NDArray[np.float32], places: NDArray[Any], groups: Sequence[str] | None
) -> NDArray[np.int64]:
    """Return the rows (M,) ascending that represent a tile set: one mosaic per group (patient)."""
    if groups is None or not any(groups):
        return mosaic(vectors, places)
    _, number = np.unique(np.array(groups), return_inverse=True)
    order = np.argsort(number, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(number[order])) + 1)
    chosen = [part[mosaic(vectors[part], places[part])] for part in parts]
    return np.sort(np.concatenate(chosen))


def _spread(places: NDArray[np.float64], count: int, seed: int) -> NDArray[np.int64]:
    """Return ``count`` rows spread over the coordinates: the row nearest to each k-means centre."""
    if count >= len(places):
        return np.arange(len(places))
    if count >= distinct(places):  # a tile set: all coordinates are equal
        return np.linspace(0, len(places) - 1, count).astype(np.int64)
    group, distance = nearest_centroid(places, kmeans(places, count, seed, starts=1))
    rows = [np.flatnonzero(group == n) for n in range(count)]
    return np.array([r[distance[r].argmin()] for r in rows if len(r)], dtype=np.int64)
