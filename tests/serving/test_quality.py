"""Quality of tiles: what is measured, which tiles are left out, and where that is said."""

import json

import h5py
import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from histoseek.artifacts.feature_files import QUALITY, read_features
from histoseek.artifacts.feature_writer import amend
from histoseek.errors import BadInput
from histoseek.serving.embedding.jobs import find_jobs
from histoseek.serving.embedding.pipeline import embed_jobs
from histoseek.serving.embedding.results import EmbedOptions
from histoseek.serving.encoders.open import open_encoder
from histoseek.serving.slides.quality import Limits, counted, is_stain, measure
from histoseek.serving.slides.tissue import tissue_mask

SIZE = 224
GREEN, BLUE = (0, 130, 70), (25, 70, 190)


def of(tiles):
    """The measures of tiles by name."""
    return dict(zip(QUALITY, measure(np.asarray(tiles, dtype=np.uint8)).T, strict=True))


def blurred(pixels, sigma):
    return gaussian_filter(pixels.astype(float), (sigma, sigma, 0)).round().astype(np.uint8)


@pytest.fixture(scope="module")
def tiles(tissue):
    """Four tiles of real tissue, at its own resolution."""
    corners = [(0, 0), (0, 288), (288, 0), (288, 288)]
    return np.stack([tissue[y : y + SIZE, x : x + SIZE] for y, x in corners])


def test_sharpness_tells_tissue_in_focus_from_blurred_tissue(tiles):
    sharp = of(tiles)["sharpness"]
    assert (sharp > 0.2).all()
    values = [of([blurred(t, sigma) for t in tiles])["sharpness"] for sigma in (1, 2, 3, 4)]
    for before, after in zip([sharp, *values], values, strict=False):
        assert (after < before).all()
    assert (values[2] < 0.12).all() and (values[3] < 0.12).all()


def test_sharpness_depends_neither_on_stain_strength_nor_on_direction(tiles):
    sharp = of(tiles)["sharpness"]
    pale = of(255 - (255 - tiles.astype(float)) * 0.4)["sharpness"]
    assert np.abs(pale - sharp).max() < 0.06
    turned = of(np.rot90(tiles, axes=(1, 2)))["sharpness"]
    assert np.abs(turned - sharp).max() < 0.06
    # fibres along one direction have detail across only
    across = np.tile(tiles[:, :1], (1, SIZE, 1, 1))
    assert (of(across)["sharpness"] > 0.12).all()


def test_noise_is_not_taken_for_detail(tiles):
    rng = np.random.default_rng(0)
    soft = np.stack([blurred(t, 3) for t in tiles]).astype(float)
    noisy = (soft + rng.normal(0, 2, soft.shape)).clip(0, 255)
    assert (of(noisy)["sharpness"] < 0.12).all()


