"""How answers look: captions, tables, the map, the text of the about tab."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ..images import Rgb
from ..index.atlas import Hit
from .handlers import Clustered, Map, Similar

NOTICE = "**Research use only.** Similarity is no diagnosis."
HIT_COLUMNS = ["rank", "score", "slide", "place", "label", "patient", "cluster"]
PLACED_COLUMNS = ["image", "cluster", "strength", "distance", "note"]
# Okabe & Ito's palette without black: told apart with any colour vision.
COLOURS = ["#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"]
SYMBOLS = ["circle", "square", "diamond", "triangle-up", "cross"]
NONE_COLOUR = "#9a9a9a"


def place(hit: Hit) -> str:
    """Say where a hit is: the file in a tile set, x and y in a slide."""
    return hit.file.rsplit("/", 1)[-1] if hit.file else f"x {hit.x}, y {hit.y}"


def caption(hit: Hit) -> str:
    """Return the line under a tile of the gallery."""
    parts = [f"#{hit.rank}", f"{hit.score:.3f}", hit.slide, place(hit)]
    if hit.label:
        parts.append(hit.label)
    if hit.cluster is not None:
        parts.append(cluster_name(hit.cluster))
    return " · ".join(parts)


def cluster_name(cluster: int) -> str:
    """Return how a cluster is called on the page."""
    return "no cluster" if cluster < 0 else f"cluster {cluster}"


def gallery(answer: Similar) -> list[tuple[Image.Image, str]]:
    """Return pictures with captions; a tile that cannot be read becomes a card with the reason."""
    return [
        (Image.fromarray(picture if not isinstance(picture, str) else _card(picture)), caption(hit))
        for hit, picture in zip(answer.hits, answer.pictures, strict=True)
    ]


def _card(text: str, side: int = 224) -> Rgb:
    card = Image.new("RGB", (side, side), "#eeeeee")
    words, lines = text.split(), [""]
    for word in words:
        if len(lines[-1]) + len(word) > 32:
            lines.append("")
        lines[-1] += f"{word} "
    ImageDraw.Draw(card).multiline_text((10, 10), "\n".join(lines[:14]), fill="#333333")
    return np.asarray(card)


def hit_rows(hits: list[Hit]) -> list[list[Any]]:
    """Return the table of hits."""
    return [
        [h.rank, round(h.score, 3), h.slide, place(h), h.label or "", h.patient or "",
         "" if h.cluster is None else cluster_name(h.cluster)]
        for h in hits
    ]  # fmt: skip


def verdict(answer: Similar) -> str:
    """Return one line on what the nearest tiles are and whether the image fits the atlas."""
    labels = Counter(hit.label for hit in answer.hits if hit.label)
    parts = []
    if labels:
        counted = ", ".join(f"{label} ({count})" for label, count in labels.most_common())
        parts.append(f"Labels of the {len(answer.hits)} nearest tiles: **{counted}**.")
    else:
        slides = Counter(hit.slide for hit in answer.hits)
        counted = ", ".join(f"{slide} ({count})" for slide, count in slides.most_common(5))
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
    labels = ", ".join(f"{name} ({count:,})" for name, count in stats["labels"].items())
    fitted = ", ".join(f"{c['name']} ({c['clusters']} clusters)" for c in stats["clusterings"])
    lines = [
        NOTICE,
        "",
        "| | |",
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
        card,
        "",
        "</details>",
    ]
    return "\n".join(lines)
