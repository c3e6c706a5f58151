"""Support for reverse proxies: the client's address, the public host and path, and the user.

Only a peer in ``--trusted-proxy`` may set them, by ``X-Forwarded-For``, ``-Proto``, ``-Host``,
``-Prefix`` and the user header. From any other peer these headers are ignored.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import BadInput

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
FORWARDED = ("x-forwarded-for", "x-forwarded-proto", "x-forwarded-host", "x-forwarded-prefix")
EVERYONE = "*"
PATH_CHARS = 200
USER_CHARS = 200
OWN_PATHS = frozenset({
    "", "v1", "health", "ready", "info", "metrics", "docs", "redoc", "openapi.json", "page-assets",
    "gradio_api", "static", "assets", "theme.css", "config", "svelte", "login", "logout", "robots.txt",
    "manifest.json", "favicon.ico", "pwa_icon", "monitoring", "custom_component", "file",
    "{page}", "_app", "__gradio",
})  # fmt: skip
"""First parts of the server's paths; a prefix must not begin with one of them."""


@dataclass(frozen=True)
class Proxies:
    """Settings of the proxies before the server.

    Attributes:
        networks: networks of trusted proxies.
        root_path: public path prefix of the page, such as ``/histo``; "" for none.
        user_header: lower-case name of the header with the user; "" for none.
        editors: users named by a proxy who may change the atlas; ``*`` for all.
    """

    networks: tuple[Network, ...] = ()
    root_path: str = ""
    user_header: str = ""
    editors: frozenset[str] = frozenset()

    def trusts(self, address: str) -> bool:
        """Whether an address belongs to a trusted proxy."""
        client = parsed(address)
        return client is not None and any(client in network for network in self.networks)


@dataclass(frozen=True)
class ClientRequest:
    """A request as the client sent it to the first proxy.

    Attributes:
        address: the client's address.
        scheme: http or https.
        scheme_known: whether a trusted proxy stated the scheme.
        host: host and port, as in a ``Host`` header.
        prefix: public path prefix of the page; "" for none.
        path: path within the server, without the prefix; "" if the request's path was just the prefix.
        proxied: whether the request came through a trusted proxy.
        user: user named by the proxy; "" for none.
        ignored: headers that were ignored because the peer is not a trusted proxy.
    """

    address: str
    scheme: str
    scheme_known: bool
    host: str
    prefix: str
    path: str
    proxied: bool
    user: str
    ignored: tuple[str, ...]


def proxies_for(
    trusted: Sequence[str] = (),
    root_path: str = "",
    user_header: str = "",
    editors: Sequence[str] = (),
) -> Proxies:
    """Check the command line's proxy options and return them.

    Args:
        trusted: addresses or networks, such as ``10.0.0.7`` or ``10.0.0.0/8``.
        root_path: public path prefix, such as ``/histo``.
        user_header: name of the user header, such as ``X-Forwarded-User``.
        editors: users named by the proxy who may change the atlas.

    Raises:
        BadInput: an address or path is invalid, or a user header is set without a trusted proxy.
    """
    networks = []
    for text in trusted:
        try:
            network = ipaddress.ip_network(text)
        except ValueError as error:
            raise BadInput(
                f"--trusted-proxy {text}: {error}; expected an address or a network, such as 10.0.0.7 "
                "or 10.0.0.0/8"
            ) from error
        if network.prefixlen == 0:
            raise BadInput(
                f"--trusted-proxy {text} contains every address, so that anyone could name any user; "
                "give the address of the proxy"
            )
        networks.append(network)
    if user_header and not networks:
        raise BadInput(
            f"--user-header {user_header} needs --trusted-proxy ADDR; else anyone could send the header"
        )
    if user_header and (
        not re.fullmatch(r"[A-Za-z0-9-]{1,100}", user_header)
        or user_header.lower() in {*FORWARDED, "host", "authorization", "cookie", "origin"}
    ):
        raise BadInput(
            f"--user-header is {user_header!r}; expected a header of its own, such as X-Forwarded-User"
        )
    if editors and not user_header:
        raise BadInput(
            f"--editor {editors[0]} needs --user-header; the roles of users in --users FILE are there"
        )
    path = checked_prefix(root_path, "--root-path") if root_path else ""
    return Proxies(tuple(networks), path, user_header.lower(), frozenset(editors))


