"""Tissue found by a network: where the mask lies, what is read, and how `embed` uses it."""

import json
import shutil

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from histoseek.artifacts.feature_files import read_features
from histoseek.artifacts.tissue_bundle import TISSUE_GRAPH
from histoseek.errors import BadInput
from histoseek.export.options import TissueExportOptions
from histoseek.export.tissue import export_tissue_onnx
from histoseek.serving.embedding import tissue_network
from histoseek.serving.embedding.tissue_network import SMALL, TissueNetwork, located, open_network
from histoseek.serving.slides.slide import open_slide
from histoseek.serving.slides.tissue import tissue_mask


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A network that takes for tissue what is less green than half: at 4 µm, in squares of 64 pixels."""
    folder = tmp_path_factory.mktemp("net")
    weight = np.array([0, -40, 0], np.float32).reshape(1, 3, 1, 1)
    graph = helper.make_graph(
        [helper.make_node("Conv", ["images", "weight", "bias"], ["map"])],
        "green",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3, 64, 64])],
        [helper.make_tensor_value_info("map", TensorProto.FLOAT, ["n", 1, 64, 64])],
        [
            numpy_helper.from_array(weight, "weight"),
            numpy_helper.from_array(np.array([20], np.float32), "bias"),
        ],
    )
    ids = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=ids, ir_version=9), folder / "net.onnx")
    options = TissueExportOptions(mpp=4, mean="0,0,0", std="1,1,1")
    export_tissue_onnx(folder / "net.onnx", folder / "bundle", options)
    return folder / "bundle"


def painted(width, height, box, colour=(200, 60, 190)):
    """A white slide with a rectangle."""
    pixels = np.full((height, width, 3), 245, np.uint8)
    left, top, right, bottom = box
    pixels[top:bottom, left:right] = colour
    return pixels


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((1500, 1100), (301, 207, 1207, 951)),  # several squares, and a part of one
        ((1500, 1100), (0, 0, 1500, 400)),  # up to three borders
        ((300, 500), (100, 90, 220, 410)),  # smaller than a square
    ],
)
def test_the_mask_lies_where_the_network_sees_tissue(bundle, make_slide, tmp_path, size, box):
    path = make_slide(tmp_path / "a.tiff", mpp=1.0, pixels=painted(*size, box))
    with open_slide(path) as slide:
        thumbnail = slide.thumbnail(600)
        mask = TissueNetwork(bundle).mask(slide, thumbnail)
        assert slide.notes == []
    assert mask.shape == thumbnail.shape[:2] and mask.dtype == bool
    scale = thumbnail.shape[1] / size[0]
    expected = np.zeros(mask.shape, bool)
    left, top, right, bottom = (round(v * scale) for v in box)
    expected[top:bottom, left:right] = True
    wrong = mask != expected
    border = 2 * (right - left + bottom - top) * max(1, 4 * scale)  # a pixel of the network's
    assert wrong.sum() <= border
    inside = expected.copy()
    inside[: top + 4], inside[bottom - 4 :] = False, False
    inside[:, : left + 4], inside[:, right - 4 :] = False, False
    assert mask[inside].all()


def test_beyond_the_slide_its_last_pixels_are_repeated(bundle, make_slide, tmp_path):
    path = make_slide(tmp_path / "a.tiff", mpp=1.0, pixels=painted(900, 700, (0, 0, 900, 700)))
    asked = []
    with open_slide(path) as slide:
        network = TissueNetwork(bundle)
        shares = network.shares
        network.shares = lambda squares: asked.append(squares.copy()) or shares(squares)
        assert network.mask(slide, slide.thumbnail()).all()
    assert len(asked) > 1 and all(
        (np.abs(s.astype(int) - (200, 60, 190)) <= 2).all() for s in asked
    )


def test_values_above_the_bundles_threshold_are_tissue(bundle, make_slide, tmp_path):
    path = make_slide(tmp_path / "a.tiff", mpp=1.0, pixels=painted(300, 300, (0, 0, 300, 300)))
    network = TissueNetwork(bundle)
    network.shares = lambda squares: np.full((len(squares), 64, 64), 0.7, np.float32)
    for threshold, expected in ((0.5, True), (0.9, False)):
        network.manifest = network.manifest.model_copy(update={"threshold": threshold})
        with open_slide(path) as slide:
            assert (network.mask(slide, slide.thumbnail()) == expected).all()


def test_squares_without_anything_are_not_read(bundle, make_slide, tmp_path, monkeypatch):
    path = make_slide(tmp_path / "a.tiff", mpp=1.0, pixels=painted(2000, 2000, (0, 0, 150, 150)))
    read = []
    with open_slide(path) as slide:
        whole = slide.read_tiles
        monkeypatch.setattr(
            slide,
            "read_tiles",
            lambda corners, *rest: read.extend(corners) or whole(corners, *rest),
        )
        mask = TissueNetwork(bundle).mask(slide, slide.thumbnail())
    assert read == [(-32, -32)] and mask[:140, :140].all() and not mask[200:].any()


def test_where_a_square_cannot_be_read_absorbance_is_used_and_said(
    bundle, make_slide, tmp_path, monkeypatch
):
    path = make_slide(tmp_path / "a.tiff", mpp=1.0, pixels=painted(700, 700, (60, 60, 640, 640)))
    with open_slide(path) as slide:
        thumbnail = slide.thumbnail()
        network = TissueNetwork(bundle)
        whole = network.mask(slide, thumbnail)
        read = slide.read_tiles
        failing = lambda corners, *rest: {  # noqa: E731
            **read(corners, *rest), **({0: BadInput("broken")} if (-32, -32) in corners else {})
        }  # fmt: skip
        monkeypatch.setattr(slide, "read_tiles", failing)
        mask = network.mask(slide, thumbnail)
        (note,) = slide.notes
    assert "1 of 16 squares" in note and "could not be read" in note and "absorbance" in note
    absorbs = tissue_mask(thumbnail, 1.0)
    assert (mask[:192, :192] == absorbs[:192, :192]).all()
    assert (mask[192:, 192:] == whole[192:, 192:]).all()


def test_a_slide_finer_and_one_coarser_than_the_network(bundle, make_slide, tmp_path):
    for mpp in (0.25, 6.0):
        pixels = painted(900, 700, (200, 150, 700, 500))
        path = make_slide(tmp_path / f"{mpp}.tiff", mpp=mpp, pixels=pixels)
        with open_slide(path) as slide:
            mask = TissueNetwork(bundle).mask(slide, slide.thumbnail())
        assert mask[180:470, 230:670].all()
        assert not mask[:120].any() and not mask[:, :170].any() and not mask[530:].any()


def test_a_slide_too_coarse_for_the_network_is_said(bundle, make_slide, tmp_path):
    path = make_slide(tmp_path / "a.tiff", mpp=17.0, pixels=painted(400, 300, (50, 50, 300, 200)))
    with open_slide(path) as slide:
        thumbnail = slide.thumbnail()
        mask = TissueNetwork(bundle).mask(slide, thumbnail)
        (note,) = slide.notes
    assert "17 µm per pixel, too coarse" in note and (mask == tissue_mask(thumbnail, 17.0)).all()


def test_a_slide_with_too_many_or_too_large_squares_is_refused(
    bundle, make_slide, tmp_path, monkeypatch
):
    path = make_slide(tmp_path / "a.tiff", mpp=1.0, pixels=painted(700, 700, (60, 60, 640, 640)))
    with open_slide(path) as slide:
        for name, value in (("LARGEST_PX", 255), ("MOST", 15)):
            with monkeypatch.context() as patch, pytest.raises(BadInput, match="as a pyramid"):
                patch.setattr(tissue_network, name, value)
                TissueNetwork(bundle).mask(slide, slide.thumbnail())


def test_what_the_network_could_not_read_is_in_the_result(
    bundle, make_slide, other_bundle, tmp_path, cli_json
):
    slide = make_slide(tmp_path / "a.tiff", mpp=17.0, pixels=painted(400, 300, (50, 50, 300, 200)))
    words = ["embed", slide, "--out", tmp_path / "out", "--encoder", other_bundle, "--mpp", 17]
    (result,) = cli_json(*words, "--tissue-model", bundle)["results"]
    assert any("too coarse for the tissue network" in note for note in result["notes"])


def test_embed_uses_the_network_and_embeds_again_with_another(
    bundle, make_slide, tissue, other_bundle, tmp_path, cli_json
):
    pixels = np.full((768, 768, 3), 245, np.uint8)
    pixels[:384] = np.asarray(tissue)[:384, :384].repeat(2, 1)  # tissue
    pixels[384:] = (90, 200, 230)  # cyan: it absorbs red light, and the network calls it glass
    slide = make_slide(tmp_path / "a.tiff", pixels=pixels)
    words = [
        "embed",
        slide,
        "--out",
        tmp_path / "out",
        "--encoder",
        other_bundle,
        "--min-sharpness",
        0,
    ]
    words += ["--max-pen", 1, "--min-tissue", 0.5]
    rows = []
    for model in ("absorbance", bundle, bundle):
        ran = cli_json(*words, "--tissue-model", model)
        (result,) = ran["results"]
        (path,) = (tmp_path / "out").rglob("a.h5")
        rows.append((result["state"], read_features(path).coords[:, 1].max()))
    assert [state for state, _ in rows] == ["done", "done", "skipped"]
    assert rows[0][1] >= 384 and rows[1][1] < 384
    found_by = read_features(path).about["key"]["quality"][2]
    assert found_by == open_network(str(bundle)).method
    changed = tmp_path / "changed"
    shutil.copytree(bundle, changed)
    manifest = json.loads((changed / "manifest.json").read_text())
    (changed / "manifest.json").write_text(json.dumps({**manifest, "threshold": 0.9}))
    (result,) = cli_json(*words, "--tissue-model", changed)["results"]
    assert result["state"] == "done"  # another threshold is another network


@pytest.mark.parametrize("model", ["nothing-here", "folder"])
def test_a_name_that_is_no_network_is_refused_before_anything_is_read(
    make_slide, tmp_path, cli_json, model
):
    (tmp_path / "folder").mkdir()
    given = tmp_path / model
    slide = make_slide(tmp_path / "a.tiff")
    failed = cli_json("embed", slide, "--out", tmp_path / "out", "--tissue-model", given, expect=1)[
        "error"
    ]["message"]
    assert str(given) in failed and not (tmp_path / "out").exists()
    says = "expected absorbance, small, or the folder" if model != "folder" else "tissue export"
    assert says in failed


def test_the_names_and_a_changed_graph(bundle, tmp_path):
    assert open_network("absorbance") is None
    assert [located(name) for name in ("absorbance", SMALL, "s3://b/net")] == [
        "absorbance",
        SMALL,
        "s3://b/net",
    ]
    assert located(str(bundle)) == str(bundle.resolve())
    assert open_network(str(bundle)) is open_network(str(bundle))  # loaded once
    assert open_network(str(bundle)).method.startswith("bundle ")
    small = open_network(SMALL)
    assert small.manifest.name == "histoseek-tissue-small"
    assert (tissue_network.SMALL_BUNDLE / TISSUE_GRAPH).stat().st_size < 1_000_000


def test_glass_white_and_black_are_empty_and_even_tissue_is_not():
    thumbnail = np.full((60, 60, 3), 235, np.uint8)
    thumbnail[:10], thumbnail[10:15] = 255, 0
    thumbnail[30:40] = (225, 200, 222)
    empty = tissue_network._empty(thumbnail)
    assert empty[:30].all() and empty[40:].all() and not empty[30:40].any()
