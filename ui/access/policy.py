"""The access policy: users, token, roles, host names and limits."""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
import os
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ...errors import BadInput
from .proxies import EVERYONE, Proxies
from .users import AUTH, EDITOR, HASH, READER, Role, hash_password, matches, read_users

USER = "x-histoseek-user"
ROLE = "x-histoseek-role"
REQUEST_ID = "x-request-id"
TOKEN = "HISTOSEEK_UI_TOKEN"
TOKEN_LEAST = 16
LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


@dataclass(frozen=True)
class Limits:
    """Limits on requests.

    Attributes:
        body_bytes: maximum bytes of a request's body.
        slide_bytes: maximum bytes of a slide upload.
        requests: maximum concurrent requests; more are refused. If there are several users, each may have
            half of them.
        bytes_under_way: maximum bytes of all concurrent bodies; slide uploads do not count, as they go
            to disk.
    """

    body_bytes: int = 64 * 2**20
    slide_bytes: int = 8 * 2**30
    requests: int = 256
    bytes_under_way: int = 512 * 2**20


@dataclass(frozen=True)
class Claim:
    """The user and secret in an ``Authorization`` header; with ``bearer`` a token, and user is ""."""

    user: str
    secret: str = field(repr=False)
    bearer: bool = False


def claim_of(header: str) -> Claim | None:
    """Parse an ``Authorization`` header; None if it cannot be read."""
    kind, _, value = header.partition(" ")
    value = value.strip()
    if kind.lower() == "bearer":
        return Claim("", value, bearer=True)
    if kind.lower() != "basic":
        return None
    try:
        user, _, password = base64.b64decode(value, validate=True).decode().partition(":")
    except (binascii.Error, ValueError):
        return None
    return Claim(user, password)


@dataclass(frozen=True)
class Access:
    """Who has access.

    Attributes:
        users: password, or its argon2 hash, by user.
        token: token that authenticates the user ``token``, an editor; "" for none.
        hosts: host names that requests may use; None for any.
        limits: limits on requests.
        roles: role by user; a user without an entry is an editor.
        proxies: settings of the proxies before the server.
        notes: messages to print at the start.
    """

    users: dict[str, str] = field(default_factory=dict, repr=False)
    token: str = field(default="", repr=False)
    hosts: frozenset[str] | None = LOCAL_NAMES
    limits: Limits = field(default_factory=Limits)
    roles: dict[str, Role] = field(default_factory=dict)
    proxies: Proxies = field(default_factory=Proxies)
    notes: tuple[str, ...] = ()

    @property
    def passwords(self) -> bool:
        """Whether users can log in by password or token."""
        return bool(self.users or self.token)

    @property
    def guarded(self) -> bool:
        """Whether a login is required."""
        return self.passwords or bool(self.proxies.user_header)

    @property
    def several_users(self) -> bool:
        """Whether requests may come from several known users."""
        return len(self.users) + bool(self.token) > 1 or bool(self.proxies.user_header)

    def check(self, claim: Claim) -> str | None:
        """Return the user that a claim authenticates; None if it is wrong.

        A wrong user takes as long as a wrong password; with hashes, a tenth of a second or more.
        """
        if claim.bearer:
            return "token" if self._is_token(claim.secret) else None
        if self._is_token(claim.secret):  # browsers ask for a user name too: accept any
            return "token"
        secret = self.users.get(claim.user)
        if secret is None:
            matches(_decoy(any(s.startswith(HASH) for s in self.users.values())), claim.secret)
            return None
        return claim.user if matches(secret, claim.secret) else None

    def role(self, user: str) -> Role:
        """Return the role of a user with a password or token, or of anyone if no login is required."""
        return self.roles.get(user, EDITOR)

    def proxied_role(self, user: str) -> Role:
        """Return the role of a user named by a proxy."""
        return EDITOR if {user, EVERYONE} & self.proxies.editors else READER

    def _is_token(self, value: str) -> bool:
        same = hmac.compare_digest(self.token.encode(), value.encode())
        return same and bool(self.token)


@cache
def _decoy(hashed: bool) -> str:
    """Return the secret to compare with an unknown user's password, to take equal time."""
    return hash_password("nobody") if hashed else "nobody"


def access_for(
    host: str,
    users_file: Path | None = None,
    allowed: tuple[str, ...] = (),
    limits: Limits | None = None,
    proxies: Proxies | None = None,
) -> Access:
    """Return the access policy of a server that listens on ``host``.

    Users come from ``HISTOSEEK_UI_AUTH=user:password``, from a file and from a trusted proxy, a token from
    ``HISTOSEEK_UI_TOKEN``. ``allowed`` has additional host names that requests may use, such as a proxy's.

    Raises:
        BadInput: other machines can reach the server without a login, or the users cannot be read.
    """
    users = read_users(users_file)
    token = os.environ.get(TOKEN, "")
    if token and len(token) < TOKEN_LEAST:
        raise BadInput(
            f"{TOKEN} has {len(token)} characters; expected at least {TOKEN_LEAST}: use the output of "
            "`openssl rand -hex 24`"
        )
    proxies = proxies or Proxies()
    local = is_local(host)
    hosts = LOCAL_NAMES | {name.lower() for name in allowed} if local else None
    access = Access(
        users.secrets, token, hosts, limits or Limits(), users.roles, proxies, users.notes
    )
    if (not local or allowed) and not access.guarded:
        option = f"--host {host}" if not local else f"--allow-host {allowed[0]}"
        raise BadInput(
            f"{option} lets other machines see the page, which shows patients' tissue; first set "
            f"{AUTH}=user:password, {TOKEN} or --users FILE, or let a proxy name the users "
            "(--trusted-proxy ADDR --user-header NAME), or listen on 127.0.0.1"
        )
    return access


def is_local(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def error_body(code: str, message: str, request_id: str) -> dict[str, Any]:
    """Return the JSON body of an error."""
    return {"error": {"code": code, "message": message, "request_id": request_id}}
