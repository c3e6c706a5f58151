"""Answers as files with their provenance: CSV and JSON for programs, HTML for reading and printing."""

from __future__ import annotations

import csv
import io
import json
from base64 import b64encode
from html import escape
from pathlib import Path
from typing import Any

from ...artifacts.images import encode_jpeg
from ...artifacts.spreadsheets import inert
from ...errors import HistoseekError
from . import words
from .answers import ClusterAnswer, SearchAnswer
from .session import Session

KINDS = {"csv": "text/csv", "json": "application/json", "html": "text/html"}


def write(session: Session, answer: SearchAnswer | ClusterAnswer, kind: str) -> bytes:
    """Return an answer as ``csv``, ``json`` or ``html``."""
    if kind == "csv":
        return _csv(answer, provenance(session, answer))
    document = as_json(session, answer)
    if kind == "json":
        return json.dumps(document, ensure_ascii=False, indent=2).encode()
    return _html(session, answer, document["provenance"])


def provenance(session: Session, answer: SearchAnswer | ClusterAnswer) -> dict[str, Any]:
    """Return an answer's provenance: time, atlas, encoder, generation, filter."""
    manifest = session.atlas.manifest
    about: dict[str, Any] = {
        "at": answer.at,
        "result": answer.id,
        "atlas": session.atlas.path.name,
        "encoder": manifest.name,
        "encoder_sha256": manifest.sha256,
        "notice": words.NOTICE_TEXT,
    }
    if isinstance(answer, SearchAnswer):
        query = answer.query
        return about | {
            "index_generation": answer.generation,
            "atlas_revision": answer.revision,
            "k": query.k,
            "filter": query.where,
            "least": query.least,
            "per_slide": query.per_slide,
            "leave_out": "" if query.leave_out == "tile" else query.leave_out,
            "examples": {
                "images": len(query.images),
                "images_unlike": len(query.unlike_images),
                "tiles": list(query.tiles),
                "tiles_unlike": list(query.unlike_tiles),
            },
        }
    return about | {
        "clustering": answer.clustering,
        "index_generation": answer.generation,
        "atlas_revision": answer.revision,
    }


def as_json(session: Session, answer: SearchAnswer | ClusterAnswer) -> dict[str, Any]:
    """Return an answer in the API's format."""
    if isinstance(answer, SearchAnswer):
        return {
            "result": answer.id,
            "verdict": verdict(answer),
            "hits": [hit._asdict() for hit in answer.hits],
            "milliseconds": answer.milliseconds,
            "provenance": provenance(session, answer),
        }
    return {
        "result": answer.id,
        "images": placed_rows(answer),
        "refused": [{"name": name, "reason": why} for name, why in answer.refused],
        "provenance": provenance(session, answer),
    }


def verdict(answer: SearchAnswer) -> dict[str, Any]:
    """Return the verdict, JSON-ready."""
    found = answer.verdict
    return {
        "text": words.verdict_text(answer),
        "labels": [{"label": label, "hits": count} for label, count in found.labels],
        "placed": found.placed,
        "nearer_than": found.nearer_than,
        "unknown": found.unknown,
        "foreign": found.foreign,
    }


def placed_rows(answer: ClusterAnswer) -> list[dict[str, Any]]:
    """Return each image's cluster, with the atlas's most similar tile."""
    return [
        {"image": name, **placed, "nearest": hit._asdict()}
        for name, placed, hit in zip(answer.names, answer.placed, answer.nearest, strict=True)
    ]


