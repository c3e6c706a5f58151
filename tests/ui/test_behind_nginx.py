"""Behind a real nginx, set up by the block in docs/ui.md: the page in Chromium, logins, addresses."""

import base64
import http.client
import json
import os
import re
import ssl
import subprocess
import time
import warnings
from pathlib import Path
from typing import Any, ClassVar

import pytest
from loopback import free_port, up

GUIDE = Path(__file__).parents[2] / "docs/ui.md"
NGINX = "/usr/sbin/nginx"
CHROMIUM = Path("/usr/bin/chromium")
NAME = "atlas.example.org"
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--no-first-run",
    f"--host-resolver-rules=MAP {NAME} 127.0.0.1",
]  # fmt: skip
PATIENCE = 60_000
FRAME = """
{user}pid {folder}/nginx.pid; error_log {folder}/error.log; daemon off;
events {{}}
http {{
  access_log {folder}/access.log; proxy_temp_path {folder}/proxy; client_body_temp_path {folder}/body;
  fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  {block}
}}
"""
STRIPS, LEAVES = "proxy_pass http://127.0.0.1:7860/;", "proxy_pass http://127.0.0.1:7860;"
NO_USER = 'proxy_set_header X-Forwarded-User "";'


def block():
    """Return nginx's block as docs/ui.md has it."""
    (found,) = re.findall(r"```nginx\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    return found


class Site:
    """nginx before a server: where each is, and the audit log."""

    def __init__(self, port, upstream, log, folder, server):
        self.port, self.upstream, self.log, self.folder = port, upstream, log, folder
        self.server = server
        self.root = f"https://{NAME}:{port}/histo/"

    def ask(self, path, method="GET", source="127.0.0.1", body=None, user=None, **headers):
        """Ask nginx from an address of the loopback network; headers with _ for -."""
        context = ssl._create_unverified_context()
        connection = http.client.HTTPSConnection(
            "127.0.0.1", self.port, timeout=30, context=context, source_address=(source, 0)
        )
        return self._answer(connection, path, method, body, user, headers, f"{NAME}:{self.port}")

    def ask_directly(self, path, method="GET", source="127.0.0.2", body=None, user=None, **headers):
        """Ask the server itself, as one may who passes nginx by."""
        connection = http.client.HTTPConnection(
            "127.0.0.1", self.upstream, timeout=30, source_address=(source, 0)
        )
        return self._answer(connection, path, method, body, user, headers, "127.0.0.1")

    def _answer(self, connection, path, method, body, user, headers, host):
        sent = {"Host": host} | {k.replace("_", "-"): v for k, v in headers.items()}
        if user:
            sent["Authorization"] = "Basic " + base64.b64encode(user.encode()).decode()
        if body is not None:
            sent["Content-Type"] = "application/json"
        connection.request(method, path, json.dumps(body) if body is not None else None, sent)
        answer = connection.getresponse()
        blob = answer.read()
        connection.close()
        return answer.status, dict(answer.getheaders()), blob

    def state(self):
        """Return what nginx and the server say of themselves, for a failure's message."""
        lines = []
        for name, ask in (("server", self.ask_directly), ("nginx", self.ask)):
            path, started = ("/health", "/histo/health")[name == "nginx"], time.monotonic()
            try:
                said = ask(path)[0]
            except OSError as error:
                said = repr(error)
            lines.append(f"{name} answers {path}: {said} in {time.monotonic() - started:.2f} s")
        for name in ("error.log", "access.log"):
            lines += [f"nginx's {name}:", *(self.folder / name).read_text().splitlines()[-12:]]
        said = self.server.stdout.read().decode(errors="replace")
        return "\n".join([*lines, "the server said:", said[-2_000:]])

    def said(self):
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@pytest.fixture
def behind(tmp_path, own_atlas, histoseek_ui):
    """Start histoseek and nginx before it, with the block of the docs; text of it may be replaced."""
    running = []

    def start(*options, users="", replace=()):
        port, upstream = free_port(), free_port()
        if users:
            (tmp_path / "users.txt").write_text(users)
            (tmp_path / "users.txt").chmod(0o600)
            options = ("--users", tmp_path / "users.txt", *options)
        env = {k: v for k, v in os.environ.items() if not k.startswith("HISTOSEEK_UI")}
        server = histoseek_ui(
            own_atlas, "--port", upstream, "--allow-host", NAME, *options, env=env
        )
        key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out",
             certificate, "-days", "2", "-subj", f"/CN={NAME}"], check=True, capture_output=True,
        )  # fmt: skip
        text = block()
        for old, new in (
            ("listen 443 ssl;", f"listen 127.0.0.1:{port} ssl;"),
            ("/etc/ssl/certs/atlas.pem", str(certificate)),
            ("/etc/ssl/private/atlas.key", str(key)),
            *replace,
            ("127.0.0.1:7860", f"127.0.0.1:{upstream}"),
        ):
            assert text.count(old) == 1, f"docs/ui.md has no longer once: {old}"
            text = text.replace(old, new)
        user = "user root; " if os.getuid() == 0 else ""
        config = tmp_path / "nginx.conf"
        config.write_text(FRAME.format(user=user, folder=tmp_path, block=text))
        process = subprocess.Popen(
            [NGINX, "-p", tmp_path, "-e", tmp_path / "error.log", "-c", config],
            stderr=subprocess.PIPE,
        )  # fmt: skip
        running.append(process)
        up(upstream, server, 180)
        site = Site(port, upstream, own_atlas / "audit.jsonl", tmp_path, server)
        deadline = time.monotonic() + 30
        while True:
            try:
                assert site.ask("/histo/health")[0] in {200, 401}
                return site
            except OSError:
                assert process.poll() is None, process.stderr.read()
                assert time.monotonic() < deadline, "nginx did not come up"
                time.sleep(0.05)

    yield start
    while Seen.opened:  # else they would go on asking a server that is gone
        Seen.opened.pop().close()
    for process in running:
        process.terminate()
        assert process.wait(20) == 0
        process.stderr.close()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = str(CHROMIUM) if CHROMIUM.exists() else None
        opened = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield opened
        opened.close()


