"""Adding slides from the page and the API, including kills, rejections and invalid input."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from loopback import free_port, up

from histoseek.errors import BadInput, Busy, NotFound, Unavailable
from histoseek.index.atlas import Atlas
from histoseek.ui.api.client import Client
from histoseek.ui.session.addition import TileChoice
from histoseek.ui.session.additions import MAX_WAITING, Additions


def over(additions, number, seconds=120):
    deadline = time.monotonic() + seconds
    while not (job := additions.get(number)).over:
        assert time.monotonic() < deadline, job
        time.sleep(0.05)
    return job


def test_a_slide_from_an_allowed_folder_is_searchable_soon(serve, own_atlas, tmp_path, make_slide):
    folder = tmp_path / "slides"
    folder.mkdir()
    slide = make_slide(folder / "new-1.tiff", side=900, seed=9)
    one = serve(own_atlas, folders=[folder])
    before = one.session.atlas.stats()["tiles"]
    body = {"path": str(slide), "label": "tumour", "patient": "P9"}
    answer = one.client.post("/v1/slides", json=body)
    assert answer.status_code == 202, answer.text
    job = over(one.additions, answer.json()["id"])
    assert job.state == "done" and job.done == job.total > 0, job
    row = one.client.get("/v1/slides/new-1").json()
    assert (row["label"], row["patient"], row["tiles"]) == ("tumour", "P9", job.total)
    assert one.session.atlas.stats()["tiles"] == before + job.total
    found = one.client.post(
        "/v1/search", json={"like": [1], "where": "slide = 'new-1'", "k": 3}
    ).json()
    assert {h["slide"] for h in found["hits"]} == {"new-1"}
    assert [line["action"] for line in one.lines()][-2:] == ["add", "search"]
    again = one.client.post("/v1/slides", json=body)
    assert again.status_code == 422 and "in the atlas already" in again.json()["error"]["message"]
    body["replace"] = True
    assert (
        over(one.additions, one.client.post("/v1/slides", json=body).json()["id"]).state == "done"
    )
    gone = one.client.delete("/v1/slides/new-1").json()
    assert gone == {"slide": "new-1", "tiles": job.total, "annotations": 0} and slide.exists(), (
        "not ours to delete"
    )
    assert one.client.get("/v1/slides/new-1").status_code == 404


def test_an_upload_is_kept_with_the_atlas_and_goes_with_its_slide(
    serve, own_atlas, tmp_path, make_slide
):
    slide = make_slide(tmp_path / "up.tiff", side=700, mpp=None)
    one = serve(own_atlas)
    files = [("file", ("up.tiff", slide.read_bytes(), "image/tiff"))]
    job = over(one.additions, one.client.post("/v1/slides", files=files).json()["id"])
    assert job.state == "failed" and "micrometres per pixel" in job.message
    assert str(own_atlas) not in job.message, "where files lie is nobody's business"
    assert list((own_atlas / "uploads").iterdir()) == [], "what cannot be added is not kept"
    data = {"mpp": "0.5", "label": "x", "replace": "false"}
    job = over(one.additions, one.client.post("/v1/slides", files=files, data=data).json()["id"])
    assert job.state == "done", job.message
    (kept,) = (own_atlas / "uploads").glob("*/up.tiff")
    assert kept.read_bytes() == slide.read_bytes() and not (kept.parent / "pending.json").exists()
    tile = one.client.post("/v1/search", json={"like": [1], "where": "slide = 'up'", "k": 1}).json()
    assert one.client.get(f"/v1/tiles/{tile['hits'][0]['tile']}.jpg").status_code == 200
    assert Atlas(own_atlas).verify() == []
    one.client.delete("/v1/slides/up")
    assert not kept.exists() and list((own_atlas / "uploads").iterdir()) == []


@pytest.mark.parametrize("blob", [b"", b"no slide", b"II*\0" + b"\xff" * 500])
def test_nonsense_fails_by_itself_and_the_next_one_is_added(
    serve, own_atlas, tmp_path, make_slide, blob
):
    one = serve(own_atlas)
    files = [("file", ("bad.tiff", blob, "image/tiff"))]
    bad = one.client.post("/v1/slides", files=files).json()
    good = [
        (
            "file",
            ("good.tiff", make_slide(tmp_path / "g.tiff", side=700).read_bytes(), "image/tiff"),
        )
    ]
    good = one.client.post("/v1/slides", files=good).json()
    assert over(one.additions, bad["id"]).state == "failed"
    assert over(one.additions, good["id"]).state == "done"


def test_what_is_no_slide_by_name_is_refused_at_once(serve, own_atlas):
    one = serve(own_atlas)
    for name in ("a.exe", "a.zip", "a.h5", "a", "a.mrxs", "a.vms"):
        answer = one.client.post("/v1/slides", files=[("file", (name, b"x", "image/tiff"))])
        assert answer.status_code == 415, name
    assert one.client.post("/v1/slides", json={"path": ""}).status_code == 422
    files = [("file", ("a.tiff", b"x", "image/tiff"))]
    assert one.client.post("/v1/slides", files=files, data={"path": "/x.svs"}).status_code == 422
    long = {"label": "x" * 300}
    assert one.client.post("/v1/slides", files=files, data=long).status_code == 422


def test_a_full_line_is_said(served, monkeypatch, own_atlas, tmp_path, make_slide):
    session = served.session
    monkeypatch.setattr(Additions, "_work", lambda self: None)  # nobody works
    folder = tmp_path / "many"
    folder.mkdir()
    first = make_slide(folder / "s0.tiff", side=600)
    additions = Additions(session, [folder])
    for number in range(MAX_WAITING):
        path = folder / f"s{number}.tiff"
        path.write_bytes(first.read_bytes()) if number else None
        additions.path(path, {}, False)
    (folder / "last.tiff").write_bytes(first.read_bytes())
    with pytest.raises(Busy, match="waiting already"):
        additions.path(folder / "last.tiff", {}, False)
    with pytest.raises(NotFound):
        additions.get("999")
    additions.close()


def test_a_replacement_that_fails_leaves_the_slide_as_it_was(
    serve, own_atlas, tmp_path, make_slide
):
    one = serve(own_atlas)
    blob = make_slide(tmp_path / "x.tiff", side=700).read_bytes()
    first = one.client.post("/v1/slides", files=[("file", ("x.tiff", blob, "image/tiff"))]).json()
    assert over(one.additions, first["id"]).state == "done"
    (kept,) = (own_atlas / "uploads").glob("*/x.tiff")
    bad = [("file", ("x.tiff", b"rubbish", "image/tiff"))]
    job = one.client.post("/v1/slides", files=bad, data={"replace": "true"}).json()
    assert over(one.additions, job["id"]).state == "failed"
    assert kept.read_bytes() == blob and Atlas(own_atlas).verify() == []
    assert [s["tiles"] > 0 for s in one.session.atlas.slides() if s["name"] == "x"] == [True]
    other = make_slide(tmp_path / "y.tiff", side=900, seed=4).read_bytes()
    files = [("file", ("x.tiff", other, "image/tiff"))]
    job = one.client.post("/v1/slides", files=files, data={"replace": "true"}).json()
    assert over(one.additions, job["id"]).state == "done"
    (now,) = (own_atlas / "uploads").glob("*/x.tiff")
    assert now.read_bytes() == other and not kept.exists()


def test_another_writer_is_waited_for_and_nothing_is_lost(serve, own_atlas, tmp_path, make_slide):
    one = serve(own_atlas)
    blob = make_slide(tmp_path / "w.tiff", side=700).read_bytes()
    with Atlas(own_atlas).writing():
        job = one.client.post("/v1/slides", files=[("file", ("w.tiff", blob, "image/tiff"))]).json()
        deadline = time.monotonic() + 60
        while "trying again" not in one.additions.get(job["id"]).message:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert str(own_atlas) not in one.additions.get(job["id"]).message
    assert over(one.additions, job["id"]).state == "done"


def test_two_uploads_of_a_name_do_not_mix(serve, own_atlas, tmp_path, make_slide):
    import threading

    one = serve(own_atlas)
    blobs = [make_slide(tmp_path / f"{n}.tiff", side=700, seed=n).read_bytes() for n in (1, 2)]
    answers = []

    def send(blob):
        files = [("file", ("same.tiff", blob, "image/tiff"))]
        answers.append(one.client.post("/v1/slides", files=files))

    with one.client:
        threads = [threading.Thread(target=send, args=(blob,)) for blob in blobs]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    assert sorted(a.status_code for a in answers) == [202, 422]
    (kept,) = (own_atlas / "uploads").glob("*/same.tiff")
    assert kept.read_bytes() in blobs


def test_what_kills_the_server_is_not_tried_for_ever(
    serve, own_atlas, tmp_path, make_slide, monkeypatch
):

    folder = own_atlas / "uploads/0123"
    folder.mkdir(parents=True)
    (folder / "poison.tiff").write_bytes(make_slide(tmp_path / "p.tiff", side=600).read_bytes())
    (folder / "pending.json").write_text(json.dumps({"row": {}, "replace": False, "tries": 3}))
    one = serve(own_atlas)
    assert one.additions.all() == [] and (folder / "poison.tiff").exists()


def test_what_a_killed_write_left_behind_loses_no_upload(serve, own_atlas, tmp_path, make_slide):
    folder = own_atlas / "uploads" / ("e" * 16)
    folder.mkdir(parents=True)
    (folder / "again.tiff").write_bytes(make_slide(tmp_path / "p.tiff", side=700).read_bytes())
    about = {"row": {}, "replace": False, "tries": 0, "by": {"user": "anna"}}
    (folder / "pending.json").write_text(json.dumps(about))
    left = folder / ".pending.json.host~1~x.histoseek-tmp"
    left.write_text("{")
    for old in (*folder.iterdir(), folder):
        os.utime(old, (0, 0))
    one = serve(own_atlas)
    (job,) = one.additions.all()
    assert over(one.additions, job.id).state == "done" and job.by == {"user": "anna"}


def test_a_fault_while_adding_stops_no_other(serve, own_atlas, tmp_path, make_slide, monkeypatch):
    one = serve(own_atlas)
    add = Additions._add

    def broken(self, number):
        if self.get(number).slide == "bad":
            raise RuntimeError("/secret")
        add(self, number)

    monkeypatch.setattr(Additions, "_add", broken)
    blob = make_slide(tmp_path / "s.tiff", side=700).read_bytes()
    jobs = [
        one.client.post("/v1/slides", files=[("file", (f"{name}.tiff", blob, "image/tiff"))]).json()
        for name in ("bad", "good")
    ]
    assert over(one.additions, jobs[0]["id"]).message == "an error in the server; see its log"
    assert over(one.additions, jobs[1]["id"]).state == "done"


def test_a_stop_while_the_encoder_opens_ends_the_worker_and_keeps_the_upload(
    serve, own_atlas, tmp_path, make_slide, monkeypatch
):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    one = serve(own_atlas)
    monkeypatch.setattr("histoseek.ui.session.additions.open_encoder", stopped)
    blob = make_slide(tmp_path / "s.tiff", side=700).read_bytes()
    job = one.client.post("/v1/slides", files=[("file", ("s.tiff", blob, "image/tiff"))]).json()
    one.additions._worker.join(30)
    assert not one.additions._worker.is_alive()
    assert one.additions.get(job["id"]).state == "waiting"
    (kept,) = (own_atlas / "uploads").glob("*/s.tiff")
    assert kept.read_bytes() == blob and (kept.parent / "pending.json").exists()


def test_a_killed_server_takes_an_upload_up_again(histoseek_ui, own_atlas, tmp_path, make_slide):
    port = free_port()
    client = Client(f"http://127.0.0.1:{port}", token="")
    process = histoseek_ui(own_atlas, "--port", port, "--no-page")
    up(port, process)
    slide = make_slide(tmp_path / "late.tiff", side=4000, seed=3)
    job = client.upload(slide, label="late", patient="P7")
    assert job["state"] in {"waiting", "embedding"}
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert "late" not in {s["name"] for s in Atlas(own_atlas).slides()}
    half, young = (own_atlas / f"uploads/{n * 16}/{n}.tiff" for n in "ab")
    for file in (half, young):
        file.parent.mkdir()
        file.write_bytes(b"x")
    for old in (half, half.parent):
        os.utime(old, (0, 0))
    process = histoseek_ui(own_atlas, "--port", port, "--no-page")
    up(port, process)
    (job,) = client._json("GET", "/v1/jobs")["jobs"]
    assert client.wait(job, 200)["state"] == "done"
    row = client.slides("late")["slides"][0]
    assert (row["label"], row["patient"]) == ("late", "P7") and row["tiles"] > 0
    assert not half.exists() and young.exists(), "one was cut off, the other may still be sent"
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert Atlas(own_atlas).verify() == []


def test_the_client_speaks_to_a_real_server(histoseek_ui, own_atlas, tile_folder, tmp_path):
    port = free_port()
    env = {**os.environ, "HISTOSEEK_UI_TOKEN": "0123456789abcdef"}
    process = histoseek_ui(own_atlas, "--port", port, "--no-page", "--log-requests", env=env)
    up(port, process)
    client = Client(f"http://127.0.0.1:{port}", token="0123456789abcdef")
    file = tile_folder / "cat/00.png"
    assert client.info()["tiles"] == Atlas(own_atlas).stats()["tiles"]
    found = client.search([file, file.read_bytes()], k=3, per_slide=False, where="label = 'cat'")
    assert len(found["hits"]) == 3 and found["hits"][0]["label"] == "cat"
    assert client.search(like=[found["hits"][0]["tile"]], k=2)["hits"]
    assert len(client.embed([file])[0]) == client.info()["encoder"]["dim"]
    assert client.assign([file], "kmeans")["images"][0]["image"] == "00.png"
    assert client.clusters("kmeans")["clustering"] == "kmeans"
    assert client.tile(found["hits"][0]["tile"])[:2] == b"\xff\xd8"
    assert client.remove("case-2")["slide"] == "case-2"
    with pytest.raises(NotFound, match="no slide 'case-2'"):
        client.remove("case-2")
    with pytest.raises(BadInput, match="k: "):
        client.search([file], k=0)
    with pytest.raises(BadInput, match="images: "):
        client.assign([])
    with pytest.raises(BadInput, match="this needs a user and password"):
        Client(f"http://127.0.0.1:{port}", token="").info()
    with pytest.raises(BadInput, match="none.png"):
        client.search([tmp_path / "none.png"])
    with pytest.raises(Unavailable, match="does not answer"):
        Client(f"http://127.0.0.1:{free_port()}").info()
    code = f"""
