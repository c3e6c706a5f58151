"""The recipes without labels and the classifier: they learn, resume, export, and reject invalid input."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from histoseek.artifacts.tileset_files import open_tiles
from histoseek.artifacts.tilesets import Tile, TileSet
from histoseek.errors import BadInput, Mismatch
from histoseek.training.checkpoint import load_encoder, load_tensors
from histoseek.training.components import Chain
from histoseek.training.data import load
from histoseek.training.evaluate import embed, embed_numbers
from histoseek.training.fit_autoencoder import AutoencoderOptions
from histoseek.training.fit_classifier import ClassifierOptions
from histoseek.training.fit_dac import Clustering, DacOptions
from histoseek.training.fit_deepcluster import DeepClusterOptions, PseudoLabels, cluster
from histoseek.training.kmeans import assign, cluster_tensors, kmeans, literal_minibatch
from histoseek.training.losses import pair_loss
from histoseek.training.models import build
from histoseek.training.recipes import RECIPES
from histoseek.training.steps import Phase, make_optimizer

CPU = {"accelerator": "cpu"}
SMALL = {
    "autoencoder": AutoencoderOptions(
        model="topology-cae", size_px=32, epochs=3, batch=16, folds=3, **CPU
    ),
    "dac": DacOptions(
        model="dac-cifar", epochs=2, pretrain=2, batch=16, folds=3, eta=0, judge_every=1, **CPU
    ),
    "deepcluster": DeepClusterOptions(
        model="p4m-cnn", model_options="widths=2-4-8", size_px=32, epochs=3, batch=16, folds=3,
        clusters=6, pca_dim=6, **CPU,
    ),
    "classifier": ClassifierOptions(
        model="p4m-cnn", model_options="widths=2-4-8", size_px=32, epochs=3, batch=16, folds=3, lr=1e-2,
        **CPU,
    ),
}  # fmt: skip


def silent(done, total, text):
    pass


def fit(recipe, options, tiles, out):
    return RECIPES[recipe].fit(options, tiles, out, silent)


def change(options, **values):
    from dataclasses import replace

    return replace(options, **values)


def values(rows):
    return {row["name"]: row["value"] for row in rows}


@pytest.mark.parametrize("recipe", SMALL)
def test_a_recipe_runs_repeats_and_is_judged_beside_what_needs_no_training(
    recipe, tile_folder, tmp_path
):
    tiles = open_tiles(tile_folder)
    record = fit(recipe, SMALL[recipe], tiles, tmp_path / "one")
    assert set(record["metrics"]) >= {"trained", "random_init", "pixels"}
    assert all(np.isfinite(row["loss"]) for row in record["epochs"])
    assert record["split"]["by"] == "group"
    encoder = load_encoder(tmp_path / "one")
    data = load(tiles, encoder.size_px, silent)
    assert embed(encoder, data.tiles[:5]).shape == (5, encoder.dim)
    fit(recipe, SMALL[recipe], tiles, tmp_path / "two")
    one, two = ((tmp_path / n / "weights.safetensors").read_bytes() for n in ("one", "two"))
    assert one == two
    assert fit(recipe, SMALL[recipe], tiles, tmp_path / "one") == record  # nothing is done again
    with pytest.raises(Mismatch, match=r"lr: .* -> 0\.02"):
        fit(recipe, change(SMALL[recipe], lr=0.02), tiles, tmp_path / "one")


@pytest.mark.parametrize("recipe", SMALL)
def test_killed_in_the_middle_every_recipe_resumes_to_the_same_weights(
    recipe, tile_folder, tmp_path, monkeypatch
):
    """Stopped after each epoch by an exception in the report, then run again: the same bytes."""
    tiles = open_tiles(tile_folder)
    extra = {"plateau": 1} if recipe == "deepcluster" else {"plateau": 1, "lr": 0.05}
    options = change(SMALL[recipe], judge=False, **extra)
    fit(recipe, options, tiles, tmp_path / "whole")

    class Stop(Exception):
        pass

    def stop_after_an_epoch(done, total, text):
        if "loss" in text:
            raise Stop

    stops = 0
    while True:
        try:
            record = RECIPES[recipe].fit(options, tiles, tmp_path / "stopped", stop_after_an_epoch)
            break
        except Stop:
            stops += 1
    assert stops >= 3
    assert (tmp_path / "stopped/weights.safetensors").read_bytes() == (
        tmp_path / "whole/weights.safetensors"
    ).read_bytes()
    left = {p.name for p in (tmp_path / "stopped").iterdir()}
    assert left == {"run.json", "weights.safetensors"}
    assert record["seconds"] >= sum(row["seconds"] for row in record["epochs"]) - 0.1


def test_an_autoencoder_learns_to_draw_and_to_cluster(tile_folder, tmp_path):
    options = change(SMALL["autoencoder"], epochs=40, lr=3e-3, schedule="step", step_epochs=15)
    record = fit("autoencoder", options, open_tiles(tile_folder), tmp_path / "run")
    errors = [row["mse"] for row in record["epochs"]]
    assert errors[-1] < 0.4 * errors[0]
    assert record["epochs"][20]["lr"] == pytest.approx(3e-4)
    scores = record["metrics"]["clusters"]
    latents, shuffled = (
        {row["name"]: row[key] for row in scores["latents"]} for key in ("value", "baseline")
    )
    assert scores["k"] == 3 and latents["accuracy"] > shuffled["accuracy"] + 0.1
    assert {row["name"] for row in scores["pixels"]} == set(latents)


def test_the_sum_has_the_gradients_of_the_sum(tile_folder):
    """Paper 000's loss: squared error summed over pixels and batch, not averaged."""
    from histoseek.training.fit_autoencoder import Reconstruction

    torch.manual_seed(0)
    model = build("topology-ae", size_px=28)
    tiles = torch.rand(8, 3, 28, 28)
    numbers = torch.arange(8)
    net = Reconstruction(model, AutoencoderOptions(model="topology-ae", batch=8))
    net(tiles, numbers)["loss"].backward()
    found = model.decoder[0].weight.grad.clone()
    model.zero_grad()
    _, drawn, seen = model.reconstruct(tiles)
    (drawn - seen).square().sum().backward()
    assert torch.allclose(found, model.decoder[0].weight.grad, rtol=1e-4)


