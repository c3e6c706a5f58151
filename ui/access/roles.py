"""What a reader may do: look, search and download. Everything else changes the atlas, or might."""

from __future__ import annotations

import re

SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
READING = frozenset({"/v1/embeddings", "/v1/search", "/v1/assign"})
"""Paths of the API that answer a POST and change nothing."""
PAGE = re.compile(
    r"/gradio_api/(upload|reset/?|cancel|queue/join|(run|api|call|call/v2)/[^/]+/?|component_server/?)"
)
"""Paths of the page that answer a POST: its events search and show; changes go by the API."""


def changes(method: str, path: str) -> bool:
    """Whether a request needs an editor: all do that are not listed as reading."""
    if method in SAFE:
        return False
    return method != "POST" or (path not in READING and not PAGE.fullmatch(path))
