"""Access control: who may send requests, how many and from where, tested from an attacker's side."""

import base64
import io
import os
import signal
import socket
import subprocess
import sys
import zipfile

import pytest
from loopback import free_port, up

from histoseek.errors import BadInput, TooLarge
from histoseek.ui.access.policy import Access, Limits, access_for, claim_of
from histoseek.ui.page.cluster_tab import unpacked
from histoseek.ui.page.widgets import check_upload

TOKEN = "0123456789abcdef0123"
GUARDED = Access({"ann": "sesame", "bob": "pw:with:colons"}, TOKEN)


def basic(user, password):
    return {"authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


def user_of(access, header):
    return access.check(claim_of(header))


@pytest.fixture
def clean(monkeypatch):
    for name in ("HISTOSEEK_UI_AUTH", "HISTOSEEK_UI_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_other_hosts_need_a_password(clean, tmp_path):
    assert not access_for("127.0.0.1").guarded and not access_for("localhost").guarded
    assert not access_for("::1").guarded
    for host in ("0.0.0.0", "192.0.2.7", "myhost", "::"):
        with pytest.raises(BadInput, match="HISTOSEEK_UI_AUTH"):
            access_for(host)
    with pytest.raises(BadInput, match="--allow-host atlas.example lets"):
        access_for("127.0.0.1", allowed=("atlas.example",))
    clean.setenv("HISTOSEEK_UI_AUTH", "only-a-password")
    with pytest.raises(BadInput, match="user:password"):
        access_for("127.0.0.1")
    clean.setenv("HISTOSEEK_UI_AUTH", "ann:se:same")
    assert user_of(access_for("0.0.0.0"), basic("ann", "se:same")["authorization"]) == "ann"
    clean.delenv("HISTOSEEK_UI_AUTH")
    clean.setenv("HISTOSEEK_UI_TOKEN", "short")
    with pytest.raises(BadInput, match="at least 16"):
        access_for("0.0.0.0")
    clean.setenv("HISTOSEEK_UI_TOKEN", TOKEN)
    assert user_of(access_for("0.0.0.0"), f"Bearer {TOKEN}") == "token"


def test_users_come_from_a_file_that_only_its_owner_reads(clean, tmp_path):
    file = tmp_path / "users"
    file.write_text("# people\nann:sesame\n\nbob:pw\n")
    file.chmod(0o644)
    with pytest.raises(BadInput, match="chmod 600"):
        access_for("0.0.0.0", file)
    file.chmod(0o600)
    access = access_for("0.0.0.0", file)
    assert user_of(access, basic("bob", "pw")["authorization"]) == "bob"
    file.write_text("ann\n")
    with pytest.raises(BadInput, match="line 1"):
        access_for("0.0.0.0", file)
    file.write_text("# nobody\n")
    with pytest.raises(BadInput, match="names no user"):
        access_for("0.0.0.0", file)
    with pytest.raises(BadInput, match="cannot be read"):
        access_for("0.0.0.0", tmp_path / "none")


def test_without_credentials_nothing_but_health_answers(histoseek_ui, own_atlas, tmp_path, clean):
    import http.client

    users = tmp_path / "users"
    users.write_text("ann:sesame\nbob:pw:with:colons\n")
    users.chmod(0o600)
    port = free_port()
    env = {**os.environ, "HISTOSEEK_UI_TOKEN": TOKEN}
    # On all addresses, as in life; asked on loopback only.
    process = histoseek_ui(
        own_atlas, "--host", "0.0.0.0", "--port", port, "--users", users, env=env
    )
    up(port, process)

    def ask(method, path, headers=None, body=None):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        found = answer.status, dict(answer.getheaders())
        answer.read()
        connection.close()
        return found

    routes = ["/", "/config", "/theme.css", "/docs", "/openapi.json", "/info", "/ready", "/metrics",
              "/v1/slides", "/v1/tiles/1.jpg", "/page-assets/page.js", "/gradio_api/info", "/nothing",
              "/gradio_api/file=/etc/passwd", "/%2e%2e/health", "//health", "/health/", "/health/../info",
              "/static/js/x", "/gradio_api/startup-events", "/gradio_api/heartbeat/x"]  # fmt: skip
    for path in routes:
        status, headers = ask("GET", path)
        assert status == 401 and "Basic" in headers["www-authenticate"], path
    for path in (
        "/v1/search",
        "/v1/slides",
        "/gradio_api/upload",
        "/gradio_api/queue/join",
        "/health",
    ):
        assert ask("POST", path, body=b"{}")[0] == (405 if path == "/health" else 401), path
    assert ask("GET", "/health")[0] == 200
    for who in (basic("ann", "sesame"), basic("bob", "pw:with:colons"), basic("any", TOKEN),
                {"authorization": f"Bearer {TOKEN}"}):  # fmt: skip
        assert ask("GET", "/", who)[0] == ask("GET", "/info", who)[0] == 200
    who = basic("ann", "sesame")
    for path in ("/config", "/info", "/"):
        _, headers = ask("GET", path, {**who, "origin": "https://evil.example"})
        assert not [name for name in headers if name.startswith("access-control-")], path
    secret = own_atlas / "atlas.db"
    for path in (f"/gradio_api/file={secret}", "/gradio_api/file=/etc/passwd", f"/file={secret}",
                 "/page-assets/..%2f..%2fapp.py", "/page-assets/page.css",
                 "/static/..%2f..%2f..%2fetc/passwd", "/v1/slides/..%2f..%2fatlas.db"):  # fmt: skip
        assert ask("GET", path, who)[0] in {400, 403, 404}, path
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0


def test_wrong_passwords_are_refused_and_soon_not_even_looked_at(serve, own_atlas):
    one = serve(own_atlas, GUARDED)
    strange = [basic("", ""), basic("eve", "sesame"), {"authorization": "Bearer "},
               {"authorization": "Bearer x"}, {"authorization": "Basic %%%"},
               {"authorization": "Digest x"}, {"authorization": "Basic " + "A" * 50}]  # fmt: skip
    for header in strange:
        assert one.client.get("/info", headers=header).status_code == 401
    for password in ["x", "", TOKEN[:-1], *"abcdefg"]:
        assert one.client.get("/info", headers=basic("ann", password)).status_code == 401
    answer = one.client.get("/info", headers=basic("ann", "sesame"))
    assert answer.status_code == 429 and answer.headers["retry-after"] == "60"
    assert "for this user" in answer.json()["error"]["message"]
    assert one.client.get("/info", headers=basic("bob", "pw:with:colons")).status_code == 200
    assert one.client.get("/health").status_code == 200


def test_the_user_is_who_proved_it_not_who_says_so(serve, own_atlas):
    one = serve(own_atlas, GUARDED)
    headers = {**basic("ann", "sesame"), "x-histoseek-user": "director"}
    assert one.client.post("/v1/search", json={"like": [1]}, headers=headers).status_code == 200
    assert one.lines()[-1]["user"] == "ann"


def test_other_names_of_the_host_are_refused(served):
    """A page of another site may have a name that leads here (DNS rebinding)."""
    for host in (
        "evil.example",
        "evil.example:7860",
        "127.0.0.1.evil.example",
        "",
        "[::1",
        "10.0.0.1",
    ):
        answer = served.client.get("/info", headers={"host": host})
        assert answer.status_code == 421, host
    for host in ("localhost", "LOCALHOST:1", "127.0.0.1:99", "[::1]:7860"):
        assert served.client.get("/info", headers={"host": host}).status_code == 200, host


def test_pages_of_other_sites_change_nothing(served):
    own = {"origin": "http://127.0.0.1:7860"}
    assert served.client.post("/v1/search", json={"like": [1]}, headers=own).status_code == 200
    for headers in ({"origin": "http://evil.example"}, {"origin": "null"}, {"sec-fetch-site": "cross-site"},
                    {"sec-fetch-site": "same-site"}, {"origin": "http://127.0.0.1:9999"}):  # fmt: skip
        answer = served.client.post("/v1/search", json={"like": [1]}, headers=headers)
        assert answer.status_code == 403, headers
        assert served.client.delete("/v1/slides/case-1", headers=headers).status_code == 403
    asked = {"origin": "http://evil.example", "access-control-request-method": "POST"}
    answer = served.client.options("/v1/search", headers=asked)
    assert "access-control-allow-origin" not in answer.headers


def test_bodies_are_bounded_whatever_they_say_of_themselves(serve, own_atlas):
    one = serve(own_atlas, Access(limits=Limits(body_bytes=10_000, slide_bytes=20_000)))
    assert one.client.post("/v1/search", content=b"x" * 10_001).status_code == 413

    def chunks(count):
        for _ in range(count):
            yield b"x" * 1000

    headers = {"content-type": "application/json"}
    assert one.client.post("/v1/search", content=chunks(11), headers=headers).status_code == 413
    assert one.client.post("/v1/search", content=chunks(9), headers=headers).status_code == 422
    slide = [("file", ("a.svs", b"x" * 15_000, "image/tiff"))]
    assert one.client.post("/v1/slides", files=slide).status_code in {202, 422}
    slide = [("file", ("b.svs", b"x" * 25_000, "image/tiff"))]
    assert one.client.post("/v1/slides", files=slide).status_code == 413


def test_bytes_of_all_requests_together_are_bounded(serve, own_atlas):
    import threading

    one = serve(own_atlas, Access(limits=Limits(bytes_under_way=1_000_000)))
    headers = {"content-type": "application/json"}
    sent, go, found = threading.Event(), threading.Event(), []

    def slow():
        yield b"x" * 900_000
        sent.set()
        go.wait(20)
        yield b"x"

    with one.client:
        thread = threading.Thread(
            target=lambda: found.append(
                one.client.post("/v1/search", content=slow(), headers=headers)
            )
        )
        thread.start()
        sent.wait(20)
        go.set()
        thread.join(20)
        assert found[0].status_code == 422, "read to its end, and then no JSON"
    assert one.client.app._bytes == 0 and not one.client.app._under_way
    one.client.app._bytes = 999_999  # held by others
    answer = one.client.post("/v1/search", content=b"x" * 100, headers=headers)
    assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
    one.client.app._bytes = 0
    assert one.client.post("/v1/search", json={"like": [1]}).status_code == 200


def test_who_sends_or_reads_too_slowly_is_let_go(histoseek_ui, own_atlas, monkeypatch, serve):
    import threading
    import time

    monkeypatch.setattr("histoseek.ui.access.guard.READ_S", 0.3)
    one = serve(own_atlas)
    headers = {"content-type": "application/json"}
    go = threading.Event()

    def slow():
        yield b"{"
        go.wait(3)
        yield b"}"

    timer = threading.Timer(2, go.set)
    timer.start()
    started = time.monotonic()
    answer = one.client.post("/v1/search", content=slow(), headers=headers)
    assert answer.status_code in {408, 422} and time.monotonic() - started < 10
    assert not one.client.app._under_way
    timer.join()


def test_more_requests_than_are_allowed_are_turned_away(serve, own_atlas, monkeypatch):
    import threading

    one = serve(own_atlas, Access(limits=Limits(requests=2)))
    gate, entered = threading.Event(), threading.Semaphore(0)
    slides = one.session.atlas.slides

    def slow():
        entered.release()
        gate.wait(20)
        return slides()

    monkeypatch.setattr(one.session.atlas, "slides", slow)
    found = []
    with one.client:  # one loop for all
        threads = [
            threading.Thread(target=lambda: found.append(one.client.get("/v1/slides").status_code))
            for _ in range(2)
        ]
        [thread.start() for thread in threads]
        [entered.acquire(timeout=20) for _ in threads]
        answer = one.client.get("/v1/slides")
        assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
        assert one.client.get("/health").status_code == 200
        gate.set()
        [thread.join(20) for thread in threads]
        assert found == [200, 200]
        assert one.client.get("/v1/slides").status_code == 200


# -- paths ------------------------------------------------------------------------------------------


def test_no_path_leaves_the_allowed_folders(serve, own_atlas, tmp_path, make_slide):
    inside, outside = tmp_path / "slides", tmp_path / "secret"
    inside.mkdir(), outside.mkdir()
    make_slide(outside / "hidden.tiff", side=600)
    (inside / "link.tiff").symlink_to(outside / "hidden.tiff")
    (inside / "folder").symlink_to(outside)
    one = serve(own_atlas, folders=[inside])
    for path in (outside / "hidden.tiff", inside / ".." / "secret/hidden.tiff", inside / "link.tiff",
                 inside / "folder/hidden.tiff", inside, inside / "none.tiff", "/etc/passwd", "hidden.tiff",
                 "\0", f"{inside}/\0.tiff", "x" * 3000, "~/x.svs"):  # fmt: skip
        answer = one.client.post("/v1/slides", json={"path": str(path)})
        assert answer.status_code in {404, 422}, path
        if answer.status_code == 404:
            assert "not in a folder" in answer.json()["error"]["message"]
    assert one.client.get("/v1/jobs").json()["jobs"] == []


@pytest.mark.parametrize(
    "name",
    ["../../evil.svs", "..\\evil.svs", "/etc/evil.svs", ".hidden.svs", "a\0b.svs", "ä b.svs"],
)
def test_names_of_uploads_stay_in_their_folder(serve, own_atlas, name):
    one = serve(own_atlas)
    before = set(own_atlas.parent.rglob("*"))
    job = one.additions.upload(io.BytesIO(b"no slide"), name, {}, False)
    assert job.path.parent.parent == own_atlas / "uploads" and not job.path.name.startswith(".")
    # The server may write files of its own meanwhile (map, database's log): not these bytes, no folders.
    new = set(own_atlas.parent.rglob("*")) - before
    written = [p for p in new if p.is_dir() or (p.is_file() and b"no slide" in p.read_bytes())]
    assert written and all(own_atlas / "uploads" in [p, *p.parents] for p in written)


def test_names_that_are_none_are_refused(serve, own_atlas):
    one = serve(own_atlas)
    for name in ("", ".svs", "..", "/", "...svs"):
        with pytest.raises(BadInput):
            one.additions.upload(io.BytesIO(b"x"), name, {}, False)


def test_the_page_reads_no_file_that_was_not_uploaded(tmp_path):
    for path in ("/etc/passwd", str(tmp_path / "x.png"), "../../etc/passwd", None, 5):
        with pytest.raises(BadInput, match="not uploaded to this server"):
            check_upload({"path": path, "name": "x"})


def test_gradio_fetches_no_address():
    from gradio import processing_utils

    from histoseek.ui.page.app import _fetch_nothing

    _fetch_nothing()
    with pytest.raises(ValueError, match="does not fetch URLs"):
        processing_utils.save_url_to_cache("http://127.0.0.1:1/x.png", "/tmp")


def test_zips_are_read_without_writing_anything(tmp_path, tile_folder):
    pack = tmp_path / "a.zip"
    picture = (tile_folder / "cat/00.png").read_bytes()
    with zipfile.ZipFile(pack, "w") as out:
        out.writestr("../../../evil.png", picture)
        out.writestr("/abs.png", picture)
        out.writestr("folder/", b"")
        out.writestr("__MACOSX/x.png", b"")
        out.writestr(".hidden", b"")
    before = set(tmp_path.rglob("*"))
    found = unpacked([("a.zip", pack), ("b.png", tile_folder / "cat/01.png")])
    assert [name for name, _ in found] == ["a.zip: evil.png", "a.zip: abs.png", "b.png"]
    assert found[0][1] == picture and set(tmp_path.rglob("*")) == before


def test_zips_that_are_bombs_or_broken_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("histoseek.ui.page.cluster_tab.UPLOAD_BYTES", 10_000)
    monkeypatch.setattr("histoseek.ui.page.cluster_tab.ZIP_BYTES", 25_000)
    packs = {"large": {"a.png": 20_000}, "sum": dict.fromkeys("abc", 9_000),
             "many": dict.fromkeys(map(str, range(300)), 1)}  # fmt: skip
    for name, files in packs.items():
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as out:
            for file, size in files.items():
                out.writestr(file, b"\0" * size)
        (tmp_path / name).rename(tmp_path / f"{name}.zip")
        says = {"large": "too many bytes", "sum": "too many bytes", "many": "split it"}
        with pytest.raises(TooLarge, match=says[name]):
            unpacked([(f"{name}.zip", tmp_path / f"{name}.zip")])
    blob = bytearray((tmp_path / "sum.zip").read_bytes())
    for broken in (b"PK\3\4", bytes(blob[:100]), b"", bytes(blob[:40] + b"\xff" * 20 + blob[60:])):
        (tmp_path / "broken.zip").write_bytes(broken)
        with pytest.raises(BadInput, match="zip the images again"):
            unpacked([("broken.zip", tmp_path / "broken.zip")])


# -- the process ------------------------------------------------------------------------------------


def test_a_server_for_others_does_not_start_without(histoseek_ui, own_atlas, clean):
    refused = histoseek_ui(own_atlas, "--host", "0.0.0.0", "--port", free_port())
    assert refused.wait(60) == 1 and b"HISTOSEEK_UI_AUTH" in refused.stdout.read()


def test_a_taken_port_and_a_bad_folder_are_said(own_atlas, histoseek_ui, tmp_path):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        process = histoseek_ui(own_atlas, "--port", holder.getsockname()[1])
        assert process.wait(60) == 75 and b"choose another --port" in process.stdout.read()
    for options, says in (
        (["--slides", tmp_path / "none"], b"is not a folder"),
        (["--port", "0"], b"1 to 65535"),
        (["--audit-log", tmp_path / "none/log"], b"audit log"),
    ):
        process = histoseek_ui(own_atlas, *options)
        assert process.wait(60) == 1 and says in process.stdout.read()


def test_help_of_the_command_names_its_options():
    done = subprocess.run(
        [sys.executable, "-m", "histoseek", "ui", "--help"], capture_output=True, text=True
    )
    for option in ("--slides", "--users", "--allow-host", "--audit-log", "--no-page", "--root-path",
                   "--trusted-proxy", "--user-header", "--editor", "--hash-password"):  # fmt: skip
        assert option in done.stdout


def test_where_no_token_is_set_none_is_one():
    access = Access({"ann": "sesame"})
    assert (
        user_of(access, "Bearer ") is None
        and user_of(access, basic("x", "")["authorization"]) is None
    )
    assert user_of(access, basic("ann", "sesame")["authorization"]) == "ann"
    assert not Access().guarded and Access(token=TOKEN).guarded
