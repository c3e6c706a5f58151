"""CZI files that OpenSlide cannot read, written by Zeiss's library and compared with what was written."""

import numpy as np
import pytest
from pylibCZIrw import czi

from histoseek.artifacts.feature_files import read_features
from histoseek.errors import BadInput, BrokenFile
from histoseek.serving.embedding.jobs import find_inputs
from histoseek.serving.embedding.pipeline import embed_jobs
from histoseek.serving.embedding.results import EmbedOptions
from histoseek.serving.encoders.open import open_encoder
from histoseek.serving.slides import czi_source
from histoseek.serving.slides.czi_source import CziSource
from histoseek.serving.slides.slide import open_slide

PLANE = {"C": 0, "T": 0, "Z": 0}


def write(path, pixels, at=(0, 0), mpp=0.5, scene=0, out=None, plane=PLANE):
    """Write RGB pixels as tiles of 256 from a corner, as one scene."""
    if out is None:
        with czi.create_czi(str(path)) as opened:
            write(path, pixels, at, mpp, scene, opened, plane)
            opened.write_metadata("made", scale_x=mpp * 1e-6, scale_y=mpp * 1e-6)
        return path
    for y in range(0, pixels.shape[0], 256):
        for x in range(0, pixels.shape[1], 256):
            part = np.ascontiguousarray(pixels[y : y + 256, x : x + 256, ::-1])
            out.write(data=part, plane=plane, location=(at[0] + x, at[1] + y), scene=scene)
    return path


@pytest.fixture(scope="module")
def whole(tissue):
    return np.concatenate([np.concatenate([tissue, tissue[:, ::-1]], 1)] * 2, 0)


@pytest.fixture(scope="module")
def slide_file(whole, tmp_path_factory):
    return write(tmp_path_factory.mktemp("czi") / "case-1.czi", whole)


def test_pixels_and_scale_are_those_that_were_written(slide_file, whole):
    with open_slide(slide_file) as slide:
        assert (slide.width, slide.height, slide.mpp, slide.mpp_from) == (1024, 1024, 0.5, "file")
        for x, y in ((0, 0), (301, 77), (800, 800)):
            assert np.array_equal(slide.read_tile(x, y, 224, 224), whole[y : y + 224, x : x + 224])
        beyond = slide.read_tile(900, 900, 224, 224)
        assert np.array_equal(beyond[:124, :124], whole[900:, 900:]) and (beyond[130:] == 255).all()
        assert slide.thumbnail(256).shape == (256, 256, 3)
        grid = slide.grid(224, 0.5)
        assert len(grid.coords) == 16


def test_scenes_become_one_slide_whose_corner_is_theirs(whole, tmp_path):
    path = tmp_path / "two.czi"
    with czi.create_czi(str(path)) as out:
        write(path, whole[:512, :512], (-300, 40), scene=0, out=out)
        write(path, whole[512:, 512:], (700, 600), scene=1, out=out)
        out.write_metadata("made", scale_x=2.5e-7, scale_y=2.5e-7)
    with open_slide(path) as slide:
        assert (slide.width, slide.height, slide.mpp) == (1512, 1072, 0.25)
        assert np.array_equal(slide.read_tile(0, 0, 224, 224), whole[:224, :224])
        assert np.array_equal(slide.read_tile(1000, 560, 224, 224), whole[512:736, 512:736])
        assert (slide.read_tile(600, 300, 224, 224) == 255).all(), "white between the scenes"


def test_it_is_embedded_like_the_same_pixels_in_a_tiff(slide_file, whole, make_slide, tmp_path):
    tiff = make_slide(tmp_path / "case-2.tiff", pixels=whole)
    given = find_inputs([str(slide_file.parent), str(tiff)], "slides", None)
    encoder = open_encoder("default")
    results = embed_jobs(given.jobs, encoder, tmp_path / "out", EmbedOptions(), lambda *_: None)
    one, two = (read_features(tmp_path / "out" / result.features) for result in results)
    assert len(one.features) > 10 and np.array_equal(one.coords, two.coords)
    assert np.abs(one.features - two.features).max() < 1e-5


def test_what_is_not_one_picture_in_rgb_is_refused(tmp_path, whole):
    several = tmp_path / "channels.czi"
    with czi.create_czi(str(several)) as out:
        for channel in range(2):
            grey = np.ascontiguousarray(whole[:256, :256, :1])
            out.write(data=grey, plane={**PLANE, "C": channel})
    with pytest.raises(BadInput, match="2 channels, Gray8; expected one image of 8-bit RGB"):
        open_slide(several)
    deep = tmp_path / "deep.czi"
    with czi.create_czi(str(deep)) as out:
        out.write(data=whole[:256, :256, :1].astype(np.uint16), plane=PLANE)
    with pytest.raises(BadInput, match="Gray16; expected one image"):
        open_slide(deep)


def test_damage_and_a_missing_scale_are_named(slide_file, whole, tmp_path):
    broken = tmp_path / "broken.czi"
    broken.write_bytes(slide_file.read_bytes()[:700])
    with pytest.raises(BrokenFile, match="broken.czi is not a readable CZI file"):
        open_slide(broken)
    without = tmp_path / "without.czi"
    with czi.create_czi(str(without)) as out:
        write(without, whole[:512, :512], out=out)
    with open_slide(without) as slide:
        assert slide.mpp is None


def test_levels_that_show_something_else_are_not_used(slide_file, monkeypatch):
    """A level of a pyramid must look like the finest level; a file without a pyramid has one level."""
    source = CziSource(slide_file)
    assert len(source.levels) == 1
    source.close()
    monkeypatch.setattr(czi_source, "_factors", lambda reader: [2])
    source = CziSource(slide_file)
    assert [down for down, _ in source.levels] == [1.0, 2.0]
    source.close()
    monkeypatch.setattr(czi_source, "ALIKE", -1.0)
    source = CziSource(slide_file)
    assert len(source.levels) == 1
    source.close()


def test_a_coarse_level_is_compared_in_little_memory(slide_file, monkeypatch):
    source, sizes = CziSource(slide_file), []
    real = source._read
    monkeypatch.setattr(
        source, "_read", lambda x, y, f, w, h: sizes.append(w * f) or real(0, 0, 1, w, h)
    )
    source._is_like_level_0(256, (4_000, 3_000))
    assert max(sizes) <= 4096
    source.close()


def test_without_the_library_the_remedy_is_named(slide_file, monkeypatch):
    monkeypatch.setattr("histoseek.serving.slides.sources.reads_czi", lambda: False)
    with pytest.raises(BadInput, match=r"dimension.*may read it: pip install 'histoseek\[czi\]'"):
        open_slide(slide_file)
