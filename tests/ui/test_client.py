"""The client of the HTTP API where the environment differs: proxies, certificates, NumPy values."""

import io
import ssl

import httpx
import numpy as np
import pytest
from PIL import Image

from histoseek.errors import BadInput, MissingPart
from histoseek.ui.api.client import Client


def test_a_socks_proxy_without_its_package_is_named(monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    with pytest.raises(MissingPart, match="SOCKS proxy"):
        Client()


def test_the_systems_certificates_are_trusted(monkeypatch):
    """A site's own authority is in the system's store, not in certifi's."""
    given = {}
    monkeypatch.setattr(httpx, "Client", lambda **options: given.update(options))
    Client("https://atlas.hospital.example")
    assert isinstance(given["verify"], ssl.SSLContext)
    assert given["verify"].verify_mode is ssl.CERT_REQUIRED and given["verify"].check_hostname


def test_one_path_is_one_image(monkeypatch, tmp_path):
    (tmp_path / "a.png").write_bytes(b"picture")
    client, sent = Client(), {}
    monkeypatch.setattr(client, "_json", lambda *_, **content: sent.update(content) or {})
    for image in (str(tmp_path / "a.png"), tmp_path / "a.png", b"picture", [tmp_path / "a.png"]):
        client.search(image)
        (file,) = sent["files"]
        assert file[0] == "images" and file[1][1] == b"picture"


def test_tiles_may_be_numpy_integers(monkeypatch):
    sent = {}
    client = Client()
    monkeypatch.setattr(client, "_post", lambda path, fields, images: sent.update(fields))
    client.search(like=np.array([1, 2]), unlike=[np.int32(3)])
    assert sent["like"] == [1, 2] and sent["unlike"] == [3]
    assert {type(number) for number in sent["like"] + sent["unlike"]} == {int}


def test_numbers_of_numpy_are_sent_and_other_types_refused(monkeypatch, tmp_path):
    client, sent = Client(), {}
    monkeypatch.setattr(client, "_json", lambda method, path, **content: sent.update(content) or {})
    (tmp_path / "a.png").write_bytes(b"pixels")
    client.search(tmp_path.glob("*.png"), k=np.int64(2), least=np.float32(0.5))
    assert sent["files"] == [("images", ("a.png", b"pixels"))]
    assert sent["data"] == {"k": 2, "least": 0.5} and type(sent["data"]["k"]) is int
    secret = io.StringIO(str(tmp_path / "a.png"))  # what a file says is no path to send
    for wrong in (Image.new("RGB", (3, 3)), 5, [None], secret, io.BytesIO(b"pixels")):
        with pytest.raises(BadInput, match="an image is of type"):
            client.search(wrong)
