"""OME-Zarr slides, of NGFF 0.4 and 0.5: read as they were written, embedded as from a TIFF, or refused."""

import json
import shutil

import numpy as np
import pytest
import zarr
from PIL import Image

from histoseek.artifacts.feature_files import read_features
from histoseek.artifacts.files import content_mark
from histoseek.errors import BadInput, BrokenFile
from histoseek.serving.embedding.jobs import find_inputs
from histoseek.serving.embedding.pipeline import embed_jobs
from histoseek.serving.embedding.results import EmbedOptions
from histoseek.serving.encoders.open import open_encoder
from histoseek.serving.slides.slide import open_slide

AXES = [{"name": "c", "type": "channel"}, *(
    {"name": axis, "type": "space", "unit": "micrometer"} for axis in "yx"
)]  # fmt: skip


def write(path, pixels, mpp=0.5, levels=3, version="0.4", axes=AXES):
    """Write a pyramid as the specification says: 0.4 with zarr's format 2, 0.5 with format 3."""
    form = 2 if version == "0.4" else 3
    group = zarr.open_group(str(path), mode="w", zarr_format=form)
    datasets = []
    for number in range(levels):
        size = pixels.shape[1] >> number, pixels.shape[0] >> number
        level = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BOX))
        data = np.ascontiguousarray(level.transpose(2, 0, 1))
        sizes = dict(zip("cyx", data.shape, strict=True))
        data = data.reshape([sizes.get(axis["name"], 1) for axis in axes])
        chunks = (1,) * (len(axes) - 2) + (256, 256)
        separator = {"dimension_separator": "/"} if form == 2 else {}
        array = group.create_array(
            str(number), shape=data.shape, chunks=chunks, dtype="uint8",
            **({"chunk_key_encoding": {"name": "v2", "separator": "/"}} if separator else {}),
        )  # fmt: skip
        array[...] = data
        scale = [1.0] * (len(axes) - 2) + [mpp * 2**number] * 2
        datasets.append(
            {"path": str(number), "coordinateTransformations": [{"type": "scale", "scale": scale}]}
        )
    image = {"multiscales": [{"version": version, "axes": axes, "datasets": datasets}]}
    group.attrs.update(image if version == "0.4" else {"ome": {"version": version, **image}})
    return path


@pytest.fixture(scope="module")
def whole(tissue):
    return np.concatenate([np.concatenate([tissue, tissue[:, ::-1]], 1)] * 2, 0)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_pixels_levels_and_scale_are_those_that_were_written(whole, tmp_path, version):
    time = {"name": "t", "type": "time"}
    depth = {"name": "z", "type": "space", "unit": "micrometer"}
    path = write(
        tmp_path / "a.ome.zarr", whole, version=version, axes=[time, AXES[0], depth, *AXES[1:]][:5]
    )
    with open_slide(path) as slide:
        assert (slide.width, slide.height, slide.mpp, slide.mpp_from) == (1024, 1024, 0.5, "file")
        tiles = np.empty((3, 224, 224, 3), np.uint8)
        corners = [(0, 0), (301, 77), (800, 800)]
        assert slide.read_tiles(corners, 224, tiles) == {}
        for tile, (x, y) in zip(tiles, corners, strict=True):
            assert np.array_equal(tile, whole[y : y + 224, x : x + 224])
        beyond = slide.read_tile(900, -20, 224, 224)
        assert (
            np.array_equal(beyond[20:, :124], whole[:204, 900:]) and (beyond[:, 124:] == 255).all()
        )
        assert slide.level_for(448, 224) == (1, 224)
        half = np.asarray(Image.fromarray(whole).resize((512, 512), Image.Resampling.BOX))
        assert np.array_equal(slide.read_tile(200, 400, 448, 224), half[200:424, 100:324])


def test_it_is_found_in_a_folder_and_embedded_like_a_tiff(whole, make_slide, tmp_path):
    folder = tmp_path / "slides"
    folder.mkdir()
    write(folder / "case-1.ome.zarr", whole)
    make_slide(folder / "case-2.tiff", pixels=whole)
    (folder / "other.zarr").mkdir()
    given = find_inputs([str(folder)], "auto", None)
    assert [(job.name, job.kind) for job in given.jobs] == [
        ("case-1.ome", "slide"),
        ("case-2", "slide"),
    ]
    assert [left.path for left in given.left_out] == [str(folder / "other.zarr")]
    encoder, options = open_encoder("default"), EmbedOptions()
    results = embed_jobs(given.jobs, encoder, tmp_path / "out", options, lambda *_: None)
    one, two = (read_features(tmp_path / "out" / result.features) for result in results)
    assert len(one.features) > 10 and np.array_equal(one.coords, two.coords)
    assert np.abs(one.features - two.features).max() < 1e-5
    again = find_inputs([str(folder / "case-1.ome.zarr")], "auto", None)
    (result,) = embed_jobs(again.jobs, encoder, tmp_path / "out", options, lambda *_: None)
    assert result.state == "skipped"


def test_several_images_are_numbered(whole, tmp_path):
    """As bioformats2raw writes a slide with its label: folders 0, 1, …"""
    path = tmp_path / "raw.zarr"
    group = zarr.open_group(str(path), mode="w", zarr_format=2)
    group.attrs["bioformats2raw.layout"] = 3
    write(path / "0", whole)
    write(path / "1", whole[:256, :256], levels=1)
    with open_slide(path) as slide:
        assert slide.width == 1024
    with open_slide(path, series=1) as slide:
        assert slide.width == 256
    with pytest.raises(BrokenFile, match="choose an image with --series"):
        open_slide(path, series=7)


def test_other_pixels_damage_and_plain_folders_are_refused(whole, tmp_path):
    path = write(tmp_path / "a.zarr", whole)
    document = json.loads((path / ".zattrs").read_text())
    document["multiscales"][0]["axes"][0]["name"] = "z"
    (path / ".zattrs").write_text(json.dumps(document))
    with pytest.raises(BadInput, match="3 of axis z|axes zyx"):
        open_slide(path)
    broken = write(tmp_path / "b.zarr", whole, levels=1)
    for chunk in (broken / "0").rglob("[0-9]*"):
        if chunk.is_file():
            chunk.write_bytes(b"damaged")
    with open_slide(broken) as slide, pytest.raises(BadInput, match="x=0, y=0 cannot be read"):
        slide.read_tile(0, 0, 224, 224)
    (tmp_path / "plain").mkdir()
    with pytest.raises(BadInput, match="is not a readable OME-Zarr image"):
        open_slide(tmp_path / "plain")


def test_the_mark_follows_the_content_and_not_the_place(whole, tmp_path):
    one = write(tmp_path / "a.zarr", whole)
    other = write(tmp_path / "b.zarr", whole[::-1].copy())
    moved = shutil.copytree(one, tmp_path / "c.zarr")
    assert content_mark(one) == content_mark(moved) != content_mark(other)


def test_a_scale_without_unit_is_unknown(whole, tmp_path):
    axes = [AXES[0], *({"name": axis, "type": "space"} for axis in "yx")]
    with open_slide(write(tmp_path / "a.zarr", whole, axes=axes)) as slide:
        assert slide.mpp is None
