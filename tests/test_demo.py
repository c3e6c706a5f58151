"""The demo: its download, from a local server, and the slide that it makes offline."""

import hashlib
import http.server
import threading

import numpy as np
import pytest

from histoseek.errors import BadInput, Damaged
from histoseek.serving.slides.slide import open_slide
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
