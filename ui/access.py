"""Who may ask, how much, and what goes with every answer: the layer around the page and the API.

Everything but ``/health`` passes here: the host that was asked for, the origin of the page that asks, user
and password or token, the size of the body, the number of requests under way. Every answer carries a
request id and headers that keep a browser from doing more with it than showing it.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import ipaddress
import json
import logging
import os
import re
import secrets
import stat
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

from ..errors import BadInput, TooLarge
from .traffic import Traffic

USER = "x-histoseek-user"
REQUEST_ID = "x-request-id"
AUTH = "HISTOSEEK_UI_AUTH"
TOKEN = "HISTOSEEK_UI_TOKEN"
TOKEN_LEAST = 16
FAILURES = 10
"""Wrong passwords from one address within a minute, after which it must wait."""
FAILURES_S = 60.0
LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
CONTENT_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' "
    "'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src "
    "'self' blob:; frame-ancestors 'none'; object-src 'none'; base-uri 'self'; form-action 'self'"
)
HEADERS = {
    b"content-security-policy": CONTENT_POLICY.encode(),
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-opener-policy": b"same-origin",
    b"cross-origin-resource-policy": b"same-origin",
    b"permissions-policy": b"camera=(), microphone=(), geolocation=()",
}
SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
LARGE = "/v1/slides"
"""Where slides are uploaded, as a form: they are larger than pictures, and go to the disk."""

STREAMS = ("/gradio_api/heartbeat", "/gradio_api/queue/data")
"""What a page keeps open as long as it is looked at; it does not count as a request under way."""

READ_S = 60.0
"""For which a caller may neither send nor take anything."""
PIECE_BYTES = 2**18
DRAIN_S = 3.0
CLOSING_S = 0.3
"""How often what is kept open looks whether the server closes."""

log = logging.getLogger("histoseek.access")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


@dataclass(frozen=True)
class Limits:
    """How much is accepted.

    Attributes:
        body_bytes: of a request.
        slide_bytes: of a request that uploads a slide.
        requests: under way at the same time; more are turned away.
        bytes_under_way: of all bodies of requests under way, but for slides, which go to the disk.
    """

    body_bytes: int = 64 * 2**20
    slide_bytes: int = 8 * 2**30
    requests: int = 256
    bytes_under_way: int = 512 * 2**20


@dataclass(frozen=True)
class Access:
    """Who may ask.

    Attributes:
        users: passwords by user.
        token: that stands for a user of its own; "" for none.
        hosts: names by which the server may be asked for; None for any.
        limits: how much is accepted.
    """

    users: dict[str, str] = field(default_factory=dict, repr=False)
    token: str = field(default="", repr=False)
    hosts: frozenset[str] | None = LOCAL_NAMES
    limits: Limits = field(default_factory=Limits)

    @property
    def guarded(self) -> bool:
        """Whether one must say who one is."""
        return bool(self.users or self.token)

    def who(self, header: str) -> str | None:
        """Return the user that an ``Authorization`` header proves; None if it proves none.

        Takes as long for a wrong user as for a wrong password.
        """
        kind, _, value = header.partition(" ")
        value = value.strip()
        if kind.lower() == "bearer":
            return "token" if self._is_token(value) else None
        if kind.lower() != "basic":
            return None
        try:
            user, _, password = base64.b64decode(value, validate=True).decode().partition(":")
        except (binascii.Error, ValueError):
            return None
        found = None
        for name, known in self.users.items():
            same_name = hmac.compare_digest(name.encode(), user.encode())
            same_password = hmac.compare_digest(known.encode(), password.encode())
            if same_name and same_password:
                found = name
        # A browser asks for a user and a password: any user does with the token.
        if found is None and self._is_token(password):
            found = "token"
        return found

    def _is_token(self, value: str) -> bool:
        same = hmac.compare_digest(self.token.encode(), value.encode())
        return same and bool(self.token)


def access_for(
    host: str,
    users_file: Path | None = None,
    allowed: tuple[str, ...] = (),
    limits: Limits | None = None,
) -> Access:
    """Return who may ask a server that listens on ``host``.

    Users come from ``HISTOSEEK_UI_AUTH=user:password`` and from a file, a token from
    ``HISTOSEEK_UI_TOKEN``.

    Args:
        host: address to listen on.
        users_file: lines ``user:password``, readable by its owner only.
        allowed: further names by which the server may be asked for, such as that of a proxy.
        limits: how much is accepted.

    Raises:
        BadInput: others can reach it and nobody need say who they are; or users that cannot be read.
    """
    users = _users(users_file)
    token = os.environ.get(TOKEN, "")
    if token and len(token) < TOKEN_LEAST:
        raise BadInput(
            f"{TOKEN} has {len(token)} characters; expected at least {TOKEN_LEAST}, such as "
            "`openssl rand -hex 24` makes"
        )
    local = is_local(host)
    if (not local or allowed) and not users and not token:
        way = f"--host {host}" if not local else f"--allow-host {allowed[0]}"
        raise BadInput(
            f"{way} lets other machines in, and the page shows patients' tissue; set {AUTH}=user:password, "
            f"{TOKEN} or --users FILE first, or listen on 127.0.0.1"
        )
    hosts = LOCAL_NAMES | {name.lower() for name in allowed} if local else None
    return Access(users, token, hosts, limits or Limits())


def is_local(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _users(path: Path | None) -> dict[str, str]:
    users = {}
    given = os.environ.get(AUTH)
    if given:
        user, _, password = given.partition(":")
        if not user or not password:
            raise BadInput(f"{AUTH} is set but not as user:password; correct or unset it")
        users[user] = password
    if path is None:
        return users
    try:
        mode = path.stat().st_mode
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--users {path} cannot be read ({error}); check the path") from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise BadInput(f"--users {path} can be read by others; run: chmod 600 {path}")
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        user, _, password = line.partition(":")
        if not user or not password:
            raise BadInput(f"--users {path}, line {number}: expected user:password")
        users[user] = password
    if not users:
        raise BadInput(f"--users {path} names no user; expected lines user:password")
    return users


class Guard:
    """The layer around the app (ASGI)."""

    def __init__(self, app: Any, access: Access, traffic: Traffic) -> None:
        """Wrap an app.

        Args:
            app: ASGI.
            access: who may ask.
            traffic: counts what was asked.
        """
        self._app = app
        self._access = access
        self._traffic = traffic
        self._under_way = 0
        self._bytes = 0
        self._lock = threading.Lock()
        self._failures: dict[str, deque[float]] = {}
        self._closing = False

    def close(self) -> None:
        """End what pages keep open, so that the server can stop at once."""
        self._closing = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or let it through."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # nothing here speaks over web sockets
            await send({"type": "websocket.close", "code": 1008})
            return
        await _Exchange(self, scope, receive, send).run()


class _Exchange:
    """One request and its answer."""

    def __init__(self, guard: Guard, scope: Scope, receive: Receive, send: Send) -> None:
        self.guard, self.access = guard, guard._access
        self.scope, self._receive, self._send = scope, receive, send
        self.headers = {k.lower(): v for k, v in scope["headers"]}
        self.path: str = scope["path"]
        self.method: str = scope["method"]
        given = self.text(REQUEST_ID)
        self.id = given if re.fullmatch(r"[\w.\-]{1,64}", given, re.ASCII) else secrets.token_hex(8)
        self.user = "-"
        self.stream = self.path.startswith(STREAMS)
        self.status = 0
        self.received = 0
        self.held = 0
        self.over = False
        self.pending: asyncio.Future[Message] | None = None
        self.cut: tuple[int, str, str] | None = None
        self.started = time.perf_counter()
        form = self.text("content-type").lower().startswith("multipart/form-data")
        large = self.path == LARGE and self.method == "POST" and form
        limits = self.access.limits
        self.limit = limits.slide_bytes if large else limits.body_bytes
        self.large = large

    def text(self, name: str) -> str:
        """Return a header, "" if there is none."""
        return str(self.headers.get(name.encode(), b"").decode("latin-1"))

    async def run(self) -> None:
        counted = False
        try:
            refused = self._refusal()
        except ValueError:  # a header that is none, such as an origin that is no address
            refused = 422, "bad_input", "a header of the request cannot be read", {}
        if refused is None and self.path != "/health" and not self.stream:
            with self.guard._lock:
                if self.guard._under_way >= self.access.limits.requests:
                    refused = 429, "busy", "too many requests are under way; ask again in a moment", {
                        b"retry-after": b"1"
                    }  # fmt: skip
                else:
                    self.guard._under_way += 1
                    counted = True
        try:
            if refused is not None:
                await self._refuse(*refused)
            else:
                self._hand_on()
                await self._let_through()
        finally:
            if self.pending is not None:
                self.pending.cancel()
            with self.guard._lock:
                self.guard._under_way -= counted
                self.guard._bytes -= self.held
            seconds = time.perf_counter() - self.started
            self.guard._traffic.count(self.scope, self.method, self.status, seconds)
            refused_or_failed = self.status in {0, 401, 429} or self.status >= 500
            log.log(
                logging.WARNING if refused_or_failed else logging.INFO,
                "%s %s %s %d %.0f ms user=%s id=%s",
                self.address, self.method, self.path, self.status, 1000 * seconds, self.user, self.id,
            )  # fmt: skip

    @property
    def address(self) -> str:
        """Who asks, as far as the network knows."""
        client = self.scope.get("client")
        return client[0] if client else "-"

    async def _let_through(self) -> None:
        try:
            await self._app(self._bounded, self._unless_too_much)
        except Exception:
            if self.cut is None:
                raise
        if self.cut is not None and not self.status:
            more = {b"connection": b"close"} | (
                {b"retry-after": b"1"} if self.cut[0] == 429 else {}
            )
            await self._refuse(*self.cut, more)

    async def _unless_too_much(self, message: Message) -> None:
        """Pass the answer on, unless it is to a body that was cut off."""
        if self.cut is None or self.status:
            await self._answer(message)

    async def _app(self, receive: Receive, send: Send) -> None:
        await self.guard._app(self.scope, receive, send)

    def _hand_on(self) -> None:
        """Tell the app who asks; what a caller says of itself under these names is dropped."""
        own = {USER.encode(), REQUEST_ID.encode()}
        headers = [(k, v) for k, v in self.scope["headers"] if k.lower() not in own]
        headers += [(USER.encode(), self.user.encode()), (REQUEST_ID.encode(), self.id.encode())]
        self.scope["headers"] = headers

    def _refusal(self) -> tuple[int, str, str, dict[bytes, bytes]] | None:
        if self.path == "/health":
            return None
        host = _host_name(self.text("host"))
        hosts = self.access.hosts
        if hosts is not None and host not in hosts:
            text = f"host {host[:100]!r} is not served here; start with --allow-host {host[:100]}"
            return 421, "wrong_host", text, {}
        if self._foreign():
            return 403, "foreign_origin", "a page of another site may not ask for this", {}
        if self.access.guarded:
            refused = self._credentials()
            if refused is not None:
                return refused
        length = self.text("content-length")
        if length.isdigit() and int(length) > self.limit:
            text = f"the body has {int(length):,} bytes; at most {self.limit:,} are accepted"
            return 413, "too_large", text, {b"connection": b"close"}
        return None

    def _foreign(self) -> bool:
        """Whether a page of another site asks for something to be done."""
        if self.method in SAFE:
            return False
        if self.text("sec-fetch-site") in {"cross-site", "same-site"}:
            return True
        origin = self.text("origin")
        return bool(origin) and urlsplit(origin).netloc.lower() != self.text("host").lower()

    def _credentials(self) -> tuple[int, str, str, dict[bytes, bytes]] | None:
        failures = self.guard._failures.setdefault(self.address, deque(maxlen=FAILURES))
        now = time.monotonic()
        header = self.text("authorization")
        if len(failures) == FAILURES and now - failures[0] < FAILURES_S:
            text = "too many wrong passwords; wait a minute"
            return 429, "too_many_failures", text, {b"retry-after": b"60"}
        user = self.access.who(header) if header else None
        if user is not None:
            self.user = user
            failures.clear()
            return None
        if header:
            failures.append(now)
            if len(self.guard._failures) > 10_000:
                self.guard._failures.clear()
        challenge = {b"www-authenticate": b'Basic realm="histoseek", charset="UTF-8"'}
        return 401, "unauthorized", "say who you are: user and password, or a token", challenge

    async def _bounded(self) -> Message:
        """Pass the body on as long as it is not too long, and say when the server closes."""
        if self.stream:
            message = await self._until_closing()
        elif self.over:  # asked whether the caller is still there
            message = await self._receive()
        else:
            try:
                message = await asyncio.wait_for(self._receive(), READ_S)
            except TimeoutError:
                self._cut(408, "timeout", "the body did not come in time; send it again")
        self.over = self.over or not message.get("more_body", False)
        if message["type"] == "http.request":
            self.received += len(message.get("body", b""))
            if self.received > self.limit:
                self._cut(
                    413,
                    "too_large",
                    f"the body has more than {self.limit:,} bytes; send less at once",
                )
            if not self.large:
                self._hold(len(message.get("body", b"")))
        return message

    def _hold(self, count: int) -> None:
        """Count bytes that are held in memory as long as this request is under way."""
        with self.guard._lock:
            self.held += count
            self.guard._bytes += count
            full = self.guard._bytes > self.access.limits.bytes_under_way
        if full and self.guard._bytes > self.held:  # alone, a request may be as long as is allowed
            self._cut(429, "busy", "too many bytes are being sent at once; ask again in a moment")

    def _cut(self, status: int, code: str, text: str) -> NoReturn:
        """Stop reading the body, and have the answer say why."""
        self.cut = status, code, text
        raise TooLarge(text)

    async def _until_closing(self) -> Message:
        task = self.pending = self.pending or asyncio.ensure_future(self._receive())
        while not task.done():
            if self.guard._closing:
                return {"type": "http.disconnect"}
            await asyncio.wait({task}, timeout=CLOSING_S)
        self.pending = None
        return task.result()

    async def _answer(self, message: Message) -> None:
        """Pass the answer on with our headers."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            # Gradio would let pages of other sites read its answers.
            headers = [
                (k, v)
                for k, v in message.get("headers", [])
                if k.lower() not in HEADERS and not k.lower().startswith(b"access-control-")
            ]
            if not any(k.lower() == b"cache-control" for k, _ in headers):
                headers.append((b"cache-control", b"no-store"))
            headers += [*HEADERS.items(), (REQUEST_ID.encode(), self.id.encode())]
            message = {**message, "headers": headers}
            await self._send(message)
            return
        await self._send_slowly(message)

    async def _send_slowly(self, message: Message) -> None:
        """Send a body in pieces, each taken in time: who does not read keeps a place, and not for ever."""
        body = message.get("body", b"")
        if len(body) <= PIECE_BYTES:
            await asyncio.wait_for(self._send(message), READ_S)
            return
        for start in range(0, len(body), PIECE_BYTES):
            piece = {**message, "body": body[start : start + PIECE_BYTES], "more_body": True}
            await asyncio.wait_for(self._send(piece), READ_S)
        await self._send({**message, "body": b""})

    async def _drain(self) -> None:
        """Take what is still being sent, for a moment: else the caller may not see the answer."""
        with suppress(Exception):
            async with asyncio.timeout(DRAIN_S):
                while (await self._receive()).get("more_body", False):
                    pass

    async def _refuse(self, status: int, code: str, text: str, more: dict[bytes, bytes]) -> None:
        body = json.dumps(error_body(code, text, self.id)).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            *more.items(),
        ]
        if status in {413, 429} and not self.over and self.method not in SAFE:
            await self._drain()
        await self._answer({"type": "http.response.start", "status": status, "headers": headers})
        await self._send(
            {"type": "http.response.body", "body": b"" if self.method == "HEAD" else body}
        )


def error_body(code: str, message: str, request_id: str) -> dict[str, Any]:
    """Return how every error looks to a program."""
    return {"error": {"code": code, "message": message, "request_id": request_id}}


def _host_name(header: str) -> str:
    """Return the name in a ``Host`` header, without port and brackets."""
    try:
        return (urlsplit(f"//{header}").hostname or "").lower()
    except ValueError:
        return ""
