"""Slides: scale, levels, tissue, and rejected inputs."""

import numpy as np
import pytest
from PIL import Image

from histoseek.artifacts.images import square
from histoseek.errors import BadInput
from histoseek.serving.slides.scale_guess import proposed
from histoseek.serving.slides.slide import Slide, open_slide
from histoseek.serving.slides.tissue import by_saturation, tissue_mask, tissue_share


@pytest.mark.parametrize("side", [100, 224, 300, 448])
def test_a_cut_out_picture_becomes_the_tile_at_its_place(make_slide, tmp_path, tissue, side):
    with open_slide(make_slide(tmp_path / "a.tif", pixels=tissue)) as slide:
        tile = slide.read_tile(30, 40, side, 224)
    assert np.array_equal(square(tissue[40 : 40 + side, 30 : 30 + side], 224), tile)


def test_mpp_comes_from_the_file(make_slide, tmp_path):
    with open_slide(make_slide(tmp_path / "a.tiff", mpp=0.25), assume_mpp=9.0) as slide:
        assert slide.mpp == pytest.approx(0.25, rel=1e-3) and slide.mpp_from == "file"


def test_without_mpp_the_slide_is_refused_unless_one_is_assumed(make_slide, tmp_path):
    path = make_slide(tmp_path / "a.tiff", mpp=None)
    with open_slide(path) as slide, pytest.raises(BadInput, match="--assume-mpp"):
        slide.grid(224, 0.5)
    with open_slide(path, assume_mpp=0.5) as slide:
        assert slide.mpp_from == "assumed" and len(slide.grid(224, 0.5).coords)


@pytest.mark.parametrize(("mpp", "said"), [(0.25, "0.25"), (0.5, "0.5"), (1.0, "1")])
def test_the_refusal_proposes_the_scale_at_which_nuclei_have_their_size(
    make_slide, tmp_path, mpp, said
):
    rng, side, radius = np.random.default_rng(0), 1024, 2.4 / mpp  # nuclei 4.8 µm wide
    image = np.full((side, side, 3), (235, 180, 215), dtype=np.uint8)
    y, x = np.mgrid[:side, :side]
    for _ in range(int(0.1 * (side * mpp / 8) ** 2) + 60):
        cx, cy = rng.uniform(0, side, 2)
        image[(x - cx) ** 2 + (y - cy) ** 2 < radius**2] = (90, 60, 140)
    path = make_slide(tmp_path / "a.tiff", mpp=None, pixels=image)
    with open_slide(path) as slide, pytest.raises(BadInput) as refused:
        slide.require_mpp()
    assert str(refused.value).endswith(f"pass --assume-mpp {said}")


def test_nothing_is_proposed_without_nuclei_or_far_from_a_usual_scale(make_slide, tmp_path):
    flat = np.full((600, 600, 3), (220, 120, 190), dtype=np.uint8)
    with open_slide(make_slide(tmp_path / "a.tiff", mpp=None, pixels=flat)) as slide:
        assert slide.estimated_mpp() is None
        with pytest.raises(BadInput, match=r"0\.5 at 20x\)$"):
            slide.require_mpp()
    assert [proposed(mpp) for mpp in (None, 0.1, 0.2, 0.6, 1.2, 3.0)] == [
        None,
        None,
        0.25,
        0.5,
        1.0,
        None,
    ]


@pytest.mark.shared
def test_the_real_slide_would_be_proposed_its_own_scale(cmu_slide):
    with open_slide(cmu_slide) as slide:
        assert slide.mpp == pytest.approx(0.499) and proposed(slide.estimated_mpp()) == 0.5


def test_a_screen_resolution_is_no_mpp(make_slide, tmp_path):
    with open_slide(make_slide(tmp_path / "a.tiff", mpp=352.8)) as slide:
        assert slide.mpp is None


def test_tiles_have_the_slides_pixels_at_its_own_scale(make_slide, tissue, tmp_path):
    path = make_slide(tmp_path / "a.tiff", pixels=tissue)
    with open_slide(path) as slide:
        assert np.array_equal(slide.read_tile(100, 40, 224, 224), tissue[40:264, 100:324])


def test_a_coarser_mpp_covers_more_of_the_slide(make_slide, tmp_path):
    with open_slide(make_slide(tmp_path / "a.tiff", side=1024)) as slide:
        fine, coarse = slide.grid(224, 0.5), slide.grid(224, 1.0)
        assert (fine.size_px_level0, coarse.size_px_level0) == (224, 448)
        assert (fine.candidates, coarse.candidates) == (16, 4)
        tile = slide.read_tile(0, 0, 448, 224).astype(int)
        wide = slide.read_tile(0, 0, 448, 448).astype(int)
        averaged = wide.reshape(224, 2, 224, 2, 3).mean((1, 3))
        assert np.abs(tile - averaged).max() <= 1


def test_overlap_makes_the_grid_denser(make_slide, tmp_path):
    with open_slide(make_slide(tmp_path / "a.tiff", side=1024)) as slide:
        grid = slide.grid(224, 0.5, overlap_px=112, min_tissue=0)
        steps = np.diff(np.unique(grid.coords[:, 0]))
        assert set(steps) == {112} and grid.candidates == 64


