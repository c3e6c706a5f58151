"""Finds similar slides and cases, and the regions in which they look alike.

Slides are represented by their mosaics. They are compared by the median of the minimum distances from one
mosaic's tiles to the other's (Yottixel, Kalra et al. 2020), or by votes of the nearest tiles of all slides.
Yottixel compares barcodes by Hamming distance; here the embeddings are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...console import counted
from ...errors import BadInput, NotFound, unknown_name, whole
from ..store.packing import MISSING
from ..vectors.scan import Positions, Vectors, prepared, scan
from .query import Query
from .state import State
from .tiles import Mask, allowed, find, owners

How = Literal["median", "votes"]
HOWS: tuple[How, ...] = ("median", "votes")
BYS = ("slide", "patient")
VOTES = 10
"""Number of nearest tiles that vote, per tile of the query's mosaic."""
EVIDENCE = 5
BLOCK = 65_536
"""Mosaic tiles that are compared at once."""
CASE_TILES = 200


class Pair(NamedTuple):
    """Two regions that look alike.

    Attributes:
        score: as in a hit.
        query: id of the query's tile; None if the query is not in the atlas.
        query_row: its row in the query's mosaic.
        match: id of the tile in the atlas.
    """

    score: float
    query: int | None
    query_row: int
    match: int


class Similar(NamedTuple):
    """A slide or case that looks like the query.

    Attributes:
        name: of the slide or the patient.
        score: median of the best scores of the query's tiles (``median``), or share of the votes.
        pairs: the most similar regions, best first.
        label: of the slide or case; None if its tiles differ.
    """

    name: str
    score: float
    pairs: list[Pair]
    label: str | None


@dataclass(frozen=True)
class Case:
    """A slide or case of an atlas, as a query to other atlases.

    Attributes:
        vectors: (Q, D) of its mosaic, prepared.
        tiles: ids (Q,) of these tiles.
        slides: names of the slides or tile sets that it is of.
        patients: whose slides are left out of the answer; empty if none is known.
    """

    vectors: NDArray[np.float32]
    tiles: list[int]
    slides: list[str]
    patients: list[str]


@dataclass(frozen=True)
class QueryTiles:
    """The tiles that stand for a query.

    Attributes:
        positions: (Q,) in the index; -1 for tiles that are not in the atlas.
        vectors: (Q, D) prepared.
    """

    positions: Positions
    vectors: Vectors


def mosaics_of(state: State, chosen: Sequence[int] | None = None) -> Positions:
    """Return the positions (M,) of the mosaics of the slides with these numbers; None for all slides.

    Raises:
        BadInput: none of the slides has tiles.
    """
    slides = state.columns.slides
    positions = [
        state.mosaic_of(number)
        for number in (range(len(slides)) if chosen is None else chosen)
        if slides[number]["tiles"] and slides[number]["name"]
    ]
    if not positions:
        raise BadInput("the atlas has no slides with tiles to compare; add features first")
    return np.concatenate(positions)


@dataclass(frozen=True)
class Owners:
    """The owners of the tiles: slides or cases.

    Attributes:
        number: (N,) number of the owner of each position.
        names: of the owners. A patient and a slide without a patient stay two owners even if their names
            are equal.
        labels: the label of each owner; None if its tiles differ.
    """

    number: NDArray[np.int64]
    names: list[str]
    labels: list[str | None]


def check_by(by: str) -> None:
    """Check what is compared.

    Raises:
        NotFound: it is neither slides nor patients.
    """
    if by not in BYS:
        raise unknown_name("kind of case", by, BYS)


def check_how(how: str) -> None:
    """Check how slides or cases are compared.

    Raises:
        NotFound: there is no such way.
    """
    if how not in HOWS:
        raise unknown_name("way of comparing", how, HOWS)


def nothing_else(where: str | None) -> BadInput:
    """Return the error of a question that leaves nothing to compare with."""
    if where is None:
        return BadInput("there is no other slide to compare with; add slides")
    return BadInput("no other slide passes the filter; use a wider filter, or add slides")


