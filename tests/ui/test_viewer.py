"""The slide viewer's server side: pieces of every zoom, and questions that are regions of a slide."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from histoseek.errors import BadInput
from histoseek.ui.session.regions import Region, grid_in
from histoseek.ui.session.viewer import PIECE_PX


def pixels(reply):
    assert reply.status_code == 200 and reply.headers["content-type"] == "image/jpeg"
    return np.asarray(Image.open(io.BytesIO(reply.content)).convert("RGB")).astype(float)


@pytest.fixture(scope="module")
def slide_pixels(ui_atlas):
    return np.asarray(Image.open(ui_atlas.parent / "case-1.tiff").convert("RGB")).astype(float)


def test_a_pyramid_says_what_a_viewer_needs(client):
    about = client.get("/v1/slides/case-1/pyramid").json()
    assert (about["width"], about["height"], about["piece_px"], about["max_zoom"]) == (
        1400, 1400, PIECE_PX, 3,
    )  # fmt: skip
    assert about["magnification"] == pytest.approx(10 / about["mpp"], abs=0.01)
    assert about["tile_px_level0"] > 0


def test_pieces_of_the_last_zoom_are_the_slides_pixels(client, slide_pixels):
    for x, y in ((0, 0), (2, 3), (5, 5)):
        piece = pixels(client.get(f"/v1/slides/case-1/tiles/3/{x}/{y}.jpg"))
        part = slide_pixels[y * 256 : (y + 1) * 256, x * 256 : (x + 1) * 256]
        assert piece.shape == (256, 256, 3)
        assert np.abs(piece[: part.shape[0], : part.shape[1]] - part).mean() < 6  # JPEG
        if part.shape[0] < 256:
            assert piece[part.shape[0] + 8 :].min() > 240  # beyond the slide it is white


@pytest.mark.parametrize("z", [0, 1, 2])
def test_pieces_of_coarser_zooms_show_the_same_place(z, client, slide_pixels):
    """The mean colours of a coarse piece are those of the pixels that it covers."""
    side = 256 << (3 - z)
    piece = pixels(client.get(f"/v1/slides/case-1/tiles/{z}/0/0.jpg"))
    covered = min(side, 1400)
    shown = covered * 256 // side
    expected = Image.fromarray(slide_pixels[:covered, :covered].astype(np.uint8))
    expected = np.asarray(expected.resize((shown, shown), Image.Resampling.BOX)).astype(float)
    difference = piece[:shown, :shown] - expected
    assert np.abs(difference).mean() < 12 and np.abs(difference.mean((0, 1))).max() < 2


@pytest.mark.parametrize("place", ["4/0/0", "3/6/0", "3/0/6", "0/1/0", "32/16777216/0"])
def test_pieces_that_do_not_exist_are_not_found(place, client):
    reply = client.get(f"/v1/slides/case-1/tiles/{place}.jpg")
    assert reply.status_code == 404 and "has no piece" in reply.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/slides/none/pyramid", "/v1/slides/tiles/tiles/0/0/0.jpg"])
def test_only_slides_have_pieces(path, client):
    assert client.get(path).status_code == 404


def test_a_box_finds_its_own_place_and_says_how_it_was_cut(client):
    side = client.get("/v1/slides/case-1/pyramid").json()["tile_px_level0"]
    left, top = side, 2 * side
    box = [[left, top], [left + side, top], [left + side, top + side], [left, top + side]]
    asked = {"regions": [{"slide": "case-1", "ring": box}], "k": 3}
    answer = client.post("/v1/search", json=asked).json()
    best = answer["hits"][0]
    assert (best["slide"], best["x"], best["y"]) == ("case-1", left, top) and best["score"] > 0.999
    (region,) = answer["provenance"]["examples"]["regions"]
    assert region["tiles"] == 1 and region["corners"] == [[left, top]] and region["side"] == side


def test_a_large_region_is_one_example_of_many_tiles(client):
    ring = [[0, 0], [1400, 0], [1400, 1400], [0, 1400]]
    asked = {"regions": [{"slide": "case-1", "ring": ring}], "where": "slide != 'case-1'"}
    answer = client.post("/v1/search", json=asked).json()
    (region,) = answer["provenance"]["examples"]["regions"]
    assert region["tiles"] + region["without_tissue"] >= 25 and region["not_taken"] == 0
    assert answer["hits"] and all(hit["slide"] != "case-1" for hit in answer["hits"])
    report = client.get(f"/v1/results/{answer['result']}/html")
    assert report.status_code == 200 and "case-1" in report.text


def test_a_form_takes_regions_as_json(client):
    ring = [[0, 0], [300, 0], [300, 300]]
    text = json.dumps({"slide": "case-1", "ring": ring})
    same = [
        client.post("/v1/search", files=[("regions", (None, text))], data={"k": "2"}).json(),
        client.post("/v1/search", json={"regions": [json.loads(text)], "k": 2}).json(),
    ]
    assert same[0]["hits"] == same[1]["hits"] and len(same[0]["hits"]) == 2
    bad = client.post("/v1/search", files=[("regions", (None, "{"))])
    assert bad.status_code == 422 and "regions" in bad.text


@pytest.mark.parametrize(
    ("ring", "status", "message"),
    [
        ([[0, 0], [10, 0], [20, 0]], 422, "no area"),
        ([[5000, 5000], [6000, 5000], [6000, 6000]], 422, "outside slide"),
        ([[0, 0], [1, 1]], 422, "ring"),
    ],
)
def test_bad_regions_are_refused(ring, status, message, client):
    asked = {"regions": [{"slide": "case-1", "ring": ring}]}
    reply = client.post("/v1/search", json=asked)
    assert reply.status_code == status and message in reply.text


def test_a_polygon_takes_the_tiles_whose_centre_it_contains():
    triangle = ((0.0, 0.0), (1000.0, 0.0), (0.0, 1000.0))
    corners = grid_in(triangle, 100, (2000, 2000))
    centres = corners + 50
    assert len(corners) == 45 and (centres.sum(1) < 1000).all()
    small = grid_in(((500.0, 500.0), (520.0, 500.0), (510.0, 530.0)), 100, (2000, 2000))
    assert small.tolist() == [[460, 465]]
    with pytest.raises(BadInput, match="draw a smaller one"):
        grid_in(((0.0, 0.0), (1e9, 0.0), (1e9, 1e9)), 10, (10**6, 10**6))
    clipped = grid_in(((-1e9, -1e9), (1e9, -1e9), (1e9, 1e9), (-1e9, 1e9)), 100, (400, 300))
    assert len(clipped) == 12


def test_a_region_needs_finite_corners():
    with pytest.raises(BadInput, match="not finite"):
        Region("a", ((0.0, 0.0), (float("nan"), 1.0), (2.0, 2.0)))


def unpacked(blob):
    """A layer: its header, and places (N, 2)."""
    length = int.from_bytes(blob[:4], "little")
    about = json.loads(blob[4 : 4 + length])
    places = np.frombuffer(blob[4 + length :], "<i4", 2 * about["tiles"]).reshape(-1, 2)
    return about, places


def test_the_tissue_layer_covers_the_coloured_cells(client, slide_pixels):
    about, places = unpacked(client.get("/v1/slides/case-1/grid?by=tissue").content)
    side = about["side"]
    assert side == about["step"] == 4
    ((text, _),) = about["legend"]
    height, width, _ = slide_pixels.shape
    coloured = np.ptp(slide_pixels, axis=2) > 40
    cells = coloured.reshape(height // side, side, width // side, side).mean((1, 3)) >= 0.5
    found = np.zeros_like(cells)
    found[places[:, 1] // side, places[:, 0] // side] = True
    assert cells.mean() > 0.05 and found[cells].mean() > 0.95
    mpp = client.get("/v1/slides/case-1/pyramid").json()["mpp"]
    area = found.sum() * (side * mpp / 1000) ** 2
    assert text.startswith("tissue: ") and abs(float(text.split()[1]) - area) < 0.1
    assert client.get("/v1/slides/cat/grid?by=tissue").status_code == 404


def test_the_label_layer_colours_tiles_by_their_label(client, served):
    atlas = served.session.atlas
    name = atlas.slides()[0]["name"]
    atlas.relabel([{"slide": name, "label": "tumour"}])
    blob = client.get(f"/v1/slides/{name}/grid?by=label").content
    length = int.from_bytes(blob[:4], "little")
    about = json.loads(blob[4 : 4 + length])
    colours = np.frombuffer(blob[4 + length + 8 * about["tiles"] :], np.uint8).reshape(-1, 4)
    assert [text.split(" (")[0] for text, _ in about["legend"]] == ["tumour"]
    assert (colours == colours[0]).all() and colours[0, 3] == 255
    atlas.relabel([{"slide": name, "label": ""}])
    blob = client.get(f"/v1/slides/{name}/grid?by=label").content
    assert blob[-1] == 0, "without a label a tile is transparent"
