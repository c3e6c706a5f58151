"""The HTTP API, called in the process that serves it."""

import base64
import io
import json
import struct
import time

import numpy as np
import pytest
from PIL import Image

from histoseek.ui.session import answers


def form(*files, field="images"):
    return [(field, (f.name, f.read_bytes(), "image/png")) for f in files]


def said(answer):
    return answer.json()["error"]["message"]


def test_health_ready_and_info(client, served):
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json() == {"status": "ready"}
    info = client.get("/info").json()
    assert info["encoder"]["sha256"] == served.session.atlas.manifest.sha256
    assert info["tiles"] == served.session.atlas.stats()["tiles"] and info["atlas"] == "atlas"
    assert "/" not in info["atlas"], "where the atlas lies is nobody's business"


def test_embeddings_are_those_of_the_encoder(client, served, tile_folder):
    files = [tile_folder / "cat/00.png", tile_folder / "retina/00.png"]
    wanted = served.session.encoder.embed(np.stack([served.session.read(f, f.name) for f in files]))
    answer = client.post("/v1/embeddings", files=form(*files)).json()
    assert np.allclose(answer["embeddings"], wanted, atol=1e-5)
    texts = [base64.b64encode(f.read_bytes()).decode() for f in files]
    texts[1] = "data:image/png;base64," + texts[1]
    again = client.post("/v1/embeddings", json={"images": texts}).json()
    assert np.allclose(again["embeddings"], wanted, atol=1e-5)
    assert again["encoder"]["dim"] == wanted.shape[1]


def test_search_by_form_and_by_json_is_the_same(client, tile_folder):
    file = tile_folder / "cat/00.png"
    fields = {"k": "4", "where": "label = 'cat'", "per_slide": "false"}
    one = client.post("/v1/search", files=form(file), data=fields)
    assert one.status_code == 200, one.text
    text = base64.b64encode(file.read_bytes()).decode()
    body = {"images": [text], "k": 4, "where": "label = 'cat'"}
    two = client.post("/v1/search", json=body).json()
    assert one.json()["hits"] == two["hits"] and len(two["hits"]) == 4
    assert {h["label"] for h in two["hits"]} == {"cat"}
    assert two["verdict"]["labels"] == [{"label": "cat", "hits": 4}]
    assert two["verdict"]["foreign"] is False
    found = client.get(f"/v1/results/{two['result']}/json").json()
    assert found["hits"] == two["hits"]
    assert client.get(f"/v1/results/{two['result']}/csv").text.startswith("rank,score,tile")
    assert (
        "attachment"
        in client.get(f"/v1/results/{two['result']}/html").headers["content-disposition"]
    )


def test_search_by_crop_and_tiles(client, tmp_path, tile_folder):
    cat = Image.open(tile_folder / "cat/00.png")
    wide = Image.new("RGB", (480, 120), "white")
    wide.paste(cat, (360, 0))
    wide.save(tmp_path / "wide.png")
    data = {"crop": ["0.75", "0", "0.25", "1"], "k": "1"}
    best = client.post("/v1/search", files=form(tmp_path / "wide.png"), data=data).json()["hits"][0]
    assert best["label"] == "cat" and best["score"] > 0.999
    like = client.post("/v1/search", json={"like": [best["tile"]], "k": 3}).json()
    assert best["tile"] not in {h["tile"] for h in like["hits"]} and len(like["hits"]) == 3
    both = {"like": [best["tile"]], "unlike": [like["hits"][0]["tile"]], "k": 3}
    assert client.post("/v1/search", json=both).status_code == 200


def test_assign_names_and_refuses(client, tile_folder, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"bad")
    files = form(tile_folder / "cat/00.png", tmp_path / "bad.png")
    answer = client.post("/v1/assign", files=files, data={"clustering": "kmeans"}).json()
    assert [i["image"] for i in answer["images"]] == ["00.png"]
    assert answer["images"][0]["nearest"]["label"] == "cat"
    assert answer["images"][0]["foreign"] is False
    assert answer["refused"][0]["name"] == "bad.png"
    assert client.get(f"/v1/results/{answer['result']}/csv").status_code == 200
    heat = client.get(f"/v1/slides/case-1/heat.jpg?result={answer['result']}")
    assert heat.status_code == 422 and "is not a search" in said(heat)


