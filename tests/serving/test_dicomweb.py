"""Slides on a DICOMweb server: the same features as from files, and a server that fails."""

import io
import json
import re
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGBaseline8Bit, VLWholeSlideMicroscopyImageStorage

from histoseek.artifacts import dicomweb, remote
from histoseek.artifacts.dicomweb import TOKEN, TOKEN_FILE, DicomInstance, find_series
from histoseek.artifacts.feature_files import read_features
from histoseek.artifacts.images import encode_jpeg
from histoseek.errors import BadInput
from histoseek.serving.embedding.jobs import find_inputs
from histoseek.serving.embedding.results import EmbedOptions, EncoderChoice
from histoseek.serving.embedding.run import run_here
from histoseek.stopping import Stopped

TILE = 128
OPTIONS = {"min_tissue": 0, "min_sharpness": 0, "max_pen": 1, "overlays": False}
UIDS = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")


class Archive(BaseHTTPRequestHandler):
    """A DICOMweb server with files in memory; ``rules`` say how it misbehaves."""

    protocol_version = "HTTP/1.1"
    instances = []  # (dataset, bytes)
    rules = {}
    asked = Counter()

    def log_message(self, *_):
        pass

    def answer(self, body, kind, status=200, cut=0):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) - cut])
        self.close_connection = bool(cut)

    def do_GET(self):
        url = urlsplit(self.path)
        self.asked[url.path] += 1
        asked = {key: values[0] for key, values in parse_qs(url.query).items()}
        accepts = self.headers.get("Accept", "")
        token = self.rules.get("token")
        if token and self.headers.get("Authorization") != f"Bearer {token}":
            return self.answer(b"", "text/plain", 401)
        if self.asked[url.path] <= self.rules.get("fail", 0):
            return self.answer(b"busy", "text/plain", 503)
        found = re.fullmatch(
            r"/dw(?:/studies/([\d.]+))?/series(?:/([\d.]+)/instances(?:/([\d.]+))?)?", url.path
        )
        if found is None:
            return self.answer(b"<html>", "text/html", self.rules.get("unknown", 404))
        named = dict(zip(UIDS, found.groups(), strict=True))
        chosen = [
            (data, blob)
            for data, blob in self.instances
            if all(value is None or data[key].value == value for key, value in named.items())
        ]
        if named["SOPInstanceUID"]:
            wanted = 'multipart/related; type="application/dicom"'
            return (
                self.instance(chosen) if wanted in accepts else self.answer(b"", "text/plain", 406)
            )
        if accepts != "application/dicom+json":
            return self.answer(b"", "text/plain", 406)
        if named["SeriesInstanceUID"] == self.rules.get("broken", "-"):
            return self.answer(b"", "text/plain", 403)
        if named["SeriesInstanceUID"]:
            assert asked["includefield"] == "00280008,00280010,00280011"
            rows = [{"00080018": [d.SOPInstanceUID], "00280008": [d.get("NumberOfFrames", 1)],
                     "00280010": [d.Rows], "00280011": [d.Columns]} for d, _ in chosen]  # fmt: skip
        else:
            everything = self.rules.get("unfiltered")
            series = {
                d.SeriesInstanceUID: d
                for d, _ in chosen
                if everything or d.Modality == asked["Modality"]
            }
            rows = [
                {"0020000D": [d.StudyInstanceUID], "0020000E": [d.SeriesInstanceUID],
                 "00080060": [d.Modality]}
                for d in series.values()
            ]  # fmt: skip
        if named["SeriesInstanceUID"] is None:
            rows += self.rules.get("more", [])
        start = 0 if self.rules.get("no offset") else int(asked["offset"])
        if self.rules.get("no empty page") and start >= len(rows):
            return self.answer(b"", "text/plain", 404)
        most = min(int(asked["limit"]), self.rules.get("most", 100))
        most = len(rows) if self.rules.get("no limit") else most
        page = [
            {
                tag: {"vr": "UI", "Value": value} if isinstance(value, list) else value
                for tag, value in row.items()
            }
            for row in rows[start : start + most]
        ]
        return self.answer(json.dumps(page).encode(), "application/dicom+json")

    def instance(self, chosen):
        if not chosen:
            return self.answer(b"", "text/plain", 404)
        blob = self.rules.get("instead", chosen[0][1])
        if self.rules.get("plain"):
            return self.answer(blob, "application/dicom")
        mark = self.rules.get("boundary", "b0undary")
        body = (
            b"\r\n" * self.rules.get("leading", 0)
            + f"--{mark}\r\nContent-Type: application/dicom\r\nContent-Length: {len(blob)}\r\n\r\n".encode()
            + blob
            + f"\r\n--{mark}--\r\n".encode()
        )
        kind = f'Multipart/Related; type="application/dicom"; Boundary="{mark}" ; charset=x'
        first = self.asked[urlsplit(self.path).path] <= self.rules.get("cut", 0)
        return self.answer(body, kind, cut=len(blob) // 2 if first else 0)


def instance(pixels, study, series, number, mpp, modality="SM"):
    """One level of a slide as a DICOM instance: tiles of 128 pixels in JPEG."""
    height, width = pixels.shape[:2]
    frames = []
    for y in range(0, height, TILE):
        for x in range(0, width, TILE):
            tile = np.full((TILE, TILE, 3), 255, np.uint8)
            part = pixels[y : y + TILE, x : x + TILE]
            tile[: part.shape[0], : part.shape[1]] = part
            frames.append(encode_jpeg(tile))
    data = Dataset()
    data.SOPClassUID = VLWholeSlideMicroscopyImageStorage
    data.StudyInstanceUID, data.SeriesInstanceUID = study, series
    data.SOPInstanceUID = f"{series}.{number}"
    data.Modality, data.ImageType = modality, ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    data.Rows = data.Columns = TILE
    data.TotalPixelMatrixRows, data.TotalPixelMatrixColumns = height, width
    data.NumberOfFrames, data.DimensionOrganizationType = len(frames), "TILED_FULL"
    data.SamplesPerPixel, data.PlanarConfiguration = 3, 0
    data.PhotometricInterpretation = "YBR_FULL_422"
    data.BitsAllocated = data.BitsStored = 8
    data.HighBit, data.PixelRepresentation = 7, 0
    measures, shared = Dataset(), Dataset()
    measures.PixelSpacing = [mpp / 1000, mpp / 1000]
    shared.PixelMeasuresSequence = [measures]
    data.SharedFunctionalGroupsSequence = [shared]
    data.PixelData = encapsulate(frames)
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
    data["PixelData"].is_undefined_length = True
    buffer = io.BytesIO()
    data.save_as(buffer, enforce_file_format=True, implicit_vr=False, little_endian=True)
    return data, buffer.getvalue()


@pytest.fixture(scope="module")
def instances(tissue):
    """Two slides, one with two levels, and a series that is no slide."""
    one, two = tissue[:600, :500], np.ascontiguousarray(tissue[::-1][:400, :450])
    half = np.asarray(Image.fromarray(one).resize((250, 300)))
    return [
        instance(half, "1.2", "1.2.1", 2, 1.0),
        instance(one, "1.2", "1.2.1", 1, 0.5),
        instance(two, "1.3", "1.3.1", 1, 0.5),
        instance(two, "1.3", "1.3.2", 1, 0.5, "CT"),
    ]


@pytest.fixture
def archive(instances, monkeypatch):
    """The address of a fresh server, and its rules."""
    monkeypatch.setattr(remote, "WAITS_S", (0.0, 0.0))
    monkeypatch.delenv(TOKEN, raising=False)
    monkeypatch.delenv(TOKEN_FILE, raising=False)
    monkeypatch.setattr(dicomweb, "_CHUNK", 700)  # parts and boundaries fall into several pieces
    monkeypatch.setenv("NETRC", "/nonexistent")

    class Fresh(Archive):
        rules = {}
        asked = Counter()

    Fresh.instances = instances
    server = ThreadingHTTPServer(("127.0.0.1", 0), Fresh)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"dicomweb+http://127.0.0.1:{server.server_port}/dw", Fresh
    server.shutdown()
    server.server_close()


def slides_of(url):
    found = find_series(url)
    assert not found.left_out and not found.refused
    return found.slides


def embed(url, out, bundle):
    found = find_inputs([url])
    choice = EncoderChoice(str(bundle), engine="onnxruntime")
    return run_here(found.jobs, choice, out, EmbedOptions(**OPTIONS), lambda *_: None)


def test_slides_of_a_server_give_the_features_of_their_files(archive, other_bundle, tmp_path):
    url, server = archive
    ran = embed(url, tmp_path / "out", other_bundle)
    assert [result.state for result in ran.results] == ["done", "done"]
    local = tmp_path / "local"
    local.mkdir()
    for data, blob in server.instances[:3]:
        (local / f"{data.SOPInstanceUID}.dcm").write_bytes(blob)
    there = run_here(
        find_inputs([local]).jobs, EncoderChoice(str(other_bundle), engine="onnxruntime"),
        tmp_path / "there", EmbedOptions(**OPTIONS), lambda *_: None,
    )  # fmt: skip
    by_size = {r.tiles: r for r in there.results}
    assert len(by_size) == 2
    for result in ran.results:
        assert result.name in ("1.2.1", "1.3.1") and result.source.startswith(url)
        mine, its = (read_features(Path(r.features)) for r in (result, by_size[result.tiles]))
        assert np.abs(mine.features - its.features).max() < 1e-5
        assert (mine.coords == its.coords).all()
        assert mine.source == result.source
    before = server.asked.copy()
    again = embed(url, tmp_path / "out", other_bundle)
    assert [result.state for result in again.results] == ["skipped", "skipped"]
    copied = [path for path in server.asked - before if re.search("instances/.", path)]
    assert not copied  # what is done is told by the UIDs of the instances


def test_a_server_a_study_and_a_series_are_searched_page_by_page(archive):
    url, server = archive
    whole = slides_of(url)
    assert len(whole) == 2
    server.rules["most"] = 1
    assert slides_of(url + "/") == whole
    server.rules.clear()
    one = max(whole, key=lambda found: len(found.instances))
    study = one.url.rpartition("/series/")[0]
    assert one in slides_of(study) and slides_of(one.url) == [one]
    assert len(one.instances) == 2
    assert one.instances[0].size > one.instances[1].size > 0
    assert len({found.mark for found in whole}) == 2


@pytest.mark.parametrize(
    "rules",
    [
        {"fail": 1},
        {"cut": 1},
        {"plain": True},
        {"boundary": "a=b'(c)+_,-./:=?d"},
        {"leading": 1},
    ],
)
def test_an_instance_is_copied_whole(archive, tmp_path, rules):
    url, server = archive
    server.rules |= rules
    one = max(slides_of(url), key=lambda found: len(found.instances))
    for number, file in enumerate(one.instances):
        to = tmp_path / f"{number}.dcm"
        DicomInstance(file.url).fetch(to)
        (blob,) = (b for d, b in server.instances if file.url.endswith(f"/{d.SOPInstanceUID}"))
        assert to.read_bytes() == blob
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.dcm", "1.dcm"]


def test_a_token_is_sent_and_a_refusal_is_not_repeated(archive, monkeypatch):
    url, server = archive
    server.rules["token"] = "secret"
    with pytest.raises(
        BadInput, match=rf"HTTP 401 .*\${TOKEN} or .*, or name the server in ~/.netrc"
    ):
        find_series(url)
    assert sum(server.asked.values()) == 1
    monkeypatch.setenv(TOKEN, "secret")
    assert len(slides_of(url)) == 2


def test_what_a_server_cannot_give_is_said(archive, tmp_path):
    url, server = archive
    cases = (
        ("/nothing", {}, "/nothing/series does not exist; check the URL"),
        ("/nothing", {"unknown": 200}, "cannot be read after 3 attempts"),
        ("/studies/9.9", {}, "has no slides, .* expected dicomweb.https://SERVER/PATH"),
        ("/studies/9.9/series/9", {}, "has no slides"),
    )
    for path, rules, says in cases:
        server.rules.clear()
        server.rules |= rules
        with pytest.raises(BadInput, match=says):
            find_series(url + path)
    file = slides_of(url)[0].instances[0]
    for rules, says in (
        ({"instead": b"<html>no</html>"}, "what came is not a DICOM file"),
        ({"cut": 9}, "attempts"),
        ({"fail": 99}, "HTTP 503"),
    ):
        server.rules.clear()
        server.rules |= rules
        with pytest.raises(BadInput, match=says):
            DicomInstance(file.url).fetch(tmp_path / "a.dcm")
    server.rules.clear()
    with pytest.raises(BadInput, match="does not exist"):
        DicomInstance(file.url + "9").fetch(tmp_path / "a.dcm")
    with pytest.raises(BadInput, match="expected the URL of a DICOM instance"):
        DicomInstance(url)
    assert not list(tmp_path.iterdir())


def test_an_expired_token_a_token_file_and_an_open_line(archive, monkeypatch, tmp_path):
    url, server = archive
    server.rules["token"] = "new"
    monkeypatch.setenv(TOKEN, "old")
    with pytest.raises(BadInput, match="the token is wrong or expired"):
        find_series(url)
    monkeypatch.setenv(TOKEN_FILE, str(tmp_path / "token"))
    with pytest.raises(BadInput, match=f"{TOKEN_FILE} names .* cannot be read"):
        find_series(url)
    (tmp_path / "token").write_text("new\n")
    assert len(slides_of(url)) == 2
    with pytest.raises(BadInput, match="a token would be sent without encryption"):
        find_series("dicomweb+http://pacs.example/dw")
    monkeypatch.delenv(TOKEN)
    monkeypatch.delenv(TOKEN_FILE)
    (tmp_path / "netrc").write_text("machine pacs.example login bob password geheim\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(BadInput, match="a password would be sent without encryption"):
        find_series("dicomweb+http://pacs.example/dw")


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("dicomweb+https://bob:geheim@pacs/dw", "into ~/.netrc, and leave them out"),
        ("dicomweb+https://bob:ge/heim@pacs/dw", "into ~/.netrc, and leave them out"),
        ("dicomweb+https://pacs/dw/studies/1?tenant=7", "expected dicomweb.https://SERVER/PATH"),
        ("dicomweb+https://pacs/dw/studies/1/series/2/instances/3", "/series/UID for one slide"),
    ],
)
def test_a_wrong_url_is_refused_without_asking_the_server(url, says):
    with pytest.raises(BadInput, match=says) as refused:
        find_series(url)
    assert "geheim" not in str(refused.value) and "bob" not in str(refused.value)


