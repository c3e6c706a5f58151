"""Clusters: k-means and HDBSCAN fits as plain arrays, and the assignment of images they never saw.

Both work on the principal components that hold 95 % of the variance (paper 004). A new image gets a
cluster, a distance, a strength from 0 to 1, and ``unknown`` where it fits none.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from ..errors import BadInput, Damaged, unknown_name
from ..manifest import CLUSTERS, FOREIGN, passed_limit
from ..metrics import silhouette
from . import density
from .density import Arrays, Floats
from .vectors import CHUNK_VALUES, import_faiss

Method = Literal["kmeans", "hdbscan"]
FITTED = ("kmeans", "hdbscan")
METHODS = (*FITTED, "encoder")
K_RANGE = range(2, 11)
FIT_SAMPLE = 200_000
KNOWN_SHARE = 0.99
"""A k-means cluster calls unknown what lies farther out than this share of tiles of held-out slides."""
PIECE = 8_192
"""Vectors that are in float64 at once."""
CALIBRATION_FOLDS = 5
CALIBRATION_LEAST = 100
"""Held-out tiles that a cluster needs for a limit of its own."""


@dataclass(frozen=True)
class Assigned:
    """Where images belong; arrays of length N.

    Attributes:
        cluster: cluster number; -1 is none (HDBSCAN noise).
        distance: to the cluster: its centre (k-means), or the nearest member by mutual reachability
            (HDBSCAN); in the space of the principal components.
        strength: 0 to 1. k-means: 1 - distance to own centre / distance to the next. HDBSCAN: membership
            probability of ``approximate_predict``.
        unknown: whether the image fits no cluster, or is foreign to the encoder.
    """

    cluster: NDArray[np.int64]
    distance: Floats
    strength: Floats
    unknown: NDArray[np.bool_]

    def rows(self, names: dict[int, str]) -> list[dict[str, Any]]:
        """Return what a caller is told of each image, JSON-ready, with the names of the clusters."""
        return [
            {
                "cluster": int(self.cluster[n]),
                "name": names.get(int(self.cluster[n]), ""),
                "distance": round(float(self.distance[n]), 6),
                "strength": round(float(self.strength[n]), 6),
                "unknown": bool(self.unknown[n]),
            }
            for n in range(len(self.cluster))
        ]

    def part(self, rows: slice | NDArray[Any]) -> Assigned:
        """Return some of the images."""
        return Assigned(
            self.cluster[rows], self.distance[rows], self.strength[rows], self.unknown[rows]
        )


@dataclass(frozen=True)
class Clustering:
    """A fitted clustering.

    Attributes:
        method: kmeans or hdbscan.
        arrays: everything needed to assign new images; saved as .npz without pickles.
        about: parameters and what the fit found, JSON-ready.
    """

    method: Method
    arrays: Arrays
    about: dict[str, Any]

    @property
    def clusters(self) -> int:
        """How many clusters there are."""
        return int(self.about["clusters"])

    def assign(self, vectors: NDArray[np.float32]) -> Assigned:
        """Assign vectors (N, D)."""
        flat = project(vectors, self.arrays)
        assign = _assign_kmeans if self.method == "kmeans" else _assign_hdbscan
        return _gated(assign(flat, self.arrays), vectors, self.arrays)

    def to_bytes(self) -> bytes:
        """Serialise the arrays as .npz."""
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **self.arrays)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, method: Method, blob: bytes, about: dict[str, Any]) -> Clustering:
        """Undo :meth:`to_bytes`.

        Raises:
            Damaged: not such a file.
        """
        try:
            with np.load(io.BytesIO(blob), allow_pickle=False) as stored:
                return cls(method, {key: stored[key] for key in stored.files}, about)
        except (OSError, ValueError, EOFError, KeyError, BadZipFile) as error:
            raise Damaged(
                f"the arrays of a clustering cannot be read ({error}); fit it again"
            ) from error


def fit(
    vectors: NDArray[np.float32],
    method: str,
    k: int | None = None,
    min_cluster_size: int | None = None,
    seed: int = 0,
    groups: NDArray[np.int64] | None = None,
    gate: bool = False,
) -> tuple[Clustering, Assigned]:
    """Fit clusters and place the fitted vectors in them.

    Args:
        vectors: (N, D).
        method: kmeans or hdbscan.
        k: clusters of k-means; None tries 2 to 10 and takes the best silhouette (paper 004).
        min_cluster_size: of HDBSCAN; None takes max(15, N / 40), at most N / 2.
        seed: of k-means, and of the silhouette's sample.
        groups: (N,) patient or slide of each vector; k-means' limits of what it knows are calibrated on
            groups held out in turn.
        gate: whether the encoder has a gate (``Manifest.gate``); what it calls foreign is unknown, and
            not fitted. Where it calls most tiles foreign, this is an atlas of something else than what the
            encoder was made for: the gate is ignored, and ``about`` says so.

    Raises:
        BadInput: an unknown method, or too few vectors; the message says how many are needed.
    """
    if method not in FITTED:
        raise unknown_name("method", method, METHODS)
    if seed < 0:
        raise BadInput(f"seed is {seed}; expected 0 or more")
    if min_cluster_size is not None and (min_cluster_size < 2 or method != "hdbscan"):
        raise BadInput(f"min_cluster_size is {min_cluster_size}; expected 2 or more, for hdbscan")
    least = max(3, (k or 0) + 1) if method == "kmeans" else 10
    everything, known = vectors, to_fit(vectors, gate)
    vectors, groups = vectors[known], None if groups is None else groups[known]
    left_out = len(everything) - len(vectors)
    if len(vectors) < least:
        also = f" ({left_out} more do not look like stained tissue)" if left_out else ""
        raise BadInput(
            f"{len(vectors)} tiles{also} are too few for {method}; expected at least {least}"
        )
    basis = basis_of(vectors)
    flat = project(vectors, basis)
    heeded = gate and not passed_limit(vectors).any()
    if heeded:
        basis["foreign"] = np.asarray(FOREIGN)
    fitted = {"fitted_tiles": len(flat), "components": len(basis["components"]), "seed": seed}
    if gate:
        fitted["foreign_tiles"] = int(passed_limit(everything).sum())
        fitted["gate_ignored"] = not heeded
    if method == "kmeans":
        arrays, about = _fit_kmeans(flat, k, seed, groups)
        clustering = Clustering("kmeans", basis | arrays, {**about, **fitted})
        return clustering, clustering.assign(everything)
    size = min_cluster_size or max(15, len(flat) // 40)
    size = max(2, min(size, len(flat) // 2))
    arrays = density.fit_arrays(flat, size)
    labels = arrays["labels"]
    about = {
        "clusters": int(labels.max()) + 1,
        "min_cluster_size": size,
        "noise_share": round(float(np.mean(labels < 0)), 4),
    }
    clustering = Clustering("hdbscan", basis | arrays, {**about, **fitted})
    reach = density.distances_of_fitted(arrays)
    placed = clustering.assign(everything) if left_out else None
    own = Assigned(labels, reach, arrays["strengths"], labels < 0)
    return clustering, own if placed is None else _joined(placed, own, known)


def to_fit(vectors: NDArray[np.float32], gate: bool) -> NDArray[np.bool_]:
    """Return which vectors (N, D) clusters are fitted to, (N,): those that an encoder's gate lets pass.

    All of them where there is no gate, or where it calls more than half of them foreign.
    """
    if not gate or 2 * np.sum(passed_limit(vectors)) > len(vectors):
        return np.ones(len(vectors), dtype=bool)
    return ~passed_limit(vectors)


def _joined(placed: Assigned, own: Assigned, known: NDArray[np.bool_]) -> Assigned:
    """Return the fitted tiles where the fit has them, and the others where they were placed."""
    for name in ("cluster", "distance", "strength", "unknown"):
        getattr(placed, name)[known] = getattr(own, name)
    return placed


def _gated(placed: Assigned, vectors: NDArray[np.float32], arrays: Arrays) -> Assigned:
    """Call unknown what the encoder's gate calls foreign, if it has one."""
    if "foreign" not in arrays:
        return placed
    return replace(placed, unknown=placed.unknown | (vectors[:, -1] > arrays["foreign"]))