def test_ink_is_found_on_tissue_and_glass_and_tissue_is_not_ink(tiles):
    assert (of(tiles)["pen"] < 0.05).all()
    for colour in (GREEN, BLUE):
        ink = (np.array(colour) / 255) ** 0.8
        below = np.full_like(tiles, 240)
        assert (of(below * ink)["pen"] > 0.9).all()
        half = tiles.copy()
        half[:, :, : SIZE // 2] = (half[:, :, : SIZE // 2] * ink).astype(np.uint8)
        assert (of(half)["pen"] > 0.25).all()


def test_dark_glass_and_density(tiles):
    glass = of(np.full((1, SIZE, SIZE, 3), 240))
    assert (
        glass["glass"] == 1
        and glass["sharpness"] == 0
        and glass["density"] == pytest.approx(0.026, abs=1e-3)
    )
    black = of(np.full((1, SIZE, SIZE, 3), 9))
    assert black["dark"] == 1 and black["glass"] == 0 and black["density"] > 1.3
    strong = of((tiles / 255.0) ** 1.5 * 255)
    assert (strong["density"] > 1.3 * of(tiles)["density"]).all()


def test_tiles_of_any_size_are_measured():
    for side in (16, 32, 96):
        assert np.isfinite(measure(np.full((2, side, side, 3), 200, np.uint8))).all()


def test_limits_name_the_fault():
    #        sharpness pen dark glass density
    rows = [[0.5, 0, 0, 0, 0], [0.1, 0, 0, 0, 0], [0.1, 0.4, 0, 0, 0], [0, 0, 0, 0.95, 0]]
    rows = np.array(rows, np.float32)  # the last is glass, which is not called blurred
    assert counted(Limits(0.12, 0.25).faults(rows)) == {
        "pen": 1,
        "blurred": 1,
    }  # glass is not blurred
    assert counted(Limits().faults(rows)) == {}


# -- embedding --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder():
    return open_encoder("default")


def embed(slide, encoder, out, **options):
    (result,) = embed_jobs(
        find_jobs([slide]), encoder, out, EmbedOptions(**options), lambda *_: None
    )
    return result


@pytest.fixture(scope="module")
def whole(tissue):
    """1024 x 1024 of real tissue, at its own resolution."""
    return np.concatenate([np.concatenate([tissue, tissue[:, ::-1]], 1)] * 2, 0)


@pytest.fixture(scope="module")
def marked(whole, make_slide, tmp_path_factory):
    """A slide whose upper half is in focus; a part of the lower half is blurred, another below ink."""
    pixels = whole.copy()
    pixels[512:, :448] = blurred(whole, 4)[512:, :448]
    pixels[512:, 640:] = (pixels[512:, 640:] * (np.array(GREEN) / 255) ** 0.8).astype(np.uint8)
    return make_slide(tmp_path_factory.mktemp("marked") / "marked.tiff", pixels=pixels)


def test_blurred_tiles_and_pen_are_left_out_and_counted(marked, encoder, tmp_path):
    result = embed(marked, encoder, tmp_path, geojson=True)
    assert result.state == "done" and set(result.left_out_tiles) == {"pen", "blurred"}
    item = read_features(tmp_path / result.features)
    assert len(item.features) == len(item.quality) == result.tiles
    assert (item.quality[:, 0] >= 0.12).all() and (item.quality[:, 1] <= 0.25).all()
    left_out = item.left_out
    assert len(left_out.coords) == sum(result.left_out_tiles.values())
    places = dict(zip(map(tuple, left_out.coords.tolist()), left_out.reasons, strict=True))
    assert not set(places) & set(map(tuple, item.coords.tolist()))
    assert all(y >= 300 for _, y in places)
    assert {reason for (x, _), reason in places.items() if x < 400} == {"blurred"}
    assert {reason for (x, _), reason in places.items() if x > 600} == {"pen"}
    assert result.left_out_tiles == item.about["left_out_tiles"]

    overlay = np.asarray(Image.open(tmp_path / "overlays" / "marked.jpg")).astype(int)
    red, green, blue = np.moveaxis(overlay, 2, 0)
    purple = (red > 150) & (blue > green + 60)  # as tiles below ink are crossed out
    assert purple[:300].sum() == 0 and purple[600:1000, 700:].sum() > 100
    tiles = json.loads((tmp_path / "geojson" / "marked.tiles.geojson").read_text())["features"]
    classes = [t["properties"].get("classification", {}).get("name") for t in tiles]
    assert classes.count("Left out: pen") == result.left_out_tiles["pen"]
    numbered = [t["properties"]["name"] for t in tiles if "classification" not in t["properties"]]
    assert numbered == [str(row) for row in range(result.tiles)]


def test_other_limits_embed_again_and_keep_all(marked, encoder, tmp_path):
    first = embed(marked, encoder, tmp_path)
    assert embed(marked, encoder, tmp_path).state == "skipped"
    every = embed(marked, encoder, tmp_path, min_sharpness=0.0, max_pen=1.0)
    assert every.state == "done" and every.left_out_tiles == {}
    assert every.tiles == first.tiles + sum(first.left_out_tiles.values())
    assert read_features(tmp_path / every.features).left_out is None


def test_an_overlay_made_later_shows_what_was_left_out(marked, encoder, tmp_path):
    embed(marked, encoder, tmp_path)
    overlay = tmp_path / "overlays" / "marked.jpg"
    before = overlay.read_bytes()
    overlay.unlink()
    result = embed(marked, encoder, tmp_path)
    assert result.state == "skipped" and overlay.read_bytes() == before
    assert set(result.left_out_tiles) == {"pen", "blurred"}


def test_a_wholly_blurred_slide_is_empty_and_says_why(whole, make_slide, encoder, tmp_path):
    slide = make_slide(tmp_path / "soft.tiff", pixels=blurred(whole, 5))
    result = embed(slide, encoder, tmp_path / "out")
    assert result.state == "empty" and result.tiles == 0
    count = result.left_out_tiles["blurred"]
    assert f"{count} blurred of {count} tiles were left out" in result.reason
    assert "--min-sharpness 0" in result.reason


def test_a_stain_with_the_colours_of_ink_is_not_pen(whole, make_slide, encoder, tmp_path):
    light = 255 - (255 - whole[..., 1:2].astype(float)) * np.array(
        [1.2, 0.5, 0.2]
    )  # as trichrome's blue
    slide = make_slide(tmp_path / "blue.tiff", pixels=light.clip(0, 255).astype(np.uint8))
    result = embed(slide, encoder, tmp_path / "out")
    assert result.state == "done" and result.left_out_tiles == {}
    assert any("the colours of pen ink, as with a blue or green stain" in n for n in result.notes)
    assert (read_features(tmp_path / "out" / result.features).quality[:, 1] > 0.25).any()


def test_pen_around_pale_tissue_is_still_pen(tissue):
    pale = np.full((600, 600, 3), 240, np.uint8)
    pale[240:360, 240:360] = 255 - (255 - tissue[:480:4, :480:4].astype(float)) * 0.4
    y, x = np.mgrid[:600, :600]
    ring = np.abs(np.hypot(x - 300, y - 300) - 160) < 15
    pale[ring] = pale[ring] * (np.array(GREEN) / 255) ** 0.8
    assert not is_stain(pale, tissue_mask(pale, 10))


def test_tiles_of_a_coarse_slide_are_not_called_blurred(whole, make_slide, encoder, tmp_path):
    coarse = np.asarray(Image.fromarray(blurred(whole, 2)).resize((512, 512), Image.Resampling.BOX))
    slide = make_slide(tmp_path / "ten.tiff", pixels=coarse, mpp=1.0)
    result = embed(slide, encoder, tmp_path / "out")
    assert result.state == "done" and "blurred" not in result.left_out_tiles
    assert any("enlarged 2 times" in note for note in result.notes)


def test_empty_and_black_tiles_are_not_called_blurred(make_slide, encoder, tmp_path):
    for name, level in (("glass", 235), ("grey", 190), ("black", 8)):
        flat = np.full((448, 448, 3), level, np.uint8)
        slide = make_slide(tmp_path / f"{name}.tiff", pixels=flat)
        result = embed(slide, encoder, tmp_path / "out", min_tissue=0.0)
        assert (result.tiles, result.left_out_tiles) == (4, {})


def test_features_of_an_earlier_version_are_kept_and_named(marked, encoder, tmp_path):
    path = tmp_path / embed(marked, encoder, tmp_path, min_sharpness=0.0, max_pen=1.0).features
    about = read_features(path).about
    del about["key"]["quality"]
    amend(path, about["source"], {"key": about["key"]})
    result = embed(marked, encoder, tmp_path)
    assert result.state == "skipped"
    assert any("earlier version, which found less pale tissue" in note for note in result.notes)


def test_tile_sets_are_measured_but_nothing_is_left_out(tissue, encoder, tmp_path):
    folder = tmp_path / "tiles"
    folder.mkdir()
    Image.fromarray(blurred(tissue, 5)).save(folder / "soft.png")
    Image.fromarray(tissue).save(folder / "sharp.png")
    result = embed(folder, encoder, tmp_path / "out")
    assert result.tiles == 2 and result.left_out_tiles == {}
    quality = read_features(tmp_path / "out" / result.features).quality
    assert quality[0, 0] > quality[1, 0]  # sharp, soft


def test_the_command_says_how_many_tiles_went(marked, cli, cli_json, tmp_path):
    said = cli("embed", marked, "--out", tmp_path).stdout
    assert "tiles left out, blurred:" in said and "--min-sharpness 0 keeps them" in said
    assert "tiles left out, pen:" in said and "--max-pen 1 keeps them" in said
    again = cli_json("embed", marked, "--out", tmp_path)
    assert set(again["results"][0]["left_out_tiles"]) == {"blurred", "pen"}


def test_left_out_tiles_of_another_form_are_ignored(marked, encoder, tmp_path):
    """They are only drawn, so nothing may fail for them."""
    path = tmp_path / embed(marked, encoder, tmp_path).features
    for reasons in ([b"fold"], [1, 2, 3], None):
        with h5py.File(path, "r+") as stored:
            del stored["left_out"]["reasons"]
            if reasons is not None:
                stored["left_out"].create_dataset("reasons", data=reasons)
        assert read_features(path).left_out is None
        if reasons is None:
            continue
        (tmp_path / "overlays" / "marked.jpg").unlink()
        assert embed(marked, encoder, tmp_path).state == "skipped"
        assert (tmp_path / "overlays" / "marked.jpg").exists()


def test_quality_of_another_shape_is_refused_and_of_other_programs_ignored(
    marked, encoder, tmp_path
):
    path = tmp_path / embed(marked, encoder, tmp_path).features
    with h5py.File(path, "r+") as stored:
        del stored["quality"]
        stored.create_dataset("quality", data=np.zeros(3))  # of another program
    assert read_features(path).quality is None
    with h5py.File(path, "r+") as stored:
        stored["quality"].attrs["names"] = ",".join(QUALITY)
    with pytest.raises(BadInput, match="'quality' is float64 .3,.; expected"):
        read_features(path)
