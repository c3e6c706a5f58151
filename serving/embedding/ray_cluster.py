"""Connecting to a Ray cluster, and starting one on this machine."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ... import stopping
from ...errors import Unavailable, need

LOCAL = "local"
AUTO = "auto"
_DEAD_PROXY = "http://127.0.0.1:9"


def connect(address: str) -> tuple[Any, bool]:
    """Connect Ray to ``address``, or start a cluster here if it is ``local``.

    Returns:
        The module, and whether this call made the connection.

    Raises:
        MissingPart: Ray is not installed.
        Unavailable: no cluster answers.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # before the import: Ray may send telemetry
    ray: Any = need("ray", "ray")
    stopping.rearm()  # Ray replaces the SIGTERM handler
    if ray.is_initialized():
        return ray, False
    _check_address(address)
    try:
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
        if address == LOCAL:
            with _without_cloud_metadata():
                # without "local" Ray joins the cluster that last ran here, even a dead one
                ray.init(address="local", include_dashboard=False, **quiet)
        else:
            ray.init(address=address, **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise Unavailable(f"no Ray cluster answers at {address!r} ({error})") from error
    stopping.rearm()
    return ray, True


def _check_address(address: str) -> None:
    """Check that the address accepts connections: if not, Ray would end the whole process."""
    remedy = "start one with `ray start --head`"
    if address == AUTO:
        address, remedy = _address_here(), f"{remedy}, or use --ray local"
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # "local", or a name that Ray looks up itself
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise Unavailable(f"no Ray cluster answers at {address!r} ({error}); {remedy}") from error


def _address_here() -> str:
    """Return the address that ``auto`` means: that of the cluster that was started last on this machine.

    The file with the address stays when a cluster is killed, and Ray then waits for minutes.
    """
    known = os.environ.get("RAY_ADDRESS", "")
    file = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
    if not known and file.is_file():
        known = file.read_text().strip()
    return known


@contextmanager
def _without_cloud_metadata() -> Iterator[None]:
    """Start a cluster whose processes cannot query cloud metadata services.

    Ray queries the metadata services of three clouds over HTTP even if its usage statistics are off.
    Its processes therefore inherit the address of a proxy that does not exist; workers remove it
    before they start work.
    """
    before = {name: os.environ.get(name) for name in ("http_proxy", "no_proxy")}
    os.environ["http_proxy"] = _DEAD_PROXY
    os.environ["no_proxy"] = ",".join(filter(None, [before["no_proxy"], "127.0.0.1", "localhost"]))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def restore_proxy() -> None:
    """Remove the proxy that :func:`connect` gave to the processes of a local cluster; called by workers."""
    if os.environ.get("http_proxy") == _DEAD_PROXY:
        del os.environ["http_proxy"]
