"""The verdict on a query: a summary of its nearest tiles, and whether the atlas has anything like it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ...index.search.query import Query
from ...index.store.rows import Hit
from ...index.view import View
from .answers import Verdict
from .background import Background

UNUSUAL = 0.01
"""A query is unusual if at most this share of the atlas's tiles is as far from all others."""


def verdict_of(
    view: View,
    query: Query,
    clustering: str | None,
    vector: NDArray[np.float32],
    hits: list[Hit],
    background: Background,
) -> Verdict:
    """Return the verdict on a query.

    Args:
        view: the state that was searched.
        query: the query, with embedded images.
        clustering: clustering to assign the query to; the newest when None.
        vector: (D,) the query vector.
        hits: the hits of the search.
        background: computes how near the atlas's tiles usually are to each other.
    """
    single = query.examples == 1
    placed = view.assign(vector[None], clustering)[0] if single and view.clusterings() else None
    nearer = _nearer_than(view, query, vector, hits, background) if single else None
    foreign = single and bool(view.state.manifest.foreign(vector[None])[0])
    if foreign and placed is not None:
        foreign = placed["unknown"]  # clusters may override the tissue gate
    elif foreign:  # ignore the gate if most of the atlas is out of distribution
        share = background.get("foreign", view.revision, view.out_of_distribution_share)
        foreign = share is None or share <= 0.5
    return Verdict(
        labels=Counter(hit.label for hit in hits).most_common(),
        slides=Counter(hit.slide for hit in hits).most_common(),
        placed=placed,
        nearer_than=nearer,
        unknown=foreign
        or bool(placed and placed["unknown"])
        or (nearer is not None and nearer < UNUSUAL),
        foreign=foreign,
    )


def _nearer_than(
    view: View, query: Query, vector: NDArray[np.float32], hits: list[Hit], background: Background
) -> float | None:
    """Return the share of tiles that are farther from their nearest tile than the query from its best hit.

    None until the usual nearness of the atlas's tiles is computed, or if there is no hit.
    """
    usual = background.get("usual", view.revision, view.usual_nearness)
    if usual is None or not len(usual):
        return None
    best = hits
    if query.where or query.least is not None:  # compare with the whole atlas, without filters
        (best,) = view.search(
            replace(query, where=None, least=None, k=1, per_slide=False, leave_out="tile")
        )
    if not best:
        return None
    return float(np.searchsorted(usual, best[0].score, side="left") / len(usual))
