"""How answers look: captions, tables, the map, the text of the about tab."""

from __future__ import annotations

import base64
import re
from collections import Counter
from html import escape
from typing import Any

from ..images import Rgb, encode_jpeg
from ..index.records import Hit
from .handlers import Clustered, Map, Similar

NOTICE = "**Research use only.** Similarity is no diagnosis."
HIT_COLUMNS = ["rank", "score", "slide", "place", "label", "patient", "cluster"]
PLACED_COLUMNS = ["image", "cluster", "strength", "distance", "note"]
# Okabe & Ito's palette without black: told apart with any colour vision.
COLOURS = ["#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"]
SYMBOLS = ["circle", "square", "diamond", "triangle-up", "cross"]
NONE_COLOUR = "#9a9a9a"


NO_HITS = '<div class="no-hits">The most similar tiles appear here, best first.</div>'


def holds(stats: dict[str, Any]) -> str:
    """Say how much an atlas holds."""
    slides = stats["slides"]
    noun = "slide or tile set" if slides == 1 else "slides and tile sets"
    return f"{stats['tiles']:,} tiles of {slides:,} {noun}"


def plain(text: object) -> str:
    """Escape text for Markdown, so that a name is only ever a name."""
    return re.sub(r"([^\w\s])", lambda m: f"&#{ord(m.group())};", str(text))


def place(hit: Hit) -> str:
    """Say where a hit is: the file in a tile set, x and y in a slide."""
    return hit.file.rsplit("/", 1)[-1] if hit.file else f"x {hit.x}, y {hit.y}"


def cluster_name(cluster: int) -> str:
    """Return how a cluster is called on the page."""
    return "no cluster" if cluster < 0 else f"cluster {cluster}"


def gallery(answer: Similar) -> str:
    """Return the hits as HTML cards: the tile, and under it score, label, slide, place, cluster.

    A tile whose pixels cannot be read becomes a card with the reason. Every text is escaped.
    """
    cards = [_card(hit, picture) for hit, picture in zip(answer.hits, answer.pictures, strict=True)]
    return f'<div class="hits" role="list">{"".join(cards)}</div>'


def _card(hit: Hit, picture: Rgb | str) -> str:
    facts = [hit.label, None if hit.cluster is None else cluster_name(hit.cluster)]
    known = " · ".join(escape(fact) for fact in facts if fact)
    where = f"{hit.slide}, {place(hit)}"
    if isinstance(picture, str):
        image = f'<div class="missing">{escape(picture)}</div>'
    else:
        data = base64.b64encode(encode_jpeg(picture)).decode()
        alt = escape(f"hit {hit.rank}: {where}", quote=True)
        image = f'<img src="data:image/jpeg;base64,{data}" alt="{alt}">'
    return (
        f'<figure role="listitem">{image}<figcaption><b>#{hit.rank}</b> score {hit.score:.3f}<br>'
        f"{known}{'<br>' if known else ''}<small>{escape(where)}</small></figcaption></figure>"
    )


def hit_rows(hits: list[Hit]) -> list[list[Any]]:
    """Return the table of hits."""
    return [
        [h.rank, f"{h.score:.3f}", h.slide, place(h), h.label or "", h.patient or "",
         "" if h.cluster is None else cluster_name(h.cluster)]
        for h in hits
    ]  # fmt: skip


def verdict(answer: Similar) -> str:
    """Return one line on what the nearest tiles are and whether the image fits the atlas."""
    labels = Counter(hit.label or "no label" for hit in answer.hits)
    parts = []
    if set(labels) != {"no label"}:
        counted = ", ".join(f"{plain(label)} ({count})" for label, count in labels.most_common())
        parts.append(f"Labels of the {len(answer.hits)} nearest tiles: **{counted}**.")
    else:
        slides = Counter(hit.slide for hit in answer.hits)
        counted = ", ".join(f"{plain(slide)} ({count})" for slide, count in slides.most_common(5))
        parts.append(f"The {len(answer.hits)} nearest tiles come from **{counted}**.")
    if answer.placed is not None:
        placed = answer.placed
        if placed["unknown"]:
            parts.append("It fits **no cluster** of this atlas: read the hits with care.")
        else:
            name = cluster_name(placed["cluster"])
            parts.append(f"It belongs to **{name}** (strength {placed['strength']:.2f}).")
    return " ".join(parts)