def test_tiles_and_pictures(client):
    tile = client.get("/v1/tiles/3").json()
    assert tile["tile"] == 3
    for name in ("/v1/tiles/3.jpg", "/v1/tiles/3/field.jpg", "/v1/tiles/3/place.jpg",
                 "/v1/slides/case-1/thumbnail.jpg", "/v1/slides/case-1/clusters.jpg"):  # fmt: skip
        answer = client.get(name)
        assert answer.headers["content-type"] == "image/jpeg", name
        Image.open(io.BytesIO(answer.content)).load()
    found = client.post("/v1/search", json={"like": [3]}).json()
    assert client.get(f"/v1/slides/case-1/heat.jpg?result={found['result']}").status_code == 200


def test_the_map_is_what_its_description_says(client, served):
    deadline = time.monotonic() + 60
    while (answer := client.get("/v1/map?by=label")).status_code == 202:
        assert answer.headers["retry-after"] and time.monotonic() < deadline
        time.sleep(0.1)
    blob = answer.content
    (length,) = struct.unpack_from("<I", blob)
    about = json.loads(blob[4 : 4 + length])
    assert (4 + length) % 8 == 0
    count, start = about["shown"], 4 + length
    assert count == about["total"] == about["inside"] == served.session.atlas.stats()["tiles"]
    ids = np.concatenate([np.arange(first, first + n) for first, n in about["runs"]])
    places = np.frombuffer(blob, "<u2", 2 * count, start).reshape(-1, 2)
    codes = np.frombuffer(blob, "<u1", count, start + 4 * count)
    assert about["code_bytes"] == 1 and len(blob) == start + 5 * count and len(ids) == count
    for row in (0, count // 2, count - 1):
        tile = client.get(f"/v1/tiles/{int(ids[row])}").json()
        assert (about["names"][codes[row] - 1] if codes[row] else None) == tile["label"]
    blob = client.get("/v1/map?by=label&places=false").content
    assert np.frombuffer(blob[-count:], "<u1").tolist() == codes.tolist()

    left, bottom = np.median(places, axis=0).astype(int).tolist()
    blob = client.get(f"/v1/map?by=label&box={left},{bottom},65535,65535").content
    (length,) = struct.unpack_from("<I", blob)
    about = json.loads(blob[4 : 4 + length])
    inside = (places >= (left, bottom)).all(axis=1)
    assert about["shown"] == about["inside"] == inside.sum() and about["total"] == count
    if about["runs"] is None:
        found = np.frombuffer(blob, "<f8", about["shown"], 4 + length)
    else:
        found = np.concatenate([np.arange(first, first + n) for first, n in about["runs"]])
    assert found.tolist() == ids[inside].tolist()


def test_slides_are_listed_and_compared(client):
    assert [s["name"] for s in client.get("/v1/slides").json()["slides"]] == [
        "case-1",
        "case-2",
        "kinds",
    ]
    some = client.get("/v1/slides?contains=CASE&limit=1&offset=1").json()
    assert some["total"] == 2 and some["slides"][0]["metadata"] == {"organ": "lung", "stain": "IHC"}
    assert client.get("/v1/slides/case-1").json()["patient"] == "P1"
    like = client.get("/v1/slides/case-1/similar?k=2").json()["slides"]
    assert like[0]["name"] == "case-2" and like[0]["regions"][0]["query"] is not None
    cases = client.get("/v1/slides/P1/similar?by=patient&how=votes").json()["slides"]
    assert "P1" not in {s["name"] for s in cases}


def test_clusters_are_named(serve, own_atlas):
    one = serve(own_atlas)
    body = {"name": "glands", "description": "round", "clustering": "kmeans"}
    changed = one.client.put("/v1/clusters/2", json=body).json()
    assert changed["clusters"][0]["name"] == "glands"
    named = {
        c["cluster"]: c for c in one.client.get("/v1/clusters?clustering=kmeans").json()["clusters"]
    }
    assert named[2]["description"] == "round" and len(named) == 4 and len(named[0]["examples"]) == 6
    assert one.client.put("/v1/clusters/9", json=body).status_code == 422
    assert one.client.put("/v1/clusters/2", json={"nome": "x"}).status_code == 422


BAD = [
    ("get", "/v1/tiles/999999", {}, 404, "no tile 999999"),
    ("get", "/v1/tiles/999999.jpg", {}, 404, "no tile 999999"),
    ("get", "/v1/tiles/x", {}, 422, "tile"),
    ("get", "/v1/slides/none", {}, 404, "no slide 'none'"),
    ("get", "/v1/slides/none/thumbnail.jpg", {}, 404, "no slide"),
    ("get", "/v1/slides/kinds/clusters.jpg", {}, 404, "ready tiles"),
    ("get", "/v1/slides/none/similar", {}, 404, "unknown slide"),
    ("get", "/v1/results/none/csv", {}, 404, "search again"),
    ("get", "/v1/results/none/exe", {}, 422, "kind"),
    ("get", "/v1/jobs/77", {}, 404, "no job"),
    ("get", "/v1/map?by=nothing", {}, 404, "no column"),
    ("get", "/v1/map?box=1,2,3", {}, 422, "box"),
    ("get", "/v1/map?box=9,0,3,7", {}, 422, "is empty"),
    ("get", "/v1/nothing", {}, 404, "/docs lists all paths"),
    ("post", "/health", {}, 405, "expected GET"),
    ("trace", "/v1/search", {}, 405, "expected POST"),
    ("get", "/v1/clusters?clustering=x", {}, 404, "unknown clustering"),
    ("delete", "/v1/slides/none", {}, 404, "no slide"),
    ("post", "/v1/tiles/3", {}, 405, "expected GET"),
    ("post", "/v1/search", {"json": {}}, 422, "nothing to search for"),
    ("post", "/v1/search", {"json": {"like": [1], "k": 0}}, 422, "k: "),
    ("post", "/v1/search", {"json": {"like": [1], "kk": 5}}, 422, "kk: "),
    ("post", "/v1/search", {"json": {"like": [10**30]}}, 422, "like.0"),
    ("post", "/v1/search", {"json": {"like": [1], "where": "x ="}}, 422, "filter"),
    ("post", "/v1/search", {"json": {"like": [1], "where": "drop = 1"}}, 422, "drop"),
    ("post", "/v1/search", {"json": {"images": ["%%%"]}}, 422, "base64"),
    ("post", "/v1/search", {"content": b"{", "headers": {"content-type": "application/json"}}, 422, "JSON"),
    ("post", "/v1/search", {"content": b"x", "headers": {"content-type": "text/xml"}}, 415, "text/xml"),
    ("post", "/v1/search",
     {"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 422, "form"),
    ("post", "/v1/assign", {"json": {"images": []}}, 422, "at least 1"),
    ("post", "/v1/embeddings",
     {"files": [("images", ("a.svg", b"<svg/>", "image/svg+xml"))]}, 415, "a.svg"),
    ("post", "/v1/embeddings", {"files": [("other", ("a.png", b"x", "image/png"))]}, 422, "other"),
    ("post", "/v1/slides", {"json": {"path": "/etc/passwd"}}, 404, "passwd is not in a folder"),
]  # fmt: skip


@pytest.mark.parametrize("method, path, options, status, says", BAD)
def test_what_is_wrong_is_said(client, method, path, options, status, says):
    answer = client.request(method.upper(), path, **options)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert says in error["message"], error
    assert error["request_id"] == answer.headers["x-request-id"] and error["code"]


def test_large_and_strange_pictures_have_their_own_answers(client):
    deep = io.BytesIO()
    Image.fromarray(np.zeros((64, 64), np.uint16)).save(deep, "PNG")
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
    for blob, status in ((deep, 415), (bomb, 413)):
        answer = client.post(
            "/v1/embeddings", files=[("images", ("a.png", blob.getvalue(), "image/png"))]
        )
        assert answer.status_code == status, answer.text
    many = [("images", ("a.png", b"x", "image/png"))] * (answers.MAX_IMAGES + 1)
    assert client.post("/v1/embeddings", files=many).status_code in {413, 422}
    many = {"like": list(range(answers.MAX_EXAMPLES + 1))}
    assert client.post("/v1/search", json=many).status_code == 422


def test_a_full_encoder_says_when_to_come_back(client, served, monkeypatch, tile_folder):
    from histoseek.errors import Busy

    def full(*_, **__):
        raise Busy("256 images wait for the encoder already")

    monkeypatch.setattr(served.session.batching, "embed", full)
    answer = client.post("/v1/search", files=form(tile_folder / "cat/00.png"))
    assert answer.status_code == 429 and answer.headers["retry-after"]
    assert client.get("/ready").status_code == 503 and client.get("/health").status_code == 200


def test_a_writer_elsewhere_is_waited_for_by_the_caller(serve, own_atlas):
    one = serve(own_atlas)
    with one.session.atlas.writing():
        answer = one.client.delete("/v1/slides/case-1")
    assert answer.status_code == 429 and "another process" in said(answer)
    assert one.client.get("/v1/slides/case-1").status_code == 200


def test_a_fault_of_ours_tells_nothing(client, served, monkeypatch, caplog):
    def broken():
        raise RuntimeError("/secret/path")

    monkeypatch.setattr(served.session.atlas, "slides", broken)
    answer = client.get("/v1/slides")
    assert answer.status_code == 500 and "secret" not in answer.text
    assert answer.headers["x-request-id"] in caplog.text and "secret" in caplog.text


def test_metrics_count_by_route(client):
    client.get("/v1/tiles/3")
    text = client.get("/metrics").text
    assert 'histoseek_requests_total{method="GET",route="/v1/tiles/{tile}",status="200"}' in text
    assert "histoseek_request_seconds_bucket" in text and "histoseek_tiles " in text
    assert 'route="/v1/tiles/3"' not in text, "one series per tile would be too many"


def test_docs_name_every_route_and_fetch_nothing(client):
    page = client.get("/docs").text
    document = client.get("/openapi.json").json()
    for path in document["paths"]:
        assert path in page
    assert "https://cdn" not in page and "<script" not in page


def test_every_request_has_an_id_and_headers(client):
    answer = client.get("/health", headers={"x-request-id": "abc-1"})
    assert answer.headers["x-request-id"] == "abc-1"
    evil = client.get("/health", headers={"x-request-id": "a b\\n"})
    assert evil.headers["x-request-id"] != "a b\\n"
    for name in (
        "content-security-policy",
        "x-content-type-options",
        "x-frame-options",
        "referrer-policy",
    ):
        assert name in answer.headers
    assert (
        "access-control-allow-origin"
        not in client.get("/info", headers={"origin": "http://127.0.0.1:7860"}).headers
    )


def test_the_audit_log_says_who_asked_what_and_holds_no_image(served, client, tile_folder):
    before = len(served.lines())
    file = tile_folder / "cat/00.png"
    found = client.post(
        "/v1/search",
        files=form(file),
        data={"where": "label = 'cat'"},
        headers={"x-request-id": "me-1"},
    ).json()
    (line,) = served.lines()[before:]
    assert line["action"] == "search" and line["request_id"] == "me-1" and line["user"] == "-"
    assert line["where"] == "label = 'cat'" and line["result"] == found["result"]
    assert (
        line["encoder_sha256"] == served.session.atlas.manifest.sha256 and line["generation"] >= 1
    )
    assert base64.b64encode(file.read_bytes())[:40].decode() not in served.log.read_text()
    assert served.log.stat().st_mode & 0o077 == 0
