"""Finds near-duplicates in an atlas, and leakage between splits of the data."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...console import Progress, no_progress
from ...errors import BadInput, unknown_name
from ..atlas import Atlas
from ..search.tiles import Mask, allowed
from ..view import View

SAME = 0.999
"""Cosine similarity threshold from which two tiles count as the same image."""
NEIGHBOURS = 10
BATCH = 2_048
SHOWN = 1_000
MAX_PARTS = 20


def least_score(view: View, least: float | None) -> float:
    """Return the score threshold for the same image: the given one, or the default for the metric.

    For l2 the default is the score of two vectors of typical length with a cosine of :data:`SAME`.

    Raises:
        BadInput: no two tiles can have the given score.
    """
    cosine = view.state.metric == "cosine"
    highest = 1.0 if cosine else 0.0
    if least is not None:
        if not -np.inf < least <= highest:
            raise BadInput(
                f"a score of {least} is not possible; expected a number up to {highest:g}"
            )
        return least
    if cosine:
        return SAME
    sample = next((s for s in view.columns.slides if s["name"] and s["tiles"]), None)
    if sample is None:
        raise BadInput(f"{view.state.store.path} contains no tiles yet; add features first")
    length = float(np.median(np.linalg.norm(view.state.store.vectors_of(sample), axis=1)))
    return -float(np.sqrt(2 - 2 * SAME)) * length


def _near(
    view: View,
    least: float,
    queries: Mask | None,
    candidates: Mask | None,
    k: int,
    progress: Progress,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return pairs (P, 2) of a query tile and a tile near it, and scores (P,)."""
    pairs: list[NDArray[np.int64]] = [np.zeros((0, 2), dtype=np.int64)]
    scores: list[NDArray[np.float32]] = [np.zeros(0, dtype=np.float32)]
    slides = view.columns.slides
    for number, slide in enumerate(slides):
        progress(number + 1, len(slides), slide["name"])
        start = int(view.columns.starts[number])
        rows = np.arange(slide["tiles"])
        if queries is not None:
            rows = rows[queries[start : start + slide["tiles"]]]
        if not slide["name"] or not len(rows):
            continue
        vectors = view.state.store.vectors_of(slide)
        for at in range(0, len(rows), BATCH):
            part = rows[at : at + BATCH]
            score, near = view.index.search(vectors[part], k, candidates)
            positions = start + part
            close = (near >= 0) & (score >= least) & (near != positions[:, None])
            line, column = np.nonzero(close)
            pairs.append(np.stack([positions[line], near[line, column]], axis=1))
            scores.append(score[line, column])
    return np.concatenate(pairs), np.concatenate(scores)


def duplicates(
    atlas: Atlas,
    least: float | None = None,
    where: str | None = None,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Group tiles that are nearly the same.

    Each tile is compared with its 10 nearest tiles. Tiles linked by near-duplicate pairs form one group.

    Args:
        atlas: to search.
        least: score threshold, as in a hit; None takes a cosine of .999.
        where: metadata filter; only tiles that pass are compared.
        progress: called after each slide.

    Returns:
        The numbers of tiles and groups, the groups, largest first, with the fields of their tiles, and
        notes on the filter.
    """
    view = atlas.view()
    least = least_score(view, least)
    mask = allowed(view.state, where)
    pairs, scores = _near(view, least, mask, mask, NEIGHBOURS + 1, progress)
    groups = _groups(pairs)
    slide = view.columns.slide_of
    shown = [
        {
            "tiles": view.columns.tiles(np.array(group[:20])),
            "size": len(group),
            "slides": len(np.unique(slide(np.array(group)))),
        }
        for group in groups[:SHOWN]
    ]
    return {
        "least": least,
        "groups": len(groups),
        "tiles_in_groups": sum(map(len, groups)),
        "across_slides": sum(len(np.unique(slide(np.array(group)))) > 1 for group in groups),
        "shown": shown,
        "most_similar": float(scores.max()) if len(scores) else None,
        "notes": view.notes(where),
    }


def _groups(pairs: NDArray[np.int64]) -> list[list[int]]:
    """Return the connected components of the pairs, largest first."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    if not len(pairs):
        return []
    members, number = np.unique(pairs, return_inverse=True)
    number = number.reshape(pairs.shape)
    size = len(members)
    graph = coo_matrix((np.ones(len(pairs)), (number[:, 0], number[:, 1])), shape=(size, size))
    _, group = connected_components(graph, directed=False)
    order = np.argsort(group, kind="stable")
    parts = np.split(members[order], np.flatnonzero(np.diff(group[order])) + 1)
    return sorted((part.tolist() for part in parts), key=lambda part: (-len(part), part[0]))


def leakage(
    atlas: Atlas,
    split: str,
    least: float | None = None,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Check whether parts of a data set share patients or images.

    Args:
        atlas: to search.
        split: column that names the part of each slide or tile, such as train and test.
        least: score threshold for the same image; None takes a cosine of .999.
        progress: called after each slide.

    Returns:
        For each pair of parts: patients in both, tiles of the first that have a near-duplicate in the
        second, and examples.

    Raises:
        BadInput: there is no such column, or it has fewer than 2 or more than 20 parts.
    """
    view = atlas.view()
    if split not in view.columns.names():
        raise unknown_name("column", split, view.columns.names())
    part, patient = view.columns.coded(split), view.columns.coded("patient")
    if not 2 <= len(part.names) <= MAX_PARTS:
        raise BadInput(
            f"column {split!r} has {len(part.names)} value(s); expected 2 to {MAX_PARTS}, such as train "
            "and test"
        )
    least = least_score(view, least)
    alive = view.columns.alive()
    reports = []
    for a, b in combinations(range(len(part.names)), 2):
        of_a, of_b = alive & (part.codes == a), alive & (part.codes == b)
        both = np.intersect1d(patient.codes[of_a], patient.codes[of_b]).tolist()
        names = sorted(patient.names[code] for code in both if code >= 0)
        pairs, scores = _near(view, least, of_a, of_b, 1, progress)
        examples = pairs[np.argsort(-scores, kind="stable")][:20]
        reports.append(
            {
                "parts": [part.names[a], part.names[b]],
                "patients_in_both": len(names),
                "patients": names[:50],
                "near_duplicates": len(pairs),
                "examples": [view.columns.tiles(pair) for pair in examples],
            }
        )
    return {
        "split": split,
        "least": least,
        "tiles_without_part": int((alive & (part.codes < 0)).sum()),
        "tiles_without_patient": int((alive & (patient.codes < 0)).sum()),
        "leaks": any(r["patients_in_both"] or r["near_duplicates"] for r in reports),
        "parts": reports,
    }