class Seen:
    """A page with everything that went wrong on it."""

    opened: ClassVar[list[Any]] = []

    def __init__(self, browser, **options):
        self.context = browser.new_context(
            ignore_https_errors=True, viewport={"width": 1280, "height": 900}, **options
        )
        self.opened.append(self.context)
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE)
        self.wrong, self.requested, self.asked = [], [], set()
        self.page.on("request", lambda r: (self.requested.append(r.url), self.asked.add(r)))
        self.page.on("requestfinished", lambda r: self.asked.discard(r))
        self.page.on("requestfailed", self._failed)
        self.page.on(
            "response", lambda r: r.status >= 400 and self.wrong.append(f"{r.status} {r.url}")
        )
        self.page.on("pageerror", lambda e: self.wrong.append(str(e)))
        self.page.on("console", lambda m: m.type == "error" and self.wrong.append(m.text))

    def opens(self, site):
        """Open the page and wait until it can search.

        Twice, on a test machine, the page had not come after a minute, which nobody could repeat. So it is
        loaded again once; what each side knew then becomes a warning, or the failure's message.
        """
        from playwright.sync_api import TimeoutError as TookTooLong

        for attempt in (1, 2):
            try:
                self.page.goto(site.root)
                self.page.locator("#find").wait_for()
                return
            except TookTooLong as error:
                waiting = sorted(request.url for request in self.asked)
                message = (
                    f"attempt {attempt}: {error}\nwrong: {self.wrong}\nasked: {len(self.requested)}, "
                    f"not answered: {waiting}\nthe page: {self._told()}\n{site.state()}"
                )
                self.wrong.clear()
                self.asked.clear()
                if attempt == 2:
                    raise AssertionError(message) from error
                with warnings.catch_warnings():
                    warnings.simplefilter("default")
                    warnings.warn(message, stacklevel=2)

    def _told(self):
        """Return what the page itself says, if it says anything."""
        self.page.set_default_timeout(5_000)
        try:
            facts = "[document.readyState, document.visibilityState, document.body.innerText.slice(0, 500)]"
            return self.page.locator("html").evaluate(f"() => {facts}", timeout=5_000)
        except Exception as error:  # this must not hide what it belongs to
            return repr(error)
        finally:
            self.page.set_default_timeout(PATIENCE)

    def _failed(self, request):
        self.asked.discard(request)
        # Chromium ends so what a page that is left still asks for, and what becomes a download.
        if request.failure != "net::ERR_ABORTED":
            self.wrong.append(f"failed: {request.url} {request.failure}")

    def pictures_are_there(self, where):
        self.page.wait_for_function(
            """(where) => { const all = [...document.querySelectorAll(where)];
            return all.length && all.every((i) => i.complete && i.naturalWidth > 0); }""",
            arg=where,
        )

    def shot(self, name):
        folder = os.environ.get("HISTOSEEK_SCREENSHOTS")
        if folder:
            self.page.wait_for_timeout(400)
            self.page.screenshot(path=f"{folder}/{name}.png")


