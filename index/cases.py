"""Slides and cases as a whole: which slide looks like this one, and in which regions.

Slides are represented by their mosaics and compared by the median of the minimum distances from one
mosaic's tiles to the other's (Yottixel, Kalra et al. 2020), or by how the nearest tiles of all slides vote.
Yottixel compares barcodes by Hamming distance; here the embeddings themselves are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import BadInput, unknown_name
from .generations import View
from .search import Mask, Wanted, allowed, find
from .vectors import Metric, prepared, scan

if TYPE_CHECKING:
    from .atlas import Atlas

How = Literal["median", "votes"]
HOWS: tuple[How, ...] = ("median", "votes")
VOTES = 10
"""Nearest tiles that vote, per tile of the query's mosaic."""
EVIDENCE = 5


@dataclass(frozen=True)
class Pair:
    """Two regions that look alike.

    Attributes:
        score: as of a hit.
        query: position of the tile in the query; -1 if the query is not of the atlas.
        query_row: its row in the query's mosaic.
        match: position of the tile in the atlas.
    """

    score: float
    query: int
    query_row: int
    match: int


@dataclass(frozen=True)
class Similar:
    """A slide or case that looks like the query.

    Attributes:
        name: of the slide or the patient.
        score: median of the best scores of the query's tiles (``median``), or share of the votes.
        pairs: the most similar regions, best first.
        label: of the slide; None if its slides differ.
    """

    name: str
    score: float
    pairs: list[Pair]
    label: str | None


@dataclass(frozen=True)
class Mosaics:
    """The mosaics of all slides of a state, one after another.

    Attributes:
        positions: (M,) in the index.
        vectors: (M, D) prepared.
        slide: (M,) number of the slide.
    """

    positions: NDArray[np.int64]
    vectors: NDArray[np.float32]
    slide: NDArray[np.int64]


def mosaics_of(
    view: View,
    read: Callable[[Mapping[str, Any]], tuple[NDArray[np.int64], NDArray[np.float32]]],
    names: Sequence[str] | None = None,
) -> Mosaics:
    """Return the mosaics of slides, by name, or of all.

    Args:
        view: the state.
        read: gives rows (M,) and prepared vectors (M, D) of the mosaic of a row of ``slides``.
        names: of slides; None for all.

    Raises:
        BadInput: no such slide has tiles.
    """
    positions, vectors, slides = [], [], []
    for number, slide in enumerate(view.columns.slides):
        if slide["tiles"] and slide["name"] and (names is None or slide["name"] in names):
            rows, own = read(slide)
            positions.append(rows + view.columns.starts[number])
            vectors.append(own)
            slides.append(np.full(len(rows), number))
    if not positions:
        raise BadInput("there are no slides with tiles to compare; add features first")
    return Mosaics(np.concatenate(positions), np.concatenate(vectors), np.concatenate(slides))


def similar(
    view: View,
    query: NDArray[np.float32],
    query_positions: NDArray[np.int64],
    all_: Mosaics,
    metric: Metric,
    k: int,
    by: Literal["slide", "patient"] = "slide",
    how: How = "median",
    passing: Mask | None = None,
) -> list[Similar]:
    """Rank slides or cases by their likeness to a query's mosaic.

    Args:
        view: the state.
        query: (Q, D) prepared vectors of the query's mosaic.
        query_positions: (Q,) theirs in the atlas, -1 if they are not of it.
        all_: the mosaics of the atlas.
        metric: of the vectors.
        k: slides or cases.
        by: what is ranked; a slide without a patient is a case of its own.
        how: ``median`` of the minimum distances, or ``votes`` of the nearest tiles.
        passing: (N,) positions that count; None for all.
    """
    if how not in HOWS:
        raise unknown_name("way of comparing", how, HOWS)
    owner, names = _owners(view, by)
    if how == "votes":
        return _by_votes(view, query, query_positions, owner, names, k, passing)
    used = np.ones(len(all_.positions), dtype=bool) if passing is None else passing[all_.positions]
    ranked: list[Similar] = []
    for number in np.unique(owner[all_.slide[used]]):
        rows = np.flatnonzero(used & (owner[all_.slide] == number))
        scores, best = scan(query, all_.vectors[rows], 1, metric)
        nearest = scores[:, 0] if metric == "cosine" else -np.sqrt(np.maximum(-scores[:, 0], 0))
        matches = all_.positions[rows[best[:, 0]]]
        ranked.append(
            Similar(
                names[number],
                float(np.median(nearest)),
                _pairs(nearest, query_positions, matches),
                _label(view, owner, number),
            )
        )
    return sorted(ranked, key=lambda s: -s.score)[:k]


