"""Logins: passwords, their hashes, protection against guessing, and roles."""

import asyncio
import base64
import json
import os
import pty
import subprocess
import sys
import threading
import time

import pytest

from histoseek.errors import BadInput
from histoseek.ui.access import logins
from histoseek.ui.access.logins import Failures, Logins, MustWait
from histoseek.ui.access.policy import Access, access_for, claim_of
from histoseek.ui.access.roles import READING, changes
from histoseek.ui.access.users import hash_password, matches, read_users

TOKEN = "0123456789abcdef0123"
ANN = hash_password("geheim:geheim")
HASHED = Access({"ann": ANN, "bob": hash_password("secret")}, TOKEN, roles={"bob": "reader"})


def basic(user, password):
    return {"authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


@pytest.fixture
def users_file(tmp_path, monkeypatch):
    for name in ("HISTOSEEK_UI_AUTH", "HISTOSEEK_UI_TOKEN"):
        monkeypatch.delenv(name, raising=False)

    def write(text):
        path = tmp_path / "users"
        path.write_text(text)
        path.chmod(0o600)
        return path

    return write


# -- the file ---------------------------------------------------------------------------------------


def test_lines_hold_hashes_and_roles(users_file):
    found = read_users(users_file(f"# us\nann:{ANN}\neve:{ANN}:reader\nzoë:{ANN}:editor\n"))
    assert found.roles == {"ann": "editor", "eve": "reader", "zoë": "editor"}
    assert set(found.secrets.values()) == {ANN}
    assert len(found.notes) == 1 and "no role for ann" in found.notes[0]
    assert access_for("0.0.0.0", users_file(f"ann:{ANN}\n")).role("ann") == "editor"


def test_plain_passwords_are_read_and_warned_of_without_being_shown(users_file):
    found = read_users(users_file("ann:pw:with:colons\n"))
    assert found.secrets == {"ann": "pw:with:colons"}
    assert "--hash-password" in found.notes[0] and "ann" in found.notes[0]
    assert not any("colons" in note for note in found.notes)
    assert "colons" not in repr(found) + repr(
        access_for("0.0.0.0", users_file("ann:pw:with:colons\n"))
    )


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("ann", "expected user:HASH"), (":pw", "expected user:HASH"), ("ann:", "expected user:HASH"),
        (f"ann:{ANN}:admin", "role is 'admin'"), (f"ann:{ANN}:", "role is ''"),
        (f"ann:{ANN[:-9]}", "truncated or changed"),
        ("ann:$argon2id$v=19$m=1", "truncated or changed"), ("ann:$2y$10$abcdefg", "not argon2id"),
        ("ann:$6$salt$x", "not argon2id"), ("ann:secret:reader", "needs a hashed password"),
        ("token:pw", "is reserved"), ("ann:pw\nann:pw2", "line 2: user 'ann' is listed twice"),
    ],
    ids=range(12),  # a hash is another one in every worker
)  # fmt: skip
def test_lines_that_cannot_be_meant_are_refused_without_their_secret(users_file, line, says):
    with pytest.raises(BadInput) as caught:
        read_users(users_file(line + "\n"))
    assert says in str(caught.value) and "secret:" not in str(caught.value)
    assert "argon2id$v" not in str(caught.value)


def test_a_user_of_the_environment_may_be_hashed_and_the_file_counts(users_file, monkeypatch):
    monkeypatch.setenv("HISTOSEEK_UI_AUTH", f"ann:{ANN}:reader")
    assert read_users(None).roles == {"ann": "reader"}
    found = read_users(users_file(f"ann:{ANN}:editor\n"))
    assert (
        found.roles == {"ann": "editor"}
        and "the file's password and role are used" in found.notes[0]
    )


def test_hashes_match_their_password_only():
    assert hash_password("x") != hash_password("x"), "a salt of its own"
    assert matches(ANN, "geheim:geheim") and not matches(ANN, "geheim") and not matches(ANN, ANN)
    assert matches("plain", "plain") and not matches("plain", "plai")
    assert HASHED.check(claim_of(basic("ann", "geheim:geheim")["authorization"])) == "ann"
    assert HASHED.check(claim_of(basic("nobody", "geheim:geheim")["authorization"])) is None
    assert HASHED.check(claim_of(basic("x", TOKEN)["authorization"])) == "token"


def hashing(*options, **more):
    command = [sys.executable, "-m", "histoseek", "ui", "--hash-password", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **more)


def test_the_command_prints_a_hash_of_what_it_reads():
    done = hashing(input="größe 7\n")
    assert done.returncode == 0 and matches(done.stdout.strip(), "größe 7")
    done = hashing("--json", input="pw\n")
    assert matches(json.loads(done.stdout)["hash"], "pw")
    done = hashing(input="")
    assert done.returncode == 1 and "0 characters" in done.stderr


