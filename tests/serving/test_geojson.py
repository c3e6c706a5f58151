"""Regions read from QuPath's GeoJSON, tissue and tiles written to it, and the overlay of each slide."""

import json

import numpy as np
import pytest
from PIL import Image

from histoseek.artifacts.feature_files import read_features
from histoseek.errors import BadInput
from histoseek.serving.embedding.jobs import find_jobs
from histoseek.serving.embedding.pipeline import embed_jobs
from histoseek.serving.embedding.results import EmbedOptions
from histoseek.serving.encoders.open import open_encoder
from histoseek.serving.slides.geojson import draw_mask, outlines, read_annotations


def square(x, y, side):
    return [[x, y], [x + side, y], [x + side, y + side], [x, y + side], [x, y]]


def feature(rings, name="Tumor", kind="Polygon"):
    properties = {"objectType": "annotation", "classification": {"name": name, "color": [1, 2, 3]}}
    return {
        "type": "Feature",
        "geometry": {"type": kind, "coordinates": rings},
        "properties": properties,
    }


def write(path, features):
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return path


def embed(slide, out, **options):
    encoder = open_encoder("default")
    (result,) = embed_jobs(
        find_jobs([slide]), encoder, out, EmbedOptions(**options), lambda *_: None
    )
    return result


def test_only_the_regions_are_embedded(make_slide, tmp_path):
    slide = make_slide(tmp_path / "case.tiff", side=1200)
    regions = write(tmp_path / "r.geojson", [feature([square(224, 224, 448)])])
    result = embed(slide, tmp_path / "out", regions=regions, min_tissue=0.9)
    assert result.state == "done" and result.tiles == 4
    found = read_features(tmp_path / result.features)
    assert sorted(map(tuple, found.coords.tolist())) == [
        (224, 224), (224, 448), (448, 224), (448, 448),
    ]  # fmt: skip
    again = embed(slide, tmp_path / "out", regions=regions, min_tissue=0.9)
    assert again.state == "skipped"
    write(regions, [feature([square(0, 0, 224)])])  # other regions are another question
    assert embed(slide, tmp_path / "out", regions=regions, min_tissue=0.9).tiles == 1


def test_a_folder_of_regions_goes_by_slide_and_class(make_slide, tmp_path):
    slide = make_slide(tmp_path / "case.tiff", side=1200)
    (tmp_path / "regions").mkdir()
    write(
        tmp_path / "regions/case.geojson",
        [feature([square(0, 0, 224)]), feature([square(448, 448, 448)], "Stroma")],
    )
    options = {"regions": tmp_path / "regions", "min_tissue": 0.9}
    assert embed(slide, tmp_path / "a", **options).tiles == 5
    assert embed(slide, tmp_path / "b", region_classes=("Tumor",), **options).tiles == 1
    failed = embed(slide, tmp_path / "c", region_classes=("Necrosis",), **options)
    assert failed.state == "failed" and "classes in it: Stroma, Tumor" in failed.reason
    other = make_slide(tmp_path / "other.tiff", side=600)
    missing = embed(other, tmp_path / "d", **options)
    assert missing.state == "failed" and "other.geojson" in missing.reason


def test_holes_several_parts_and_bare_geometries_are_read(tmp_path):
    multi = [[square(0, 0, 100), square(20, 20, 60)], [square(200, 0, 50)]]
    path = tmp_path / "a.geojson"
    path.write_text(json.dumps([feature(multi, kind="MultiPolygon")]))
    mask = draw_mask(read_annotations(path), (300, 120), 1.0)
    assert mask[10, 10] and not mask[50, 50] and mask[25, 225] and not mask[25, 150]
    path.write_text(json.dumps({"type": "Polygon", "coordinates": [square(0, 0, 10)]}))
    assert len(read_annotations(path)) == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not JSON .*; expected GeoJSON"), ("[]", "no polygon"),
        ('{"type": "FeatureCollection"}', "no polygon"),
        (json.dumps(feature([[[0, 0], [1, 1]]])), "three points"),
        (json.dumps(feature([[[0, 0], [1, "x"], [2, 2]]])), "cannot be read"),
        (json.dumps(feature([7])), "cannot be read"),
        (json.dumps(feature([[[0, 0], [1e999, 1], [2, 2]]])), "finite"),
        (json.dumps(feature([1, 2], kind="Point")), "no polygon"),
        (json.dumps({"type": "Feature", "geometry": None, "properties": []}), "no polygon"),
    ],
)  # fmt: skip
def test_what_is_no_region_is_refused_with_its_reason(tmp_path, text, says):
    path = tmp_path / "bad.geojson"
    path.write_text(text)
    with pytest.raises(BadInput, match=says) as caught:
        read_annotations(path)
    assert "bad.geojson" in str(caught.value)


def test_outlines_and_masks_are_each_others_inverse():
    mask = np.zeros((60, 80), bool)
    mask[5:50, 5:40] = True
    mask[15:25, 15:25] = False  # a hole
    mask[0:20, 60:80] = True  # at the border
    polygons = outlines(mask, 8.0)
    assert sorted(len(rings) for rings in polygons) == [1, 2]
    again = draw_mask(polygons, (80, 60), 8.0)
    assert (again != mask).mean() < 0.05


def test_tissue_tiles_and_a_picture_are_written_for_qupath(make_slide, tmp_path):
    slide = make_slide(tmp_path / "case.tiff", side=1200)
    result = embed(slide, tmp_path / "out", geojson=True)
    found = read_features(tmp_path / result.features)
    tiles = json.loads((tmp_path / "out/geojson/case.tiles.geojson").read_text())["features"]
    assert len(tiles) == result.tiles
    corners = [tuple(t["geometry"]["coordinates"][0][0]) for t in tiles]
    assert corners == [tuple(xy) for xy in found.coords.tolist()]
    assert tiles[0]["properties"]["objectType"] == "tile"
    tissue = read_annotations(tmp_path / "out/geojson/case.tissue.geojson", ["Tissue"])
    share = draw_mask(tissue, (300, 300), 4.0).mean()
    assert share == pytest.approx(result.tissue, abs=0.05)
    picture = Image.open(tmp_path / "out/overlays/case.jpg")
    assert max(picture.size) >= 1000
    plain = Image.open(slide).resize((1024, 1024)).convert("RGB")
    marked = np.asarray(picture.convert("RGB"))[:1024].astype(int)
    bluer = (marked - np.asarray(plain))[..., 2] - (marked - np.asarray(plain))[..., 0]
    assert (bluer > 10).mean() > 0.3  # the tint of the tiles
    embed(slide, tmp_path / "plain", overlays=False)
    assert not (tmp_path / "plain/overlays").exists()
