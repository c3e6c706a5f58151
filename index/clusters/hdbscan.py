"""HDBSCAN's clusters as plain arrays, and the assignment of new points.

The package hdbscan does the fit. The assignment follows its ``approximate_predict`` (McInnes, Healy, Astels
2017), but finds neighbours with FAISS and needs no pickled tree.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..vectors.scan import CHUNK_VALUES, import_faiss

Floats = NDArray[np.float64]
Arrays = dict[str, NDArray[Any]]
QUERIES = 32_768
"""Number of points whose neighbours are looked up at once."""


def fit_arrays(flat: Floats, min_cluster_size: int) -> Arrays:
    """Fit HDBSCAN on points (N, C) and return the arrays that an assignment needs."""
    from hdbscan import HDBSCAN

    count = len(flat)
    model = HDBSCAN(min_cluster_size=min_cluster_size, prediction_data=True).fit(flat)
    prediction = model.prediction_data_
    tree = model.condensed_tree_._raw_tree
    points = tree[tree["child"] < count]
    branches = tree[tree["child"] >= count]
    clusters = int(tree["parent"].max()) - count + 1
    arrays: Arrays = {
        "points": flat,
        "labels": model.labels_.astype(np.int64),
        "strengths": model.probabilities_,
        "core_distances": prediction.core_distances,
        "point_parent": np.full(count, count, dtype=np.int64),
        "point_lambda": np.zeros(count),
        "branch_parent": np.full(clusters, -1, dtype=np.int64),
        "branch_lambda": np.zeros(clusters),
        "branch_label": np.full(clusters, -1, dtype=np.int64),
        "branch_max_lambda": np.zeros(clusters),
        "min_samples": np.array(min_cluster_size),
    }
    arrays["point_parent"][points["child"]] = points["parent"]
    arrays["point_lambda"][points["child"]] = points["lambda_val"]
    arrays["branch_parent"][branches["child"] - count] = branches["parent"]
    arrays["branch_lambda"][branches["child"] - count] = branches["lambda_val"]
    for branch, label in prediction.cluster_map.items():
        arrays["branch_label"][int(branch) - count] = label
        arrays["branch_max_lambda"][int(branch) - count] = prediction.max_lambdas[branch]
    return arrays


def distances_of_fitted(arrays: Arrays) -> Floats:
    """Return the mutual reachability distance (N,) of each fitted point to its nearest other one."""
    return _reach(arrays["points"], arrays, skip_self=True)[0]


def place(flat: Floats, arrays: Arrays) -> tuple[NDArray[np.int64], Floats, Floats]:
    """Assign new points (N, C) by the condensed tree.

    A point starts in the branch of its nearest neighbour by mutual reachability. It moves up to the parent
    branch as long as the branch starts at a higher density than the point has.

    Returns:
        Clusters (N,), -1 for noise; mutual reachability distance (N,) to the neighbour; strengths (N,), 0
        to 1.
    """
    if not len(flat):
        return np.zeros(0, dtype=np.int64), np.zeros(0), np.zeros(0)
    reach, neighbour = _reach(flat, arrays)
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
    return cluster, reach, np.where(cluster >= 0, share, 0.0)


def _reach(
    flat: Floats, arrays: Arrays, skip_self: bool = False
) -> tuple[Floats, NDArray[np.int64]]:
    """Return the mutual reachability distance (N,) to the nearest fitted point, and that point (N,).

    The distance is never below the core distance of the new point. So the first of its ``min_samples``
    neighbours that is at least as dense is the answer. Only the few points that are denser than all these
    neighbours need more of them: for these, twice as many are checked, as ``approximate_predict`` does.
    """
    least = int(arrays["min_samples"])
    own = int(skip_self)
    index = import_faiss().IndexFlatL2(arrays["points"].shape[1])
    centre = arrays["points"].mean(axis=0)  # FAISS's distances lose precision far from the origin
    index.add((arrays["points"] - centre).astype(np.float32))
    smallest = np.empty(len(flat))
    neighbour = np.empty(len(flat), dtype=np.int64)
    step = max(1, min(QUERIES, 4 * CHUNK_VALUES // (2 * least + 1)))
    for start in range(0, len(flat), step):
        part = slice(start, start + step)
        points = flat[part]
        ready = (points - centre).astype(np.float32)
        smallest[part], neighbour[part], open_ = _nearest(
            index, ready, points, arrays, least + 1 + own, least, own
        )
        if open_.any():
            more = np.flatnonzero(open_)
            found = _nearest(index, ready[more], points[more], arrays, 2 * least + own, least, own)
            smallest[start + more], neighbour[start + more] = found[:2]
    return smallest, neighbour


def _nearest(
    index: Any,
    ready: NDArray[np.float32],
    points: Floats,
    arrays: Arrays,
    count: int,
    least: int,
    own: int,
) -> tuple[Floats, NDArray[np.int64], NDArray[np.bool_]]:
    """Return mutual reachability distances, the neighbours, and which points need more neighbours."""
    squared, rows = index.search(ready, min(count, index.ntotal))
    squared, rows = squared[:, own:], rows[:, own:]
    distances = np.sqrt(np.maximum(squared, 0))
    core = arrays["core_distances"]
    at = min(least, rows.shape[1] - 1)
    line = np.arange(len(rows))
    own_core = _exact(points, arrays["points"][rows[:, at]])
    # Choose the neighbour in float32, then compute its distance in float64.
    reach = np.maximum(core[rows].astype(np.float32), distances)
    np.maximum(reach, own_core[:, None].astype(np.float32), out=reach)
    best = reach.argmin(axis=1)
    chosen = rows[line, best]
    exact = np.maximum(np.maximum(core[chosen], own_core), _exact(points, arrays["points"][chosen]))
    open_ = (exact > own_core * (1 + 1e-6)) & (rows.shape[1] + own < index.ntotal)
    return exact, chosen, open_


def _exact(a: Floats, b: Floats) -> Floats:
    gap: Floats = np.linalg.norm(a - b, axis=1)
    return gap
