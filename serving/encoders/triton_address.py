"""The address of an encoder on a Triton server, and the connection to it."""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qsl, urlsplit

from ...errors import BadInput, need

TOKEN = "HISTOSEEK_TRITON_TOKEN"
CERTIFICATES = "HISTOSEEK_TRITON_CA"
IN_FLIGHT = 4
MAX_MESSAGE = 2**31 - 1
_MODEL = r"[A-Za-z0-9][A-Za-z0-9._-]*"


@dataclass(frozen=True)
class TritonAddress:
    """The parts of ``triton://HOST:PORT/MODEL[@VERSION][?option=value&…]``.

    Attributes:
        host: host and port.
        version: version of the model, or "" for the latest that is loaded.
        tls: whether TLS is used (``tritons://``).
        shm: shared memory for tiles: ``system`` (``?shm=1``), ``cuda``, or "" for none.
        timeout_s: timeout of one request in seconds.
        deadline_s: seconds of retries after which the run is aborted.
        in_flight: maximum parallel requests.
    """

    host: str
    model: str
    version: str = ""
    tls: bool = False
    shm: Literal["", "system", "cuda"] = ""
    timeout_s: float = 30.0
    deadline_s: float = 120.0
    in_flight: int = IN_FLIGHT

    @property
    def where(self) -> str:
        """The server and the model, for messages."""
        version = f"@{self.version}" if self.version else ""
        return f"Triton at {self.host}, model {self.model}{version}:"

    @property
    def is_loopback(self) -> bool:
        """Whether the server is on this machine."""
        name = self.host.rsplit(":", 1)[0].strip("[]")
        try:
            return ipaddress.ip_address(name).is_loopback
        except ValueError:
            return name == "localhost"


def parse_address(spec: str) -> TritonAddress:
    """Parse a server's address; raise BadInput, with the expected form, if it is invalid."""
    expected = "expected triton://HOST:PORT/MODEL[@VERSION][?shm=1&timeout=30&deadline=120]"
    parts = urlsplit(spec)
    if parts.scheme not in {"triton", "tritons"}:
        raise BadInput(f"encoder {spec!r}: unknown scheme {parts.scheme!r}; {expected}")
    path = re.fullmatch(rf"/({_MODEL})(?:@([0-9]+))?/?", parts.path)
    try:
        port = parts.port
    except ValueError:
        port = None
    if not path or not parts.hostname or port is None or parts.username or parts.fragment:
        raise BadInput(f"encoder {spec!r}: {expected}")
    options: dict[str, Any] = {}
    for key, value in parse_qsl(parts.query, keep_blank_values=True):
        if key == "shm" and value in {"0", "1", "cuda"}:
            options["shm"] = {"0": "", "1": "system", "cuda": "cuda"}[value]
        elif key in {"timeout", "deadline"} and re.fullmatch(r"\d{1,6}(\.\d+)?", value):
            options[f"{key}_s"] = max(0.01, float(value))
        elif key == "in_flight" and re.fullmatch(r"[1-9]\d?", value):
            options[key] = int(value)
        else:
            raise BadInput(
                f"encoder {spec!r}: unknown option {key}={value}; expected shm=0|1|cuda, "
                "timeout=SECONDS, deadline=SECONDS or in_flight=1..99"
            )
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    model, version = path.groups(default="")
    return TritonAddress(f"{host}:{port}", model, version, parts.scheme == "tritons", **options)


def connect(address: TritonAddress) -> Any:
    """Return a gRPC client, which connects at the first request; raise BadInput without certificates."""
    roots = os.environ.get(CERTIFICATES)
    if roots and not Path(roots).is_file():
        raise BadInput(
            f"{CERTIFICATES} is {roots!r}, which is not a file; expected a file with certificates (PEM)"
        )
    channel = [
        ("grpc.max_send_message_length", MAX_MESSAGE),
        ("grpc.max_receive_message_length", MAX_MESSAGE),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_http_proxy", 0),
    ]
    return load_grpc().InferenceServerClient(
        address.host,
        ssl=address.tls,
        root_certificates=roots if address.tls else None,
        channel_args=channel,
    )


def load_grpc() -> Any:
    """Import tritonclient's gRPC client."""
    return need("tritonclient.grpc", "triton")


def token_headers(address: TritonAddress) -> dict[str, str]:
    """Return the token from the environment as a header; empty if no token is set.

    Raises:
        BadInput: the token would be sent unencrypted to another machine.
    """
    token = os.environ.get(TOKEN)
    if not token:
        return {}
    if not address.tls and not address.is_loopback:
        raise BadInput(
            f"{TOKEN} is set, but triton:// to {address.host} is not encrypted; use tritons://"
        )
    return {"authorization": f"Bearer {token}"}