def placed_rows(answer: Clustered) -> list[list[Any]]:
    """Return the table of placed and refused images."""
    rows: list[list[Any]] = [
        [name, cluster_name(p["cluster"]), f"{p['strength']:.2f}", f"{p['distance']:.3f}",
         "unknown: fits no cluster" if p["unknown"] else ""]
        for name, p in zip(answer.names, answer.placed, strict=True)
    ]  # fmt: skip
    return rows + [[name, "", "", "", f"refused: {why}"] for name, why in answer.refused]


def map_figure(atlas: Map, answer: Clustered | None, clustering: str | None) -> Any:
    """Return the plotly figure: the atlas's tiles by cluster, new images as labelled stars."""
    from plotly import graph_objects as go

    figure = go.Figure()
    for cluster in sorted(set(atlas.clusters.tolist())):
        rows = atlas.clusters == cluster
        style = {"size": 6, "opacity": 0.65, "color": NONE_COLOUR, "symbol": "circle-open"}
        if cluster >= 0:
            style["color"] = COLOURS[cluster % len(COLOURS)]
            style["symbol"] = SYMBOLS[cluster // len(COLOURS) % len(SYMBOLS)]
        figure.add_trace(
            go.Scattergl(
                x=atlas.points[rows, 0],
                y=atlas.points[rows, 1],
                mode="markers",
                marker=style,
                name=f"{cluster_name(cluster)} ({int(rows.sum())})",
                hoverinfo="name",
            )
        )
    if answer is not None:
        figure.add_trace(
            go.Scatter(
                x=answer.points[:, 0],
                y=answer.points[:, 1],
                mode="markers+text" if len(answer.names) <= 20 else "markers",
                text=answer.names,
                textposition="top center",
                marker={"size": 15, "symbol": "star", "color": "#111111",
                        "line": {"color": "#ffffff", "width": 1.5}},
                name=f"new images ({len(answer.names)})",
                hovertext=[
                    f"{n}: {cluster_name(p['cluster'])}, strength {p['strength']:.2f}"
                    for n, p in zip(answer.names, answer.placed, strict=True)
                ],
                hoverinfo="text",
            )
        )  # fmt: skip
    shown = (
        f"{atlas.shown:,} of {atlas.total:,} tiles"
        if atlas.shown < atlas.total
        else (f"all {atlas.total:,} tiles")
    )
    figure.update_layout(
        template="plotly_white",
        height=520,
        margin={"l": 10, "r": 10, "t": 50, "b": 10},
        title={"text": f"{clustering or 'not clustered'}: {shown}, first two principal components "
                       f"({atlas.explained:.0%} of the variance)", "font": {"size": 14}},
        legend={"orientation": "h", "y": -0.08},
        xaxis={"showticklabels": False, "title": "component 1"},
        yaxis={"showticklabels": False, "title": "component 2", "scaleanchor": "x"},
    )  # fmt: skip
    return figure


def about(stats: dict[str, Any], card: str) -> str:
    """Return the about tab as Markdown: what the atlas holds and by which encoder."""
    encoder = stats["encoder"]
    labels = ", ".join(f"{plain(name)} ({count:,})" for name, count in stats["labels"].items())
    fitted = ", ".join(f"{c['name']} ({c['clusters']} clusters)" for c in stats["clusterings"])
    lines = [
        NOTICE,
        "",
        "| this atlas | |",
        "|---|---|",
        f"| slides and tile sets | {stats['slides']:,} |",
        f"| tiles | {stats['tiles']:,} |",
        f"| labels | {labels or '–'} |",
        f"| clusterings | {fitted or 'none fitted'} |",
        f"| encoder | {encoder['name']} ({encoder['arch']}), {encoder['dim']}-d, "
        f"{encoder['metric']} |",
        f"| encoder sha256 | `{encoder['sha256']}` |",
        f"| slides are read at | {encoder['mpp'] or '–'} µm per pixel |",
        f"| created | {stats['created_at']} |",
        "",
        "<details><summary>The encoder's card</summary>",
        "",
        escape(card).replace("![", "&#33;["),
        "",
        "</details>",
    ]
    return "\n".join(lines)
