"""The API documentation as one page of plain HTML, from the OpenAPI document; it loads nothing else."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

_STYLE = (Path(__file__).parents[1] / "assets" / "docs.css").read_text(encoding="utf-8")
_EXAMPLE = """curl -F images=@region.png -F k=5 -F "where=organ = 'colon'" ADDRESS/v1/search
curl -H 'content-type: application/json' -d '{"like": [17], "k": 5}' ADDRESS/v1/search
curl -H "authorization: Bearer $HISTOSEEK_UI_TOKEN" ADDRESS/v1/slides   # or: curl -u user:password

from histoseek.ui.api.client import Client
for hit in Client("ADDRESS").search(["region.png"], k=5)["hits"]:
    print(hit["slide"], hit["score"])"""


def page(document: dict[str, Any], address: str) -> str:
    """Return the page.

    Args:
        document: the OpenAPI document.
        address: the server's public address, without a trailing slash.
    """
    example = _EXAMPLE.replace("ADDRESS", address)
    tags: dict[str, list[str]] = {}
    for path, verbs in document["paths"].items():
        for verb, operation in verbs.items():
            tag = operation.get("tags", ["other"])[0]
            tags.setdefault(tag, []).append(_operation(path, verb, operation))
    parts = "".join(f"<h2>{escape(tag)}</h2>{''.join(rows)}" for tag, rows in tags.items())
    about = document["info"]
    schemas = json.dumps(document.get("components", {}).get("schemas", {}), indent=1)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>histoseek API</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><style>{_STYLE}</style></head><body><main>'
        f"<h1>histoseek {escape(about['version'])}: HTTP API</h1>"
        f'<p>{escape(about["description"])} <a href="openapi.json">openapi.json</a></p>'
        f"<pre>{escape(example)}</pre>"
        '<p>Every error is <code>{"error": {"code", "message", "request_id"}}</code>; 429 and 503 carry '
        f"<code>Retry-After</code>.</p>{parts}<h2>schemas</h2><details><summary>all</summary>"
        f"<pre>{escape(schemas)}</pre></details></main></body></html>"
    )


def _operation(path: str, verb: str, operation: dict[str, Any]) -> str:
    parameters = "".join(
        f"<tr><td><code>{escape(p['name'])}</code></td><td>{escape(p['in'])}</td>"
        f"<td><code>{escape(json.dumps(p.get('schema', {})))}</code></td></tr>"
        for p in operation.get("parameters", [])
    )
    body = operation.get("requestBody", {}).get("content", {})
    bodies = "".join(
        f"<p><code>{escape(kind)}</code></p><pre>{escape(json.dumps(content['schema'], indent=1))}</pre>"
        for kind, content in body.items()
    )
    answers = ", ".join(
        f"{status} {escape(answer.get('description', ''))}"
        for status, answer in operation["responses"].items()
    )
    text = escape(operation.get("description") or operation.get("summary", ""))
    return (
        f'<details><summary><span class="verb">{verb.upper()}</span> <code>{escape(path)}</code> '
        f"{text.splitlines()[0]}</summary><p>{text}</p>"
        + (f"<table>{parameters}</table>" if parameters else "")
        + bodies
        + f"<p>Answers: {answers}</p></details>"
    )
