"""k-means and HDBSCAN fits as plain arrays, and the assignment of new images to their clusters.

Both work on the principal components that explain 95 % of the variance (paper 004). A new image gets a
cluster, a distance and a strength from 0 to 1. If it fits no cluster, it is ``unknown``.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...artifacts.manifest import OOD_THRESHOLD, above_threshold
from ...errors import BadInput, unknown_name
from . import hdbscan as density
from .clustering import FITTED, METHODS, Assigned, Clustering
from .hdbscan import Arrays
from .kmeans import basis_of, fit_kmeans, project

FIT_SAMPLE = 200_000


def fit(
    vectors: NDArray[np.float32],
    method: str,
    k: int | None = None,
    min_cluster_size: int | None = None,
    seed: int = 0,
    groups: NDArray[np.int64] | None = None,
    gate: bool = False,
) -> tuple[Clustering, Assigned]:
    """Fit clusters and assign the fitted vectors to them.

    Args:
        vectors: (N, D).
        method: kmeans or hdbscan.
        k: number of clusters of k-means; None tries 2 to 10 and takes the best silhouette (paper 004).
        min_cluster_size: of HDBSCAN; None takes max(15, N / 40), at most N / 2.
        seed: of k-means, and of the silhouette's sample.
        groups: (N,) patient or slide of each vector; k-means calibrates its thresholds for ``unknown`` on
            groups held out in turn.
        gate: whether the encoder has a tissue gate (``Manifest.tissue_gate``). Vectors out of
            distribution are unknown and not fitted. If most vectors are, the encoder was not made for
            such images: then the gate is ignored, and ``about`` says so.

    Raises:
        BadInput: the method is unknown, or there are too few vectors; the message says how many are needed.
    """
    if method not in FITTED:
        raise unknown_name("method", method, METHODS)
    if seed < 0:
        raise BadInput(f"seed is {seed}; expected 0 or more")
    if min_cluster_size is not None and min_cluster_size < 2:
        raise BadInput(f"min_cluster_size is {min_cluster_size}; expected 2 or more")
    least = max(3, (k or 0) + 1) if method == "kmeans" else 10
    everything, is_fitted = vectors, to_fit(vectors, gate)
    vectors, groups = vectors[is_fitted], None if groups is None else groups[is_fitted]
    left_out = len(everything) - len(vectors)
    if len(vectors) < least:
        also = f" ({left_out} more are out of distribution)" if left_out else ""
        of = f"k = {k}" if method == "kmeans" and k else method
        raise BadInput(
            f"{len(vectors)} tiles{also} are too few for {of}; expected at least {least}"
        )
    basis = basis_of(vectors)
    flat = project(vectors, basis)
    gate_used = gate and not above_threshold(vectors).any()
    if gate_used:
        basis["foreign"] = np.asarray(OOD_THRESHOLD)
    facts = {"fitted_tiles": len(flat), "components": len(basis["components"]), "seed": seed}
    if gate:
        facts["foreign_tiles"] = int(above_threshold(everything).sum())
        facts["gate_ignored"] = not gate_used
    if method == "kmeans":
        arrays, about = fit_kmeans(flat, k, seed, groups)
        clustering = Clustering("kmeans", basis | arrays, {**about, **facts})
        return clustering, clustering.assign(everything)
    arrays, about, of_fitted = _fit_hdbscan(flat, min_cluster_size)
    clustering = Clustering("hdbscan", basis | arrays, {**about, **facts})
    if not left_out:
        return clustering, of_fitted
    assigned = clustering.assign(everything)
    for column in fields(Assigned):
        getattr(assigned, column.name)[is_fitted] = getattr(of_fitted, column.name)
    return clustering, assigned


def _fit_hdbscan(
    flat: NDArray[np.float64], min_cluster_size: int | None
) -> tuple[Arrays, dict[str, Any], Assigned]:
    """Fit HDBSCAN to components (N, C); return its arrays, facts, and the clusters of the tiles."""
    size = min_cluster_size or max(15, len(flat) // 40)
    size = max(2, min(size, len(flat) // 2))
    arrays = density.fit_arrays(flat, size)
    labels = arrays["labels"]
    about = {
        "clusters": int(labels.max()) + 1,
        "min_cluster_size": size,
        "noise_share": round(float(np.mean(labels < 0)), 4),
    }
    reach = density.distances_of_fitted(arrays)
    return arrays, about, Assigned(labels, reach, arrays["strengths"], labels < 0)


def to_fit(vectors: NDArray[np.float32], gate: bool) -> NDArray[np.bool_]:
    """Return which vectors (N, D) to fit clusters to, (N,): those that pass the encoder's tissue gate.

    These are all vectors if there is no gate, or if more than half of them are out of distribution.
    """
    if not gate or 2 * np.sum(above_threshold(vectors)) > len(vectors):
        return np.ones(len(vectors), dtype=bool)
    return ~above_threshold(vectors)
