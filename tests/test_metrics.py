"""Metrics against values worked out by hand and against chance."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from histoseek.metrics import (
    accuracy,
    clustering_report,
    codes,
    macro_f1,
    match,
    purity,
    retrieval_report,
    silhouette,
)

pairs = st.lists(st.tuples(st.integers(0, 4), st.integers(-1, 6)), min_size=2, max_size=60)


def test_by_hand():
    labels = np.array([0, 0, 0, 1, 1, 2])
    clusters = np.array([1, 1, 0, 0, 0, -1])
    # one-to-one: cluster 1 -> class 0 (2 right), cluster 0 -> class 1 (2 right), noise wrong
    assert accuracy(labels, clusters) == pytest.approx(4 / 6)
    assert match(labels, clusters).tolist() == [0, 0, 1, 1, 1, -1]
    assert purity(labels, clusters) == pytest.approx(4 / 6)
    # F1: class 0 .8, class 1 .8, class 2 0
    assert macro_f1(labels, clusters) == pytest.approx(1.6 / 3)
    assert codes(["b", None, "a", "b"]).tolist() == [1, -1, 0, 1]


@given(pairs)
def test_purity_is_at_least_accuracy_and_names_do_not_matter(rows):
    labels, clusters = (np.array(column, dtype=np.int64) for column in zip(*rows, strict=True))
    assert accuracy(labels, clusters) <= purity(labels, clusters) + 1e-12 <= 1 + 1e-9
    renamed = np.where(clusters < 0, -1, 6 - clusters)
    assert accuracy(labels, renamed) == pytest.approx(accuracy(labels, clusters))


def test_a_perfect_clustering_scores_one_and_its_baseline_does_not():
    labels = np.repeat(np.arange(3), 30)
    points = np.eye(3)[labels] + np.random.default_rng(0).normal(0, 0.01, (90, 3))
    rows = {m.name: m for m in clustering_report(points, labels, labels)}
    for name in ("accuracy", "macro_f1", "purity", "ari", "nmi", "ami"):
        assert rows[name].value == pytest.approx(1) and rows[name].baseline < 0.6
    assert rows["silhouette"].value > 0.9 > 0.1 > rows["silhouette"].baseline


def test_retrieval_by_hand():
    angles = np.radians([0, 1, 90, 92, 180, 181.5])
    points = np.stack([np.cos(angles), np.sin(angles)], 1)
    groups = np.array([0, 0, 1, 1, 2, 3])
    labels = np.array([0, 0, 1, 1, 1, 1])
    rows = {m.name: m for m in retrieval_report(points, labels, groups)}
    assert rows["same_group_r1"].value == 1.0  # asked of the four tiles that have a partner
    assert rows["same_group_r1"].baseline == pytest.approx(1 / 5)
    assert rows["knn5"].baseline == pytest.approx(4 / 6)


def test_knn_never_asks_the_own_group():
    points = np.repeat(np.eye(4), 3, axis=0)  # four groups of three equal tiles
    groups = np.repeat(np.arange(4), 3)
    labels = np.array([0] * 6 + [1] * 6)
    rows = {m.name: m for m in retrieval_report(points, labels, groups)}
    assert rows["same_group_r1"].value == 1.0 and rows["knn5"].value < 1.0


def test_silhouette_of_one_cluster_is_not_defined():
    points = np.random.default_rng(0).normal(size=(10, 2))
    assert np.isnan(silhouette(points, np.zeros(10, np.int64)))
    assert (
        clustering_report(points, np.arange(10) % 2, np.zeros(10, np.int64))[6].as_dict()["value"]
        is None
    )
