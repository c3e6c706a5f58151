"""Decides whether a request is accepted: its host, origin, credentials, role and length."""

from __future__ import annotations

import re
import secrets
from collections.abc import MutableMapping
from typing import Any
from urllib.parse import urlsplit

from .logins import Logins, MustWait
from .policy import REQUEST_ID, Access, claim_of, is_local
from .proxies import ClientRequest
from .roles import SAFE, changes
from .users import EDITOR, READER, Role

LARGE = "/v1/slides"
"""Path of slide uploads: they are larger than images, and are written to disk."""
DEFAULT_PORTS = {"http": 80, "https": 443}

Scope = MutableMapping[str, Any]
Refusal = tuple[int, str, str, dict[bytes, bytes]]


class CheckedRequest:
    """A request, and the decision whether it is accepted.

    Attributes:
        user: the user; "-" until the user is known.
        tried: whose password or token was wrong, or not checked; "" for none.
        role: the user's role.
        limit: maximum bytes of the body.
        large: whether it uploads a slide, which is written to disk.
    """

    def __init__(
        self, scope: Scope, seen: ClientRequest, access: Access, logins: Logins, wrong: str
    ) -> None:
        """Read a request's headers; ``wrong`` says why a proxy's are invalid, or is ""."""
        self.scope, self.seen, self.access = scope, seen, access
        self._logins, self._wrong = logins, wrong
        self.headers = {k.lower(): v for k, v in scope["headers"]}
        self.path = seen.path
        self.method: str = scope["method"]
        given = self.text(REQUEST_ID)
        self.id = given if re.fullmatch(r"[\w.\-]{1,64}", given, re.ASCII) else secrets.token_hex(8)
        self.user = "-"
        self.tried = ""
        self.role: Role = EDITOR
        form = self.text("content-type").lower().startswith("multipart/form-data")
        self.large = self.path == LARGE and self.method == "POST" and form
        limits = self.access.limits
        self.limit = limits.slide_bytes if self.large else limits.body_bytes

    def text(self, name: str) -> str:
        """Return a header, "" if there is none."""
        return str(self.headers.get(name.encode(), b"").decode("latin-1"))

    async def refusal(self) -> Refusal | None:
        """Return why the request is refused: status, code, text and headers; None if it is accepted."""
        if self.path == "/health":
            return None
        refused = self._wrong_way()
        if refused is None and self.access.guarded:
            refused = await self._credentials()
        if refused is not None:
            return refused
        if self.role == READER and changes(self.method, self.path):
            text = (
                f"this needs the role editor, and {self.user!r} is a reader; ask the administrator"
            )
            return 403, "role", text, {}
        if self.path == "" and self.method in {"GET", "HEAD"}:  # relative links need the slash
            location = {b"location": f"{self.seen.prefix}/".encode()}
            return 307, "moved", "the page is at this path with a slash at its end", location
        length = self.text("content-length")
        if length.isdigit() and int(length) > self.limit:
            text = f"the body has {int(length):,} bytes; at most {self.limit:,} are accepted"
            return 413, "too_large", text, {b"connection": b"close"}
        return None

    def _wrong_way(self) -> Refusal | None:
        """Refuse a wrong host name, a page of another site, and another machine without credentials."""
        if self._wrong:
            return 422, "bad_input", self._wrong, {}
        host = _host_name(self.seen.host)
        hosts = self.access.hosts
        if hosts is not None and host not in hosts:
            text = (
                f"the host {host[:100]!r} is not served here; start with --allow-host {host[:100]}"
            )
            return 421, "wrong_host", text, {}
        if problem := self._foreign_origin():
            return 403, "foreign_origin", problem, {}
        if self.seen.proxied and not self.access.guarded and not is_local(self.seen.address):
            text = (
                f"{self.seen.address} is another machine, and this server requires no password; start it "
                "with --users FILE, or with --user-header NAME if the proxy knows the users"
            )
            return 403, "no_credentials", text, {}
        return None

    def _foreign_origin(self) -> str:
        """Return why a changing request may come from a page of another site; "" if it does not."""
        if self.method in SAFE:
            return ""
        if self.text("sec-fetch-site") in {"cross-site", "same-site"}:
            return "a page of another site may not send this request"
        origin = self.text("origin")
        if not origin:
            return ""
        scheme = self.seen.scheme if self.seen.scheme_known else urlsplit(origin).scheme.lower()
        site = _site(origin)
        if site[1] and site == _site(f"{scheme}://{self.seen.host}"):
            return ""
        return self._other_origin(origin)

    def _other_origin(self, origin: str) -> str:
        """Return a message that also says how to configure a proxy, which may cause the difference."""
        seen, peer = self.seen, self.seen.address
        scheme = f" by {seen.scheme}" if seen.scheme_known else ""
        text = (
            f"the page is at {origin[:200]}, but the request names the host {seen.host[:200]!r}{scheme}; "
            "a page of another site may not send this request. If you use a proxy, "
        )
        if seen.proxied:
            return text + (
                "it must send X-Forwarded-Host and X-Forwarded-Proto with the browser's values "
                "(nginx: proxy_set_header X-Forwarded-Host $http_host)"
            )
        if "x-forwarded-host" in seen.ignored:
            return text + (
                f"its X-Forwarded-Host was ignored; if {peer} is the proxy, start with --trusted-proxy "
                f"{peer}"
            )
        return text + (
            "it must send the browser's Host header (nginx: proxy_set_header Host $http_host), or send "
            f"X-Forwarded-Host to a server started with --trusted-proxy {peer}; another name also needs "
            "--allow-host NAME"
        )

    async def _credentials(self) -> Refusal | None:
        if self.seen.user:
            self.user, self.role = self.seen.user, self.access.proxied_role(self.seen.user)
            return None
        header = self.text("authorization")
        if not self.access.passwords:
            return 401, "unauthorized", self._no_user(), {}
        if header:
            claim = claim_of(header)
            known = claim is not None and (claim.bearer or claim.user in self.access.users)
            # an unknown name is not logged, because it may be a password
            self.tried = (claim.user or "token") if claim is not None and known else "unknown"
            try:
                user = await self._logins.who(header, self.seen.address)
            except MustWait as error:
                code = "too_many_failures" if error.seconds > 1 else "busy"
                return 429, code, str(error), {b"retry-after": str(error.seconds).encode()}
            if user is not None:
                self.user, self.role = user, self.access.role(user)
                self.tried = ""
                return None
        challenge = {b"www-authenticate": b'Basic realm="histoseek", charset="UTF-8"'}
        return 401, "unauthorized", "this needs a user and password, or a token", challenge

    def _no_user(self) -> str:
        name = self.access.proxies.user_header
        if self.seen.proxied:
            return f"the proxy sent no user in {name}; let it log users in and send that header"
        return (
            f"only a trusted proxy names the users (header {name}), and {self.seen.address} is not one; "
            "send the request through the proxy"
        )


def _site(address: str) -> tuple[str, str, int | None]:
    """Return scheme, host and port of an address, with the port that the scheme implies."""
    parts = urlsplit(address)
    scheme = parts.scheme.lower()
    return scheme, (parts.hostname or "").lower(), parts.port or DEFAULT_PORTS.get(scheme)


def _host_name(header: str) -> str:
    """Return the name in a ``Host`` header, without port and brackets."""
    try:
        return (urlsplit(f"//{header}").hostname or "").lower()
    except ValueError:
        return ""