def test_the_command_asks_twice_and_shows_nothing():
    for second, status in (("pw-one", 0), ("pw-two", 1)):
        master, slave = pty.openpty()
        command = [sys.executable, "-m", "histoseek", "ui", "--hash-password"]
        process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        os.close(slave)
        time.sleep(4)  # a terminal drops what is typed before it stops echoing
        os.write(master, b"pw-one\n")
        time.sleep(0.5)
        os.write(master, second.encode() + b"\n")
        out, error = process.communicate(timeout=60)
        os.close(master)
        assert process.returncode == status, error
        assert b"pw-" not in out + error.replace(b"the two passwords differ", b"")
        assert status or matches(out.decode().strip(), "pw-one")


# -- guessing ---------------------------------------------------------------------------------------


def run(access, *asked):
    """Ask one after another; returns user, None, or the message of a refusal."""
    checked = Logins(access)

    async def all_of_them():
        found = []
        for header, address in asked:
            try:
                found.append(await checked.who(header["authorization"], address))
            except MustWait as error:
                found.append(str(error))
        return found

    try:
        return asyncio.run(all_of_them())
    finally:
        checked.close()


PLAIN = Access({"ann": "geheim", "bob": "secret"}, TOKEN)


@pytest.mark.parametrize("access", [PLAIN, HASHED], ids=["plain", "hashed"])
def test_guessing_at_one_user_locks_that_user_there_only(access):
    password = "geheim" if access is PLAIN else "geheim:geheim"
    wrong = [(basic("bob", f"wrong{n}"), "10.0.0.7") for n in range(10)]
    found = run(
        access, *wrong,
        (basic("bob", "secret"), "10.0.0.7"), (basic("bob", "secret"), "10.0.0.8"),
        (basic("ann", password), "10.0.0.7"), ({"authorization": f"Bearer {TOKEN}"}, "10.0.0.7"),
    )  # fmt: skip
    assert found[:10] == [None] * 10
    assert found[10] == "too many wrong passwords for this user from this address; wait a minute"
    assert found[11:] == ["bob", "ann", "token"]


def test_a_password_that_was_right_does_not_open_a_lock():
    """Else one could go on guessing at somebody who is logged in."""
    found = run(
        PLAIN, (basic("bob", "secret"), "10.0.0.7"),
        *[(basic("bob", f"w{n}"), "10.0.0.7") for n in range(10)], (basic("bob", "secret"), "10.0.0.7"),
    )  # fmt: skip
    assert found[0] == "bob" and "for this user" in found[-1]


def test_guessing_at_many_users_locks_the_address_but_not_who_is_known_there():
    spray = [(basic(f"user{n}", "123456"), "10.0.0.7") for n in range(100)]
    known, new = (basic("ann", "geheim"), "10.0.0.7"), (basic("bob", "secret"), "10.0.0.7")
    found = run(PLAIN, known, *spray, known, new, (basic("bob", "secret"), "10.0.0.8"))
    assert found[1:101] == [None] * 100
    assert (
        found[101] == "ann" and "passwords from this address" in found[102] and found[103] == "bob"
    )


def test_a_locked_address_does_not_tell_whose_password_is_remembered():
    """What is remembered answers even then; guesses at it count, so that there are ten and not more."""
    place = "10.0.0.7"
    spray = [(basic(f"user{n}", "123456"), place) for n in range(100)]
    guesses = [(basic("ann", f"guess{n}"), place) for n in range(10)]
    right = (basic("ann", "geheim"), place)
    found = run(PLAIN, right, *spray, *guesses, right, (right[0], "10.0.0.8"))
    assert all("passwords from this address" in text for text in found[101:111])
    assert "for this user" in found[111] and found[112] == "ann"


def test_an_ipv6_client_does_not_get_around_it_by_other_addresses_of_its_own():
    found = run(
        PLAIN, *[(basic("bob", f"w{n}"), f"2001:db8::{n}") for n in range(10)],
        (basic("bob", "secret"), "2001:db8::ffff"), (basic("bob", "secret"), "2001:db8:0:1::1"),
    )  # fmt: skip
    assert "for this user" in found[-2] and found[-1] == "bob"


def test_a_lock_ends_after_its_minute(monkeypatch):
    monkeypatch.setattr(logins, "FAILURES_S", 0.0)
    wrong = [(basic("bob", f"w{n}"), "10.0.0.7") for n in range(10)]
    assert run(PLAIN, *wrong, (basic("bob", "secret"), "10.0.0.7"))[-1] == "bob"


def test_what_is_remembered_is_bounded():
    counted = Failures(3, keys=50)
    for n in range(1000):
        counted.add(str(n).encode())
    assert len(counted) == 50 and not counted.full(b"999")
    [counted.add(b"999") for _ in range(2)]
    assert counted.full(b"999")
    counted.take_back(b"999")
    assert not counted.full(b"999")


def test_many_at_once_are_no_way_around_the_limit():
    checked = Logins(HASHED)

    async def ask(password):
        try:
            return await checked.who(basic("bob", password)["authorization"], "10.0.0.7")
        except MustWait as error:
            return str(error)

    async def all_of_them():
        return await asyncio.gather(*[ask(f"wrong{n}") for n in range(40)])

    found = asyncio.run(all_of_them())
    checked.close()
    assert found.count(None) == 10
    assert sum("for this user" in str(text) for text in found) == 30


