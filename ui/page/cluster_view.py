"""HTML of clusters and of images assigned to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ...console import counted
from ..session.answers import ClusterAnswer
from ..session.colours import colour_of
from ..session.words import LABELS_SHOWN, cluster_name, cluster_title, sentences
from .view import EXAMPLES, empty


def placed_table(answer: ClusterAnswer, examples: Mapping[int, Sequence[int]]) -> str:
    """Return a table of the assigned and the refused images; ``examples`` are ids of tiles by cluster."""
    rows = []
    for number, (name, placed, hit) in enumerate(
        zip(answer.names, answer.placed, answer.nearest, strict=True)
    ):
        title = escape(cluster_title(placed))
        why = (
            "unlike the stained tissue that the encoder knows"
            if placed["foreign"]
            else "matches no cluster"
        )
        note = f'<span class="hs-unknown">unknown: {why}</span>' if placed["unknown"] else ""
        rows.append(
            f'<tr><td data-label="image">{escape(name)}</td>'
            f'<td data-label="cluster">{dot(placed["cluster"])}{title}</td>'
            f'<td data-label="strength">{placed["strength"]:.2f}</td>'
            f'<td data-label="distance">{placed["distance"]:.3f}</td>'
            f'<td data-label="nearest tile"><button class="hs-open hs-mini" data-open="{hit.tile}" '
            f'aria-label="Open the nearest tile of image {number + 1}"><img src="v1/tiles/{hit.tile}.jpg" '
            f'alt="nearest tile of {escape(name, quote=True)}" width="56" height="56"></button> '
            f"{escape(hit.label or hit.slide)} ({hit.score:.3f})</td>"
            f'<td data-label="its cluster">{_minis(examples.get(placed["cluster"], ()))}</td>'
            f'<td data-label="">{note}</td></tr>'
        )
    rows += [
        f'<tr class="hs-refused"><td data-label="image">{escape(name)}</td>'
        f'<td colspan="6">refused: {escape(why)}</td></tr>'
        for name, why in answer.refused
    ]
    unknown = sum(bool(placed["unknown"]) for placed in answer.placed)
    summary = (
        f"{counted(len(answer.names), 'image')} assigned to {escape(answer.clustering)}, {unknown} of them "
        f"unknown; {len(answer.refused)} refused."
    )
    said = " ".join(filter(None, [summary, escape(sentences(answer.notes))]))
    links = " ".join(
        f'<a href="v1/results/{answer.id}/{kind}" download>{title}</a>'
        for kind, title in (("csv", "CSV"), ("json", "JSON"), ("html", "Report"))
    )
    columns = (
        "image",
        "cluster",
        "strength",
        "distance",
        "nearest tile",
        "examples of its cluster",
        "note",
    )
    head = "".join(f'<th scope="col">{name}</th>' for name in columns)
    return (
        f'<p role="status" id="placed-note">{said} Save: {links}</p><table class="hs-table" id="placed">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )


def _minis(tiles: Sequence[int]) -> str:
    return "".join(
        f'<button class="hs-open hs-mini" data-open="{tile}" aria-label="Open tile {tile}"><img '
        f'loading="lazy" src="v1/tiles/{tile}.jpg" alt="tile {tile}" width="56" height="56"></button>'
        for tile in tiles
    )


def dot(cluster: int) -> str:
    """Return a dot in the colour of a cluster."""
    return (
        f'<span class="hs-dot" style="background:{colour_of(cluster)}" aria-hidden="true"></span>'
    )


def cluster_cards(clusters: Sequence[Mapping[str, Any]], clustering: str) -> str:
    """Return the clusters as cards: examples, size, labels, and an editable name."""
    cards = "".join(_cluster_card(cluster, clustering) for cluster in clusters)
    return f'<div class="hs-clusters">{cards}</div>'


def proposed_names(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the words that fit each cluster best, as a table."""
    if not rows:
        return empty("No names.", "The clustering has no clusters, only noise.")
    body = "".join(
        f"<tr><td>{dot(row['cluster'])}{row['cluster']}</td><td>{escape(row['name'])}</td>"
        f"<td>{escape(', '.join(row['words']))}</td></tr>"
        for row in rows
    )
    heads = "".join(f"<th>{text}</th>" for text in ("cluster", "name now", "words that fit best"))
    return (
        f'<table class="hs-table"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>'
        "<p>The words are ranked among those given; none of them has to be right. Copy the one that you "
        "want into the cluster's name.</p>"
    )


def _cluster_card(cluster: Mapping[str, Any], clustering: str) -> str:
    number = cluster["cluster"]
    name = escape(cluster_name(number), quote=True)
    tiles = "".join(
        f'<button class="hs-open" data-open="{tile["tile"]}" aria-label="Open tile {tile["tile"]} of '
        f'{name}"><img loading="lazy" src="v1/tiles/{tile["tile"]}.jpg" alt="example of {name}" '
        'width="96" height="96"></button>'
        for tile in cluster["examples"][:EXAMPLES]
    )
    total = max(1, cluster["tiles"])
    labels = [(label, n) for label, n in cluster["labels"].items() if label != "(none)"]
    bars = "".join(
        f'<li><span class="hs-bar" style="width:{100 * n / total:.1f}%"></span>'
        f"<span>{escape(label)}</span> <span>{n / total:.0%}</span></li>"
        for label, n in labels[:LABELS_SHOWN]
    )
    title = "No cluster" if number < 0 else f"Cluster {number}"
    named_title = f"{title}: {escape(cluster['name'])}" if cluster["name"] else title
    field = f"hs-name-{number}"
    return (
        f'<section class="hs-cluster" data-cluster="{number}" aria-label="{title}">'
        f"<h2>{dot(number)}{named_title}</h2>"
        f"<p>{counted(cluster['tiles'], 'tile')}, {counted(cluster['slides'], 'slide')}"
        + (f", {cluster['unknown']:,} unknown" if cluster["unknown"] else "")
        + f'</p><div class="hs-examples">{tiles}</div>'
        + (f'<ul class="hs-labels">{bars}</ul>' if bars else "")
        + f'<form class="hs-rename" data-clustering="{escape(clustering, quote=True)}">'
        f'<label for="{field}">Name</label><input id="{field}" name="name" maxlength="200" '
        f'value="{escape(cluster["name"], quote=True)}" placeholder="what its tiles show">'
        f'<label for="{field}-d">Description</label><input id="{field}-d" name="description" '
        f'maxlength="1000" value="{escape(cluster["description"], quote=True)}">'
        '<button type="submit">Save</button><span role="status"></span></form></section>'
    )