def _by_votes(
    view: View,
    query: NDArray[np.float32],
    query_positions: NDArray[np.int64],
    owner: NDArray[np.int64],
    names: list[str],
    k: int,
    passing: Mask | None,
) -> list[Similar]:
    """Let the nearest tiles of the whole atlas vote, each query tile with one vote in all."""
    scores, found = find(view, query, Wanted(k=VOTES), passing)
    there = found >= 0
    votes = np.zeros(len(names))
    share = 1 / np.maximum(there.sum(axis=1), 1)
    rows, _ = np.nonzero(there)
    voted = owner[view.columns.slide_of(found[there])]
    np.add.at(votes, voted, share[rows])
    votes /= max(1, len(query))
    ranked = []
    for number in np.argsort(-votes, kind="stable")[:k]:
        if votes[number] == 0:
            break
        own = voted == number
        pairs = _pairs(scores[there][own], query_positions[rows[own]], found[there][own], rows[own])
        ranked.append(
            Similar(names[number], float(votes[number]), pairs, _label(view, owner, int(number)))
        )
    return ranked


def _owners(view: View, by: str) -> tuple[NDArray[np.int64], list[str]]:
    """Return the number of the slide or case that each slide belongs to (S,), and their names."""
    slides = view.columns.slides
    if by == "slide":
        return np.arange(len(slides)), [s["name"] for s in slides]
    if by != "patient":
        raise unknown_name("kind of case", by, ("slide", "patient"))
    cases = [s["patient"] or s["name"] for s in slides]
    names = list(dict.fromkeys(cases))
    number = {name: n for n, name in enumerate(names)}
    return np.array([number[case] for case in cases], dtype=np.int64), names


def _label(view: View, owner: NDArray[np.int64], number: int) -> str | None:
    labels = {view.columns.slides[n]["label"] for n in np.flatnonzero(owner == number).tolist()}
    return labels.pop() if len(labels) == 1 else None


def _pairs(
    scores: NDArray[np.float32],
    query_positions: NDArray[np.int64],
    matches: NDArray[np.int64],
    query_rows: NDArray[np.int64] | None = None,
) -> list[Pair]:
    """Return the most similar regions, each tile of either side once."""
    rows = np.arange(len(scores)) if query_rows is None else query_rows
    pairs: list[Pair] = []
    used: set[int] = set()
    asked: set[int] = set()
    for n in np.argsort(-scores, kind="stable").tolist():
        if int(matches[n]) in used or int(rows[n]) in asked:
            continue
        used.add(int(matches[n]))
        asked.add(int(rows[n]))
        pairs.append(
            Pair(round(float(scores[n]), 6), int(query_positions[n]), int(rows[n]), int(matches[n]))
        )
        if len(pairs) == EVIDENCE:
            break
    return pairs


def similar_slides(
    atlas: Atlas,
    query: str | NDArray[np.float32],
    k: int,
    by: Literal["slide", "patient"],
    how: How,
    where: str | None,
) -> list[Similar]:
    """Rank the slides or cases of an atlas; see :meth:`Atlas.similar_slides`."""
    if k < 1:
        raise BadInput(f"k is {k}; expected 1 or more")
    view = atlas.view()
    metric = atlas.manifest.metric
    slides = view.columns.slides
    owner, names = _owners(view, by)
    own: set[int] = set()
    read = atlas.generations.mosaic_of
    if isinstance(query, str):
        if query not in names:
            raise unknown_name(by, query, [name for name in names if name][:20])
        own = set(np.flatnonzero(owner == names.index(query)).tolist())
        asked = mosaics_of(view, read, [slides[n]["name"] for n in own])
        vectors, positions = asked.vectors, asked.positions
        patients = {slides[n]["patient"] for n in own} - {None}
        own |= {n for n, slide in enumerate(slides) if slide["patient"] in patients}
    else:
        atlas.check_queries(query)
        vectors = prepared(query, metric)
        positions = np.full(len(query), -1, dtype=np.int64)
    passing = allowed(view, where)
    others = np.repeat([n not in own for n in range(len(slides))], np.diff(view.columns.starts))
    passing = others if passing is None else passing & others
    if not passing.any():
        raise BadInput("no other slide passes; loosen the filter, or add slides")
    all_ = mosaics_of(view, read)
    return similar(view, vectors, positions, all_, metric, k, by, how, passing)
