"""HTML of slides and of similar slides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any
from urllib.parse import quote

from ...index.search.cases import Pair
from ..session.answers import SimilarAnswer
from ..session.colours import VIRIDIS
from ..session.words import cluster_name, not_searched, sentences
from .cluster_view import dot
from .view import OWN, Home, empty, tile_url


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
    similar: SimilarAnswer,
    homes: Sequence[Home],
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
        homes: the atlas of each; empty if it is the server's own.
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
        f'<table class="hs-facts-table">{table}</table></div>{_similar(similar, homes, by)}</article>'
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


def _similar(similar: SimilarAnswer, homes: Sequence[Home], by: str) -> str:
    what = "slides" if by == "slide" else "cases"
    said = " ".join(filter(None, [not_searched(similar.searched), sentences(similar.notes)]))
    missing = f"<p>{escape(said)}</p>" if said else ""
    if not similar.cases:
        none = empty("None.", "There is nothing else to compare with.")
        return f"<h3>Similar {what}</h3>{none}{missing}"
    rows = []
    for item, home in zip(similar.cases, homes or [OWN] * len(similar.cases), strict=True):
        pairs = "".join(
            '<span class="hs-pair">'
            + "".join(
                f'<button class="hs-open hs-mini" data-open="{key}" aria-label="Open tile {tile}{of}">'
                f'<img loading="lazy" src="{tile_url(key)}" alt="tile {tile}{of}" width="72" height="72">'
                "</button>"
                for key, tile, of in _tiles(pair, home)
            )
            + f"<small>{pair.score:.3f}</small></span>"
            for pair in item.pairs[:4]
        )
        label = f" · {escape(item.label)}" if item.label else ""
        atlas = f" · atlas {escape(home.name)}" if home.name else ""
        rows.append(
            f"<li><div><b>{escape(item.name)}</b>{label} <small>score {item.score:.3f}{atlas}</small></div>"
            f'<div class="hs-pairs">{pairs}</div></li>'
        )
    return (
        f"<h3>Similar {what}, with pairs of similar tiles (of this one, of the other one)</h3>"
        f'<ol class="hs-similar">{"".join(rows)}</ol>{missing}'
    )


def _tiles(pair: Pair, home: Home) -> Iterator[tuple[str, int, str]]:
    """Yield the two tiles of a pair: what the page calls them, their id, and their atlas as a suffix."""
    if pair.query is not None:
        yield str(pair.query), pair.query, ""
    of = f" of {escape(home.name, quote=True)}" if home.number else ""
    yield home.key(pair.match), pair.match, of
