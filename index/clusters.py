"""Clusters: k-means and HDBSCAN fits as plain arrays, and the assignment of images they never saw.

Both work on the principal components that hold 95 % of the variance (paper 004). A new image gets a
cluster, a distance, a strength from 0 to 1, and ``unknown`` where it fits none.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from ..errors import BadInput, Damaged, unknown_name
from ..manifest import CLUSTERS
from ..metrics import silhouette
from .vectors import CHUNK_VALUES, nearest

Method = Literal["kmeans", "hdbscan"]
FITTED = ("kmeans", "hdbscan")
METHODS = (*FITTED, "encoder")
K_RANGE = range(2, 11)
FIT_SAMPLE = 200_000
KNOWN_SHARE = 0.99
"""A k-means cluster calls unknown what lies farther from its centre than this share of its members."""

Floats = NDArray[np.float64]
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Assigned:
    """Where images belong; arrays of length N.

    Attributes:
        cluster: cluster number; -1 is none (HDBSCAN noise).
        distance: to the cluster: its centre (k-means), or the nearest member by mutual reachability
            (HDBSCAN); in the space of the principal components.
        strength: 0 to 1. k-means: 1 - distance to own centre / distance to the next. HDBSCAN: membership
            probability of ``approximate_predict``.
        unknown: whether the image fits no cluster.
    """

    cluster: NDArray[np.int64]
    distance: Floats
    strength: Floats
    unknown: NDArray[np.bool_]


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
        flat = _project(vectors, self.arrays)
        return (
            _assign_kmeans(flat, self.arrays)
            if self.method == "kmeans"
            else _assign_hdbscan(flat, self.arrays)
        )

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
) -> tuple[Clustering, Assigned]:
    """Fit clusters and place the fitted vectors in them.

    Args:
        vectors: (N, D).
        method: kmeans or hdbscan.
        k: clusters of k-means; None tries 2 to 10 and takes the best silhouette (paper 004).
        min_cluster_size: of HDBSCAN; None takes max(15, N / 40), at most N / 2.
        seed: of k-means, of the silhouette's sample, and of the sample fitted above 200,000 vectors.

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
    if len(vectors) < least:
        raise BadInput(f"{len(vectors)} tiles are too few for {method}; expected at least {least}")
    sample = vectors
    if len(vectors) > FIT_SAMPLE:
        chosen = np.random.default_rng(seed).choice(len(vectors), FIT_SAMPLE, replace=False)
        sample = vectors[np.sort(chosen)]
    basis = _basis(sample)
    flat = _project(sample, basis)
    if method == "kmeans":
        arrays, about = _fit_kmeans(flat, k, seed)
    else:
        arrays, about = _fit_hdbscan(flat, min_cluster_size)
    fitted = {"fitted_tiles": len(sample), "components": len(basis["components"]), "seed": seed}
    clustering = Clustering(
        "kmeans" if method == "kmeans" else "hdbscan", basis | arrays, {**about, **fitted}
    )
    if method == "kmeans" or len(sample) < len(vectors):
        return clustering, clustering.assign(vectors)
    return clustering, _fitted_hdbscan(arrays)


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


def _basis(vectors: NDArray[np.float32], keep: float = 0.95) -> Arrays:
    from sklearn.decomposition import PCA

    with np.errstate(invalid="ignore"):  # tiles that are all the same have no variance to share
        fitted = PCA(svd_solver="full").fit(vectors.astype(np.float64))
    share = np.cumsum(fitted.explained_variance_ratio_)
    count = min(int((share < keep).sum()) + 1, len(share))
    return {"mean": fitted.mean_, "components": fitted.components_[:count]}


def _project(vectors: NDArray[np.float32], arrays: Arrays) -> Floats:
    flat: Floats = (vectors.astype(np.float64) - arrays["mean"]) @ arrays["components"].T
    return flat


def _fit_kmeans(flat: Floats, k: int | None, seed: int) -> tuple[Arrays, dict[str, Any]]:
    from sklearn.cluster import KMeans

    def run(count: int) -> Any:
        return KMeans(count, n_init=10, max_iter=300, random_state=seed).fit(flat)

    distinct = len(np.unique(flat.round(12), axis=0))
    if k is not None and k > distinct:
        raise BadInput(f"k is {k}, but only {distinct} of {len(flat)} tiles differ; lower --k")
    if distinct < min(K_RANGE):
        raise BadInput(f"all {len(flat)} tiles are the same: there is nothing to cluster")
    curve: dict[str, float | None] = {}
    if k is None:
        tried = {count: run(count) for count in K_RANGE if count <= distinct and count < len(flat)}
        scores = {c: silhouette(flat, f.labels_, seed) for c, f in tried.items()}
        curve = {str(c): None if np.isnan(s) else s for c, s in scores.items()}
        best = max(tried, key=lambda count: np.nan_to_num(scores[count], nan=-1))
        fitted = tried[best]
    else:
        fitted = run(k)
    arrays: Arrays = {"centroids": fitted.cluster_centers_}
    own = np.linalg.norm(flat - fitted.cluster_centers_[fitted.labels_], axis=1)
    count = len(fitted.cluster_centers_)
    arrays["reach"] = np.array(
        [np.quantile(own[fitted.labels_ == c], KNOWN_SHARE) for c in range(count)]
    )
    about: dict[str, Any] = {"clusters": count, "k": "auto" if k is None else k}
    if curve:
        about["silhouette_by_k"] = curve
    return arrays, about