def test_cross_entropy_is_summed_over_pixels():
    from histoseek.training.fit_autoencoder import Reconstruction

    torch.manual_seed(0)
    model = build("topology-ae", size_px=28)
    tiles, numbers = torch.rand(8, 3, 28, 28), torch.arange(8)
    options = AutoencoderOptions(model="topology-ae", pixel_loss="cross-entropy", batch=8)
    losses = Reconstruction(model, options)(tiles, numbers)
    _, drawn, seen = model.reconstruct(tiles)
    expected = (-seen * drawn.log() - (1 - seen) * (1 - drawn).log()).sum()
    assert float(losses["loss"].detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    assert float(losses["mse"].detach()) == pytest.approx(
        float((drawn - seen).square().mean().detach())
    )


def test_adadelta_and_cross_entropy_train(tile_folder, tmp_path):
    keras = {"pixel_loss": "cross-entropy", "reduction": "mean", "optimiser": "adadelta", "lr": 1.0}
    options = change(SMALL["autoencoder"], epochs=20, weight_decay=0.0, **keras)
    record = fit("autoencoder", options, open_tiles(tile_folder), tmp_path / "run")
    errors = [row["mse"] for row in record["epochs"]]
    assert errors[-1] < 0.6 * errors[0]
    with pytest.raises(BadInput, match="lr is 0.001, with which adadelta hardly moves"):
        change(options, lr=1e-3)
    unbounded = change(options, model="dac-fmnist", size_px=28)
    with pytest.raises(
        BadInput, match="'dac-fmnist' does not end in a sigmoid; expected 'squared'"
    ):
        fit("autoencoder", unbounded, open_tiles(tile_folder), tmp_path / "refused")


def test_a_vae_trains_its_spread(tile_folder, tmp_path):
    options = AutoencoderOptions(
        model="vae", model_options="dim=8", size_px=32, epochs=4, batch=16, folds=3, lr=1e-3, **CPU
    )
    record = fit("autoencoder", options, open_tiles(tile_folder), tmp_path / "run")
    assert record["epochs"][-1]["divergence"] > 0
    assert record["epochs"][-1]["mse"] < record["epochs"][0]["mse"]


@pytest.mark.parametrize("method", ["dac", "dec", "ae-kmeans"])
def test_the_baselines_of_dac_run(method, tile_folder, tmp_path):
    options = change(SMALL["dac"], method=method, folds=0)
    record = fit("dac", options, open_tiles(tile_folder), tmp_path / "run")
    phases = list(dict.fromkeys(row["phase"] for row in record["epochs"]))
    assert phases == {
        "dac": ["clustering"], "dec": ["pretraining", "clustering"], "ae-kmeans": ["pretraining"],
    }[method]  # fmt: skip
    found = values(record["metrics"]["clusters"]["assigned"])
    assert found["accuracy"] >= 1 / 3 and record["metrics"]["clusters"]["k"] == 3


def test_a_run_begins_with_the_weights_of_another(tile_folder, tmp_path):
    tiles = open_tiles(tile_folder)
    fit("dac", change(SMALL["dac"], method="ae-kmeans"), tiles, tmp_path / "ae")
    options = change(SMALL["dac"], start=str(tmp_path / "ae"), pretrain=0, epochs=0)
    fit("dac", options, tiles, tmp_path / "run")
    before, after = (load_encoder(tmp_path / n).state_dict() for n in ("ae", "run"))
    assert all(torch.equal(before[key], after[key]) for key in before)
    other = change(options, start=str(tmp_path / "ae"), model="dac-fmnist")
    with pytest.raises(Mismatch, match="is a run of"):
        fit("dac", other, tiles, tmp_path / "other")


def test_thresholds_close_in_and_never_cross():
    """Paper 001: xi grows by 1.1 eta = .0055 per epoch; u = l = .5409 after 74.4 epochs."""
    paper = DacOptions(epochs=75)
    assert paper.at(0) == (0.95, 0.5)
    assert paper.at(1) == pytest.approx((0.9445, 0.50055))
    upper, lower = paper.at(75)
    assert upper == pytest.approx(0.5409, abs=1e-4) and upper == pytest.approx(lower)
    assert paper.at(500)[0] == pytest.approx(upper)
    assert all(paper.at(e)[0] >= paper.at(e)[1] for e in range(100))
    short = DacOptions(epochs=10, eta=0)
    assert short.at(9)[0] == pytest.approx(short.at(9)[1])
    source = DacOptions(epochs=60, thresholds="dac")
    assert source.at(0) == (0.95, 0.455) and source.at(46)[0] == pytest.approx(0.5, abs=1e-4)


def test_the_thresholds_of_dacs_released_code():
    released = DacOptions(epochs=50, thresholds="released")
    assert released.at(0) == (0.99, 0.99)
    assert released.at(49) == pytest.approx((0.7548, 0.7548))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"super_batch": 100}, "a multiple of batch (16)"),
        ({"inner": 2}, "super_batch is 0"),
        ({"anchor": 1.0}, "super_batch is 0"),
        ({"super_batch": 32, "devices": 2}, "expected one device"),
        ({"super_batch": 32, "method": "dec"}, "labels no pairs"),
        ({"thresholds": "released"}, "leave it out"),  # eta is 0 here
    ],
)
def test_super_batches_that_cannot_be(wrong, says):
    with pytest.raises(BadInput, match=re.escape(says)):
        change(SMALL["dac"], **wrong)