def test_the_best_level_of_a_pyramid_is_read(tmp_path):
    from histoseek.ui.cli.demo import make_tissue_slide

    make_tissue_slide(tmp_path / "pyramid.tiff")
    with open_slide(tmp_path / "pyramid.tiff") as slide:
        asked = []
        regions = slide._source.regions
        slide._source.regions = lambda places, level, out: (
            asked.append(level) or regions(places, level, out)
        )
        slide.read_tile(0, 0, 224, 224)
        slide.read_tile(0, 0, 448, 224)
        slide.read_tile(0, 0, 2000, 224)
        assert asked == [0, 1, 2]


def test_plain_pictures_are_slides_too(tissue, tmp_path):
    Image.fromarray(tissue).save(tmp_path / "region.png")
    with open_slide(tmp_path / "region.png", assume_mpp=0.5) as slide:
        assert (slide.width, slide.height) == (512, 512)
        assert np.array_equal(slide.read_tile(10, 20, 224, 224), tissue[20:244, 10:234])


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "does not exist"), (b"", "0 bytes"), (b"not a slide", "slide|picture")],
)
@pytest.mark.parametrize("suffix", [".svs", ".tiff", ".dcm"])
def test_missing_empty_and_foreign_files_are_refused_by_name(tmp_path, content, says, suffix):
    path = tmp_path / f"case-9{suffix}"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadInput, match=says) as caught:
        open_slide(path)
    assert "case-9" in str(caught.value)


def test_glass_is_no_tissue_and_tissue_is(tissue):
    glass = np.full((200, 200, 3), 244, np.uint8)
    glass[:, 100:] = np.random.default_rng(0).integers(240, 248, (200, 100, 1))
    assert not tissue_mask(glass).any()
    assert not tissue_mask(np.zeros((50, 50, 3), np.uint8)).any()
    half = glass.repeat(2, 0).repeat(2, 1)
    half[:, :200] = tissue[:400, :200]
    mask = tissue_mask(half)
    assert mask[:, :195].mean() > 0.6 and mask[:, 205:].mean() < 0.01


def test_a_few_coloured_pixels_or_black_print_make_no_slide_of_a_label(tissue):
    label = np.full((512, 512, 3), 250, np.uint8)
    label[100:140, 60:400] = 10
    label[300:303, 300:303] = (250, 60, 60)
    assert not by_saturation(label).any() and by_saturation(tissue).any()


def with_glass(tissue, glass):
    """Tissue in the middle of glass of one colour."""
    image = np.full((768, 768, 3), glass, np.uint8)
    noise = np.random.default_rng(0).normal(0, 1.5, image.shape)
    image = (image + noise).clip(0, 255).astype(np.uint8)
    image[256:512, 256:512] = (tissue[:256, :256] * (np.array(glass) / 245)).clip(0, 255)
    return image


@pytest.mark.parametrize(
    "glass", [(245, 245, 245), (205, 205, 205), (245, 228, 201), (208, 245, 245)]
)
def test_tissue_is_found_on_grey_and_tinted_glass(tissue, glass):
    mask = tissue_mask(with_glass(tissue, glass), mpp=10)
    assert mask[260:508, 260:508].mean() > 0.9
    mask[240:528, 240:528] = False
    assert mask.mean() < 0.01


def test_white_where_nothing_was_scanned_is_not_the_glass(tissue):
    image = with_glass(tissue, (205, 205, 205))
    padded = np.pad(image, ((300, 300), (300, 300), (0, 0)), constant_values=255)
    mask = tissue_mask(padded, mpp=10)
    assert mask[560:808, 560:808].mean() > 0.9 and mask.mean() < 0.06


def test_pale_grey_tissue_counts_and_shading_and_borders_do_not(tissue):
    grey = tissue[:256, :256].mean(2, keepdims=True).repeat(3, 2)
    pale = with_glass(tissue, (240, 240, 240))
    pale[256:512, 256:512] = 240 - (255 - grey) * 0.3
    assert tissue_mask(pale, mpp=10)[260:508, 260:508].mean() > 0.9
    shaded = with_glass(tissue, (240, 240, 240)).astype(float)
    shaded[256:512, 256:512] = 240
    shaded[:, 384:] *= np.linspace(1, 0.85, 384)[None, :, None]
    shaded[:40] = 12
    assert tissue_mask(shaded.astype(np.uint8), mpp=10).mean() < 0.01


def test_tissue_share_counts_the_mask_in_each_box():
    mask = np.zeros((10, 20), bool)
    mask[:5, :10] = True
    boxes = np.array([[0, 0, 10, 5], [0, 0, 10, 10], [10, 5, 20, 10], [5, 0, 15, 5]], float)
    assert tissue_share(mask, boxes).tolist() == [1.0, 0.5, 0.0, 0.5]


@pytest.mark.shared
def test_the_real_slide_says_its_scale_and_its_tissue_is_found(cmu_slide):
    with Slide(cmu_slide) as slide:
        assert (slide.width, slide.height) == (2220, 2967)
        assert slide.mpp == pytest.approx(0.499) and slide.objective == 20
        grid = slide.grid(224, 0.5)
        assert 0.25 < grid.tissue < 0.5 and 40 < len(grid.coords) < grid.candidates