def checked_prefix(text: str, source: str) -> str:
    """Return a path prefix without trailing slash; "" for ``/``.

    Raises:
        BadInput: it is not a plain path, or it collides with one of the server's paths.
    """
    path = text.rstrip("/")
    parts = path.split("/")[1:]
    plain = re.fullmatch(r"(/[A-Za-z0-9._~-]+)*", path) and not {".", ".."} & set(parts)
    if not plain or len(path) > PATH_CHARS:
        raise BadInput(
            f"{source} is {text[:100]!r}; expected a path such as /histo, of letters, digits and . _ ~ - /"
        )
    if path and parts[0] in OWN_PATHS:
        raise BadInput(
            f"{source} is {text[:100]!r}, but the server answers /{parts[0]} itself; choose another path"
        )
    return path


def parsed(text: str) -> Address | None:
    """Parse an address that may have a port, brackets or a zone; None for anything else."""
    text = text.strip().strip('"')
    bracketed = re.fullmatch(r"\[([^\]]*)\](:\d+)?", text)
    if bracketed:
        text = bracketed[1]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def client_request(scope: Any, proxies: Proxies) -> ClientRequest:
    """Return a request as the client sent it.

    Raises:
        BadInput: a trusted proxy sent a header that cannot be read.
    """
    headers: dict[str, list[str]] = {}
    for key, value in scope["headers"]:
        headers.setdefault(key.decode("latin-1").lower(), []).append(value.decode("latin-1"))
    peer = scope["client"][0] if scope.get("client") else "-"
    trusted = proxies.trusts(peer)
    names = [*FORWARDED, *([proxies.user_header] if proxies.user_header else [])]
    sent = {name: headers[name] for name in names if name in headers}
    host = headers.get("host", [""])[-1]
    scheme, prefix, address, user = scope.get("scheme", "http"), proxies.root_path, peer, ""
    if trusted:
        address = _client(sent.get("x-forwarded-for", ()), peer, proxies)
        host = _last(sent, "x-forwarded-host", r"[A-Za-z0-9._\-\[\]:]{1,255}") or host
        scheme = _last(sent, "x-forwarded-proto", r"https?") or scheme
        given = _last(sent, "x-forwarded-prefix", r"/.*")
        prefix = checked_prefix(given, "X-Forwarded-Prefix") if given else prefix
        user = _user(sent, proxies.user_header)
    path: str = scope["path"]
    if f"{path}/".startswith(f"{prefix}/"):  # the proxy did not strip the prefix
        path = path[len(prefix) :]
    return ClientRequest(
        address, scheme, trusted and "x-forwarded-proto" in sent, host, prefix, path, trusted, user,
        () if trusted else tuple(sent),
    )  # fmt: skip


def _client(values: Iterable[str], peer: str, proxies: Proxies) -> str:
    """Return the rightmost address that is not a trusted proxy: anyone can forge those to its left."""
    last = peer
    for text in reversed([part for value in values for part in value.split(",")]):
        address = parsed(text)
        if address is None:
            return last
        last = str(address)
        if not proxies.trusts(last):
            return last
    return last


def _last(headers: dict[str, list[str]], name: str, pattern: str) -> str:
    """Return a header's last value, which the nearest proxy wrote."""
    value = headers[name][-1].rsplit(",", 1)[-1].strip() if name in headers else ""
    if value and not re.fullmatch(pattern, value):
        raise BadInput(
            f"the proxy sent {name} {value[:100]!r}, which is invalid; correct the proxy's configuration"
        )
    return value


def _user(headers: dict[str, list[str]], name: str) -> str:
    values = headers.get(name, [])
    if len(values) > 1:
        raise BadInput(
            f"the proxy sent {name} {len(values)} times; let it replace the client's header"
        )
    text = values[0].strip() if values else ""
    try:
        user = text.encode("latin-1").decode("utf-8")
    except UnicodeDecodeError:
        user = text
    if len(user) > USER_CHARS or not user.isprintable() or user == "-":
        raise BadInput(
            f"the proxy sent {name} {user[:100]!r}; expected a name of at most {USER_CHARS} characters"
        )
    return user
