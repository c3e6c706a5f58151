"""Behind a proxy: which headers are trusted for address, host, path and user."""

import http.client
import json

import pytest
from loopback import free_port, up

from histoseek.errors import BadInput
from histoseek.ui.access.policy import Access, access_for
from histoseek.ui.access.proxies import OWN_PATHS, client_request, parsed, proxies_for

PROXY = "10.0.0.7"
NAMED = proxies_for(
    (PROXY, "192.168.0.0/16", "fd00::/8"), user_header="X-Forwarded-User", editors=("ann",)
)


def scope(*headers, peer=PROXY, path="/v1/slides", scheme="http"):
    pairs = [(name.lower().encode(), value.encode()) for name, value in headers]
    return {"client": (peer, 1), "headers": pairs, "path": path, "scheme": scheme}


@pytest.mark.parametrize(
    ("values", "address"),
    [
        (["203.0.113.9"], "203.0.113.9"),
        (["203.0.113.9:4711"], "203.0.113.9"),
        (["6.6.6.6, 203.0.113.9"], "203.0.113.9"),
        (["6.6.6.6, 203.0.113.9, 192.168.3.4"], "203.0.113.9"),
        (["6.6.6.6", "203.0.113.9", "192.168.3.4, 10.0.0.7"], "203.0.113.9"),
        (["192.168.1.1, 192.168.3.4"], "192.168.1.1"),
        (["203.0.113.9, unknown, 192.168.3.4"], "192.168.3.4"),
        (["unknown"], PROXY),
        ([""], PROXY),
        ([], PROXY),
        (['"[2001:db8::7]:443"'], "2001:db8::7"),
        (["::ffff:203.0.113.9"], "203.0.113.9"),
        (["203.0.113.9, fd00::1"], "203.0.113.9"),
    ],
)
def test_the_client_is_the_last_address_that_is_no_proxy(values, address):
    found = client_request(scope(*[("X-Forwarded-For", value) for value in values]), NAMED)
    assert found.address == address and found.proxied


def test_from_anyone_else_these_headers_are_ignored():
    headers = [("Host", "a.example"), ("X-Forwarded-For", "1.2.3.4"), ("X-Forwarded-Proto", "https"),
               ("X-Forwarded-Host", "b.example"), ("X-Forwarded-Prefix", "/x"),
               ("X-Forwarded-User", "ann")]  # fmt: skip
    found = client_request(scope(*headers, peer="10.0.0.8"), NAMED)
    assert (found.address, found.scheme, found.host, found.prefix, found.user) == (
        "10.0.0.8", "http", "a.example", "", "",
    )  # fmt: skip
    assert set(found.ignored) == {name.lower() for name, _ in headers[1:]} and not found.proxied
    found = client_request(scope(*headers), NAMED)
    assert (found.address, found.scheme, found.host, found.prefix, found.user) == (
        "1.2.3.4", "https", "b.example", "/x", "ann",
    )  # fmt: skip
    assert found.ignored == ()


def test_of_many_hosts_the_one_of_the_nearest_proxy_counts():
    found = client_request(scope(("X-Forwarded-Host", "evil.example, a.example")), NAMED)
    assert found.host == "a.example"


@pytest.mark.parametrize(
    ("path", "inner"),
    [
        ("/histo/v1/slides", "/v1/slides"),
        ("/v1/slides", "/v1/slides"),
        ("/histo/", "/"),
        ("/", "/"),
        ("/histo", ""),
        ("/histology", "/histology"),
        ("/histo/histo/x", "/histo/x"),
    ],
)
def test_a_path_comes_with_or_without_the_prefix(path, inner):
    found = client_request(scope(path=path), proxies_for(root_path="/histo/"))
    assert found.path == inner and found.prefix == "/histo"
    found = client_request(scope(("X-Forwarded-Prefix", "/histo"), path=path), NAMED)
    assert found.path == inner and found.prefix == "/histo"


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("X-Forwarded-Host", "a b"), ("X-Forwarded-Host", "a/../b"), ("X-Forwarded-Proto", "ftp"),
        ("X-Forwarded-Prefix", "histo"), ("X-Forwarded-Prefix", "/a/../b"),
        ("X-Forwarded-Prefix", "//evil.example"),
        ("X-Forwarded-Prefix", "/v1"), ("X-Forwarded-User", "x" * 201), ("X-Forwarded-User", "a\tb"),
    ],
)  # fmt: skip
def test_what_a_proxy_says_must_make_sense(header, value):
    with pytest.raises(BadInput, match=f"(?i){header}"):
        client_request(scope((header, value)), NAMED)


