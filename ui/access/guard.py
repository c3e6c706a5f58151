"""The layer around the page and the API that checks every request except ``/health``.

It checks the host, the origin of the requesting page, the password or token, the role, the size of the
body, and the number of concurrent requests. Every response carries a request id and security headers that
restrict what a browser may do with it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any, NoReturn
from urllib.parse import quote

from ...errors import BadInput, TooLarge
from .checks import CheckedRequest, Scope
from .logins import Logins
from .policy import REQUEST_ID, ROLE, USER, Access, error_body
from .proxies import FORWARDED, ClientRequest, Proxies, client_request
from .roles import SAFE
from .traffic import Traffic

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

STREAMS = ("/gradio_api/heartbeat", "/gradio_api/queue/data")
"""Paths that an open page keeps connected; they do not count as concurrent requests."""

READ_S = 60.0
"""Idle timeout (s) while reading a request or sending a response."""
PIECE_BYTES = 2**18
DRAIN_S = 3.0
CLOSING_S = 0.3
"""Seconds between two checks of an open connection whether the server is closing."""

DROPPED = frozenset(
    {*FORWARDED, USER, ROLE, REQUEST_ID, "host", "forwarded", "x-real-ip", "x-gradio-server"}
)
"""Request headers that only this layer may set; the client's are removed."""
WARNED = 16
"""Maximum number of peers whose ignored headers are logged, once each."""

log = logging.getLogger("histoseek.access")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Guard:
    """The layer around the app (ASGI)."""

    def __init__(self, app: Any, access: Access, traffic: Traffic) -> None:
        """Wrap an ASGI app."""
        self._app = app
        self._access = access
        self._traffic = traffic
        self._under_way: Counter[str] = Counter()
        self._bytes = 0
        self._lock = threading.Lock()
        self._logins = Logins(access)
        self._warned: set[str] = set()
        self._closing = False

    def close(self) -> None:
        """End the connections that pages keep open, so that the server can stop at once."""
        self._closing = True
        self._logins.close()

    def begin(self, user: str) -> bool:
        """Count a request of a user; False if too many are in progress, of all users or of this one."""
        most = self._access.limits.requests
        share = max(1, most // 2) if self._access.several_users else most
        with self._lock:
            if self._under_way.total() >= most or self._under_way[user] >= share:
                return False
            self._under_way[user] += 1
            return True

    def end(self, user: str) -> None:
        """Count that a request of a user ended."""
        with self._lock:
            self._under_way[user] -= 1
            if not self._under_way[user]:
                del self._under_way[user]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Reject a request, or pass it to the app."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # web sockets are not supported
            await send({"type": "websocket.close", "code": 1008})
            return
        wrong = ""
        try:
            seen = client_request(scope, self._access.proxies)
        except BadInput as error:
            seen, wrong = client_request(scope, Proxies()), str(error)
        else:
            self._warn(seen)
        await _Exchange(self, scope, receive, send, seen, wrong).run()

    def _warn(self, seen: ClientRequest) -> None:
        """Log once per peer that its headers were ignored: it may be a proxy that was not configured."""
        peer = seen.address
        if not seen.ignored or peer in self._warned or len(self._warned) >= WARNED:
            return
        self._warned.add(peer)
        log.warning(
            "%s sent %s, which is ignored unless a trusted proxy sends it; if this is your proxy, start "
            "with --trusted-proxy %s", peer, ", ".join(seen.ignored), peer,
        )  # fmt: skip


class _Exchange(CheckedRequest):
    """One request and its answer."""

    def __init__(
        self,
        guard: Guard,
        scope: Scope,
        receive: Receive,
        send: Send,
        seen: ClientRequest,
        wrong: str,
    ) -> None:
        super().__init__(scope, seen, guard._access, guard._logins, wrong)
        self.guard, self._receive, self._send = guard, receive, send
        self.stream = self.path.startswith(STREAMS)
        self.status = 0
        self.received = 0
        self.held = 0
        self.over = False
        self.pending: asyncio.Future[Message] | None = None
        self.cut: tuple[int, str, str] | None = None
        self.started = time.perf_counter()

    async def run(self) -> None:
        counted = False
        try:
            refused = await self.refusal()
        except ValueError:  # an invalid header, such as an origin that is not an address
            refused = 422, "bad_input", "a header of the request cannot be read", {}
        if refused is None and self.path != "/health" and not self.stream:
            counted = self.guard.begin(self.user)
            if not counted:
                text = "too many requests are in progress; try again in a moment"
                refused = 429, "busy", text, {b"retry-after": b"1"}
        try:
            if refused is not None:
                await self._refuse(*refused)
            else:
                self._set_headers()
                await self._call_app()
        finally:
            if self.pending is not None:
                self.pending.cancel()
            if counted:
                self.guard.end(self.user)
            with self.guard._lock:
                self.guard._bytes -= self.held
            seconds = time.perf_counter() - self.started
            self.guard._traffic.count(self.scope, self.method, self.status, seconds)
            refused_or_failed = self.status in {0, 401, 403, 429} or self.status >= 500
            log.log(
                logging.WARNING if refused_or_failed else logging.INFO,
                "%s %s %s %d %.0f ms user=%s id=%s%s",
                self.seen.address, self.method, self.path, self.status, 1000 * seconds, self.user, self.id,
                f" tried={self.tried}" if self.tried else "",
            )  # fmt: skip

    async def _call_app(self) -> None:
        try:
            await self.guard._app(self.scope, self._bounded, self._unless_cut)
        except asyncio.CancelledError:
            if not self.guard._closing or self.status:
                raise
            self.cut = 503, "unavailable", "the server is stopping; send the request again"
        except Exception:
            if self.cut is None:
                raise
        if self.cut is not None and not self.status:
            retry = {b"retry-after": b"1"} if self.cut[0] == 429 else {}
            await self._refuse(*self.cut, {b"connection": b"close", **retry})

    async def _unless_cut(self, message: Message) -> None:
        """Send the app's response, unless the request's body was cut off."""
        if self.cut is None or self.status:
            await self._answer(message)

    def _set_headers(self) -> None:
        """Set the headers with user, role and request id for the app; the client's values are removed."""
        seen, dropped = self.seen, DROPPED | {self.access.proxies.user_header}
        headers = [
            (k, v) for k, v in self.scope["headers"] if k.lower().decode("latin-1") not in dropped
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
                self._cut(408, "timeout", "the body did not arrive in time; send it again")
        self.over = self.over or not message.get("more_body", False)
        if message["type"] == "http.request":
            self.received += len(message.get("body", b""))
            if self.received > self.limit:
                text = f"the body has more than {self.limit:,} bytes; send less at once"
                self._cut(413, "too_large", text)
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
            text = "the server is receiving too many bytes; try again in a moment"
            self._cut(429, "busy", text)

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
            await self._send({**message, "headers": headers})
        else:
            await self._send_body(message)

    async def _send_body(self, message: Message) -> None:
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
