"""The API documentation as one page of plain HTML, from the OpenAPI document; it loads nothing else."""

from __future__ import annotations

import json
from typing import Any

from ..session.templates import render


def page(document: dict[str, Any], address: str) -> str:
    """Return the page.

    Args:
        document: the OpenAPI document.
        address: the server's public address, without a trailing slash.
    """
    tags: dict[str, list[dict[str, Any]]] = {}
    for path, verbs in document["paths"].items():
        for verb, operation in verbs.items():
            operations = tags.setdefault(operation.get("tags", ["other"])[0], [])
            operations.append({"path": path, "verb": verb, **operation})
    schemas = document.get("components", {}).get("schemas", {})
    return render(
        "docs.html", info=document["info"], tags=tags, schemas=schemas, address=address, dumps=json.dumps
    )  # fmt: skip
