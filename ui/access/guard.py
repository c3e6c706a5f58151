"""The layer around the page and the API that checks every request except ``/health``.

It checks the host, the origin of the requesting page, the password or token, the role, the size of the
body, and the number of concurrent requests. Every response carries a request id and security headers that
restrict what a browser may do with it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
import threading
import time
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any, NoReturn
from urllib.parse import quote, urlsplit

from ...errors import BadInput, TooLarge
from .logins import Logins, MustWait
from .policy import REQUEST_ID, ROLE, USER, Access, error_body, is_local
from .proxies import FORWARDED, Asked, Proxies, asked
from .roles import SAFE, changes
from .traffic import Traffic
from .users import EDITOR, READER, Role

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
LARGE = "/v1/slides"
"""Path of slide uploads, as a form: they are larger than images, and are written to disk."""

STREAMS = ("/gradio_api/heartbeat", "/gradio_api/queue/data")
"""Paths that an open page keeps connected; they do not count as concurrent requests."""

READ_S = 60.0
"""Idle timeout (s) while reading a request or sending a response."""
PIECE_BYTES = 2**18
DRAIN_S = 3.0
CLOSING_S = 0.3
"""Seconds between two checks of an open connection whether the server is closing."""

DEFAULT_PORTS = {"http": 80, "https": 443}
DROPPED = frozenset(
    {*FORWARDED, USER, ROLE, REQUEST_ID, "host", "forwarded", "x-real-ip", "x-gradio-server"}
)
"""Request headers that only this layer may set; the client's are removed."""
WARNED = 16
"""Maximum number of peers whose ignored headers are logged, once each."""

log = logging.getLogger("histoseek.access")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Refusal = tuple[int, str, str, dict[bytes, bytes]]


class Guard:
    """The layer around the app (ASGI)."""

    def __init__(self, app: Any, access: Access, traffic: Traffic) -> None:
        """Wrap an app.

        Args:
            app: the ASGI app.
            access: users, token and limits.
            traffic: counts requests.
        """
        self._app = app
        self._access = access
        self._traffic = traffic
        self._under_way = 0
        self._bytes = 0
        self._lock = threading.Lock()
        self._logins = Logins(access)
        self._warned: set[str] = set()
        self._closing = False

    def close(self) -> None:
        """End the connections that pages keep open, so that the server can stop at once."""
        self._closing = True
        self._logins.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Reject a request, or pass it to the app."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # web sockets are not supported
            await send({"type": "websocket.close", "code": 1008})
            return
        try:
            seen = asked(scope, self._access.proxies)
        except BadInput as error:
            seen = asked(scope, Proxies())
            await _Exchange(self, scope, receive, send, seen, str(error)).run()
            return
        self._warn(seen, scope)
        await _Exchange(self, scope, receive, send, seen).run()

    def _warn(self, seen: Asked, scope: Scope) -> None:
        """Log once per peer that its headers were ignored: it may be a proxy that was not configured."""
        peer = seen.address
        if not seen.ignored or peer in self._warned or len(self._warned) >= WARNED:
            return
        self._warned.add(peer)
        log.warning(
            "%s sent %s, which counts from a trusted proxy only; if it is your proxy, start with "
            "--trusted-proxy %s", peer, ", ".join(seen.ignored), peer,
        )  # fmt: skip