def _assign_kmeans(flat: Floats, arrays: Arrays) -> Assigned:
    centroids = arrays["centroids"]
    distances, order = nearest(centroids, flat, 2)
    cluster, own = order[:, 0], distances[:, 0]
    other = distances[:, -1] if len(centroids) > 1 else np.full(len(own), np.inf)
    strength = np.clip(1 - own / np.maximum(other, 1e-12), 0, 1)
    return Assigned(cluster, own, strength, own > arrays["reach"][cluster] * (1 + 1e-9))


def _fit_hdbscan(flat: Floats, min_cluster_size: int | None) -> tuple[Arrays, dict[str, Any]]:
    from hdbscan import HDBSCAN

    count = len(flat)
    size = min_cluster_size or max(15, count // 40)
    size = max(2, min(size, count // 2))
    model = HDBSCAN(min_cluster_size=size, prediction_data=True).fit(flat)
    known = model.prediction_data_
    tree = model.condensed_tree_._raw_tree
    points = tree[tree["child"] < count]
    branches = tree[tree["child"] >= count]
    clusters = int(tree["parent"].max()) - count + 1
    arrays: Arrays = {
        "points": flat,
        "labels": model.labels_.astype(np.int64),
        "strengths": model.probabilities_,
        "core_distances": known.core_distances,
        "point_parent": np.full(count, count, dtype=np.int64),
        "point_lambda": np.zeros(count),
        "branch_parent": np.full(clusters, -1, dtype=np.int64),
        "branch_lambda": np.zeros(clusters),
        "branch_label": np.full(clusters, -1, dtype=np.int64),
        "branch_max_lambda": np.zeros(clusters),
        "min_samples": np.array(size),
    }
    arrays["point_parent"][points["child"]] = points["parent"]
    arrays["point_lambda"][points["child"]] = points["lambda_val"]
    arrays["branch_parent"][branches["child"] - count] = branches["parent"]
    arrays["branch_lambda"][branches["child"] - count] = branches["lambda_val"]
    for branch, label in known.cluster_map.items():
        arrays["branch_label"][int(branch) - count] = label
        arrays["branch_max_lambda"][int(branch) - count] = known.max_lambdas[branch]
    noise = float(np.mean(model.labels_ < 0))
    about = {
        "clusters": int(model.labels_.max()) + 1,
        "min_cluster_size": size,
        "noise_share": round(noise, 4),
    }
    return arrays, about


def _fitted_hdbscan(arrays: Arrays) -> Assigned:
    """Return the fit's own labels; the distance is to the nearest other fitted point."""
    reach = _mutual_reachability(arrays["points"], arrays, skip_self=True)[0]
    labels = arrays["labels"]
    return Assigned(labels, reach, arrays["strengths"], labels < 0)


def _mutual_reachability(
    flat: Floats, arrays: Arrays, skip_self: bool = False
) -> tuple[Floats, NDArray[np.int64]]:
    """Return the mutual reachability distance (N,) to the nearest fitted point, and that point (N,)."""
    points, core = arrays["points"], arrays["core_distances"]
    least = int(arrays["min_samples"])
    smallest, neighbour = np.empty(len(flat)), np.empty(len(flat), dtype=np.int64)
    step = max(1, CHUNK_VALUES // (2 * least + 1))
    for start in range(0, len(flat), step):
        part = slice(start, start + step)
        distances, rows = nearest(points, flat[part], 2 * least + int(skip_self))
        if skip_self:
            distances, rows = distances[:, 1:], rows[:, 1:]
        own_core = distances[:, min(least, distances.shape[1] - 1)]
        reach = np.maximum(np.maximum(core[rows], own_core[:, None]), distances)
        best, line = reach.argmin(axis=1), np.arange(len(reach))
        smallest[part], neighbour[part] = reach[line, best], rows[line, best]
    return smallest, neighbour


def _assign_hdbscan(flat: Floats, arrays: Arrays) -> Assigned:
    """Place new points in the condensed tree, as hdbscan's ``approximate_predict`` does.

    A point joins its nearest neighbour by mutual reachability, and leaves that neighbour's branch for
    the one above as long as the branch was born at a higher density than the point's own.
    """
    if not len(flat):
        none = np.zeros(0)
        return Assigned(none.astype(np.int64), none, none, none.astype(bool))
    reach, neighbour = _mutual_reachability(flat, arrays)
    density = np.where(reach > 0, 1 / np.maximum(reach, 1e-300), np.finfo(np.float64).max)
    count = len(arrays["points"])
    branch = arrays["point_parent"][neighbour] - count
    climbing = arrays["point_lambda"][neighbour] > density
    while True:
        above = climbing & (branch > 0) & (arrays["branch_lambda"][branch] >= density)
        if not above.any():
            break
        branch = np.where(above, arrays["branch_parent"][branch] - count, branch)
    cluster = arrays["branch_label"][branch]
    highest = arrays["branch_max_lambda"][branch]
    share = np.where(highest > 0, np.minimum(highest, density) / np.maximum(highest, 1e-300), 1.0)
    return Assigned(cluster, reach, np.where(cluster >= 0, share, 0.0), cluster < 0)
