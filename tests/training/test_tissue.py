"""Training of the network that finds tissue: made scenes, the run, resumption."""

import json

import numpy as np
import pytest
import torch

from histoseek.artifacts.tileset_files import open_tiles
from histoseek.errors import BadInput, Mismatch
from histoseek.training.tissue import fit as fitting
from histoseek.training.tissue import scenes
from histoseek.training.tissue.fit import fit, loss_of, rate_at
from histoseek.training.tissue.net import TissueNet
from histoseek.training.tissue.options import TissueOptions

SHORT = TissueOptions(steps=4, batch=2, side_px=64)


def quiet(*_):
    pass


@pytest.fixture(scope="module")
def tiles(tissue):
    return [tissue[:200, :200], tissue[200:360, 100:300]]


def test_a_scene_depends_on_its_seed_only(tiles):
    first, again, other = (
        scenes.scene(np.random.default_rng(seed), tiles, 96) for seed in (3, 3, 4)
    )
    assert (first.picture == again.picture).all() and (first.tissue == again.tissue).all()
    assert (first.picture != other.picture).any()
    assert first.picture.shape == (96, 96, 3) and first.picture.dtype == np.uint8
    assert first.tissue.shape == (96, 96) and first.tissue.dtype == bool


def test_tissue_is_darker_than_the_glass_of_a_scene_without_artefacts(tiles, monkeypatch):
    monkeypatch.setattr(scenes, "ARTEFACTS", ())
    darker, shares = [], []
    for seed in range(60):
        made = scenes.scene(np.random.default_rng(seed), tiles, 96)
        share = made.tissue.mean()
        shares.append(share)
        if 0.1 < share < 0.9:
            grey = made.picture.mean(2)
            darker.append(grey[made.tissue].mean() < grey[~made.tissue].mean() - 3)
    assert len(darker) > 20 and np.mean(darker) > 0.95
    assert min(shares) == 0 and max(shares) > 0.9


def test_nothing_below_ink_or_beyond_the_border_is_tissue_and_the_rest_stays(tiles):
    everywhere = np.ones((128, 128), bool)
    for draw in (scenes.pen, scenes.border, scenes.writing):
        lost = 0
        for seed in range(12):
            rng = np.random.default_rng(seed)
            plain = scenes.glass(rng, 128)
            drawn, left = draw(rng, plain, everywhere)
            changed = np.abs(drawn - plain).max(2) > 60
            assert (changed & left).sum() <= 0.3 * max(1, changed.sum())  # soft edges
            lost += int((~left).sum())
        assert lost
    for draw in (scenes.edge, scenes.bubbles, scenes.dust, scenes.stripes):
        plain = np.full((128, 128, 3), 240, np.float32)
        drawn, left = draw(np.random.default_rng(1), plain, everywhere)
        assert left.all() and (np.abs(drawn - plain).max(2) > 1).mean() > 0.002


def test_the_loss_is_smallest_for_the_truth():
    truth = torch.zeros(2, 64, 64, dtype=torch.bool)
    truth[:, :32] = True
    right = (truth[:, None, ::2, ::2].float() * 2 - 1) * 9
    assert loss_of(right, truth) < 0.01
    assert loss_of(-right, truth) > 5
    assert loss_of(right * 0, truth) > loss_of(right, truth)


def test_the_rate_rises_then_falls():
    rates = [rate_at(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and max(rates) == pytest.approx(1, abs=1e-3)
    assert rates[-1] < 0.01 and rates[4:] == sorted(rates[4:], reverse=True)


def test_a_run_learns_and_an_interrupted_one_ends_the_same(tile_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(fitting, "EPOCH", 2)
    monkeypatch.setattr(fitting, "HELD_OUT", 4)
    tiles = open_tiles(tile_folder)
    record = fit(SHORT, tiles, tmp_path / "whole", quiet, {"exclude": ["a=b"]})
    assert record["history"][-1]["loss"] < record["history"][0]["loss"]
    assert record["data"]["selection"] == {"exclude": ["a=b"]} and record["mpp"] == scenes.MPP
    assert 0 <= record["metrics"]["recall"] <= 1
    assert fit(SHORT, tiles, tmp_path / "whole", quiet) == json.loads(
        (tmp_path / "whole" / "run.json").read_text()
    )

    def stop(done, total, text):
        if text.startswith("loss") and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(SHORT, tiles, tmp_path / "parts", stop)
    assert not (tmp_path / "parts" / "weights.safetensors").exists()
    resumed = fit(SHORT, tiles, tmp_path / "parts", quiet)
    assert resumed["history"] == record["history"]
    one, two = (
        (tmp_path / name / "weights.safetensors").read_bytes() for name in ("whole", "parts")
    )
    assert one == two
    with pytest.raises(Mismatch, match="steps: 4 -> 5"):
        fit(TissueOptions(steps=5, batch=2, side_px=64), tiles, tmp_path / "whole", quiet)


def test_tiles_of_one_group_only_are_refused(tile_folder, tmp_path):
    tiles = open_tiles(tile_folder)
    whole = tiles.without("group", sorted({tile.group for tile in tiles.tiles})[1:])
    with pytest.raises(BadInput, match="expected at least 2 groups"):
        fit(SHORT, whole, tmp_path / "run", quiet)


def test_the_net_takes_any_multiple_of_32():
    net = TissueNet().eval()
    for side in (64, 96, 256):
        with torch.inference_mode():
            assert net(torch.zeros(1, 3, side, side)).shape == (1, 1, side // 2, side // 2)
    assert sum(p.numel() for p in net.parameters()) * 4 < 1_000_000
