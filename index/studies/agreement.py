"""Compares two encoders on the same tiles: which of one's neighbours does the other find?

The tiles that both atlases hold are matched by slide and place, or by the file in a tile set. Every query
is searched among the matched tiles of all other patients, exactly, in both atlases.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import BadInput
from ..atlas import Atlas
from ..search.query import LeaveOut, Query
from ..search.tiles import find, owners
from ..view import View
from .scores import Ints, bootstrap_weights


def agreement(
    one: Atlas,
    other: Atlas,
    k: int = 10,
    queries: int = 2_000,
    leave_out: LeaveOut = "patient",
    draws: int = 1_000,
    seed: int = 0,
) -> dict[str, Any]:
    """Return how many of one atlas's nearest tiles are among those of the other.

    Args:
        one: atlas whose neighbours count as right, such as that of a teacher.
        other: atlas of the same tiles by another encoder, such as its student.
        k: number of neighbours.
        queries: maximum number of query tiles, drawn by ``seed``.
        leave_out: ``tile``, ``slide`` or ``patient``: which tiles are no candidates for a query. Patients
            are those of ``one``; a tile without a patient counts as of its slide.
        draws: number of bootstrap draws over patients for the intervals.
        seed: of the random choices.

    Returns:
        The report, JSON-ready: ``overlap`` is the mean share of the k neighbours that both find,
        ``nearest_found`` how often the nearest tile of ``one`` is among the k of ``other``, each with a
        95 % interval and the value of a random order; the counts of tiles; the encoders.

    Raises:
        BadInput: the atlases have too few tiles in common, or an option is out of range.
    """
    if k < 1 or queries < 1 or draws < 1 or seed < 0:
        raise BadInput(
            f"k is {k}, queries {queries}, draws {draws}, seed {seed}; expected at least 1, 1, 1 and 0"
        )
    views = one.view(), other.view()
    pairs, unmatched = _matched(*views)
    if len(pairs) <= k:
        raise BadInput(
            f"{one.path} and {other.path} have {len(pairs)} tiles in common; expected more than {k}: embed "
            "the same slides with the same size of a tile (--mpp), and with the same names"
        )
    owner = owners(views[0].state, leave_out)[pairs[:, 0]]
    drawn = np.random.default_rng(seed).permutation(len(pairs))[:queries]
    near = [_neighbours(view, pairs[:, n], owner, drawn, k) for n, view in enumerate(views)]
    answered = (near[0] >= 0).any(1)
    drawn, near = drawn[answered], [part[answered] for part in near]
    if not len(drawn):
        raise BadInput(f"no query has a candidate of another {leave_out}; pass another --leave-out")
    found = (near[0][:, :, None] == near[1][:, None, :]) & (near[0] >= 0)[:, :, None]
    wanted = (near[0] >= 0).sum(1)
    values = {
        "overlap": found.any(2).sum(1) / wanted,
        "nearest_found": found[:, 0].any(1).astype(np.float64),
    }
    _, of_query = np.unique(owner[drawn], return_inverse=True)
    weights = bootstrap_weights(of_query, draws, np.random.default_rng(seed))
    counts = np.unique(owner, return_counts=True)
    candidates = len(pairs) - counts[1][np.searchsorted(counts[0], owner[drawn])]
    chance = float(np.mean(wanted / candidates))
    return {
        "one": _about(one),
        "other": _about(other),
        "tiles": len(pairs),
        "only_in_one": unmatched[0],
        "only_in_other": unmatched[1],
        "queries": len(drawn),
        "without_candidates": int((~answered).sum()),
        "owners": int(of_query.max()) + 1,
        "leave_out": leave_out,
        "k": k,
        **{name: _summary(value, of_query, weights, chance) for name, value in values.items()},
    }


def _about(atlas: Atlas) -> dict[str, Any]:
    manifest = atlas.manifest
    return {"atlas": str(atlas.path), "encoder": manifest.name, "sha256": manifest.sha256}


def _summary(
    value: NDArray[np.float64], of_query: Ints, weights: NDArray[np.float64], chance: float
) -> dict[str, Any]:
    sums, counts = np.bincount(of_query, value), np.bincount(of_query)
    means = (weights @ sums) / (weights @ counts)
    low, high = np.quantile(means, [0.025, 0.975])
    return {
        "value": round(float(value.mean()), 4),
        "interval_95": [round(float(low), 4), round(float(high), 4)],
        "random": round(chance, 4),
    }


def _matched(one: View, other: View) -> tuple[Ints, tuple[int, int]]:
    """Return the positions (M, 2) of the tiles that both have, and how many tiles only one of them has."""
    places = {slide["name"]: n for n, slide in enumerate(other.columns.slides) if slide["name"]}
    pairs: list[tuple[int, int]] = []
    for number, slide in enumerate(one.columns.slides):
        if slide["name"] and slide["name"] in places:
            theirs = {key: at for at, key in _keys(other, places[slide["name"]])}
            pairs += [(at, theirs[key]) for at, key in _keys(one, number) if key in theirs]
    found = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    left = (len(view.columns.present()) - len(found) for view in (one, other))
    return found, (next(left), next(left))


def _keys(view: View, slide: int) -> list[tuple[int, Hashable]]:
    """Return the positions of a slide's tiles, each with what identifies the tile in the slide."""
    columns = view.columns
    first = int(columns.starts[slide])
    files = columns.files(slide)
    if files is not None:
        return list(enumerate(files, first))
    side = columns.slides[slide]["size_px_level0"]
    corners = columns.places_of(slide).tolist()
    return [(first + n, (x, y, side)) for n, (x, y) in enumerate(corners)]


def _neighbours(view: View, positions: Ints, owner: Ints, drawn: Ints, k: int) -> Ints:
    """Return the k nearest matched tiles (Q, k) of other owners, as numbers of pairs; -1 for none."""
    pair_of = np.full(view.index.positions, -1, dtype=np.int64)
    pair_of[positions] = np.arange(len(positions))
    vectors = view.index.at(positions[drawn])
    result = np.full((len(drawn), k), -1, dtype=np.int64)
    for number in np.unique(owner[drawn]):
        rows = np.flatnonzero(owner[drawn] == number)
        allowed = np.zeros(len(pair_of), dtype=bool)
        allowed[positions[owner != number]] = True
        if not allowed.any():
            continue
        _, at = find(view.state, vectors[rows], Query(k=k, exact=True), allowed)
        numbers = np.where(at >= 0, pair_of[at], -1)[:, :k]
        result[rows, : numbers.shape[1]] = numbers
    return result
