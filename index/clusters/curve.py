"""Curves for choosing the number of clusters: separation and stability.

Silhouette (Rousseeuw 1987) measures how much nearer tiles are to their cluster than to the next one.
Stability (after Ben-Hur, Elisseeff and Guyon 2002) is the mean adjusted Rand index, over all tiles, between
fits on random halves. It is low if the clusters depend on the draw.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import BadInput, unknown_name
from ...metrics import silhouette
from . import hdbscan as density
from .clustering import FITTED
from .hdbscan import Floats
from .kmeans import basis_of, distinct, kmeans, nearest_centroid, project

CURVE_SAMPLE = 20_000
K_TRIED = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20)
SIZES_TRIED = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1)
"""Values tried for HDBSCAN's minimum cluster size, as shares of the tiles."""
HALVES = 3


def curve(vectors: NDArray[np.float32], method: str, seed: int = 0) -> list[dict[str, Any]]:
    """Return silhouette and stability for several numbers (or sizes) of clusters.

    Args:
        vectors: (N, D); of more than 20,000 a random sample is used.
        method: kmeans or hdbscan.
        seed: of all random choices.

    Raises:
        BadInput: the method is unknown, or there are too few tiles.
    """
    if method not in FITTED:
        raise unknown_name("method", method, FITTED)
    if seed < 0:
        raise BadInput(f"seed is {seed}; expected 0 or more")
    if len(vectors) < 20:
        raise BadInput(f"{len(vectors)} tiles are too few for a curve; expected at least 20")
    rng = np.random.default_rng(seed)
    sample = vectors[np.sort(rng.permutation(len(vectors))[:CURVE_SAMPLE])]
    flat = project(sample, basis_of(sample))
    halves = [np.array_split(rng.permutation(len(flat)), 2) for _ in range(HALVES)]
    if method == "kmeans":
        most = min(distinct(flat), len(flat) // 4)
        return [_kmeans_row(flat, k, halves, seed) for k in K_TRIED if k <= most]
    sizes = sorted({max(5, round(share * len(flat))) for share in SIZES_TRIED})
    return [_hdbscan_row(flat, size, halves, seed) for size in sizes if size <= len(flat) // 4]


def _agreement(labels: list[tuple[NDArray[np.int64], NDArray[np.int64]]]) -> float | None:
    """Mean adjusted Rand index; None if a fit found fewer than two clusters."""
    from sklearn.metrics import adjusted_rand_score

    if any(len(np.unique(found[found >= 0])) < 2 for pair in labels for found in pair):
        return None
    return round(float(np.mean([adjusted_rand_score(a, b) for a, b in labels])), 4)


def _rounded(value: float) -> float | None:
    return None if np.isnan(value) else round(value, 4)


def _kmeans_row(
    flat: Floats, k: int, halves: list[list[NDArray[np.int64]]], seed: int
) -> dict[str, Any]:
    def labels(rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return nearest_centroid(flat, kmeans(flat[rows], k, seed))[0]

    found = nearest_centroid(flat, kmeans(flat, k, seed))[0]
    return {
        "k": k,
        "silhouette": _rounded(silhouette(flat, found, seed)),
        "stability": _agreement([(labels(a), labels(b)) for a, b in halves]),
    }


def _hdbscan_row(
    flat: Floats, size: int, halves: list[list[NDArray[np.int64]]], seed: int
) -> dict[str, Any]:
    def labels(rows: NDArray[np.int64]) -> NDArray[np.int64]:
        # Half the tiles have half the density, so the minimum cluster size is halved too.
        return density.place(flat, density.fit_arrays(flat[rows], max(2, size // 2)))[0]

    arrays = density.fit_arrays(flat, size)
    found = arrays["labels"]
    return {
        "min_cluster_size": size,
        "clusters": int(found.max()) + 1,
        "noise_share": round(float(np.mean(found < 0)), 4),
        "silhouette": _rounded(silhouette(flat, found, seed)),
        "stability": _agreement([(labels(a), labels(b)) for a, b in halves]),
    }
