"""Finds similar tiles in one state of an atlas: with a filter, exclusions, or one hit per slide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ...errors import BadInput
from ..store.rows import Hit
from ..vectors.scan import Metric, prepared
from .filters import Every, parse, select, without_fields
from .query import LeaveOut, Query
from .state import State

Mask = NDArray[np.bool_]
Positions = NDArray[np.int64]
Scores = NDArray[np.float32]
UNLIKE = 0.5
"""Weight of the examples to be unlike."""
SLIDE_STEP = 4_096
"""If this many hits are of too few slides, the search goes on without these slides."""


def allowed(state: State, where: str | None, settings: Query | None = None) -> Mask | None:
    """Return which positions (N,) pass a filter, None for all; the mask is cached.

    Args:
        state: the state to search.
        where: the filter.
        settings: a query with fields that are ``absent``, or with a filter that they pass ``also``.
    """
    absent = settings.absent if settings is not None else frozenset[str]()
    also = settings.also if settings is not None else None
    if where is None and also is None:
        return None

    def make() -> Mask:
        parts = [] if where is None else [without_fields(parse(where), absent)]
        return select(state.columns, Every((*parts, *([] if also is None else [also]))))

    key = where or "" if not absent and also is None else repr((where, sorted(absent), also))
    return state.columns.mask(key, make)


def find(
    state: State, queries: NDArray[np.float32], settings: Query, mask: Mask | None = None
) -> tuple[Scores, Positions]:
    """Return scores and positions (Q, k'), best first; -1 fills missing hits.

    Args:
        state: the state to search.
        queries: (Q, D).
        settings: k, filter and so on; its examples are ignored.
        mask: (N,) positions that may be found, in addition to the filter; None for all.
    """
    passing = allowed(state, settings.where, settings)
    if mask is not None:
        passing = mask if passing is None else passing & mask
    if settings.per_slide:
        return _stacked([_slides_of_one(state, query, settings, passing) for query in queries])
    if settings.least is not None:
        answers = state.index.within(queries, settings.least, passing, settings.k)
        return _stacked([(scores[: settings.k], at[: settings.k]) for scores, at in answers])
    return state.index.search(queries, settings.k, passing, settings.exact)


def _stacked(answers: list[tuple[Scores, Positions]]) -> tuple[Scores, Positions]:
    """Stack answers of different lengths, padded."""
    width = max((len(at) for _, at in answers), default=0)
    scores = np.full((len(answers), width), -np.inf, dtype=np.float32)
    positions = np.full((len(answers), width), -1, dtype=np.int64)
    for row, (score, at) in enumerate(answers):
        scores[row, : len(at)], positions[row, : len(at)] = score, at
    return scores, positions


def _slides_of_one(
    state: State, query: NDArray[np.float32], settings: Query, passing: Mask | None
) -> tuple[Scores, Positions]:
    """Return the best tile of each of the k nearest slides."""
    columns = state.columns
    least = -np.inf if settings.least is None else settings.least
    best: dict[int, tuple[float, int]] = {}  # score and position, by slide
    count = 4 * settings.k
    while True:
        scores, positions = state.index.search(query[None], count, passing, settings.exact)
        is_hit = (positions[0] >= 0) & (scores[0] >= least)
        hits = positions[0][is_hit]
        slides, found = columns.slide_of(hits).tolist(), scores[0][is_hit].tolist()
        for slide, score, position in zip(slides, found, hits.tolist(), strict=True):
            best.setdefault(slide, (score, position))
        if len(best) >= settings.k or len(hits) < count:
            break
        if count < SLIDE_STEP:
            count *= 4
        else:  # few slides contain all hits: go on without these slides
            others = np.repeat(
                [n not in best for n in range(len(columns.slides))], np.diff(columns.starts)
            )
            passing = others if passing is None else passing & others
    chosen = list(best.values())[: settings.k]
    return (
        np.array([score for score, _ in chosen], dtype=np.float32),
        np.array([position for _, position in chosen], dtype=np.int64),
    )


def find_like(
    state: State, tiles: NDArray[np.int64], vectors: NDArray[np.float32], settings: Query
) -> tuple[Scores, Positions]:
    """Search by tiles of the atlas, without the tile, slide or patient of each query.

    Args:
        state: the state to search.
        tiles: (Q,) positions of the query tiles.
        vectors: (Q, D) their vectors.
        settings: k, filter, what to leave out and so on; its examples are ignored.
    """
    if settings.leave_out == "tile" and not settings.per_slide:
        scores, found = find(state, vectors, replace(settings, k=settings.k + 1))
        return _stacked(
            [
                (score[keep][: settings.k], at[keep][: settings.k])
                for score, at, keep in zip(
                    scores, found, (found >= 0) & (found != tiles[:, None]), strict=True
                )
            ]
        )
    owner = owners(state, settings.leave_out)
    answers: dict[int, tuple[Scores, Positions]] = {}
    for number in np.unique(owner[tiles]):
        rows = np.flatnonzero(owner[tiles] == number)
        scores, found = find(state, vectors[rows], settings, owner != number)
        for row, score, at in zip(rows.tolist(), scores, found, strict=True):
            answers[row] = score[at >= 0], at[at >= 0]
    return _stacked([answers[row] for row in range(len(tiles))])


def find_together(
    state: State, vector: NDArray[np.float32], tiles: NDArray[np.int64], settings: Query
) -> tuple[Scores, Positions]:
    """Search with one vector (D,) combined from several examples, without the examples themselves.

    Args:
        state: the state to search.
        vector: the combined vector.
        tiles: (T,) positions of the examples that are tiles of the atlas; these tiles, their slides or
            their patients are left out.
        settings: k, filter, what to leave out and so on; its examples are ignored.
    """
    if not len(tiles):
        return find(state, vector[None], settings)
    if settings.leave_out == "tile" and not settings.per_slide:
        scores, found = find(state, vector[None], replace(settings, k=settings.k + len(tiles)))
        keep = (found[0] >= 0) & ~np.isin(found[0], tiles)
        return scores[:, keep][:, : settings.k], found[:, keep][:, : settings.k]
    owner = owners(state, settings.leave_out)
    return find(state, vector[None], settings, ~np.isin(owner, owner[tiles]))


def owners(state: State, of: LeaveOut) -> NDArray[np.int64]:
    """Return the number of the tile, slide or patient that each position (N,) belongs to."""
    count = state.index.positions
    if of == "tile":
        return np.arange(count)
    slide = state.columns.cached("owner", lambda: state.columns.slide_of(np.arange(count)))
    if of == "slide":
        return slide
    patient = state.columns.coded("patient")
    number = len(state.columns.slides) + patient.codes.astype(np.int64)
    return np.where(patient.codes >= 0, number, slide)


def combined(
    positive: NDArray[np.float32], negative: NDArray[np.float32], metric: Metric
) -> NDArray[np.float32]:
    """Return one query (D,) that is like some vectors and unlike others (Rocchio 1971).

    For cosine, it is the mean of the vectors to be like minus half the mean of those to be unlike. For l2,
    it is the mean of the vectors to be like, moved away from the other mean by half their difference.
    """
    like: NDArray[np.float32]
    if not len(negative):
        # One vector stays as it is: clusters are fitted on vectors of any length.
        like = positive[0] if len(positive) == 1 else prepared(positive, metric).mean(axis=0)
        return like
    like = prepared(positive, metric).mean(axis=0)
    unlike: NDArray[np.float32] = prepared(negative, metric).mean(axis=0)
    return like - UNLIKE * unlike if metric == "cosine" else like + UNLIKE * (like - unlike)


def answer(state: State, query: Query) -> list[list[Hit]]:
    """Return hits by example; see :meth:`View.search <histoseek.index.view.View.search>`."""
    state.require_tiles()
    if query.images or query.unlike_images or query.by_text:
        raise BadInput("the query's images or texts are not embedded; call Query.embedded first")
    if query.combines:
        return [answer_near(state, combined_vector(state, query), query)]
    if query.vectors is None and not query.tiles:
        raise BadInput("the query has no example; give an image, or the id of a tile")
    hits: list[list[Hit]] = []
    if query.vectors is not None and len(query.vectors):
        state.check_queries(query.vectors)
        scores, positions = find(state, query.vectors, query)
        hits += state.columns.hits(positions, scores)
    if query.tiles:
        tiles = state.positions(query.tiles)
        scores, positions = find_like(state, tiles, state.index.at(tiles), query)
        hits += state.columns.hits(positions, scores)
    return hits


def answer_near(state: State, vector: NDArray[np.float32], query: Query) -> list[Hit]:
    """Return hits near a vector (D,) that stands for all examples of a query, best first."""
    state.require_tiles()
    scores, positions = find_together(state, vector, state.positions(query.tiles), query)
    return state.columns.hits(positions, scores)[0]


def combined_vector(state: State, query: Query) -> NDArray[np.float32]:
    """Return the vector (D,) that combines all examples of a query, those to be unlike included.

    Raises:
        BadInput: no example to be like.
    """

    def joined(vectors: NDArray[np.float32] | None, tiles: Sequence[int]) -> NDArray[np.float32]:
        stored = state.embeddings_at(state.positions(tiles))
        if vectors is None:
            return stored
        state.check_queries(vectors)
        return np.concatenate([vectors, stored])

    like = joined(query.vectors, query.tiles)
    if not len(like):
        raise BadInput("the query has no example that hits should resemble; expected at least one")
    return combined(like, joined(query.unlike_vectors, query.unlike_tiles), state.metric)
