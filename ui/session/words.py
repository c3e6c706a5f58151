"""Texts for users, shared by page, API and report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from ...console import counted
from ...index.federation.answers import Searched, mixed
from ...index.federation.shards import NO_MOSAICS
from ...index.store.rows import Hit
from .answers import SearchAnswer
from .scaled import ScaledImage

NOTICE_TEXT = "Research use only. Similarity is no diagnosis."
TEXT_NOTICE = (
    "The scores rank the tiles for your words; a high rank does not prove that a tile shows them."
)
LABELS_SHOWN = 4
OTHERS = {
    "patient": "tile of another patient or slide",
    "tile": "other tile (there is only one patient or slide)",
}


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


def scaled_text(images: Iterable[ScaledImage]) -> str:
    """Return how images of known scale were cut; "" if there are none."""
    parts = []
    for image in images:
        text = f"{image.name} at {image.mpp:g} µm per pixel: {counted(len(image.boxes), 'tile')}"
        if image.without_tissue:
            text += f", {image.without_tissue:,} without tissue left out"
        if image.not_taken:
            text += f", {image.not_taken:,} more not used"
        parts.append(text + ".")
    return " ".join(parts)


def sentences(notes: Iterable[str]) -> str:
    """Return notes as sentences: with a capital and a full stop."""
    return " ".join(f"{note[:1].upper()}{note[1:]}." for note in notes)


def _of_atlases(answer: SearchAnswer) -> list[str]:
    """Return sentences about the atlases that were searched; none if there is only the server's own."""
    counts = Counter(answer.atlases)
    parts = []
    if counts:
        parts.append(
            "Hits by atlas: " + ", ".join(f"{name} {n}" for name, n in counts.most_common()) + "."
        )
    if away := not_searched(answer.searched):
        parts.append(away)
    if answer.shared_slides:
        once = "; of each, the best hit is shown" if answer.query.per_slide else ""
        verb = "is" if answer.shared_slides == 1 else "are"
        parts.append(f"{counted(answer.shared_slides, 'slide')} {verb} in several atlases{once}.")
    if mixed(answer.searched):
        parts.append(
            "The atlases have tiles of different scales, whose scores say little together."
        )
    return parts


def not_searched(shards: Iterable[Searched]) -> str:
    """Return sentences that name the atlases that were not searched; "" if all were."""
    away = [shard for shard in shards if shard.away]
    of_milvus = [shard.atlas for shard in away if shard.away == NO_MOSAICS]
    silent = [shard.atlas for shard in away if shard.away != NO_MOSAICS]
    parts = []
    if silent:
        parts.append(f"Not searched, because they did not answer: {', '.join(silent)}.")
    if of_milvus:
        parts.append(f"Not compared, because Milvus has no mosaics: {', '.join(of_milvus)}.")
    return " ".join(parts)


def verdict_text(answer: SearchAnswer) -> str:
    """Return a text about the nearest tiles and whether the atlas has anything like the query."""
    verdict = answer.verdict
    count = len(answer.hits)
    if not count:
        return " ".join(["No tile passes the filter.", *_of_atlases(answer)])
    if any(label for label, _ in verdict.labels):
        labels = verdict.labels[:LABELS_SHOWN]
        counts = ", ".join(f"{label or 'no label'} {n} of {count}" for label, n in labels)
        parts = [f"Nearest labels: {counts}."]
    else:
        slides = verdict.slides[:LABELS_SHOWN]
        counts = ", ".join(f"{slide} ({n})" for slide, n in slides)
        parts = [f"The nearest tiles come from {counts}."]
    parts += _of_atlases(answer)
    placed = verdict.placed
    if verdict.foreign:
        parts.append(
            "The query is unlike the stained tissue that the encoder knows, so the nearest tiles mean "
            "little."
        )
    elif placed is not None and placed["unknown"]:
        parts.append("The query fits no cluster of this atlas.")
    elif placed is not None:
        strength = f"strength {placed['strength']:.2f}"
        parts.append(f"The query belongs to {cluster_title(placed)} ({strength}).")
    if verdict.nearer_than is not None:
        atlas = "the server's own atlas" if answer.searched else "the atlas"
        parts.append(
            f"For {verdict.nearer_than:.0%} of the tiles of {atlas}, the nearest "
            f"{OTHERS[verdict.compared_with]} is farther away than the query's nearest tile."
        )
    if answer.scaled:
        parts.append(scaled_text(answer.scaled))
    if answer.notes:
        parts.append(sentences(answer.notes))
    if answer.query.by_text:
        parts.append(TEXT_NOTICE)
    elif answer.query.examples > 1:
        parts.append("For several examples together, the fit to the atlas is not computed.")
    return " ".join(parts)