def test_a_user_named_twice_is_refused():
    headers = [("X-Forwarded-User", "ann"), ("X-Forwarded-User", "eve")]
    with pytest.raises(BadInput, match="2 times"):
        client_request(scope(*headers), NAMED)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"trusted": ("proxy.example",)}, "expected an address"),
        ({"trusted": ("10.0.0.1/8",)}, "has host bits set"),
        ({"trusted": ("0.0.0.0/0",)}, "every address"),
        ({"user_header": "X-User"}, "needs --trusted-proxy"),
        ({"trusted": (PROXY,), "user_header": "X-Forwarded-For"}, "header of its own"),
        ({"trusted": (PROXY,), "user_header": "a b"}, "header of its own"),
        ({"trusted": (PROXY,), "editors": ("ann",)}, "needs --user-header"),
        ({"root_path": "histo"}, "expected a path"),
        ({"root_path": "/a//b"}, "expected a path"),
        ({"root_path": "/a/../b"}, "expected a path"),
        ({"root_path": "/docs"}, "answers /docs itself"),
        ({"root_path": "/v1/x"}, "answers /v1 itself"),
    ],
)
def test_wrong_options_are_refused(options, says):
    with pytest.raises(BadInput, match=says):
        proxies_for(**options)


def test_addresses_are_read_in_every_notation():
    assert str(parsed("10.0.0.1:80")) == "10.0.0.1" and str(parsed("fe80::1%eth0")) == "fe80::1"
    assert parsed("unknown") is None and parsed("") is None and parsed("_hidden") is None


# -- over HTTP --------------------------------------------------------------------------------------


def test_a_host_that_lets_others_in_needs_users_or_a_proxy_that_names_them(monkeypatch):
    for name in ("HISTOSEEK_UI_AUTH", "HISTOSEEK_UI_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(BadInput, match="--user-header"):
        access_for("0.0.0.0", proxies=proxies_for((PROXY,)))
    assert access_for("0.0.0.0", proxies=NAMED).guarded


def test_users_that_the_proxy_names_are_readers_unless_said(serve, own_atlas):
    one = serve(own_atlas, Access(proxies=NAMED), peer=PROXY)
    for user, role in (("ann", "editor"), ("eve", "reader"), ("Zoë", "reader")):
        headers = {"x-forwarded-user": user.encode()}
        assert one.client.get("/v1/me", headers=headers).json() == {"user": user, "role": role}
    answer = one.client.get("/v1/me")
    assert answer.status_code == 401 and "x-forwarded-user" in answer.json()["error"]["message"]
    assert "www-authenticate" not in answer.headers
    forged = {"x-forwarded-user": "eve", "x-histoseek-user": "ann", "x-histoseek-role": "editor"}
    assert one.client.get("/v1/me", headers=forged).json() == {"user": "eve", "role": "reader"}
    answer = one.client.delete("/v1/slides/case-1", headers=forged)
    assert answer.status_code == 403 and "role editor" in answer.json()["error"]["message"]
    headers = {"x-forwarded-user": "ann", "x-forwarded-for": "203.0.113.9"}
    assert one.client.delete("/v1/slides/case-1", headers=headers).status_code == 200
    assert (one.lines()[-1]["user"], one.lines()[-1]["address"]) == ("ann", "203.0.113.9")


def test_a_client_cannot_say_that_it_is_the_proxy(serve, own_atlas, caplog):
    one = serve(own_atlas, Access(proxies=NAMED), peer="10.0.0.8")
    headers = {"x-forwarded-user": "ann", "x-forwarded-for": PROXY, "forwarded": f"for={PROXY}",
               "x-real-ip": PROXY}  # fmt: skip
    answer = one.client.get("/v1/me", headers=headers)
    assert (
        answer.status_code == 401
        and "send the request through the proxy" in answer.json()["error"]["message"]
    )
    assert "--trusted-proxy 10.0.0.8" in caplog.text
    caplog.clear()
    one.client.get("/v1/me", headers=headers)
    assert "--trusted-proxy" not in caplog.text, "once is enough"


def test_everyone_may_be_an_editor(serve, own_atlas):
    proxies = proxies_for((PROXY,), user_header="X-Forwarded-User", editors=("*",))
    one = serve(own_atlas, Access(proxies=proxies), peer=PROXY)
    assert one.client.get("/v1/me", headers={"x-forwarded-user": "x"}).json()["role"] == "editor"


def test_without_passwords_a_proxy_lets_no_other_machine_in(serve, own_atlas):
    one = serve(own_atlas, Access(proxies=proxies_for((PROXY,))), peer=PROXY)
    assert one.client.get("/info", headers={"x-forwarded-for": "127.0.0.1"}).status_code == 200
    answer = one.client.get("/info", headers={"x-forwarded-for": "203.0.113.9"})
    assert answer.status_code == 403 and "203.0.113.9" in answer.json()["error"]["message"]


def test_the_origin_is_compared_with_what_the_browser_asked_for(serve, own_atlas):
    access = Access({"a": "pw"}, hosts=None, proxies=proxies_for((PROXY,)))
    one = serve(own_atlas, access, peer=PROXY)
    told = {"x-forwarded-host": "atlas.example", "x-forwarded-proto": "https"}

    def post(origin, **headers):
        return one.client.post(
            "/v1/search",
            json={"like": [1]},
            auth=("a", "pw"),
            headers={"origin": origin, **headers},
        )

    assert post("https://atlas.example", **told).status_code == 200
    assert post("https://atlas.example:443", **told).status_code == 200
    for origin in (
        "http://atlas.example",
        "https://evil.example",
        "https://atlas.example:444",
        "null",
    ):
        answer = post(origin, **told)
        assert answer.status_code == 403, origin
        assert "X-Forwarded-Host" in answer.json()["error"]["message"]
    answer = post("https://atlas.example", host="127.0.0.1:7860")
    assert answer.status_code == 403
    assert "must send X-Forwarded-Host" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("headers", "says"),
    [
        ({}, ["browser's Host header", "proxy_set_header Host $http_host", "--trusted-proxy 10.0.0.8",
              "--allow-host"]),
        ({"x-forwarded-host": "atlas.example"}, ["X-Forwarded-Host was ignored;",
              "if 10.0.0.8 is the proxy, start with --trusted-proxy 10.0.0.8"]),
    ],
)  # fmt: skip
def test_the_refusal_names_the_header_that_is_missing(serve, own_atlas, headers, says):
    one = serve(own_atlas, peer="10.0.0.8")
    answer = one.client.post(
        "/v1/search", json={"like": [1]}, headers={"origin": "https://atlas.example", **headers}
    )
    assert answer.status_code == 403
    for part in ("https://atlas.example", "127.0.0.1:7860", *says):
        assert part in answer.json()["error"]["message"], part