@pytest.fixture
def seen(monkeypatch):
    """Reference and probabilities of every call of the pair loss."""
    found = []

    def noted(probabilities, upper, lower, reference=None):
        found.append((reference.clone(), probabilities.detach().clone()))
        return pair_loss(probabilities, upper, lower, reference)

    monkeypatch.setattr("histoseek.training.fit_dac.pair_loss", noted)
    return found


def test_a_super_batch_is_labelled_once_from_unchanged_tiles(tile_folder, tmp_path, seen):
    options = change(
        SMALL["dac"], super_batch=32, inner=2, anchor=10.0, rotation_deg=10.0, shift=0.1, folds=0,
        method="dac", lr_cluster=1e-2, batch=8, thresholds="released", eta=-1.0,
    )  # fmt: skip
    tiles = open_tiles(tile_folder)
    record = fit("dac", options, tiles, tmp_path / "run")
    steps = 2 * (len(tiles) // 8)
    assert len(seen) == steps and all(epoch["anchor"] > 0 for epoch in record["epochs"])
    first = [{tuple(row) for row in reference.tolist()} for reference, _ in seen[:8]]
    passes = set().union(*first[:4]), set().union(*first[4:])
    assert passes[0] == passes[1], "both passes have the labels of the same 32 tiles"
    assert not torch.allclose(*seen[0], atol=1e-3), (
        "the tiles were changed, those labelled were not"
    )
    assert {"even", "sure"} <= set(record["epochs"][1]) and "moved" not in record["epochs"][1]


def test_without_changes_the_first_step_is_labelled_by_itself(tile_folder, tmp_path, seen):
    options = change(SMALL["dac"], super_batch=32, folds=0, batch=8, epochs=1)
    fit("dac", options, open_tiles(tile_folder), tmp_path / "run")
    assert torch.allclose(*seen[0], atol=1e-5), "the head is labelled as it is trained"
    assert not torch.allclose(*seen[1], atol=1e-5), "after a step it is another"


def test_one_cluster_is_no_error(tile_folder, tmp_path):
    options = change(SMALL["dac"], clusters=1, folds=0)
    record = fit("dac", options, open_tiles(tile_folder), tmp_path / "run")
    assert record["metrics"]["clusters"]["k"] == 1


def test_pairs_are_chosen_by_the_reference():
    now = torch.tensor([[0.9, 0.1], [0.1, 0.9], [0.5, 0.5]])
    before = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    unit = now / now.norm(dim=1, keepdim=True)
    s = unit @ unit.T
    expected = -(s[0, 1].log() + (1 - s[0, 2]).log() + (1 - s[1, 2]).log()) / 3
    assert float(pair_loss(now, 0.9, 0.9, before)) == pytest.approx(float(expected), rel=1e-5)


def test_dac_never_looks_at_labels(tile_folder, tmp_path):
    tiles = open_tiles(tile_folder)
    shuffled = tiles.relabelled(["group"])
    for name, part in (("a", tiles), ("b", shuffled)):
        fit("dac", change(SMALL["dac"], folds=0, judge=False, clusters=3), part, tmp_path / name)
    one, two = (load_encoder(tmp_path / n).state_dict() for n in ("a", "b"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_clusters_as_output_ship_as_an_encoder(tile_folder, tmp_path):
    options = change(SMALL["dac"], output="clusters", folds=0)
    fit("dac", options, open_tiles(tile_folder), tmp_path / "run")
    encoder = load_encoder(tmp_path / "run")
    found = encoder(torch.rand(4, 3, 32, 32))
    assert encoder.dim == 3 and torch.allclose(found.sum(1), torch.ones(4), atol=1e-5)


def test_the_chain_is_pca_whitening_and_length():
    rng = np.random.default_rng(0)
    features = (rng.normal(size=(200, 10)) * np.linspace(3, 0.2, 10) + 5).astype(np.float32)
    chain = Chain.fit(features, 4)
    white = (features - chain.mean) @ chain.projection.T
    assert np.allclose(np.cov(white.T), np.eye(4), atol=1e-3)
    assert np.allclose(np.linalg.norm(chain.apply(features), axis=1), 1, atol=1e-5)
    encoder = build("p4m-cnn", widths="2-4-10", size_px=32)
    chain.into(encoder)
    with torch.no_grad():
        found = encoder.chain(torch.from_numpy(features)).numpy()
    assert np.allclose(found, white, atol=1e-3) and encoder.dim == 4
    same = np.ones((6, 3), dtype=np.float32)
    assert np.isfinite(Chain.fit(same, 3).apply(same)).all()


def test_deepcluster_keeps_its_clusters_until_the_next_clustering(tile_folder, tmp_path):
    tiles = open_tiles(tile_folder)
    options = change(SMALL["deepcluster"], epochs=7, reassign=3, plateau=0)
    rows = fit("deepcluster", options, tiles, tmp_path / "run")["epochs"]
    clustered = [row["epoch"] for row in rows if "kmeans_inertia" in row]
    assert clustered == [1, 4, 7] and "ami_previous" in rows[3]
    assert rows[2]["loss"] < rows[0]["loss"]  # the same clusters and top layer go on


def test_deepcluster_trains_with_sgd(tile_folder, tmp_path):
    """Every clustering renews the top layer, and with it that layer's momentum."""
    options = change(SMALL["deepcluster"], epochs=3, optimiser="sgd", lr=0.01)
    assert len(fit("deepcluster", options, open_tiles(tile_folder), tmp_path / "r")["epochs"]) == 3


def test_deepcluster_ships_its_whole_chain(tile_folder, tmp_path):
    """A new tile goes the way of the training tiles: features, PCA, whitening, length, centre."""
    tiles = open_tiles(tile_folder)
    record = fit("deepcluster", SMALL["deepcluster"], tiles, tmp_path / "run")
    assert record["architecture"]["chain"] == 6
    told = record["epochs"][-1]
    assert {"nmi_previous", "ami_previous", "nmi_labels", "ami_labels", "kmeans_inertia"} <= set(
        told
    )
    assert {m["name"] for m in record["metrics"]["probe"]} == {
        "probe_accuracy", "probe_micro_auc", "probe_macro_auc",
    }  # fmt: skip
    encoder = load_encoder(tmp_path / "run")
    kept = load_tensors(tmp_path / "run/weights.safetensors")[0]
    centres = kept["clusters.centres"].numpy()
    data = load(tiles, 32, silent)
    vectors, numbers = embed_numbers(encoder, data, np.arange(len(data)))
    chain = encoder.chain
    encoder.chain, encoder.dim = None, 8
    features, _ = embed_numbers(encoder, data, numbers, unit=False)
    by_hand = features @ chain.weight.detach().numpy().T + chain.bias.detach().numpy()
    by_hand /= np.linalg.norm(by_hand, axis=1, keepdims=True)
    assert np.allclose(vectors, by_hand, atol=1e-4)
    assert len(np.unique(assign(vectors, centres))) > 1
    assert (kept["clusters.reach"] >= 0).all() and len(kept["clusters.reach"]) == len(centres)


def test_no_cluster_stays_empty_and_the_sampler_is_even():
    rng = np.random.default_rng(0)
    few = np.repeat(rng.normal(size=(5, 4)), 20, axis=0).astype(np.float32)
    centres, clusters, _ = cluster(few, 12, 20, 0)  # 5 distinct vectors, 12 asked for
    assert len(centres) <= 5 and set(clusters) == set(range(len(centres)))
    net = PseudoLabels(build("p4m-cnn", widths="2-4-8", classes=3), DeepClusterOptions(), 110)
    net.clusters[:] = torch.tensor([0] * 100 + [1] * 8 + [2, 2])
    order = net.draw(np.arange(110), rng)
    counts = np.bincount(net.clusters.numpy()[order])
    assert len(order) == 110 and counts.min() >= 35 and counts.max() <= 38
    plain = PseudoLabels(net.encoder, DeepClusterOptions(uniform=False), 110)
    plain.clusters[:] = net.clusters
    assert sorted(plain.draw(np.arange(110), rng)) == list(range(110))


def test_minibatch_kmeans_by_both_rules():
    rng = np.random.default_rng(1)
    truth = np.repeat([[0.0, 0], [8, 0], [0, 8]], 300, axis=0)
    points = (truth + rng.normal(size=truth.shape)).astype(np.float32)
    for rule in ("full", "minibatch", "literal"):
        centres = kmeans(points, 3, rule, seed=3, batch=100)
        distance = np.linalg.norm(centres[:, None] - np.array([[0, 0], [8, 0], [0, 8]]), axis=2)
        assert distance.min(1).max() < 1.0 and set(distance.argmin(1)) == {0, 1, 2}
    start = literal_minibatch(points, 3, seed=0, batch=1, steps=0)
    after = literal_minibatch(
        points, 3, seed=0, batch=1, steps=1
    )  # one tile: two centres have none
    assert (start == after).all(1).sum() >= 2 and np.isfinite(
        after
    ).all()  # 0/0 in print; they stay
    with pytest.raises(BadInput, match="K = 5"):
        kmeans(points[:3], 5)
    with pytest.raises(BadInput, match="full, literal, minibatch"):
        kmeans(points, 2, "fuzzy")
    tensors = cluster_tensors(points, np.array([[0.0, 0], [8, 0], [0, 8], [99, 99]]))
    assert tensors["clusters.reach"][3] == 0 and tensors["clusters.reach"][0] > 1


def test_the_classifier_learns(tile_folder, tmp_path):
    options = change(SMALL["classifier"], epochs=25)
    record = fit("classifier", options, open_tiles(tile_folder), tmp_path / "run")
    scores = {m["name"]: m for m in record["metrics"]["classifier"]}
    assert scores["accuracy"]["value"] > scores["accuracy"]["baseline"] + 0.1
    assert record["epochs"][-1]["accuracy"] > record["epochs"][0]["accuracy"]


# -- bad data ---------------------------------------------------------------------------------


def fake(count, labels, groups=None, broken=()):
    """A tile set of noise; reading a tile in ``broken`` fails."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)

    def read(number):
        if number in broken:
            raise BadInput(f"fake: tile-{number:03d} is broken")
        return pictures[number]

    tiles = tuple(
        Tile(f"tile-{n:03d}", labels[n], groups[n] if groups else None) for n in range(count)
    )
    return TileSet("fake", "fake", tiles, f"{count}{broken}", read)


@pytest.mark.parametrize("recipe", SMALL)
@pytest.mark.parametrize("stream", [False, True])
def test_an_unreadable_tile_in_the_middle_of_an_epoch_is_skipped_counted_and_named(
    recipe, stream, tmp_path
):
    labels = [str(n % 3) for n in range(60)]
    tiles = fake(60, labels, broken=(7, 31))
    options = change(SMALL[recipe], stream=stream)
    record = fit(recipe, options, tiles, tmp_path / "run")
    told = "; ".join(record["data"]["unreadable"])
    assert len(record["data"]["unreadable"]) == 2 and "tile-007" in told and "tile-031" in told
    assert len(record["epochs"]) >= 3


def test_streaming_gives_the_same_weights(tile_folder, tmp_path):
    tiles = open_tiles(tile_folder)
    for name, stream in (("memory", False), ("stream", True)):
        fit("classifier", change(SMALL["classifier"], stream=stream), tiles, tmp_path / name)
    one, two = (load_encoder(tmp_path / n).state_dict() for n in ("memory", "stream"))
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("recipe", SMALL)
def test_a_class_with_one_picture_is_no_reason_to_stop(recipe, tmp_path):
    labels = ["lonely"] + [str(n % 2) for n in range(59)]
    record = fit(recipe, SMALL[recipe], fake(60, labels), tmp_path / "run")
    assert record["data"]["classes"] == ["0", "1", "lonely"]


@pytest.mark.parametrize("recipe", SMALL)
def test_labels_are_needed_only_where_they_are_learnt(recipe, tmp_path):
    tiles = fake(60, [None] * 60)
    options = change(SMALL[recipe], clusters=3) if recipe != "classifier" else SMALL[recipe]
    if recipe == "classifier":
        with pytest.raises(BadInput, match=r"0 label\(s\)"):
            fit(recipe, options, tiles, tmp_path / "run")
    else:
        assert fit(recipe, options, tiles, tmp_path / "run")["data"]["classes"] == []
    half = fake(60, [str(n % 2) if n < 40 else None for n in range(60)])
    assert fit(recipe, SMALL[recipe], half, tmp_path / "half")["data"]["classes"] == ["0", "1"]


def test_an_empty_folder_says_what_it_expects(tmp_path, cli):
    (tmp_path / "empty").mkdir()
    answer = cli("train", "dac", tmp_path / "empty", "--out", tmp_path / "run")
    assert answer.returncode == 1 and "has no tiles; expected images" in answer.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("recipe", SMALL)
def test_a_loss_that_is_not_finite_stops_says_where_and_keeps_the_last_epoch(
    recipe, tile_folder, tmp_path, monkeypatch
):
    from histoseek.training import job

    real, calls = job.Job.change, []
    second = 2 if SMALL[recipe].validates else 4  # first step of the second epoch

    def poisoned(self, encoder, pixels, generator, views=1):
        tiles, where = real(self, encoder, pixels, generator, views)
        if generator is not None:
            calls.append(1)
        broken = generator is not None and len(calls) == second
        return tiles * float("nan") if broken else tiles, where

    monkeypatch.setattr(job.Job, "change", poisoned)
    with pytest.raises(BadInput, match=r"the loss is nan in epoch 2, by step"):
        fit(recipe, SMALL[recipe], open_tiles(tile_folder), tmp_path / "run")
    assert (tmp_path / "run/checkpoint.safetensors").exists()
    stored, about = load_tensors(tmp_path / "run/checkpoint.safetensors")
    assert len(about["history"]) == 1
    assert all(v.isfinite().all() for k, v in stored.items() if k.startswith("net."))


def test_models_that_do_not_fit_the_recipe_are_refused(tile_folder, tmp_path):
    tiles = open_tiles(tile_folder)
    for recipe, model, says in (
        ("autoencoder", "p4m-cnn", "no decoder"),
        ("dac", "topology-cae", "no option 'output'"),
        ("deepcluster", "topology-cae", "no option 'classes'"),
    ):
        options = change(SMALL[recipe], model=model, model_options="", size_px=0)
        with pytest.raises(BadInput, match=says):
            fit(recipe, options, tiles, tmp_path / "run")


# -- the loop ---------------------------------------------------------------------------------


def test_the_rate_falls_on_a_plateau_and_training_stops(tile_folder, tmp_path):
    """A learning rate of (almost) nothing: the loss cannot fall, so patience runs out."""
    options = change(
        SMALL["autoencoder"], epochs=30, lr=1e-9, plateau=1, plateau_factor=0.5, patience=6,
        keep_best=False,
    )  # fmt: skip
    record = fit("autoencoder", options, open_tiles(tile_folder), tmp_path / "run")
    rates = [row["lr"] for row in record["epochs"]]
    assert len(rates) < 30 and rates[-1] < rates[0] / 2 and rates == sorted(rates, reverse=True)
    assert record["split"]["validation_tiles"] >= 20


def test_the_plateau_is_torchs():
    from histoseek.training.steps import plateau_factor

    options = AutoencoderOptions(plateau=2, plateau_factor=0.1)
    assert plateau_factor([], options) == 1
    assert plateau_factor([1.0, 0.9, 0.8, 0.7], options) == 1
    assert plateau_factor([1.0, 1.0, 1.0, 1.0], options) == pytest.approx(0.1)
    assert plateau_factor([1.0] * 7, options) == pytest.approx(0.01)


def test_the_best_epoch_is_kept(tile_folder, tmp_path):
    """With a rate that ruins the net in the end the kept weights are an earlier epoch's."""
    tiles = open_tiles(tile_folder)
    options = change(SMALL["autoencoder"], epochs=6, lr=0.3, optimiser="sgd", reduction="mean")
    record = fit("autoencoder", options, tiles, tmp_path / "run")
    losses = [row["validation_loss"] for row in record["epochs"]]
    encoder = load_encoder(tmp_path / "run")
    from histoseek.training.data import split
    from histoseek.training.fit_autoencoder import Reconstruction

    data = load(tiles, 32, silent)
    parts = split(data, 3, 0, 0, validate=True)
    pixels = torch.from_numpy(data.tiles[parts.validate]).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        net = Reconstruction(encoder, options).eval()
        found = float(net(pixels, torch.from_numpy(parts.validate))["loss"])
    assert found == pytest.approx(min(losses), rel=1e-3)


def test_mixed_precision_trains_on_a_cpu(tile_folder, tmp_path):
    options = change(SMALL["classifier"], precision="bf16-mixed", epochs=6)
    record = fit("classifier", options, open_tiles(tile_folder), tmp_path / "run")
    assert record["epochs"][-1]["loss"] < record["epochs"][0]["loss"]
    with pytest.raises(BadInput, match="precision"):
        fit(
            "classifier",
            change(options, precision="8-bit"),
            open_tiles(tile_folder),
            tmp_path / "b",
        )


DDP = """
import sys
import numpy as np
from pathlib import Path
from histoseek.artifacts.tileset_files import open_tiles
from histoseek.training.recipes import RECIPES
recipe, devices, data, out = sys.argv[1:]
kind = RECIPES[recipe]
common = dict(accelerator="cpu", devices=int(devices), epochs=2, batch=24 // int(devices), folds=3,
              judge=False, lr=0.02, optimiser="sgd")
own = {
    "autoencoder": dict(model="topology-cae", size_px=32, keep_best=False, weight_decay=0.01,
                        reduction="sum", lr=1e-6),
    "classifier": dict(model="p4m-cnn", model_options="widths=2-4-8", size_px=32, keep_best=True),
    "arcface": dict(model="p4m-cnn", model_options="widths=2-4-8", size_px=32, dim=8, hidden=16,
                    dropout=0.0, rotation_deg=0, zoom=0, flip=False, stain=0, colour=0),
}[recipe]
kind.fit(kind.options(**{**common, **own}), open_tiles(Path(data)), Path(out), lambda *_: None)
"""


@pytest.mark.parametrize("recipe", ["autoencoder", "classifier", "arcface"])
def test_two_processes_train_as_one(recipe, tile_folder, tmp_path):
    """torchrun's DDP on two CPU processes, batch norms over both: the weights of one process.

    By SGD: Adam scales up the rounding errors that are all the gradient of a bias before a batch norm.
    """
    script = tmp_path / "train.py"
    script.write_text(DDP)
    data = str(tile_folder)
    alone = [sys.executable, str(script), recipe, "1", data, str(tmp_path / "one")]
    both = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        str(script), recipe, "2", data, str(tmp_path / "two"),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for command in (alone, both):
        subprocess.run(command, check=True, capture_output=True, timeout=300, env=environment)
    one, two = (load_encoder(tmp_path / n).state_dict() for n in ("one", "two"))
    start = build(
        **load_tensors(tmp_path / "one/weights.safetensors")[1]["architecture"]
    ).state_dict()
    moved = 0.0
    for key, value in one.items():
        if value.is_floating_point():
            assert torch.allclose(value, two[key], atol=2e-4, rtol=1e-3), key
            moved = max(moved, float((value - start[key]).abs().max()))
    assert moved > 1e-2  # far more than the tolerance


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_the_step_on_a_cpu_is_the_same_with_channels_last(name):
    """It is torch's fused one, which reads weights, gradients and moments by address."""

    def train(on_cpu):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 5, 3))
        net = net.to(memory_format=torch.channels_last)
        options = AutoencoderOptions(optimiser=name, weight_decay=1e-4)
        optimizer = make_optimizer(options, Phase("all", 1, 1e-3), net, on_cpu)
        assert bool(optimizer.defaults["fused"]) == (on_cpu and name != "sgd")
        tiles = torch.rand(4, 3, 16, 16).contiguous(memory_format=torch.channels_last)
        for _ in range(3):
            optimizer.zero_grad()
            net(tiles).square().mean().backward()
            optimizer.step()
        return net.state_dict()

    one, other = train(False), train(True)
    for key, value in one.items():
        assert torch.allclose(value, other[key], atol=1e-5), key


def test_tensorboard_has_losses_and_the_projector(tile_folder, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = change(SMALL["autoencoder"], tensorboard=True)
    fit("autoencoder", options, open_tiles(tile_folder), tmp_path / "run")
    folder = tmp_path / "run/tensorboard"
    events = EventAccumulator(str(folder)).Reload()
    assert len(events.Scalars("reconstruction/loss")) == 3
    config = (folder / "projector_config.pbtxt").read_text()
    assert "held-out" in config and "sprite" in config
    rows = next(folder.rglob("metadata.tsv")).read_text().splitlines()
    assert rows[0] == "label\tgroup\tfile" and len(rows) > 20


def test_killed_for_real_deepcluster_goes_on(tile_folder, tmp_path, cli):
    words = [
        "train", "deepcluster", str(tile_folder), "--model", "p4m-cnn", "--model-options",
        "widths=2-4-8", "--size-px", "32", "--epochs", "6", "--batch", "16", "--folds", "3",
        "--clusters", "6", "--pca-dim", "6", "--accelerator", "cpu", "--no-judge", "--out",
    ]  # fmt: skip
    cli(*words, tmp_path / "whole", check=True)
    run = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "histoseek", *words, str(run)],
        stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (run / "checkpoint.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (run / "run.json").exists(), "killed too late to prove anything"
    cli(*words, run, check=True)
    assert len(json.loads((run / "run.json").read_text())["epochs"]) == 6
    whole = (tmp_path / "whole/weights.safetensors").read_bytes()
    assert (run / "weights.safetensors").read_bytes() == whole


def test_dec_starts_from_kmeans(tile_folder):
    options = change(SMALL["dac"], method="dec")
    net = Clustering(build("dac-cifar", clusters=3), options, 10)
    assert net.centres.shape == (3, 256) and net.target.shape == (10, 3)


def test_what_stays_finite_in_half_precision(tmp_path):
    """Under autocast a cosine of 1 - 1e-7 would be 1, and its gradient infinite."""
    from histoseek.training.losses import ArcFace, Contrastive, Triplet

    torch.manual_seed(0)
    labels = torch.arange(12) % 3
    with torch.autocast("cpu", torch.bfloat16):
        raw = torch.randn(12, 3, requires_grad=True)
        pair_loss(torch.softmax(8 * raw, 1), 0.95, 0.5).backward()
        head = ArcFace(8, 3)
        near = (head.weight[labels].detach() * 5 + 1e-4).requires_grad_()
        (head(near, labels) + Triplet()(near, labels) + Contrastive()(near, labels)).backward()
    assert raw.grad.isfinite().all() and near.grad.isfinite().all()
    assert torch.isnan(pair_loss(torch.full((4, 3), float("nan")), 0.95, 0.5))


@pytest.mark.parametrize("recipe", SMALL)
def test_every_recipe_trains_in_mixed_precision(recipe, tile_folder, tmp_path):
    options = change(SMALL[recipe], precision="bf16-mixed", judge=False)
    record = fit(recipe, options, open_tiles(tile_folder), tmp_path / "run")
    weights = load_encoder(tmp_path / "run").state_dict()
    assert all(np.isfinite(row["loss"]) for row in record["epochs"])
    assert all(v.isfinite().all() for v in weights.values())


def test_weights_that_are_not_finite_are_not_kept(tile_folder, tmp_path, monkeypatch):
    """A step whose gradient is not finite at the end of an epoch, with a loss that still was."""
    from histoseek.training import job

    real = job.Job._epoch

    def ruin(self, net, model, optimizer, phase, epoch, done):
        row = real(self, net, model, optimizer, phase, epoch, done)
        if epoch == 1:
            with torch.no_grad():
                next(net.parameters())[0] = float("nan")
        return row

    monkeypatch.setattr(job.Job, "_epoch", ruin)
    with pytest.raises(
        BadInput, match="after epoch 2 .* not all finite; the previous epoch is kept"
    ):
        fit("classifier", SMALL["classifier"], open_tiles(tile_folder), tmp_path / "run")
    stored, about = load_tensors(tmp_path / "run/checkpoint.safetensors")
    assert len(about["history"]) == 1
    assert all(v.isfinite().all() for k, v in stored.items() if k.startswith("net."))


def test_two_phases_that_keep_their_best_resume_to_the_same_weights(
    tile_folder, tmp_path, monkeypatch
):
    """Both the weights kept and every epoch on the way are those of a run that was not stopped."""
    from histoseek.training import job
    from histoseek.training.arcface_options import ArcFaceOptions

    torch.manual_seed(2)
    weights = tmp_path / "backbone.pth"
    torch.save(build("mobilenet-v3-small").backbone.state_dict(), weights)
    options = ArcFaceOptions(
        weights=str(weights), size_px=64, epochs_head=2, epochs_tail=5, lr_tail=0.01, batch=8, folds=3,
        keep_best=True, judge=False, **CPU,
    )  # fmt: skip
    tiles = open_tiles(tile_folder)
    script = (
        9.0,
        8.0,
        5.0,
        1.0,
        6.0,
        7.0,
        8.0,
    )  # phase 2 is at its best in its second epoch of five
    monkeypatch.setattr(job.Job, "_validate", lambda self, net: script[len(self._history)])
    fit("arcface", options, tiles, tmp_path / "whole")

    class Stop(Exception):
        pass

    def stop(done, total, text):
        if "loss" in text:
            raise Stop

    for _ in range(20):
        try:
            RECIPES["arcface"].fit(options, tiles, tmp_path / "stopped", stop)
            break
        except Stop:
            pass
    whole, stopped = (tmp_path / n / "weights.safetensors" for n in ("whole", "stopped"))
    assert whole.read_bytes() == stopped.read_bytes()
    histories = [
        [row["loss"] for row in json.loads((tmp_path / n / "run.json").read_text())["epochs"]]
        for n in ("whole", "stopped")
    ]
    assert histories[0] == histories[1]


@pytest.mark.parametrize("recipe", SMALL)
def test_a_stream_of_which_much_is_broken_still_trains(recipe, tmp_path):
    broken = tuple(range(0, 60, 3)) + (1, 4, 7)
    tiles = fake(60, [str(n % 3) for n in range(60)], broken=broken)
    options = change(SMALL[recipe], stream=True, batch=8, judge=False)
    record = fit(recipe, options, tiles, tmp_path / "run")
    assert len(record["data"]["unreadable"]) >= 10


def test_more_processes_than_devices_are_refused(tile_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(BadInput, match="pass --devices 2"):
        fit("classifier", SMALL["classifier"], open_tiles(tile_folder), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_shipped_clusters_are_fitted_on_the_training_part_and_scored(tile_folder, tmp_path):
    record = fit("dac", SMALL["dac"], open_tiles(tile_folder), tmp_path / "run")
    scores = record["metrics"]["clusters"]
    assert values(scores["shipped"])["accuracy"] >= 1 / 3
    with pytest.raises(BadInput, match="trains no clustering head"):
        change(SMALL["dac"], output="clusters", method="dec")
    with pytest.raises(BadInput, match="no validation loss"):
        change(SMALL["deepcluster"], keep_best=True)


def test_a_run_on_a_papers_layout_exports_from_its_own_data(tmp_path, cli_json):
    import gzip
    import struct

    rng = np.random.default_rng(0)
    folder = tmp_path / "mnist"
    folder.mkdir()
    for name, array in (
        ("train-images-idx3-ubyte", rng.integers(0, 256, (60, 28, 28), np.uint8)),
        ("train-labels-idx1-ubyte", (np.arange(60) % 4).astype(np.uint8)),
    ):
        head = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
        (folder / f"{name}.gz").write_bytes(gzip.compress(head + array.tobytes()))
    cli_json(
        "train", "dac", folder, "--out", tmp_path / "run", "--epochs", 1, "--pretrain", 1, "--batch", 20,
        "--accelerator", "cpu",
    )  # fmt: skip
    cli_json("export", tmp_path / "run", "--out", tmp_path / "b")
    card = (tmp_path / "b/MODEL_CARD.md").read_text()
    assert "training tiles (nothing was held out)" in card and "clusters.assigned.accuracy" in card