def shipped(bundle: Path) -> Clustering:
    """Return the clusters that an encoder was trained with, as its bundle ships them.

    Raises:
        BadInput: the encoder has none.
        Damaged: the file is not what export writes.
    """
    path = bundle / CLUSTERS
    if not path.is_file():
        raise BadInput(
            "the atlas's encoder ships no clusters (recipes autoencoder, dac and deepcluster do, exported "
            "without --pca and --views); use --method kmeans or hdbscan"
        )
    found = Clustering.from_bytes("kmeans", path.read_bytes(), {}).arrays
    if set(found) != {"centroids", "reach"} or found["reach"].shape != found["centroids"].shape[:1]:
        raise Damaged(f"{path} is not what export writes; export the encoder again")
    dim = found["centroids"].shape[1]
    arrays = {"mean": np.zeros(dim), "components": np.eye(dim), **found}
    return Clustering("kmeans", arrays, {"clusters": len(found["centroids"]), "from": "encoder"})


def basis_of(vectors: NDArray[np.float32], keep: float = 0.95) -> Arrays:
    """Return the mean and the principal components that hold a share of the variance.

    By the covariance, a piece at a time: memory is that of a (D, D) matrix.
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
    """Return vectors (N, D) on the components: (N, C)."""
    flat: Floats = np.empty((len(vectors), len(arrays["components"])))
    for start in range(0, len(vectors), PIECE):
        part = slice(start, start + PIECE)
        flat[part] = (vectors[part].astype(np.float64) - arrays["mean"]) @ arrays["components"].T
    return flat


def kmeans(
    flat: Floats, k: int, seed: int, start: Floats | None = None, starts: int = 10
) -> Floats:
    """Return centroids (k, C) of points (N, C) by FAISS: the best of some starts, or from a given one."""
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
        model.cp.early_stop_threshold = 1e-6  # relative gain of an iteration
    given = None if start is None else start.astype(np.float32)
    model.train(flat.astype(np.float32), init_centroids=given)
    return np.asarray(model.centroids, dtype=np.float64)


def nearest_centroid(flat: Floats, centroids: Floats) -> tuple[NDArray[np.int64], Floats]:
    """Return the nearest centroid of each point (N,) and the distance (N,)."""
    distances, order = _to_centroids(flat, centroids)
    return order[:, 0], distances[:, 0]


def _to_centroids(flat: Floats, centroids: Floats) -> tuple[Floats, NDArray[np.int64]]:
    """Return distances and numbers (N, 2) of the two nearest centroids; of the one, if there is one."""
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
    """Return how many points differ."""
    return len(np.unique(flat.round(9), axis=0))


def _fit_kmeans(
    flat: Floats, k: int | None, seed: int, groups: NDArray[np.int64] | None
) -> tuple[Arrays, dict[str, Any]]:
    different = distinct(flat)
    if k is not None and k > different:
        raise BadInput(f"k is {k}, but only {different} of {len(flat)} tiles differ; lower --k")
    if different < min(K_RANGE):
        raise BadInput(f"all {len(flat)} tiles are the same: there is nothing to cluster")
    curve: dict[str, float | None] = {}
    if k is None:
        tried = {
            count: kmeans(flat, count, seed)
            for count in K_RANGE
            if count <= different and count < len(flat)
        }
        scores = {
            c: silhouette(flat, nearest_centroid(flat, found)[0], seed)
            for c, found in tried.items()
        }
        curve = {str(c): None if np.isnan(s) else s for c, s in scores.items()}
        centroids = tried[max(tried, key=lambda count: np.nan_to_num(scores[count], nan=-1))]
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
    """Return how far from each centroid tiles of slides lie that were not fitted (K,), and how it was read.

    Groups (patients or slides) are held out in turn: the centroids are moved by the others alone, from
    where they are. Each limit holds :data:`KNOWN_SHARE` of the held-out tiles that fall to the cluster; a
    cluster with too few of them takes the limit of all, in units of its own spread.
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
        if held.all() or not held.any() or (~held).sum() <= len(centroids):
            moved = centroids
        else:
            moved = kmeans(flat[~held], len(centroids), seed, start=centroids)
        cluster[held], distance[held] = nearest_centroid(flat[held], moved)
    # A group with a kind of its own falls to a neighbour when it is held out: that says nothing of how far
    # the neighbour reaches.
    stays = cluster == nearest_centroid(flat, centroids)[0]
    if stays.any():
        cluster, distance = cluster[stays], distance[stays]
    spread = np.array(
        [np.sqrt(np.mean(distance[cluster == c] ** 2)) if (cluster == c).any() else 0.0
         for c in range(len(centroids))]
    )  # fmt: skip
    spread = np.maximum(np.where(spread > 0, spread, spread.mean()), 1e-12)
    usual = float(np.quantile(distance / spread[cluster], KNOWN_SHARE))
    reach = spread * usual
    for c in range(len(centroids)):
        own = distance[cluster == c]
        if len(own) >= CALIBRATION_LEAST:
            reach[c] = np.quantile(own, KNOWN_SHARE)
    return reach, how


def _assign_kmeans(flat: Floats, arrays: Arrays) -> Assigned:
    centroids = arrays["centroids"]
    distances, order = _to_centroids(flat, centroids)
    cluster, own = order[:, 0], distances[:, 0]
    other = distances[:, -1] if len(centroids) > 1 else np.full(len(own), np.inf)
    strength = np.clip(1 - own / np.maximum(other, 1e-12), 0, 1)
    return Assigned(cluster, own, strength, own > arrays["reach"][cluster] * (1 + 1e-9))


def _assign_hdbscan(flat: Floats, arrays: Arrays) -> Assigned:
    cluster, distance, strength = density.place(flat, arrays)
    return Assigned(cluster, distance, strength, cluster < 0)