@pytest.fixture
def asks(histoseek_ui, own_atlas):
    """Start a server with options; returns a function that asks it: status, headers and text."""

    def start(*options):
        port = free_port()
        up(port, histoseek_ui(own_atlas, "--port", port, *options), seconds=240)

        def ask(path, **headers):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
            given = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request("GET", path, headers=given)
            answer = connection.getresponse()
            found = answer.status, dict(answer.getheaders()), answer.read().decode()
            connection.close()
            return found

        ask.port = port
        return ask

    return start


def test_gradio_believes_nobody_but_the_guard(asks):
    """By itself it would take the address of its page from anyone's X-Forwarded-Host."""
    ask = asks()
    said = {"x_forwarded_host": "evil.example", "x_forwarded_proto": "https",
            "x_gradio_server": "http://evil.example"}  # fmt: skip
    assert json.loads(ask("/config", **said)[2])["root"] == f"http://127.0.0.1:{ask.port}"
    assert "evil.example" not in ask("/", **said)[2]


def test_page_and_api_answer_under_the_prefix_and_without(asks):
    ask = asks("--root-path", "/histo", "--trusted-proxy", "127.0.0.1")
    said = {"x_forwarded_proto": "https", "x_forwarded_host": "localhost"}
    for path in ("/config", "/histo/config"):
        assert json.loads(ask(path, **said)[2])["root"] == "https://localhost/histo", path
    for path in ("/", "/histo/"):
        assert "https://localhost/histo" in ask(path, **said)[2], path
    for path in (
        "/v1/slides",
        "/page-assets/page.js",
        "/theme.css",
        "/docs",
        "/health",
        "/openapi.json",
    ):
        assert ask(path)[0] == ask("/histo" + path)[0] == 200, path
    status, headers, _ = ask("/histo")
    assert (status, headers["location"]) == (307, "/histo/")
    assert json.loads(ask("/openapi.json")[2])["servers"] == [{"url": "/histo"}]
    assert "https://localhost/histo/v1/search" in ask("/histo/docs", **said)[2]
    assert ask("/histo/v1/nothing")[0] == ask("/histology/x")[0] == 404


def test_no_prefix_can_be_a_path_of_the_server(served_routes):
    _, found = served_routes()
    firsts = {path.split("/")[1].partition("=")[0] for path, _ in found if path}
    assert {"v1", "gradio_api", "config", "page-assets"} < firsts
    assert firsts - OWN_PATHS == set()