def walk(seen, site, picture):
    """Use the page as people do: search, open a hit, look at slides, the map and the API's description."""
    page, root = seen.page, site.root
    seen.opens(site)
    page.set_input_files("#hs-query-file", picture)
    page.locator("#hits .hs-card").first.wait_for()
    assert page.locator("#hits .hs-card").count() == 12
    seen.pictures_are_there("#hits img")
    seen.shot("behind-nginx-hits")
    with page.expect_download() as got:
        page.locator("#verdict a", has_text="CSV").click()
    assert Path(got.value.path()).read_text().startswith("rank,score,tile,slide")
    page.locator("#hits [data-open]").first.click()
    page.locator("dialog[open] figure").nth(1).wait_for()
    seen.pictures_are_there("dialog img")
    seen.shot("behind-nginx-context")
    page.keyboard.press("Escape")
    page.get_by_role("tab", name="Slides and cases").click()
    page.locator("#slides [data-slide='case-1']").first.click()
    page.locator("#slide-detail img.hs-overview").wait_for()
    seen.pictures_are_there("#slide-detail img.hs-overview")
    page.get_by_role("tab", name="Atlas").click()
    page.locator("#atlas-map .hs-maplegend li").first.wait_for()
    page.locator(".hs-cluster").first.wait_for()
    assert not seen.wrong, "\n".join(seen.wrong)
    links = [a for a in seen.requested if not a.startswith((root, "data:", "blob:"))]
    assert links == [], "asked outside of the path"
    page.goto(f"{root}docs")
    page.get_by_text("HTTP API").first.wait_for()
    assert root.rstrip("/") + "/v1/search" in page.inner_text("body")
    link = page.get_by_role("link", name="openapi.json").evaluate("a => a.href")
    assert link == f"{root}openapi.json"
    assert (
        page.evaluate("async (u) => (await fetch(u)).json()", link)["servers"][0]["url"] == "/histo"
    )
    assert not seen.wrong, "\n".join(seen.wrong)


@pytest.fixture
def picture(tile_folder):
    return sorted((tile_folder / "cat").iterdir())[0]


ANNA = "anna:sesame-sesame"
LOGIN = {"username": "anna", "password": "sesame-sesame"}


def test_the_page_works_under_a_path(behind, browser, picture):
    site = behind("--trusted-proxy", "127.0.0.1", users=ANNA)
    status, headers, _ = site.ask("/histo")
    assert status == 301 and headers["Location"] == site.root
    assert site.ask("/histo/v1/slides")[0] == 401
    text = site.ask("/histo/", user=ANNA)[2].decode()
    assert 'href="manifest.json"' in text and 'href="favicon.ico"' in text
    assert not re.findall(r'(?:href|src)="/[^"]*"', text), "linked from the root of the host"
    seen = Seen(browser, http_credentials=LOGIN)
    walk(seen, site, picture)
    seen.opens(site)
    seen.page.get_by_role("tab", name="Atlas").click()
    form = seen.page.locator(".hs-rename").first
    form.locator("[name=name]").fill("stroma")
    form.get_by_role("button", name="Save").click()
    form.get_by_text("Saved.").wait_for()
    assert not seen.wrong, "\n".join(seen.wrong)
    assert {"search", "rename"} <= {line["action"] for line in site.said()}
    assert {line["user"] for line in site.said()} == {"anna"}


def test_a_proxy_that_leaves_the_path_as_it_is(behind, browser, picture):
    site = behind(
        "--trusted-proxy", "127.0.0.1", "--root-path", "/histo", users=ANNA,
        replace=[("proxy_set_header X-Forwarded-Prefix /histo;", ""), (STRIPS, LEAVES)],
    )  # fmt: skip
    status, _, blob = site.ask("/histo/v1/me", user=ANNA)
    assert (status, json.loads(blob)) == (200, {"user": "anna", "role": "editor"})
    walk(Seen(browser, http_credentials=LOGIN), site, picture)


def test_a_reader_sees_no_button_that_changes_something(behind, browser, picture):
    site = behind(
        "--trusted-proxy", "127.0.0.1", "--user-header", "X-Forwarded-User", "--editor", "eve",
        replace=[(NO_USER, 'proxy_set_header X-Forwarded-User "rita";')],
    )  # fmt: skip
    seen = Seen(browser)
    walk(seen, site, picture)
    seen.opens(site)
    seen.page.locator("html[data-role=reader]").wait_for(state="attached")
    seen.page.get_by_role("tab", name="Atlas").click()
    seen.page.locator(".hs-cluster").first.wait_for()
    assert seen.page.locator(".hs-rename").first.is_hidden()
    seen.page.get_by_role("tab", name="New slide").click()
    seen.page.locator("#readers-note").get_by_text("editor").first.wait_for()
    assert seen.page.locator("#add").is_hidden()
    seen.shot("behind-nginx-reader")
    assert not seen.wrong, "\n".join(seen.wrong)
    status, _, blob = site.ask("/histo/v1/slides/case-1", "DELETE")
    assert status == 403 and "needs the role editor" in json.loads(blob)["error"]["message"]


SEARCH = {"like": [1], "k": 1}


