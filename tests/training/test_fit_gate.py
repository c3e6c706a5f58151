"""Synthetic images out of distribution, and the tissue gate that learns to detect them."""

import numpy as np
import pytest
import torch

from histoseek.errors import BadInput
from histoseek.training.data import LabelledTiles
from histoseek.training.fit_gate import fit_gate, judge_gate, non_tissue_tiles, restained
from histoseek.training.models.gate import STATISTICS, TissueGate, colour_statistics, shrink


def test_foreign_pictures_repeat_by_seed_and_have_no_tissues_colours(tissue):
    tiles = np.stack([tissue[:96, :96], tissue[100:196, 100:196]])
    made = non_tissue_tiles(tiles, 28, 3)
    assert made.shape == (28, 96, 96, 3) and made.dtype == np.uint8
    assert (made == non_tissue_tiles(tiles, 28, 3)).all() and (
        made != non_tissue_tiles(tiles, 28, 4)
    ).any()
    grey, plain = made[0::7], made[4::7]
    assert (grey == grey[:, :, :, :1]).all()
    assert plain.std((1, 2)).max() < 12
    everything = made.reshape(28, -1).astype(float)
    assert (
        len(np.unique(everything.mean(1).round(3))) > 20
    )  # no kind is one picture again and again


def test_restained_tiles_are_bright_where_the_tile_is_and_coloured_otherwise():
    picture = np.full((64, 64, 3), 245, np.uint8)
    picture[16:32, 16:32] = 255 * np.exp(-np.array((0.650, 0.704, 0.286)))  # haematoxylin alone
    picture[40:56, 40:56] = 255 * np.exp(-np.array((0.072, 0.990, 0.105)))  # eosin alone
    made = restained(np.stack([picture] * 10), 1)
    assert made.shape == (10, 64, 64, 3) and (made == restained(np.stack([picture] * 10), 1)).all()
    assert (made[:, :10] > 200).all()
    brown = [made[n, 48, 48].astype(int) for n in (0, 5)]  # haematoxylin and DAB: red over blue
    assert max(red - blue for red, _, blue in brown) > 30


def test_colour_statistics_do_not_depend_on_how_a_tile_lies(tissue):
    pixels = torch.from_numpy(tissue[:128, :128].copy()).permute(2, 0, 1)[None].float() / 255
    found = colour_statistics(shrink(pixels))
    assert found.shape == (1, STATISTICS) and torch.isfinite(found).all()
    for turned in (torch.rot90(pixels, 1, (2, 3)), pixels.flip(3), pixels.flip(2)):
        torch.testing.assert_close(colour_statistics(shrink(turned)), found, atol=1e-4, rtol=1e-4)
    blank = colour_statistics(torch.ones(1, 3, 128, 128))
    assert torch.isfinite(blank).all() and not torch.allclose(blank, found, atol=0.1)


def test_a_gate_learns_from_tissue_alone_to_refuse_what_is_none(tissue):
    from skimage.data import chelsea

    corners = np.random.default_rng(0).integers(0, 512 - 64, (60, 2))
    tiles = np.stack([tissue[y : y + 64, x : x + 64] for y, x in corners])
    numbers = np.arange(60)
    data = LabelledTiles(tiles, numbers * 0, numbers, numbers, ("a",), (), {}, True)
    gate = TissueGate()
    fit_gate(gate, data, numbers[:40], 0)
    alarms, caught = (row["value"] for row in judge_gate(gate, tiles[40:], 0)["gate"])
    assert alarms < 0.1 and caught > 0.9
    again = TissueGate()
    fit_gate(again, data, numbers[:40], 0)
    assert torch.equal(gate.weight, again.weight)
    cat = torch.from_numpy(chelsea()[100:164, 150:214].copy()).permute(2, 0, 1)[None].float() / 255
    assert gate(gate.shrink(cat)) > 0.5


def test_a_gate_for_which_no_tile_can_be_read_is_refused(tissue, monkeypatch):
    numbers = np.arange(8)
    tiles = np.stack([tissue[:64, :64]] * 8)
    data = LabelledTiles(tiles, numbers * 0, numbers, numbers, ("a",), (), {}, True)
    monkeypatch.setattr(LabelledTiles, "read", lambda self, rows: (tiles[:2], rows[:2]))
    with pytest.raises(BadInput, match="2 of the training tiles drawn for the gate"):
        fit_gate(TissueGate(), data, numbers, 0)


def test_a_gate_without_hidden_units_scores_as_it_did():
    generator = torch.Generator().manual_seed(0)
    linear = torch.randn(STATISTICS, generator=generator)
    small = torch.rand(4, 3, 8, 8, generator=generator)
    former = {
        "centre": torch.full((STATISTICS,), 0.1), "scale": torch.full((STATISTICS,), 0.5),
        "weight": linear, "bias": torch.tensor([0.2]),
    }  # fmt: skip
    gate = TissueGate()
    gate.load_state_dict(former)
    logit = ((colour_statistics(small) - 0.1) * 0.5).clamp(-5, 5) @ linear + 0.2
    assert torch.allclose(gate(small), torch.sigmoid(2 * logit), atol=1e-5)


def test_exchanged_colours_are_of_no_stain(tissue):
    made = non_tissue_tiles(tissue[None, :224, :224], 70, 0)[1::7]
    red, green, blue = made.reshape(len(made), -1, 3).mean(1).T
    assert (green >= np.maximum(red, blue) - 8).mean() > 0.8