def owners_of(state: State, by: str) -> Owners:
    """Return the slides or the cases; a slide without a patient counts as one case."""
    check_by(by)
    columns = state.columns
    slides = [s["name"] for s in columns.slides]
    number = owners(state, "slide" if by == "slide" else "patient")
    names = [*slides, *columns.coded("patient").names]
    label = columns.coded("label")
    first = np.full(len(names), MISSING - 1, dtype=np.int64)
    first[number[::-1]] = label.codes[::-1]
    mixed = np.zeros(len(names), dtype=bool)
    mixed[number[label.codes != first[number]]] = True
    choices = [*label.names, None, None]  # -1 and -2 mean no label
    labels = [None if mixed[n] else choices[first[n]] for n in range(len(names))]
    return Owners(number, names, labels)


def rank(
    state: State, query: Vectors, mosaics: Positions, owner: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return owners (O,), most similar first, and the median of the query tiles' best scores (O,).

    Args:
        state: whose tiles are compared.
        query: (Q, D) prepared vectors.
        mosaics: (M,) positions of the tiles to compare with.
        owner: (M,) owner of each of them.
    """
    order = np.argsort(owner, kind="stable")
    numbers, starts = np.unique(owner[order], return_index=True)
    ends = [*starts[1:].tolist(), len(order)]
    medians = np.empty(len(numbers), dtype=np.float32)
    first = 0
    while first < len(numbers):
        last = first + 1
        while last < len(numbers) and ends[last] - starts[first] <= BLOCK:
            last += 1
        part = state.index.at(mosaics[order[starts[first] : ends[last - 1]]])
        if state.metric == "cosine":
            scores = query @ part.T
        else:
            centre = part.mean(axis=0)  # shorter vectors lose less to rounding
            a, b = query - centre, part - centre
            squared = np.square(a).sum(1)[:, None] + np.square(b).sum(1) - 2 * (a @ b.T)
            scores = -np.sqrt(np.maximum(squared, 0))
        best = np.maximum.reduceat(scores, starts[first:last] - starts[first], axis=1)
        medians[first:last] = np.median(best, axis=0)
        first = last
    best_first = np.argsort(-medians, kind="stable")
    return numbers[best_first], medians[best_first]


def _by_median(
    state: State, query: QueryTiles, mosaics: Positions, cases: Owners, k: int
) -> list[Similar]:
    metric = state.metric
    owner = cases.number[mosaics]
    numbers, medians = rank(state, query.vectors, mosaics, owner)
    ranked = []
    for number, score in zip(numbers[:k].tolist(), medians[:k].tolist(), strict=True):
        mosaic = mosaics[owner == number]
        scores, best = scan(query.vectors, state.index.at(mosaic), 1, metric)
        nearest = scores[:, 0] if metric == "cosine" else -np.sqrt(np.maximum(-scores[:, 0], 0))
        pairs = _pairs(state, query, np.arange(len(nearest)), mosaic[best[:, 0]], nearest)
        ranked.append(Similar(cases.names[number], score, pairs, cases.labels[number]))
    return ranked


def _by_votes(
    state: State, query: QueryTiles, cases: Owners, k: int, passing: Mask
) -> list[Similar]:
    """Rank by votes of the nearest tiles of the whole atlas; the votes of each query tile add up to one."""
    scores, positions = find(state, query.vectors, Query(k=VOTES), passing)
    is_hit = positions >= 0
    rows, _ = np.nonzero(is_hit)
    scores, positions = scores[is_hit], positions[is_hit]
    owner = cases.number[positions]
    votes = np.zeros(len(cases.names))
    np.add.at(votes, owner, 1 / is_hit.sum(axis=1)[rows])
    votes /= max(1, len(query.vectors))
    ranked = []
    for number in np.argsort(-votes, kind="stable")[:k].tolist():
        if votes[number] == 0:
            break
        voted = owner == number
        pairs = _pairs(state, query, rows[voted], positions[voted], scores[voted])
        name, label = cases.names[number], cases.labels[number]
        ranked.append(Similar(name, float(votes[number]), pairs, label))
    return ranked


def _pairs(
    state: State,
    query: QueryTiles,
    query_rows: NDArray[np.int64],
    matches: Positions,
    scores: NDArray[np.float32],
) -> list[Pair]:
    """Return the most similar regions; each tile of query and match is used at most once."""
    ids = state.columns.ids
    pairs: list[Pair] = []
    used: set[int] = set()
    used_rows: set[int] = set()
    for n in np.argsort(-scores, kind="stable").tolist():
        row, match = int(query_rows[n]), int(ids(matches[n : n + 1])[0])
        if match in used or row in used_rows:
            continue
        used.add(match)
        used_rows.add(row)
        position = query.positions[row : row + 1]
        tile = None if position[0] < 0 else int(ids(position)[0])
        pairs.append(Pair(round(float(scores[n]), 6), tile, row, match))
        if len(pairs) == EVIDENCE:
            break
    return pairs


def similar_slides(
    state: State,
    query: str | NDArray[np.float32],
    k: int = 10,
    by: Literal["slide", "patient"] = "slide",
    how: How = "median",
    where: str | None = None,
    settings: Query | None = None,
) -> list[Similar]:
    """Return similar slides or cases; see :meth:`View.similar <histoseek.index.view.View.similar>`.

    ``settings`` is set by a federation: fields that are ``absent``, and a filter that tiles pass ``also``.
    With it, the answer is empty instead of an error if there is nothing to compare with.
    """
    k = whole(k, "k")
    if k < 1:
        raise BadInput(f"k is {k}; expected 1 or more")
    if not (
        isinstance(query, str) or (isinstance(query, np.ndarray) and query.ndim and len(query))
    ):
        raise BadInput(
            f"the query is {query!r}; expected the name of a slide or case, or vectors (Q, D) of one"
        )
    check_how(how)
    cases = owners_of(state, by)
    others = state.columns.alive()
    if isinstance(query, str):
        asked, left_out = _of_the_atlas(state, cases, query, by)
        others &= ~left_out
    else:
        state.check_queries(query)
        asked = QueryTiles(np.full(len(query), -1), prepared(query, state.metric))
    passing = allowed(state, where, settings)
    others = others if passing is None else others & passing
    found: list[Similar] = []
    if others.any() and how == "votes":
        found = _by_votes(state, asked, cases, k, others)
    elif others.any():
        mosaics = mosaics_of(state)
        found = _by_median(state, asked, mosaics[others[mosaics]], cases, k)
    if not found and settings is None:
        raise nothing_else(where)
    return found


def unknown_patients(state: State) -> list[str]:
    """Return a note if the patient of some tiles is unknown: that patient's slides are not left out."""

    def count() -> tuple[int, int]:
        unknown, starts = state.columns.coded("patient").codes < 0, state.columns.starts
        parts = [
            bool(unknown[starts[n] : starts[n + 1]].any())
            for n, slide in enumerate(state.columns.slides)
            if slide["name"] and slide["tiles"]
        ]
        return sum(parts), len(parts)

    unknown, slides = state.columns.cached("unknown patients", count)
    if not unknown:
        return []
    return [
        f"the patient of tiles in {unknown} of {counted(slides, 'slide')} is unknown: slides of the "
        "query's patient may be among the answers"
    ]


def case_of(state: State, name: str, by: str) -> Case:
    """Return a slide or case by name.

    Raises:
        NotFound: there is none of that name.
    """
    columns = state.columns
    asked, left_out = _of_the_atlas(state, owners_of(state, by), name, by)
    patient = columns.coded("patient")
    codes = np.unique(patient.codes[left_out])
    slides = np.unique(columns.slide_of(asked.positions)).tolist()
    return Case(
        asked.vectors, columns.ids(asked.positions).tolist(),
        [columns.slides[n]["name"] for n in slides],
        [patient.names[code] for code in codes[codes >= 0].tolist()],
    )  # fmt: skip


def _of_the_atlas(
    state: State, cases: Owners, name: str, by: str
) -> tuple[QueryTiles, NDArray[np.bool_]]:
    """Return the mosaic of a slide or case, and which positions (N,) belong to it or to its patients."""
    present = np.flatnonzero(np.bincount(cases.number)).tolist()
    numbers = [n for n in present if cases.names[n] == name]
    if not numbers:
        if name in cases.names:
            raise NotFound(f"{by} {name!r} has no tiles, so nothing can be compared with it")
        raise unknown_name(by, name, [cases.names[n] for n in present if cases.names[n]])
    inside = cases.number == numbers[-1]  # a patient takes precedence over a slide of the same name
    slides = np.unique(state.columns.slide_of(np.flatnonzero(inside))).tolist()
    mosaic = mosaics_of(state, slides)
    mosaic = mosaic[inside[mosaic]]
    if not len(mosaic):  # the mosaic of the tile set has no tile of this case
        mosaic = np.flatnonzero(inside)[:CASE_TILES]
    patient = state.columns.coded("patient").codes
    patients = np.unique(patient[inside])
    query = QueryTiles(mosaic, state.index.at(mosaic))
    return query, inside | np.isin(patient, patients[patients >= 0])