def test_a_hash_is_checked_once_and_nobody_waits_meanwhile(monkeypatch):
    """A browser asks twenty times at once with the same password."""
    checks, released = [], threading.Event()
    check = Access.check

    def slow(self, claim):
        checks.append(claim.user)
        released.wait(10)
        return check(self, claim)

    monkeypatch.setattr(Access, "check", slow)
    checked = Logins(HASHED)
    header = basic("ann", "geheim:geheim")["authorization"]

    async def all_of_them():
        asked = [asyncio.ensure_future(checked.who(header, "10.0.0.7")) for _ in range(20)]
        await asyncio.sleep(0.1)  # the loop goes on
        assert not any(task.done() for task in asked)
        released.set()
        found = await asyncio.gather(*asked)
        return [
            *found,
            await checked.who(header, "10.0.0.7"),
            await checked.who(header, "10.0.0.9"),
        ]

    assert asyncio.run(all_of_them()) == ["ann"] * 22
    checked.close()
    assert checks == ["ann"]


def test_a_right_password_is_remembered_for_minutes_only(monkeypatch):
    monkeypatch.setattr(logins, "REMEMBER_S", 0.0)
    checks = []
    check = Access.check
    monkeypatch.setattr(Access, "check", lambda self, claim: checks.append(1) or check(self, claim))
    header = basic("ann", "geheim")
    assert run(PLAIN, (header, "a"), (header, "a"), (basic("ann", "geheim "), "a")) == [
        "ann",
        "ann",
        None,
    ]
    assert len(checks) == 3


# -- roles ------------------------------------------------------------------------------------------


def test_every_route_that_may_change_something_refuses_a_reader(served_routes):
    one, found = served_routes(HASHED)
    safe = {"GET", "HEAD", "OPTIONS"}
    routes = [(method, path) for path, methods in found for method in methods - safe]
    assert {("POST", "/v1/slides"), ("DELETE", "/v1/slides/{slide}")} < set(routes)
    read, refused = set(), set()
    for method, path in routes:
        real = (
            path.replace("{slide}", "case-1").replace("{cluster}", "1").replace("{rest:path}", "x")
        )
        real = real.replace("{api_name}", "x").replace("{api_name:path}", "x")
        if real == "/health":  # answers everyone, and nothing but GET
            assert one.client.request(method, real).status_code == 405
            continue
        if not changes(method, real):
            read.add((method, path))
            continue
        answer = one.client.request(method, real, auth=("bob", "secret"))
        assert answer.status_code == 403, (method, path)
        assert "needs the role editor" in answer.json()["error"]["message"]
        refused.add((method, path))
    assert read == {
        *[("POST", path) for path in READING],
        *[("POST", f"/gradio_api/{path}") for path in GRADIO_READS],
    }
    assert {("PUT", "/v1/clusters/{cluster}"), ("POST", "/v1/slides")} < refused
    assert {slide["name"] for slide in one.session.atlas.slides()} >= {"case-1", "case-2"}


GRADIO_READS = {
    "call/v2/{api_name}",
    "call/v2/{api_name}/",
    "api/{api_name}", "api/{api_name}/", "call/{api_name}", "call/{api_name}/", "cancel",
    "component_server",
    "component_server/", "queue/join", "reset", "reset/", "run/{api_name}", "run/{api_name}/", "upload",
}  # fmt: skip


def test_a_reader_searches_and_an_editor_changes(serve, own_atlas):
    one = serve(own_atlas, HASHED)
    bob, ann = {"auth": ("bob", "secret")}, {"auth": ("ann", "geheim:geheim")}
    assert one.client.get("/v1/me", **bob).json() == {"user": "bob", "role": "reader"}
    assert one.client.get("/v1/me", **ann).json() == {"user": "ann", "role": "editor"}
    token = {"headers": {"authorization": f"Bearer {TOKEN}"}}
    assert one.client.get("/v1/me", **token).json() == {"user": "token", "role": "editor"}
    assert one.client.post("/v1/search", json={"like": [1]}, **bob).status_code == 200
    name = {"name": "n", "description": "", "clustering": "kmeans"}
    refused = one.client.put("/v1/clusters/1", json=name, **bob)
    assert refused.status_code == 403 and refused.json()["error"]["code"] == "role"
    for path in ("/v1/search/", "/v1//search", "/v1/search/../slides", "/V1/search"):
        assert one.client.post(path, json={}, **bob).status_code == 403, path
    assert one.client.delete("/v1/slides/case-1", **bob).status_code == 403
    assert one.client.delete("/v1/slides/case-1", **ann).status_code == 200


def test_without_passwords_everyone_on_the_machine_is_an_editor(serve, own_atlas):
    assert serve(own_atlas).client.get("/v1/me").json() == {"user": "-", "role": "editor"}