import sys
from histoseek.ui.api.client import Client
Client('http://127.0.0.1:{port}', token='0123456789abcdef').info()
print([m for m in ('fastapi', 'numpy', 'gradio') if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=40)[0].decode()
    assert "INFO 127.0.0.1 POST /v1/search 200" in said and "user=token id=" in said
    assert "WARNING 127.0.0.1 GET /info 401" in said and "Traceback" not in said


def test_an_atlas_that_was_moved_keeps_the_slides_uploaded_to_it(
    serve, own_atlas, tmp_path, make_slide, monkeypatch, cli_json
):
    monkeypatch.chdir(own_atlas.parent)
    one = serve(Path("atlas"))  # by a path that means something else elsewhere
    blob = make_slide(tmp_path / "m.tiff", side=700).read_bytes()
    job = one.client.post("/v1/slides", files=[("file", ("m.tiff", blob, "image/tiff"))]).json()
    assert over(one.additions, job["id"]).state == "done"
    (source,) = (s["source"] for s in one.session.atlas.slides() if s["name"] == "m")
    assert Path(source).is_absolute()
    one.additions.close()
    moved = own_atlas.rename(tmp_path / "moved")
    (kept,) = (moved / "uploads").glob("*/m.tiff")
    for old in (kept, kept.parent):
        os.utime(old, (0, 0))
    Additions(one.session.__class__(moved)).close()
    assert kept.read_bytes() == blob
    atlas = Atlas(moved)
    assert [s["source"] for s in atlas.slides() if s["name"] == "m"] == [str(kept)]
    other = moved / "uploads" / "a b" / "mine.txt"  # what nobody uploaded
    other.parent.mkdir()
    other.write_text("x")
    waiting = moved / "uploads" / ("c" * 16) / "pending.json"
    waiting.parent.mkdir()
    waiting.write_text("{}")
    again = serve(moved)
    tile = again.client.post(
        "/v1/search", json={"like": [1], "where": "slide = 'm'", "k": 1}
    ).json()
    assert again.client.get(f"/v1/tiles/{tile['hits'][0]['tile']}.jpg").status_code == 200
    assert cli_json("index", "remove", moved, "m")["removed"] == ["m"]
    assert not kept.parent.exists() and other.exists() and waiting.exists()


def test_which_tiles_of_a_slide_are_added_can_be_chosen(serve, own_atlas, tmp_path, make_slide):
    one = serve(own_atlas)
    blob = make_slide(tmp_path / "x.tiff", side=900, seed=9).read_bytes()
    files = [("file", ("x.tiff", blob, "image/tiff"))]
    for data, says in (
        ({"min_sharpness": "1.5"}, "min_sharpness"),
        ({"max_pen": "nan"}, "max_pen"),
        ({"tissue_model": "/etc"}, "tissue_model"),
    ):
        refused = one.client.post("/v1/slides", files=files, data=data)
        assert refused.status_code == 422 and says in refused.json()["error"]["message"]
    job = one.client.post("/v1/slides", files=files, data={"min_sharpness": "1"}).json()
    done = over(one.additions, job["id"])
    assert "blurred" in done.message, done
    data = {"tissue_model": "small", "max_pen": "1", "replace": "true"}
    job = one.client.post("/v1/slides", files=files, data=data).json()
    done = over(one.additions, job["id"])
    assert done.state == "done" and done.tiles == TileChoice("small", 0.12, 1.0)
    assert "tiles" not in one.client.get(f"/v1/jobs/{job['id']}").json()


def test_the_choice_of_tiles_outlives_a_restart(own_atlas, make_slide, serve):
    folder = own_atlas / "uploads" / "a1b2c3d4a1b2c3d4"
    folder.mkdir(parents=True)
    make_slide(folder / "later.tiff", side=900, seed=9)
    choice = {"tissue_model": "absorbance", "min_sharpness": 1.0, "max_pen": 1.0}
    pending = {"row": {}, "replace": False, "tries": 0, "tiles": choice}
    (folder / "pending.json").write_text(json.dumps(pending))
    one = serve(own_atlas)
    (job,) = one.additions.all()
    assert over(one.additions, job.id).tiles == TileChoice("absorbance", 1.0, 1.0)
    assert "blurred" in one.additions.get(job.id).message
