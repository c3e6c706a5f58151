"""Whether a request is let in: its host, its origin, its credentials, its role and its length."""

from __future__ import annotations

import re
import secrets
from collections.abc import MutableMapping
from typing import Any
from urllib.parse import urlsplit

from .logins import Logins, MustWait
from .policy import REQUEST_ID, Access, is_local
from .proxies import Asked
from .roles import SAFE, changes
from .users import EDITOR, READER, Role

LARGE = "/v1/slides"
"""Where slides are uploaded, as a form: they are larger than pictures, and go to the disk."""
DEFAULT_PORTS = {"http": 80, "https": 443}

Scope = MutableMapping[str, Any]
Refusal = tuple[int, str, str, dict[bytes, bytes]]


class CheckedRequest:
    """What is known of a request, and whether it is let in.

    Attributes:
        user: who asks; "-" before that is known.
        role: of the user.
        limit: bytes that the body may have.
        large: whether it is the upload of a slide, which goes to the disk.
    """

    def __init__(
        self, scope: Scope, seen: Asked, access: Access, logins: Logins, wrong: str = ""
    ) -> None:
        """Look at a request.

        Args:
            scope: ASGI's.
            seen: what network and trusted proxies say of it.
            access: who may ask.
            logins: checks passwords.
            wrong: why its headers cannot be believed; "" if they can.
        """
        self.scope, self.seen, self.access, self._logins, self.wrong = (
            scope, seen, access, logins, wrong
        )  # fmt: skip
        self.headers = {k.lower(): v for k, v in scope["headers"]}
        self.path = seen.path
        self.method: str = scope["method"]
        given = self.text(REQUEST_ID)
        self.id = given if re.fullmatch(r"[\w.\-]{1,64}", given, re.ASCII) else secrets.token_hex(8)
        self.user = "-"
        self.role: Role = EDITOR
        form = self.text("content-type").lower().startswith("multipart/form-data")
        self.large = self.path == LARGE and self.method == "POST" and form
        limits = self.access.limits
        self.limit = limits.slide_bytes if self.large else limits.body_bytes

    def text(self, name: str) -> str:
        """Return a header, "" if there is none."""
        return str(self.headers.get(name.encode(), b"").decode("latin-1"))

    @property
    def address(self) -> str:
        """Who asks, as far as the network and trusted proxies know."""
        return self.seen.address

    async def refusal(self) -> Refusal | None:
        """Return why the request is refused: status, code, text and headers; None if it is let in."""
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
        """Refuse what comes under another name, from a page of another site, or from too far away."""
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
        """Return why a request that does something may come from a page of another site; "" if not."""
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
        """Say which header is missing, if it is a proxy that hides where the page is."""
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
                user = await self._logins.who(header, self.address)
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
