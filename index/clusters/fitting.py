"""Fits clusters to an atlas: selects the vectors and their groups, and assigns every tile."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ... import stopping
from ...errors import BadInput
from ..search.state import State
from ..search.tiles import owners
from ..vectors.tuning import gather
from . import stored as clusterings
from .clustering import Assigned, Clustering, shipped
from .fit import FIT_SAMPLE
from .fit import fit as fit_clusters

Slides = list[dict[str, Any]]
BySlide = Iterator[tuple[int, Assigned]]


def fit(
    state: State, method: str, name: str, k: int | None, min_cluster_size: int | None, seed: int
) -> dict[str, Any]:
    """Fit clusters and store them; see :meth:`Atlas.fit <histoseek.index.atlas.Atlas.fit>`."""
    slides = state.store.tile_ranges()
    given = {"k": k or "auto", "min_cluster_size": min_cluster_size, "seed": seed}
    clustering, assigned = fitted(state, method, slides, given)
    if not clustering.clusters:
        total = sum(s["tiles"] for s in slides)
        raise BadInput(
            f"{method} found no clusters among the {total:,} tiles (all are noise), so nothing was stored; "
            "lower --min-cluster-size, or use --method kmeans"
        )
    sizes: Counter[int] = Counter()
    counted = _counted(assigned, sizes)
    dropped = clusterings.store(
        state.store.path, state.store.catalog, name, clustering, state.revision, counted
    )
    facts = {"sizes": dict(sorted(sizes.items())), "names_dropped": dropped}
    return {"name": name, "method": method, **clustering.about, **facts}


def fitted(
    state: State, method: str, slides: Slides, given: dict[str, Any]
) -> tuple[Clustering, BySlide]:
    """Fit clusters on some slides and assign their tiles; nothing is stored.

    Args:
        state: state of the atlas that holds the slides.
        method: kmeans, hdbscan or encoder.
        slides: as ``Store.tile_ranges`` returns them.
        given: k (or ``auto``), min_cluster_size and seed, as in ``about`` of a clustering.

    Returns:
        The clustering, and the assignments of each slide's tiles, by slide id.
    """
    if method == "encoder":
        clustering = shipped(state.store.encoder_folder)
        return clustering, _by_slide(state, slides, clustering, None)
    k = None if given.get("k") in {None, "auto"} else int(given["k"])
    vectors, groups, complete = sample(state, slides, given["seed"])
    least = given.get("min_cluster_size")
    gate = state.manifest.tissue_gate
    clustering, assigned = stopping.aside(
        lambda: fit_clusters(vectors, method, k, least, given["seed"], groups, gate)
    )
    return clustering, _by_slide(state, slides, clustering, assigned if complete else None)


def sample(
    state: State, slides: Slides, seed: int
) -> tuple[NDArray[np.float32], NDArray[np.int64], bool]:
    """Return vectors to fit (M, D), patient or slide of each (M,), and whether these are all vectors."""
    total = sum(s["tiles"] for s in slides)
    rows = np.arange(total)
    if total > FIT_SAMPLE:
        rows = np.sort(np.random.default_rng(seed).permutation(total)[:FIT_SAMPLE])
    chunks = (state.store.vectors_of(slide) for slide in slides)
    ids = [np.arange(s["first_tile"], s["first_tile"] + s["tiles"]) for s in slides]
    tiles = np.concatenate([np.zeros(0, dtype=np.int64), *ids])[rows]
    groups = owners(state, "patient")[state.columns.positions(tiles)]
    return gather(chunks, rows, state.manifest.dim), groups, len(rows) == total


def _by_slide(
    state: State, slides: Slides, clustering: Clustering, assigned: Assigned | None
) -> BySlide:
    """Yield the assignments by slide; those of all tiles are given if they are known."""
    start = 0
    for slide in slides:
        stopping.check()
        end = start + slide["tiles"]
        if assigned is None:
            yield slide["id"], clustering.assign(state.store.vectors_of(slide))
        else:
            yield slide["id"], assigned.part(slice(start, end))
        start = end


def _counted(by_slide: BySlide, sizes: Counter[int]) -> BySlide:
    """Yield the assignments unchanged, and count the tiles of each cluster."""
    for slide, assigned in by_slide:
        sizes.update(assigned.cluster.tolist())
        yield slide, assigned
