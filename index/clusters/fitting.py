"""Fitting clusters to an atlas: which vectors, whose, and where each tile then belongs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ... import stopping
from ...errors import BadInput
from ..search.tiles import owners
from ..vectors.tuning import gather
from . import stored as clusterings
from .clustering import Assigned, Clustering, shipped
from .fit import FIT_SAMPLE
from .fit import fit as fit_clusters

if TYPE_CHECKING:
    from ..atlas import Atlas

Slides = list[dict[str, Any]]
Placed = Iterator[tuple[int, Assigned]]


def fit(
    atlas: Atlas, method: str, name: str, k: int | None, min_cluster_size: int | None, seed: int
) -> dict[str, Any]:
    """Fit and store; see :meth:`Atlas.fit <histoseek.index.atlas.Atlas.fit>`."""
    revision = atlas.catalog.revision()
    slides = atlas.generations.slides()
    given = {"k": k or "auto", "min_cluster_size": min_cluster_size, "seed": seed}
    clustering, placed = fitted(atlas, method, slides, given)
    if not clustering.clusters:
        total = sum(s["tiles"] for s in slides)
        raise BadInput(
            f"{method} finds no clusters among the {total:,} tiles: to it all are noise. Nothing was "
            "stored; lower --min-cluster-size, or fit kmeans"
        )
    sizes: Counter[int] = Counter()
    where = _counted(placed, sizes)
    dropped = clusterings.store(atlas.path, atlas.catalog, name, clustering, revision, where)
    about = clustering.about
    return {
        "name": name,
        "method": method,
        **about,
        "sizes": dict(sorted(sizes.items())),
        "names_dropped": dropped,
    }


def fitted(
    atlas: Atlas, method: str, slides: Slides, given: dict[str, Any]
) -> tuple[Clustering, Placed]:
    """Fit clusters on some slides, and place their tiles; nothing is stored.

    Args:
        atlas: whose slides they are.
        method: kmeans, hdbscan or encoder.
        slides: as ``Generations.slides`` gives them.
        given: k (or ``auto``), min_cluster_size and seed, as ``about`` of a clustering has them.

    Returns:
        The clustering, and where each slide's tiles belong, by slide id.
    """
    if method == "encoder":
        return (made := shipped(atlas.encoder_bundle)), _place(atlas, slides, made, None)
    k = None if given.get("k") in {None, "auto"} else int(given["k"])
    vectors, groups, whole = sample(atlas, slides, given["seed"])
    least = given.get("min_cluster_size")
    gate = atlas.manifest.gate
    clustering, placed = stopping.aside(
        lambda: fit_clusters(vectors, method, k, least, given["seed"], groups, gate)
    )
    return clustering, _place(atlas, slides, clustering, placed if whole else None)


def sample(
    atlas: Atlas, slides: Slides, seed: int
) -> tuple[NDArray[np.float32], NDArray[np.int64], bool]:
    """Return vectors to fit (M, D), patient or slide of each (M,), and whether these are all there are."""
    total = sum(s["tiles"] for s in slides)
    rows = np.arange(total)
    if total > FIT_SAMPLE:
        rows = np.sort(np.random.default_rng(seed).permutation(total)[:FIT_SAMPLE])
    chunks = (atlas.generations.vectors_of(slide) for slide in slides)
    view = atlas.view()
    first = np.array([s["first_tile"] for s in slides], dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum([s["tiles"] for s in slides])]).astype(np.int64)
    number = np.searchsorted(starts, rows, side="right") - 1
    positions = view.columns.positions(first[number] + rows - starts[number])
    groups = owners(view, "patient")[positions]
    return gather(chunks, rows, atlas.manifest.dim), groups, len(rows) == total


def _place(atlas: Atlas, slides: Slides, clustering: Clustering, known: Assigned | None) -> Placed:
    start = 0
    for slide in slides:
        stopping.check()
        end = start + slide["tiles"]
        if known is None:
            yield slide["id"], clustering.assign(atlas.generations.vectors_of(slide))
        else:
            yield slide["id"], known.part(slice(start, end))
        start = end


def _counted(placed: Iterable[tuple[int, Assigned]], sizes: Counter[int]) -> Placed:
    """Pass placements on and count the sizes of the clusters."""
    for slide, where in placed:
        sizes.update(where.cluster.tolist())
        yield slide, where
