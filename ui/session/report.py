"""Answers as files with their provenance: CSV and JSON for programs, HTML for reading and printing."""

from __future__ import annotations

import csv
import io
import json
from base64 import b64encode
from collections.abc import Sequence
from typing import Any

from ...artifacts.images import encode_jpeg
from ...artifacts.spreadsheets import inert
from ...errors import HistoseekError
from ...index.federation.answers import Searched
from . import words
from .answers import ClusterAnswer, SearchAnswer, SimilarAnswer
from .session import Session
from .templates import render

KINDS = {"csv": "text/csv", "json": "application/json", "html": "text/html"}
ASSIGNED_COLUMNS = [
    "image", "cluster", "name", "distance", "strength", "unknown", "foreign", "nearest_tile",
    "nearest_slide", "nearest_score", "nearest_label", "refused",
]  # fmt: skip
"""Columns of the CSV file of assigned images."""
SOURCES = (
    "at",
    "atlas",
    "encoder",
    "encoder_sha256",
    "index_generation",
    "atlas_revision",
    "filter",
)
"""Provenance that every row of a CSV file has."""


def write(session: Session, answer: SearchAnswer | ClusterAnswer, kind: str) -> bytes:
    """Return an answer as ``csv``, ``json`` or ``html``."""
    if kind == "csv":
        return _csv(answer, provenance(session, answer)).encode()
    if kind == "json":
        return json.dumps(as_json(session, answer), ensure_ascii=False, indent=2).encode()
    return _html(session, answer, provenance(session, answer)).encode()


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
        "index_generation": answer.generation,
        "atlas_revision": answer.revision,
    }
    if isinstance(answer, ClusterAnswer):
        return about | {"clustering": answer.clustering}
    query = answer.query
    return about | {
        "k": query.k,
        "filter": query.where,
        "least": query.least,
        "per_slide": query.per_slide,
        "leave_out": "" if query.leave_out == "tile" else query.leave_out,
        **({"atlases": [shard.atlas for shard in answer.searched]} if answer.searched else {}),
        **({"not_searched": away} if (away := _away(session, answer)) else {}),
        "examples": {
            "images": len(query.images),
            "images_unlike": len(query.unlike_images),
            "tiles": list(query.tiles),
            "tiles_unlike": list(query.unlike_tiles),
            **({"texts": list(query.texts)} if query.texts else {}),
            **({"texts_unlike": list(query.unlike_texts)} if query.unlike_texts else {}),
            **_elsewhere(answer),
            **({"regions": _regions(answer)} if answer.regions else {}),
            **({"scaled_images": _scaled(answer)} if answer.scaled else {}),
        },
    }


def as_json(session: Session, answer: SearchAnswer | ClusterAnswer) -> dict[str, Any]:
    """Return an answer in the API's format."""
    if isinstance(answer, SearchAnswer):
        return {
            "result": answer.id,
            "verdict": verdict(answer),
            "hits": hit_rows(answer),
            "atlases": searched_rows(session, answer.searched),
            "shared_slides": answer.shared_slides,
            "matches": matches(answer),
            "milliseconds": answer.milliseconds,
            "notes": list(answer.notes),
            "provenance": provenance(session, answer),
        }
    return {
        "result": answer.id,
        "images": placed_rows(answer),
        "refused": [{"name": name, "reason": why} for name, why in answer.refused],
        "notes": list(answer.notes),
        "provenance": provenance(session, answer),
    }


def hit_rows(answer: SearchAnswer) -> list[dict[str, Any]]:
    """Return the hits, JSON-ready; ``atlas`` is the name of the atlas if several were asked, else None."""
    names = answer.atlases or [None] * len(answer.hits)
    return [{**hit._asdict(), "atlas": name} for hit, name in zip(answer.hits, names, strict=True)]


def similar_rows(session: Session, answer: SimilarAnswer) -> dict[str, Any]:
    """Return similar slides or cases, JSON-ready; ``atlas`` is None if only the server's own was asked."""
    names = answer.atlases or [None] * len(answer.cases)
    return {
        "slides": [
            {**case._asdict(), "atlas": name}
            for case, name in zip(answer.cases, names, strict=True)
        ],
        "atlases": searched_rows(session, answer.searched),
        "shared_slides": answer.shared_slides,
        "notes": list(answer.notes),
    }


def searched_rows(session: Session, shards: Sequence[Searched]) -> list[dict[str, Any]]:
    """Return the atlases that were asked, JSON-ready, without the paths of the server."""
    return [
        {
            "atlas": shard.atlas,
            "tiles": shard.tiles,
            "revision": shard.revision,
            "scales": shard.scales,
            "away": session.hide(shard.away),
        }
        for shard in shards
    ]


def _away(session: Session, answer: SearchAnswer) -> dict[str, str]:
    return {s.atlas: session.hide(s.away) for s in answer.searched if s.away}


def _elsewhere(answer: SearchAnswer) -> dict[str, Any]:
    """Return the examples of further atlases, JSON-ready."""
    among = answer.among
    found = {"tiles_elsewhere": among.like, "tiles_elsewhere_unlike": among.unlike}
    return {key: [tile._asdict() for tile in tiles] for key, tiles in found.items() if tiles}


def matches(answer: SearchAnswer) -> list[dict[str, Any]]:
    """Return, of each hit, the part of an image of known scale that it resembles most; [] without one.

    ``image`` is its number among these images, ``box`` left, top, width and height as shares of it.
    """
    return [
        {"image": image, "box": [round(v, 6) for v in answer.scaled[image].boxes[part].tolist()]}
        for image, part in answer.matches
    ]


