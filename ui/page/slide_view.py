"""HTML of slides and of similar slides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any
from urllib.parse import quote

from ...index.search.cases import Similar
from ..session.colours import VIRIDIS
from ..session.words import cluster_name
from .cluster_view import dot
from .view import empty


def slide_cards(rows: Sequence[Mapping[str, Any]], total: int, chosen: str | None) -> str:
    """Return slides as cards with thumbnails."""
    if not rows:
        return empty("No slide of that name.", "Type another part of the name.")
    cards = "".join(_slide_card(row, row["name"] == chosen) for row in rows)
    more = f"<p>{len(rows)} of {total:,} slides are shown; type part of a name to find others.</p>"
    return f'<ul class="hs-slides">{cards}</ul>{more if len(rows) < total else ""}'


def _slide_card(row: Mapping[str, Any], chosen: bool) -> str:
    name = escape(row["name"], quote=True)
    facts = " · ".join(
        escape(str(fact))
        for fact in (row["label"], row["patient"], f"{row['tiles']:,} tiles")
        if fact
    )
    return (
        f'<li><button class="hs-slide" data-slide="{name}" aria-pressed="{str(chosen).lower()}">'
        f'<img loading="lazy" src="v1/slides/{quote(row["name"], safe="")}/thumbnail.jpg" '
        f'alt="thumbnail of {name}" height="110"><b>{name}</b><small>{facts}</small></button></li>'
    )


def slide_detail(
    row: Mapping[str, Any],
    shows: str,
    clustering: str | None,
    result: str | None,
    names: Mapping[int, str],
    counts: Mapping[int, int],
    similar: Sequence[Similar],
    by: str,
    scale: tuple[float, float] = (0.0, 1.0),
) -> str:
    """Return one slide: its image, with clusters or a heat map, and similar slides or cases.

    Args:
        row: the slide's row.
        shows: ``slide``, ``clusters`` or ``similarity``.
        clustering: clustering to overlay.
        result: id of the search whose similarity is overlaid.
        names: clusters' names.
        counts: number of the slide's tiles by cluster.
        similar: similar slides or cases.
        by: ``slide`` or ``patient``.
        scale: scores at the ends of the heat map's colours.
    """
    name = quote(row["name"], safe="")
    source, legend = f"v1/slides/{name}/thumbnail.jpg?longest=1024", ""
    if shows == "clusters" and clustering:
        source = f"v1/slides/{name}/clusters.jpg?clustering={quote(clustering, safe='')}"
        items = "".join(
            f"<li>{dot(c)}{escape(cluster_name(c, names))} ({n:,})</li>" for c, n in counts.items()
        )
        legend = f'<ul class="hs-legend" aria-label="Clusters of this slide">{items}</ul>'
    elif shows == "similarity" and result:
        source = f"v1/slides/{name}/heat.jpg?result={quote(result, safe='')}"
        ramp = ", ".join(VIRIDIS)
        legend = (
            f'<div class="hs-scale"><span>similarity to the last search: {scale[0]:.2f}</span>'
            f'<span class="hs-ramp" style="background:linear-gradient(90deg, {ramp})"></span>'
            f"<span>{scale[1]:.2f}</span></div>"
        )
    if row["kind"] != "slide":
        legend = "<p>A tile set has no slide image, so there is no overlay.</p>"
    facts = [
        ("label", row["label"]), ("patient", row["patient"]), ("tiles", f"{row['tiles']:,}"),
        ("µm per pixel", row["mpp"]), ("size", _size(row)), ("added", row["added_at"]),
        *row["metadata"].items(), ("why it has no tiles", row["reason"]),
    ]  # fmt: skip
    table = "".join(
        f"<tr><th scope='row'>{escape(str(k))}</th><td>{escape(str(v))}</td></tr>"
        for k, v in facts
        if v not in (None, "")
    )
    return (
        f'<article class="hs-detail"><h2>{escape(row["name"])}</h2>{_look(row)}<div class="hs-detail-two">'
        f'<figure><img class="hs-overview" src="{source}" alt="{escape(row["name"], quote=True)}, '
        f'{escape(shows, quote=True)}">{legend}</figure>'
        f'<table class="hs-facts-table">{table}</table></div>{_similar(similar, by)}</article>'
    )


def _look(row: Mapping[str, Any]) -> str:
    """Return the button that opens the slide in the viewer; tile sets have no image of a whole slide."""
    if row["kind"] != "slide":
        return ""
    name = escape(row["name"], quote=True)
    return (
        f'<p><button type="button" class="hs-act" data-view="{name}">Look at the slide</button></p>'
    )


def _size(row: Mapping[str, Any]) -> str:
    return f"{row['width']:,} × {row['height']:,}" if row["width"] and row["height"] else ""


def _similar(similar: Sequence[Similar], by: str) -> str:
    what = "slides" if by == "slide" else "cases"
    if not similar:
        return f"<h3>Similar {what}</h3>" + empty(
            "None.", "The atlas has nothing else to compare with."
        )
    rows = []
    for item in similar:
        pairs = "".join(
            '<span class="hs-pair">'
            + "".join(
                f'<button class="hs-open hs-mini" data-open="{tile}" aria-label="Open tile {tile}">'
                f'<img loading="lazy" src="v1/tiles/{tile}.jpg" alt="tile {tile}" width="72" height="72">'
                "</button>"
                for tile in (pair.query, pair.match)
                if tile is not None
            )
            + f"<small>{pair.score:.3f}</small></span>"
            for pair in item.pairs[:4]
        )
        label = f" · {escape(item.label)}" if item.label else ""
        rows.append(
            f"<li><div><b>{escape(item.name)}</b>{label} <small>score {item.score:.3f}</small></div>"
            f'<div class="hs-pairs">{pairs}</div></li>'
        )
    return (
        f"<h3>Similar {what}, with pairs of similar tiles (of this one, of the other one)</h3>"
        f'<ol class="hs-similar">{"".join(rows)}</ol>'
    )
