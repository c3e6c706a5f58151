"""The demo: its downloads, from a local server, and the slide that it makes offline."""

import hashlib
import http.server
import io
import shutil
import threading

import numpy as np
import pytest
from PIL import Image

from histoseek.errors import BadInput, Damaged
from histoseek.index.atlas import Atlas
from histoseek.serving.slides.slide import open_slide
from histoseek.ui.cli import demo
from histoseek.ui.cli.demo import covers, fetch, make_tissue_slide, rotated_crop


@pytest.fixture
def server():
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"slide bytes")

        def log_message(self, *_):
            pass

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{running.server_port}/slide.svs"
    running.shutdown()
    running.server_close()


def test_a_download_is_checked_by_its_hash(server):
    good = hashlib.sha256(b"slide bytes").hexdigest()
    assert fetch(server, good, 11) == b"slide bytes"
    with pytest.raises(Damaged, match="wrong checksum"):
        fetch(server, "0" * 64, 11)


def test_no_connection_is_said():
    with pytest.raises(BadInput, match="check the internet connection"):
        fetch("http://127.0.0.1:9/none.svs", "0" * 64, 1)


def test_the_made_slide_has_three_levels_and_a_scale(tmp_path):
    make_tissue_slide(tmp_path / "a.tiff")
    with open_slide(tmp_path / "a.tiff") as slide:
        assert (slide.width, slide.height) == (1536, 1536) and slide.mpp == pytest.approx(0.5)
        assert len(slide._source.levels) == 3


def test_a_crop_without_turn_is_the_tile(tmp_path):
    class Straight:
        def random(self):
            return 0.9

        def uniform(self, low, high):
            return 0.0

    make_tissue_slide(tmp_path / "a.tiff")
    with open_slide(tmp_path / "a.tiff") as slide:
        crop = rotated_crop(slide, 700, 900, 224, 224, Straight())
        assert np.array_equal(crop, slide.read_tile(700, 900, 224, 224))


def test_covers_means_the_centre_is_inside():
    assert covers(0, 0, 224, 112, 112) and not covers(0, 0, 224, 113, 0)


@pytest.mark.shared
def test_the_sample_has_slides_of_two_organs(cmu_slide, tmp_path, monkeypatch, cli_json):
    """With the public slide there; the second download comes from a local server, then is missing."""
    folder = tmp_path / "demo"
    folder.mkdir()
    shutil.copy(cmu_slide, folder / "CMU-1-Small-Region.svs")
    buffer = io.BytesIO()
    with open_slide(cmu_slide) as slide:
        Image.fromarray(slide.read_tile(600, 900, 700, 700)).save(buffer, "JPEG", quality=95)
    blob = buffer.getvalue()
    monkeypatch.setattr(demo, "SKIN_URL", "http://127.0.0.1:9/skin.jpg")
    document = cli_json("demo", "--dir", folder, "--no-ui")
    assert len(document["slides"]) == 2 and document["best_hit_is_the_place"]
    monkeypatch.setattr(demo, "fetch", lambda *_: blob)
    document = cli_json("demo", "--dir", folder, "--no-ui")
    assert len(document["slides"]) == 3 and document["best_hit_is_the_place"]
    assert document["turned_by_any_angle"]["found_their_place"] >= 18
    atlas = Atlas(folder / "atlas")
    organs = {slide["name"]: slide["metadata"]["organ"] for slide in atlas.slides()}
    assert organs == {
        "CMU-1-Small-Region": "skin", "immunohistochemistry": "colon", "skin-nevus": "skin",
    }  # fmt: skip
    with open_slide(folder / "skin-nevus.tiff") as slide:
        assert slide.width == 1400 and slide.mpp == pytest.approx(0.5)