class _Exchange:
    """One request and its response."""

    def __init__(
        self, guard: Guard, scope: Scope, receive: Receive, send: Send, seen: Asked, wrong: str = ""
    ) -> None:
        self.guard, self.access = guard, guard._access
        self.scope, self._receive, self._send = scope, receive, send
        self.seen, self.wrong = seen, wrong
        self.headers = {k.lower(): v for k, v in scope["headers"]}
        self.path = seen.path
        self.method: str = scope["method"]
        given = self.text(REQUEST_ID)
        self.id = given if re.fullmatch(r"[\w.\-]{1,64}", given, re.ASCII) else secrets.token_hex(8)
        self.user = "-"
        self.role: Role = EDITOR
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
        """Return a header; "" if it is missing."""
        return str(self.headers.get(name.encode(), b"").decode("latin-1"))

    async def run(self) -> None:
        counted = False
        try:
            refused = await self._refusal()
        except ValueError:  # an invalid header, such as an origin that is not a URL
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
            refused_or_failed = self.status in {0, 401, 403, 429} or self.status >= 500
            log.log(
                logging.WARNING if refused_or_failed else logging.INFO,
                "%s %s %s %d %.0f ms user=%s id=%s",
                self.address, self.method, self.path, self.status, 1000 * seconds, self.user, self.id,
            )  # fmt: skip

    @property
    def address(self) -> str:
        """The client's address, from the network or a trusted proxy."""
        return self.seen.address

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
        """Send the app's response, unless the request's body was cut off."""
        if self.cut is None or self.status:
            await self._answer(message)

    async def _app(self, receive: Receive, send: Send) -> None:
        await self.guard._app(self.scope, receive, send)

    def _hand_on(self) -> None:
        """Set the headers with user, role and request id for the app; the client's values are removed."""
        seen, own = self.seen, self.access.proxies.user_header
        headers = [
            (k, v)
            for k, v in self.scope["headers"]
            if (name := k.lower().decode("latin-1")) not in DROPPED and name != own
        ]
        headers += [
            (b"host", seen.host.encode("latin-1")),
            (USER.encode(), self.user.encode()),
            (ROLE.encode(), self.role.encode()),
            (REQUEST_ID.encode(), self.id.encode()),
        ]
        path = seen.prefix + seen.path
        self.scope.update(
            headers=headers, scheme=seen.scheme, client=(seen.address, 0), root_path=seen.prefix,
            path=path, raw_path=quote(path, safe="/%:@!$&'()*+,;=~").encode(),
        )  # fmt: skip

    async def _refusal(self) -> Refusal | None:
        if self.path == "/health":
            return None
        refused = self._wrong_way()
        if refused is None and self.access.guarded:
            refused = await self._credentials()
        if refused is not None:
            return refused
        if self.role == READER and changes(self.method, self.path):
            text = f"this needs the role editor, and {self.user!r} is a reader; ask whoever keeps the users"
            return 403, "role", text, {}
        if self.path == "" and self.method in {"GET", "HEAD"}:  # relative links need the slash
            return 307, "moved", "the page is at this path with a slash", {
                b"location": f"{self.seen.prefix}/".encode()
            }  # fmt: skip
        length = self.text("content-length")
        if length.isdigit() and int(length) > self.limit:
            text = f"the body has {int(length):,} bytes; at most {self.limit:,} are accepted"
            return 413, "too_large", text, {b"connection": b"close"}
        return None

    def _wrong_way(self) -> Refusal | None:
        """Refuse a wrong host, a page of another site, or another machine if no login is required."""
        if self.wrong:
            return 422, "bad_input", self.wrong, {}
        host = _host_name(self.seen.host)
        hosts = self.access.hosts
        if hosts is not None and host not in hosts:
            text = f"host {host[:100]!r} is not served here; start with --allow-host {host[:100]}"
            return 421, "wrong_host", text, {}
        foreign = self._foreign()
        if foreign:
            return 403, "foreign_origin", foreign, {}
        if self.seen.proxied and not self.access.guarded and not is_local(self.seen.address):
            text = (
                f"{self.seen.address} is another machine, and this server asks for no password; start it "
                "with --users FILE, or with --user-header NAME if the proxy knows the users"
            )
            return 403, "no_credentials", text, {}
        return None

    def _foreign(self) -> str:
        """Return why a request that may change something seems to come from another site; "" if not."""
        if self.method in SAFE:
            return ""
        if self.text("sec-fetch-site") in {"cross-site", "same-site"}:
            return "a page of another site may not ask for this"
        origin = self.text("origin")
        if not origin:
            return ""
        scheme = self.seen.scheme if self.seen.scheme_known else urlsplit(origin).scheme.lower()
        site = _site(origin)
        if site[1] and site == _site(f"{scheme}://{self.seen.host}"):
            return ""
        return self._other_origin(origin)

    def _other_origin(self, origin: str) -> str:
        """Return the message for a foreign origin; it names the header that a proxy may have left out."""
        seen, peer = self.seen, self.seen.address
        told = (
            f"the page is at {origin[:200]}, and the request names the host {seen.host[:200]!r}"
            + (f" by {seen.scheme}" if seen.scheme_known else "")
            + "; a page of another site may not ask for this. If a proxy is between, "
        )
        if seen.proxied:
            return told + (
                "it must send X-Forwarded-Host and X-Forwarded-Proto as the browser asked "
                "(nginx: proxy_set_header X-Forwarded-Host $http_host)"
            )
        if "x-forwarded-host" in seen.ignored:
            return told + (
                f"its X-Forwarded-Host does not count: start with --trusted-proxy {peer} if {peer} is it"
            )
        return told + (
            "it must send the header Host as the browser did (nginx: proxy_set_header Host $http_host), or "
            f"X-Forwarded-Host with --trusted-proxy {peer} here; another name also needs --allow-host NAME"
        )

    async def _credentials(self) -> Refusal | None:
        if self.seen.user:
            self.user, self.role = self.seen.user, self.access.proxied_role(self.seen.user)
            return None
        header = self.text("authorization")
        if not self.access.passwords:
            return 401, "unauthorized", self._no_user(), {}
        if header:
            try:
                user = await self.guard._logins.who(header, self.address)
            except MustWait as error:
                retry = {b"retry-after": str(error.seconds).encode()}
                code = "too_many_failures" if error.seconds > 1 else "busy"
                return 429, code, str(error), retry
            if user is not None:
                self.user, self.role = user, self.access.role(user)
                return None
        challenge = {b"www-authenticate": b'Basic realm="histoseek", charset="UTF-8"'}
        return 401, "unauthorized", "say who you are: user and password, or a token", challenge

    def _no_user(self) -> str:
        name = self.access.proxies.user_header
        if self.seen.proxied:
            return f"the proxy sent no user in {name}; have it log people in and send that header"
        return f"users are known from the proxy only ({name}), and {self.address} is none; ask through it"

    async def _bounded(self) -> Message:
        """Receive the next part of the body within its limits; end open streams when the server closes."""
        if self.stream:
            message = await self._until_closing()
        elif self.over:  # the app checks whether the client is still connected
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
        """Count the bytes that this request holds in memory until it ends."""
        with self.guard._lock:
            self.held += count
            self.guard._bytes += count
            full = self.guard._bytes > self.access.limits.bytes_under_way
        if full and self.guard._bytes > self.held:  # a single request may use its full limit
            self._cut(429, "busy", "too many bytes are being sent at once; ask again in a moment")

    def _cut(self, status: int, code: str, text: str) -> NoReturn:
        """Stop reading the body; the response states why."""
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
        """Send the response with our headers."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            # Gradio would let pages of other sites read its responses.
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
        """Send a body in pieces; a client that does not read a piece within READ_S is disconnected."""
        body = message.get("body", b"")
        if len(body) <= PIECE_BYTES:
            await asyncio.wait_for(self._send(message), READ_S)
            return
        for start in range(0, len(body), PIECE_BYTES):
            piece = {**message, "body": body[start : start + PIECE_BYTES], "more_body": True}
            await asyncio.wait_for(self._send(piece), READ_S)
        await self._send({**message, "body": b""})

    async def _drain(self) -> None:
        """Read the rest of the body for a short time: else the client may not see the response."""
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


def _site(address: str) -> tuple[str, str, int | None]:
    """Return scheme, host and port of a URL, with the scheme's default port if it has none."""
    parts = urlsplit(address)
    scheme = parts.scheme.lower()
    return scheme, (parts.hostname or "").lower(), parts.port or DEFAULT_PORTS.get(scheme)


def _host_name(header: str) -> str:
    """Return the name in a ``Host`` header, without port and brackets."""
    try:
        return (urlsplit(f"//{header}").hostname or "").lower()
    except ValueError:
        return ""
