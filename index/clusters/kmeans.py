"""k-means on whitened principal components, with a calibrated radius per cluster."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import BadInput
from ...metrics import silhouette
from ..vectors.scan import CHUNK_VALUES, import_faiss
from .hdbscan import Arrays, Floats

K_RANGE = range(2, 11)
KNOWN_SHARE = 0.99
"""Quantile of the held-out tiles' distances to a centroid; a tile farther away is unknown."""
PIECE = 8_192
"""Number of vectors converted to float64 at once."""
CALIBRATION_FOLDS = 5
CALIBRATION_LEAST = 100
"""Least number of held-out tiles from which a cluster gets a threshold of its own."""


def basis_of(vectors: NDArray[np.float32], keep: float = 0.95) -> Arrays:
    """Return the mean and the principal components that explain the share ``keep`` of the variance.

    The (D, D) covariance is summed in pieces, so memory does not grow with the number of vectors.
    scikit-learn's PCA gives the same components in the same time, but copies all vectors as float64.
    """
    count, dim = vectors.shape
    mean = vectors.mean(axis=0, dtype=np.float64)
    covariance = np.zeros((dim, dim))
    for start in range(0, count, PIECE):
        centred = vectors[start : start + PIECE] - mean
        covariance += centred.T @ centred
    values, axes = np.linalg.eigh(covariance)
    values, axes = np.maximum(values[::-1], 0), axes[:, ::-1]
    most = min(count, dim)
    share = np.cumsum(values[:most]) / max(values.sum(), 1e-300)
    kept = min(int((share < keep).sum()) + 1, most)
    return {"mean": mean, "components": np.ascontiguousarray(axes[:, :kept].T)}


def project(vectors: NDArray[np.float32], arrays: Arrays) -> Floats:
    """Return vectors (N, D) projected on the components: (N, C)."""
    flat: Floats = np.empty((len(vectors), len(arrays["components"])))
    for start in range(0, len(vectors), PIECE):
        part = slice(start, start + PIECE)
        flat[part] = (vectors[part].astype(np.float64) - arrays["mean"]) @ arrays["components"].T
    return flat


def kmeans(
    flat: Floats, k: int, seed: int, start: Floats | None = None, starts: int = 10
) -> Floats:
    """Return centroids (k, C) of points (N, C) by FAISS: the best of ``starts`` runs, or from ``start``."""
    faiss = import_faiss()
    model = faiss.Kmeans(
        flat.shape[1],
        k,
        niter=100 if start is None else 10,
        nredo=starts if start is None else 1,
        seed=seed,
        min_points_per_centroid=1,
        max_points_per_centroid=len(flat),
    )
    plus_plus = getattr(faiss, "ClusteringInitMethod_KMEANS_PLUS_PLUS", None)
    if plus_plus is not None:  # FAISS from 1.13 on
        model.cp.init_method = plus_plus
        model.cp.early_stop_threshold = 1e-6  # relative improvement of an iteration
    given = None if start is None else start.astype(np.float32)
    model.train(flat.astype(np.float32), init_centroids=given)
    return np.asarray(model.centroids, dtype=np.float64)


def nearest_centroid(flat: Floats, centroids: Floats) -> tuple[NDArray[np.int64], Floats]:
    """Return the nearest centroid of each point (N,) and the distance (N,)."""
    distances, order = nearest_two(flat, centroids)
    return order[:, 0], distances[:, 0]


