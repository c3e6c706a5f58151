"""Reference values of an atlas: how similar its tiles are, and how many are out of distribution."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...errors import NotFound
from ..vectors.scan import prepared
from .query import Query
from .state import State
from .tiles import find_like


class Nearness(NamedTuple):
    """How similar tiles of an atlas are to their nearest other tile.

    Attributes:
        scores: scores of sampled tiles with their nearest other tile, ascending (T,).
        others: which other tiles: those of another ``patient`` (for a tile without a patient: of another
            slide), or all but the ``tile`` itself, because the atlas has one patient or slide only.
    """

    scores: NDArray[np.float32]
    others: Literal["patient", "tile"]


def usual_nearness(state: State, tiles: int = 200, seed: int = 0) -> Nearness:
    """Return how similar sampled tiles are to their nearest tile of another patient.

    With this one can judge how near the nearest tile of a new image is.
    """
    some = state.sample(tiles, seed)
    vectors = state.index.at(some)
    others: Literal["patient", "tile"] = "tile"
    scores = np.zeros(0, dtype=np.float32)
    for others in ("patient", "tile"):
        scores, positions = find_like(state, some, vectors, Query(k=1, leave_out=others))
        scores = np.sort(scores[positions >= 0])
        if len(scores):
            break
    return Nearness(scores, others)


def out_of_distribution_share(state: State, tiles: int = 1000, seed: int = 0) -> float:
    """Return the out-of-distribution share of sampled tiles; 0 if the encoder has no tissue gate."""
    if not state.manifest.tissue_gate:
        return 0.0
    vectors = state.embeddings_at(state.sample(tiles, seed))
    return float(np.mean(state.manifest.out_of_distribution(vectors)))


def scores_in(state: State, slide: str, query: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the score (N,) of every tile of a slide for one query (D,).

    Raises:
        NotFound: no such slide.
    """
    names = [row["name"] for row in state.columns.slides]
    if not slide or slide not in names:
        raise NotFound(f"{state.store.path} has no slide {slide!r}")
    number = names.index(slide)
    first, end = state.columns.starts[number : number + 2].tolist()
    vectors = state.index.at(np.arange(first, end))
    query = prepared(query[None], state.metric)
    cosine = state.metric == "cosine"
    scores: NDArray[np.float32]
    scores = vectors @ query[0] if cosine else -np.linalg.norm(vectors - query, axis=1)
    return scores
