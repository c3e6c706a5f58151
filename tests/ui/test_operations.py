"""What an operator of the server relies on: the log says what happened, and nobody blocks the others."""

import json
import logging
import socket
import time

import pytest
from triton_server import free_ports

from histoseek.artifacts.files import exclusive
from histoseek.ui.access import connections
from histoseek.ui.access.guard import Guard
from histoseek.ui.access.policy import Access, Limits
from histoseek.ui.access.traffic import Traffic
from histoseek.ui.server import Running, ServeOptions


def over(additions, number):
    deadline = time.monotonic() + 120
    while not additions.get(number).over:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return additions.get(number)


def test_the_audit_log_says_which_changes_failed(serve, own_atlas, tmp_path, make_slide, caplog):
    one = serve(own_atlas)
    one.session.atlas.fit("kmeans", k=2)
    slide = one.session.atlas.slides()[0]["name"]
    with exclusive(own_atlas / ".lock", "it"):
        assert one.client.delete(f"/v1/slides/{slide}").status_code == 429
    assert one.client.delete("/v1/slides/none").status_code == 404
    assert one.client.put("/v1/clusters/99", json={"name": "x"}).status_code == 422
    assert one.client.put("/v1/clusters/1", json={"name": "x"}).status_code == 200
    assert one.client.delete("/v1/annotations/none").status_code == 404
    told = [(line["action"], line.get("failed")) for line in one.lines()]
    assert told == [
        ("remove", None), ("remove", "Busy"), ("remove", None), ("remove", "NotFound"),
        ("rename", None), ("rename", "BadInput"), ("rename", None),
        ("remove_annotation", None), ("remove_annotation", "NotFound"),
    ]  # fmt: skip
    first, second = one.lines()[:2]
    assert first["request_id"] == second["request_id"] and first["slide"] == second["slide"]

    broken = ("file", ("broken.tiff", b"II*\0 no slide", "image/tiff"))
    whole = ("file", ("whole.tiff", make_slide(tmp_path / "w.tiff", side=700).read_bytes()))
    with caplog.at_level(logging.WARNING, "histoseek.additions"):
        for file in (broken, whole):
            job = one.client.post("/v1/slides", files=[file]).json()
            assert "by" not in job
            over(one.additions, job["id"])
    lines = [line for line in one.lines() if line["action"] == "add"]
    assert [(line["slide"], line.get("state")) for line in lines] == [
        ("broken", None), ("broken", "failed"), ("whole", None), ("whole", "done"),
    ]  # fmt: skip
    assert len({line["request_id"] for line in lines}) == 2 and lines[0]["request_id"] != "-"
    assert "adding broken failed" in caplog.text


def test_an_answer_goes_with_the_slides_that_it_shows(serve, own_atlas, cli_json):
    one = serve(own_atlas)
    tile = one.session.atlas.vectors()[0][0].item()
    found = one.client.post("/v1/search", json={"like": [tile], "k": 3}).json()
    path = f"/v1/results/{found['result']}/csv"
    assert one.client.get(path).status_code == 200
    cli_json("index", "remove", own_atlas, found["hits"][0]["slide"])  # by another process
    reply = one.client.get(path)
    assert reply.status_code == 404 and "1 slide removed since" in reply.json()["error"]["message"]
    assert "or it was dropped" in one.client.get(path).json()["error"]["message"]


def test_one_user_leaves_room_for_others():
    traffic = Traffic()
    limits = Limits(requests=4)
    guard = Guard(None, Access(users={"a": "x", "b": "y"}, limits=limits), traffic)
    assert [guard.begin("a") for _ in range(3)] == [True, True, False]
    assert [guard.begin("b") for _ in range(3)] == [True, True, False]
    guard.end("a")
    assert guard.begin("b") is False and guard.begin("a") is True
    alone = Guard(None, Access(users={"a": "x"}, limits=limits), traffic)
    assert [alone.begin("a") for _ in range(5)] == [True] * 4 + [False]


@pytest.fixture
def running(own_atlas):
    (port,) = free_ports(1)
    one = Running(own_atlas, ServeOptions(port=port, page=False))
    yield port
    one.close()


def closed_after(sock, at_most):
    sock.settimeout(at_most)
    began = time.monotonic()
    while sock.recv(65536):
        pass
    return time.monotonic() - began


def test_a_connection_without_a_request_is_closed(running, monkeypatch):
    monkeypatch.setattr(connections, "HEADERS_S", 1.0)
    address = ("127.0.0.1", running)
    whole = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    for sent in (b"", b"GET /health HTTP/1.1\r\nHos", whole + b"GET /hea"):
        with socket.create_connection(address) as sock:
            sock.sendall(sent)
            assert closed_after(sock, 20) < 15, sent
    with socket.create_connection(address) as sock:  # a slow body has its own limit
        sock.sendall(
            b"POST /v1/search HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            b"Content-Length: 12\r\n\r\n{"
        )
        time.sleep(2)
        sock.sendall(b'"like": [1]')
        sock.settimeout(30)
        assert b" 422 " in sock.recv(65536).split(b"\r\n")[0]


def test_a_client_that_goes_away_is_no_error_of_the_server(running, caplog):
    big = json.dumps({"images": ["x" * 4_000_000]}).encode()
    head = (
        b"POST /v1/search HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % len(big)
    )
    with caplog.at_level(logging.INFO, "histoseek.access"):
        with socket.create_connection(("127.0.0.1", running)) as sock:
            sock.sendall(head + big[:1000])
            time.sleep(0.3)
        deadline = time.monotonic() + 20
        while "POST /v1/search" not in caplog.text:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert "POST /v1/search 499" in caplog.text and "Traceback" not in caplog.text


def test_the_log_names_whose_password_was_wrong(serve, own_atlas, caplog):
    one = serve(own_atlas, Access(users={"anna": "right"}, hosts=None))
    with caplog.at_level(logging.INFO, "histoseek.access"):
        for user, password in (("anna", "wrong"), ("hunter2", "x"), ("anna", "right")):
            one.client.get("/v1/me", auth=(user, password))
        one.client.get("/v1/me", headers={"Authorization": "Bearer x"})
    told = [record.getMessage().partition(" user=")[2] for record in caplog.records]
    tried = [text.partition(" tried=")[2] for text in told]
    assert tried == ["anna", "unknown", "", "token"], "a name may be a password typed too early"
    assert one.client.head("/health").status_code == 200


def test_messages_name_no_folder_of_the_server(serve, own_atlas, monkeypatch):
    monkeypatch.chdir(own_atlas.parent)
    one = serve(own_atlas.relative_to(own_atlas.parent))
    file = ("file", ("rep.svs", b"no slide", "image/tiff"))
    job = one.client.post("/v1/slides", files=[file]).json()
    message = over(one.additions, job["id"]).message
    assert "rep.svs" in message and "/" not in message