def test_servers_that_page_or_filter_otherwise(archive, monkeypatch):
    url, server = archive
    for rules in ({"no empty page": True}, {"unfiltered": True}, {"no offset": True}):
        server.rules.clear()
        server.rules |= rules
        assert len(find_series(url).slides) == 2
    found = find_series(url)
    assert [left.path for left in found.left_out] == [
        f"{url}/series",
        *(f"{series.url}/instances" for series in found.slides),
    ]
    assert "the same objects at every offset" in found.left_out[0].reason
    server.rules["no limit"] = True
    monkeypatch.setattr(dicomweb, "PAGE", 1)
    assert len(dicomweb._Query(f"{url}/series").rows(Modality="SM")) == 2
    del server.rules["no limit"]
    with pytest.raises(BadInput, match="returns the same 1 objects again"):
        find_series(url)


def test_a_series_that_the_server_refuses_has_failed(archive, cli, tmp_path):
    url, server = archive
    server.rules["broken"] = "1.3.1"
    ended = cli("embed", url, "--out", tmp_path / "out", "--min-tissue", "0", "--json")
    assert ended.returncode == 1
    states = {row["name"]: row for row in json.loads(ended.stdout)["results"]}
    assert states["1.3.1"]["state"] == "failed" and "HTTP 403" in states["1.3.1"]["reason"]
    assert states["1.2.1"]["state"] == "done" and states["1.3.1"]["source"].endswith(
        "/series/1.3.1"
    )
    server.rules["broken"] = "-"
    again = cli("embed", url, "--out", tmp_path / "out", "--min-tissue", "0", "--json")
    assert [row["state"] for row in json.loads(again.stdout)["results"]] == ["skipped", "done"]


