"""Finding similar tiles in one state of an atlas: by filter, without the query's own, one per slide."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ...errors import BadInput
from ..store.rows import Hit
from ..vectors.generations import View
from ..vectors.scan import Metric, prepared
from .filters import parse, select

Mask = NDArray[np.bool_]
Positions = NDArray[np.int64]
Scores = NDArray[np.float32]
Own = Literal["tile", "slide", "patient"]
OWN: tuple[Own, ...] = ("tile", "slide", "patient")
UNLIKE = 0.5
"""Weight of what a query must not be like."""
SLIDE_STEP = 4_096
"""Hits after which a search for one hit per slide leaves out the slides that it has."""


@dataclass(frozen=True)
class Wanted:
    """What a search is to return.

    Attributes:
        k: hits per query.
        where: metadata filter, see :mod:`~histoseek.index.search.filters`.
        least: lowest score of a hit; with it, ``k`` only bounds the answer.
        per_slide: at most one hit per slide.
        exact: compare with every tile, whatever the index.
    """

    k: int = 10
    where: str | None = None
    least: float | None = None
    per_slide: bool = False
    exact: bool = False

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.k < 1:
            raise BadInput(f"k is {self.k}; expected 1 or more")
        if self.least is not None and self.least != self.least:
            raise BadInput("the lowest score is no number; expected one such as 0.8")


def allowed(view: View, where: str | None) -> Mask | None:
    """Return which positions a filter lets through (N,), None for all; kept for the next time."""
    if where is None:
        return None
    return view.columns.mask(where, lambda: select(view.columns, parse(where)))


def find(
    view: View, queries: NDArray[np.float32], wanted: Wanted, mask: Mask | None = None
) -> tuple[Scores, Positions]:
    """Return scores and positions (Q, k'), best first, -1 where there are no more.

    Args:
        view: the state to search.
        queries: (Q, D).
        wanted: what to return.
        mask: (N,) positions that may be found, beside the filter; None for all.
    """
    passing = allowed(view, wanted.where)
    if mask is not None:
        passing = mask if passing is None else passing & mask
    if wanted.per_slide:
        return _one_per_slide(view, queries, wanted, passing)
    if wanted.least is not None:
        answers = view.index.within(queries, wanted.least, passing, wanted.k)
        return _stacked([(scores[: wanted.k], at[: wanted.k]) for scores, at in answers])
    return view.index.search(queries, wanted.k, passing, wanted.exact)


def _stacked(answers: list[tuple[Scores, Positions]]) -> tuple[Scores, Positions]:
    """Lay answers of different lengths side by side."""
    width = max((len(at) for _, at in answers), default=0)
    scores = np.full((len(answers), width), -np.inf, dtype=np.float32)
    positions = np.full((len(answers), width), -1, dtype=np.int64)
    for row, (score, at) in enumerate(answers):
        scores[row, : len(at)], positions[row, : len(at)] = score, at
    return scores, positions


def _one_per_slide(
    view: View, queries: NDArray[np.float32], wanted: Wanted, passing: Mask | None
) -> tuple[Scores, Positions]:
    return _stacked([_slides_of_one(view, query, wanted, passing) for query in queries])


def _slides_of_one(
    view: View, query: NDArray[np.float32], wanted: Wanted, passing: Mask | None
) -> tuple[Scores, Positions]:
    """Return the best tile of each of the k nearest slides."""
    columns = view.columns
    scores: list[float] = []
    best: list[int] = []
    seen: set[int] = set()
    ask = 4 * wanted.k
    while len(best) < wanted.k:
        found_scores, found = view.index.search(query[None], ask, passing, wanted.exact)
        there = found[0] >= 0
        slides = columns.slide_of(found[0][there])
        for score, at, slide in zip(
            found_scores[0][there].tolist(), found[0][there].tolist(), slides.tolist(), strict=True
        ):
            low = wanted.least is not None and score < wanted.least
            if slide not in seen and not low and len(best) < wanted.k:
                seen.add(slide)
                scores.append(score)
                best.append(at)
        if there.sum() < ask or (
            wanted.least is not None and there.any() and found_scores[0][there][-1] < wanted.least
        ):
            break
        if ask < SLIDE_STEP:
            ask *= 4
        else:  # one slide holds all of them: go on without the slides that are there
            others = np.repeat(
                [n not in seen for n in range(len(columns.slides))], np.diff(columns.starts)
            )
            passing = others if passing is None else passing & others
    return np.array(scores, dtype=np.float32), np.array(best, dtype=np.int64)


def find_like(
    view: View,
    tiles: NDArray[np.int64],
    vectors: NDArray[np.float32],
    wanted: Wanted,
    without: Own = "tile",
) -> tuple[Scores, Positions]:
    """Search by tiles of the atlas itself, leaving out each query's own tile, slide or patient.

    Args:
        view: the state to search.
        tiles: (Q,) positions.
        vectors: (Q, D) theirs.
        wanted: what to return.
        without: what of the query's own is left out; with ``patient`` a tile without one leaves out its
            slide.
    """
    if without not in OWN:
        raise BadInput(f"without is {without!r}; expected one of: {', '.join(OWN)}")
    if without == "tile" and not wanted.per_slide:
        scores, found = find(view, vectors, replace(wanted, k=wanted.k + 1))
        return _stacked(
            [
                (score[keep][: wanted.k], at[keep][: wanted.k])
                for score, at, keep in zip(
                    scores, found, (found >= 0) & (found != tiles[:, None]), strict=True
                )
            ]
        )
    owner = owners(view, without)
    answers: dict[int, tuple[Scores, Positions]] = {}
    for own in np.unique(owner[tiles]):
        rows = np.flatnonzero(owner[tiles] == own)
        scores, found = find(view, vectors[rows], wanted, owner != own)
        for row, score, at in zip(rows.tolist(), scores, found, strict=True):
            answers[row] = score[at >= 0], at[at >= 0]
    return _stacked([answers[row] for row in range(len(tiles))])


def owners(view: View, of: Own) -> NDArray[np.int64]:
    """Return a number for the tile, slide or patient of every position (N,)."""
    count = view.index.positions
    if of == "tile":
        return np.arange(count)
    slide: NDArray[np.int64] = view.columns.keep(
        "owner slide", lambda: view.columns.slide_of(np.arange(count))
    )
    if of == "slide":
        return slide
    patient = view.columns.coded("patient")
    found: NDArray[np.int64] = np.where(
        patient.codes >= 0, len(view.columns.slides) + patient.codes.astype(np.int64), slide
    )
    return found


def combined(
    positive: NDArray[np.float32], negative: NDArray[np.float32], metric: Metric
) -> NDArray[np.float32]:
    """Return one query (1, D) that is like some vectors and unlike others (Rocchio 1971).

    The mean of those to be like, moved away from the mean of those to be unlike by half as much.
    """
    like: NDArray[np.float32] = prepared(positive, metric).mean(axis=0)
    if not len(negative):
        return like[None]
    unlike: NDArray[np.float32] = prepared(negative, metric).mean(axis=0)
    query = like - UNLIKE * unlike if metric == "cosine" else like + UNLIKE * (like - unlike)
    return query[None]


def hits(view: View, scores: Scores, positions: Positions) -> list[list[Hit]]:
    """Join what was found with what is known of it."""
    return view.columns.hits(positions, scores)
