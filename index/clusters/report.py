"""Describes the clusters of an atlas: sizes, labels, examples, names given by people, and drift."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import BadInput, whole
from ..search.state import State
from ..store.catalog import Catalog, insert
from .clustering import Assigned, Clustering
from .stored import placements

TEXT_LIMIT = 2_000
SUGGESTED_FROM = 500
"""Maximum number of tiles of a cluster from which names are proposed."""
DRIFT_FACTOR = 2.0
"""Later tiles drift if their unknown share (lower bound) exceeds this times the fitted upper bound."""


def assigned(state: State, name: str) -> tuple[NDArray[np.int64], Assigned]:
    """Return tile ids (N,) ascending and their assignments; tiles not assigned yet are left out."""
    with state.reading() as db:
        by_slide = placements(db, name)
    slides = [s for s in state.columns.slides if s["id"] in by_slide]
    ids = [np.arange(s["first_tile"], s["first_tile"] + s["tiles"]) for s in slides]
    numbers, floats, flags = np.zeros(0, dtype=np.int64), np.zeros(0), np.zeros(0, dtype=bool)
    parts = [Assigned(numbers, floats, floats, flags), *(by_slide[s["id"]][0] for s in slides)]
    columns = (
        np.concatenate([getattr(part, column.name) for part in parts])
        for column in fields(Assigned)
    )
    return np.concatenate([numbers, *ids]), Assigned(*columns)


def _names(state: State, name: str) -> dict[int, tuple[str, str]]:
    """Return names and descriptions that people gave to the clusters of a clustering."""
    with state.reading() as db:
        rows = db.execute(
            "SELECT n.* FROM clusters AS n JOIN clusterings AS c ON c.id = n.clustering_id "
            "WHERE c.name = ?",
            (name,),
        ).fetchall()
    return {row["cluster"]: (row["name"], row["description"]) for row in rows}


def rename(
    catalog: Catalog, name: str, clustering: Clustering, cluster: int, text: str, description: str
) -> None:
    """Give a cluster of the clustering ``name`` the name ``text`` and a description; "" removes them.

    Raises:
        BadInput: no such cluster, or a text is too long or none.
    """
    cluster = whole(cluster, "the number of a cluster")
    for given in (text, description):
        if not isinstance(given, str):
            raise BadInput(f"a name or description is {given!r}; expected text")
    least = 0 if clustering.method == "kmeans" else -1
    if not least <= cluster < clustering.clusters:
        raise BadInput(
            f"clustering {name!r} has no cluster {cluster}; expected {least} to "
            f"{clustering.clusters - 1}"
        )
    if max(len(text), len(description)) > TEXT_LIMIT:
        raise BadInput(f"a name or description is longer than {TEXT_LIMIT} characters; shorten it")
    with catalog.write() as db:
        (number,) = db.execute("SELECT id FROM clusterings WHERE name = ?", (name,)).fetchone()
        db.execute(
            "DELETE FROM clusters WHERE clustering_id = ? AND cluster = ?", (number, cluster)
        )
        if text or description:
            row = {"name": text, "description": description}
            insert(db, "clusters", {"clustering_id": number, "cluster": cluster, **row})


def describe(state: State, name: str, examples: int) -> list[dict[str, Any]]:
    """Describe the clusters of a clustering, by number, noise first."""
    ids, where = assigned(state, name)
    names = _names(state, name)
    columns = state.columns
    positions = columns.positions(ids)
    slides = columns.slide_of(positions)
    report = []
    for cluster in np.unique(where.cluster).tolist():
        rows = np.flatnonzero(where.cluster == cluster)
        best = _examples(where.part(rows), slides[rows], examples)
        text, description = names.get(cluster, ("", ""))
        report.append(
            {
                "cluster": cluster,
                "name": text,
                "description": description,
                "tiles": len(rows),
                "slides": len(np.unique(slides[rows])),
                "unknown": int(where.unknown[rows].sum()),
                "labels": columns.label_counts(positions[rows]),
                "examples": columns.tiles(positions[rows[best]]),
            }
        )
    return report


def _examples(where: Assigned, slides: NDArray[np.int64], count: int) -> list[int]:
    """Return rows of example tiles of a cluster: the strongest, from as many slides as possible."""
    order = np.lexsort((where.distance, -where.strength)).tolist()
    best: list[int] = []
    seen: set[int] = set()
    for repeat in (False, True):
        for row in order:
            if len(best) >= count:
                return best
            if row not in best and (repeat or int(slides[row]) not in seen):
                best.append(row)
                seen.add(int(slides[row]))
    return best


def suggest(
    state: State, name: str, words: Sequence[str], vectors: NDArray[np.float32], count: int
) -> list[dict[str, Any]]:
    """Propose names for the clusters of a clustering, by number; none for noise.

    A word's score for a cluster is its cosine with the mean of the cluster's tiles, less the word's mean
    score over all clusters: a word that fits all clusters alike names none.

    Args:
        state: of the atlas.
        name: of the clustering.
        words: W words to choose from.
        vectors: (W, D) their embeddings, of length 1.
        count: maximum number of words per cluster.
    """
    ids, where = assigned(state, name)
    names = _names(state, name)
    positions = state.columns.positions(ids)
    numbers = [int(cluster) for cluster in np.unique(where.cluster) if cluster >= 0]
    centres = []
    for cluster in numbers:
        rows = np.flatnonzero(where.cluster == cluster)
        some = rows[np.linspace(0, len(rows) - 1, min(len(rows), SUGGESTED_FROM)).astype(int)]
        mean = state.index.at(positions[some]).mean(axis=0)
        centres.append(mean / max(float(np.linalg.norm(mean)), 1e-12))
    if not numbers:
        return []
    scores = np.array(centres).reshape(len(numbers), -1) @ vectors.T
    if len(numbers) > 1:
        scores = scores - scores.mean(axis=0)
    best = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    return [
        {
            "cluster": cluster,
            "name": names.get(cluster, ("", ""))[0],
            "words": [words[column] for column in row],
        }
        for cluster, row in zip(numbers, best, strict=True)
    ]


def drift(state: State, name: str) -> dict[str, Any]:
    """Compare the share of unknown tiles between the slides that were fitted and later ones."""
    with state.reading() as db:
        by_slide = placements(db, name)
    titles = {s["id"]: s["name"] for s in state.columns.slides}
    slides = []
    counts = {True: [0, 0], False: [0, 0]}
    for number, (where, fitted) in by_slide.items():
        unknown, total = int(where.unknown.sum()), len(where.unknown)
        counts[fitted][0] += unknown
        counts[fitted][1] += total
        if not fitted and total:
            share = round(unknown / total, 4)
            title = titles.get(number, "")
            slides.append({"slide": title, "tiles": total, "unknown": unknown, "share": share})
    report: dict[str, Any] = {"clustering": name}
    for fitted, key in ((True, "fitted"), (False, "later")):
        unknown, total = counts[fitted]
        report[key] = {
            "tiles": total,
            "unknown": unknown,
            "share": round(unknown / total, 4) if total else None,
            "interval_95": None if not total else _interval(unknown, total),
        }
    limit = DRIFT_FACTOR * (report["fitted"]["interval_95"] or [0, 0])[1]
    later = report["later"]["interval_95"]
    report["usual_by_slide"] = _usual(by_slide, len(slides))
    report["drifted"] = bool(
        later and later[0] > limit and report["later"]["share"] > (report["usual_by_slide"] or 0)
    )
    report["slides"] = sorted(slides, key=lambda s: -s["share"])
    return report


def _usual(by_slide: dict[int, tuple[Assigned, bool]], later: int) -> float | None:
    """Return the share of unknown tiles that random draws of fitted slides exceed in 1 of 100 cases.

    Each draw has as many slides as came later. Slides are drawn, not tiles: tiles of one slide are alike,
    so drawing tiles would make any difference look significant.
    """
    fitted = [
        (int(where.unknown.sum()), len(where.unknown))
        for where, was in by_slide.values()
        if was and len(where.unknown)
    ]
    if not fitted or not later:
        return None
    counts = np.array(fitted)
    drawn = counts[np.random.default_rng(0).integers(0, len(counts), (2_000, later))].sum(axis=1)
    return round(float(np.quantile(drawn[:, 0] / drawn[:, 1], 0.99)), 4)


def _interval(count: int, total: int) -> list[float]:
    """Return the 95 % interval of a share (Wilson 1927)."""
    from scipy.stats import binomtest

    interval = binomtest(count, total).proportion_ci(method="wilson")
    return [round(float(interval.low), 4), round(float(interval.high), 4)]