def test_a_name_that_is_no_uid_is_left_out(archive):
    url, server = archive
    odd = {"0020000D": ["1.9"], "0020000E": ["../../etc"]}
    server.rules["more"] = [odd, {"0020000E": "no object"}]
    found = find_series(url)
    assert len(found.slides) == 2 and len(found.left_out) == 2 and not found.refused
    assert all("which is no UID" in left.reason for left in found.left_out)


def test_odd_numbers_of_frames_change_the_expected_size_only():
    for value in ([None], ["12.0"], ["n/a"], "7", [], {"a": 1}, ["9" * 5000]):
        row = {"00080018": {"Value": ["1.2"]}, "00280008": {"Value": value}}
        assert dicomweb._bytes(row) >= 256 * 256 * 3 // 8
    assert dicomweb._bytes({"00280008": 3, "00280010": None}) == 256 * 256 * 3 // 8
    assert dicomweb._value({"00080018": {"Value": "1.2.3"}}, "00080018") == "1.2.3"


def test_a_copy_ends_when_asked_to(archive, tmp_path):
    url, _ = archive
    file = slides_of(url)[0].instances[0]
    with pytest.raises(Stopped):
        DicomInstance(file.url).fetch(tmp_path / "a.dcm", lambda: True)
    assert not list(tmp_path.iterdir())
