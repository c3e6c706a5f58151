"""Query images of known scale: cut into tiles of the atlas's scale, and the part of each hit."""

import io

import numpy as np
import pytest
from PIL import Image

from histoseek.errors import BadInput
from histoseek.index.atlas import Atlas
from histoseek.ui.session.scaled import cut

MPP = 0.5


@pytest.fixture(scope="module")
def slide(ui_atlas):
    return Image.open(ui_atlas.parent / "case-1.tiff").convert("RGB")


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def ask(client, blob, **fields):
    return client.post(
        "/v1/search", files=[("images", ("crop.png", blob, "image/png"))], data=fields
    )


def test_a_crop_of_another_magnification_finds_its_place(client, slide):
    """Twice as large as the atlas's pixels, by Pillow's bicubic filter, as other programs do."""
    about = client.get("/v1/slides/case-1/pyramid").json()
    side, mpp = about["tile_px_level0"], about["mpp"]
    left, top = 2 * side, side
    crop = slide.crop((left, top, left + side, top + side)).resize((2 * side, 2 * side), 3)
    answer = ask(client, png(crop), mpp=mpp / 2, k=1).json()
    best = answer["hits"][0]
    assert (best["slide"], best["x"], best["y"]) == ("case-1", left, top) and best["score"] > 0.98
    assert answer["matches"] == [], "one tile only"
    (used,) = answer["provenance"]["examples"]["scaled_images"]
    assert used["tiles"] == 1 and used["side"] == 2 * side and used["name"] == "crop.png"


def test_a_larger_image_is_searched_by_its_tiles_and_each_hit_names_its_part(client, slide):
    about = client.get("/v1/slides/case-1/pyramid").json()
    side, mpp = about["tile_px_level0"], about["mpp"]
    box = (side, side, 4 * side, 3 * side)  # three by two tiles of the grid
    where = (
        f"slide = 'case-1' and x >= {box[0]} and x < {box[2]} and y >= {box[1]} and y < {box[3]}"
    )
    answer = ask(client, png(slide.crop(box)), mpp=mpp, k=6, where=where).json()
    (used,) = answer["provenance"]["examples"]["scaled_images"]
    assert used["tiles"] + used["without_tissue"] == 6 and used["not_taken"] == 0
    assert "crop.png at" in answer["verdict"]["text"] and len(answer["matches"]) == 6
    for hit, match in zip(answer["hits"], answer["matches"], strict=True):
        x, y, w, h = (v * s for v, s in zip(match["box"], (3 * side, 2 * side) * 2, strict=True))
        found = np.array([x + box[0], y + box[1], w, h])
        assert np.abs(found - [hit["x"], hit["y"], side, side]).max() < 2, "its own place"
    report = client.get(f"/v1/results/{answer['result']}/html").text
    assert "crop.png at" in report
    half = ask(client, png(slide.crop(box)), mpp=mpp, k=1, crop=[0, 0, 0.34, 0.5]).json()
    assert half["provenance"]["examples"]["scaled_images"][0]["tiles"] == 1


@pytest.mark.parametrize(
    ("mpp", "says"),
    [(0.05, "too small at 0.05"), (1000, "mpp"), (0, "mpp"), ("x", "mpp")],
)
def test_a_scale_that_cannot_be_is_refused(mpp, says, client, slide):
    reply = ask(client, png(slide.crop((0, 0, 300, 300))), mpp=mpp)
    assert reply.status_code == 422 and says in reply.json()["error"]["message"]


def test_tiles_without_tissue_are_left_out_and_many_are_thinned():
    rng = np.random.default_rng(0)
    pixels = np.full((2240, 4480, 3), 245, np.uint8)
    pixels[:, :2240] = rng.integers(80, 200, (2240, 2240, 3))
    image, tiles = cut(pixels, "a", None, MPP, MPP, 224)
    assert (len(tiles), image.without_tissue, image.not_taken) == (100, 100, 0)
    assert (image.boxes[:, 0] + image.boxes[:, 2] <= 0.5 + 1e-9).all()
    image, tiles = cut(pixels, "a", None, MPP, MPP / 2, 224)
    assert len(tiles) == 256 and image.not_taken == 400 - 256
    blank, tiles = cut(np.full((448, 448, 3), 245, np.uint8), "a", None, MPP, MPP, 224)
    assert len(tiles) == 4 and blank.without_tissue == 0, "there is nothing else to search for"
    small, tiles = cut(pixels[:200, :200], "a", None, MPP, MPP, 224)
    assert small.side == 200 and tiles.shape == (1, 224, 224, 3)
    with pytest.raises(BadInput, match="a tile of this atlas 112 µm"):
        cut(pixels[:100, :100], "a", None, MPP, MPP, 224)


def test_the_command_line_takes_a_scale_too(ui_atlas, slide, tmp_path, cli, cli_answers):
    side = 224
    crop = slide.crop((2 * side, side, 3 * side, 2 * side)).resize((2 * side, 2 * side), 3)
    crop.save(tmp_path / "crop.png")
    mpp = Atlas(ui_atlas).slides()[0]["mpp"]
    words = ("index", "search", ui_atlas, tmp_path / "crop.png", "-k", 1)
    ((hit,),) = cli_answers(*words, "--mpp", mpp / 2)
    assert (hit["slide"], hit["x"], hit["y"]) == ("case-1", 2 * side, side) and hit["score"] > 0.98
    said = cli(*words, "--mpp", mpp / 2, check=True).stdout
    assert "µm per pixel: 1 tile." in said
    refused = cli(*words, "--mpp", mpp / 50)
    assert refused.returncode == 1 and "is too small at" in refused.stdout


def test_too_many_images_of_known_scale_are_refused_before_they_are_cut(client, slide):
    blob = png(slide.crop((0, 0, 300, 300)))
    files = [("images", (f"{n}.png", blob, "image/png")) for n in range(9)]
    reply = client.post("/v1/search", files=files, data={"mpp": 0.5})
    assert reply.status_code == 413 and "at most 8" in reply.json()["error"]["message"]