def _csv(answer: SearchAnswer | ClusterAnswer, about: dict[str, Any]) -> bytes:
    if isinstance(answer, SearchAnswer):
        rows = [hit._asdict() for hit in answer.hits]
        columns = list(rows[0]) if rows else ["rank", "score", "tile", "slide"]
    else:
        rows = [
            {k: v for k, v in row.items() if k != "nearest"}
            | {f"nearest_{k}": row["nearest"][k] for k in ("tile", "slide", "score", "label")}
            | {"refused": ""}
            for row in placed_rows(answer)
        ]
        rows += [{"image": name, "refused": why} for name, why in answer.refused]
        columns = ["image", "cluster", "name", "distance", "strength", "unknown", "foreign",
                   "nearest_tile", "nearest_slide", "nearest_score", "nearest_label",
                   "refused"]  # fmt: skip
    known = (
        "at",
        "atlas",
        "encoder",
        "encoder_sha256",
        "index_generation",
        "atlas_revision",
        "filter",
    )
    more = {f"from_{key}": about.get(key) for key in known}
    rows, columns = [row | more for row in rows], [*columns, *more]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: inert(v) for k, v in row.items()} for row in rows)
    return buffer.getvalue().encode()


_STYLE = (Path(__file__).parents[1] / "assets" / "report.css").read_text(encoding="utf-8")


def _html(session: Session, answer: SearchAnswer | ClusterAnswer, about: dict[str, Any]) -> bytes:
    title = "Similar tiles" if isinstance(answer, SearchAnswer) else "Images placed in clusters"
    facts = "".join(
        f"<tr><th>{escape(key.replace('_', ' '))}</th><td>{escape(_shown(value))}</td></tr>"
        for key, value in about.items()
        if value not in (None, "") and key != "notice"
    )
    body = _found(session, answer) if isinstance(answer, SearchAnswer) else _clustered(answer)
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>histoseek: {title}</title>'
        f"<style>{_STYLE}</style><h1>{title}</h1>"
        f'<p class="notice">{escape(words.NOTICE_TEXT)}</p>{body}'
        f"<h2>How this came about</h2><table>{facts}</table></html>"
    )
    return page.encode()


def _shown(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict) else str(value)


def _found(session: Session, answer: SearchAnswer) -> str:
    query = "".join(
        _figure(encode_jpeg(tile), f"image {n}") for n, tile in enumerate(answer.query.images, 1)
    )
    query += "".join(
        _figure(_tile(session, tile), f"tile {tile} of the atlas") for tile in answer.query.tiles
    )
    query += "".join(
        _figure(_tile(session, tile), f"tile {tile}, not to be like")
        for tile in answer.query.unlike_tiles
    )
    hits = "".join(
        _figure(
            _tile(session, hit.tile),
            f"#{hit.rank}, score {hit.score:.3f}, {hit.label or 'no label'}, "
            f"{hit.slide}, {words.place(hit)}"
            + (f", patient {hit.patient}" if hit.patient else ""),
        )
        for hit in answer.hits
    )
    return (
        f'<h2>Searched for</h2><div class="tiles">{query}</div>'
        f"<p>{escape(words.verdict_text(answer))}</p>"
        f'<h2>The {len(answer.hits)} most similar</h2><div class="tiles">{hits}</div>'
    )


def _clustered(answer: ClusterAnswer) -> str:
    figures = "".join(
        _figure(
            encode_jpeg(tile),
            f"{name}: {words.cluster_title(placed)}, strength {placed['strength']:.2f}"
            + (", unknown" if placed["unknown"] else "")
            + (", unlike the stained tissue that the encoder knows" if placed["foreign"] else ""),
        )
        for name, tile, placed in zip(answer.names, answer.tiles, answer.placed, strict=True)
    )
    refused = "".join(f"<li>{escape(name)}: {escape(why)}</li>" for name, why in answer.refused)
    return f'<div class="tiles">{figures}</div>' + (f"<ul>{refused}</ul>" if refused else "")


def _tile(session: Session, tile: int) -> bytes | str:
    try:
        return session.pictures.tile(tile)
    except HistoseekError as error:
        return str(error)


def _figure(picture: bytes | str, caption: str) -> str:
    if isinstance(picture, str):
        image = f'<div class="missing">{escape(picture)}</div>'
    else:
        data = b64encode(picture).decode()
        image = f'<img src="data:image/jpeg;base64,{data}" alt="{escape(caption, quote=True)}">'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"
