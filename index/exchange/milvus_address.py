"""The address of an atlas in Milvus, and pymilvus errors translated into ours."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import parse_qs, urlsplit

from ...errors import BadInput, Unavailable

TOKEN = "HISTOSEEK_MILVUS_TOKEN"
COLLECTION = "histoseek"
TIMEOUT_S = 60


@dataclass(frozen=True)
class Address:
    """The address of a collection: ``uri`` for pymilvus, its name, and the ``url`` of the user."""

    uri: str
    collection: str
    url: str


def parse_url(url: str) -> Address:
    """Read ``milvus://host:19530/collection``, ``milvus+https://…``, or ``milvus:///folder/file.db``.

    The last is Milvus Lite, a file on this machine; ``?collection=`` names another collection in it.

    Raises:
        BadInput: the address has another form; the message does not repeat its secrets.
    """
    expected = (
        "expected milvus://host:19530/collection, or milvus:///folder/file.db for Milvus Lite"
    )
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise BadInput(f"the Milvus address is invalid ({error}); {expected}") from error
    shown = f"{parts.scheme}://{parts.hostname or ''}{parts.path}"
    secret = parts.username or parts.password or parts.fragment
    if parts.scheme not in {"milvus", "milvus+https"} or secret or (parts.hostname and parts.query):
        raise BadInput(
            f"{shown!r} is not a Milvus address; {expected}; put a token into the variable {TOKEN}"
        )
    if not parts.hostname:
        if not parts.path.endswith(".db"):
            raise BadInput(f"{shown!r} has neither a host nor a .db file; {expected}")
        collection = parse_qs(parts.query).get("collection", [COLLECTION])[0]
        uri = parts.path
    else:
        collection = parts.path.strip("/") or COLLECTION
        scheme = "https" if parts.scheme.endswith("https") else "http"
        uri = f"{scheme}://{parts.hostname}:{port or 19530}"
    if not re.fullmatch(r"[A-Za-z_]\w{0,200}", collection):
        raise BadInput(
            f"the name of collection {collection!r} is invalid; expected letters, digits and _, at most 201"
        )
    return Address(uri, collection, url)


@contextmanager
def calls(address: Address) -> Iterator[None]:
    """Turn errors of pymilvus into ours."""
    from pymilvus.exceptions import MilvusException

    try:
        yield
    except (MilvusException, ConnectionError, TimeoutError) as error:
        lines = str(getattr(error, "message", "") or error).splitlines()
        text = lines[0][:300] if lines else type(error).__name__
        raise Unavailable(
            f"Milvus at {address.url} failed or did not answer ({text}); check that it runs and that "
            f"{TOKEN} is correct, then run the same command again"
        ) from error