def _scaled(answer: SearchAnswer) -> list[dict[str, Any]]:
    """Return the images of known scale and how they were cut, JSON-ready."""
    return [
        {
            "name": image.name,
            "mpp": image.mpp,
            "tiles": len(image.boxes),
            "side": image.side,
            "without_tissue": image.without_tissue,
            "not_taken": image.not_taken,
        }
        for image in answer.scaled
    ]


def _regions(answer: SearchAnswer) -> list[dict[str, Any]]:
    """Return the regions of a query and how they were cut, JSON-ready."""
    return [
        {
            "slide": cut.region.slide,
            "ring": [list(point) for point in cut.region.ring],
            "tiles": len(cut.corners),
            "side": cut.side,
            "corners": cut.corners.tolist(),
            "without_tissue": cut.without_tissue,
            "not_taken": cut.not_taken,
        }
        for cut in answer.regions
    ]


def verdict(answer: SearchAnswer) -> dict[str, Any]:
    """Return the verdict, JSON-ready."""
    verdict = answer.verdict
    return {
        "text": words.verdict_text(answer),
        "labels": [{"label": label, "hits": count} for label, count in verdict.labels],
        "placed": verdict.placed,
        "nearer_than": verdict.nearer_than,
        "compared_with": verdict.compared_with,
        "unknown": verdict.unknown,
        "foreign": verdict.foreign,
    }


def placed_rows(answer: ClusterAnswer) -> list[dict[str, Any]]:
    """Return each image's cluster, with the atlas's most similar tile."""
    return [
        {"image": name, **placed, "nearest": hit._asdict()}
        for name, placed, hit in zip(answer.names, answer.placed, answer.nearest, strict=True)
    ]


def _csv(answer: SearchAnswer | ClusterAnswer, about: dict[str, Any]) -> str:
    if isinstance(answer, SearchAnswer):
        rows = hit_rows(answer)
        columns = list(rows[0]) if rows else ["rank", "score", "tile", "slide"]
        if not answer.searched:
            columns = [name for name in columns if name != "atlas"]
    else:
        rows = [
            row | {f"nearest_{key}": value for key, value in row["nearest"].items()}
            for row in placed_rows(answer)
        ]
        rows += [{"image": name, "refused": why} for name, why in answer.refused]
        columns = ASSIGNED_COLUMNS
    sources = {f"from_{key}": about.get(key) for key in SOURCES}
    columns = [*columns, *sources]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: inert(value) for key, value in (row | sources).items()} for row in rows)
    return buffer.getvalue()


# -- HTML -------------------------------------------------------------------------------------------

Figure = tuple[dict[str, str], str]
"""An image (``jpeg`` in base64, or the ``problem`` why it cannot be shown) and its caption."""


def _html(session: Session, answer: SearchAnswer | ClusterAnswer, about: dict[str, Any]) -> str:
    facts = {
        key.replace("_", " "): json.dumps(value) if isinstance(value, dict) else value
        for key, value in about.items()
        if value not in (None, "") and key != "notice"
    }
    values: dict[str, Any] = {"notice": words.NOTICE_TEXT, "facts": facts}
    if isinstance(answer, ClusterAnswer):
        values |= {"title": "Images and their clusters", "queries": [], "refused": answer.refused}
        values |= {"verdict": words.sentences(answer.notes), "texts": []}
        return render("report.html", **values, figures=_assigned_images(answer))
    values |= {"title": "Similar tiles", "queries": _examples(session, answer), "refused": []}
    values |= {"verdict": words.verdict_text(answer), "texts": _texts(answer)}
    return render("report.html", **values, figures=_hits(session, answer))


def _examples(session: Session, answer: SearchAnswer) -> list[Figure]:
    query = answer.query
    return [
        *((_shown(encode_jpeg(tile)), f"image {n}") for n, tile in enumerate(query.images, 1)),
        *((_tile(session, tile), f"tile {tile} of the atlas") for tile in query.tiles),
        *(
            (_tile(session, n, atlas), f"tile {n} of the atlas {atlas}")
            for atlas, n in answer.among.like
        ),
        *(
            (_tile(session, tile), f"tile {tile}, as an unlike example")
            for tile in query.unlike_tiles
        ),
        *(
            (_tile(session, n, atlas), f"tile {n} of the atlas {atlas}, as an unlike example")
            for atlas, n in answer.among.unlike
        ),
    ]


def _texts(answer: SearchAnswer) -> list[str]:
    query = answer.query
    return [*query.texts, *(f"not: {text}" for text in query.unlike_texts)]


def _hits(session: Session, answer: SearchAnswer) -> list[Figure]:
    names = answer.atlases or [""] * len(answer.hits)
    return [
        (
            _tile(session, hit.tile, name),
            f"#{hit.rank}, score {hit.score:.3f}, {hit.label or 'no label'}, {hit.slide}, "
            + words.place(hit)
            + (f", patient {hit.patient}" if hit.patient else "")
            + (f", atlas {name}" if name else ""),
        )
        for hit, name in zip(answer.hits, names, strict=True)
    ]


def _assigned_images(answer: ClusterAnswer) -> list[Figure]:
    return [
        (
            _shown(encode_jpeg(tile)),
            f"{name}: {words.cluster_title(placed)}, strength {placed['strength']:.2f}"
            + (", unknown" if placed["unknown"] else "")
            + (", unlike the stained tissue that the encoder knows" if placed["foreign"] else ""),
        )
        for name, tile, placed in zip(answer.names, answer.tiles, answer.placed, strict=True)
    ]


def _tile(session: Session, tile: int, atlas: str = "") -> dict[str, str]:
    try:
        return _shown(session.pictures_of(atlas).tile(tile))
    except HistoseekError as error:
        return {"problem": session.hide(str(error))}


def _shown(jpeg: bytes) -> dict[str, str]:
    return {"jpeg": b64encode(jpeg).decode()}
