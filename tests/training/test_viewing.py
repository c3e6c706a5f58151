"""Viewing changes, the two-view losses, and the readout of several layers."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from histoseek.artifacts.tileset_files import open_tiles
from histoseek.errors import BadInput
from histoseek.training.arcface_options import ArcFaceOptions
from histoseek.training.augment import Augmentation, augment, placement
from histoseek.training.checkpoint import load_encoder
from histoseek.training.components import PER_LAYER, drop_head
from histoseek.training.evaluate import calibrate, to_input
from histoseek.training.fit_arcface import fit
from histoseek.training.losses import info_nce
from histoseek.training.models import build
from histoseek.training.viewing import blur, show

STILL = Augmentation(0, 0, 0, False, 0, 0, 0)


@pytest.fixture(scope="module")
def tile(tissue):
    return torch.from_numpy(tissue[:96, :96].copy()).permute(2, 0, 1).float()[None] / 255


def sharpness(tiles):
    """Energy of the highest frequencies of each tile, in grey values: what a 5 x 5 blur removes."""
    return ((tiles - blur(tiles, 1.0)).square().mean((1, 2, 3)).sqrt() * 255).numpy()


def test_tiles_become_as_sharp_and_as_smooth_as_programs_show_them(tile):
    many = tile.expand(240, -1, -1, -1)
    shown, again = (show(many, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(shown, again) and shown.shape == many.shape
    assert shown.min() >= 0 and shown.max() <= 1
    of_original, of_shown = sharpness(tile)[0], sharpness(shown)
    low, high = np.quantile(of_shown / of_original, (0.05, 0.95))
    assert low < 0.6 and high > 1.5  # plain augmentation only makes tiles smoother
    means = shown.mean((2, 3))
    assert means.std(0).min() > 0.02  # colours change


def test_the_warp_keeps_places_with_every_filter(tile):
    """Only the filter differs: a shown tile correlates with the plainly warped one, and is not equal."""
    many = tile.expand(40, -1, -1, -1)
    ranges = Augmentation(180, 0.25, 0.0, True, 0, 0, 0, 64)
    where = placement(40, 96, ranges, torch.Generator().manual_seed(2))
    plain = augment(many, ranges, torch.Generator().manual_seed(3), where).flatten(1)
    viewing = Augmentation(180, 0.25, 0.0, True, 0, 0, 0, 64, viewing=True)
    changed = augment(many, viewing, torch.Generator().manual_seed(3), where).flatten(1)
    both = torch.stack([plain, changed]).numpy()
    alike = [np.corrcoef(both[:, n])[0, 1] for n in range(40)]
    assert np.median(alike) > 0.9 and min(alike) > 0.5 and not torch.equal(plain, changed)


@pytest.mark.parametrize("sigma_px", [0.3, 1.0, 1.5])
def test_the_blur_is_scipys(tile, sigma_px):
    radius = max(1, int(np.ceil(2.5 * sigma_px)))
    expected = gaussian_filter(tile.numpy(), sigma_px, mode="mirror", radius=radius, axes=(2, 3))
    np.testing.assert_allclose(blur(tile, sigma_px).numpy(), expected, atol=1e-6)


def test_without_viewing_nothing_changes(tile):
    still = augment(tile, STILL, torch.Generator())
    torch.testing.assert_close(still, tile, atol=1e-5, rtol=0)


def test_views_of_a_tile_share_their_centre():
    ranges = Augmentation(180, 0.25, 0.1, True, 0, 0, 0, 48)
    where = placement(12, 96, ranges, torch.Generator().manual_seed(1), views=2)
    one, other = where[:6], where[6:]
    assert torch.equal(one[:, :, 2], other[:, :, 2])
    assert not torch.equal(one[:, :, :2], other[:, :, :2])
    alone = placement(12, 96, ranges, torch.Generator().manual_seed(1))
    assert torch.equal(alone[:, :, :2], where[:, :, :2]) and len(alone[:, :, 2].unique()) == 24


def test_info_nce_is_its_definition():
    torch.manual_seed(0)
    views, temperature = torch.randn(10, 7), 0.1
    unit = torch.nn.functional.normalize(views.double())
    expected = 0.0
    for row in range(10):
        others = [n for n in range(10) if n != row]
        logits = torch.stack([unit[row] @ unit[n] / temperature for n in others])
        expected -= (logits[others.index((row + 5) % 10)] - logits.logsumexp(0)) / 10
    assert float(info_nce(views, temperature)) == pytest.approx(float(expected), rel=1e-5)
    alike = torch.randn(5, 7).repeat(2, 1)
    assert info_nce(alike, temperature) < info_nce(views, temperature)


def test_several_layers_are_pooled_and_a_filter_precedes_them(tile):
    plain = build("mobilenet-v3-small", size_px=96, dim=0, deviation=True, symmetry=True)
    deep = build(
        "mobilenet-v3-small",
        size_px=96,
        dim=0,
        deviation=True,
        symmetry=True,
        layers="3+12",
        blur=5,
    )
    assert deep.parts == (48, 1152) and plain.parts == () and deep.dim == 1200
    assert deep.state_dict().keys() == plain.state_dict().keys()
    deep.load_state_dict(plain.state_dict())
    plain.eval(), deep.eval()
    kernel = np.outer((1, 4, 6, 4, 1), (1, 4, 6, 4, 1)) / 256
    blurred = torch.nn.functional.conv2d(
        torch.nn.functional.pad(tile, (2,) * 4, mode="reflect"),
        torch.from_numpy(kernel).float().expand(3, 1, 5, 5),
        groups=3,
    )
    with torch.no_grad():
        torch.testing.assert_close(deep(tile)[:, 48:], plain(blurred), rtol=1e-4, atol=1e-5)
        maps = plain.backbone.features[:4](blurred)
        torch.testing.assert_close(deep(tile)[:, :24], maps.mean((2, 3)), rtol=1e-4, atol=1e-5)
        turned = deep(torch.rot90(tile, 1, (2, 3)))
        torch.testing.assert_close(turned, deep(tile), rtol=1e-3, atol=1e-4)
    for wrong in ({"layers": "3+13"}, {"layers": "x"}, {"blur": 4}):
        with pytest.raises(BadInput, match="cannot be built with"):
            build("mobilenet-v3-small", **wrong)


def test_a_run_with_two_views_and_several_layers(tile_folder, tmp_path):
    options = ArcFaceOptions(
        size_px=64, epochs=2, batch=16, folds=3, accelerator="cpu", dim=12, drop_head=True,
        model_options="deviation=true,symmetry=true,layers=3+12", viewing=True,
        consistency=1.0, layer_consistency=0.5, target="label+group",
    )  # fmt: skip
    tiles = open_tiles(tile_folder)
    record = fit(options, tiles, tmp_path / "run", lambda *_: None)
    first, last = record["epochs"]
    assert last["consistency"] < first["consistency"] and last["layers"] < first["layers"]
    encoder = load_encoder(tmp_path / "run")
    assert encoder.parts == (48, 1152) and encoder.dim == 12
    assert not [name for name in encoder.state_dict() if name.startswith("head.")]


class Crops:
    """Small crops of one image, read as training tiles are."""

    def __init__(self, image, count, side):
        rng = np.random.default_rng(0)
        down, across = (rng.integers(0, limit - side, count) for limit in image.shape[:2])
        at = zip(down, across, strict=True)
        self.tiles = np.stack([image[y : y + side, x : x + side] for y, x in at])

    def read(self, numbers):
        return self.tiles[numbers], numbers


def test_layers_are_whitened_one_by_one_and_together_by_half(tissue):
    """The affine map equals its definition, written with plain SVDs in float64."""
    torch.manual_seed(0)
    encoder = build(
        "mobilenet-v3-small", size_px=32, dim=8, deviation=True, layers="1+3", dropout=0.0
    )
    crops = Crops(tissue, 500, 32)
    calibrate(encoder, crops.tiles)
    drop_head(encoder, crops, np.arange(500), 10)
    assert encoder.parts == (32, 48) and encoder.dim == 10
    with torch.no_grad():
        pooled = encoder.eval().features(to_input(encoder, crops.tiles)).double().numpy()
        found = encoder(to_input(encoder, crops.tiles)).double().numpy()
    reduced = []
    for part, most in ((pooled[:, :32], PER_LAYER), (pooled[:, 32:], 10)):
        scaled = (part - part.mean(0)) / (part.std(0) + 1e-6)
        left, values, _ = np.linalg.svd(scaled, full_matrices=False)
        white = left[:, :most][:, values[:most] > 1e-4 * values[0]]
        reduced.append(white / np.linalg.norm(white, axis=1).mean())
    left, values, _ = np.linalg.svd(np.hstack(reduced), full_matrices=False)
    expected = left[:, :10] * np.sqrt(values[:10])
    unit = lambda vectors: vectors / np.linalg.norm(vectors, axis=1, keepdims=True)  # noqa: E731
    np.testing.assert_allclose(
        unit(found) @ unit(found).T, unit(expected) @ unit(expected).T, atol=0.01
    )


def test_layer_consistency_without_layers_is_refused():
    for pooled in ("", "layers=12"):
        with pytest.raises(BadInput, match="layers=3"):
            ArcFaceOptions(layer_consistency=1.0, model_options=pooled)