def nearest_two(flat: Floats, centroids: Floats) -> tuple[Floats, NDArray[np.int64]]:
    """Return distances and numbers (N, 2) of the two nearest centroids; (N, 1) if there is only one."""
    from scipy.spatial.distance import cdist

    count = min(2, len(centroids))
    distances = np.empty((len(flat), count))
    order = np.empty((len(flat), count), dtype=np.int64)
    step = max(1, CHUNK_VALUES // max(1, len(centroids)))
    for first in range(0, len(flat), step):
        part = slice(first, first + step)
        all_ = cdist(flat[part], centroids)
        order[part] = np.argsort(all_, axis=1, kind="stable")[:, :count]
        distances[part] = np.take_along_axis(all_, order[part], 1)
    return distances, order


def distinct(flat: Floats) -> int:
    """Return the number of distinct points."""
    return len(np.unique(flat.round(9), axis=0))


def fit_kmeans(
    flat: Floats, k: int | None, seed: int, groups: NDArray[np.int64] | None
) -> tuple[Arrays, dict[str, Any]]:
    """Fit k-means to components (N, C); return its arrays and facts about the fit."""
    different = distinct(flat)
    if k is not None and k > different:
        raise BadInput(
            f"k is {k}, but only {different} of {len(flat)} tiles are different; lower --k"
        )
    if different < min(K_RANGE):
        raise BadInput(
            f"all {len(flat)} tiles are equal; expected at least {min(K_RANGE)} different tiles"
        )
    curve: dict[str, float | None] = {}
    if k is None:
        counts = [count for count in K_RANGE if count <= different and count < len(flat)]
        fits = {count: kmeans(flat, count, seed) for count in counts}
        scores = {c: silhouette(flat, nearest_centroid(flat, fits[c])[0], seed) for c in counts}
        curve = {str(c): None if np.isnan(s) else s for c, s in scores.items()}
        centroids = fits[max(counts, key=lambda count: np.nan_to_num(scores[count], nan=-1))]
    else:
        centroids = kmeans(flat, k, seed)
    arrays: Arrays = {"centroids": centroids}
    arrays["reach"], how = _calibrated_reach(flat, centroids, groups, seed)
    about: dict[str, Any] = {
        "clusters": len(centroids),
        "k": "auto" if k is None else k,
        "unknown_calibrated_on": how,
    }
    if curve:
        about["silhouette_by_k"] = curve
    return arrays, about


def _calibrated_reach(
    flat: Floats, centroids: Floats, groups: NDArray[np.int64] | None, seed: int
) -> tuple[Floats, str]:
    """Return the threshold distance of each cluster (K,) for ``unknown``, and how it was found.

    Groups (patients or slides) are held out in turn; the centroids are refitted to the other groups,
    starting from their fitted positions. Each threshold includes :data:`KNOWN_SHARE` of the held-out tiles
    that are assigned to the cluster. A cluster with too few of them gets the threshold over all clusters,
    scaled by its spread.
    """
    if groups is None or len(np.unique(groups)) < CALIBRATION_FOLDS:
        groups, how = np.arange(len(flat)), "tiles"
    else:
        how = "groups"
    names, number = np.unique(groups, return_inverse=True)
    fold = np.random.default_rng(seed).permutation(len(names))[number] % CALIBRATION_FOLDS
    cluster = np.empty(len(flat), dtype=np.int64)
    distance = np.empty(len(flat))
    for part in range(CALIBRATION_FOLDS):
        held = fold == part
        refitted = centroids
        if held.any() and (~held).sum() > len(centroids):
            refitted = kmeans(flat[~held], len(centroids), seed, start=centroids)
        cluster[held], distance[held] = nearest_centroid(flat[held], refitted)
    # A held-out group may be the only one with a kind of tissue. Its tiles then go to a neighbouring
    # cluster and must not widen that cluster's threshold.
    stays = cluster == nearest_centroid(flat, centroids)[0]
    if stays.any():
        cluster, distance = cluster[stays], distance[stays]
    by_cluster = [distance[cluster == c] for c in range(len(centroids))]
    spread = np.array([np.sqrt(np.mean(d**2)) if len(d) else 0.0 for d in by_cluster])
    spread = np.maximum(np.where(spread > 0, spread, spread.mean()), 1e-12)
    reach = spread * np.quantile(distance / spread[cluster], KNOWN_SHARE)
    for c, distances in enumerate(by_cluster):
        if len(distances) >= CALIBRATION_LEAST:
            reach[c] = np.quantile(distances, KNOWN_SHARE)
    return reach, how
