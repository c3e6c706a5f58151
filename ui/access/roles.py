"""Readers may view, search and download. Everything else needs an editor."""

from __future__ import annotations

import re

SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
READING = frozenset({"/v1/embeddings", "/v1/search", "/v1/assign", "/v1/cluster-names"})
"""Paths of the API at which a POST changes nothing."""
PAGE = re.compile(
    r"/gradio_api/(upload|reset/?|cancel|queue/join|(run|api|call|call/v2)/[^/]+/?|component_server/?)"
)
"""Paths of the page at which a POST changes nothing: the page's events only search and display."""


def changes(method: str, path: str) -> bool:
    """Whether a request needs an editor; all do except those listed as reading."""
    if method in SAFE:
        return False
    return method != "POST" or (path not in READING and not PAGE.fullmatch(path))
