"""The verdict on a query: a summary of its nearest tiles, and whether the atlas has anything like it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ...index.atlas import Atlas
from ...index.search.nearness import Nearness
from ...index.search.query import Query
from ...index.store.rows import Hit
from ...index.view import View
from .answers import Verdict
from .background import Background

UNUSUAL = 0.01
"""A query is unusual if at most this share of the atlas's tiles is as far from all others."""


class Usual:
    """What is usual in an atlas: measured in the background, None until then."""

    def __init__(self, atlas: Atlas, background: Background) -> None:
        """Measure nothing yet."""
        self._atlas, self._background = atlas, background

    def nearness(self, revision: int) -> Nearness | None:
        """Return how similar tiles are to their nearest of another patient."""
        return self._background.get("usual", revision, self._atlas.usual_nearness)

    def out_of_distribution(self, revision: int) -> float | None:
        """Return the share of tiles that the encoder calls out of distribution."""
        return self._background.get("foreign", revision, self._atlas.out_of_distribution_share)


def verdict_of(
    usual: Usual,
    view: View,
    query: Query,
    clustering: str | None,
    vector: NDArray[np.float32],
    hits: list[Hit],
    by_text: bool,
    alone: bool = True,
) -> Verdict:
    """Return the verdict on a query.

    Args:
        usual: how near tiles of the atlas usually are.
        view: the state that was searched.
        query: its images are embedded.
        clustering: to assign the query to; the newest when None.
        vector: (D,) that was compared.
        hits: the most similar tiles.
        by_text: whether the query has texts. Their vectors are far from those of all images, so neither
            clusters nor usual distances of images say anything about them.
        alone: whether all hits are tiles of this atlas.
    """
    single = query.examples == 1 and not by_text
    placed = view.assign(vector[None], clustering)[0] if single and view.clusterings() else None
    nearness = usual.nearness(view.revision) if single else None
    nearer = _nearer_than(nearness, view, query, vector, hits if alone else None)
    no_cluster = bool(placed and placed["unknown"])
    unusual = nearer is not None and nearer < UNUSUAL
    foreign = single and bool(view.state.manifest.out_of_distribution(vector[None])[0])
    if foreign and placed is not None:
        foreign = no_cluster  # clusters override the tissue gate
    elif foreign:  # an atlas of images that are not tissue overrides it, too
        share = usual.out_of_distribution(view.revision)
        foreign = share is None or share <= 0.5
    return Verdict(
        labels=Counter(hit.label for hit in hits).most_common(),
        slides=Counter(hit.slide for hit in hits).most_common(),
        placed=placed,
        nearer_than=nearer,
        unknown=foreign or no_cluster or unusual,
        foreign=foreign,
        compared_with=nearness.others if nearness else "patient",
    )


def _nearer_than(
    nearness: Nearness | None,
    view: View,
    query: Query,
    vector: NDArray[np.float32],
    hits: list[Hit] | None,
) -> float | None:
    """Return the share of tiles that are farther from their nearest tile than the query from its best hit.

    ``hits`` are those of the atlas; None if they are not known.

    None until the usual nearness of the atlas's tiles is computed, or if there is no hit.
    """
    if nearness is None or not len(nearness.scores):
        return None
    best = hits
    if best is None or query.where or query.least is not None or query.leave_out != "tile":
        # compare with the whole atlas
        whole = replace(query, where=None, least=None, k=1, per_slide=False, leave_out="tile")
        best = view.search_near(vector, whole)
    if not best:
        return None
    scores = nearness.scores
    return float(np.searchsorted(scores, best[0].score, side="left") / len(scores))
