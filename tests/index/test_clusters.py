"""Clusters: fits without pickles, and assignment against independent references."""

import numpy as np
import pytest
from sklearn.datasets import load_digits, make_blobs, make_moons

from histoseek.artifacts.manifest import OOD_THRESHOLD
from histoseek.errors import BadInput, Damaged
from histoseek.index.clusters.clustering import Clustering
from histoseek.index.clusters.fit import fit


def digits():
    return load_digits().data.astype(np.float32)


def sets():
    blobs = make_blobs(1500, 8, centers=5, cluster_std=1.2, random_state=3)[0].astype(np.float32)
    moons = make_moons(1200, noise=0.07, random_state=1)[0].astype(np.float32)
    rng = np.random.default_rng(7)
    spread = rng.normal(size=(8, 5))[rng.integers(0, 8, 1500)] * 4 + rng.normal(
        size=(1500, 5)
    ) * rng.uniform(0.2, 2.5, (1500, 1))
    return {
        "digits": digits(), "blobs": blobs, "moons": moons, "spread": spread.astype(np.float32),
    }  # fmt: skip


def tissue_embeddings(request, name):
    """About 600 real tiles, embedded by the default encoder."""
    from histoseek.artifacts.images import square
    from histoseek.artifacts.tileset_files import open_tiles
    from histoseek.serving.encoders.open import open_encoder

    tiles = open_tiles(request.getfixturevalue("shared") / f"{name}.tar")
    encoder = open_encoder("default")
    size = encoder.manifest.size_px
    chosen = range(0, len(tiles.tiles), max(1, len(tiles.tiles) // 600))
    return encoder.embed(np.stack([square(tiles.read(n), size) for n in chosen]))


@pytest.mark.shared
@pytest.mark.parametrize("name", ["digits", "lc25000", "histo_mix", "blobs", "moons", "spread"])
def test_hdbscan_assignment_equals_approximate_predict(name, request):
    from hdbscan import HDBSCAN, approximate_predict

    made = sets()
    data = made[name] if name in made else tissue_embeddings(request, name)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(data))
    known, new = data[order[: len(data) * 2 // 3]], data[order[len(data) * 2 // 3 :]]
    far = rng.normal(size=(30, data.shape[1])).astype(np.float32) * 40
    new = np.concatenate([new, far])
    clustering, placed = fit(known, "hdbscan", min_cluster_size=20)
    flat = (known.astype(float) - clustering.arrays["mean"]) @ clustering.arrays["components"].T
    reference = HDBSCAN(min_cluster_size=20, prediction_data=True).fit(flat)
    assert np.array_equal(placed.cluster, reference.labels_)
    flat_new = (new.astype(float) - clustering.arrays["mean"]) @ clustering.arrays["components"].T
    labels, strengths = approximate_predict(reference, flat_new)
    found = clustering.assign(new)
    assert len(set(labels)) > 2
    assert np.mean(found.cluster == labels) >= 0.995
    same = found.cluster == labels
    assert np.allclose(found.strength[same], strengths[same], atol=1e-4)
    assert np.array_equal(found.unknown, found.cluster < 0)


def test_kmeans_assignment_is_the_nearest_centre_and_far_images_are_unknown():
    data = sets()["blobs"]
    clustering, placed = fit(data, "kmeans", k=5)
    centres = clustering.arrays["centroids"]
    flat = (data.astype(float) - clustering.arrays["mean"]) @ clustering.arrays["components"].T
    brute = np.linalg.norm(flat[:, None] - centres[None], axis=2)
    assert np.array_equal(placed.cluster, brute.argmin(1))
    assert np.allclose(placed.distance, brute.min(1))
    nearest, second = np.sort(brute, axis=1)[:, :2].T
    assert np.allclose(placed.strength, 1 - nearest / second)
    assert 0.001 < placed.unknown.mean() < 0.02
    far = clustering.assign(data[:50] + 60)
    assert far.unknown.all()


def test_k_auto_finds_the_blobs():
    data, truth = make_blobs(600, 6, centers=4, cluster_std=0.6, random_state=8)
    clustering, placed = fit(data.astype(np.float32), "kmeans")
    assert clustering.clusters == 4 and set(clustering.about["silhouette_by_k"]) == {
        str(k) for k in range(2, 11)
    }
    from sklearn.metrics import adjusted_rand_score

    assert adjusted_rand_score(truth, placed.cluster) == 1


@pytest.mark.parametrize("method", ["kmeans", "hdbscan"])
def test_a_clustering_survives_its_bytes(method):
    data = sets()["blobs"]
    clustering, placed = fit(data, method)
    again = Clustering.from_bytes(method, clustering.to_bytes(), clustering.about)
    one, two = clustering.assign(data[:99]), again.assign(data[:99])
    assert np.array_equal(one.cluster, two.cluster) and np.array_equal(one.strength, two.strength)
    with pytest.raises(Damaged, match="fit it again"):
        Clustering.from_bytes(method, clustering.to_bytes()[:500], {})


def test_fits_are_repeatable():
    data = digits()
    one, two = (fit(data, "kmeans", k=10, seed=3)[1] for _ in range(2))
    assert np.array_equal(one.cluster, two.cluster)


def test_all_noise_is_said_and_assigns_nothing():
    data = np.random.default_rng(0).uniform(size=(60, 12)).astype(np.float32)
    clustering, placed = fit(data, "hdbscan", min_cluster_size=25)
    assert clustering.clusters == 0 and placed.unknown.all()
    assert clustering.assign(data[:3]).unknown.all()


def test_identical_tiles_and_few_tiles():
    same = np.ones((40, 4), np.float32)
    clustering, _ = fit(same, "hdbscan")
    assert len(clustering.assign(same[:2]).cluster) == 2
    with pytest.raises(BadInput, match="all 40 tiles are equal"):
        fit(same, "kmeans")
    few = np.repeat(np.eye(4, dtype=np.float32), 10, 0)
    assert fit(few, "kmeans")[0].clusters <= 4
    with pytest.raises(BadInput, match="only 4 of 40"):
        fit(few, "kmeans", k=5)
    with pytest.raises(BadInput, match="too few"):
        fit(same[:2], "kmeans")
    with pytest.raises(BadInput, match="at least 6"):
        fit(same[:5], "kmeans", k=5)
    with pytest.raises(BadInput, match="kmeans"):
        fit(same, "ward")


def test_unknown_is_calibrated_on_groups_that_were_held_out():
    """Slides differ: limits read on the tiles that were fitted would call too many new ones unknown."""
    rng = np.random.default_rng(0)

    def slides(count, seed):
        own = np.random.default_rng(seed)
        shift = own.normal(size=(count, 1, 8)) * 0.6
        centre = np.eye(8)[rng.integers(0, 4, (count, 120))] * 6
        return (centre + shift + own.normal(size=(count, 120, 8)) * 0.5).astype(np.float32)

    known, new = slides(40, 1).reshape(-1, 8), slides(40, 2).reshape(-1, 8)
    groups = np.repeat(np.arange(40), 120)
    calibrated, _ = fit(known, "kmeans", k=4, groups=groups)
    assert calibrated.about["unknown_calibrated_on"] == "groups"
    share = calibrated.assign(new).unknown.mean()
    assert 0.0005 < share < 0.03, share
    assert fit(known, "kmeans", k=4)[0].about["unknown_calibrated_on"] == "tiles"
    assert calibrated.assign(new + 20).unknown.all()


@pytest.mark.parametrize("method", ["kmeans", "hdbscan"])
def test_what_the_gate_calls_foreign_is_unknown_and_takes_no_part_in_a_fit(method):
    flat = make_blobs(600, 8, centers=3, cluster_std=0.4, random_state=3)[0]
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    angle = np.zeros((600, 1))
    angle[:60] = (
        np.arcsin(OOD_THRESHOLD) * np.linspace(0.9, 1.1, 60)[:, None]
    )  # half just past the limit
    vectors = np.concatenate([flat * np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
    size = {"min_cluster_size": 20} if method == "hdbscan" else {"k": 3}
    foreign = vectors[:, -1] > OOD_THRESHOLD
    assert foreign.sum() == 30
    clustering, placed = fit(vectors, method, **size, groups=np.arange(600) // 5, gate=True)
    alone, own = fit(vectors[~foreign], method, **size, groups=(np.arange(600) // 5)[~foreign])
    assert clustering.about["foreign_tiles"] == 30 and "foreign_tiles" not in alone.about
    assert placed.unknown[foreign].all() and clustering.assign(vectors).unknown[foreign].all()
    for name in ("cluster", "distance", "strength", "unknown"):
        np.testing.assert_array_equal(getattr(placed, name)[~foreign], getattr(own, name))
    assert not own.unknown[:20].all()
    stored = Clustering.from_bytes(method, clustering.to_bytes(), clustering.about)
    assert stored.assign(vectors).unknown[foreign].all()
    few = np.concatenate([vectors[foreign][:2], vectors[~foreign][:2]])
    with pytest.raises(BadInput, match=r"2 tiles \(2 more are out of distribution\)"):
        fit(few, method, gate=True)
    mostly = np.concatenate([vectors[foreign], vectors[~foreign][-20:]])
    size = {"min_cluster_size": 5} if method == "hdbscan" else {"k": 3}
    ignored, placed = fit(mostly, method, **size, gate=True)
    assert ignored.about["gate_ignored"] and ignored.about["fitted_tiles"] == 50
    assert ignored.about["foreign_tiles"] == 30 and not placed.unknown[:30].all()


def test_a_small_cluster_takes_its_limit_from_all():
    rng = np.random.default_rng(1)
    many, few = rng.normal(size=(2000, 4)), rng.normal(size=(12, 4)) * 0.5 + 30
    clustering, placed = fit(np.concatenate([many, few]).astype(np.float32), "kmeans", k=2)
    small = placed.cluster[-1]
    assert (placed.cluster == small).sum() == 12 and not placed.unknown[-12:].any()
    near = clustering.assign((few + rng.normal(size=few.shape) * 0.1).astype(np.float32))
    assert not near.unknown.any()


def test_curves_find_the_number_of_blobs():
    from histoseek.index.clusters.curve import curve

    data, _ = make_blobs(900, 6, centers=4, cluster_std=0.7, random_state=8)
    rows = curve(data.astype(np.float32), "kmeans")
    best = max(rows, key=lambda row: row["silhouette"])
    assert best["k"] == 4 and best["stability"] > 0.99
    assert {row["k"]: row["stability"] for row in rows}[
        10
    ] < 0.9  # parts of a blob do not come again
    dense = curve(data.astype(np.float32), "hdbscan")
    assert [r["min_cluster_size"] for r in dense] == sorted(r["min_cluster_size"] for r in dense)
    assert any(r["clusters"] == 4 and r["stability"] > 0.9 for r in dense)
    noise = np.random.default_rng(0).uniform(size=(900, 6)).astype(np.float32)
    assert max(r["silhouette"] for r in curve(noise, "kmeans")) < 0.3
    with pytest.raises(BadInput, match="too few"):
        curve(noise[:10], "kmeans")
    with pytest.raises(BadInput, match="hdbscan, kmeans"):
        curve(noise, "ward")
