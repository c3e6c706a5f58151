"""Texts for users, shared by page, API and report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...index.store.rows import Hit
from .answers import SearchAnswer

NOTICE_TEXT = "Research use only. Similarity is no diagnosis."
LABELS_SHOWN = 4


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless the number is 1."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def place(hit: Hit) -> str:
    """Return a hit's position: the file in a tile set, x and y in a slide."""
    return hit.file.rsplit("/", 1)[-1] if hit.file else f"x {hit.x}, y {hit.y}"


def cluster_name(cluster: int, names: Mapping[int, str] | None = None) -> str:
    """Return the name of a cluster on the page."""
    if cluster < 0:
        return "no cluster"
    return (names or {}).get(cluster) or f"cluster {cluster}"


def cluster_title(placed: Mapping[str, Any]) -> str:
    """Return the title of an image's assigned cluster."""
    return str(placed["name"] or cluster_name(placed["cluster"]))


def verdict_text(answer: SearchAnswer) -> str:
    """Return a text about the nearest tiles and whether the atlas has anything like the query."""
    found = answer.verdict
    count = len(answer.hits)
    if not count:
        return "No tile passes the filter."
    parts = []
    if any(label for label, _ in found.labels):
        counted = ", ".join(
            f"{label or 'no label'} {n} of {count}" for label, n in found.labels[:LABELS_SHOWN]
        )
        parts.append(f"Nearest labels: {counted}.")
    else:
        counted = ", ".join(f"{slide} ({n})" for slide, n in found.slides[:LABELS_SHOWN])
        parts.append(f"The nearest tiles come from {counted}.")
    if found.foreign:
        parts.append(
            "It is unlike the stained tissue that the encoder knows: what is nearest says little."
        )
    elif found.placed is not None:
        if found.placed["unknown"]:
            parts.append("It fits no cluster of this atlas.")
        else:
            name = cluster_title(found.placed)
            parts.append(f"It belongs to {name} (strength {found.placed['strength']:.2f}).")
    if found.nearer_than is not None:
        parts.append(
            f"It is nearer to the atlas than {found.nearer_than:.0%} of the atlas's own tiles are to "
            "those of other patients."
        )
    if answer.query.examples > 1:
        parts.append("Of several examples together it is not judged whether they fit the atlas.")
    return " ".join(parts)
