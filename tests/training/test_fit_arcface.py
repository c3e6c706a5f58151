"""The recipe: repeatable, resumable after a kill, split by group, and better than chance."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from histoseek.artifacts.tileset_files import open_tiles
from histoseek.errors import BadInput, Mismatch
from histoseek.metrics import codes
from histoseek.training.arcface_options import ArcFaceOptions
from histoseek.training.augment import Augmentation, augment, look, placement
from histoseek.training.checkpoint import load_encoder
from histoseek.training.commands import select
from histoseek.training.data import load, split
from histoseek.training.evaluate import embed, to_input
from histoseek.training.fit_arcface import EmbeddingNet, fit
from histoseek.training.models import build
from histoseek.training.recipes import describe_options, find_recipe
from histoseek.ui.cli.options import parse

SMALL = {"size_px": 64, "epochs": 3, "batch": 16, "folds": 3, "accelerator": "cpu"}


def silent(done, total, text):
    pass


def test_large_pictures_are_cut_and_the_label_counts_as_much_as_it_is_given(tmp_path, tissue):
    folder, lines = tmp_path / "tiles", ["file,label,group"]
    for label, rows in (("a", slice(0, 200)), ("b", slice(200, 400))):
        (folder / label).mkdir(parents=True)
        for n in range(4):
            picture = Image.fromarray(tissue[rows, n * 50 : n * 50 + 200])
            picture.save(folder / label / f"{n}.png")
            lines.append(f"{label}/{n}.png,{label},{label}{n}")
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    assert (
        len(load(open_tiles(folder), 64, silent))
        == len(load(open_tiles(folder), 64, silent, 4))
        == 8
    )
    whole = load(open_tiles(folder), 64, silent, cut=3)
    assert len(whole) == 72 and whole.files[0] == "a/0.png@4,4"
    assert len(np.unique(whole.places)) == 72 and len(np.unique(whole.groups)) == 8
    records = [
        fit(
            ArcFaceOptions(**SMALL, cut=3, target="label+place", label_weight=weight, dropout=0.0),
            open_tiles(folder), tmp_path / f"run{weight}", silent,
        )
        for weight in (0.0, 2.0)
    ]  # fmt: skip
    for weight, record in zip((0.0, 2.0), records, strict=True):
        row = record["epochs"][0]
        assert row["loss"] == pytest.approx(weight * row["label"] + row["place"], rel=1e-4)


def test_a_run_repeats_to_the_byte(tile_folder, tmp_path):
    tiles = open_tiles(tile_folder)
    for name in ("one", "two"):
        fit(ArcFaceOptions(**SMALL), tiles, tmp_path / name, silent)
    one, two = ((tmp_path / n / "weights.safetensors").read_bytes() for n in ("one", "two"))
    assert one == two
    fit(ArcFaceOptions(**SMALL, seed=1), tiles, tmp_path / "three", silent)
    assert (tmp_path / "three/weights.safetensors").read_bytes() != one


def test_killed_in_the_middle_it_resumes_to_the_same_weights(tile_folder, tmp_path, cli):
    words = [
        "train", "arcface", str(tile_folder), "--size-px", "64", "--epochs", "5", "--batch", "16",
        "--folds", "3", "--accelerator", "cpu", "--out",
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
    record = json.loads((run / "run.json").read_text())
    assert [e["epoch"] for e in record["epochs"]] == [1, 2, 3, 4, 5]
    whole = (tmp_path / "whole/weights.safetensors").read_bytes()
    assert (run / "weights.safetensors").read_bytes() == whole


def test_a_folder_of_another_run_is_refused_with_the_difference(tile_folder, tmp_path):
    tiles = open_tiles(tile_folder)
    options = ArcFaceOptions(**{**SMALL, "epochs": 1})
    first = fit(options, tiles, tmp_path / "run", silent)
    assert fit(options, tiles, tmp_path / "run", silent) == first  # finished: nothing is redone
    with pytest.raises(Mismatch, match=r"margin: 0\.5 -> 0\.2"):
        fit(ArcFaceOptions(**{**SMALL, "epochs": 1}, margin=0.2), tiles, tmp_path / "run", silent)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/run.json").write_text('{"ok": true}')
    with pytest.raises(Mismatch, match="not from a training run"):
        fit(options, tiles, tmp_path / "other", silent)
    with pytest.raises(Mismatch, match="training data"):
        fit(options, tiles.take(range(60)), tmp_path / "run", silent)


def test_two_phases_train_what_they_name_and_nothing_else(tile_folder, tmp_path):
    torch.manual_seed(2)
    weights = tmp_path / "backbone.pth"
    start = build("mobilenet-v3-small").backbone.state_dict()
    torch.save(start, weights)
    options = ArcFaceOptions(**SMALL, weights=str(weights), epochs_head=1, epochs_tail=1)
    record = fit(options, open_tiles(tile_folder), tmp_path / "run", silent)
    assert [e["phase"] for e in record["epochs"]] == ["head", "last layers"]
    from histoseek.training.checkpoint import load_tensors

    trained = load_tensors(tmp_path / "run/weights.safetensors")[0]
    moved = {
        key.split(".")[1]
        for key, value in start.items()
        if not torch.equal(value, trained[f"backbone.{key}"])
    }
    assert moved == {"9", "10", "11", "12"}


def test_frozen_batch_norms_keep_their_statistics():
    options = ArcFaceOptions(weights="x")
    targets = {"label": torch.tensor([0, 1, 2, -1])}
    net = EmbeddingNet(build("mobilenet-v3-small", size_px=64), targets, options)
    before = {k: v.clone() for k, v in net.encoder.backbone.state_dict().items()}
    net.begin_phase(options.phases()[0])
    net(torch.rand(4, 3, 64, 64), torch.arange(4))["loss"].backward()
    after = net.encoder.backbone.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_unlabelled_tiles_cost_nothing():
    targets = {"label": torch.tensor([0, -1, 2, 1, -1])}
    net = EmbeddingNet(build("mobilenet-v3-small", size_px=64), targets, ArcFaceOptions())
    net.eval()
    tiles = torch.rand(3, 3, 64, 64)
    some = net(tiles, torch.tensor([0, 1, 2]))["loss"]
    assert torch.allclose(some, net(tiles[[0, 2]], torch.tensor([0, 2]))["loss"], atol=1e-5)
    none = net(tiles, torch.tensor([1, 1, 4]))["loss"]
    assert float(none.detach()) == 0


def test_no_group_is_split(tile_folder):
    data = load(open_tiles(tile_folder), 32, silent)
    seen = []
    for fold in range(3):
        parts = split(data, 3, fold, seed=0, validate=True)
        train, held_out = np.concatenate([parts.train, parts.validate]), parts.test
        assert not set(data.groups[train]) & set(data.groups[held_out])
        assert not set(data.groups[parts.train]) & set(data.groups[parts.validate])
        assert len(train) + len(held_out) == 72 and len(parts.validate) >= 20
        assert set(data.labels[held_out]) == {0, 1, 2}
        seen += held_out.tolist()
    assert sorted(seen) == list(range(72))
    with pytest.raises(BadInput, match="18 group"):
        split(data, 40, 0, seed=0)


def test_cross_validation_trains_every_fold_and_sums_up(tile_folder, tmp_path, cli_json):
    document = cli_json(
        "train", "arcface", tile_folder, "--out", tmp_path / "cv", "--cross-validate",
        "--size-px", 64, "--epochs", 1, "--batch", 16, "--folds", 3, "--accelerator", "cpu",
    )  # fmt: skip
    assert document["folds"] == 3 and {p.name for p in tmp_path.glob("cv/fold-*")} == {
        "fold-0", "fold-1", "fold-2",
    }  # fmt: skip
    row = document["summary"]["trained"]["same_group_r1"]
    values = []
    for fold in range(3):
        run = json.loads((tmp_path / f"cv/fold-{fold}/run.json").read_text())
        values += [
            m["value"]
            for m in run["metrics"]["trained"]["retrieval"]
            if m["name"] == "same_group_r1"
        ]
    assert row["mean"] == pytest.approx(np.mean(values)) and row["sd"] == pytest.approx(
        np.std(values)
    )


def test_it_learns_what_a_random_net_does_not_know(tile_folder, tmp_path):
    options = ArcFaceOptions(
        **{**SMALL, "epochs": 20, "batch": 8},
        target="label",
        lr=3e-3,
        margin=0.2,
        dropout=0.0,
        rotation_deg=180,
    )
    record = fit(options, open_tiles(tile_folder), tmp_path / "run", silent)
    assert record["epochs"][-1]["loss"] < 0.7 * record["epochs"][0]["loss"]
    scores = {m["name"]: m for m in record["metrics"]["trained"]["retrieval"]}
    assert scores["knn5"]["value"] > scores["knn5"]["baseline"] + 0.25
    assert {"same_group_r1", "knn5"} == set(scores)
    clustering = record["metrics"]["trained"]["kmeans_k_classes"]["scores"]
    assert {m["name"] for m in clustering} >= {
        "accuracy", "macro_f1", "ari", "nmi", "ami", "silhouette", "purity",
    }  # fmt: skip
    assert all("baseline" in m and m["baseline_is"] for m in clustering)


def test_unreadable_tiles_are_counted_and_named(tile_folder, tmp_path):
    import shutil

    folder = tmp_path / "kinds"
    shutil.copytree(tile_folder, folder)
    (folder / "cat/05.png").write_bytes(b"broken")
    record = fit(
        ArcFaceOptions(**{**SMALL, "epochs": 0}), open_tiles(folder), tmp_path / "run", silent
    )
    assert record["data"]["tiles"] == 71 and "cat/05.png" in record["data"]["unreadable"][0]


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_epoch(
    tile_folder, tmp_path, monkeypatch
):
    from histoseek.training import fit_arcface

    real, calls = EmbeddingNet.forward, []

    def broken(self, tiles, numbers):
        calls.append(1)
        losses = real(self, tiles, numbers)
        return {"loss": losses["loss"] * float("nan")} if len(calls) == 5 else losses

    monkeypatch.setattr(fit_arcface.EmbeddingNet, "forward", broken)
    with pytest.raises(BadInput, match="epoch 2, by step"):
        fit(ArcFaceOptions(**SMALL), open_tiles(tile_folder), tmp_path / "run", silent)
    assert (tmp_path / "run/checkpoint.safetensors").exists()


def test_data_without_the_target_is_refused(tile_folder, tmp_path):
    tiles = open_tiles(tile_folder).without("label", ["cat", "retina"])
    with pytest.raises(BadInput, match=r"1 label"):
        fit(ArcFaceOptions(**SMALL), tiles, tmp_path / "a", silent)
    ungrouped = open_tiles(tile_folder / "tissue")
    with pytest.raises(BadInput, match="groups"):
        fit(ArcFaceOptions(**SMALL, target="group"), ungrouped, tmp_path / "b", silent)


def test_options_come_from_the_model_and_say_what_is_wrong():
    model = find_recipe("arcface").options
    words = ["--margin", "0.3", "--easy-margin", "--no-flip", "--target=group"]
    options = parse(model, words, "arcface")
    assert (options.margin, options.easy_margin, options.flip, options.target) == (
        0.3,
        True,
        False,
        "group",
    )
    assert all(meaning for _, _, meaning in describe_options(model))
    for words, says in (
        (["--margins", "1"], "--margin"),
        (["--epochs", "many"], "int"),
        (["--epochs"], "requires an argument"),
        (["--target", "slide"], "label, group"),
        (["--folds", "1"], "folds is 1"),
        (["--crop-px", "500"], "crop_px is 500"),
    ):
        with pytest.raises(BadInput, match=says):
            parse(model, words, "arcface")
    with pytest.raises(BadInput, match="choose one of: arcface, autoencoder"):
        find_recipe("simclr")


def test_augmentation_repeats_by_seed_and_stays_in_range(tissue):
    tiles = torch.from_numpy(np.stack([tissue[:96, :96]] * 6)).permute(0, 3, 1, 2).float() / 255
    ranges = Augmentation(180, 0.3, 0.1, True, 0.3, 0.2, 0.05, crop_px=64)
    one, two = (augment(tiles, ranges, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(one, two) and one.shape == (6, 3, 64, 64)
    assert one.min() >= 0 and one.max() <= 1 and not torch.equal(one[0], one[1])
    still = Augmentation(0, 0, 0, False, 0, 0, 0)
    assert torch.allclose(augment(tiles, still, torch.Generator()), tiles, atol=1e-5)


@pytest.mark.parametrize("more", [{}, {"noise": 0.1, "crop_px": 48}, {"viewing": True}])
def test_a_batch_is_augmented_in_parts_as_a_whole(more, monkeypatch):
    from histoseek.training import augment as module
    from histoseek.training.augment import Augmentation, augment

    whole = torch.randint(0, 256, (7, 3, 64, 64), dtype=torch.uint8)
    ranges = Augmentation(**more)
    found = []
    for together in (1, 10**9):
        monkeypatch.setattr(module, "IN_CACHE", together)
        for tiles in (whole, whole / 255):
            generator = torch.Generator().manual_seed(1)
            found.append(augment(tiles, ranges, generator, then=lambda tiles: tiles.sub_(2)))
    assert all(torch.allclose(found[0], other, atol=1e-5) for other in found)
    assert found[0].min() >= -2 and found[0].max() <= -1


def test_places_are_those_of_affine_grid():
    from histoseek.training.viewing import grid_of

    maps = torch.randn(5, 2, 3)
    expected = torch.nn.functional.affine_grid(maps, [5, 3, 31, 31], align_corners=False)
    assert torch.allclose(grid_of(maps, 31), expected, atol=1e-5)


def test_rotation_by_a_quarter_is_a_quarter():
    tile = torch.rand(1, 3, 32, 32)
    turned = look(tile, placement(1, 32, _QuarterTurn(), torch.Generator()), 32)
    assert torch.allclose(turned, torch.rot90(tile, 1, (2, 3)), atol=1e-4) or torch.allclose(
        turned, torch.rot90(tile, -1, (2, 3)), atol=1e-4
    )


class _QuarterTurn(Augmentation):
    def __init__(self):
        super().__init__(zoom=0, shift=0, flip=False)
        probe = torch.rand(1, generator=torch.Generator()) * 2 - 1
        object.__setattr__(self, "rotation_deg", 90 / float(probe[0]))


def test_selection_excludes_and_relabels(tile_folder):
    chosen = select([tile_folder], ["label=cat"], ["label", "group"])
    assert {t.label.split("/")[0] for t in chosen.tiles} == {"retina", "tissue"}
    with pytest.raises(BadInput, match="matches no tile"):
        select([tile_folder], ["label=dog"], ["label"])
    with pytest.raises(BadInput, match="COLUMN=VALUE"):
        select([tile_folder], ["label"], ["label"])
    both = select([tile_folder, tile_folder / "manifest.csv"], [], ["label"])
    assert len(both) == 144 and len(set(codes([t.group for t in both.tiles]))) == 36


@pytest.mark.shared
def test_on_lc25000_same_group_recall_beats_random_weights(shared, tmp_path):
    """The paper's recipe on real H&E, 5 folds by source tile; a short run on some small tiles.

    ``make bench-encoder`` trains on all of them.
    """
    everything = open_tiles(shared / "lc25000.tar")
    groups = set(sorted({tile.group for tile in everything.tiles})[::9])
    tiles = everything.take([n for n, t in enumerate(everything.tiles) if t.group in groups])
    options = ArcFaceOptions(
        size_px=64, epochs=8, batch=64, folds=5, target="label+group", lr=3e-3, margin=0.3,
        dropout=0.0, rotation_deg=180, zoom=0.2, crop_px=56, accelerator="cpu",
    )  # fmt: skip
    record = fit(options, tiles, tmp_path / "run", silent)
    reached, random = (
        next(
            m["value"] for m in record["metrics"][side]["retrieval"] if m["name"] == "same_group_r1"
        )
        for side in ("trained", "random_init")
    )
    print(f"same-group R@1 {reached:.3f}, random weights {random:.3f}")
    assert reached >= random + 0.10


def test_a_dropped_head_leaves_half_whitened_components_of_the_pooled_features(
    tile_folder, tmp_path
):
    options = ArcFaceOptions(**SMALL, dim=6, drop_head=True)
    tiles = open_tiles(tile_folder)
    record = fit(options, tiles, tmp_path / "run", silent)
    assert record["architecture"]["dim"] == 0 and record["architecture"]["chain"] == 6
    encoder = load_encoder(tmp_path / "run")
    assert not [name for name in encoder.state_dict() if name.startswith("head.")]
    data = load(tiles, 64, silent)
    parts = split(data, options.folds, options.fold, options.seed)
    found = embed(encoder, data.tiles[parts.train], unit=False)
    covariance = np.cov(found.T)
    np.testing.assert_allclose(found.mean(0), 0, atol=1e-3 * found.std())
    assert np.abs(covariance - np.diag(covariance.diagonal())).max() < 1e-3 * covariance.max()
    pooled = encoder.features(to_input(encoder, data.tiles[parts.train])).detach().numpy()
    spread = np.linalg.svd((pooled - pooled.mean(0)) / (pooled.std(0) + 1e-6), compute_uv=False)[:6]
    # a half whitened component's standard deviation is the root of what it was
    np.testing.assert_allclose(
        found.std(0) / found.std(0)[0], np.sqrt(spread / spread[0]), rtol=1e-2
    )
    with pytest.raises(Mismatch, match="drop_head"):
        fit(ArcFaceOptions(**SMALL, dim=6), tiles, tmp_path / "run", silent)
    same = tmp_path / "same"
    same.mkdir()
    for number in range(8):
        Image.new("RGB", (64, 64), "pink").save(same / f"{number}.png")
    (same / "manifest.csv").write_text(
        "file,label,group\n" + "".join(f"{n}.png,{'ab'[n % 2]},{n}\n" for n in range(8))
    )
    with pytest.raises(BadInput, match="features of all training tiles are the same"):
        fit(options, open_tiles(same), tmp_path / "pink", silent)
