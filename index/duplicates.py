"""Near-duplicates in an atlas, and whether two splits of the data leak into each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..console import Report
from ..errors import BadInput, unknown_name
from .search import allowed

if TYPE_CHECKING:
    from .atlas import Atlas
    from .generations import View

LEAST = 0.999
"""Cosine similarity from which on two tiles count as the same picture."""
NEIGHBOURS = 10
BATCH = 2_048
SHOWN = 1_000


def pairs(
    atlas: Atlas,
    least: float,
    where: str | None = None,
    progress: Report = lambda done, total, text: None,
) -> tuple[View, NDArray[np.int64], NDArray[np.float32]]:
    """Return the pairs of tiles that are at least so similar.

    Args:
        atlas: to look through.
        least: score, as of a hit.
        where: only among tiles that pass this filter.
        progress: called after each slide.

    Returns:
        The state that was looked at, positions (P, 2) with the smaller first, and scores (P,).
    """
    view = atlas.view()
    mask = allowed(view, where)
    found: list[NDArray[np.int64]] = [np.zeros((0, 2), dtype=np.int64)]
    scores: list[NDArray[np.float32]] = [np.zeros(0, dtype=np.float32)]
    slides = view.columns.slides
    for number, slide in enumerate(slides):
        progress(number + 1, len(slides), slide["name"])
        if not slide["name"]:
            continue
        start = int(view.columns.starts[number])
        rows = np.arange(slide["tiles"])
        if mask is not None:
            rows = rows[mask[start : start + slide["tiles"]]]
        vectors = atlas.generations.vectors_of(slide)
        for at in range(0, len(rows), BATCH):
            part = rows[at : at + BATCH]
            for own, near, score in _near(view, start + part, vectors[part], least, mask):
                found.append(np.stack([np.minimum(own, near), np.maximum(own, near)], axis=1))
                scores.append(score)
    all_, score = np.concatenate(found), np.concatenate(scores)
    unique, first = np.unique(all_, axis=0, return_index=True)
    return view, unique.reshape(-1, 2), score[first]


def _near(
    view: View,
    positions: NDArray[np.int64],
    vectors: NDArray[np.float32],
    least: float,
    mask: NDArray[np.bool_] | None,
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]]:
    """Yield tiles, tiles near them, and scores; looks further where all that were found are near."""
    k = NEIGHBOURS + 1
    while len(positions):
        scores, found = view.index.search(vectors, k, mask)
        near = (found >= 0) & (scores >= least)
        more = near.all(axis=1) & (found.shape[1] == k) & (k < view.index.positions)
        near &= (found != positions[:, None]) & ~more[:, None]
        rows, columns = np.nonzero(near)
        yield positions[rows], found[rows, columns], scores[rows, columns]
        positions, vectors, k = positions[more], vectors[more], 4 * k


def duplicates(
    atlas: Atlas,
    least: float = LEAST,
    where: str | None = None,
    progress: Report = lambda done, total, text: None,
) -> dict[str, Any]:
    """Group the tiles that are nearly the same.

    Returns:
        How many tiles and groups, and the groups, largest first, with what is known of their tiles.
    """
    view, found, scores = pairs(atlas, least, where, progress)
    groups = _groups(found)
    slide = view.columns.slide_of
    shown = [
        {
            "tiles": list(atlas.tiles(view.columns.ids(np.array(group[:20])).tolist()).values()),
            "size": len(group),
            "slides": len(np.unique(slide(np.array(group)))),
        }
        for group in groups[:SHOWN]
    ]
    return {
        "least": least,
        "pairs": len(found),
        "groups": len(groups),
        "tiles_in_groups": sum(map(len, groups)),
        "across_slides": sum(len(np.unique(slide(np.array(group)))) > 1 for group in groups),
        "shown": shown,
        "most_similar": float(scores.max()) if len(scores) else None,
    }


def _groups(found: NDArray[np.int64]) -> list[list[int]]:
    """Return connected groups of pairs, largest first."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    if not len(found):
        return []
    members, number = np.unique(found, return_inverse=True)
    number = number.reshape(found.shape)
    size = len(members)
    graph = coo_matrix((np.ones(len(found)), (number[:, 0], number[:, 1])), shape=(size, size))
    _, group = connected_components(graph, directed=False)
    order = np.argsort(group, kind="stable")
    parts = np.split(members[order], np.flatnonzero(np.diff(group[order])) + 1)
    return sorted((part.tolist() for part in parts), key=lambda part: (-len(part), part[0]))


def leakage(
    atlas: Atlas,
    split: str,
    least: float = LEAST,
    progress: Report = lambda done, total, text: None,
) -> dict[str, Any]:
    """Check whether parts of a data set share patients or pictures.

    Args:
        atlas: to look through.
        split: column that names the part of each slide or tile, such as train and test.
        least: score from which on two tiles are the same picture.
        progress: called after each slide.

    Returns:
        For each two parts: patients in both, near-duplicates across, and examples.

    Raises:
        BadInput: no such column, or fewer than two parts.
    """
    view = atlas.view()
    if split not in view.columns.names():
        raise unknown_name("column", split, view.columns.names())
    part = view.columns.coded(split)
    if len(part.names) < 2:
        raise BadInput(f"column {split!r} names {len(part.names)} part(s); expected at least 2")
    view, found, scores = pairs(atlas, least, None, progress)
    part, patient = view.columns.coded(split), view.columns.coded("patient")
    alive = np.repeat([bool(s["name"]) for s in view.columns.slides], np.diff(view.columns.starts))
    reports = []
    for a in range(len(part.names)):
        for b in range(a + 1, len(part.names)):
            codes = part.codes[found]
            across = ((codes[:, 0] == a) & (codes[:, 1] == b)) | (
                (codes[:, 0] == b) & (codes[:, 1] == a)
            )
            both = set(patient.codes[alive & (part.codes == a)].tolist()) & set(
                patient.codes[alive & (part.codes == b)].tolist()
            )
            names = sorted(patient.names[code] for code in both - {-1})
            examples = found[across][np.argsort(-scores[across])][:20]
            reports.append(
                {
                    "parts": [part.names[a], part.names[b]],
                    "patients_in_both": len(names),
                    "patients": names[:50],
                    "near_duplicates": int(across.sum()),
                    "examples": [
                        list(atlas.tiles(view.columns.ids(pair).tolist()).values())
                        for pair in examples
                    ],
                }
            )
    lost = int((alive & (patient.codes < 0)).sum())
    return {
        "split": split,
        "least": least,
        "tiles_without_part": int((alive & (part.codes < 0)).sum()),
        "tiles_without_patient": lost,
        "leaks": any(r["patients_in_both"] or r["near_duplicates"] for r in reports),
        "parts": reports,
    }
