"""Clustering and retrieval metrics, each with a trivial baseline that needs no model.

The definitions follow the five papers. Accuracy uses the Hungarian (one-to-one) matching of clusters to
labels, purity the many-to-one majority. HDBSCAN noise (-1) counts as wrong in accuracy and purity, and
as a separate cluster in ARI, NMI and AMI.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32] | NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Metric:
    """A measured value, its trivial baseline, and a description of the baseline."""

    name: str
    value: float
    baseline: float
    baseline_is: str

    def as_dict(self) -> dict[str, Any]:
        """Return the metric as a JSON-ready dictionary; undefined values become None."""
        return {k: None if v != v else v for k, v in asdict(self).items()}


def flat_rows(content: Any, prefix: str = "") -> dict[str, dict[str, Any]]:
    """Return every metric of a run's record under a flat name, such as ``hdbscan.ari``.

    Args:
        content: nested dictionaries; the leaves are lists of results of :meth:`Metric.as_dict`.
        prefix: put before every name.
    """
    rows: dict[str, dict[str, Any]] = {}
    if isinstance(content, list):
        rows |= {f"{prefix}{row['name']}": row for row in content}
    elif isinstance(content, dict):
        for key, part in content.items():
            rows |= flat_rows(part, prefix if key in {"retrieval", "scores"} else f"{prefix}{key}.")
    return rows


def codes(values: Sequence[str | None]) -> Ints:
    """Number the distinct values 0..C-1 in sorted order; ``None`` becomes -1."""
    names = {name: n for n, name in enumerate(sorted({v for v in values if v is not None}))}
    return np.array([-1 if v is None else names[v] for v in values], dtype=np.int64)


def contingency(labels: Ints, clusters: Ints) -> NDArray[np.int64]:
    """Return the table (clusters x classes) of counts; noise (-1) is left out."""
    assigned = clusters >= 0
    table = np.zeros((max(1, clusters.max(initial=-1) + 1), labels.max() + 1), dtype=np.int64)
    np.add.at(table, (clusters[assigned], labels[assigned]), 1)
    return table


def match(labels: Ints, clusters: Ints) -> Ints:
    """Map every cluster to the class of the best one-to-one matching; unmatched ones to -1."""
    from scipy.optimize import linear_sum_assignment

    table = contingency(labels, clusters)
    rows, columns = linear_sum_assignment(table, maximize=True)
    mapping = np.full(len(table) + 1, -1, dtype=np.int64)
    mapping[rows] = columns
    mapping[-1] = -1
    return mapping[clusters]


def accuracy(labels: Ints, clusters: Ints) -> float:
    """Hungarian clustering accuracy (paper 000 eq. 14, paper 001 section 4.2)."""
    return float(np.mean(match(labels, clusters) == labels))


def purity(labels: Ints, clusters: Ints) -> float:
    """Share of items in the majority class of their cluster (paper 003 eq. 8)."""
    return float(contingency(labels, clusters).max(axis=1).sum() / len(labels))


def macro_f1(labels: Ints, clusters: Ints) -> float:
    """Mean F1 over the classes after the Hungarian matching."""
    from sklearn.metrics import f1_score

    predicted = match(labels, clusters)
    return float(f1_score(labels, predicted, labels=np.unique(labels), average="macro"))


def _scores(labels: Ints, clusters: Ints) -> dict[str, float]:
    from sklearn import metrics as sk

    return {
        "accuracy": accuracy(labels, clusters),
        "macro_f1": macro_f1(labels, clusters),
        "purity": purity(labels, clusters),
        "ari": float(sk.adjusted_rand_score(labels, clusters)),
        "nmi": float(sk.normalized_mutual_info_score(labels, clusters)),
        "ami": float(sk.adjusted_mutual_info_score(labels, clusters)),
    }


def clustering_report(
    embeddings: Floats, labels: Ints, clusters: Ints, seed: int = 0
) -> list[Metric]:
    """Score clusters against labels; the baseline uses shuffled cluster numbers.

    Args:
        embeddings: (N, D), for the silhouette.
        labels: (N,) class numbers >= 0.
        clusters: (N,) cluster numbers, -1 is noise.
        seed: of the shuffle.
    """
    shuffled = np.random.default_rng(seed).permutation(clusters)
    scores, by_chance = _scores(labels, clusters), _scores(labels, shuffled)
    rows = [Metric(k, v, by_chance[k], "same clusters, shuffled") for k, v in scores.items()]
    ours, chance = (silhouette(embeddings, c, seed) for c in (clusters, shuffled))
    rows.append(Metric("silhouette", ours, chance, "same clusters, shuffled"))
    rows.append(Metric("noise_share", float(np.mean(clusters < 0)), 0.0, "no noise"))
    return rows


def silhouette(embeddings: Floats, clusters: Ints, seed: int = 0, sample: int = 3000) -> float:
    """Mean silhouette without noise, on at most ``sample`` items; nan if undefined."""
    from sklearn.metrics import silhouette_score

    items = np.flatnonzero(clusters >= 0)
    if len(items) > sample:
        items = np.random.default_rng(seed).choice(items, sample, replace=False)
    if not 2 <= len(np.unique(clusters[items])) < len(items):
        return float("nan")
    return float(silhouette_score(embeddings[items], clusters[items]))


def unit_rows(vectors: Floats) -> NDArray[np.float64]:
    """Return vectors (N, D) scaled to length 1; zeros stay zeros."""
    exact = np.asarray(vectors, np.float64)
    unit: NDArray[np.float64] = exact / np.maximum(
        np.linalg.norm(exact, axis=1, keepdims=True), 1e-30
    )
    return unit


def cosine_error(one: Floats, two: Floats) -> float:
    """Return the largest 1 - cosine between the rows of two arrays (N, D); at least 0."""
    a, b = one.astype(np.float64), two.astype(np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(max(0.0, (1 - (a * b).sum(1) / np.maximum(lengths, 1e-12)).max()))


def retrieval_report(embeddings: Floats, labels: Ints | None, groups: Ints | None) -> list[Metric]:
    """Leave-one-out retrieval by cosine similarity.

    ``same_group_r1``: share of tiles with a partner in their group whose nearest other tile is of
    that group; baseline: a random other tile. ``knn5``: majority vote of the five nearest tiles of
    OTHER groups; baseline: always the largest class.

    Args:
        embeddings: (N, D).
        labels: (N,) class numbers, -1 is unlabelled; None skips ``knn5``.
        groups: (N,) group numbers, -1 is no group; None skips ``same_group_r1``.
    """
    exact = embeddings.astype(np.float64)
    unit = exact / np.maximum(np.linalg.norm(exact, axis=1, keepdims=True), 1e-12)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -np.inf)
    report: list[Metric] = []
    if groups is not None and (groups >= 0).any():
        sizes = np.bincount(groups[groups >= 0])
        partners = np.where(groups >= 0, sizes[groups] - 1, 0)
        queries = partners > 0
        if queries.any():
            hits = (groups[similarity.argmax(axis=1)] == groups)[queries]
            chance = float(np.mean(partners[queries] / (len(groups) - 1)))
            report.append(
                Metric("same_group_r1", float(hits.mean()), chance, "a random other tile")
            )
    if labels is not None and len(np.unique(labels[labels >= 0])) > 1:
        value = _knn5(similarity, labels, groups)
        majority = float(np.bincount(labels[labels >= 0]).max() / (labels >= 0).sum())
        report.append(Metric("knn5", value, majority, "always the largest class"))
    return report


def _knn5(similarity: NDArray[np.float64], labels: Ints, groups: Ints | None) -> float:
    others = similarity.copy()
    others[:, labels < 0] = -np.inf
    if groups is not None:
        same = (groups[:, None] == groups[None, :]) & (groups >= 0)[:, None]
        others[same] = -np.inf
    nearest = np.argsort(-others, axis=1)[:, :5]
    votes = np.zeros((len(labels), labels.max() + 1))
    for rank in range(nearest.shape[1]):
        column = nearest[:, rank]
        usable = np.isfinite(others[np.arange(len(labels)), column])
        weight = usable * (1.0 - 0.001 * rank)
        votes[np.arange(len(labels)), np.maximum(labels[column], 0)] += weight
    return float(np.mean((votes.argmax(axis=1) == labels)[labels >= 0]))