def test_the_address_is_the_clients_and_nobody_makes_it_up(behind):
    site = behind("--trusted-proxy", "127.0.0.1", users=ANNA)
    for spoofed in ("10.9.9.9", "127.0.0.1", "10.9.9.9, 127.0.0.1", "nonsense"):
        status, _, _ = site.ask(
            "/histo/v1/search", "POST", "127.0.0.2", SEARCH, ANNA, X_Forwarded_For=spoofed
        )
        assert status == 200 and site.said()[-1]["address"] == "127.0.0.2", spoofed
    status, _, _ = site.ask_directly(
        "/v1/search", "POST", "127.0.0.3", SEARCH, ANNA,
        X_Forwarded_For="10.9.9.9", X_Forwarded_Host="evil.example", X_Forwarded_Prefix="/evil",
        X_Forwarded_Proto="https",
    )  # fmt: skip
    assert status == 200 and site.said()[-1]["address"] == "127.0.0.3"
    _, _, blob = site.ask_directly("/", user=ANNA, X_Forwarded_Host="evil.example")
    assert b"evil" not in blob
    _, _, blob = site.ask_directly("/openapi.json", user=ANNA, X_Forwarded_Prefix="/evil")
    assert b"/evil" not in blob


def test_guessing_at_one_user_locks_nobody_else(behind):
    site = behind("--trusted-proxy", "127.0.0.1", users=f"{ANNA}\nbob:secret-secret\n")

    def login(user, source):
        return site.ask("/histo/v1/slides", source=source, user=user)[0]

    assert [login("bob:wrong", "127.0.0.2") for _ in range(12)] == [401] * 10 + [429] * 2
    assert login("bob:secret-secret", "127.0.0.2") == 429, "slowed down here"
    assert login("bob:secret-secret", "127.0.0.3") == 200, "and nowhere else"
    assert login(ANNA, "127.0.0.2") == login(ANNA, "127.0.0.3") == 200


def test_the_proxy_names_the_user_and_nobody_else_does(behind):
    auth = (
        "auth_basic histo; auth_basic_user_file people; "
        "proxy_set_header X-Forwarded-User $remote_user;"
    )
    site = behind(
        "--trusted-proxy", "127.0.0.1", "--user-header", "X-Forwarded-User", "--editor", "eve",
        replace=[(NO_USER, auth)],
    )  # fmt: skip
    (site.folder / "people").write_text("eve:{PLAIN}apple\nrita:{PLAIN}pear\n")
    for user, role in (("eve:apple", "editor"), ("rita:pear", "reader")):
        _, _, blob = site.ask("/histo/v1/me", user=user, X_Forwarded_User="eve")
        assert json.loads(blob) == {"user": user.partition(":")[0], "role": role}
    assert site.ask("/histo/v1/me", user="rita:apple", X_Forwarded_User="eve")[0] == 401
    assert site.ask("/histo/v1/me", X_Forwarded_User="eve")[0] == 401
    status, _, blob = site.ask_directly("/v1/me", X_Forwarded_User="eve")
    assert (
        status == 401
        and "send the request through the proxy" in json.loads(blob)["error"]["message"]
    )


def test_a_proxy_that_hides_the_host_is_told_which_header_is_missing(behind, browser):
    origin = {"Origin": f"https://{NAME}"}
    site = behind(
        "--trusted-proxy", "127.0.0.1", users=ANNA,
        replace=[("proxy_set_header Host $http_host;", "proxy_set_header Host $proxy_host;"),
                 ("proxy_set_header X-Forwarded-Host $http_host;", "")],
    )  # fmt: skip
    status, _, blob = site.ask("/histo/v1/search", "POST", body=SEARCH, user=ANNA, **origin)
    told = json.loads(blob)["error"]["message"]
    assert status == 403 and "must send X-Forwarded-Host and X-Forwarded-Proto" in told
    assert f"127.0.0.1:{site.upstream}" in told and origin["Origin"] in told
    status, _, blob = site.ask_directly(
        "/v1/search", "POST", body=SEARCH, user=ANNA, X_Forwarded_Host=NAME, **origin
    )
    told = json.loads(blob)["error"]["message"]
    assert status == 403 and "start with --trusted-proxy 127.0.0.2" in told
    page = Seen(browser, http_credentials=LOGIN).page
    page.goto(site.root)
    told = page.locator("body > .hs-problem[role=alert]").inner_text()
    assert "must send Host or X-Forwarded-Host" in told and f"127.0.0.1:{site.upstream}" in told


def test_a_proxy_that_hides_the_path_is_named_on_the_page(behind, browser):
    site = behind(users=ANNA, replace=[("proxy_set_header X-Forwarded-Prefix /histo;", "")])
    page = Seen(browser, http_credentials=LOGIN).page
    page.goto(site.root)
    told = page.locator("body > .hs-problem[role=alert]").inner_text()
    assert "must send X-Forwarded-Prefix (or start with --root-path)" in told and site.root in told
